"""Coverage of the confidence intervals, for series of known autocorrelation: AR(1), x[t] = r x[t-1] + noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from correlator.intervals import FEWEST, FEWEST_ROUNDS, block_length, mean, median, of_rounds, student_t

SERIES = 300
LENGTH = 400


def ar1(random, correlation, *, skewed=False):
    """Return a series with mean and median 0; if `skewed`, with median 1 and a long upper tail."""
    noise = random.normal(size=LENGTH + 200)
    series = np.zeros(LENGTH + 200)
    for t in range(1, len(series)):
        series[t] = correlation * series[t - 1] + noise[t]
    series = series[200:]
    return np.exp(series) if skewed else series


def coverage(of, correlation, truth, **shape):
    random = np.random.default_rng(11)
    found = [of(ar1(random, correlation, **shape)) for _ in range(SERIES)]
    return np.mean([i.low <= truth <= i.high for i in found])


def naive(series):
    """Return the interval for independent values."""
    error = series.std() / np.sqrt(len(series))
    return -1.96 * error <= series.mean() <= 1.96 * error


# 95 % of 300 is 285 ± 3.8. With long correlation every interval from 400 values covers a little too seldom (see the
# tables of Politis and White), the naive interval far too seldom.
@pytest.mark.slow
@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.92), (0.5, 0.91), (0.8, 0.88), (-0.4, 0.92)])
@pytest.mark.parametrize("of", [mean, median])
def test_intervals_have_the_nominal_coverage(of, correlation, least):
    assert least <= coverage(of, correlation, 0.0) <= 0.99


def test_the_naive_interval_lacks_the_nominal_coverage():
    random = np.random.default_rng(11)
    assert np.mean([naive(ar1(random, 0.8)) for _ in range(SERIES)]) < 0.65


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_medians_of_skewed_series(correlation):
    assert 0.89 <= coverage(median, correlation, 1.0, skewed=True) <= 0.99


def test_block_length_follows_the_correlation():
    random = np.random.default_rng(3)
    lengths = [np.median([block_length(ar1(random, r)) for _ in range(30)]) for r in (0.0, 0.5, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert lengths[0] <= 2
    # Patton, Politis and White 2009: n^(1/3) (6 r^2 / (1 - r^2)^2)^(1/3) for the circular bootstrap: 10.2 at r = 0.5.
    assert 4 <= lengths[1] <= 14
    assert lengths[3] > 20


def test_the_same_series_gives_the_same_interval():
    series = ar1(np.random.default_rng(1), 0.5)
    assert mean(series) == mean(series.copy())
    assert median(series) == median(series.copy())


def test_a_wider_level_is_wider():
    series = ar1(np.random.default_rng(1), 0.5)
    inner, outer = median(series, 0.8), median(series, 0.99)
    assert outer.low < inner.low < inner.high < outer.high


def test_ties_and_constants():
    assert median(np.full(50, 7)) == median(np.full(50, 7.0))
    assert (median(np.full(50, 7)).low, median(np.full(50, 7)).high) == (7, 7)
    assert (mean(np.full(50, 7)).low, mean(np.full(50, 7)).high) == (7, 7)
    found = median(np.repeat([1, 2], [10, 30]))
    assert found.estimate == 2


@pytest.mark.slow
@given(arrays.arrays(np.int64, st.integers(0, 300), elements=st.integers(-(10**12), 10**12)))
def test_bounds_enclose_the_estimate_and_stay_among_the_values(values):
    for of in (mean, median):
        found = of(values)
        if len(values) < FEWEST:
            assert found is None
            continue
        assert found.low <= found.estimate <= found.high
        assert 1 <= found.block <= max(1, len(values) // 3)
    if len(values) >= FEWEST:
        assert values.min() <= median(values).low
        assert median(values).high <= values.max()


# From published tables.
@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 10, 2.22814), (0.995, 5, 4.03214), (0.95, 120, 1.65765)],
)
def test_students_t(probability, freedom, expected):
    assert student_t(probability, freedom) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_an_interval_of_rounds_covers_the_difference_of_medians():
    """Both sides of a round share a shift that exceeds the difference, so that rounds are resampled as pairs."""
    random = np.random.default_rng(5)
    rounds, hits, tries = 8, 0, 60
    for _ in range(tries):
        shift = random.normal(0, 30, rounds)
        one = [random.normal(50 + s, 3, 40) for s in shift]
        other = [random.normal(47 + s, 3, 40) for s in shift]

        medians = np.median(one, axis=1) - np.median(other, axis=1)

        def difference(drawn, medians=medians):
            return float(medians[drawn].mean())

        found = of_rounds(difference, rounds)
        assert found.low <= found.estimate <= found.high
        assert found.high - found.low < 10
        hits += found.low <= 3 <= found.high
    assert hits >= 0.9 * tries


def test_an_interval_of_rounds_needs_three_rounds():
    assert of_rounds(lambda drawn: float(drawn.sum()), FEWEST_ROUNDS - 1) is None
    same = of_rounds(lambda drawn: 7.0, FEWEST_ROUNDS)
    assert (same.low, same.estimate, same.high) == (7.0, 7.0, 7.0)
