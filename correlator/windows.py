"""Counts delays in windows: a mergeable histogram per device, direction, segment and interval of UTC.

The contents of windows do not depend on batches. A window is returned once, when no further delay can belong to it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from contracts import histogram
from contracts.arrays import Ints, Values
from contracts.windowtable import NUMBERS, WindowTable

WIDTHS_S: Final = (1, 10)


_NS: Final = 1_000_000_000
_DENSE: Final = 1 << 18
"""Codes below this are counted in a table (2 MiB, in the cache); others are sorted."""
_SPARSE: Final = 32
"""Few codes are sorted, too, if the table would have more than this many elements per code."""


_START, CODE, _COUNT, _SUM, _LOW, _HIGH = range(6)
"""Rows of a table of windows: start (ns); device, direction and segment in one number; and what was added up."""
CODE_SHIFT: Final = 5
"""Bits of that number below the device."""
_BIN, _CELL_COUNT = 2, 3
"""Rows of a table of histogram cells, after `_START` and `CODE`."""
_UNMERGED: Final = 1 << 18
"""Cells that may wait to be merged: 8 MiB."""


class _Pending:
    """Open windows of one width, as tables: a host has some hundred windows a second."""

    def __init__(self, width_s: int) -> None:
        self.width_s = width_s
        self.windows: list[Ints] = []
        """Tables of shape (6, n); a window may be in several of them."""
        self.cells: list[Ints] = []
        """Tables of shape (4, n); the cells are in the order of their windows."""
        self.first_ns: int | None = None
        self._unmerged = 0

    def add(self, windows: Ints, cells: Ints) -> None:
        self.windows.append(windows)
        self.cells.append(cells)
        start = int(windows[_START].min())
        self.first_ns = start if self.first_ns is None else min(self.first_ns, start)
        self._unmerged += cells.shape[1]
        if self._unmerged > _UNMERGED:
            self._keep(*self._merged())

    def take(self, before_ns: int | None) -> tuple[Ints, Ints] | None:
        """Return the windows that end at or before a time (None: all), merged and in order; None if there are none."""
        width_ns = self.width_s * _NS
        if self.first_ns is None or (before_ns is not None and self.first_ns + width_ns > before_ns):
            return None
        windows, cells = self._merged()
        # Windows are ordered by start, so that the ready ones come first.
        ready = (
            len(windows[0])
            if before_ns is None
            else int(np.searchsorted(windows[_START], before_ns - width_ns, "right"))
        )
        of_ready = (
            len(cells[0]) if before_ns is None else int(np.searchsorted(cells[_START], before_ns - width_ns, "right"))
        )
        self._keep(windows[:, ready:], cells[:, of_ready:])
        return windows[:, :ready], cells[:, :of_ready]

    def _keep(self, windows: Ints, cells: Ints) -> None:
        left = windows.shape[1] > 0
        self.windows, self.cells = ([windows], [cells]) if left else ([], [])
        self.first_ns = int(windows[_START, 0]) if left else None
        self._unmerged = 0

    def _merged(self) -> tuple[Ints, Ints]:
        """Return the merged windows and cells, ordered by start, device, direction, segment and bin."""
        windows, cells = _laid_together(self.windows), _laid_together(self.cells)
        if (found := _groups(windows[_START], windows[CODE])) is not None:
            order, first = found
            windows = windows.take(order, axis=1)
            merged = windows.take(first, axis=1)
            merged[_COUNT] = np.add.reduceat(windows[_COUNT], first)
            merged[_SUM] = np.add.reduceat(windows[_SUM], first)
            merged[_LOW] = np.minimum.reduceat(windows[_LOW], first)
            merged[_HIGH] = np.maximum.reduceat(windows[_HIGH], first)
            windows = merged
        if (found := _groups(cells[_START], cells[CODE] * histogram.BINS + cells[_BIN])) is not None:
            order, first = found
            cells = cells.take(order, axis=1)
            merged = cells.take(first, axis=1)
            merged[_CELL_COUNT] = np.add.reduceat(cells[_CELL_COUNT], first)
            cells = merged
        return windows, cells


class Windows:
    """All open windows of one run. Times of delays may descend, but not below the last time given to `close`."""

    def __init__(self) -> None:
        self._pending = [_Pending(width_s) for width_s in WIDTHS_S]

    def add(self, utc_ns: Ints, device: Values, direction: Values, segment: Values, delay_ns: Ints) -> None:
        """Count delays in their windows of one second; wider windows are computed from those when they close.

        Columns as in `contracts.schema.Delays`.
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
        of_group = cells // span

        windows = np.empty((6, len(groups)), np.int64)
        second, number = np.divmod(groups >> 5, rows)
        windows[_START] = (first + second) * _NS
        windows[CODE] = number << 5 | groups & 31
        windows[_COUNT] = np.bincount(member, minlength=len(groups))
        windows[_LOW] = np.iinfo(np.int64).max
        windows[_HIGH] = np.iinfo(np.int64).min
        np.minimum.at(windows[_LOW], member, delay_ns)
        np.maximum.at(windows[_HIGH], member, delay_ns)
        windows[_SUM] = _sums(member, delay_ns, len(groups), int(windows[_HIGH].max()))
        table = np.empty((4, len(cells)), np.int64)
        table[: CODE + 1] = windows[: CODE + 1].take(of_group, axis=1)
        table[_BIN] = cells - of_group * span + lowest
        table[_CELL_COUNT] = counts
        self.add_tables(windows, table)

    def add_tables(self, windows: Ints, cells: Ints) -> None:
        """Add windows of one second that were counted elsewhere: tables of shapes (6, n) and (4, m).

        Rows of `windows`: start (ns of UTC); device, direction and segment as `device << 5 | direction << 3 | segment`;
        count; sum, smallest and largest delay (ns). Rows of `cells`, in the order of their windows: start and code as
        above, bin, count. All int64.
        """
        if windows.shape[1]:
            self._pending[0].add(windows, cells)

    @property
    def cells(self) -> int:
        """Number of waiting histogram cells, 32 bytes each."""
        return sum(cells.shape[1] for pending in self._pending for cells in pending.cells)

    def close(self, before_utc_ns: int | None) -> WindowTable:
        """Return the final windows that end at or before a time (None: all), in order."""
        done: list[WindowTable] = []
        for pending, wider in zip(self._pending, [*self._pending[1:], None], strict=True):
            taken = pending.take(before_utc_ns)
            if taken is None:
                continue
            if wider is not None:
                wider.add(*(_started(table, wider.width_s) for table in taken))
            done.append(_final(pending.width_s, *taken))
        return WindowTable.concatenate(done)


