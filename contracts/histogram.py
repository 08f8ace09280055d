"""A log-linear histogram of delays: fixed bins, so that any two merge by adding counts.

Each value below 2**SUB_BITS ns has a bin of its own; above, every power of two is cut into 2**SUB_BITS equal bins. A
quantile is read as the middle of its bin, so its relative error is at most 2**-(SUB_BITS + 1) = 0.4 %. The layout is
that of HdrHistogram; the bin's number is computed from the value alone. All quantiles that MACE shows are computed
here: live, replayed, stored and reported quantiles are equal because their bins are equal.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints

SUB_BITS: Final = 7
_SUB: Final = 1 << SUB_BITS
MAX_NS: Final = (1 << 40) - 1
"""Largest delay with a bin; larger ones count in the last bin. 2**40 ns is 18 minutes, longer than a packet waits."""
BINS: Final = (40 - SUB_BITS + 1) * _SUB
"""Number of bins: 4,352."""
QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)


def bins_of(delay_ns: npt.NDArray[Any]) -> Ints:
    """Return the bin of each delay (int64, ns; negative delays count as 0): int64 in [0, BINS), of the same shape."""
    value = np.asarray(delay_ns, np.int64)
    if value.size and not (value.min() >= 0 and value.max() <= MAX_NS):
        value = value.clip(0, MAX_NS)
    # The exponent field of the value as a double is floor(log2): exact, since values stay below 2**53.
    exponent = (value.astype(np.float64).view(np.int64) >> 52) - 1023
    octave = np.maximum(exponent - SUB_BITS, 0)
    bins: Ints = np.where(value < _SUB, value, (octave << SUB_BITS) + (value >> octave))
    return bins


def lower_bounds(bins: npt.NDArray[Any]) -> Ints:
    """Return the smallest delay, ns, of each bin; int64, of the shape of `bins`."""
    index = np.asarray(bins, dtype=np.int64)
    octave = np.maximum((index >> SUB_BITS) - 1, 0)
    bounds: Ints = (index - (octave << SUB_BITS)) << octave
    return bounds


def middles(bins: npt.NDArray[Any]) -> Ints:
    """Return the delay, ns, that represents each bin: its middle, rounded down; int64, of the shape of `bins`."""
    index = np.asarray(bins, dtype=np.int64)
    octave = np.maximum((index >> SUB_BITS) - 1, 0)
    values: Ints = lower_bounds(index) + ((np.int64(1) << octave) >> 1)
    return values


def quantiles(bins: Ints, counts: Ints, q: tuple[float, ...] = QUANTILES) -> Ints:
    """Return the delays, ns, int64, at each of `q`, of a sparse histogram: ascending `bins` and their `counts` (> 0).

    The delay at quantile q has the smallest rank r with r >= q * n (R-1, the inverse of the empirical distribution
    function; Hyndman and Fan 1996, definition 1). An empty histogram gives zeros.
    """
    if not len(bins):
        return np.zeros(len(q), np.int64)
    ranks = np.cumsum(counts)
    wanted = np.maximum(np.ceil(np.asarray(q) * ranks[-1]), 1)
    return middles(bins[np.searchsorted(ranks, wanted)])


def quantiles_of_each(bins: Ints, counts: Ints, edges: Ints, q: tuple[float, ...] = QUANTILES) -> Ints:
    """Return `quantiles` of each of n sparse histograms, given concatenated; int64, of shape (len(q), n).

    Histogram i has `bins` and `counts` from `edges[i]` to `edges[i + 1]`, and at least one bin.
    """
    # Ranks continue from one histogram to the next.
    ranks = np.cumsum(counts)
    upto = ranks[edges[1:] - 1]
    before = np.append(0, upto[:-1])
    wanted = np.maximum(np.ceil(np.multiply.outer(np.asarray(q), upto - before)), 1) + before
    return middles(bins[np.searchsorted(ranks, wanted)])


def merge(bins: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Merge sparse histograms, given concatenated, into one: ascending distinct bins and their summed counts; int64."""
    # bincount sums doubles, which hold every integer below 2**53: no count gets there.
    totals = np.bincount(bins, weights=counts)
    distinct = np.flatnonzero(totals)
    return distinct, totals[distinct].astype(np.int64)
