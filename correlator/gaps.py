"""Stretches of time in which records were lost, for all CPUs together."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints
from contracts.records import Batch

MOST: Final = 4096
"""Largest number of gaps remembered at a time. A ring reports one gap for each CPU and loss; beyond this number
adjacent gaps are merged."""

Gaps = npt.NDArray[np.int64]
"""Start and end of each gap, ns: shape (n, 2)."""

NO_GAPS: Final[Gaps] = np.zeros((0, 2), np.int64)


def of_markers(markers: Batch) -> Gaps:
    """Return the gaps that a batch of markers reports."""
    return np.stack([markers.ts_ns, markers.skb_id.astype(np.int64)], axis=1)


def few(gaps: Gaps) -> Gaps:
    """Return the gaps in order, at most `MOST`; if there are more, adjacent gaps are merged."""
    gaps = gaps[np.lexsort((gaps[:, 1], gaps[:, 0]))]
    if len(gaps) <= MOST:
        return gaps
    first = np.arange(0, len(gaps), -(-len(gaps) // MOST))
    return np.stack([gaps[first, 0], np.maximum.reduceat(gaps[:, 1], first)], axis=1)


def disjoint(gaps: Gaps) -> tuple[Ints, Ints]:
    """Return start and end of each stretch in which some CPU's records were lost: disjoint, in order.

    Gaps that touch stay apart. A gap whose start is its end, within another or not, loses nothing.
    """
    if not len(gaps):
        return NO_GAPS[:, 0], NO_GAPS[:, 1]
    start, end = gaps[np.lexsort((gaps[:, 1], gaps[:, 0]))].T
    reached = np.maximum.accumulate(end)
    first = np.flatnonzero(np.append(True, start[1:] >= reached[:-1]))
    return np.ascontiguousarray(start[first]), np.ascontiguousarray(np.maximum.reduceat(reached, first))
