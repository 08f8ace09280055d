"""Windows as columns: the correlator and the stores handle hundreds of thousands of windows as arrays, not objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, Final, Self, overload

import numpy as np

from contracts.arrays import Ints
from contracts.schema import Direction, Segment, Window

FIGURES: Final = ("count", "sum_ns", "min_ns", "max_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns")
"""Figures of a window's delays, without the histogram."""
NUMBERS: Final = ("start_utc_ns", "width_s", "device", "direction", "segment", *FIGURES)
"""Rows of `WindowTable.numbers`, by the name of the field of `Window`."""
_numbers_of: Final = attrgetter(*NUMBERS)
_DIRECTIONS: Final = {int(d): d for d in Direction}
_SEGMENTS: Final = {int(s): s for s in Segment}


class WindowTable(Sequence[Window]):
    """A sequence of windows kept as columns; `Window` objects are made at the first access to one.

    A table is equal to any sequence of equal windows.
    """

    __slots__ = ("_made", "bins", "counts", "edges", "numbers")

    def __init__(self, numbers: Ints, edges: Ints, bins: Ints, counts: Ints) -> None:
        """Make a table of n windows from int64 arrays.

        `numbers` is (13, n), a row for each of `NUMBERS`. `bins` and `counts` hold the histograms of all windows end to
        end; window i has the elements from `edges[i]` to `edges[i + 1]`, so that `edges` has n + 1 elements.
        """
        self.numbers, self.edges, self.bins, self.counts = numbers, edges, bins, counts
        self._made: tuple[Window, ...] | None = None

    @classmethod
    def of(cls, windows: Sequence[Window]) -> WindowTable:
        """Return a table of the windows given; a table is returned as it is."""
        if isinstance(windows, WindowTable):
            return windows
        if not windows:
            return _EMPTY
        # One pass over the windows: column by column would visit each window thirteen times.
        numbers = np.array([_numbers_of(window) for window in windows], np.int64).T
        edges = np.cumsum([0, *(len(w.bins) for w in windows)])
        bins = np.concatenate([w.bins for w in windows]).astype(np.int64, copy=False)
        return cls(numbers, edges, bins, np.concatenate([w.counts for w in windows]).astype(np.int64, copy=False))

    @classmethod
    def concatenate(cls, parts: Sequence[WindowTable]) -> WindowTable:
        """Join tables in the given order."""
        if len(parts) < 2:
            return parts[0] if parts else _EMPTY
        sizes = np.concatenate([np.diff(part.edges) for part in parts])
        return cls(
            np.concatenate([part.numbers for part in parts], axis=1),
            np.append(0, np.cumsum(sizes)),
            np.concatenate([part.bins for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )

    def column(self, name: str) -> Ints:
        """Return one of `NUMBERS` for all windows; int64 of shape (n,)."""
        column: Ints = self.numbers[NUMBERS.index(name)]
        return column

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __iter__(self) -> Iterator[Window]:
        return iter(self._windows())

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Window, ...]: ...
    def __getitem__(self, index: int | slice) -> Window | tuple[Window, ...]:
        return self._windows()[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._windows() == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._windows())

    def _windows(self) -> tuple[Window, ...]:
        if self._made is None:
            edges = self.edges.tolist()
            rows = zip(self.numbers.T.tolist(), edges, edges[1:], strict=False)
            self._made = tuple(self._window(*row) for row in rows)
        return self._made

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

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.numbers, self.edges, self.bins, self.counts)


_EMPTY: Final = WindowTable(
    np.zeros((len(NUMBERS), 0), np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
)