def joined(pieces: WindowTable) -> WindowTable:
    """Join parts of windows: parts of equal time, width, device, direction and segment become one window. In order."""
    sizes = np.diff(pieces.edges)
    code = pieces.column("device") << 5 | pieces.column("direction") << 3 | pieces.column("segment")
    rows = [pieces.column(name) for name in ("count", "sum_ns", "min_ns", "max_ns")]
    windows = np.stack([pieces.column("start_utc_ns"), code, *rows])
    cells = np.stack([*(np.repeat(row, sizes) for row in windows[: CODE + 1]), pieces.bins, pieces.counts])
    width = pieces.column("width_s")
    found: list[WindowTable] = []
    for width_s in WIDTHS_S:
        chosen = width == width_s
        if chosen.any():
            pending = _Pending(width_s)
            pending.add(windows[:, chosen], cells[:, np.repeat(chosen, sizes)])
            if (taken := pending.take(None)) is not None:
                found.append(_final(width_s, *taken))
    return WindowTable.concatenate(found)


def _laid_together(tables: list[Ints]) -> Ints:
    return tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)


def _groups(start: Ints, code: Ints) -> tuple[Ints, Ints] | None:
    """Return the order by start (whole seconds) and code (>= 0), and the first index of each pair in it; None if
    ascending.

    Most tables are concatenations of ordered tables. A stable sort of one integer finds these runs and only merges
    them; a lexsort would sort all of it once per column.
    """
    second = (start - start.min()) // _NS
    codes = int(code.max()) + 1
    if (int(second.max()) + 1) * codes >= 1 << 62:
        order = np.lexsort((code, start))
        return order, np.flatnonzero(_changes(start[order], code[order]))
    keys = second * codes + code
    if (keys[1:] > keys[:-1]).all():
        return None
    order = np.argsort(keys, kind="stable")
    return order, np.flatnonzero(_changes(keys[order]))


def _changes(*columns: Ints) -> npt.NDArray[np.bool_]:
    """Return a mask of rows of which a column differs from the row before; the first row always does."""
    differs = np.ones(len(columns[0]), np.bool_)
    np.not_equal(columns[0][1:], columns[0][:-1], out=differs[1:])
    for column in columns[1:]:
        differs[1:] |= column[1:] != column[:-1]
    return differs


def _started(table: Ints, width_s: int) -> Ints:
    """Return the table with the starts of windows of that width."""
    moved = table.copy()
    moved[_START] -= moved[_START] % (width_s * _NS)
    return moved


def _final(width_s: int, windows: Ints, cells: Ints) -> WindowTable:
    """Return the windows of merged tables, whose windows and cells have the same order."""
    bins, counts = cells[_BIN].copy(), cells[_CELL_COUNT].copy()
    edges = np.append(np.flatnonzero(_changes(cells[_START], cells[CODE])), len(bins))
    found = histogram.quantiles_of_each(bins, counts, edges)
    numbers = np.empty((len(NUMBERS), len(edges) - 1), np.int64)
    numbers[0], numbers[1], numbers[2] = windows[_START], width_s, windows[CODE] >> 5
    numbers[3], numbers[4] = (windows[CODE] >> 3) & 3, windows[CODE] & 7
    numbers[5:9] = windows[_COUNT : _HIGH + 1]
    # The middle of a bin may lie outside the range of observed delays.
    np.maximum(found, windows[_LOW], out=found)
    np.minimum(found, windows[_HIGH], out=numbers[9:])
    return WindowTable(numbers, edges, bins, counts)


def _ranked(codes: Ints) -> tuple[Ints, Ints]:
    """Return the distinct codes (>= 0), ascending, and each element's rank among them."""
    top = int(codes.max()) + 1
    if top > _DENSE:
        groups, member = np.unique(codes, return_inverse=True)
        return groups, member.astype(np.int64, copy=False)
    groups = np.flatnonzero(np.bincount(codes, minlength=top))
    rank = np.zeros(top, np.int64)
    rank[groups] = np.arange(len(groups))
    return groups, rank[codes]


def _counted(codes: Ints, top: int) -> tuple[Ints, Ints]:
    """Return the distinct codes (in [0, top)), ascending, and the number of occurrences of each."""
    if top > min(_DENSE, _SPARSE * len(codes)):
        distinct, counts = np.unique(codes, return_counts=True)
        return distinct, counts.astype(np.int64, copy=False)
    counts = np.bincount(codes, minlength=top)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _sums(member: Ints, values: Ints, groups: int, highest: int) -> list[int]:
    """Return exact sums of values (>= 0) by group: bincount adds doubles, which hold every integer below 2**53."""
    if highest * len(values) < 1 << 53:
        return [int(total) for total in np.bincount(member, weights=values, minlength=groups).tolist()]
    sums = [0] * groups
    for group in range(groups):
        sums[group] = sum(values[member == group].tolist())
    return sums
