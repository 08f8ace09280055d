"""What tracers print, as a source.

Text is what people have who had no better tool, and it says less: times are cut to microseconds (but for `perf script
--ns` and `trace-cmd report -t`), drop reasons are names and not kept, and addresses may be hashes: the kernel prints
`%p` as 32 bits of a hash whose key is drawn at boot (lib/vsprintf.c, Linux kernel commit ad67b74d2469 ("printk: hash
addresses printed with %p") (in v4.15)). One buffer has one hash as long as the machine runs, so packets can be
followed; two buffers of some thousands that are in use at once share one now and then, and then only moves that cannot
be part them. Binary recordings (trace.dat, live capture) and `options/hash-ptr=0` have no such doubt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from collector import known_topology
from collector.known_topology import NAMES_ONLY, NO_DATE, TopologyTeller, dated_by_file
from collector.merge import Merger
from collector.pages.decoding import PageDecoder, Sightings, process_key
from collector.pages.formats import PageLayout
from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from collector.text.lines import LINE_MAX, LineReader, chunks, is_event
from collector.text.unread import COLUMNS, DISCARDED, begins_text, is_traced, told
from contracts.clock import ClockPair
from contracts.errors import CaptureError, Unavailable
from contracts.hooks import HOOKS
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.version import VERSION

NAME: Final = "text"
_READ_BYTES: Final = 1 << 20
_HOLD_BACK_NS: Final = 50_000_000
_BACKWARDS_MIN: Final = 8
"""Fewer are what interrupts and the merging of several CPUs make."""
_NO_LAYOUT: Final = PageLayout(0, 8, 8, 16, 4080)
"""Text has no pages; the decoder is there for the ids of buffers."""


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is a tracer's text: of whatever events, those that are measured may come later."""
    # Zeros are what a crash leaves in a file; what comes before them tells.
    head = head.partition(b"\0")[0]
    return begins_text(head) or any(is_event(line) or is_traced(line) for line in head.split(b"\n")[:-1])


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Header, and the time of the first event. Raises `Unavailable` or `CaptureError`."""
    opened = _Opened(paths[0], options)
    opened.file.close()
    return Description(opened.header, opened.first_ns + opened.header.clock.offset_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """The reader of one file."""
    return TextReader(paths[0], options)


class _Opened:
    """An open file, and what is known before it is read."""

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
                self.warnings.append(f"{path}: text does not say which clock it has (if it was mono, say --clock mono)")
            self.header: Final = self._header(known.header if known else None, clock, boot_id)
        except BaseException:
            self.file.close()
            raise

    def _first_ns(self, path: Path) -> int:
        """Time of the first event; the file is back at its beginning afterwards."""
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
            hooks=tuple(info.tracepoint for info in HOOKS),
            mace_version=VERSION,
        )


class TextReader(FileReader):
    """A text as a stream."""

    def __init__(self, path: Path | str, options: FileOptions | None = None) -> None:
        self.path: Final = Path(path)
        self._options = options or FileOptions()
        self._opened: _Opened | None = None
        self._reader: LineReader | None = None
        self._merger = Merger(_HOLD_BACK_NS)
        self._bytes_read = 0
        self._damage: list[int] = []
        """Where lines have zeros in them."""

    def _open(self) -> StreamHeader:
        """Open the file and find the first event. Raises `Unavailable` or `CaptureError`."""
        self._opened = opened = _Opened(self.path, self._options)
        self._reader = LineReader(opened.sightings, opened.decoder)
        return opened.header

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.file.close()

    @property
    def discarded(self) -> int:
        """Records that stood behind ones far younger, lines that may be of an event and are not read, damaged ones."""
        unread = sum(self._reader.unread[kind] for kind in DISCARDED) if self._reader else 0
        return self._merger.late + unread + len(self._damage)

    @property
    def bytes_total(self) -> int:
        """Size of the file."""
        return self._opened.size if self._opened else 0

    @property
    def bytes_read(self) -> int:
        """How far reading has come."""
        return self._bytes_read

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one line each."""
        if self._opened is None or self._reader is None:
            return []
        lines = list(self._opened.warnings)
        if self._reader.hashed and self._reader.unhashed:
            # With %px in the events of one template only, see `_ADDRESS` of text_lines.
            lines.append(
                f"{self.path}: some of its addresses are hashes and some are not, as kernels from 5.14 on have printed "
                "them: one buffer has two names, and less is matched; `echo 0 > options/hash-ptr` and print again"
            )
        if self._reader.hashed:
            lines.append(
                f"{self.path}: its addresses are hashes of 32 bits: two buffers that are in use at once can share one"
            )
        lines += [f"{self.path}: {line}" for line in told(self._reader.unread, self._reader.first_unread)]
        if self._reader.unended:
            lines.append(f"{self.path}: its last line has no line feed: the file may be cut there")
        if self._reader.of_perf and not self._reader.perf_losses:
            lines.append(f"{self.path}: no losses are told; perf script tells them only with --show-lost-events")
        if self._merger.late:
            lines.append(
                f"{self.path}: {self._merger.late} events are more than 50 ms older than one before them, as where "
                "texts of several CPUs or runs were put one after the other; left out: sort them by time"
            )
        if self._damage:
            lines.append(
                f"{self.path}: {len(self._damage)} lines with zeros, the first at byte {self._damage[0]}; left out"
            )
        if self._reader.uncounted:
            lines.append(f"{self.path}: {self._reader.uncounted} losses do not say how many events; told as one each")
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
                yield merger.take(newest - _HOLD_BACK_NS)
        merger.push(0, self._reader.rest())
        yield merger.flush()

    def _check(self) -> None:
        """Raises `CaptureError` where most lines lack a column, or times go back as often as differences do."""
        assert self._reader is not None
        events, backwards = self._reader.events, self._reader.backwards
        lacking = {kind: count for kind in COLUMNS if (count := self._reader.unread[kind])}
        if sum(lacking.values()) > events and not self._options.salvage:
            why = "; ".join(told(lacking, self._reader.first_unread))
            raise CaptureError(self.path, 0, f"fewer of its network events can be read than not: {why}")
        if backwards >= _BACKWARDS_MIN and backwards * 4 > events:
            raise CaptureError(
                self.path,
                self._bytes_read,
                f"times go back at {backwards} of {events} events: they are no times, or not in order (`perf script "
                "--deltatime` prints what passed since the event before)",
            )

    def _sound(self, text: bytes) -> bytes:
        """The lines without zeros. Raises `CaptureError` where there are others and salvage was not asked for."""
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
