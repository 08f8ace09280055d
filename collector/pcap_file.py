"""pcap and pcapng files -> packets as columns, piece by piece.

Both are chains: where a record begins is known only from the one before it, so the chain is walked in Python, with
one number a step, and all else is numpy. (draft-ietf-opsawg-pcap; draft-ietf-opsawg-pcapng.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from collector.packet_key import IPV4, IPV6, ROOM, Packets, Views
from mace.errors import CaptureError, Unavailable
from mace.records import Content

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

_MAGIC: Final = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1}
"""pcap: ns in one unit of the second part of a time."""
_NG_SECTION: Final = 0x0A0D0D0A
_NG_ORDER: Final = 0x1A2B3C4D
_NG_INTERFACE, _NG_OLD_PACKET, _NG_SIMPLE, _NG_PACKET = 1, 2, 3, 6
_NG_TSRESOL, _NG_TSOFFSET = 9, 14

PIECE_BYTES: Final = 2 << 20
"""Read at once: what is computed of it stays in the processor's caches."""
RECORD_MAX: Final = 1 << 20
"""Bytes of one record: libpcap's MAXIMUM_SNAPLEN is 262144, and options come to it."""
INTERFACES_MAX: Final = 1 << 16

_ETHERNET, _RAW, _SLL, _SLL2 = 1, 101, 113, 276
_LINKS: Final = {_ETHERNET: 14, _RAW: 0, 12: 0, 14: 0, 228: 0, 229: 0, _SLL: 16, _SLL2: 20}
"""Bytes of the link layer's header, by link type (tcpdump.org/linktypes.html; 12 and 14 are what files of some systems
have for raw IP)."""
_OUTGOING: Final = 4
"""PACKET_OUTGOING of Linux's cooked captures."""


def is_pcap(head: bytes) -> bool:
    """Whether a file that begins so is a pcap or pcapng file."""
    if len(head) < 4:
        return False
    first = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    return bool(first & _MAGIC.keys()) or _NG_SECTION in first


