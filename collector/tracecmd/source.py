"""trace.dat files of trace-cmd as a source: the same ring-buffer pages as live ftrace, read from a file.

    CPU 0 of a buffer ──pages──▶ PageDecoder ──records, gaps──▶ Merger ──▶ batches, in time order
    CPU 1 ...                    (the CPU that is furthest behind is read next)

A file contains only the names of devices. Their namespaces and connections are read from a capture of the same host, if
one is given (`FileOptions.topology`); otherwise each is an unknown device of that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from collector import known_topology
from collector.known_topology import NAMES_ONLY, NO_DATE, TopologyTeller, dated_by_file
from collector.memory import keep_freed_memory
from collector.merge import HOLD_BACK_NS, Merger
from collector.pages.decoding import PageDecoder, Sightings, process_key
from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from collector.tracecmd.clock import clock_of
from collector.tracecmd.cpu import CpuReader, PieceRecords, losses_by_cpu
from collector.tracecmd.file import FTRACE, MAGIC, BufferInfo, FileFrame, TraceFile
from collector.tracecmd.pages import layout_of
from contracts.clock import ClockPair
from contracts.errors import CaptureError, SourceError, nearest
from contracts.hooks import TRACEPOINTS, Hook
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.version import VERSION

NAME: Final = "tracecmd"
_PIECE_PAGES: Final = 512
"""Pages decoded at once for up to four CPUs, as many as in live capture."""
_PIECE_PAGES_MIN: Final = 32
_NEVER_NS: Final = 1 << 62
_DATE_UNCERTAINTY_NS: Final = 1_000_000
"""Uncertainty of UTC: `trace-cmd record --date` reads the wall clock between two marks, and keeps microseconds."""


def recognises(head: bytes) -> bool:
    """Return whether a file with this beginning is a trace.dat."""
    return head.startswith(MAGIC)


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Read the header and the time of the first page; raises `Unavailable` or `CaptureError`."""
    opened = _Opened(paths[0], options)
    with opened.file:
        return Description(opened.header, opened.first_ns + opened.header.clock.offset_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """Make a reader of one file."""
    return TraceCmdReader(paths[0], options)


class _Opened:
    """An open file, with the readers of all CPUs of the chosen buffers."""

    def __init__(self, path: Path, options: FileOptions) -> None:
        self.file: Final = TraceFile(path, salvage=options.salvage)
        try:
            self._known: Final = known_topology.read(options.topology)
            self.sightings: Final = Sightings()
            self.decoders: list[PageDecoder] = []
            self.cpus: list[CpuReader] = []
            self.warnings: list[str] = []
            self.chosen: Final = _chosen(self.file, options.buffer)
            self._monotonic = True
            for info in self.chosen:
                self._add(info, options.clock)
            times = [first for cpu in self.cpus if (first := cpu.first_ns()) is not None]
            self.first_ns: Final = min(times, default=0)
            self.header: Final = self._header()
            self.teller: Final = TopologyTeller(self._known, self.sightings, same_clock=self._same_clock)
        except SourceError as error:
            self.file.close()
            raise CaptureError(path, 0, str(error)) from error
        except BaseException:
            self.file.close()
            raise

    def _add(self, info: BufferInfo, asked_clock: str) -> None:
        file, frame = self.file, self.file.frame
        formats = [form for one in TRACEPOINTS if (form := frame.format(one.tracepoint)) is not None]
        if not formats:
            raise CaptureError(
                file.path, 0, f"none of the network events that are measured was recorded; {_events_told(frame)}"
            )
        clock = clock_of(file.path, frame, info, asked_clock)
        if clock.warning and (line := f"{file.path}: {clock.warning}") not in self.warnings:
            self.warnings.append(line)
        self._monotonic = self._monotonic and clock.is_monotonic
        key = process_key()
        decoder = PageDecoder(layout_of(file, info), formats, self.sightings, key)
        self.decoders.append(decoder)
        # The file has the kernel's counters without the buffer's name: they are unambiguous only for a single buffer.
        lost = losses_by_cpu(frame.stats) if len([one for one in frame.buffers if one.cpus]) == 1 else {}
        pages = max(_PIECE_PAGES * 4 // max(len(info.cpus), 4), _PIECE_PAGES_MIN)
        for data in info.cpus:
            total = lost.get(data.cpu)
            self.cpus.append(CpuReader(file, info, data, decoder, clock, formats, pages=pages, lost_total=total))

    @property
    def _same_clock(self) -> bool:
        """Whether file and known topology both have CLOCK_MONOTONIC, apparently of one machine and boot."""
        known, uname = self._known, _uname(self.file.frame)
        if known is None or not self._monotonic:
            return False
        return not any(uname) or uname == (known.header.host, known.header.kernel)

    def _header(self) -> StreamHeader:
        frame, path = self.file.frame, self.file.path
        host, kernel = _uname(frame)
        events = [one.tracepoint for one in TRACEPOINTS if one.tracepoint in frame.formats]
        boot_id = ""
        if self._known is None:
            self.warnings.append(f"{path}: {NAMES_ONLY}")
        if self._same_clock and self._known is not None:
            clock, boot_id = self._known.header.clock, self._known.header.boot_id
        elif frame.date_offset_ns is not None:
            clock = ClockPair(self.first_ns, self.first_ns + frame.date_offset_ns, _DATE_UNCERTAINTY_NS)
        else:
            clock = dated_by_file(path, self.first_ns)
            self.warnings.append(f"{path}: {NO_DATE}")
        return StreamHeader(
            source=NAME,
            host=host or "unknown",
            run=_run_of(self.file),
            kernel=kernel,
            boot_id=boot_id,
            cpus=max((cpu.data.cpu + 1 for cpu in self.cpus), default=0),
            clock=clock,
            hooks=tuple(events),
            mace_version=VERSION,
            command=(f"trace-cmd {frame.recorder}".strip(),),
        )


class TraceCmdReader(FileReader):
    """Reads a trace.dat file as a stream."""

    def __init__(self, path: Path | str, options: FileOptions | None = None) -> None:
        self.path: Final = Path(path)
        self._options = options or FileOptions()
        self._opened: _Opened | None = None
        self._merger = Merger(HOLD_BACK_NS)
        self._bytes_read = 0

    def _open(self) -> StreamHeader:
        """Read the frame; raises `Unavailable` or `CaptureError`."""
        keep_freed_memory()
        self._opened = _Opened(self.path, self._options)
        return self._opened.header

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.file.close()

    @property
    def discarded(self) -> int:
        """Records that salvage left out (approximately), and those too far out of order."""
        return self._merger.late + (sum(cpu.discarded for cpu in self._opened.cpus) if self._opened else 0)

    @property
    def skipped(self) -> int:
        """Events that belong to no hook."""
        return sum(decoder.skipped for decoder in self._opened.decoders) if self._opened else 0

    @property
    def bytes_total(self) -> int:
        """Bytes of pages in the file."""
        return sum(cpu.data.size for cpu in self._opened.cpus) if self._opened else 0

    @property
    def bytes_read(self) -> int:
        """Bytes of pages read so far."""
        return min(self._bytes_read, self.bytes_total)

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        if self._opened is None:
            return []
        told = [*self._opened.warnings, *self._opened.file.warnings]
        uncounted = sum(cpu.uncounted for cpu in self._opened.cpus)
        if uncounted:
            told.append(
                f"{self.path}: {uncounted} gaps have no number of lost events; each is counted as what the kernel's "
                "counters leave, or as one event"
            )
        return told

    def items(self) -> Iterator[StreamItem]:
        """See `FileReader`."""
        assert self._opened is not None, "open() first"
        teller = self._opened.teller
        yield from teller.stream(self._merged())
        if not teller.begun:
            yield teller.topology(0)

    def _merged(self) -> Iterator[Batch]:
        assert self._opened is not None
        cpus = self._opened.cpus
        parts: dict[int, Iterator[PieceRecords]] = {}
        complete: dict[int, int] = {}
        for key, cpu in enumerate(cpus):
            self._merger.add_cpu(key, -_NEVER_NS)
            parts[key], complete[key] = cpu.parts(), -_NEVER_NS
        hooks = _HooksSeen(self._opened.file.path, self._opened.chosen) if len(self._opened.chosen) > 1 else None
        while parts:
            key = min(parts, key=lambda one: (complete[one], one))
            part = next(parts[key], None)
            if part is None:
                del parts[key]
                complete[key] = _NEVER_NS
            else:
                self._bytes_read += part.bytes_read
                complete[key] = max(complete[key], part.complete_ns)
                if hooks is not None:
                    hooks.note(key, part.batch)
                self._merger.push(key, part.batch)
            self._merger.complete(key, complete[key])
            watermark = self._merger.watermark_ns
            if watermark is not None and watermark > -HOLD_BACK_NS and parts:
                yield self._merger.take(watermark)
        yield self._merger.flush()


class _HooksSeen:
    """Refuses files in which two buffers have recorded the same hook, so that no event is read twice."""

    def __init__(self, path: Path, chosen: Sequence[BufferInfo]) -> None:
        self._path = path
        self._names = [info.name for info in chosen for _ in info.cpus]
        self._of: dict[int, str] = {}

    def note(self, key: int, batch: Batch) -> None:
        for hook in np.flatnonzero(np.bincount(batch.hook, minlength=256)).tolist():
            if hook == Hook.LOST:
                continue
            name = self._of.setdefault(hook, self._names[key])
            if name != self._names[key]:
                names = " and ".join(repr(one or "top") for one in sorted((name, self._names[key]), reverse=True))
                raise CaptureError(
                    self._path, 0, f"the buffers {names} both have {Hook(hook).name.lower()}: choose one with --buffer"
                )


def _chosen(file: TraceFile, asked: str) -> list[BufferInfo]:
    """Return the buffers to read; raises `CaptureError` for an unknown buffer or a file without pages."""
    found = [info for info in file.frame.buffers if info.cpus]
    if asked:
        names = [info.name or "top" for info in found]
        found = [info for info in found if (info.name or "top") == asked]
        if not found:
            raise CaptureError(
                file.path, 0, f"no buffer {asked!r}{nearest(asked, names)}; there are {', '.join(names) or 'none'}"
            )
    if not found:
        raise CaptureError(file.path, 0, "it has no pages of any CPU: was anything recorded?")
    return found


def _events_told(frame: FileFrame) -> str:
    names = sorted(name for name in frame.formats if not name.startswith(f"{FTRACE}:"))
    return f"it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "it has no events at all"


def _uname(frame: FileFrame) -> tuple[str, str]:
    """Return host and kernel release from `Linux HOST RELEASE VERSION MACHINE`."""
    words = frame.uname.split()
    return (words[1], words[2]) if len(words) >= 3 else ("", "")


def _run_of(file: TraceFile) -> str:
    """Return an identifier of the recording: trace-cmd's random trace id, or else a hash of the file's beginning."""
    if file.frame.trace_id:
        return f"{file.frame.trace_id:016x}"
    return hashlib.sha256(file.bytes_at(0, min(file.size, 1 << 16), "the file")).hexdigest()[:16]
