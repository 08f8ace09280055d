import json
import struct
import tracemalloc
from dataclasses import asdict, replace
from zlib import crc32

import numpy as np
import pytest
import zstandard

from contracts import wire
from contracts.errors import WireError
from contracts.hooks import Hook
from contracts.interfaces import Progress
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Content
from contracts.topology import Device, Sharer, Sighting
from contracts.wire import Decoder, Encoder, FrameKind
from tests.made_capture import (
    HEADER,
    TOPOLOGY,
    all_columns,
    batches,
    encode,
    forge,
    same,
    same_stream,
    stream_tag,
    to_json,
    traffic,
)


def decode(frames, **how):
    decoder = Decoder(**how)
    return [decoder.frame(frame) for frame in frames]


def begun(gaps=False):
    """Return a decoder that has read the header and the topology, and the stream's tag."""
    decoder = Decoder(gaps=gaps)
    frames = encode([TOPOLOGY], end=False)
    for frame in frames:
        decoder.frame(frame)
    return decoder, stream_tag(frames[0])


def payload(count, *descriptors, before=0, columns=b""):
    return struct.pack("<IQB", count, before, len(descriptors)) + bytes(descriptors) + columns


# --- round trips ----------------------------------------------------------------------------------


def test_a_stream_is_decoded_unchanged():
    items = [TOPOLOGY, *batches(traffic(5_000), 1_000)]
    header, *middle, end = decode(encode(items))
    assert header == HEADER
    assert same_stream(middle, items)
    assert end == wire.End(records=5_000, lost=0)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 200_000])
def test_batches_of_every_size(count, content):
    batch = traffic(count, content=content)
    assert same(decode(encode([TOPOLOGY, batch]))[2], batch)


def test_batches_with_content_and_without_can_take_turns():
    pieces = batches(traffic(40, content=True), 10)
    pieces[1] = replace(pieces[1], content=None)
    assert same_stream(decode(encode([TOPOLOGY, *pieces]))[2:-1], pieces)
    whole = Batch.concatenate(pieces)
    assert same(whole[:10], pieces[0])
    assert all(not column.any() for _, column in whole[10:20].content.columns())


def test_extremes_of_every_column():
    for name, dtype in DTYPES.items():
        if name in ("dev", "hook"):
            continue
        info = np.iinfo(dtype)
        for values in ([info.min, info.max], [info.max, info.max], [info.min, info.min], [info.min, 0, 1, info.max]):
            if name != "ts_ns":
                values = values[::-1]
            batch = Batch.of(len(values), hook=np.full(len(values), Hook.NETIF_RX), **{name: np.array(values, dtype)})
            # No topology: a topology for a record at the smallest possible time would have to precede that time.
            assert same(decode(encode([batch]))[1], batch), (name, values)


def test_extremes_of_every_column_of_content():
    for name, dtype in CONTENT_DTYPES.items():
        high = np.iinfo(dtype).max
        for values in ([high, 0], [high, high], [0, 0], [high, 1, 0]):
            content = Content.of(len(values), **{name: np.array(values, dtype)})
            batch = Batch.of(len(values), content, hook=np.full(len(values), Hook.NETIF_RX))
            assert same(decode(encode([batch]))[1], batch), (name, values)


def test_strided_columns_of_a_ring_are_encoded():
    ring = np.zeros(100, dtype=[*DTYPES.items(), *CONTENT_DTYPES.items(), ("pad", "V9")])
    ring["ts_ns"] = np.arange(100) ** 2
    ring["hook"] = Hook.NETIF_RX
    ring["skb_id"] = np.arange(100) % 7
    ring["packet_key"] = np.arange(100) % 11
    view = Batch(*(ring[name] for name in DTYPES), content=Content(*(ring[name] for name in CONTENT_DTYPES)))
    assert same(decode(encode([view]))[1], view[np.arange(100)])


def test_decoded_columns_can_be_written_to_and_pin_no_buffer():
    batch = decode(encode([TOPOLOGY, traffic(100, content=True)]))[2]
    for _, column in all_columns(batch):
        assert column.flags.writeable
        assert column.flags.c_contiguous
        assert column.base is None