@dataclass(frozen=True, slots=True, eq=False)
class PacketColumns:
    """Packets in the order of the file."""

    utc_ns: Ints
    length: npt.NDArray[np.uint32]
    """Bytes without the link layer's header."""
    content: Content
    sender: npt.NDArray[np.uint64]
    """What tells who sent it: the source's hardware address, or that it was outgoing; 0 where nothing does."""

    def __len__(self) -> int:
        return len(self.utc_ns)

    def __getitem__(self, index: slice | npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> PacketColumns:
        return PacketColumns(self.utc_ns[index], self.length[index], self.content[index], self.sender[index])

    @classmethod
    def concatenate(cls, parts: list[PacketColumns]) -> PacketColumns:
        """One after the other; at least one."""
        if len(parts) == 1:
            return parts[0]
        content = Content(
            *(np.concatenate(c) for c in zip(*([a for _, a in p.content.columns()] for p in parts), strict=True))
        )
        return cls(
            np.concatenate([p.utc_ns for p in parts]),
            np.concatenate([p.length for p in parts]),
            content,
            np.concatenate([p.sender for p in parts]),
        )


@dataclass(slots=True)
class _Interface:
    """One interface of a section."""

    link: int
    snap: int
    ticks_per_s: int = 1_000_000
    offset_s: int = 0

    def utc_ns(self, ticks: npt.NDArray[np.uint64]) -> Ints:
        if self.ticks_per_s == 10**9:
            ns = ticks.astype(np.int64)
        elif 10**9 % self.ticks_per_s == 0:
            ns = (ticks * np.uint64(10**9 // self.ticks_per_s)).astype(np.int64)
        else:
            per_s = np.uint64(self.ticks_per_s)
            rest = ticks % per_s
            # Not in whole numbers: finer than a ns, or a power of two. The rest of a second is below 2^53 of them.
            part = np.floor(rest.astype(np.float64) * (1e9 / self.ticks_per_s)).astype(np.int64)
            ns = (ticks // per_s).astype(np.int64) * 10**9 + part
        return ns + self.offset_s * 10**9


class PcapFile:
    """A capture file, read once from front to back; a context manager. Raises `Unavailable` or `CaptureError`."""

    def __init__(self, path: Path | str, *, salvage: bool = False) -> None:
        self.path: Final = Path(path)
        self.warnings: list[str] = []
        self.bytes_read = 0
        self.skipped = 0
        """Bytes that salvage left out."""
        self.packets = 0
        """That were read."""
        self._salvage = salvage
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise Unavailable(str(self.path), error.strerror or str(error), "name a pcap or pcapng file") from error
        self.bytes_total: Final = os.fstat(self._file.fileno()).st_size
        self._ended = False
        try:
            head = self._file.read(24)
            if not is_pcap(head):
                said = f"it begins with {head[:4].hex(' ')}" if head else "the file is empty"
                raise CaptureError(self.path, 0, f"neither pcap nor pcapng: {said}")
            self._is_ng = int.from_bytes(head[:4], "little") == _NG_SECTION
            self._interfaces: list[_Interface] = []
            self._order = "<"
            if not self._is_ng:
                self._begin_pcap(head)
            self._window = bytearray() if not self._is_ng else bytearray(head)
            self._offset = 24 if not self._is_ng else 0
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin_pcap(self, head: bytes) -> None:
        if len(head) < 24:
            raise CaptureError(self.path, 0, "the file is cut inside its header")
        self._order = "<" if int.from_bytes(head[:4], "little") in _MAGIC else ">"
        magic, major, minor, _, _, snap, link = struct.unpack(self._order + "IHHiIII", head)
        if major != 2:
            raise CaptureError(self.path, 4, f"pcap version {major}.{minor}, expected 2")
        one = _Interface(link & 0x0FFFFFFF, snap, 10**9 // _MAGIC[magic])
        self._check_link(one, 20)
        self._interfaces.append(one)

    def _check_link(self, one: _Interface, offset: int) -> None:
        if one.link not in _LINKS:
            raise CaptureError(
                self.path, offset, f"link type {one.link}, expected Ethernet (1), raw IP (101) or cooked (113, 276)"
            )

    def pieces(self) -> Iterator[PacketColumns]:
        """All packets, some hundred thousand at a time. Raises `CaptureError`."""
        while not self._ended:
            self._fill()
            walked = self._walk_ng() if self._is_ng else self._walk_pcap()
            self.bytes_read = self._offset
            if walked is not None and len(walked):
                self.packets += len(walked)
                yield walked

    def _fill(self) -> None:
        try:
            block = self._file.read(PIECE_BYTES)
        except OSError as error:
            raise CaptureError(self.path, self._offset, error.strerror or str(error)) from error
        self._ended = not block
        self._window += block

    @property
    def missing(self) -> int:
        """About how many packets salvage left out: as many as take these bytes where the others are like them."""
        if not self.skipped:
            return 0
        return max(self.skipped * self.packets // max(self.bytes_total - self.skipped, 1), 1)

    def _refuse(self, at: int, why: str) -> None:
        """The chain is broken: an error, or with salvage the end, all that is behind it counted."""
        if not self._salvage:
            raise CaptureError(self.path, self._offset + at, why)
        left = self.bytes_total - self._offset - at
        self.warnings.append(f"{self.path}: at byte {self._offset + at}: {why}; {left} bytes from there on left out")
        self.skipped += left
        self._ended = True

    def _drop(self, at: int) -> None:
        del self._window[:at]
        self._offset += at

    # --- pcap -----------------------------------------------------------------------------------

    def _walk_pcap(self) -> PacketColumns | None:
        window, order = self._window, self._order
        end, at = len(window), 0
        starts: list[int] = []
        size_of = struct.Struct(order + "I").unpack_from
        append = starts.append
        last = end - 16
        # The loop knows nothing of errors: a size that cannot be leads out of the window, and is looked at then.
        while at <= last:
            append(at)
            at += 16 + size_of(window, at + 8)[0]
        if starts and at > end:
            at = starts.pop()
        wrong = at <= last and size_of(window, at + 8)[0] > RECORD_MAX
        found = self._columns_of_pcap(starts) if starts else None
        if wrong:
            self._refuse(at, f"a packet of {size_of(window, at + 8)[0]} bytes; expected at most {RECORD_MAX}")
        elif self._ended and at < end:
            self._refuse(at, f"a packet is cut, {end - at} bytes of it are there")
        self._drop(at)
        return found

    def _columns_of_pcap(self, starts: list[int]) -> PacketColumns:
        buffer = self._padded()
        at = np.array(starts, np.int64)
        one = self._interfaces[0]
        seconds, part, captured, length = (self._u32(buffer, at + offset) for offset in (0, 4, 8, 12))
        wrong = np.flatnonzero(captured > RECORD_MAX)
        if len(wrong):
            first = int(wrong[0])
            self._refuse(starts[first], f"a packet of {captured[first]} bytes; expected at most {RECORD_MAX}")
            at, seconds, part, captured, length = (a[:first] for a in (at, seconds, part, captured, length))
        utc_ns = seconds * 10**9 + part * (10**9 // one.ticks_per_s)
        return self._packets(buffer, one, at + 16, captured, length, utc_ns)

    def _u32(self, buffer: Bytes, at: Ints) -> Ints:
        """Numbers of 32 bits in the file's byte order at any byte."""
        view: Any = np.ndarray((len(buffer) - 3,), f"{self._order}u4", buffer, strides=(1,))
        found: Ints = view[at].astype(np.int64)
        return found

    # --- pcapng ---------------------------------------------------------------------------------

    def _walk_ng(self) -> PacketColumns | None:
        window = self._window
        end, at = len(window), 0
        parts: list[PacketColumns] = []
        starts: list[int] = []
        broken = ""
        unpack = struct.Struct(self._order + "II").unpack_from
        while at + 12 <= end:
            kind, size = unpack(window, at)
            if kind == _NG_PACKET and 32 <= size <= RECORD_MAX and not size & 3:
                if at + size > end:
                    break
                starts.append(at)
                at += size
                continue
            if kind == _NG_SECTION:
                order = self._order_at(at)
                if not order:
                    broken = "a section without a byte order"
                    break
                parts += self._columns_of_ng(starts)
                starts = []
                self._order, self._interfaces = order, []
                unpack = struct.Struct(order + "II").unpack_from
                _, size = unpack(window, at)
            if not 12 <= size <= RECORD_MAX or size & 3:
                broken = f"a block of {size} bytes; expected 12 to {RECORD_MAX}, in whole words"
                break
            if at + size > end:
                break
            if kind == _NG_INTERFACE:
                # Packets before it belong to the interfaces before it.
                self._interface(at, size)
            elif kind in (_NG_OLD_PACKET, _NG_SIMPLE):
                broken = f"a packet block of kind {kind}, which carries no interface of its own or no time"
                break
            at += size
        parts += self._columns_of_ng(starts)
        if broken:
            self._refuse(at, broken)
        elif self._ended and at < end:
            self._refuse(at, f"a block is cut, {end - at} bytes of it are there")
        self._drop(at)
        return PacketColumns.concatenate(parts) if parts else None

    def _order_at(self, at: int) -> str:
        raw = bytes(self._window[at + 8 : at + 12])
        for order in "<>":
            if struct.unpack(order + "I", raw)[0] == _NG_ORDER:
                return order
        return ""

    def _interface(self, at: int, size: int) -> None:
        link, _, snap = struct.unpack_from(self._order + "HHI", self._window, at + 8) if size >= 20 else (0, 0, 0)
        one = _Interface(link, snap)
        self._check_link(one, self._offset + at)
        place, last = at + 16, at + size - 4
        while place + 4 <= last:
            code, length = struct.unpack_from(self._order + "HH", self._window, place)
            if not code or place + 4 + length > last:
                break
            if code == _NG_TSRESOL and length >= 1:
                power = self._window[place + 4]
                base, exponent = (2, power & 127) if power & 128 else (10, power)
                if exponent > (63 if base == 2 else 18):
                    raise CaptureError(self.path, self._offset + place, f"a clock of {base}^{exponent} ticks a second")
                one.ticks_per_s = base**exponent
            elif code == _NG_TSOFFSET and length >= 8:
                (one.offset_s,) = struct.unpack_from(self._order + "q", self._window, place + 4)
                if abs(one.offset_s) > 1 << 33:
                    raise CaptureError(self.path, self._offset + place, f"times that begin {one.offset_s} s from 1970")
            place += 4 + (length + 3 & ~3)
        if len(self._interfaces) == INTERFACES_MAX:
            raise CaptureError(self.path, self._offset + at, f"more than {INTERFACES_MAX} interfaces")
        self._interfaces.append(one)

    def _columns_of_ng(self, starts: list[int]) -> list[PacketColumns]:
        if not starts:
            return []
        buffer = self._padded()
        at = np.array(starts, np.int64)
        size, which, high, low, captured, length = (self._u32(buffer, at + 4 * word) for word in (1, 2, 3, 4, 5, 6))
        wrong = np.flatnonzero((which >= len(self._interfaces)) | (captured > size - 32))
        if len(wrong):
            first = int(wrong[0])
            self._refuse(
                starts[first], f"a packet of interface {which[first]} with {captured[first]} bytes, which cannot be"
            )
            at, which, captured, length, high, low = (a[:first] for a in (at, which, captured, length, high, low))
        ticks = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        if not len(at):
            return []
        present = np.unique(which)
        if len(present) == 1:
            one = self._interfaces[int(present[0])]
            return [self._packets(buffer, one, at + 28, captured, length, one.utc_ns(ticks))]
        parts, places = [], []
        for number in present.tolist():
            of = np.flatnonzero(which == number)
            one = self._interfaces[number]
            parts.append(self._packets(buffer, one, at[of] + 28, captured[of], length[of], one.utc_ns(ticks[of])))
            places.append(of)
        back = np.empty(len(at), np.int64)
        back[np.concatenate(places)] = np.arange(len(at))
        return [PacketColumns.concatenate(parts)[back]]

    # --- packets --------------------------------------------------------------------------------

    def _padded(self) -> Bytes:
        return np.frombuffer(bytes(self._window) + bytes(ROOM + 64), np.uint8)

    def _packets(
        self, buffer: Bytes, one: _Interface, start: Ints, captured: Ints, length: Ints, utc_ns: Ints
    ) -> PacketColumns:
        # A record may claim more than a packet ever had.
        length = np.maximum(np.minimum(length, RECORD_MAX), captured)
        header = _LINKS[one.link]
        there = captured >= max(header, 1)
        views = Views(buffer)
        if one.link == _ETHERNET:
            words = views.be64(start + 6)
            sender, protocol = words >> np.uint64(16), views.be16(start + 12)
        elif one.link == _SLL:
            protocol = views.be16(start + 14)
            sender = (views.be16(start) == _OUTGOING).astype(np.uint64) + np.uint64(1)
        elif one.link == _SLL2:
            protocol = views.be16(start)
            sender = (views.byte(start + 10) == _OUTGOING).astype(np.uint64) + np.uint64(1)
        else:
            version = views.byte(start) >> 4
            sender, protocol = np.zeros(len(start), np.uint64), np.where(version == 4, IPV4, IPV6 * (version == 6))
        kept, whole = captured - header, length - header
        if not there.all():
            protocol[~there], sender[~there], kept[~there], whole[~there] = 0, 0, 0, 0
        packets = Packets(views, start + header, kept, whole, protocol)
        size = np.where(
            packets.version == 4, packets.ip_length, np.where(packets.version == 6, packets.ip_length + 40, whole)
        )
        return PacketColumns(utc_ns, np.where(size > 0, size, whole).astype(np.uint32), packets.content(), sender)
