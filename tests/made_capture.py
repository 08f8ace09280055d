"""Made-up streams for the tests of wire format and captures: traffic shaped like real traffic, and forged frames."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

import numpy as np

from contracts import wire
from contracts.arrays import Values
from contracts.clock import ClockPair
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch, Content, Flag
from contracts.topology import NO_DEVICE, Device, Role, Sighting, Topology

HEADER = StreamHeader(
    source="ftrace",
    host="measured.example",
    run="5f2b7c9e",
    kernel="6.1.0-42-amd64",
    boot_id="0d6be1a3-7d0c-4a5e-9a59-3f1d53a3f3c1",
    cpus=2,
    clock=ClockPair(monotonic_ns=123_456_000_000_000, utc_ns=1_760_000_000_000_000_000, uncertainty_ns=31),
    hooks=("net:net_dev_queue", "net:net_dev_start_xmit", "net:netif_rx", "net:netif_receive_skb"),
    mace_version="0.1.0",
    command=("mace", "record", "-o", "run.mace"),
)

CONTAINERS = 4

TOPOLOGY = Topology(
    from_ns=123_456_000_000_000,
    host_netns=4026531840,
    devices=(
        Device(4026531840, 1, "lo", "loopback", netns_name="host", role=Role.LOOPBACK),
        Device(4026531840, 2, "out0", "", default_route=True, netns_name="host", role=Role.OUTER),
        Device(4026531840, 3, "br0", "bridge", netns_name="host", role=Role.HOST),
        *(
            Device(4026531840, 10 + c, f"veth{c}", "veth", 4026532000 + c, 2, 3, netns_name="host", role=Role.HOST)
            for c in range(CONTAINERS)
        ),
        *(
            Device(
                netns=4026532000 + c,
                ifindex=2,
                name="eth0",
                kind="veth",
                peer_netns=4026531840,
                peer_ifindex=10 + c,
                default_route=True,
                netns_name=f"made{c}",
                container=f"naïve-{c}",
                role=Role.INNER,
            )
            for c in range(CONTAINERS)
        ),
    ),
    sightings=(
        NO_DEVICE,
        Sighting("eth0"),
        Sighting("br0"),
        Sighting("out0"),
        Sighting("rem0"),
        *(Sighting(f"veth{c}") for c in range(CONTAINERS)),
    ),
)

# One round trip, as seen from a container on a bridge: (hook, device) where the device is a sighting, or V for the
# container's veth. Request and reply are two kernel buffers.
_V = -1
_REQUEST = ((1, 1), (2, 1), (3, _V), (4, _V), (4, 2), (1, 3), (2, 3), (3, 4), (4, 4))
_REPLY = ((1, 4), (2, 4), (3, 3), (4, 3), (1, 2), (2, 2), (1, _V), (2, _V), (3, 1), (4, 1), (7, 0))


def traffic(count: int, seed: int = 1, buffers: int = 300, *, content: bool = False) -> Batch:
    """Return `count` records of round trips on two CPUs at once, whose columns are as repetitive as real ones.

    The records have the shape of a ping flood in the lab: 20 records a round trip, 0.5-1.5 µs apart, with pauses;
    buffers that are reused at once from a free list of a few hundred; few packet sizes; five to fifteen devices.
    """
    rng = np.random.default_rng(seed)
    steps = _REQUEST + _REPLY
    trips = -(-count // len(steps))
    hook = np.tile(np.array([h for h, _ in steps], "u1"), trips)
    dev = np.tile(np.array([d for _, d in steps]), (trips, 1))
    veth = len(TOPOLOGY.sightings) - CONTAINERS + rng.integers(0, CONTAINERS, trips)
    dev = np.where(dev == _V, veth[:, None], dev)
    pool = rng.integers(1, 1 << 63, buffers, dtype="u8") * np.uint64(2)
    of_trip = pool[(rng.geometric(0.05, (trips, 2)) - 1) % buffers]
    skb_id = np.where(np.arange(len(steps)) < len(_REQUEST), of_trip[:, :1], of_trip[:, 1:])
    l3_len = np.repeat(rng.choice([84, 84, 84, 46, 1500, 60, 1052], trips), len(steps)).reshape(trips, len(steps))
    l3_len[:, -1] = 0
    cpu = np.repeat(rng.integers(0, HEADER.cpus, trips), len(steps))
    gaps = rng.gamma(2.0, 400, (trips, len(steps))).astype("i8") + 150
    gaps[:, 0] += rng.exponential(6000, trips).astype("i8")
    gaps[rng.random(trips) < 0.002, 0] += 10_000_000
    # The second CPU works at the same time: its trips, moved, fall between those of the first.
    ts_ns = TOPOLOGY.from_ns + np.cumsum(gaps) + np.where(cpu == 1, 15_000, 0)
    order = np.lexsort((cpu, ts_ns))[:count]
    columns = {"ts_ns": ts_ns, "skb_id": skb_id.ravel(), "dev": dev.ravel(), "l3_len": l3_len.ravel(), "cpu": cpu}
    read = _content(trips, seed)[order] if content else None
    return Batch.of(count, read, **{name: column[order] for name, column in columns.items()}, hook=hook[order])


def _content(trips: int, seed: int) -> Content:
    """Return the content that the module would read of these round trips: UDP and numbered echo requests."""
    rng = np.random.default_rng((seed, trips))
    steps = len(_REQUEST + _REPLY)
    packet = np.repeat(np.arange(2 * trips), np.tile([len(_REQUEST), len(_REPLY)], trips))
    echo = np.repeat(rng.random(trips) < 0.5, steps)
    number = np.repeat(np.arange(trips) & 0xFFFF, steps)
    port = np.repeat(rng.integers(32_768, 60_999, 16)[rng.integers(0, 16, trips)], steps)
    return Content.of(
        trips * steps,
        packet_key=rng.integers(1, 1 << 64, 2 * trips, dtype="u8")[packet],
        l4_src=port,
        l4_dst=np.where(echo, number, 4_000),
        ip_id=rng.integers(0, 1 << 16, 2 * trips)[packet],
        ip_version=np.full(len(packet), 4),
        l4_proto=np.where(echo, 1, 17),
        l4_bits=np.where(echo & (packet % 2 == 0), 8, 0),
        flags=np.full(len(packet), Flag.KEY | Flag.FLOW),
    )


def batches(records: Batch, size: int) -> list[Batch]:
    """Yield the records in batches of `size`."""
    return [records[start : start + size] for start in range(0, len(records), size)]


def encode(items: Iterable[StreamItem], header: StreamHeader = HEADER, end: bool = True) -> list[bytes]:
    """Return the frames of a stream."""
    encoder = wire.Encoder()
    frames = [encoder.header(header)] + [encoder.item(item) for item in items]
    return [*frames, encoder.end()] if end else frames


def capture_bytes(items: Iterable[StreamItem], header: StreamHeader = HEADER, end: bool = True) -> bytes:
    """Return the bytes of a capture file."""
    return wire.FILE_HEAD + b"".join(encode(items, header, end))


def same(one: StreamItem, other: StreamItem) -> bool:
    """Return whether two items are equal, including batches."""
    if isinstance(one, Batch) and isinstance(other, Batch):
        mine, theirs = dict(all_columns(one)), dict(all_columns(other))
        return mine.keys() == theirs.keys() and all(
            mine[n].dtype == theirs[n].dtype and np.array_equal(mine[n], theirs[n]) for n in mine
        )
    return one == other


def all_columns(batch: Batch) -> Iterator[tuple[str, Values]]:
    """Return (name, array) of all columns of a batch, those of its content last."""
    yield from batch.columns()
    if batch.content is not None:
        yield from batch.content.columns()


def same_stream(one: Sequence[StreamItem], other: Sequence[StreamItem]) -> bool:
    """Return whether two streams have equal items in the same order."""
    return len(one) == len(other) and all(map(same, one, other))


def digest(items: Iterable[StreamItem]) -> str:
    """Return a SHA-256 digest over name, type, length and little-endian bytes of every column of every batch."""
    sha = hashlib.sha256()
    for item in items:
        if isinstance(item, Batch):
            for name, column in all_columns(item):
                sha.update(f"{name} {column.dtype.str} {len(column)}\n".encode())
                sha.update(column.tobytes())
    return sha.hexdigest()


def forge(
    message: int,
    raw: bytes,
    *,
    stream: int,
    sequence: int,
    stored: bytes | None = None,
    raw_size: int | None = None,
    stored_size: int | None = None,
    version: int = wire.WIRE_VERSION,
    flags: int | None = None,
    reserved: int = 0,
) -> bytes:
    """Return a frame with valid checksums and otherwise arbitrary fields, as a hostile writer can make it."""
    payload = raw if stored is None else stored
    head = wire.HEAD.pack(
        wire.SYNC,
        version,
        message,
        flags if flags is not None else int(stored is not None),
        reserved,
        stream,
        len(payload) if stored_size is None else stored_size,
        sequence,
        len(raw) if raw_size is None else raw_size,
        crc32(payload),
        0,
    )[:-4]
    return head + crc32(head).to_bytes(4, "little") + payload


def stream_tag(frame: bytes) -> int:
    """Return the tag of the stream that a frame belongs to."""
    return wire.parse_head(frame).stream


def to_json(value: object) -> bytes:
    return json.dumps(value).encode()
