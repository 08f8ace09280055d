"""Delays -> windows: per device, direction, segment and stretch of UTC time a mergeable histogram.

Nothing here knows about batches: a window's content depends on its delays alone. It is given out once, when no
delay that belongs to it can come any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mace import histogram
from mace.schema import Direction, Segment, Window

WIDTHS_S: Final = (1, 10)

Ints = npt.NDArray[np.int64]
Column = npt.NDArray[Any]

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

    def add(self, utc_ns: Ints, device: Column, direction: Column, segment: Column, delay_ns: Ints) -> None:
        """Count delays into their windows of one second; wider ones are made of those when they close.

        Columns as in `mace.schema.Delays`.
        """
        if not len(utc_ns):
            return
        first = int(utc_ns.min()) // _NS
        rows = int(device.max()) + 1
        group = device.astype(np.int64)
        if int(utc_ns.max()) // _NS > first:
            group += (utc_ns // _NS - first) * rows
        group <<= 5
        group |= (direction << 3) | segment
        groups, member = _ranked(group)

        bins = histogram.bins_of(delay_ns)
        lowest = int(bins.min())
        span = int(bins.max()) - lowest + 1
        cells, counts = _counted(member * span + (bins - lowest), len(groups) * span)
        edges = np.searchsorted(cells, np.arange(len(groups) + 1) * span)
        cells = cells % span + lowest

        low = np.full(len(groups), np.iinfo(np.int64).max)
        high = np.full(len(groups), np.iinfo(np.int64).min)
        np.minimum.at(low, member, delay_ns)
        np.maximum.at(high, member, delay_ns)
        sums = _sums(member, delay_ns, len(groups), int(high.max()))
        for i, code in enumerate(groups.tolist()):
            later, number = divmod(code >> 5, rows)
            key = ((first + later) * _NS, 1, number, (code >> 3) & 3, code & 7)
            at = slice(edges[i], edges[i + 1])
            if key not in self._open:
                self._open[key] = _Open()
            self._open[key].add(sums[i], int(low[i]), int(high[i]), cells[at], counts[at])

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


def joined(pieces: Sequence[Window]) -> Window:
    """One window of pieces of it (same time, width, direction and segment; the first one's device), at least one."""
    whole = _Open()
    for piece in pieces:
        whole.add(piece.sum_ns, piece.min_ns, piece.max_ns, piece.bins, piece.counts)
    first = pieces[0]
    key = (first.start_utc_ns, first.width_s, first.device, int(first.direction), int(first.segment))
    return _final(key, whole, *whole.merged())


def _final(key: tuple[int, int, int, int, int], window: _Open, bins: Ints, counts: Ints) -> Window:
    start, width, device, direction, segment = key
    # The middle of a bin may lie beyond what was ever seen.
    p50, p90, p99, p999 = histogram.quantiles(bins, counts).clip(window.min_ns, window.max_ns).tolist()
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
    """Distinct codes (>= 0), ascending, and each element's rank among them."""
    top = int(codes.max()) + 1
    if top > _DENSE:
        groups, member = np.unique(codes, return_inverse=True)
        return groups, member.astype(np.int64, copy=False)
    groups = np.flatnonzero(np.bincount(codes, minlength=top))
    rank = np.zeros(top, np.int64)
    rank[groups] = np.arange(len(groups))
    return groups, rank[codes]


def _counted(codes: Ints, top: int) -> tuple[Ints, Ints]:
    """Distinct codes (in [0, top)), ascending, and how often each occurs."""
    if top > _DENSE:
        distinct, counts = np.unique(codes, return_counts=True)
        return distinct, counts.astype(np.int64, copy=False)
    counts = np.bincount(codes, minlength=top)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _sums(member: Ints, values: Ints, groups: int, highest: int) -> list[int]:
    """Exact sums of values (>= 0) by group: bincount adds doubles, which hold every integer below 2**53."""
    if highest * len(values) < 1 << 53:
        return [int(total) for total in np.bincount(member, weights=values, minlength=groups).tolist()]
    sums = [0] * groups
    for group in range(groups):
        sums[group] = sum(values[member == group].tolist())
    return sums
