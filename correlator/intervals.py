"""Confidence intervals of means and medians of successive measurements, allowing for autocorrelation.

Successive round trip times resemble one another: the cache is warm or cold, a neighbour is busy for a while. The usual
interval assumes independent values and is too narrow, by a factor of sqrt((1 + r)/(1 - r)) for a correlation of r
between neighbours: three times, for r = 0.8. The bootstrap here therefore draws whole *blocks* instead of single
values:

1. **Block length.** The length that gives the best estimate of the mean's variance, from the series' own
   autocovariances (Politis and White, Econometric Reviews 23 (2004) 53-70, with the correction of Patton,
   Politis and White, ibid. 28 (2009) 372-375). It is 1 if neighbours are uncorrelated.
2. **Drawing.** Circular block bootstrap (Politis and Romano, in LePage and Billard, Exploring the Limits of Bootstrap,
   1992): blocks begin anywhere and wrap at the end of the series. The seed is fixed: the same series gives the same
   interval.
3. **Few blocks.** With few blocks, percentiles of the drawn means are too narrow by the ratio of Student's t to the
   normal distribution, and are widened by it (Hesterberg, The American Statistician 69 (2015) 371-386), with the number
   of blocks in place of the number of values.
4. **Medians.** The share of values below the median has an interval like a mean; the quantiles at its ends bound the
   median (Woodruff, JASA 47 (1952) 635-646). This assumes nothing about the distribution, is not affected by ties, and
   takes no longer for half a million values than sorting them.

`tests/property/test_intervals.py` measures how often the intervals cover the true value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Floats, Ints

FEWEST: Final = 10
"""Smallest number of values for an interval: three blocks of three show nothing."""
FEWEST_ROUNDS: Final = 3
LEVEL: Final = 0.95
_REPLICATES: Final = 2000
"""Number of bootstrap replicates. The 2.5 % percentile is then the 50th value, with a standard error of 7 ranks."""
_SEED: Final = 20190722
_AT_ONCE: Final = 1 << 22
"""Largest number of block sums in memory: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its confidence interval, in the unit of the values."""

    estimate: float
    low: float
    high: float
    block: int
    """Values in a block: how far values depend on one another."""

    def as_dict(self) -> dict[str, float]:
        """Return estimate, low, high, rounded to tenths of the unit, and block, by name."""
        return {
            "estimate": round(self.estimate, 1),
            "low": round(self.low, 1),
            "high": round(self.high, 1),
            "block": self.block,
        }


def mean(values: npt.NDArray[Any], level: float = LEVEL) -> Interval | None:
    """Return the mean of a series (one dimension, in order of time) with its interval; None below `FEWEST` values."""
    series = np.asarray(values, np.float64)
    if len(series) < FEWEST:
        return None
    middle = float(series.mean())
    low, high, block = _deviations(series, level)
    return Interval(middle, middle + low, middle + high, block)


def median(values: npt.NDArray[Any], level: float = LEVEL) -> Interval | None:
    """Return the median of a series (one dimension, in order of time) with its interval; None below `FEWEST` values."""
    series = np.asarray(values, np.float64)
    if len(series) < FEWEST:
        return None
    middle = float(np.median(series))
    below = (series < middle) + 0.5 * (series == middle)
    low, high, block = _deviations(below, level)
    bounds = np.quantile(series, np.clip([0.5 + low, 0.5 + high], 0.0, 1.0))
    return Interval(middle, min(float(bounds[0]), middle), max(float(bounds[1]), middle), block)


def of_rounds(statistic: Callable[[Ints], float], rounds: int, level: float = LEVEL) -> Interval | None:
    """Return any statistic of an experiment in rounds, with its interval; None for fewer than three rounds.

    Rounds are the blocks: all values of a round share the machine's state, and a comparison draws both of its sides
    from the same rounds. `statistic` computes the statistic from an array of round numbers, some of which occur several
    times. The interval is widened as in 3. above: for eight rounds the 95 % interval is 1.29 times as wide as the
    percentiles.
    """
    if rounds < FEWEST_ROUNDS:
        return None
    middle = statistic(np.arange(rounds))
    random = np.random.default_rng(_SEED)
    drawn = np.array([statistic(random.integers(0, rounds, rounds)) for _ in range(_REPLICATES)])
    tail = (1 - level) / 2
    wider = student_t(1 - tail, rounds - 1) / NormalDist().inv_cdf(1 - tail) * np.sqrt(rounds / (rounds - 1))
    low, high = (np.quantile(drawn, [tail, 1 - tail]) - middle) * wider
    return Interval(middle, middle + min(float(low), 0.0), middle + max(float(high), 0.0), 1)


def block_length(series: Floats) -> int:
    """Return the block length for the mean of this series: at least 1, at most a third of the series."""
    count = len(series)
    centred = series - series.mean()
    if not centred.any():
        return 1
    most = max(1, min(int(np.ceil(3 * np.sqrt(count))), count // 3))
    # Politis and White's rule: the correlation ends where this many successive lags are insignificant.
    in_a_row = max(5, int(np.ceil(np.sqrt(np.log10(count)))))
    lags = min(most + in_a_row, count - 1)
    size = 1 << (2 * count - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), size)[: lags + 1] / count
    large = np.abs(covariance[1:] / covariance[0]) >= 2 * np.sqrt(np.log10(count) / count)
    last = _last_before(large, in_a_row)
    if last == 0:
        return 1
    reach = min(2 * last, lags)
    lag = np.arange(1, reach + 1)
    window = np.minimum(1.0, 2.0 * (1.0 - lag / reach))
    weighted = window * covariance[1 : reach + 1]
    spectral = covariance[0] + 2 * weighted.sum()
    slope = 2 * (lag * weighted).sum()
    if spectral <= 0:
        return most
    best = (2 * slope**2 / (4 / 3 * spectral**2)) ** (1 / 3) * count ** (1 / 3)
    return int(np.clip(np.ceil(best), 1, most))


def _last_before(large: npt.NDArray[np.bool_], in_a_row: int) -> int:
    """Return the lag (from 1) of the last large correlation before `in_a_row` small ones; 0 if these come first."""
    small = 0
    for lag, is_large in enumerate(large.tolist(), 1):
        small = 0 if is_large else small + 1
        if small == in_a_row:
            return lag - in_a_row
    return len(large) - small


def _deviations(series: Floats, level: float) -> tuple[float, float, int]:
    """Return the deviations of the interval's low and high end from the mean, and the block length."""
    count, block = len(series), block_length(series)
    blocks = max(2, round(count / block))
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([series, series[:block]]) - series.mean())])
    sums = around[block : block + count] - around[:count]
    random = np.random.default_rng(_SEED)
    means = np.empty(_REPLICATES)
    step = max(1, _AT_ONCE // blocks)
    for start in range(0, _REPLICATES, step):
        drawn = random.integers(0, count, (min(step, _REPLICATES - start), blocks))
        means[start : start + step] = sums[drawn].sum(axis=1) / (blocks * block)
    tail = (1 - level) / 2
    wider = student_t(1 - tail, blocks - 1) / NormalDist().inv_cdf(1 - tail) * np.sqrt(blocks / (blocks - 1))
    low, high = np.quantile(means, [tail, 1 - tail]) * wider
    return float(low), float(high), block


@cache
def student_t(probability: float, freedom: int) -> float:
    """Return a quantile (above the median) of Student's t.

    The density is integrated over x = sqrt(freedom) * tan(angle). The relative error is below 1e-4 for usual levels.
    """
    angle = np.linspace(0.0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * probability - 1, below / below[-1], angle)))


def bounds(found: Interval | None) -> list[float] | None:
    """Return the ends of an interval, [low, high], for JSON; None without an interval."""
    return None if found is None else [found.low, found.high]
