"""The wire format: encodes stream items as frames, and decodes them, for capture files and MQTT.

A stream is a sequence of frames, one message each:

    HEADER, then TOPOLOGY, BATCH and PROGRESS in stream order, then END where the stream ended cleanly

    frame = head (36 bytes) | payload (`stored` bytes, compressed by zstd or plain)
    head  = sync mark, version, message, flags, stream tag, sizes, sequence, payload CRC, head CRC

Every frame can be found, checked and read with the stream's topology alone. `Decoder` verifies both checksums before it
interprets the payload, and every size before it allocates memory. Whatever bytes `Decoder` is given, its items never
contain records out of order, unknown hooks or device indices beyond the sightings. docs/capture-format.md describes the
format byte by byte; docs/design/003-wire.md has the reasons and the measurements.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, Final, NoReturn, TypeAlias, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt
import zstandard

from contracts.clock import ClockPair, KernelClock
from contracts.errors import WireError
from contracts.hooks import Hook
from contracts.interfaces import Progress, StreamHeader, StreamItem
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Content
from contracts.topology import Device, Role, Sharer, Sighting, Topology, check

WIRE_VERSION: Final = 2
"""Version that is written; all versions from 1 on are read (`_FIXUPS`). A change that an older reader would misread
raises it. New JSON keys do not: readers ignore unknown keys."""

SIGNATURE: Final = b"MACE\r\n\x1a\n"
"""First bytes of a capture file. The line ends and DOS's end-of-file byte reveal a transfer in text mode, as in PNG."""
FILE_HEAD: Final = SIGNATURE + WIRE_VERSION.to_bytes(4, "little")

SYNC: Final = b"\xffMCF"
"""First bytes of every frame. UTF-8 never contains 0xff, so that text inside a payload cannot look like a frame."""

HEAD: Final = struct.Struct("<4sBBBBIIQIII")
HEAD_SIZE: Final = HEAD.size
_HEAD_CRC: Final = struct.Struct("<I")
assert HEAD_SIZE == 36

COMPRESSED: Final = 0x01
"""Flag: the payload is one zstd frame. Without the flag the payload is not compressed."""

_COLUMNS: Final = DTYPES | CONTENT_DTYPES
"""Columns of a batch, in the order of the payload. A batch without content has those of `DTYPES` only."""
MAX_RECORDS: Final = 1 << 20
"""Largest number of records in one batch: 31 MiB of columns in memory (55 with content), some 50 times the largest
batch of a live source."""
_PREFIX: Final = struct.Struct("<IQB")
"""Start of a BATCH payload: its records, the stream's records before it, its columns; a descriptor a column follows."""
MAX_BATCH_BYTES: Final = _PREFIX.size + len(_COLUMNS) + MAX_RECORDS * sum(dtype.itemsize for dtype in _COLUMNS.values())
MAX_JSON_BYTES: Final = 8 << 20
"""Largest JSON payload. A device takes some 200 bytes of JSON: 40,000 devices. The worst JSON parses to 26 times its
size: 210 MiB."""

_FULL_SIGHTINGS: Final = 4096
"""Largest number of sightings (some 100 kB) that a topology repeats, so that it can be read without earlier topologies.
A topology with more sightings carries new ones only: otherwise each further short-lived veth of a month would add to
the size of every later topology."""

_HOOK_IS_KNOWN: Final[npt.NDArray[np.bool_]] = np.isin(np.arange(256), [h for h in Hook if h is not Hook.INVALID])

_LEVEL: Final = 1
"""zstd level. Level 3 takes a fifth more time and saves 1 % of the bytes; level -1 saves a tenth of the time and takes
a fifth more bytes."""


class FrameKind(IntEnum):
    """Kind of a frame's message (u8). Append only."""

    HEADER = 1
    TOPOLOGY = 2
    BATCH = 3
    END = 4
    PROGRESS = 5
    """Sent only to readers that wait for results; captures contain none."""


@dataclass(frozen=True, slots=True)
class End:
    """The stream ended cleanly; totals for the reader to compare."""

    records: int
    """Records in all batches, markers included."""
    lost: int
    """Records that the ring lost, by the stream's markers."""