def test_lost_records_are_in_the_totals():
    marker = Batch.of(1, ts_ns=[5], skb_id=[9], l3_len=[1234], hook=[Hook.LOST])
    assert decode(encode([marker]))[-1] == wire.End(records=1, lost=1234)


def test_topologies_follow_one_another():
    later = replace(
        TOPOLOGY,
        from_ns=TOPOLOGY.from_ns + 10**12,
        devices=TOPOLOGY.devices[1:],
        sightings=(*TOPOLOGY.sightings, Sighting("new0", 4026539999, 7)),
    )
    assert decode(encode([TOPOLOGY, traffic(10), later]))[3] == later


def test_cookies_of_namespaces_travel_and_older_readers_see_the_rest():
    cookies = replace(
        TOPOLOGY,
        devices=(*TOPOLOGY.devices[1:], replace(TOPOLOGY.devices[0], netns_cookie=7)),
        sightings=(*TOPOLOGY.sightings, Sighting("new0", 4026539999, 7, netns_cookie=2**40)),
    )
    assert decode(encode([cookies]))[1] == cookies
    # Keys of their own, which an older reader ignores; and none where there is nothing to say.
    assert b"netns_cookie" not in wire._to_json(wire._topology_fields(TOPOLOGY, 0))
    without = wire._topology_fields(cookies, 0)
    del without["netns_cookies"]
    assert without["sightings"][-1] == ["new0", 4026539999, 7]
    for wrong in ([1], [-1] * len(cookies.sightings), ["1"] * len(cookies.sightings)):
        with pytest.raises(WireError, match="netns_cookies"):
            wire._topology(wire._to_json(without | {"netns_cookies": wrong}), None)


def test_ids_and_sharers_travel_and_older_readers_see_the_rest():
    told = replace(
        TOPOLOGY,
        devices=(
            *TOPOLOGY.devices[1:],
            replace(TOPOLOGY.devices[0], container_id="a" * 64, pod_containers="app,sidecar"),
        ),
        on_host_network=(Sharer("agent", "b" * 64), Sharer("image.sif[7]")),
    )
    assert decode(encode([told]))[1] == told
    # Keys of their own, which an older reader ignores; and none where there is nothing to say.
    written = wire._topology_fields(told, 0)
    assert written["on_host_network"] == [
        {"container": "agent", "container_id": "b" * 64},
        {"container": "image.sif[7]"},
    ]
    before = wire._to_json(wire._topology_fields(TOPOLOGY, 0))
    assert b"container_id" not in before
    assert b"pod_containers" not in before
    assert b"on_host_network" not in before
    for wrong in ({}, [1], [{}], [{"container": 5}], [{"container": "a", "container_id": 5}]):
        with pytest.raises(WireError, match="on_host_network"):
            wire._topology(wire._to_json(written | {"on_host_network": wrong}), None)


def test_many_sightings_travel_once():
    many = replace(TOPOLOGY, sightings=TOPOLOGY.sightings + tuple(Sighting(f"veth{n:x}") for n in range(5_000)))
    more = replace(many, sightings=(*many.sightings, Sighting("last0")))
    frames = encode([many, more])
    assert decode(frames)[1:3] == [many, more]
    assert len(frames[2]) < len(frames[1]) / 10
    encoder = Encoder()
    encoder.header(HEADER)
    encoder.topology(many)
    assert len(encoder.topology(more, full=True)) > len(frames[1]) / 2


def test_names_that_are_no_unicode_are_spelt_out():
    odd = Device(1, 2, b"veth\x80".decode(errors="surrogateescape"), "veth")
    got = decode(encode([replace(TOPOLOGY, devices=(odd,))], replace(HEADER, command=("a\udcffb",))))
    assert got[1].devices[0].name == "veth\\x80"
    assert got[0].command == ("a\\xffb",)


def test_progress_is_a_promise():
    batch = traffic(10)
    upto = Progress(int(batch.ts_ns[0]))
    assert decode(encode([TOPOLOGY, upto, Progress(5), batch]))[2:4] == [upto, Progress(5)]
    with pytest.raises(WireError, match="after progress up to"):
        encode([TOPOLOGY, Progress(upto.upto_ns + 1), batch])


