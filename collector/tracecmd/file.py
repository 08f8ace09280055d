"""The frame of a trace.dat file: the metadata that trace-cmd wrote around the pages of the kernel's rings.

Version 6 is a sequence of parts; version 7 has sections to which options point. trace-cmd's manual describes both
(trace-cmd.dat.v6(5), trace-cmd.dat.v7(5)). The reader trusts nothing in the file: it checks each size and offset
against the file before use, reads nothing twice, and bounds decompression by the size that the file states.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zstandard

from collector.pages.formats import EventFormat, PageLayout, parse_format, parse_header_page
from collector.reading.closing import Closing
from contracts.errors import CaptureError, SourceError, Unavailable

MAGIC: Final = b"\x17\x08\x44tracing"
VERSIONS: Final = (6, 7)
ALGORITHMS: Final = ("none", "zlib", "zstd")

FTRACE: Final = "ftrace"
"""The subsystem of ftrace's own events, which the file keeps apart from all others."""
METADATA_MAX: Final = 64 << 20
"""Largest decompressed part of the frame, bytes. All event formats of a kernel take 2 MB."""
_STATS_BYTES: Final = 1024
"""Bytes kept of a CPU's `stats`, which takes some 200."""
CPUS_MAX: Final = 1 << 16
"""Largest number of CPUs: the kernel's NR_CPUS is at most 8192, and a record's CPU has 16 bits."""
EVENTS_MAX: Final = 1 << 16
"""Largest number of events: their ids have 16 bits."""
WARNINGS_MAX: Final = 100
PAGE_MAX: Final = 1 << 20
"""Largest page, bytes; larger than any page of a ring, which is at most 64 machine pages (`buffer_subbuf_size_kb`)."""

_OPTION_DONE: Final = 0
_OPTION_DATE: Final = 1
_OPTION_CPUSTAT: Final = 2
_OPTION_BUFFER: Final = 3
_OPTION_TRACECLOCK: Final = 4
_OPTION_UNAME: Final = 5
_OPTION_OFFSET: Final = 7
_OPTION_CPUCOUNT: Final = 8
_OPTION_VERSION: Final = 9
_OPTION_TRACEID: Final = 11
_OPTION_TIME_SHIFT: Final = 12
_OPTION_TSC2NSEC: Final = 14
_OPTION_HEADER_INFO: Final = 16
_OPTION_FTRACE_EVENTS: Final = 17
_OPTION_EVENT_FORMATS: Final = 18
_OPTION_CMDLINES: Final = 21
_COMPRESSED: Final = 1
_FLAG_BYTES: Final = 10


@dataclass(frozen=True, slots=True)
class CpuData:
    """Offset and size of one CPU's pages in the file."""

    cpu: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class BufferInfo:
    """One trace instance; the top one has the name ""."""

    name: str
    clock: str
    page_size: int
    compressed: bool
    cpus: tuple[CpuData, ...]
    """CPUs with pages."""


@dataclass(frozen=True, slots=True)
class Tsc:
    """Conversion of cycles to nanoseconds: `cycles * mult >> shift`."""

    mult: int
    shift: int


@dataclass(slots=True)
class FileFrame:
    """The metadata of a file."""

    version: int
    big_endian: bool
    page_size: int
    algorithm: str
    layout: PageLayout | None = None
    """Layout of the kernel's pages; None if the file has none."""
    formats: dict[str, str] = field(default_factory=dict)
    """Text of each event's format, by `subsystem:name`."""
    buffers: list[BufferInfo] = field(default_factory=list)
    clock: str = ""
    uname: str = ""
    recorder: str = ""
    """Version of trace-cmd."""
    trace_id: int = 0
    date_offset_ns: int | None = None
    """Nanoseconds to add to a time to get UTC (`trace-cmd record --date`), a multiple of 1000."""
    offset_ns: int = 0
    """Nanoseconds that the recorder adds to each time (`--ts-offset`)."""
    tsc: Tsc | None = None
    guest: bool = False
    """Whether the file has the offsets of a guest's clock to its host's."""
    stats: list[str] = field(default_factory=list)
    """The kernel's `per_cpu/cpuN/stats` at the end."""
    cmdlines: str = ""
    """Lines of `pid name`."""

    def format(self, event: str) -> EventFormat | None:
        """Return the format of an event, None if the file lacks it; raises `SourceError` for an invalid format."""
        text = self.formats.get(event)
        return None if text is None else parse_format(event, text)