@dataclass(frozen=True, slots=True)
class Head:
    """A frame's head, with checksum and limits verified."""

    version: int
    """Wire version, 1 to `WIRE_VERSION`."""
    message: FrameKind
    compressed: bool
    stream: int
    """CRC-32 of the HEADER's payload, which identifies the stream of every frame."""
    stored: int
    """Bytes of payload that follow."""
    sequence: int
    """0 for the HEADER, then one more for each frame."""
    raw: int
    """Bytes of the decompressed payload."""
    checksum: int
    """CRC-32 of the payload as stored."""


WireItem: TypeAlias = StreamHeader | StreamItem | End
Accept: TypeAlias = Callable[[WireItem], None]
"""A reader's check of a message; raises `WireError` to refuse the message."""


def parse_head(data: bytes | bytearray | memoryview) -> Head:
    """Return the head in the first `HEAD_SIZE` bytes of `data`; raises `WireError` for any other bytes."""
    if (found := bytes(data[: len(SYNC)])) != SYNC[: len(found)]:
        raise WireError(f"found {found.hex(' ')} where a frame should begin ({SYNC.hex(' ')})")
    if len(data) < HEAD_SIZE:
        raise WireError(f"a frame's head has {HEAD_SIZE} bytes, here are {len(data)}")
    _, version, message, flags, reserved, stream, stored, sequence, raw, checksum, own = HEAD.unpack_from(data)
    if crc32(bytes(data[: HEAD_SIZE - _HEAD_CRC.size])) != own:
        raise WireError("the frame's head is damaged (checksum)")
    check_version(version)
    if flags & ~COMPRESSED or reserved:
        raise WireError(f"unknown frame flags {flags:#04x} {reserved:#04x}")
    try:
        kind = FrameKind(message)
    except ValueError:
        known = ", ".join(f"{m.value} {m.name}" for m in FrameKind)
        raise WireError(f"unknown message {message}, known are {known}") from None
    limit = MAX_BATCH_BYTES if kind is FrameKind.BATCH else MAX_JSON_BYTES
    if raw > limit:
        raise WireError(f"a {kind.name} of {raw} bytes, at most {limit} are allowed")
    compressed = bool(flags & COMPRESSED)
    if stored >= raw if compressed else stored != raw:
        raise WireError(f"a payload of {raw} bytes cannot be stored in {stored}")
    return Head(version, kind, compressed, stream, stored, sequence, raw, checksum)


def whole_head(frame: bytes) -> Head:
    """Return the head of a complete frame; raises `WireError` if the frame is cut or damaged.

    The payload's checksum is verified, its content is not decompressed.
    """
    head = parse_head(frame)
    payload = memoryview(frame)[HEAD_SIZE:]
    if len(payload) != head.stored:
        raise WireError(f"a frame with a payload of {head.stored} bytes, here are {len(payload)}")
    if crc32(payload) != head.checksum:
        raise WireError("the frame's payload is damaged (checksum)")
    return head


def check_version(version: int) -> None:
    """Raise `WireError` for a wire version that this MACE cannot read."""
    if not 1 <= version <= WIRE_VERSION:
        raise WireError(
            f"wire version {version}, this MACE reads 1 to {WIRE_VERSION}: use the MACE that wrote it, or a newer one"
        )


class _Order:
    """Checks the order that every stream promises (`contracts.interfaces`), for writers and readers.

    Writers check too: readers would refuse an out-of-order stream, and the recording would be lost.
    """

    def __init__(self) -> None:
        self.last_ns: int | None = None
        self.upto_ns: int | None = None
        self.topology: Topology | None = None
        self.sightings = 1

    def check_batch(self, batch: Batch, ascending: bool = False) -> None:
        """Raise `WireError` if the batch breaks the stream's order; `ascending`: the order inside it is verified."""
        if not len(batch):
            return
        ts = batch.ts_ns
        if self.last_ns is not None and ts[0] < self.last_ns:
            raise WireError(f"records go back in time: {int(ts[0])} ns after {self.last_ns} ns")
        if self.upto_ns is not None and ts[0] < self.upto_ns:
            raise WireError(f"a record of {int(ts[0])} ns after progress up to {self.upto_ns} ns")
        if not ascending and bool((ts[1:] < ts[:-1]).any()):
            raise WireError("records go back in time inside a batch")
        if (highest := int(batch.dev.max())) >= self.sightings:
            raise WireError(f"a record of device {highest}, the topology so far has {self.sightings}")
        if not bool((known := _HOOK_IS_KNOWN[batch.hook]).all()):
            raise WireError(f"a record with hook {int(batch.hook[~known][0])}, which does not exist")

    def took_batch(self, batch: Batch) -> None:
        if len(batch):
            self.last_ns = int(batch.ts_ns[-1])

    def took_progress(self, progress: Progress) -> None:
        self.upto_ns = progress.upto_ns if self.upto_ns is None else max(self.upto_ns, progress.upto_ns)

    def check_topology(self, new: Topology) -> None:
        old = self.topology
        if self.last_ns is not None and new.from_ns <= self.last_ns:
            raise WireError(f"a topology from {new.from_ns} ns after a record of {self.last_ns} ns")
        if old is not None:
            if new.from_ns < old.from_ns:
                raise WireError(f"a topology from {new.from_ns} ns after one from {old.from_ns} ns")
            if new.sightings[: len(old.sightings)] != old.sightings:
                raise WireError("a topology that changes the sightings before it; they may only be appended to")

    def took_topology(self, new: Topology) -> None:
        self.topology, self.sightings = new, len(new.sightings)