# --- sizes ----------------------------------------------------------------------------------------


def test_bytes_per_record_of_container_traffic():
    frames = encode([TOPOLOGY, *batches(traffic(200_000), 50_000)])
    assert sum(map(len, frames)) / 200_000 <= 16 / 4  # the limit for MQTT is 16; such traffic takes 2.7


def test_a_tiny_batch_is_a_small_message():
    for seed in range(20):
        assert len(encode([TOPOLOGY, traffic(5, seed)])[2]) <= 150


def test_missing_content_takes_a_byte():
    frames = [encode([TOPOLOGY, traffic(2_000, content=content)]) for content in (False, True)]
    assert len(frames[1][2]) > len(frames[0][2]) + 1_000
    empty = replace(traffic(2_000), content=Content.of(2_000))
    # Content that is all zero takes one more byte per column.
    assert len(encode([TOPOLOGY, empty])[2]) <= len(frames[0][2]) + 20


def test_the_header_can_be_read_without_mace():
    assert b'"command":["mace","record","-o","run.mace"]' in encode([])[0]


# --- the writer's checks --------------------------------------------------------------------------


def test_a_writer_refuses_items_that_readers_refuse():
    def at(*times, **columns):
        return Batch.of(len(times), ts_ns=times, hook=np.full(len(times), Hook.NETIF_RX), **columns)

    def refuses(match, *items):
        with pytest.raises(WireError, match=match):
            encode(items)

    zero = replace(TOPOLOGY, from_ns=0)
    refuses("inside a batch", at(2, 1))
    refuses("5 ns after 6 ns", at(6), at(5))
    refuses("device 1, the topology so far has 1", at(1, dev=[1]))
    refuses("device 9, the topology so far has 9", zero, at(1, dev=[9]))
    refuses("from 7 ns after a record of 7 ns", zero, at(7), replace(TOPOLOGY, from_ns=7))
    refuses("from 4 ns after one from 5 ns", replace(zero, from_ns=5), replace(zero, from_ns=4))
    refuses("changes the sightings", zero, replace(zero, sightings=zero.sightings[:-1]))
    refuses("'no device'", replace(zero, sightings=()))
    refuses("listed twice", replace(zero, devices=zero.devices * 2))
    refuses("at most 1048576", Batch.of(wire.MAX_RECORDS + 1, hook=np.full(wire.MAX_RECORDS + 1, 1)))
    refuses("hook 0", Batch.of(1))
    refuses("a TOPOLOGY of .* at most 8388608", replace(zero, devices=(Device(1, 1, "x" * (8 << 20), ""),)))


