"""The packets of a Perfetto trace, some of them compressed.

A trace is a protobuf message with one repeated field, `packet`. The reader reads the file packet by packet, with one
packet in memory at a time, and divides each into its fields; other modules interpret these.

The reader trusts nothing in the file: it checks sizes against the file before it allocates memory, bounds the ratio of
decompression, and refuses compressed packets inside compressed ones. Damage raises `CaptureError` with the byte at
which the packet begins; with `salvage`, reading continues at the next place where packets follow one another.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import zstandard

from collector.reading.window import FileWindow
from contracts.errors import CaptureError, Unavailable, WireError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Traces contain no groups (3 and 4)."""

_PACKET_TAG: Final = 0x0A
_EMPTY_PACKET: Final = bytes([_PACKET_TAG, 0])
_MANY_EMPTY: Final = _EMPTY_PACKET * (1 << 12)
_COMPRESSED: Final = {50: "deflate", 133: "zstd"}
"""compressed_packets and zstd_compressed_packets."""
MAX_PACKET_BYTES: Final = 64 << 20
"""Largest packet. traced writes packets of some hundred kilobytes; a reader must have room for two packets."""
_MOST_TIMES: Final = 200
"""Largest ratio of all decompressed bytes to the file's size: traces shrink to a tenth or so, while a deflate bomb
grows a thousandfold."""
_ALWAYS_ALLOWED: Final = 16 << 20
_LOOK_AHEAD: Final = 64
"""Largest number of fields that salvage accepts in a packet."""
_DAMAGE_TOLD: Final = 1000


class ProtoField(NamedTuple):
    """One field: a number, or the position of its bytes."""

    number: int
    wire: int
    value: int
    """Value of a varint; else 0."""
    start: int
    end: int


class TracePacket(NamedTuple):
    """One TracePacket. Of a repeated field the last value counts."""

    offset: int
    """Byte of the file at which the packet, or the compressed packet that contains it, begins."""
    data: bytes
    fields: dict[int, ProtoField]

    def number(self, number: int, default: int = 0) -> int:
        """Return the value of a varint field."""
        field = self.fields.get(number)
        return field.value if field is not None and field.wire == VARINT else default

    def message(self, number: int) -> bytes | None:
        """Return the bytes of a field, or None without it."""
        field = self.fields.get(number)
        return self.data[field.start : field.end] if field is not None and field.wire == BYTES else None