# --- writing -----------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes one stream, one numbered frame per call; `header` comes first, `end` last. Not thread-safe."""

    def __init__(self) -> None:
        self.records = 0
        """Records encoded so far."""
        self.lost = 0
        self._sequence = 0
        self._stream = 0
        self._order = _Order()
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False, write_content_size=True)

    def header(self, header: StreamHeader) -> bytes:
        """Return the first frame. It is not compressed, so that `strings` and `less` show a capture's origin."""
        payload = _to_json({"wire": WIRE_VERSION} | asdict(header) | {"clock": clock_fields(header.clock)})
        self._stream = crc32(payload)
        return self._frame(FrameKind.HEADER, payload, compress=False)

    def item(self, item: StreamItem) -> bytes:
        """Return the frame of an item; raises `WireError` if the item breaks the order of the stream.

        A batch has at most `MAX_RECORDS` records.
        """
        match item:
            case Batch():
                return self.batch(item)
            case Topology():
                return self.topology(item)
            case Progress():
                frame = self._frame(FrameKind.PROGRESS, _to_json(asdict(item)))
                self._order.took_progress(item)
                return frame

    def topology(self, topology: Topology, full: bool = False) -> bytes:
        """Return the frame of a topology; raises `WireError` if the topology breaks the order of the stream.

        `full` includes all sightings, however many, for a reader that has not read the topologies before.
        """
        self._order.check_topology(check(topology))
        known = self._order.sightings if self._order.topology is not None else 0
        first = known if len(topology.sightings) > _FULL_SIGHTINGS and not full else 0
        frame = self._frame(FrameKind.TOPOLOGY, _to_json(_topology_fields(topology, first)))
        self._order.took_topology(topology)
        return frame

    def batch(self, batch: Batch) -> bytes:
        """Return the frame of a batch; raises `WireError` if it is too large or breaks the order of the stream.

        On container traffic a record takes about 2 to 3 bytes, and its content as much.
        """
        if len(batch) > MAX_RECORDS:
            raise WireError(f"a batch of {len(batch)} records, at most {MAX_RECORDS} are allowed")
        self._order.check_batch(batch)
        frame = self._frame(FrameKind.BATCH, _batch_payload(batch, self.records))
        self._order.took_batch(batch)
        self.records += len(batch)
        self.lost += batch.lost
        return frame

    def skip(self, records: int) -> None:
        """Count records that were discarded before they were encoded; a reader sees a gap of as many records."""
        self.records += records

    def end(self) -> bytes:
        """Return the last frame, with the stream's totals."""
        return self._frame(FrameKind.END, _to_json(asdict(End(self.records, self.lost))))

    def _frame(self, message: FrameKind, raw: bytes, compress: bool = True) -> bytes:
        if len(raw) > MAX_JSON_BYTES and message is not FrameKind.BATCH:
            raise WireError(f"a {message.name} of {len(raw)} bytes, at most {MAX_JSON_BYTES} are allowed")
        stored, flags = raw, 0
        if compress and len(packed := self._zstd.compress(raw)) < len(raw):
            stored, flags = packed, COMPRESSED
        head = HEAD.pack(
            *(SYNC, WIRE_VERSION, message, flags, 0),
            *(self._stream, len(stored), self._sequence, len(raw), crc32(stored), 0),
        )[: -_HEAD_CRC.size]
        self._sequence += 1
        return b"".join((head, _HEAD_CRC.pack(crc32(head)), stored))


# --- reading -----------------------------------------------------------------------------------------------------