class TraceFile(Closing):
    """An open trace.dat file with its frame; a context manager. Opening raises `Unavailable` or `CaptureError`."""

    def __init__(self, path: Path | str, *, salvage: bool = False) -> None:
        self.path: Final = Path(path)
        self.salvage: Final = salvage
        self._algorithm = "none"
        self._formats_size = 0
        self._zstd = zstandard.ZstdDecompressor()
        self.warnings: list[str] = []
        """Damage that salvage skipped, one line each."""
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(
                str(self.path), error.strerror or str(error), "name a file that `trace-cmd record` made"
            ) from error
        try:
            self.size: Final = os.fstat(self._fd).st_size
            self.frame: Final = self._read()
            self._check_regions()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def warn(self, offset: int, why: str) -> None:
        """Add a warning about damage that salvage skips, up to a limit: a hostile file has millions of places."""
        if len(self.warnings) < WARNINGS_MAX:
            self.warnings.append(f"{self.path}: at byte {offset}: {why}")
        elif len(self.warnings) == WARNINGS_MAX:
            self.warnings.append(f"{self.path}: and more of that kind")

    def bytes_at(self, offset: int, size: int, what: str) -> bytes:
        """Return `size` bytes of the file; raises `CaptureError` if it has fewer. `what` names them in the error."""
        if offset + size > self.size:
            raise CaptureError(
                self.path, offset, f"{what} has {size} bytes, and the file {max(self.size - offset, 0)} from there on"
            )
        return os.pread(self._fd, size, offset)

    def read_into(self, offset: int, target: memoryview) -> int:
        """Read bytes of the file into memory, and return how many there were."""
        done = 0
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], offset + done)
            if not got:
                break
            done += got
        return done

    def unpack(self, at: int, packed: bytes, size: int) -> bytes:
        """Decompress a part whose stated size is `size` bytes; raises `CaptureError`."""
        try:
            if self._algorithm == "zstd":
                told = zstandard.get_frame_parameters(packed).content_size
                if told not in (zstandard.CONTENTSIZE_UNKNOWN, size):
                    raise CaptureError(self.path, at, f"a part of {size} bytes whose zstd frame has {told}")
                # If the zstd frame has no size, the library stops at `max_output_size`.
                raw = self._zstd.decompress(packed, max_output_size=size)
            else:
                raw = zlib.decompressobj().decompress(packed, size + 1)
        except (zlib.error, zstandard.ZstdError) as error:
            raise CaptureError(self.path, at, f"cannot be decompressed: {error}") from error
        if len(raw) != size:
            raise CaptureError(self.path, at, f"a part of {size} bytes that has {len(raw)} when it is decompressed")
        return raw

    # --- the frame ------------------------------------------------------------------------------

    def _read(self) -> FileFrame:
        head = self._window(0, min(self.size, 4096), "<")
        if head.take(min(len(MAGIC), head.left), "signature") != MAGIC:
            raise CaptureError(self.path, 0, "not a trace.dat file: it does not begin with trace-cmd's signature")
        version = head.string("the version")
        if version not in map(str, VERSIONS):
            raise CaptureError(
                self.path, len(MAGIC), f"trace.dat version {version[:20]!r}; this MACE reads versions 6 and 7"
            )
        big_endian, long_size = head.take(2, "byte order and size of a long")
        if big_endian > 1 or long_size not in (4, 8):
            raise head.refuse(f"byte order {big_endian} and longs of {long_size} bytes; expected 0 or 1, and 4 or 8")
        self._order = "><"[not big_endian]
        head = self._window(head.offset, min(self.size - head.offset, 4096), self._order)
        page_size = head.number(4, "the page size")
        frame = FileFrame(int(version), bool(big_endian), page_size, "none")
        if version == "6":
            self._version_6(frame, head.file_offset)
        else:
            frame.algorithm = self._algorithm = head.string("the compression's name")
            head.string("the compression's version")
            if frame.algorithm not in ALGORITHMS:
                raise head.refuse(f"compressed with {frame.algorithm[:20]!r}; known are {', '.join(ALGORITHMS)}")
            self._version_7(frame, head.number(8, "the offset of the options"))
        return frame

    def _window(self, offset: int, size: int, order: str) -> _ByteStretch:
        return _ByteStretch(self, offset, size, order)

    def _in_memory(self, offset: int, data: bytes) -> _ByteStretch:
        return _ByteStretch(self, offset, len(data), self._order, data)

    def _version_6(self, frame: FileFrame, offset: int) -> None:
        parts = self._window(offset, self.size - offset, self._order)
        self._header_info(frame, parts)
        self._ftrace_events(frame, parts)
        self._event_formats(frame, parts)
        parts.skip(parts.number(4, "the size of the symbols"), "the symbols")
        parts.skip(parts.number(4, "the size of the printk formats"), "the printk formats")
        frame.cmdlines = parts.text(parts.number(8, "the size of the process names"), "the process names")
        cpus = parts.number(4, "the number of CPUs")
        buffers: list[tuple[int, str]] = []
        kind = parts.take(_FLAG_BYTES, "the mark of the options")
        if kind.startswith(b"options"):
            while option := parts.number(2, "an option's number"):
                at = parts.file_offset
                size = parts.number(4, "an option's size")
                data = self._in_memory(at + 4, parts.take(self._limited(size, at), "an option"))
                if option == _OPTION_BUFFER:
                    buffers.append((data.number(8, "a buffer's offset"), data.string("a buffer's name")))
                elif option == _OPTION_CPUCOUNT:
                    cpus = data.number(4, "the number of CPUs")
                else:
                    self._option(frame, option, data)
            kind = parts.take(_FLAG_BYTES, "the mark of the data")
        frame.buffers.append(self._flyrecord_6(frame, "", kind, parts, cpus))
        for where, name in buffers:
            instance = self._window(where, self.size - where, self._order)
            kind = instance.take(_FLAG_BYTES, "the mark of a buffer's data")
            frame.buffers.append(self._flyrecord_6(frame, name, kind, instance, cpus))

    def _flyrecord_6(self, frame: FileFrame, name: str, kind: bytes, parts: _ByteStretch, cpus: int) -> BufferInfo:
        if not kind.startswith(b"flyrecord"):
            raise parts.refuse(
                "holds the text of a latency tracer, no events"
                if kind.startswith(b"latency")
                else f"here the data should begin, not {kind!r}"
            )
        self._check_cpus(cpus, parts)
        where = [
            CpuData(cpu, parts.number(8, "the offset of a CPU's pages"), parts.number(8, "the size of a CPU's pages"))
            for cpu in range(cpus)
        ]
        return BufferInfo(name, frame.clock, frame.page_size, False, tuple(one for one in where if one.size))

    def _version_7(self, frame: FileFrame, offset: int) -> None:
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise CaptureError(self.path, offset, "the options lead in a circle")
            seen.add(offset)
            offset = self._options_7(frame, offset)

    def _options_7(self, frame: FileFrame, offset: int) -> int:
        """Read one section of options and return the offset of the next, or 0."""
        ident, _, parts = self._section(offset)
        if ident != _OPTION_DONE:
            raise CaptureError(self.path, offset, f"here options should begin, not a section of kind {ident}")
        while True:
            option = parts.number(2, "an option's number")
            at = parts.file_offset
            size = parts.number(4, "an option's size")
            data = self._in_memory(at + 4, parts.take(self._limited(size, at), "an option"))
            if option == _OPTION_DONE:
                return data.number(8, "the offset of more options")
            if option == _OPTION_BUFFER:
                frame.buffers.append(self._buffer_7(data))
            elif option == _OPTION_HEADER_INFO:
                self._header_info(frame, self._section(data.number(8, "an offset"), _OPTION_HEADER_INFO)[2])
            elif option == _OPTION_FTRACE_EVENTS:
                self._ftrace_events(frame, self._section(data.number(8, "an offset"), _OPTION_FTRACE_EVENTS)[2])
            elif option == _OPTION_EVENT_FORMATS:
                self._event_formats(frame, self._section(data.number(8, "an offset"), _OPTION_EVENT_FORMATS)[2])
            elif option == _OPTION_CMDLINES:
                section = self._section(data.number(8, "an offset"), _OPTION_CMDLINES)[2]
                frame.cmdlines = section.text(section.number(8, "the size of the process names"), "the process names")
            else:
                self._option(frame, option, data)

    def _section(self, offset: int, expected: int | None = None) -> tuple[int, bool, _ByteStretch]:
        """Return a section's kind, whether it is compressed, and its content."""
        head = self._window(offset, 16, self._order)
        ident, flags = head.number(2, "a section's kind"), head.number(2, "a section's flags")
        head.number(4, "a section's name")
        size = head.number(8, "a section's size")
        if expected is not None and ident != expected:
            raise CaptureError(self.path, offset, f"a section of kind {ident}, expected {expected}")
        if offset + 16 + size > self.size:
            raise CaptureError(self.path, offset, f"a section of {size} bytes, and the file has {self.size - offset}")
        if not flags & _COMPRESSED or ident == _OPTION_BUFFER:
            return ident, bool(flags & _COMPRESSED), self._window(offset + 16, size, self._order)
        packed = self._window(offset + 16, 8, self._order)
        stored, whole = packed.number(4, "a size"), packed.number(4, "a size")
        self._limited(max(stored, whole), offset + 16)
        raw = self.unpack(offset + 24, self.bytes_at(offset + 24, stored, "a section"), whole)
        return ident, True, _ByteStretch(self, offset + 24, whole, self._order, raw, packed=True)

    def _buffer_7(self, data: _ByteStretch) -> BufferInfo:
        offset, name = data.number(8, "a buffer's offset"), data.string("a buffer's name")
        clock, page_size = data.string("a buffer's clock"), data.number(4, "a buffer's page size")
        cpus = data.number(4, "the number of CPUs")
        self._check_cpus(cpus, data)
        where = [
            CpuData(data.number(4, "a CPU"), data.number(8, "an offset"), data.number(8, "a size")) for _ in range(cpus)
        ]
        for one in where:
            if one.cpu >= CPUS_MAX:
                raise data.refuse(f"CPU {one.cpu}; expected less than {CPUS_MAX}")
        filled = tuple(one for one in where if one.size)
        compressed = self._section(offset, _OPTION_BUFFER)[1] if filled else False
        return BufferInfo(name, clock, page_size, compressed, filled)

    # --- parts of both versions -----------------------------------------------------------------

    def _header_info(self, frame: FileFrame, parts: _ByteStretch) -> None:
        for name in ("header_page", "header_event"):
            found = parts.take(len(name) + 1, f"the name {name}")
            if found != name.encode() + b"\0":
                raise parts.refuse(f"here {name} should begin, not {found!r}")
            at = parts.file_offset
            text = parts.text(parts.number(8, f"the size of {name}"), name)
            if name == "header_page":
                try:
                    frame.layout = parse_header_page(text)
                except SourceError as error:
                    raise CaptureError(self.path, at, str(error)) from error

    def _ftrace_events(self, frame: FileFrame, parts: _ByteStretch) -> None:
        """Read the formats of ftrace's own events: marks, printed texts, functions, stacks."""
        self._formats_of(frame, FTRACE, parts)

    def _event_formats(self, frame: FileFrame, parts: _ByteStretch) -> None:
        for _ in self._counted(parts.number(4, "the number of event systems"), parts):
            self._formats_of(frame, parts.string("a system's name"), parts)

    def _formats_of(self, frame: FileFrame, system: str, parts: _ByteStretch) -> None:
        for _ in self._counted(parts.number(4, "the number of events"), parts):
            text = parts.text(parts.number(8, "the size of a format"), "a format")
            self._formats_size += len(text)
            if self._formats_size > METADATA_MAX:
                raise parts.refuse(f"formats of more than {METADATA_MAX} bytes")
            name = text.partition("name:")[2].partition("\n")[0].strip()
            frame.formats[f"{system}:{name}"] = text

    def _option(self, frame: FileFrame, option: int, data: _ByteStretch) -> None:
        at = data
        raw = data.take(data.left, "an option")
        text = raw.split(b"\0", 1)[0].decode("utf-8", "replace")
        if option == _OPTION_DATE:
            frame.date_offset_ns = self._signed(text, at, "the date") * 1000
        elif option == _OPTION_OFFSET:
            frame.offset_ns += self._signed(text, at, "the time offset")
        elif option == _OPTION_CPUSTAT and len(frame.stats) < CPUS_MAX:
            frame.stats.append(text[:_STATS_BYTES])
        elif option == _OPTION_TRACECLOCK:
            frame.clock = _chosen_clock(text) or frame.clock
        elif option == _OPTION_UNAME:
            frame.uname = text
        elif option == _OPTION_VERSION:
            frame.recorder = text
        elif option == _OPTION_TRACEID and len(raw) >= 8:
            frame.trace_id = int.from_bytes(raw[:8], "big" if frame.big_endian else "little")
        elif option == _OPTION_TIME_SHIFT:
            frame.guest = True
        elif option == _OPTION_TSC2NSEC and len(raw) >= 16:
            frame.tsc = Tsc(*struct.unpack(self._order + "II", raw[:8]))

    def _signed(self, text: str, at: _ByteStretch, what: str) -> int:
        try:
            value = int(text.strip() or "0", 0)
        except ValueError:
            raise at.refuse(f"{what} is {text[:40]!r}, expected a number") from None
        value = value - (1 << 64) if value >= 1 << 63 else value
        if not -(1 << 62) < value * 1000 < 1 << 62:
            raise at.refuse(f"{what} is {text[:40]!r}, farther away than the clock reaches")
        return value

    def _limited(self, size: int, at: int) -> int:
        if size > METADATA_MAX:
            raise CaptureError(self.path, at, f"a part of {size} bytes; expected at most {METADATA_MAX}")
        return size

    def _check_cpus(self, cpus: int, parts: _ByteStretch) -> None:
        if cpus > CPUS_MAX or cpus * 16 > parts.left:
            raise parts.refuse(f"{cpus} CPUs; expected at most {CPUS_MAX}, 16 bytes each")

    def _counted(self, count: int, parts: _ByteStretch) -> Iterator[int]:
        if count > EVENTS_MAX:
            raise parts.refuse(f"{count} of them; expected at most {EVENTS_MAX}")
        return iter(range(count))

    def _check_regions(self) -> None:
        """Check that no byte belongs to two CPUs: otherwise a small file could take for ever to read."""
        regions = sorted((one.offset, one.size) for buffer in self.frame.buffers for one in buffer.cpus if one.size)
        end = 0
        for offset, size in regions:
            if offset < end:
                raise CaptureError(self.path, offset, "the pages of a CPU begin inside those of another one")
            end = offset + size
        if end > self.size:
            offset, size = next((o, s) for o, s in regions if o + s > self.size)
            why = f"the pages of a CPU have {size} bytes, and the file {max(self.size - offset, 0)} from there on"
            if not self.salvage:
                raise CaptureError(self.path, offset, f"{why}: it is cut")
            self.warn(offset, f"{why}; what is there is used")


