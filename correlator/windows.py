"""Delays -> windows: per device, direction, segment and stretch of UTC time a mergeable histogram.

Nothing here knows about batches: a window's content depends on its delays alone. It is given out once, when no
delay that belongs to it can come any more.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from mace import histogram
from mace.schema import Delays, Direction, Segment, Window

WIDTHS_S: Final = (1, 10)

Ints = npt.NDArray[np.int64]

_NS: Final = 1_000_000_000
_DENSE: Final = 1 << 18
"""Codes below this are counted in a table (2 MiB, in the cache); others are sorted."""


class _Open:
    """One window while delays still come: exact sum and extremes, and histogram pieces to be merged."""

    __slots__ = ("bins", "count", "counts", "max_ns", "min_ns", "pieces", "sum_ns")

    def __init__(self) -> None:
        self.count = 0
        self.sum_ns = 0
        self.min_ns = np.iinfo(np.int64).max
        self.max_ns = np.iinfo(np.int64).min
        self.bins: list[Ints] = []
        self.counts: list[Ints] = []
        self.pieces = 0

    def add(self, sum_ns: int, min_ns: int, max_ns: int, bins: Ints, counts: Ints) -> None:
        self.count += int(counts.sum())
        self.sum_ns += sum_ns
        self.min_ns = min(self.min_ns, min_ns)
        self.max_ns = max(self.max_ns, max_ns)
        self.bins.append(bins)
        self.counts.append(counts)
        self.pieces += len(bins)
        if self.pieces > 2 * histogram.BINS:
            self.merged()

    def merged(self) -> tuple[Ints, Ints]:
        bins, counts = histogram.merge(np.concatenate(self.bins), np.concatenate(self.counts))
        self.bins, self.counts, self.pieces = [bins], [counts], len(bins)
        return bins, counts


class Windows:
    """All open windows of one run. `utc_ns` of the delays may go back, but never before `close`'s last time."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int, int, int, int], _Open] = {}

    def add(self, delays: Delays) -> None:
        """Count `delays` into their windows of one second; wider ones are made of those when they close."""
        if not len(delays):
            return
        first = int(delays.utc_ns.min()) // _NS
        rows = int(delays.device.max()) + 1
        group = delays.device.astype(np.int64)
        if int(delays.utc_ns.max()) // _NS > first:
            group += (delays.utc_ns // _NS - first) * rows
        group <<= 5
        group |= (delays.direction << 3) | delays.segment
        groups, member = _ranked(group)
        # One integer says which window and which bin: sorting it is all the grouping there is.
        cells = (member << 16) | histogram.bins_of(delays.delay_ns)
        cells.sort()
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        counts = np.diff(starts, append=len(cells))
        cells = cells[starts]
        edges = np.searchsorted(cells >> 16, np.arange(len(groups) + 1))
        sums = np.zeros(len(groups), np.int64)
        low = np.full(len(groups), np.iinfo(np.int64).max)
        high = np.full(len(groups), np.iinfo(np.int64).min)
        np.add.at(sums, member, delays.delay_ns)
        np.minimum.at(low, member, delays.delay_ns)
        np.maximum.at(high, member, delays.delay_ns)
        for i, code in enumerate(groups.tolist()):
            later, device = divmod(code >> 5, rows)
            key = ((first + later) * _NS, 1, device, (code >> 3) & 3, code & 7)
            at = slice(edges[i], edges[i + 1])
            self._open.setdefault(key, _Open()).add(
                int(sums[i]), int(low[i]), int(high[i]), cells[at] & 0xFFFF, counts[at]
            )

    def close(self, before_utc_ns: int | None) -> tuple[Window, ...]:
        """Final windows that end at or before the given time, in order; all of them for None."""
        done: list[Window] = []
        for width in WIDTHS_S:
            ready = sorted(
                key
                for key in self._open
                if key[1] == width and (before_utc_ns is None or key[0] + width * _NS <= before_utc_ns)
            )
            wider = next((w for w in WIDTHS_S if w > width), None)
            for key in ready:
                window = self._open.pop(key)
                bins, counts = window.merged()
                if wider is not None:
                    start = key[0] - key[0] % (wider * _NS)
                    self._open.setdefault((start, wider, *key[2:]), _Open()).add(
                        window.sum_ns, window.min_ns, window.max_ns, bins, counts
                    )
                done.append(_final(key, window, bins, counts))
        return tuple(done)


def _final(key: tuple[int, int, int, int, int], window: _Open, bins: Ints, counts: Ints) -> Window:
    start, width, device, direction, segment = key
    p50, p90, p99, p999 = histogram.quantiles(bins, counts).tolist()
    return Window(
        start,
        width,
        device,
        Direction(direction),
        Segment(segment),
        window.count,
        window.sum_ns,
        window.min_ns,
        window.max_ns,
        p50,
        p90,
        p99,
        p999,
        bins,
        counts,
    )


def _ranked(codes: Ints) -> tuple[Ints, Ints]:
    """Distinct codes (>= 0), ascending, and each element's rank among them; fast where codes are small."""
    top = int(codes.max()) + 1
    if top > _DENSE:
        groups, member = np.unique(codes, return_inverse=True)
        return groups, member.astype(np.int64, copy=False)
    groups = np.flatnonzero(np.bincount(codes, minlength=top))
    rank = np.zeros(top, np.int64)
    rank[groups] = np.arange(len(groups))
    return groups, rank[codes]