class Decoder:
    """Decodes one stream, frame by frame, and verifies everything that a stream promises.

    A refused frame leaves the decoder unchanged. With `gaps`, frames may be missing (a damaged file, a broker that
    dropped some): the decoder counts the missing records and begins the batch after a gap with one `LOST` marker for
    each CPU, of 0 records (the ring did not lose them), so that no packet is matched across the gap.
    """

    def __init__(self, gaps: bool = False) -> None:
        self.header: StreamHeader | None = None
        self.version = 0
        """Wire version of the stream; 0 before the HEADER."""
        self.end: End | None = None
        self.sequence = 0
        """Number of the frame expected next."""
        self.records = 0
        """Records of the stream so far, decoded and missing."""
        self.missing = 0
        """Records known to be in frames that are missing."""
        self._lost: int | None = 0
        """Records that the ring lost, by the markers decoded; None if `skip_to` passed over some of the stream."""
        self._gaps = gaps
        self._stream = 0
        self._order = _Order()
        self._zstd = zstandard.ZstdDecompressor()

    @property
    def topology(self) -> Topology | None:
        """The topology decoded last."""
        return self._order.topology

    def skip_to(self, sequence: int, records: int) -> None:
        """Continue with frame `sequence`, which follows `records` records of the stream. Call after the HEADER.

        For a caller that has read the frames in between elsewhere. The END's count of lost records is then unverified.
        """
        self.sequence, self.records, self._lost = sequence, records, None

    def peek(self, head: Head, stored: bytes) -> tuple[Batch, int]:
        """Return a frame's batch and the number of the stream's records before it, without verifying the order."""
        return _batch(self._raw(head, stored))

    def stands_alone(self, head: Head, stored: bytes) -> bool:
        """Return whether a TOPOLOGY has all its sightings, so that it can be read without earlier ones."""
        return _Json(self._raw(head, stored), "TOPOLOGY").number("first_sighting", 0) == 0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the decompressor, which has none of its own, so that a pickled reader can resume."""
        return {name: value for name, value in self.__dict__.items() if name != "_zstd"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._zstd = zstandard.ZstdDecompressor()

    def frame(self, frame: bytes, accept: Accept | None = None) -> WireItem:
        """Decode one whole frame (an MQTT payload); raises `WireError`. For `accept` see `payload`."""
        head = self.head(frame)
        return self.payload(head, frame[HEAD_SIZE:], accept)

    def head(self, data: bytes | bytearray | memoryview) -> Head:
        """Return the head at the start of `data`; raises `WireError` unless it is of the stream's next frame.

        With `gaps` it may be of any later frame.
        """
        head = parse_head(data)
        if self.end is not None:
            raise WireError(f"a {head.message.name} after the END")
        if (head.message is FrameKind.HEADER) != (self.header is None):
            raise WireError(f"a {head.message.name} {'before' if self.header is None else 'after'} the HEADER")
        if self.header is not None and head.stream != self._stream:
            raise WireError("a frame of another stream")
        if self.header is not None and head.version != self.version:
            raise WireError(f"a frame of wire version {head.version} in a stream of version {self.version}")
        if head.sequence != self.sequence and not (self._gaps and head.sequence > self.sequence and self.header):
            raise WireError(f"frame {head.sequence} where {self.sequence} should be: some are missing or out of order")
        return head

    def payload(self, head: Head, stored: bytes, accept: Accept | None = None) -> WireItem:
        """Decode the payload `stored` of a frame whose `head` was accepted; raises `WireError`.

        `accept` is called with the message before it takes effect. If `accept` raises, the frame is refused and the
        decoder is unchanged.
        """
        raw = self._raw(head, stored)
        message, take = self._read(head, raw)
        if accept is not None:
            accept(message)
        take()
        self.sequence = head.sequence + 1
        return message

    def _read(self, head: Head, raw: bytes) -> tuple[WireItem, Callable[[], None]]:
        """Return the verified message, and a function that makes it take effect."""
        match head.message:
            case FrameKind.HEADER:
                if head.stream != crc32(raw):
                    raise WireError("a HEADER that is not its own stream's")
                header = _header(raw, head.version)
                return header, lambda: self._took_header(header, head)
            case FrameKind.TOPOLOGY:
                topology = _topology(raw, self._order.topology)
                self._order.check_topology(topology)
                return topology, lambda: self._order.took_topology(topology)
            case FrameKind.BATCH:
                return self._batch(raw)
            case FrameKind.PROGRESS:
                progress = Progress(_Json(raw, "PROGRESS").number("upto_ns"))
                return progress, lambda: self._order.took_progress(progress)
            case FrameKind.END:
                end = self._end(raw)
                return end, lambda: self._took_end(end)

    def _took_header(self, header: StreamHeader, head: Head) -> None:
        self.header, self.version, self._stream = header, head.version, head.stream

    def _raw(self, head: Head, stored: bytes) -> bytes:
        """Return the payload verified, decompressed and converted to the current wire version."""
        if len(stored) != head.stored:
            raise WireError(f"a payload of {len(stored)} bytes, the head says {head.stored}")
        if crc32(stored) != head.checksum:
            raise WireError("the frame's payload is damaged (checksum)")
        raw = self._decompress(stored, head.raw) if head.compressed else stored
        for version in range(head.version, WIRE_VERSION):
            raw = _FIXUPS[version](head.message, raw)
        return raw

    def _decompress(self, stored: bytes, size: int) -> bytes:
        try:
            # The library allocates the size that the zstd frame states before it decompresses: compare it first.
            if zstandard.frame_content_size(stored) != size:
                raise WireError("the compressed payload and the frame's head disagree about its size")
            raw = self._zstd.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError(f"the payload does not decompress: {error}") from None
        if len(raw) != size:
            raise WireError(f"a payload of {len(raw)} bytes, the head says {size}")
        return raw

    def _batch(self, raw: bytes) -> tuple[Batch, Callable[[], None]]:
        batch, before = _batch(raw)
        missing = before - self.records
        if missing < 0 or (missing and not self._gaps):
            raise WireError(f"a batch that follows record {before} after record {self.records}")
        if before > _RECORDS_MAX:
            raise WireError(f"a batch that follows record {before:,}; a stream has at most {_RECORDS_MAX:,}")
        self._order.check_batch(batch, ascending=True)
        marked = self._mark_gap(batch) if missing else batch

        def take() -> None:
            self.missing += missing
            self.records = before + len(batch)
            if self._lost is not None:
                self._lost += batch.lost
            self._order.took_batch(batch)

        return marked, take

    def _mark_gap(self, batch: Batch) -> Batch:
        assert self.header is not None
        if not len(batch):
            return batch
        until = int(batch.ts_ns[0])
        after = until if self._order.last_ns is None else self._order.last_ns
        cpus = np.arange(self.header.cpus)
        markers = Batch.of(
            len(cpus),
            ts_ns=np.full(len(cpus), after),
            skb_id=np.full(len(cpus), until).view(np.uint64),
            cpu=cpus,
            hook=np.full(len(cpus), Hook.LOST),
        )
        return Batch.concatenate([markers, batch])

    def _end(self, raw: bytes) -> End:
        given = _Json(raw, "END")
        end = End(given.number("records", 0, _RECORDS_MAX), given.number("lost", 0, _RECORDS_MAX))
        lost = end.lost if self._lost is None else self._lost
        if end.records < self.records or (not self._gaps and end != End(self.records, lost)):
            raise WireError(
                f"END of {end.records} records and {end.lost} lost, but there were {self.records} and {lost}"
            )
        return end

    def _took_end(self, end: End) -> None:
        self.missing += end.records - self.records
        self.records = end.records
        self.end = end


# --- columns -----------------------------------------------------------------------------------------------------
#
# A descriptor is encoding << 4 | width. Widths are in bytes; all integers are little-endian.

_RECORDS_MAX: Final = 1 << 60
"""Largest number of records that a stream may state: 10^9 a second for 36 years. Sums of several stay below 2^63."""

_CONSTANT: Final = 0
"""One value of `width` bytes (0 to the column's own) for all records; width 0 is the value 0."""
_PLAIN: Final = 1
"""A value of `width` bytes (1, 2, 4 or 8, at most the column's own) for each record."""
_DELTA: Final = 2
"""`ts_ns` only: the first time (8 bytes), then the differences between neighbours as `width` (0 to 8) planes: all
lowest bytes, then all second bytes, and so on. The lowest bytes are noise, the upper ones nearly constant: as planes
they compress to three quarters of the size that they have interleaved, in a quarter of the time."""

_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}


