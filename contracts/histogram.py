"""A log-linear histogram of delays: fixed bins, so that any two merge by adding counts.

Values below 2**SUB_BITS ns have a bin each; above, every power of two is cut into 2**SUB_BITS equal bins. A
quantile is read as the middle of its bin, so its relative error is at most 2**-(SUB_BITS + 1) = 0.4 %. The
same layout as HdrHistogram's, with the bin's number computed from the value alone. All quantiles that MACE
shows come from here: live, replayed, stored and reported numbers are equal because their bins are.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints

SUB_BITS: Final = 7
_SUB: Final = 1 << SUB_BITS
MAX_NS: Final = (1 << 40) - 1
"""Larger delays count in the last bin: 2**40 ns is 18 minutes, far beyond what a packet can wait for."""
BINS: Final = (40 - SUB_BITS + 1) * _SUB
"""Number of bins: 4,352."""
QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)


def bins_of(delay_ns: npt.NDArray[Any]) -> Ints:
    """Bin of each delay (int64, ns; negative ones count as 0). Same shape, int64 in [0, BINS)."""
    value = np.asarray(delay_ns, np.int64)
    if value.size and not (value.min() >= 0 and value.max() <= MAX_NS):
        value = value.clip(0, MAX_NS)
    # The exponent field of the value as a double is floor(log2): exact, since values stay below 2**53.
    exponent = (value.astype(np.float64).view(np.int64) >> 52) - 1023
    octave = np.maximum(exponent - SUB_BITS, 0)
    bins: Ints = np.where(value < _SUB, value, (octave << SUB_BITS) + (value >> octave))
    return bins


def lower_bounds(bins: npt.NDArray[Any]) -> Ints:
    """Smallest delay, ns, of each bin."""
    index = np.asarray(bins, dtype=np.int64)
    octave = np.maximum((index >> SUB_BITS) - 1, 0)
    bounds: Ints = (index - (octave << SUB_BITS)) << octave
    return bounds


def middles(bins: npt.NDArray[Any]) -> Ints:
    """Delay, ns, that stands for each bin: its middle, rounded down."""
    index = np.asarray(bins, dtype=np.int64)
    octave = np.maximum((index >> SUB_BITS) - 1, 0)
    values: Ints = lower_bounds(index) + ((np.int64(1) << octave) >> 1)
    return values


def quantiles(bins: Ints, counts: Ints, q: tuple[float, ...] = QUANTILES) -> Ints:
    """Delays, ns, int64, one per `q`, of a sparse histogram: ascending `bins` and their `counts` (> 0).

    The value at quantile q is that of the smallest rank r with r >= q * n (R-1, the inverse of the empirical
    distribution function; Hyndman and Fan 1996, definition 1). Zeros for an empty histogram.
    """
    if not len(bins):
        return np.zeros(len(q), np.int64)
    ranks = np.cumsum(counts)
    wanted = np.maximum(np.ceil(np.asarray(q) * ranks[-1]), 1)
    return middles(bins[np.searchsorted(ranks, wanted)])


def merge(bins: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """One sparse histogram from several laid end to end: ascending distinct bins, summed counts."""
    # Doubles hold every integer below 2**53: no count gets there.
    totals = np.bincount(bins, weights=counts)
    distinct = np.flatnonzero(totals)
    return distinct, totals[distinct].astype(np.int64)