def varint(data: bytes | bytearray, at: int, end: int) -> tuple[int, int]:
    """Return a varint of up to 64 bits, and where it ends; raises `WireError`."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift == 70:
            raise WireError("a number of more than ten bytes")
    raise WireError("it ends inside a number")


def fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[ProtoField]:
    """Yield the fields of a message; raises `WireError`."""
    at = start
    end = len(data) if end is None else end
    while at < end:
        # Most tags take one byte.
        tag = data[at]
        if tag < 128:
            at += 1
        else:
            tag, at = varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise WireError("a field of number 0")
        if wire == VARINT:
            value, after = varint(data, at, end)
            yield ProtoField(number, wire, value, at, after)
            at = after
            continue
        if wire == BYTES:
            size, at = varint(data, at, end)
        elif wire == FIXED64:
            size = 8
        elif wire == FIXED32:
            size = 4
        else:
            raise WireError(f"field {number} of wire type {wire}, which no trace has")
        if size > end - at:
            raise WireError(f"field {number} of {size} bytes, of which {end - at} are there")
        yield ProtoField(number, wire, 0, at, at + size)
        at += size


def _after_empty(data: bytes, at: int) -> int:
    """Return where the next packet that is not empty begins."""
    while data.startswith(_MANY_EMPTY, at):
        at += len(_MANY_EMPTY)
    while data.startswith(_EMPTY_PACKET, at):
        at += len(_EMPTY_PACKET)
    return at


def recognises(head: bytes) -> bool:
    """Return whether a file with this beginning is a Perfetto trace: a packet of valid fields, as far as visible."""
    count, whole = 0, True
    if not head or head[0] != _PACKET_TAG:
        return False
    try:
        size, at = varint(head, 1, min(len(head), 11))
        whole = at + size <= len(head)
        for _ in fields(head, at, min(at + size, len(head))):
            count += 1
    except WireError:
        return len(head) < 16 or (not whole and count > 0)
    return count > 0 or size == 0


class PacketReader:
    """Reads the packets of a file once, from front to back; call `close` at the end."""

    def __init__(self, path: Path, *, salvage: bool = False) -> None:
        self.path: Final = path
        self.damage: list[str] = []
        """Damage that salvage skipped, one line each."""
        self.damaged = 0
        """Number of damaged places."""
        self.holes = 0
        """Number of damaged places at which whole packets, of unknown sequences, are missing."""
        self.bytes_skipped = 0
        self._salvage = salvage
        self._inflated = 0
        self._zstd = zstandard.ZstdDecompressor()
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
            self.bytes_total: Final = path.stat().st_size
        except OSError as error:
            raise Unavailable(str(path), error.strerror or str(error), "name a Perfetto trace") from error
        self._window = FileWindow(path, self._file)

    def close(self) -> None:
        """Close the file. Safe to call again."""
        self._file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._window.offset

    def refuse(self, offset: int, why: str) -> None:
        """Raise `CaptureError`, or with salvage note the damage."""
        if not self._salvage:
            raise CaptureError(self.path, offset, why)
        self.damaged += 1
        if len(self.damage) < _DAMAGE_TOLD:
            self.damage.append(f"{self.path}: skipped at byte {offset}: {why}")

    def _leave_out(self, offset: int, why: str) -> None:
        """Raise `CaptureError`, or with salvage note damage to unknown packets."""
        self.refuse(offset, why)
        self.holes += 1

    def __iter__(self) -> Iterator[TracePacket]:
        while self._window.fill(1):
            yield from self._at_hand()
            try:
                self._make_room()
            except WireError as error:
                self._refuse_and_skip(str(error))

    def _at_hand(self) -> Iterator[TracePacket]:
        """Yield the packets that are complete in the window, up to a damaged one; the window moves once, at the end."""
        data, offset = bytes(self._window.bytes), self._window.offset
        at, end = 0, len(data)
        while at < end and data[at] == _PACKET_TAG:
            # Skip empty packets quickly: a file may consist of them, ten million in 20 MB.
            if data[at + 1 : at + 2] == b"\0":
                at = _after_empty(data, at)
                continue
            try:
                size, start = varint(data, at + 1, end)
                after = start + size
                if after > end or size > MAX_PACKET_BYTES:
                    break
                inside = data[start:after]
                packet = TracePacket(offset + at, inside, {field.number: field for field in fields(inside)})
            except WireError:
                break
            if not _COMPRESSED.keys().isdisjoint(packet.fields):
                yield from self._inside(packet)
            else:
                yield packet
            at = after
        self._window.drop(at)

    def _make_room(self) -> None:
        """Fill the window until it has the whole next packet, if there is one; raises `WireError` for damage."""
        have = self._window.fill(11)
        window = self._window.bytes
        if not have:
            return
        if window[0] != _PACKET_TAG:
            raise WireError(f"found {window[0]:#04x} where a packet begins with {_PACKET_TAG:#04x}")
        size, at = varint(window, 1, have)
        if size > MAX_PACKET_BYTES:
            raise WireError(f"a packet of {size} bytes, at most {MAX_PACKET_BYTES} are read")
        have = self._window.fill(at + size)
        if have < at + size:
            raise WireError(f"a packet of {size} bytes, but the file ends after {have - at} of them")
        for _ in fields(bytes(window[at : at + size])):
            pass

    def _inside(self, packet: TracePacket) -> Iterator[TracePacket]:
        number = next(n for n in _COMPRESSED if n in packet.fields)
        try:
            raw = self._inflate(packet.message(number) or b"", _COMPRESSED[number])
        except WireError as error:
            self._leave_out(packet.offset, str(error))
            return
        at = 0
        while at < len(raw):
            if raw.startswith(_EMPTY_PACKET, at):
                at = _after_empty(raw, at)
                continue
            try:
                tag, start = varint(raw, at, len(raw))
                size, start = varint(raw, start, len(raw))
                if tag != _PACKET_TAG or size > len(raw) - start:
                    raise WireError("what was compressed are no packets")
                data = raw[start : start + size]
                inner = TracePacket(packet.offset, data, {field.number: field for field in fields(data)})
                if any(n in inner.fields for n in _COMPRESSED):
                    raise WireError("compressed packets inside compressed ones")
            except WireError as error:
                self._leave_out(packet.offset, f"inside a compressed packet, at its byte {at}: {error}")
                return
            at = start + size
            yield inner

    def _inflate(self, packed: bytes, how: str) -> bytes:
        room = min(_ALWAYS_ALLOWED + _MOST_TIMES * self.bytes_total - self._inflated, MAX_PACKET_BYTES)
        try:
            if how == "deflate":
                inflater = zlib.decompressobj()
                raw = inflater.decompress(packed, max(room, 1))
                if inflater.unconsumed_tail:
                    raise WireError(f"{len(packed)} compressed bytes become more than {room}")
                if not inflater.eof:
                    raise WireError("compressed bytes that end too early")
            else:
                with self._zstd.stream_reader(packed) as reader:
                    raw = reader.read(max(room, 0) + 1)
                if len(raw) > room:
                    raise WireError(f"{len(packed)} compressed bytes become more than {room}")
        except (zlib.error, zstandard.ZstdError) as error:
            raise WireError(f"compressed bytes that cannot be inflated: {error}") from error
        self._inflated += len(raw)
        return raw

    def _refuse_and_skip(self, why: str) -> None:
        start = self._window.offset
        self._leave_out(start, why)
        self._window.drop(1)
        while self._window.fill(1):
            found = self._window.bytes.find(_PACKET_TAG)
            self._window.drop(found if found >= 0 else len(self._window.bytes))
            if found >= 0:
                if self._plausible():
                    break
                self._window.drop(1)
        self.bytes_skipped += self._window.offset - start

    def _plausible(self) -> bool:
        """Return whether a packet begins here: few fields that fill it, followed by another packet or the end."""
        have = self._window.fill(1 << 14)
        size = at = 0
        try:
            size, at = varint(self._window.bytes, 1, min(have, 11))
            if size < 2 or size > MAX_PACKET_BYTES or self._window.fill(at + size) < at + size:
                return False
            for count, field in enumerate(fields(bytes(self._window.bytes[at : at + min(size, 1 << 14)]))):
                if count > _LOOK_AHEAD or field.number > 1024:
                    return False
        except WireError:
            # Only the beginning of a large packet is visible, so that its last visible field is incomplete.
            if size <= 1 << 14:
                return False
        after = at + size
        return self._window.fill(after + 1) <= after or self._window.bytes[after] == _PACKET_TAG