def _width(value: int) -> int:
    """Return the number of bytes that hold the unsigned `value`; 0 for 0."""
    return (value.bit_length() + 7) // 8


def _room(width: int) -> int:
    """Return the size of the smallest numpy integer that holds `width` bytes."""
    return 1 << (width - 1).bit_length() if width else 1


def _batch_payload(batch: Batch, before: int) -> bytes:
    descriptors: list[int] = []
    parts: list[bytes] = []
    count = len(batch)
    columns = [*batch.columns(), *(batch.content.columns() if batch.content is not None else ())]
    for name, column in columns:
        if not count:
            descriptors.append(_CONSTANT << 4)
        elif name == "ts_ns":
            # Differences are unsigned modulo 2^64: they may be larger than an i8 holds.
            deltas = np.diff(column.astype("<i8", copy=False).view("<u8"))
            width = _width(int(deltas.max())) if count > 1 else 0
            descriptors.append(_DELTA << 4 | width)
            parts.append(int(column[0]).to_bytes(8, "little", signed=True))
            if width:
                room = _room(width)
                planes = deltas.astype(_UNSIGNED[room]).view("u1").reshape(-1, room)
                parts += [planes[:, plane].tobytes() for plane in range(width)]
        else:
            highest = int(column.max())
            width = _width(highest)
            if highest == int(column.min()):
                descriptors.append(_CONSTANT << 4 | width)
                parts.append(highest.to_bytes(width, "little"))
            else:
                width = _room(width)
                descriptors.append(_PLAIN << 4 | width)
                parts.append(column.astype(_UNSIGNED[width], copy=False).tobytes())
    return b"".join((_PREFIX.pack(count, before, len(columns)), bytes(descriptors), *parts))


