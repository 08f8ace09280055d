"""Merges the histograms of many windows by group: in numpy, a batch of rows at a time, with bounded memory.

A window's histogram is a list of some hundred numbers. SQL has to unnest these lists into rows and hash every one, for
each grouping anew; arrays add the counts up by bin, for all groupings of a batch in one pass over the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import compute

from contracts.arrays import Ints
from contracts.figures import Distribution
from contracts.histogram import BINS

_DENSE: Final = 1 << 22
"""Up to so many cells (group and bin) are counted in a table (32 MiB); of more, only those with delays are kept."""
_UNMERGED: Final = 1 << 22
"""Cells that may wait to be merged: 64 MiB."""


Cells: TypeAlias = tuple[Ints, Ints, Ints]
"""How many bins each window has, and the bins and counts of all windows, end to end."""


def cells_of(batch: pa.RecordBatch) -> Cells:
    """Return the histograms of windows."""
    sizes = compute.list_value_length(batch["bins"]).to_numpy(zero_copy_only=False)
    bins, counts = (compute.list_flatten(batch[name]).to_numpy(zero_copy_only=False) for name in ("bins", "counts"))
    return sizes, bins.astype(np.int64), counts.astype(np.int64, copy=False)


class Histograms:
    """Distributions by group, of batches of windows."""

    def __init__(self, by: tuple[str, ...], coarse_bits: int = 0) -> None:
        """`by` are the columns of a group. 2**`coarse_bits` neighbouring bins count as the one in their middle."""
        self._by, self._coarse_bits = by, coarse_bits
        self._bins = BINS >> coarse_bits
        self._table: Ints | None = np.zeros(0, np.int64)
        """Counts of all groups' bins, while they are few enough."""
        self._number: dict[tuple[Any, ...], int] = {}
        self._count, self._sum = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._low, self._high = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._cells: list[Ints] = []
        self._counts: list[Ints] = []
        self._waiting = 0

    def add(self, batch: pa.RecordBatch, cells: Cells | None = None) -> None:
        """Add windows with the columns of the groups, count, sum_ns, min_ns, max_ns, bins and counts.

        `cells` are `cells_of` these windows, if they are known.
        """
        if not len(batch):
            return
        sizes, bins, counts = cells or cells_of(batch)
        group = self._groups(batch)
        numbers = {name: batch[name].to_numpy(zero_copy_only=False) for name in ("count", "sum_ns", "min_ns", "max_ns")}
        np.add.at(self._count, group, numbers["count"])
        np.add.at(self._sum, group, numbers["sum_ns"])
        np.minimum.at(self._low, group, numbers["min_ns"])
        np.maximum.at(self._high, group, numbers["max_ns"])
        at = np.repeat(group * self._bins, sizes)
        at += bins >> self._coarse_bits if self._coarse_bits else bins
        if self._table is not None:
            if len(self._number) * self._bins <= _DENSE:
                self._table = _grown(self._table, len(self._number) * self._bins)
                np.add.at(self._table, at, counts)
                return
            self._cells, self._counts = _filled(self._table)
            self._table = None
        self._cells.append(at)
        self._counts.append(counts)
        self._waiting += len(bins)
        if self._waiting > _UNMERGED:
            self._merge()

    def distributions(self) -> Iterator[tuple[tuple[Any, ...], Distribution]]:
        """Yield each group, as the values of its columns, with its distribution."""
        if self._table is not None:
            self._cells, self._counts = _filled(self._table)
        self._merge()
        group, bins = np.divmod(self._cells[0], self._bins)
        bins = (bins << self._coarse_bits) + (1 << self._coarse_bits >> 1)
        edges = np.searchsorted(group, np.arange(len(self._number) + 1))
        for key, number in self._number.items():
            piece = slice(edges[number], edges[number + 1])
            count, total, low, high = (int(each[number]) for each in (self._count, self._sum, self._low, self._high))
            found = Distribution()
            found.add(count, total, low, high, bins[piece], self._counts[0][piece])
            yield key, found

    def _groups(self, batch: pa.RecordBatch) -> Ints:
        """Return the number of each row's group, and make room for new groups."""
        code = np.zeros(len(batch), np.int64)
        for name in self._by:
            encoded = batch[name].dictionary_encode()
            each = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            code = np.unique(code * len(encoded.dictionary) + each, return_inverse=True)[1]
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        keys = zip(*(batch[name].take(pa.array(first)).to_pylist() for name in self._by), strict=True)
        numbers = np.array([self._number.setdefault(key, len(self._number)) for key in keys], np.int64)
        more = len(self._number) - len(self._count)
        empty = np.zeros(more, np.int64)
        self._count, self._sum = np.append(self._count, empty), np.append(self._sum, empty)
        self._low = np.append(self._low, np.full(more, np.iinfo(np.int64).max))
        self._high = np.append(self._high, np.full(more, np.iinfo(np.int64).min))
        found: Ints = numbers[inverse]
        return found

    def _merge(self) -> None:
        """Merge the waiting cells into ascending distinct ones."""
        cells = np.concatenate([*self._cells, np.zeros(0, np.int64)])
        counts = np.concatenate([*self._counts, np.zeros(0, np.int64)])
        if len(cells):
            order = np.argsort(cells, kind="stable")
            cells, counts = cells[order], counts[order]
            first = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
            cells, counts = cells[first], np.add.reduceat(counts, first)
        self._cells, self._counts = [cells], [counts]
        # Merged cells do not count as waiting: groups and bins bound their number.
        self._waiting = 0


def _grown(table: Ints, size: int) -> Ints:
    """Return the table with room for `size` cells."""
    if len(table) >= size:
        return table
    found = np.zeros(max(size, min(2 * len(table), _DENSE)), np.int64)
    found[: len(table)] = table
    return found


def _filled(table: Ints) -> tuple[list[Ints], list[Ints]]:
    """Return the cells with delays and their counts."""
    cells = np.flatnonzero(table)
    return [cells], [table[cells]]