class _ByteStretch:
    """A stretch of the file, read from front to back; `data` is its content if that is in memory.

    `packed`: the content was decompressed, so that its bytes have no offsets in the file.
    """

    def __init__(
        self, file: TraceFile, at: int, size: int, order: str, data: bytes | None = None, *, packed: bool = False
    ) -> None:
        self._file, self._at, self._size, self._order, self._data = file, at, size, order, data
        self._packed = packed
        self.offset = 0
        if data is None and at > file.size:
            raise CaptureError(file.path, file.size, f"the file ends, and a part of it should begin at byte {at}")

    @property
    def file_offset(self) -> int:
        """Offset in the file of the next byte; within a decompressed part, the offset of that part."""
        return self._at + (0 if self._packed else self.offset)

    @property
    def left(self) -> int:
        return self._size - self.offset

    def refuse(self, why: str) -> CaptureError:
        return CaptureError(self._file.path, self.file_offset, why)

    def skip(self, size: int, what: str) -> None:
        if size > self.left:
            raise self.refuse(f"{what} has {size} bytes, and {self.left} are left")
        self.offset += size

    def take(self, size: int, what: str) -> bytes:
        start = self.offset
        self.skip(size, what)
        if self._data is not None:
            return self._data[start : start + size]
        return self._file.bytes_at(self._at + start, size, what)

    def number(self, size: int, what: str) -> int:
        raw = self.take(size, what)
        return int.from_bytes(raw, "big" if self._order == ">" else "little")

    def text(self, size: int, what: str) -> str:
        if size > METADATA_MAX:
            raise self.refuse(f"{what} has {size} bytes; expected at most {METADATA_MAX}")
        return self.take(size, what).decode("utf-8", "replace")

    def string(self, what: str) -> str:
        raw = self.take(min(self.left, 256), what)
        text, end, _ = raw.partition(b"\0")
        if not end:
            raise self.refuse(f"{what} has no end")
        self.offset -= len(raw) - len(text) - 1
        return text.decode("utf-8", "replace")


def _chosen_clock(text: str) -> str:
    """Return the chosen clock of `local [mono] boot`, which is `mono`; a single name is returned as it is."""
    inside = text.partition("[")[2].partition("]")[0]
    return inside or (text.strip() if len(text.split()) == 1 else "")