def _batch(raw: bytes) -> tuple[Batch, int]:
    """Return the batch of a payload, and the number of the stream's records before it."""
    if len(raw) < _PREFIX.size:
        raise WireError(f"a BATCH of {len(raw)} bytes, at least {_PREFIX.size} are needed")
    count, before, given = _PREFIX.unpack_from(raw)
    if count > MAX_RECORDS:
        raise WireError(f"a batch of {count} records, at most {MAX_RECORDS} are allowed")
    if given not in (len(DTYPES), len(_COLUMNS)):
        raise WireError(f"a batch of {given} columns, expected {len(DTYPES)}, or {len(_COLUMNS)} with content")
    at = _PREFIX.size + given
    descriptors = raw[_PREFIX.size : at]
    if len(descriptors) < given:
        raise WireError(f"a BATCH of {len(raw)} bytes, at least {at} are needed")
    # Verify all sizes before allocating memory.
    plan: list[tuple[np.dtype[Any], int, int, int]] = []
    for (name, dtype), descriptor in zip(list(_COLUMNS.items())[:given], descriptors, strict=True):
        encoding, width = descriptor >> 4, descriptor & 15
        is_time = name == "ts_ns"
        size = -1
        if width > dtype.itemsize:
            pass
        elif not count:
            size = 0 if descriptor == 0 else -1
        elif is_time:
            size = 8 + width * (count - 1) if encoding == _DELTA else -1
        elif encoding == _CONSTANT:
            size = width
        elif encoding == _PLAIN and width in _UNSIGNED:
            size = width * count
        if size < 0:
            raise WireError(f"column {name}: no encoding {encoding} of {width} bytes for {count} records")
        plan.append((dtype, encoding, width, at))
        at += size
    if at != len(raw):
        raise WireError(f"a BATCH of {len(raw)} bytes whose columns take {at}")
    columns: list[npt.NDArray[Any]] = []
    for dtype, encoding, width, start in plan:
        if encoding == _CONSTANT:
            columns.append(np.full(count, int.from_bytes(raw[start : start + width], "little"), dtype))
        elif encoding == _PLAIN:
            columns.append(np.frombuffer(raw, _UNSIGNED[width], count, start).astype(dtype))
        else:
            columns.append(_times(raw, start, width, count))
    content = Content(*columns[len(DTYPES) :]) if given > len(DTYPES) else None
    return Batch(*columns[: len(DTYPES)], content=content), before


