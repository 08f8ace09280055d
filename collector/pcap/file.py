"""Reads pcap and pcapng files into columns of packets, piece by piece.

Both formats are chains: the position of a record is known only from the record before it. A loop in Python walks the
chain, one number per step, and numpy does everything else. (draft-ietf-opsawg-pcap; draft-ietf-opsawg-pcapng.)

A file may also contain packets of other kinds, or packets without a time. These are left out and counted by kind.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.pcap.interface import Interface
from collector.pcap.link_layer import SLL, SLL2, behind, ifindex_of
from collector.pcap.packet_key import ROOM, CapturedPackets, Views
from collector.pcap.unpacked_file import UnpackedFile, foreign_compression_of, unpacked_head
from collector.reading.closing import Closing
from contracts.arrays import Bytes, Ints
from contracts.errors import CaptureError
from contracts.records import Content

_KUZNETZOV: Final = 0xA1B2CD34
"""Magic number of a patched libpcap of the 1990s, whose record headers add the device's index and four more bytes."""
_MAGIC: Final = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1, _KUZNETZOV: 1000}
"""Magic number of pcap -> ns in one unit of the fractional part of a time."""
_NG_SECTION: Final = 0x0A0D0D0A
_NG_ORDER: Final = 0x1A2B3C4D
_NG_INTERFACE, _NG_OLD_PACKET, _NG_SIMPLE, _NG_STATISTICS, _NG_PACKET = 1, 2, 3, 5, 6
_NG_NAME, _NG_TSRESOL, _NG_FCSLEN, _NG_TSOFFSET = 2, 9, 13, 14
_NG_IFDROP, _NG_OSDROP = 5, 7
_NG_DROPCOUNT = 4
"""Option of a packet: number of packets missed between this packet and the one before."""
_PACKET_OPTIONS_MAX: Final = 8
"""Number of a packet's options that are searched for that option."""
_MISSED_MAX: Final = 1 << 40
"""Upper bound of missed packets in one option: more than any capture misses at once, and small enough that the sum over
a file fits 64 bits."""
_SALVAGE: Final = "; --salvage reads what is before it"

PIECE_BYTES: Final = 2 << 20
"""Bytes read at once: small enough for intermediate results to stay in the processor's caches."""
RECORD_MAX: Final = 1 << 20
"""Largest record of a packet, bytes: libpcap's MAXIMUM_SNAPLEN is 262144, plus options. Blocks of other kinds may be
longer."""
_DESCRIPTION_MAX: Final = 1 << 24
"""Largest block whose options are read, bytes: the limit of libpcap and Wireshark for any block."""
INTERFACES_MAX: Final = 1 << 16
_KINDS_TOLD: Final = 8


def is_pcap(head: bytes) -> bool:
    """Return whether a file with this beginning is a pcap or pcapng file, compressed or not."""
    return _is_plain(unpacked_head(head, 4))


def _is_plain(head: bytes) -> bool:
    if len(head) < 4:
        return False
    first = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    return bool(first & _MAGIC.keys()) or _NG_SECTION in first


@dataclass(frozen=True, slots=True, eq=False)
class PacketColumns:
    """Packets as columns of equal length, in the order of the file."""

    utc_ns: Ints
    length: npt.NDArray[np.uint32]
    """Bytes without the link-layer header."""
    content: Content
    sender: npt.NDArray[np.uint64]
    """Identifier of the sender: the source's hardware address, or whether the packet was outgoing; 0 if unknown."""
    place: Ints
    """Device at which a capture of several devices saw the packet: see `PcapFile.place_name`."""

    def __len__(self) -> int:
        return len(self.utc_ns)

    def __getitem__(self, index: slice | npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> PacketColumns:
        return PacketColumns(
            self.utc_ns[index], self.length[index], self.content[index], self.sender[index], self.place[index]
        )

    @classmethod
    def concatenate(cls, parts: list[PacketColumns]) -> PacketColumns:
        """Join columns in the given order; `parts` has at least one element."""
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
            np.concatenate([p.place for p in parts]),
        )