# --- damaged frames -------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_flipped_bit_is_noticed():
    frames = encode([TOPOLOGY, traffic(50)])
    for number, frame in enumerate(frames):
        for bit in range(len(frame) * 8):
            broken = bytearray(frame)
            broken[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                decode([*frames[:number], bytes(broken)])


def test_every_cut_is_noticed():
    frames = encode([TOPOLOGY, traffic(50)])
    for number, frame in enumerate(frames):
        for size in range(len(frame)):
            with pytest.raises(WireError):
                decode([*frames[:number], frame[:size]])


def test_frames_out_of_their_places():
    frames = encode([TOPOLOGY, *batches(traffic(30), 10)])
    others = encode([TOPOLOGY], replace(HEADER, run="other"))
    header, topology, first, second, third, end = frames
    for match, order in {
        "frame 3 where 2 should be": [header, topology, second],
        "frame 2 where 3 should be": [header, topology, first, first],
        "a BATCH after the END": [*frames, third],
        "a HEADER after the HEADER": [header, header],
        "a TOPOLOGY before the HEADER": [topology],
        "another stream": [header, others[1]],
        "frame 5 where 2": [header, topology, end],
    }.items():
        with pytest.raises(WireError, match=match):
            decode(order)


def test_a_refused_frame_changes_nothing():
    frames = encode([TOPOLOGY, *batches(traffic(30), 10)])
    decoder = Decoder()
    got = []
    for frame in frames:
        for broken in (frame[:-1], frame + b"x", frame[:40] + bytes([frame[40] ^ 1]) + frame[41:]):
            with pytest.raises(WireError):
                decoder.frame(broken)
        got.append(decoder.frame(frame))
    assert same_stream(got[1:-1], [TOPOLOGY, *batches(traffic(30), 10)])


def test_missing_frames_are_counted_and_marked():
    header, topology, first, _, third, end = encode([TOPOLOGY, *batches(traffic(30), 10)])
    decoder = Decoder(gaps=True)
    for frame in (header, topology, first):
        decoder.frame(frame)
    after = decoder.frame(third)
    assert isinstance(after, Batch)
    assert decoder.missing == 10
    whole = traffic(30)
    markers, rest = after[: HEADER.cpus], after[HEADER.cpus :]
    assert same(rest, whole[20:])
    assert markers.hook.tolist() == [Hook.LOST] * HEADER.cpus
    assert markers.cpu.tolist() == list(range(HEADER.cpus))
    assert markers.ts_ns.tolist() == [whole.ts_ns[9]] * HEADER.cpus
    assert markers.skb_id.tolist() == [whole.ts_ns[20]] * HEADER.cpus
    assert after.lost == 0  # missing frames, not losses of the ring
    decoder.frame(end)
    assert (decoder.records, decoder.missing) == (30, 10)


def test_the_end_mark_reveals_missing_last_frames():
    frames = encode([TOPOLOGY, *batches(traffic(30), 10)])
    decoder = Decoder(gaps=True)
    for frame in (*frames[:3], frames[-1]):
        decoder.frame(frame)
    assert decoder.missing == 20


def test_gaps_do_not_allow_descending_times():
    frames = encode([TOPOLOGY, *batches(traffic(30), 10)])
    decoder = Decoder(gaps=True)
    for frame in (*frames[:2], frames[3]):
        decoder.frame(frame)
    with pytest.raises(WireError, match="frame 2 where 4 should be"):
        decoder.frame(frames[2])


# --- hostile frames -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "how"),
    [
        ("wire version 3, this MACE reads 1 to 2", {"version": 3}),
        ("wire version 0", {"version": 0}),
        ("wire version 1 in a stream of version 2", {"version": 1}),
        ("flags 0x02", {"flags": 2}),
        ("flags 0x00 0x01", {"reserved": 1}),
        ("unknown message 9", {"message": 9}),
        ("unknown message 0", {"message": 0}),
        ("a BATCH of 4294967295 bytes, at most", {"raw_size": 0xFFFFFFFF}),
        ("a TOPOLOGY of 8388609 bytes, at most", {"message": FrameKind.TOPOLOGY, "raw_size": (8 << 20) + 1}),
        ("cannot be stored", {"raw_size": 100}),
        ("cannot be stored", {"flags": wire.COMPRESSED}),
        ("the head says 27", {"stored_size": 27, "raw_size": 27}),
    ],
)
def test_hostile_heads(match, how):
    decoder, tag = begun()
    message = how.pop("message", FrameKind.BATCH)
    with pytest.raises(WireError, match=match):
        decoder.frame(forge(message, payload(0, *[0] * 8), stream=tag, sequence=2, **how))


def compressed(raw, **how):
    return zstandard.ZstdCompressor(**how).compress(raw)