def _times(raw: bytes, start: int, width: int, count: int) -> npt.NDArray[np.int64]:
    ts = np.empty(count, "<i8")
    (first,) = struct.unpack_from("<q", raw, start)
    steps = count - 1
    room = _room(width)
    deltas = np.zeros(steps, _UNSIGNED[room])
    planes = deltas.view("u1").reshape(-1, room)
    for plane in range(width):
        planes[:, plane] = np.frombuffer(raw, "u1", steps, start + 8 + plane * steps)
    ts[0] = first
    if room == 8:
        ts[1:] = deltas.view("<i8")
    else:
        ts[1:] = deltas
    np.cumsum(ts, out=ts)
    # Differences of up to four bytes add up to at most 2^20 x 2^32 = 2^52: the sum can pass 2^63 only once, and the
    # last time is then below the first. Wider differences can pass 2^63 anywhere.
    if ts[-1] < first or (room == 8 and bool((ts[1:] < ts[:-1]).any())):
        raise WireError("times that do not fit 64 bits")
    return ts


# --- older versions ----------------------------------------------------------------------------------------------


def _from_1(message: FrameKind, raw: bytes) -> bytes:
    """Convert a payload of wire version 1: version 2 adds the number of a batch's columns, eight in version 1."""
    if message is not FrameKind.BATCH:
        return raw
    at = _PREFIX.size - 1
    return b"".join((raw[:at], bytes([8]), raw[at:]))


_FIXUPS: Final[dict[int, Callable[[FrameKind, bytes], bytes]]] = {1: _from_1}
"""Wire version -> function that converts a payload of it to the next version. Append only."""


# --- JSON --------------------------------------------------------------------------------------------------------

_T = TypeVar("_T")
_I63: Final = (1 << 63) - 1


