"""Windows as columns: the correlator and the stores handle hundreds of thousands of windows as arrays, not objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints
from contracts.schema import Direction, Segment, Window

FIGURES: Final = ("count", "sum_ns", "min_ns", "max_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns")
"""Figures of a window's delays, without the histogram."""
NUMBERS: Final = ("start_utc_ns", "width_s", "device", "direction", "segment", *FIGURES)
"""Rows of `WindowTable.numbers`, by the name of the field of `Window`."""
_numbers_of: Final = attrgetter(*NUMBERS)
_DIRECTIONS: Final = {int(d): d for d in Direction}
_SEGMENTS: Final = {int(s): s for s in Segment}


class WindowTable:
    """Windows as columns. Iterating makes a `Window` object of each, for views, which show one at a time."""

    __slots__ = ("bins", "counts", "edges", "numbers")

    def __init__(self, numbers: Ints, edges: Ints, bins: Ints, counts: Ints) -> None:
        """Make a table of n windows from int64 arrays.

        `numbers` is (13, n), a row for each of `NUMBERS`. `bins` and `counts` hold the histograms of all windows end to
        end; window i has the elements from `edges[i]` to `edges[i + 1]`, so that `edges` has n + 1 elements.
        """
        self.numbers, self.edges, self.bins, self.counts = numbers, edges, bins, counts

    @classmethod
    def of(cls, windows: Sequence[Window]) -> WindowTable:
        """Return a table of the windows given."""
        if not windows:
            return cls.empty()
        # One pass over the windows: column by column would visit each window thirteen times.
        numbers = np.array([_numbers_of(window) for window in windows], np.int64).T
        edges = np.cumsum([0, *(len(w.bins) for w in windows)])
        bins = np.concatenate([w.bins for w in windows]).astype(np.int64, copy=False)
        return cls(numbers, edges, bins, np.concatenate([w.counts for w in windows]).astype(np.int64, copy=False))

    @classmethod
    def concatenate(cls, parts: Sequence[WindowTable]) -> WindowTable:
        """Join tables in the given order; no parts make an empty table."""
        if len(parts) < 2:
            return parts[0] if parts else cls.empty()
        sizes = np.concatenate([np.diff(part.edges) for part in parts])
        return cls(
            np.concatenate([part.numbers for part in parts], axis=1),
            np.append(0, np.cumsum(sizes)),
            np.concatenate([part.bins for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )

    @classmethod
    def empty(cls) -> WindowTable:
        """Return a table without windows."""
        return _EMPTY

    def column(self, name: str) -> Ints:
        """Return one of `NUMBERS` for all windows; int64 of shape (n,)."""
        column: Ints = self.numbers[NUMBERS.index(name)]
        return column

    def with_column(self, name: str, column: Ints) -> WindowTable:
        """Return the windows with another column for one of `NUMBERS`."""
        numbers = self.numbers.copy()
        numbers[NUMBERS.index(name)] = column
        return WindowTable(numbers, self.edges, self.bins, self.counts)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: slice | npt.NDArray[Any]) -> WindowTable:
        """Return the windows at `index`: a slice, a mask or positions."""
        sizes, begins = np.diff(self.edges)[index], self.edges[:-1][index]
        edges = np.append(0, np.cumsum(sizes))
        at = np.repeat(begins - edges[:-1], sizes) + np.arange(edges[-1])
        return WindowTable(self.numbers[:, index], edges, self.bins[at], self.counts[at])

    def __iter__(self) -> Iterator[Window]:
        edges = self.edges.tolist()
        for numbers, begin, end in zip(self.numbers.T.tolist(), edges, edges[1:], strict=False):
            yield self._window(numbers, begin, end)

    def _window(self, numbers: list[int], begin: int, end: int) -> Window:
        start, width_s, device, direction, segment, count, sum_ns, low, high, p50, p90, p99, p999 = numbers
        return Window(
            start,
            width_s,
            device,
            _DIRECTIONS[direction],
            _SEGMENTS[segment],
            count,
            sum_ns,
            low,
            high,
            p50,
            p90,
            p99,
            p999,
            self.bins[begin:end],
            self.counts[begin:end],
        )


_EMPTY: Final = WindowTable(
    np.zeros((len(NUMBERS), 0), np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
)
