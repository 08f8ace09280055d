import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from contracts import histogram as h

DELAYS = st.lists(st.integers(-5, 1 << 42), min_size=1)


@given(DELAYS)
def test_bins_hold_their_values_and_have_the_documented_width(values):
    v = np.array(values)
    bins, kept = h.bins_of(v), v.clip(0, h.MAX_NS)
    assert ((bins >= 0) & (bins < h.BINS)).all()
    assert (h.lower_bounds(bins) <= kept).all()
    assert (kept < h.lower_bounds(bins + 1)).all()
    assert (np.abs(h.middles(bins) - kept) <= kept / 256).all()


def test_the_bounds_of_a_bin_lie_in_it():
    bins = np.arange(h.BINS)
    assert (h.bins_of(h.lower_bounds(bins)) == bins).all()
    assert (h.bins_of(h.lower_bounds(bins + 1) - 1) == bins).all()


@given(DELAYS, DELAYS, DELAYS)
def test_merged_histograms_equal_one_of_all_values(a, b, c):
    def counted(values):
        bins, counts = np.unique(h.bins_of(np.array(values)), return_counts=True)
        return bins, counts

    def merged(*parts):
        return h.merge(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))

    whole = counted(a + b + c)
    for found in (merged(*map(counted, (a, b, c))), merged(counted(a), merged(counted(b), counted(c)))):
        assert (found[0] == whole[0]).all()
        assert (found[1] == whole[1]).all()


def test_an_empty_histogram_has_no_quantile():
    empty = np.zeros(0, np.int64)
    assert h.quantiles(empty, empty).tolist() == [0, 0, 0, 0]
    assert [part.tolist() for part in h.merge(empty, empty)] == [[], []]


@given(st.lists(st.lists(st.integers(0, h.MAX_NS), min_size=1, max_size=30), min_size=1, max_size=8))
def test_quantiles_of_many_histograms_equal_those_of_each(values):
    each = [np.unique(h.bins_of(np.array(one)), return_counts=True) for one in values]
    bins, counts = (np.concatenate(part) for part in zip(*each, strict=True))
    edges = np.append(0, np.cumsum([len(one) for one, _ in each]))
    found = h.quantiles_of_each(bins, counts, edges)
    assert found.T.tolist() == [h.quantiles(*one).tolist() for one in each]