@pytest.mark.parametrize(
    ("match", "stored", "raw_size"),
    [
        ("disagree about its size", compressed(bytes(1 << 20)), 1 << 19),
        ("disagree about its size", compressed(bytes(1 << 20), write_content_size=False), 1 << 20),
        # A decompression bomb: the zstd frame announces 1 TiB (magic, single segment with 8 bytes of size).
        ("disagree about its size", b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\0\0", 1000),
        ("does not decompress", b"\x28\xb5\x2f\xfd\xe0" + (1000).to_bytes(8, "little") + b"\x07\0\0", 1000),
        ("does not decompress", b"no zstd at all", 1000),
        ("does not decompress", compressed(bytes(1000)) + b"more", 1000),
        ("does not decompress", compressed(bytes(1000))[:-1], 1000),
    ],
)
def test_hostile_payloads(match, stored, raw_size):
    decoder, tag = begun()
    tracemalloc.start()
    with pytest.raises(WireError, match=match):
        decoder.frame(forge(FrameKind.BATCH, b"", stored=stored, raw_size=raw_size, stream=tag, sequence=2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


HOOK_OK = bytes([Hook.NETIF_RX])
TIMES, PLAIN = 2 << 4, 1 << 4


@pytest.mark.parametrize(
    ("match", "raw"),
    [
        ("a BATCH of 3 bytes", b"abc"),
        ("a BATCH of 20 bytes, at least 21", payload(0, *[0] * 8)[:-1]),
        ("a BATCH of 21 bytes, at least 31", payload(0, *[0] * 8).replace(b"\x08", b"\x12", 1)),
        ("a batch of 0 columns", payload(0)),
        ("a batch of 9 columns, expected 8, or 18", payload(0, *[0] * 9)),
        ("column flags: no encoding 0 of 2", payload(1, TIMES, *[0] * 6, 1, *[0] * 9, 2, columns=bytes(11))),
        (
            "column packet_key: no encoding 1 of 3",
            payload(1, TIMES, *[0] * 6, 1, PLAIN | 3, *[0] * 9, columns=bytes(12)),
        ),
        ("a batch of 4294967295 records", payload(0xFFFFFFFF, *[0] * 8)),
        ("a batch of 1048577 records", payload((1 << 20) + 1, TIMES, *[0] * 6, 1, columns=bytes(8) + HOOK_OK)),
        ("whose columns take", payload(1 << 20, TIMES | 8, *[PLAIN | 1] * 7)),
        ("whose columns take", payload(1, TIMES, *[0] * 6, 1, columns=bytes(8) + HOOK_OK + b"more")),
        ("column ts_ns: no encoding 0", payload(1, 0, *[0] * 6, 1, columns=HOOK_OK)),
        ("column ts_ns: no encoding 1", payload(1, PLAIN | 8, *[0] * 6, 1, columns=bytes(8) + HOOK_OK)),
        ("column ts_ns: no encoding 2 of 9", payload(1, TIMES | 9, *[0] * 6, 1, columns=bytes(8) + HOOK_OK)),
        ("column skb_id: no encoding 2", payload(1, TIMES, TIMES, *[0] * 5, 1, columns=bytes(16) + HOOK_OK)),
        ("column skb_id: no encoding 15", payload(1, TIMES, 0xF0, *[0] * 5, 1, columns=bytes(16) + HOOK_OK)),
        ("column cpu: no encoding 1 of 4", payload(1, TIMES, *[0] * 3, PLAIN | 4, 0, 0, 1, columns=bytes(13))),
        ("column skb_id: no encoding 1 of 3", payload(1, TIMES, PLAIN | 3, *[0] * 5, 1, columns=bytes(12))),
        ("column skb_id: no encoding 1 of 0", payload(1, TIMES, PLAIN, *[0] * 5, 1, columns=bytes(9))),
        ("column hook: no encoding 0 of 2", payload(1, TIMES, *[0] * 6, 2, columns=bytes(10))),
        ("column ts_ns: no encoding 2 of 0 bytes for 0", payload(0, TIMES, *[0] * 7, columns=bytes(8))),
        ("column hook: no encoding 0 of 1 bytes for 0", payload(0, *[0] * 7, 1, columns=b"\1")),
        ("hook 0, which", payload(1, TIMES, *[0] * 7, columns=bytes(8))),
        ("hook 254, which", payload(1, TIMES, *[0] * 6, 1, columns=bytes(8) + b"\xfe")),
        ("device 200, the topology so far has 9", payload(1, TIMES, 0, 1, *[0] * 4, 1, columns=bytes(8) + b"\xc8\4")),
        (
            "do not fit 64 bits",
            payload(2, TIMES | 1, *[0] * 6, 1, columns=(2**63 - 1).to_bytes(8, "little") + b"\1" + HOOK_OK),
        ),
        (
            "do not fit 64 bits",  # two overflows: the last time is not below the first
            payload(4, TIMES | 8, *[0] * 6, 1, columns=bytes(8) + bytes(21) + b"\x7f" * 3 + HOOK_OK),
        ),
        ("follows record 7 after record 0", payload(0, *[0] * 8, before=7)),
    ],
)
def test_hostile_batches(match, raw):
    decoder, tag = begun()
    tracemalloc.start()
    with pytest.raises(WireError, match=match):
        decoder.frame(forge(FrameKind.BATCH, raw, stream=tag, sequence=2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_largest_batch_takes_bounded_memory():
    # The most expensive message: a few bytes that encode 2^20 records.
    decoder, tag = begun()
    raw = payload(1 << 20, TIMES | 1, *[0] * 6, 1, *[0] * 10, columns=bytes(8) + bytes((1 << 20) - 1) + HOOK_OK)
    frame = forge(FrameKind.BATCH, raw, stored=compressed(raw), stream=tag, sequence=2)
    assert len(frame) < 200
    tracemalloc.start()
    decoder.frame(frame)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def as_version_1(payload_of_2):
    """Return a batch's payload in version 1: eight columns, without their number."""
    return payload_of_2[:12] + payload_of_2[13:]


def version_1(*payloads):
    header = to_json({"wire": 1} | asdict(HEADER))
    frames = [(FrameKind.HEADER, header), *((FrameKind.BATCH, raw) for raw in payloads)]
    tag = crc32(header)
    return [forge(message, raw, stream=tag, sequence=n, version=1) for n, (message, raw) in enumerate(frames)]


def test_a_stream_of_version_1_is_read():
    one = payload(1, TIMES, *[0] * 6, 1, columns=bytes(8) + HOOK_OK)
    decoder = Decoder()
    header, batch = (decoder.frame(frame) for frame in version_1(as_version_1(one)))
    assert (header, decoder.version) == (HEADER, 1)
    assert same(batch, Batch.of(1, hook=[Hook.NETIF_RX]))
    with pytest.raises(WireError, match="wire version 2 in a stream of version 1"):
        decoder.frame(forge(FrameKind.BATCH, one, stream=stream_tag(version_1()[0]), sequence=2))


@pytest.mark.parametrize("size", [0, 3, 11, 12, 13, 19])
def test_batches_of_version_1_that_are_cut(size):
    decoder = Decoder()
    header, batch = version_1(as_version_1(payload(0, *[0] * 8))[:size])
    decoder.frame(header)
    with pytest.raises(WireError, match=r"a BATCH of|a batch of"):
        decoder.frame(batch)


HEADER_FIELDS = {"wire": wire.WIRE_VERSION} | asdict(HEADER)
TOPOLOGY_FIELDS = {"from_ns": 1, "host_netns": 1, "devices": [], "first_sighting": 0, "sightings": [["", 0, 0]]}
DEVICE = {"netns": 1, "ifindex": 1, "name": "a", "kind": ""}


@pytest.mark.parametrize(
    ("match", "raw"),
    [
        ("not JSON", b""),
        ("not JSON", b"\xff"),
        ("not JSON", b"{"),
        ("not JSON", b"[" * 1_000_000),
        ("not JSON", b'{"a":' * 1_000_000),
        ("not JSON", b'{"wire":' + b"9" * 5_000 + b"}"),
        ("JSON with NaN", b'{"wire":NaN}'),
        ("expected a JSON object, found list", b"[]"),
        ("expected a JSON object, found int", b"1"),
        ("wire: expected int, found nothing", b"{}"),
        ("wire version 3", to_json(HEADER_FIELDS | {"wire": 3})),
        ("names wire version 1, in a frame of version 2", to_json(HEADER_FIELDS | {"wire": 1})),
        ("cpus: 0 is not in 1..65536", to_json(HEADER_FIELDS | {"cpus": 0})),
        ("cpus: 70000 is not in", to_json(HEADER_FIELDS | {"cpus": 70000})),
        ("cpus: expected int, found True", to_json(HEADER_FIELDS | {"cpus": True})),
        ("cpus: expected int, found 2.0", to_json(HEADER_FIELDS | {"cpus": 2.0})),
        ("host: expected str, found 3", to_json(HEADER_FIELDS | {"host": 3})),
        ("host: .* is not Unicode", to_json(HEADER_FIELDS | {"host": "\udc80"})),
        ("hooks: expected strings", to_json(HEADER_FIELDS | {"hooks": ["a", 1]})),
        ("hooks: expected list, found 'net'", to_json(HEADER_FIELDS | {"hooks": "net"})),
        ("clock: expected dict", to_json(HEADER_FIELDS | {"clock": None})),
        (
            "utc_ns: 9223372036854775808 is not in",
            to_json(HEADER_FIELDS | {"clock": {"monotonic_ns": 0, "utc_ns": 2**63, "uncertainty_ns": 0}}),
        ),
    ],
)
def test_hostile_headers(match, raw):
    with pytest.raises(WireError, match=match):
        Decoder().frame(forge(FrameKind.HEADER, raw, stream=crc32(raw), sequence=0))


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("from_ns: expected int", {"from_ns": "1"}),
        ("host_netns: -1 is not in", {"host_netns": -1}),
        ("devices: expected objects", {"devices": [1]}),
        ("devices: ifindex: expected int, found nothing", {"devices": [{"netns": 1}]}),
        ("role: 'king' is none of inner, outer", {"devices": [DEVICE | {"role": "king"}]}),
        ("default_route: expected bool", {"devices": [DEVICE | {"default_route": 1}]}),
        ("listed twice", {"devices": [DEVICE, DEVICE]}),
        ("'no device'", {"sightings": []}),
        ("'no device'", {"sightings": [["eth0", 0, 0]]}),
        ("expected \\[name", {"sightings": [["", 0, 0], "eth0"]}),
        ("expected \\[name", {"sightings": [["", 0, 0], ["eth0", 0]]}),
        ("expected \\[name", {"sightings": [["", 0, 0], ["eth0", 0, -1]]}),
        ("expected \\[name", {"sightings": [["", 0, 0], ["eth0", 0, True]]}),
        ("expected \\[name", {"sightings": [["", 0, 0], ["eth0", 0, 2**63]]}),
        ("not Unicode", {"sightings": [["", 0, 0], ["\ud800", 0, 0]]}),
        ("sightings from 99 on", {"first_sighting": 99}),
        ("first_sighting: -1", {"first_sighting": -1}),
        ("changes the sightings", {}),
    ],
)
def test_hostile_topologies(match, change):
    decoder, tag = begun()
    raw = to_json(
        {"from_ns": TOPOLOGY.from_ns, **{k: v for k, v in TOPOLOGY_FIELDS.items() if k != "from_ns"}} | change
    )
    with pytest.raises(WireError, match=match):
        decoder.frame(forge(FrameKind.TOPOLOGY, raw, stream=tag, sequence=2))


@pytest.mark.slow
def test_the_worst_json_takes_bounded_memory():
    raw = b'{"devices":[' + b"[]," * ((wire.MAX_JSON_BYTES - 100) // 3) + b"[]]}"
    decoder, tag = begun()
    frame = forge(FrameKind.TOPOLOGY, raw, stored=compressed(raw), stream=tag, sequence=2)
    tracemalloc.start()
    with pytest.raises(WireError):
        decoder.frame(frame)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 << 20


@pytest.mark.parametrize("raw", [{"records": 1, "lost": 0}, {"records": 0, "lost": 1}, {"records": -1, "lost": 0}, {}])
def test_hostile_end_marks(raw):
    decoder, tag = begun()
    with pytest.raises(WireError, match="END"):
        decoder.frame(forge(FrameKind.END, to_json(raw), stream=tag, sequence=2))


def test_counts_whose_sum_exceeds_64_bits():
    raw = {"records": 2**63 - 1, "lost": 0}
    decoder = Decoder(gaps=True)
    first = encode([])[0]
    decoder.frame(first)
    with pytest.raises(WireError, match="records"):
        decoder.frame(forge(FrameKind.END, to_json(raw), stream=stream_tag(first), sequence=5))
    with pytest.raises(WireError, match="a stream has at most"):
        decoder.frame(forge(FrameKind.BATCH, payload(0, *[0] * 8, before=2**63), stream=stream_tag(first), sequence=5))
    assert decoder.missing == 0


def test_unknown_keys_are_ignored():
    raw = json.dumps(HEADER_FIELDS | {"colour": "blue"}).encode()
    assert Decoder().frame(forge(FrameKind.HEADER, raw, stream=crc32(raw), sequence=0)) == HEADER
