"""One CPU of a trace.dat: decodes its pages into records, with markers for lost events and unreadable pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from collector.gaps import marker, settle
from collector.pages.decoding import MISSED, DecodedPages, Gap, PageDecoder, Stretch, page_buffer
from collector.pages.formats import EventFormat
from collector.tracecmd.clock import FileClock
from collector.tracecmd.endian import to_little_endian
from collector.tracecmd.file import BufferInfo, CpuData, TraceFile
from collector.tracecmd.pages import Piece, pieces
from contracts.arrays import Bytes, Ints
from contracts.errors import CaptureError, SourceError
from contracts.records import Batch

_EVENT_BYTES: Final = 40
"""Typical bytes of a network event with its header: estimates how many events an unreadable page held."""
_LOSSES: Final = re.compile(r"^(?:overrun|commit overrun|dropped events):\s*(\d{1,18})\s*$", re.MULTILINE)
_CPU_NUMBER: Final = re.compile(r"^CPU:?\s*(\d{1,9})\s*$", re.MULTILINE)


def losses_by_cpu(stats: Sequence[str]) -> dict[int, int]:
    """Return CPU -> events that the kernel counted as lost, from the texts of its `stats` files.

    A trace.dat has the stats of all instances one after the other and without names: a CPU that occurs twice is
    omitted.
    """
    lost: dict[int, int] = {}
    twice: set[int] = set()
    for text in stats:
        number = _CPU_NUMBER.search(text)
        if number:
            cpu = int(number[1])
            if cpu in lost:
                twice.add(cpu)
            lost[cpu] = sum(map(int, _LOSSES.findall(text)))
    return {cpu: count for cpu, count in lost.items() if cpu not in twice}


@dataclass(frozen=True, slots=True)
class PieceRecords:
    """The records of a piece of the file."""

    batch: Batch
    complete_ns: int
    """Time before which no later piece has an event."""
    bytes_read: int


class CpuReader:
    """Reads one CPU's pages from front to back."""

    def __init__(
        self,
        file: TraceFile,
        info: BufferInfo,
        data: CpuData,
        decoder: PageDecoder,
        clock: FileClock,
        formats: Sequence[EventFormat],
        *,
        pages: int,
        lost_total: int | None,
    ) -> None:
        self.data: Final = data
        self.discarded = 0
        """Approximate number of records that salvage left out."""
        self.uncounted = 0
        """Gaps without a number of lost events."""
        self._file, self._info, self._decoder, self._clock = file, info, decoder, clock
        self._formats = formats
        self._pages = pages
        self._lost_total = lost_total
        """Lost events that the kernel counted; None if the count of this buffer is not known."""
        self._told_lost = 0
        self._last_ns: int | None = None
        self._complete_ns = 0

    def parts(self) -> Iterator[PieceRecords]:
        """Yield all that this CPU recorded, in the ring's order; raises `CaptureError`."""
        for piece in pieces(self._file, self._info, self.data, self._pages):
            done = piece.done
            newest_ns = self._newest_page_ns(piece)
            batch = self._with_markers([*self._not_there(piece), *self._decoded(piece)])
            if len(batch):
                self._last_ns = max(self._last_ns or 0, int(batch.ts_ns[-1]))
            self._complete_ns = max(self._complete_ns, newest_ns, self._last_ns or 0)
            # Free the piece's memory while other CPUs are read.
            del piece
            yield PieceRecords(batch, self._complete_ns, done)
        rest = (self._lost_total or 0) - self._told_lost
        if rest > 0:
            # Losses without a count in any page: of a ring that kept the oldest events, or behind the last page.
            last_ns = self._complete_ns if self._last_ns is None else self._last_ns
            yield PieceRecords(marker(self.data.cpu, last_ns, rest, last_ns), self._complete_ns, 0)

    def first_ns(self) -> int | None:
        """Return the time of the first page that is not empty, ns; None without one."""
        for piece in pieces(self._file, self._info, self.data, 1):
            times = self._page_times(piece)
            if len(times):
                return int(times[0])
        return None

    # --- pages ----------------------------------------------------------------------------------

    def _page_times(self, piece: Piece) -> Ints:
        """Return the times of the pages that are not empty, ns; call before the pages' byte order is changed."""
        layout, order = self._decoder.layout, ">" if self._file.frame.big_endian else "<"
        matrix = piece.buffer[: piece.pages * layout.page_size].reshape(piece.pages, layout.page_size)
        at = layout.timestamp_offset
        times = matrix[:, at : at + 8].copy().view(f"{order}i8")[:, 0].astype(np.int64)
        at, size = layout.commit_offset, layout.commit_size
        commit = matrix[:, at : at + size].copy().view(f"{order}u{size}")[:, 0].astype(np.int64)
        return self._clock.ns(times[(commit & ~MISSED) != 0])

    def _newest_page_ns(self, piece: Piece) -> int:
        times = self._page_times(piece)
        return int(times[-1]) if len(times) else 0

    def _not_there(self, piece: Piece) -> list[DecodedPages]:
        """Return a gap for pages that salvage could not read, if there are any."""
        if not piece.missing:
            return []
        self.discarded += piece.missing * self._events_a_page
        return [DecodedPages(Batch.empty(), (Gap(0, 0),))]

    @property
    def _events_a_page(self) -> int:
        return max(self._decoder.layout.data_size // _EVENT_BYTES, 1)

    def _decoded(self, piece: Piece) -> list[DecodedPages]:
        if not piece.pages:
            return []
        size = self._decoder.layout.page_size
        # Pages of a big-endian machine are converted in place. Keep a copy, so that salvage can decode them again.
        spare = piece.buffer[: piece.pages * size].copy() if self._file.salvage else None
        try:
            return [self._decode(piece.buffer, piece.pages)]
        except SourceError as error:
            if spare is None:
                raise self._pointed(piece, error) from error
            return list(self._salvaged(piece, spare, 0, piece.pages))

    def _decode(self, buffer: Bytes, count: int) -> DecodedPages:
        if self._file.frame.big_endian:
            to_little_endian(buffer, count, self._decoder.layout, self._formats)
        (decoded,) = self._decoder.decode(buffer, [Stretch(self.data.cpu, count)])
        return decoded

    def _pointed(self, piece: Piece, error: SourceError) -> CaptureError:
        """Return the error with the offset of its page, found by reading the piece again page by page."""
        for one in pieces(self._file, self._info, self.data, 1):
            if one.offset < piece.offset:
                continue
            try:
                self._decode(one.buffer, one.pages)
            except SourceError as at_page:
                return CaptureError(self._file.path, one.offset, str(at_page))
            if one.offset > piece.offset + piece.done:
                break
        return CaptureError(self._file.path, piece.offset, str(error))

    def _salvaged(self, piece: Piece, spare: Bytes, first: int, after: int) -> Iterator[DecodedPages]:
        """Yield the pages that can be decoded, found by bisection, with a gap and a warning for each that cannot."""
        layout = self._decoder.layout
        size = layout.page_size
        buffer = page_buffer(layout, after - first)
        part = spare[first * size : after * size]
        buffer[: len(part)] = part
        try:
            yield self._decode(buffer, after - first)
        except SourceError as error:
            if after - first > 1:
                middle = (first + after) // 2
                yield from self._salvaged(piece, spare, first, middle)
                yield from self._salvaged(piece, spare, middle, after)
                return
            self._file.warn(piece.offset_of(first, size), f"{error}; left out")
            self.discarded += self._events_a_page
            yield DecodedPages(Batch.empty(), (Gap(0, 0),))

    # --- what was lost --------------------------------------------------------------------------

    def _with_markers(self, parts: list[DecodedPages]) -> Batch:
        """Return all records of a piece, with a `LOST` marker at each gap."""
        lost = iter(self._losses([gap.lost for part in parts for gap in part.gaps]))
        cut: list[Batch] = []
        for part in parts:
            batch = self._on_clock(part.batch)
            start = 0
            for gap in part.gaps:
                cut.append(batch[start : gap.index])
                after = int(batch.ts_ns[gap.index]) if gap.index < len(batch) else self._complete_ns
                # Without a record before the gap it is unknown since when events were lost.
                before = int(batch.ts_ns[gap.index - 1]) if gap.index else self._last_ns
                cut.append(marker(self.data.cpu, after if before is None else min(before, after), next(lost), after))
                start = gap.index
            cut.append(batch[start:])
            if len(batch):
                self._last_ns = int(batch.ts_ns[-1])
        return Batch.concatenate(cut)

    def _losses(self, counts: list[int | None]) -> list[int]:
        """Return the number of events lost at each gap.

        A gap without a count gets what the kernel's total leaves, or one event if the total is unknown.
        """
        unknown = sum(count is None for count in counts)
        self.uncounted += unknown
        if not unknown:
            losses = [count or 0 for count in counts]
        elif self._lost_total is None:
            losses = [1 if count is None else count for count in counts]
        else:
            losses = settle(counts, self._lost_total - self._told_lost)
        self._told_lost += sum(losses)
        return losses

    def _on_clock(self, batch: Batch) -> Batch:
        if self._clock.tsc is None and not self._clock.offset_ns:
            return batch
        return replace(batch, ts_ns=self._clock.ns(batch.ts_ns))