def _to_json(fields_: dict[str, Any]) -> bytes:
    text = json.dumps(fields_, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A device name or an argument may contain bytes that are not UTF-8, which Python represents as lone
        # surrogates. They are escaped (as the six characters \\udc80): no reader could store them.
        return re.sub("[\ud800-\udfff]", lambda bad: f"\\\\u{ord(bad[0]):04x}", text).encode()


def _refuse(what: str) -> NoReturn:
    raise WireError(f"JSON with {what}")


class _Json:
    """The fields of a JSON object; each method checks the type of a field and raises `WireError` for another."""

    def __init__(self, raw: bytes | dict[str, Any], where: str) -> None:
        self._where = where
        if isinstance(raw, dict):
            self._fields = raw
            return
        try:
            given = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:  # RecursionError: a nesting bomb
            raise WireError(f"{where}: not JSON: {error}") from None
        if not isinstance(given, dict):
            raise WireError(f"{where}: expected a JSON object, found {type(given).__name__}")
        self._fields = given

    def _get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self._fields.get(key, default)
        if type(value) is not kind:
            found = "nothing" if value is None else f"{value!r:.40}"
            raise WireError(f"{self._where}: {key}: expected {kind.__name__}, found {found}")
        return value

    def number(self, key: str, low: int = -_I63 - 1, high: int = _I63, default: int | None = None) -> int:
        value = self._get(key, int, default)
        if not low <= value <= high:
            raise WireError(f"{self._where}: {key}: {value} is not in {low}..{high}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return _storable(self._get(key, str, default), f"{self._where}: {key}")

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, bool, default)

    def texts(self, key: str) -> tuple[str, ...]:
        given = self._get(key, list)
        if not all(type(text) is str for text in given):
            raise WireError(f"{self._where}: {key}: expected strings")
        return tuple(_storable(text, f"{self._where}: {key}") for text in given)

    def objects(self, key: str, default: list[Any] | None = None) -> list[_Json]:
        given = self._get(key, list, default)
        if not all(type(one) is dict for one in given):
            raise WireError(f"{self._where}: {key}: expected objects")
        return [_Json(one, f"{self._where}: {key}") for one in given]

    def sightings(self, key: str) -> tuple[Sighting, ...]:
        found = []
        sightings = self._get(key, list)
        cookies = self._get("netns_cookies", list, [0] * len(sightings))
        if len(cookies) != len(sightings) or not all(type(c) is int and 0 <= c <= _I63 for c in cookies):
            raise WireError(f"{self._where}: netns_cookies: expected a number for each of {len(sightings)} sightings")
        for one, cookie in zip(sightings, cookies, strict=True):
            match one:
                case [str(name), int(netns), int(ifindex)] if {type(netns), type(ifindex)} == {int} and 0 <= min(
                    netns, ifindex
                ) <= max(netns, ifindex) <= _I63:
                    found.append(Sighting(_storable(name, key), netns, ifindex, cookie))
                case _:
                    raise WireError(f"{self._where}: {key}: expected [name, netns, ifindex], found {one!r:.40}")
        return tuple(found)

    def has(self, key: str) -> bool:
        return self._fields.get(key) is not None

    def object(self, key: str) -> _Json:
        return _Json(self._get(key, dict), f"{self._where}: {key}")


def _storable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WireError(f"{where}: {text!r:.40} is not Unicode text") from None
    return text


def _header(raw: bytes, version: int) -> StreamHeader:
    given = _Json(raw, "HEADER")
    if (told := given.number("wire")) != version:
        check_version(told)
        raise WireError(f"a HEADER that names wire version {told}, in a frame of version {version}")
    clock = given.object("clock")
    return StreamHeader(
        source=given.text("source"),
        host=given.text("host"),
        run=given.text("run"),
        kernel=given.text("kernel"),
        boot_id=given.text("boot_id"),
        cpus=given.number("cpus", 1, 1 << 16),  # a record's CPU is a u16
        clock=_clock(clock),
        hooks=given.texts("hooks"),
        mace_version=given.text("mace_version"),
        command=given.texts("command"),
    )


def clock_fields(clock: ClockPair) -> dict[str, Any]:
    """Return a clock pair as JSON; `kernel` is left out where it is not known."""
    return {key: value for key, value in asdict(clock).items() if value is not None}


def _clock(given: _Json) -> ClockPair:
    kernel = given.object("kernel") if given.has("kernel") else None
    return ClockPair(
        given.number("monotonic_ns"),
        given.number("utc_ns"),
        given.number("uncertainty_ns", 0),
        KernelClock(
            kernel.text("state"),
            kernel.number("max_error_ns", 0, default=0),
            kernel.number("est_error_ns", 0, default=0),
        )
        if kernel is not None
        else None,
    )


def clock_of(given: dict[str, Any]) -> ClockPair:
    """Return the clock pair of `clock_fields`. Raises `WireError` for other JSON."""
    return _clock(_Json(given, "clock"))


_DEVICE_DEFAULTS: Final = {field.name: field.default for field in fields(Device)}


def _topology_fields(topology: Topology, first: int) -> dict[str, Any]:
    cookies = [sighting.netns_cookie for sighting in topology.sightings[first:]]
    sharers = [{key: value for key, value in asdict(one).items() if value} for one in topology.on_host_network]
    return {
        "from_ns": topology.from_ns,
        "host_netns": topology.host_netns,
        # Default values are omitted, which halves the bytes and takes a third of the time.
        "devices": [
            {key: value for key in _DEVICE_DEFAULTS if (value := getattr(device, key)) != _DEVICE_DEFAULTS[key]}
            for device in topology.devices
        ],
        "first_sighting": first,
        "sightings": [[s.name, s.netns, s.ifindex] for s in topology.sightings[first:]],
        **({"netns_cookies": cookies} if any(cookies) else {}),
        **({"on_host_network": sharers} if sharers else {}),
    }


def _topology(raw: bytes, before: Topology | None) -> Topology:
    given = _Json(raw, "TOPOLOGY")
    first = given.number("first_sighting", 0)
    known = before.sightings if before else ()
    if first > len(known):
        raise WireError(f"TOPOLOGY: sightings from {first} on, the topology so far has {len(known)}")
    return check(
        Topology(
            from_ns=given.number("from_ns"),
            host_netns=given.number("host_netns", 0),
            devices=tuple(_device(device) for device in given.objects("devices")),
            sightings=known[:first] + given.sightings("sightings"),
            on_host_network=tuple(
                Sharer(one.text("container"), one.text("container_id", ""))
                for one in given.objects("on_host_network", [])
            ),
        )
    )


def _device(given: _Json) -> Device:
    role = given.text("role", Role.OTHER.value)
    try:
        known_role = Role(role)
    except ValueError:
        raise WireError(f"TOPOLOGY: devices: role: {role!r:.40} is none of {', '.join(Role)}") from None
    return Device(
        netns=given.number("netns", 0),
        ifindex=given.number("ifindex", 0),
        name=given.text("name"),
        kind=given.text("kind"),
        peer_netns=given.number("peer_netns", 0, default=0),
        peer_ifindex=given.number("peer_ifindex", 0, default=0),
        master_ifindex=given.number("master_ifindex", 0, default=0),
        default_route=given.flag("default_route", default=False),
        netns_name=given.text("netns_name", ""),
        container=given.text("container", ""),
        role=known_role,
        netns_cookie=given.number("netns_cookie", 0, default=0),
        container_id=given.text("container_id", ""),
        pod_containers=given.text("pod_containers", ""),
    )
