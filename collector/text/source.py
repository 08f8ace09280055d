"""The text output of tracers as a source.

Text contains less than a binary recording. Times are cut to microseconds (except by `perf script --ns` and `trace-cmd
report -t`). Drop reasons are names, which are not kept. Addresses may be hashes: the kernel prints `%p` as 32 bits of a
hash whose key is random for each boot (lib/vsprintf.c, Linux kernel commit ad67b74d2469 ("printk: hash addresses
printed with %p") (in v4.15)). A buffer keeps its hash while the machine runs, so that packets can be followed. Among
some thousand buffers in use at once, two occasionally share a hash; only impossible moves then separate their packets.
Binary recordings (trace.dat, live capture) and `options/hash-ptr=0` avoid this ambiguity.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from collector import known_topology
from collector.known_topology import NAMES_ONLY, NO_DATE, TopologyTeller, dated_by_file
from collector.merge import HOLD_BACK_NS, Merger
from collector.pages.decoding import PageDecoder, Sightings, process_key
from collector.pages.formats import PageLayout
from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from collector.text.lines import LINE_MAX, LineReader, chunks, is_event
from collector.text.unread import COLUMNS, DISCARDED, begins_text, is_traced, told
from contracts.clock import ClockPair
from contracts.errors import CaptureError, Unavailable
from contracts.hooks import TRACEPOINTS
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.version import VERSION

NAME: Final = "text"
_READ_BYTES: Final = 1 << 20
_BACKWARDS_MIN: Final = 8
"""Number of backward steps in time that interrupts and the merging of several CPUs explain; fewer are accepted."""
_NO_LAYOUT: Final = PageLayout(0, 8, 8, 16, 4080)
"""Dummy layout: text has no pages, but the page decoder makes the ids of buffers."""


def recognises(head: bytes) -> bool:
    """Return whether a file with this beginning is a tracer's text, with events of any kind."""
    # A crash can leave zeros in a file: decide by the text before them.
    head = head.partition(b"\0")[0]
    return begins_text(head) or any(is_event(line) or is_traced(line) for line in head.split(b"\n")[:-1])


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Read the header and the time of the first event; raises `Unavailable` or `CaptureError`."""
    opened = _Opened(paths[0], options)
    opened.file.close()
    return Description(opened.header, opened.first_ns + opened.header.clock.offset_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """Make a reader of one file."""
    return TextReader(paths[0], options)


class _Opened:
    """An open file, with its header and all else that is known before it is read."""

    def __init__(self, path: Path, options: FileOptions) -> None:
        try:
            self.file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise Unavailable(str(path), error.strerror or str(error), "name a file with a tracer's text") from error
        try:
            self.size: Final = path.stat().st_size
            self.warnings: list[str] = []
            self.sightings: Final = Sightings()
            self.decoder: Final = PageDecoder(_NO_LAYOUT, (), self.sightings, process_key())
            self.first_ns: Final = self._first_ns(path)
            known = known_topology.read(options.topology)
            same_clock = known is not None and options.clock == "mono"
            self.teller: Final = TopologyTeller(known, self.sightings, same_clock=same_clock)
            clock, boot_id = dated_by_file(path, self.first_ns), ""
            if same_clock and known is not None:
                clock, boot_id = known.header.clock, known.header.boot_id
            else:
                self.warnings.append(f"{path}: {NO_DATE}")
            if known is None:
                self.warnings.append(f"{path}: {NAMES_ONLY}")
            if not options.clock:
                self.warnings.append(f"{path}: text does not name its trace clock (if it was mono, give --clock mono)")
            self.header: Final = self._header(known.header if known else None, clock, boot_id)
        except BaseException:
            self.file.close()
            raise

    def _first_ns(self, path: Path) -> int:
        """Return the time of the first event, and rewind the file."""
        reader = LineReader(self.sightings, self.decoder)
        digest = hashlib.sha256()
        for text in chunks(path, iter(lambda: self.file.read(LINE_MAX), b"")):
            digest.update(text)
            batch = reader.read(text)
            if len(batch):
                self.run = digest.hexdigest()[:16]
                self.file.seek(0)
                return int(batch.ts_ns[0])
        why = "; ".join(told(reader.unread, reader.first_unread))
        raise CaptureError(path, 0, f"no line of it is a network event that can be read{why and ': '}{why}")

    def _header(self, known: StreamHeader | None, clock: ClockPair, boot_id: str) -> StreamHeader:
        return StreamHeader(
            source=NAME,
            host=known.host if known else "unknown",
            run=self.run,
            kernel=known.kernel if known else "",
            boot_id=boot_id,
            cpus=1,
            clock=clock,
            hooks=tuple(info.tracepoint for info in TRACEPOINTS),
            mace_version=VERSION,
        )


class TextReader(FileReader):
    """Reads a tracer's text as a stream."""

    def __init__(self, path: Path | str, options: FileOptions | None = None) -> None:
        self.path: Final = Path(path)
        self._options = options or FileOptions()
        self._opened: _Opened | None = None
        self._reader: LineReader | None = None
        self._merger = Merger(HOLD_BACK_NS)
        self._bytes_read = 0
        self._damage: list[int] = []
        """Offsets of the lines that contain zeros."""

    def _open(self) -> StreamHeader:
        """Open the file and find the first event; raises `Unavailable` or `CaptureError`."""
        self._opened = opened = _Opened(self.path, self._options)
        self._reader = LineReader(opened.sightings, opened.decoder)
        return opened.header

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.file.close()

    @property
    def discarded(self) -> int:
        """Records too far out of order, lines that may be events but were not parsed, and damaged lines."""
        unread = sum(self._reader.unread[kind] for kind in DISCARDED) if self._reader else 0
        return self._merger.late + unread + len(self._damage)

    @property
    def bytes_total(self) -> int:
        """Size of the file."""
        return self._opened.size if self._opened else 0

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._bytes_read

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        if self._opened is None or self._reader is None:
            return []
        lines = list(self._opened.warnings)
        if self._reader.hashed and self._reader.unhashed:
            # Only the events of one template use %px, see `_ADDRESS` of `collector.text.lines`.
            lines.append(
                f"{self.path}: some addresses are hashes and some are not, as kernels from 5.14 on print them, so that "
                "fewer records are matched; `echo 0 > options/hash-ptr` and print again"
            )
        if self._reader.hashed:
            lines.append(f"{self.path}: addresses are hashes of 32 bits: two buffers in use at once can share one")
        lines += [f"{self.path}: {line}" for line in told(self._reader.unread, self._reader.first_unread)]
        if self._reader.unended:
            lines.append(f"{self.path}: the last line has no line feed: the file may be cut there")
        if self._reader.of_perf and not self._reader.perf_losses:
            lines.append(f"{self.path}: no losses are shown; perf script prints them only with --show-lost-events")
        if self._merger.late:
            lines.append(
                f"{self.path}: {self._merger.late} events are left out: they are more than 50 ms older than an event "
                "before them, as when texts of several CPUs or runs are concatenated; sort the lines by time"
            )
        if self._damage:
            lines.append(
                f"{self.path}: {len(self._damage)} lines with zeros are left out, the first at byte {self._damage[0]}"
            )
        if self._reader.uncounted:
            lines.append(
                f"{self.path}: {self._reader.uncounted} losses have no number of events; counted as one event each"
            )
        return lines

    def items(self) -> Iterator[StreamItem]:
        """See `FileReader`."""
        assert self._opened is not None, "open() first"
        yield from self._opened.teller.stream(self._merged())

    def _merged(self) -> Iterator[Batch]:
        assert self._opened is not None
        assert self._reader is not None
        merger, newest = self._merger, self._opened.first_ns
        merger.add_cpu(0, newest)
        for text in chunks(self.path, iter(self._read_block, b"")):
            batch = self._reader.read(self._sound(text))
            self._bytes_read += len(text)
            self._check()
            if len(batch):
                merger.push(0, batch)
                newest = max(newest, int(batch.ts_ns.max()))
                merger.complete(0, newest)
                yield merger.take(newest - HOLD_BACK_NS)
        merger.push(0, self._reader.rest())
        yield merger.flush()

    def _check(self) -> None:
        """Raise `CaptureError` if most lines lack a column, or times go back as often as time differences do."""
        assert self._reader is not None
        events, backwards = self._reader.events, self._reader.backwards
        lacking = {kind: count for kind in COLUMNS if (count := self._reader.unread[kind])}
        if sum(lacking.values()) > events and not self._options.salvage:
            why = "; ".join(told(lacking, self._reader.first_unread))
            raise CaptureError(self.path, 0, f"most of its network events cannot be read: {why}")
        if backwards >= _BACKWARDS_MIN and backwards * 4 > events:
            raise CaptureError(
                self.path,
                self._bytes_read,
                f"times go back at {backwards} of {events} events: the numbers are no times or not in order (`perf "
                "script --deltatime` prints the time since the event before)",
            )

    def _sound(self, text: bytes) -> bytes:
        """Return the text with all lines that contain zeros emptied; without salvage these raise `CaptureError`."""
        at = text.find(b"\0")
        if at < 0:
            return text
        if not self._options.salvage:
            raise CaptureError(self.path, self._bytes_read + at, "zeros, which no tracer prints")
        kept, offset = [], self._bytes_read
        for line in re.findall(rb"[^\n]*\n|[^\n]+", text):
            if b"\0" in line:
                self._damage.append(offset)
                kept.append(b"\n")
            else:
                kept.append(line)
            offset += len(line)
        return b"".join(kept)

    def _read_block(self) -> bytes:
        assert self._opened is not None
        try:
            return self._opened.file.read(_READ_BYTES)
        except OSError as error:
            raise CaptureError(self.path, self._bytes_read, error.strerror or str(error)) from error