class PcapFile(Closing):
    """A packet capture, read once from front to back; a context manager.

    Opening raises `Unavailable` or `CaptureError`.
    """

    def __init__(self, path: Path | str, *, salvage: bool = False) -> None:
        self.path: Final = Path(path)
        self.skipped = 0
        """Bytes that salvage left out."""
        self.packets = 0
        """Packets read."""
        self.left_out: Counter[str] = Counter()
        """Reason -> number of packets left out: they are of another kind, or have no time."""
        self.cut_short = 0
        """Packets read of which too little was captured for a content key."""
        self.has_cooked = False
        """Whether there are packets of Linux's first cooked format, which does not contain the device."""
        self._told: list[str] = []
        self._salvage = salvage
        self._only_places = False
        self._places: Counter[int] = Counter()
        self._labels: list[str] = []
        """Names of interfaces (their numbers if they have no name), by `Interface.number`."""
        self._numbers: dict[str, int] = {}
        self._missed = 0
        self._ended = self._refused = False
        self._long_block = 0
        """Length of a block most of which is skipped unread."""
        self._to_skip = 0
        """Bytes of that block still to be skipped, without its last four."""
        self._file = UnpackedFile(self.path, "name a pcap or pcapng file")
        try:
            head = self._file.read(24)
            if not _is_plain(head):
                raise self._error(0, f"neither pcap nor pcapng: {_beginning(head)}")
            self._is_ng = int.from_bytes(head[:4], "little") == _NG_SECTION
            self._interfaces: list[Interface] = []
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

    def _begin_pcap(self, head: bytes) -> None:
        if len(head) < 24:
            raise self._error(0, "the file is cut inside its header")
        self._order = "<" if int.from_bytes(head[:4], "little") in _MAGIC else ">"
        magic, major, minor, _, _, _, link = struct.unpack(self._order + "IHHiIII", head)
        if major != 2:
            raise self._error(4, f"pcap version {major}.{minor}, expected 2")
        # Bits 28 to 31 are the length of the frame checksum in words of 16 bits, if bit 26 is set.
        fcs_bytes = 2 * (link >> 28) if link & 1 << 26 else 0
        one = Interface(link & 0xFFFF, fcs_bytes=fcs_bytes, exponent=9 if _MAGIC[magic] == 1 else 6)
        if one.trouble:
            raise self._error(20, f"packets {one.trouble}; expected Ethernet (1), raw IP (101) or cooked (113, 276)")
        self._interfaces.append(one)
        self._own_head = head[:8]
        """Magic number and version."""
        self._record_head = 24 if magic == _KUZNETZOV else 16
        # Before version 2.3 the two lengths were in the opposite order.
        self._captured_at = 12 if minor < 3 else 8

    def _error(self, offset: int, why: str) -> CaptureError:
        return CaptureError(self.path, offset, why + (" (of the unpacked file)" if self._file.compression else ""))

    @property
    def bytes_total(self) -> int:
        """Size of the file, compressed or not."""
        return self._file.bytes_total

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far, compressed or not."""
        return self._file.bytes_read

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        told = list(self._told)
        told += [f"{self.path}: {count} packets {what}: left out" for what, count in self._kinds_left_out()]
        if self.cut_short:
            told.append(
                f"{self.path}: {self.cut_short} packets were cut too short to identify them; they count as unmatched."
                " Capture at least 96 bytes of each packet"
            )
        missed = self._missed + sum(one.missed_in_all for one in self._interfaces)
        if missed:
            told.append(f"{self.path}: by its own statistics the capture missed {missed} packets")
        return told

    def _kinds_left_out(self) -> list[tuple[str, int]]:
        """Return (reason, number of packets left out) for the most frequent reasons, and one sum of the others."""
        kinds = self.left_out.most_common(_KINDS_TOLD)
        others = self.left_out.total() - sum(count for _, count in kinds)
        return [*kinds, (f"of {len(self.left_out) - len(kinds)} more such kinds", others)] if others else kinds

    @property
    def missing(self) -> int:
        """Estimated number of packets that salvage left out, from the bytes skipped and the packets' average size."""
        if not self.skipped:
            return 0
        good = self._offset if self._file.compression else self.bytes_total - self.skipped
        return max(self.skipped * self.packets // max(good, 1), 1)

    @property
    def discarded(self) -> int:
        """Packets that were left out, including the estimate for salvage."""
        return self.missing + self.left_out.total()

    # --- places ---------------------------------------------------------------------------------

    def places(self) -> Counter[int]:
        """Read the whole file and return place -> number of packets, in a tenth of the time that `pieces` takes.

        Call this instead of `pieces`, not with it. Raises `CaptureError`.
        """
        self._only_places = True
        for _ in self._walked():
            pass
        return self._places

    def place_name(self, place: int) -> str:
        """Return the name of a place: the interface's name or number, the kernel's index of the device, or both."""
        number, ifindex = place >> 32, place & 0xFFFFFFFF
        name = self._labels[number] if self._labels else ""
        if not ifindex:
            return name or str(number)
        return f"{name}:{ifindex}" if len(self._labels) > 1 else str(ifindex)

    @property
    def may_have_places(self) -> bool:
        """Whether the format can distinguish several places."""
        return self._is_ng or self._record_head > 16 or self._interfaces[0].link == SLL2

    # --- the chain ------------------------------------------------------------------------------

    def pieces(self) -> Iterator[PacketColumns]:
        """Yield all packets, some hundred thousand at a time.

        Raises `CaptureError` for damage, and if no packet of the file can be read.
        """
        for walked in self._walked():
            self.packets += len(walked)
            yield walked
        if self.packets:
            return
        if self.left_out:
            said = ", ".join(f"{count} {what}" for what, count in self._kinds_left_out())
            raise self._error(0, f"no packet in it can be read: {said}")
        if self._interfaces and all(one.trouble for one in self._interfaces):
            raise self._error(0, f"no interface in it can be read: {self._interfaces[0].trouble}")

    def _walked(self) -> Iterator[PacketColumns]:
        while not self._ended:
            self._fill()
            walked = self._walk_ng() if self._is_ng else self._walk_pcap()
            if walked is not None and len(walked):
                yield walked

    def _fill(self) -> None:
        try:
            if self._to_skip:
                gone = self._file.skip(self._to_skip)
                self._offset += gone
                self._to_skip -= gone
            block = self._file.read(PIECE_BYTES)
        except CaptureError as error:
            if not self._salvage:
                raise CaptureError(error.path, error.offset, error.why + _SALVAGE) from error
            self._told.append(f"{error}; what is behind it is left out")
            self.skipped += max(self._file.left, 1)
            self._ended = self._refused = True
            return
        self._ended = not block
        self._window += block

    def _refuse(self, at: int, why: str) -> None:
        """Report a broken chain: raise `CaptureError`, or with salvage count the bytes behind it and end."""
        if self._refused:
            return
        if not self._salvage:
            raise self._error(self._offset + at, why + _SALVAGE)
        left = max(len(self._window) - at + self._file.left, 1)
        about = "about " if self._file.compression else ""
        self._told.append(f"{self._error(self._offset + at, why)}; {about}{left} bytes from there on left out")
        self.skipped += left
        self._ended = self._refused = True

    def _drop(self, at: int) -> None:
        del self._window[:at]
        self._offset += at

    # --- pcap -----------------------------------------------------------------------------------

    def _walk_pcap(self) -> PacketColumns | None:
        window, order, head, captured_at = self._window, self._order, self._record_head, self._captured_at
        end, at = len(window), 0
        starts: list[int] = []
        size_of = struct.Struct(order + "I").unpack_from
        append = starts.append
        last = end - head
        # The loop checks no sizes: an impossible size leads out of the window and is examined afterwards.
        while at <= last:
            append(at)
            at += head + size_of(window, at + captured_at)[0]
        if starts and at > end:
            at = starts.pop()
        broken = ""
        if at <= last and (size := size_of(window, at + captured_at)[0]) > RECORD_MAX:
            broken = f"a packet of {size} bytes; expected at most {RECORD_MAX}"
            if starts and window[starts[-1] : starts[-1] + len(self._own_head)] == self._own_head:
                # A second file's head looks like an empty packet followed by a very long one.
                at, broken = starts.pop(), "another capture begins in the same file; `mergecap` makes one of several"
        found = self._columns_of_pcap(starts) if starts else None
        if broken:
            self._refuse(at, broken)
        elif self._ended and at < end:
            self._refuse(at, f"a packet is cut, {end - at} bytes of it are there")
        self._drop(at)
        return found

    def _columns_of_pcap(self, starts: list[int]) -> PacketColumns | None:
        buffer = self._padded()
        at = np.array(starts, np.int64)
        one = self._interfaces[0]
        seconds, part = self._u32(buffer, at), self._u32(buffer, at + 4)
        captured, length = self._u32(buffer, at + self._captured_at), self._u32(buffer, at + 20 - self._captured_at)
        # A fraction of exactly one second is a rounded time; a larger one is invalid.
        per_s = 10**one.exponent
        # In a file of microseconds a larger fraction suggests that the unit is nanoseconds.
        other_unit = part > per_s if one.exponent == 6 else np.zeros(len(part), np.bool_)
        wrong = np.flatnonzero((captured > RECORD_MAX) | other_unit)
        if len(wrong):
            first = int(wrong[0])
            self._refuse(
                starts[first],
                f"a packet of {captured[first]} bytes; expected at most {RECORD_MAX}"
                if captured[first] > RECORD_MAX
                else f"a time with {part[first]} of {per_s} parts of a second; is the magic number of another unit?",
            )
            at, seconds, part, captured, length = (a[:first] for a in (at, seconds, part, captured, length))
        utc_ns = seconds * 10**9 + part * 10 ** (9 - one.exponent)
        ifindex = self._u32(buffer, at + 16) if self._record_head > 16 else None
        return self._packets(buffer, one, at + self._record_head, captured, length, utc_ns, 0, ifindex)

    def _u32(self, buffer: Bytes, at: Ints) -> Ints:
        """Return the 32-bit numbers at byte offsets, in the file's byte order."""
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
        if self._long_block:
            if end < 4 and not self._ended:
                return None
            at, broken = self._end_of_long_block()
        unpack = struct.Struct(self._order + "II").unpack_from
        while at + 12 <= end and not broken:
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
                self._begin_section(order)
                unpack = struct.Struct(order + "II").unpack_from
                _, size = unpack(window, at)
            broken = self._why_broken(at, kind, size)
            if broken:
                break
            if at + size > end:
                if self._passed_over(at, kind) and size > PIECE_BYTES:
                    # Skip all but the length at the block's end, which must equal the length at its beginning.
                    self._count(at, kind)
                    self._long_block, self._to_skip = size, at + size - 4 - end
                    at = end
                break
            if kind == _NG_SECTION:
                major, minor = struct.unpack_from(self._order + "HH", window, at + 12)
                if major != 1:
                    broken = f"a section of version {major}.{minor}, expected 1"
                    break
            if kind == _NG_INTERFACE:
                # The packets before this block belong to the interfaces before it.
                self._interface(at, size)
            elif kind == _NG_STATISTICS:
                self._statistics(at, size)
            elif kind in (_NG_OLD_PACKET, _NG_PACKET) and size <= RECORD_MAX:
                starts.append(at)
            else:
                self._count(at, kind)
            at += size
        parts += self._columns_of_ng(starts)
        if broken:
            self._refuse(at, broken)
        elif self._ended and at < end:
            self._refuse(at, f"a block is cut, {end - at} bytes of it are there")
        self._drop(at)
        return PacketColumns.concatenate(parts) if parts else None

    def _why_broken(self, at: int, kind: int, size: int) -> str:
        """Return what is wrong with a block's head, or an empty string."""
        smallest = {_NG_PACKET: 32, _NG_OLD_PACKET: 32, _NG_SECTION: 28, _NG_INTERFACE: 20, _NG_SIMPLE: 16}.get(
            kind, 12
        )
        if self._passed_over(at, kind):
            left = self._file.left + len(self._window) - at
            if smallest <= size <= left and not size & 3:
                return ""
            if size > left and self._file.compression:
                # The size of the decompressed file is unknown.
                return ""
            return f"a block of {size} bytes; expected {smallest} to {left}, which are left, in whole words"
        largest = _DESCRIPTION_MAX if kind in (_NG_INTERFACE, _NG_STATISTICS) else RECORD_MAX
        if smallest <= size <= largest and not size & 3:
            return ""
        return f"a block of {size} bytes; expected {smallest} to {largest}, in whole words"

    def _passed_over(self, at: int, kind: int) -> bool:
        """Return whether a block may have any length, because only its head is read."""
        if kind in (_NG_OLD_PACKET, _NG_PACKET):
            one = self._interface_at(at, kind)
            return one is not None and bool(one.trouble)
        return kind not in (_NG_INTERFACE, _NG_STATISTICS)

    def _count(self, at: int, kind: int) -> None:
        """Count the packet in a skipped block, if there is one, as left out."""
        if kind == _NG_SIMPLE:
            self.left_out["in simple packet blocks, which have no time"] += 1
        elif kind in (_NG_OLD_PACKET, _NG_PACKET):
            one = self._interface_at(at, kind)
            self.left_out[one.trouble if one else ""] += 1

    def _end_of_long_block(self) -> tuple[int, str]:
        """Return the offset of the block after a skipped one, and the error if the two lengths of that block differ."""
        size, self._long_block = self._long_block, 0
        if len(self._window) >= 4 and struct.unpack_from(self._order + "I", self._window)[0] == size:
            return 4, ""
        self.skipped += (size - 4 - self._to_skip) * self._salvage
        self._to_skip = 0
        return 0, f"a block of {size} bytes ends without its length"

    def _order_at(self, at: int) -> str:
        raw = bytes(self._window[at + 8 : at + 12])
        for order in "<>":
            if struct.unpack(order + "I", raw)[0] == _NG_ORDER:
                return order
        return ""

    def _begin_section(self, order: str) -> None:
        self._missed += sum(one.missed_in_all for one in self._interfaces)
        self._order, self._interfaces = order, []

    def _interface_at(self, at: int, kind: int) -> Interface | None:
        """Return the interface of a packet's block; None if the section has no such interface."""
        form = "H" if kind == _NG_OLD_PACKET else "I"
        (which,) = struct.unpack_from(self._order + form, self._window, at + 8)
        return self._interfaces[which] if which < len(self._interfaces) else None

    def _options(self, at: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Yield code and value of each option between two offsets of the window."""
        while at + 4 <= last:
            code, length = struct.unpack_from(self._order + "HH", self._window, at)
            if not code or at + 4 + length > last:
                return
            yield code, bytes(self._window[at + 4 : at + 4 + length])
            at += 4 + (length + 3 & ~3)

    def _interface(self, at: int, size: int) -> None:
        if len(self._interfaces) == INTERFACES_MAX:
            raise self._error(self._offset + at, f"more than {INTERFACES_MAX} interfaces")
        (link,) = struct.unpack_from(self._order + "H", self._window, at + 8)
        one, name = Interface(link), str(len(self._interfaces))
        for code, value in self._options(at + 16, at + size - 4):
            if code == _NG_NAME and value.strip(b"\0"):
                name = value.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif code == _NG_TSRESOL and value:
                one.base, one.exponent = (2, value[0] & 127) if value[0] & 128 else (10, value[0])
            elif code == _NG_TSOFFSET and len(value) >= 8:
                (one.offset_s,) = struct.unpack(self._order + "q", value[:8])
            elif code == _NG_FCSLEN and value:
                # The draft states bits, its example and Wireshark use bytes. No checksum has less than 8 bits.
                one.fcs_bytes = value[0] // 8 if value[0] >= 8 else value[0]
        one.number = self._numbers.setdefault(name, len(self._labels))
        if one.number == len(self._labels):
            self._labels.append(name)
        self._interfaces.append(one)

    def _statistics(self, at: int, size: int) -> None:
        if size < 24:
            return
        (which,) = struct.unpack_from(self._order + "I", self._window, at + 8)
        counts = {
            code: int.from_bytes(value[:8], "little" if self._order == "<" else "big")
            for code, value in self._options(at + 20, at + size - 4)
            if code in (_NG_IFDROP, _NG_OSDROP)
        }
        # The counts run from the start of the capture, so that the last block has the totals.
        if which < len(self._interfaces) and counts:
            self._interfaces[which].missed = sum(counts.values())

    def _columns_of_ng(self, starts: list[int]) -> list[PacketColumns]:
        if not starts:
            return []
        buffer = self._padded()
        at = np.array(starts, np.int64)
        kind, size, which, high, low, captured, length = (self._u32(buffer, at + 4 * word) for word in range(7))
        old, missed = kind == _NG_OLD_PACKET, np.zeros(len(at), np.int64)
        if old.any():
            # The old block has two 16-bit numbers in place of the interface: the interface and the packets missed.
            two = (which & 0xFFFF, which >> 16) if self._order == "<" else (which >> 16, which & 0xFFFF)
            which = np.where(old, two[0], which)
            missed = np.where(old & (two[1] != 0xFFFF), two[1], 0)
        wrong = np.flatnonzero((which >= len(self._interfaces)) | (captured > size - 32))
        if len(wrong):
            first = int(wrong[0])
            self._refuse(
                starts[first], f"a packet of interface {which[first]} with {captured[first]} bytes, which cannot be"
            )
            at, which, captured, length, high, low, size, missed = (
                a[:first] for a in (at, which, captured, length, high, low, size, missed)
            )
        missed += self._dropcounts(buffer, at + 28 + (captured + 3 & ~3), at + size - 4)
        for number in np.unique(which[missed > 0]).tolist():
            self._interfaces[number].missed_between += int(missed[which == number].sum())
        ticks = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        utc_ns = np.empty(len(at), np.int64)
        for number, of in _groups(which):
            one = self._interfaces[number]
            utc_ns[of] = -1 if one.trouble else one.utc_ns(ticks[of])
            wrong = of[utc_ns[of] < 0]
            if len(wrong):
                self.left_out[one.trouble or "with a time before 1970 or after 2116"] += len(wrong)
        # Decode frames of the same link type and checksum together, whatever their interface.
        alike = np.array([one.link << 8 | one.fcs_bytes for one in self._interfaces], np.int64)[which]
        numbers = np.array([one.number for one in self._interfaces], np.int64)[which]
        parts, places = [], []
        for _, of in _groups(np.where(utc_ns < 0, -1, alike)):
            if utc_ns[of[0]] >= 0:
                one = self._interfaces[int(which[of[0]])]
                parts.append(self._packets(buffer, one, at[of] + 28, captured[of], length[of], utc_ns[of], numbers[of]))
                places.append(of)
        if not parts or self._only_places:
            return []
        back = np.argsort(np.concatenate(places), kind="stable")
        return [PacketColumns.concatenate(parts)[back] if len(parts) > 1 else parts[0]]

    def _dropcounts(self, buffer: Bytes, at: Ints, last: Ints) -> Ints:
        """Return the number of packets missed before each packet, from its options between the offsets `at`, `last`."""
        found, at = np.zeros(len(at), np.int64), at.copy()
        of = np.flatnonzero(at + 4 <= last)
        for _ in range(_PACKET_OPTIONS_MAX):
            if not len(of):
                break
            word = self._u32(buffer, at[of])
            code, length = (word & 0xFFFF, word >> 16) if self._order == "<" else (word >> 16, word & 0xFFFF)
            there = (code != 0) & (at[of] + 4 + length <= last[of])
            count = there & (code == _NG_DROPCOUNT) & (length == 8)
            halves = self._u32(buffer, at[of[count]] + 4), self._u32(buffer, at[of[count]] + 8)
            low, high = halves if self._order == "<" else halves[::-1]
            found[of[count]] = np.minimum(low | np.minimum(high, 1 << 30) << 32, _MISSED_MAX)
            at[of] += 4 + (length + 3 & ~3)
            of = of[there & ~count]
            of = of[at[of] + 4 <= last[of]]
        return found

    # --- packets --------------------------------------------------------------------------------

    def _padded(self) -> Bytes:
        return np.frombuffer(bytes(self._window) + bytes(ROOM + 64), np.uint8)

    def _packets(
        self,
        buffer: Bytes,
        one: Interface,
        start: Ints,
        captured: Ints,
        length: Ints,
        utc_ns: Ints,
        number: Ints | int,
        ifindex: Ints | None = None,
    ) -> PacketColumns:
        views = Views(buffer)
        place = (ifindex_of(views, one.link, start) if ifindex is None else ifindex) | number << 32
        if self._only_places:
            self._places.update(dict(zip(*(a.tolist() for a in np.unique(place, return_counts=True)), strict=True)))
            return _NOTHING
        # A record may state a larger packet than is possible.
        length = np.maximum(np.minimum(length, RECORD_MAX), captured)
        if one.fcs_bytes:
            length = np.maximum(length - one.fcs_bytes, 0)
            captured = np.minimum(captured, length)
        self.has_cooked |= one.link == SLL and len(start) > 0
        found = behind(views, one.link, start, captured, length)
        packets = CapturedPackets(views, found.start, found.captured, found.length, found.protocol)
        size = np.where(
            packets.version == 4,
            packets.ip_length,
            np.where(packets.version == 6, packets.ip_length + 40, found.length),
        )
        content = packets.content()
        self.cut_short += int(((content.packet_key == 0) & (captured < length)).sum())
        size = np.where(size > 0, size, found.length).astype(np.uint32)
        return PacketColumns(utc_ns, size, content, found.sender, place)


def _groups(values: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield each distinct value, ascending, with the indices of its occurrences."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    for of in np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        if len(of):
            yield int(values[of[0]]), of


def _beginning(head: bytes) -> str:
    """Describe the beginning of a file of another format, for an error."""
    foreign = foreign_compression_of(head)
    if foreign:
        return f"it is compressed with {foreign}, which MACE does not read: unpack it first"
    if not head:
        return "the file is empty"
    return f"it begins with {head[:4].hex(' ')}; Wireshark's `editcap -F pcapng` converts other formats of captures"


_NOTHING: Final = PacketColumns(
    np.zeros(0, np.int64), np.zeros(0, np.uint32), Content.of(0), np.zeros(0, np.uint64), np.zeros(0, np.int64)
)
