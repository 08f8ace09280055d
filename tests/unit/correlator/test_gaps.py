"""Gaps of several CPUs: merged to disjoint stretches, and few of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from correlator import gaps
from correlator.gaps import disjoint, few

TIMES = st.integers(-20, 20)
FOREVER = -(1 << 63) + 1
GAPS = st.lists(st.tuples(st.one_of(TIMES, st.just(FOREVER)), TIMES).map(sorted), max_size=6)


def array(of):
    return np.array(of, np.int64).reshape(-1, 2)


@given(GAPS, st.lists(st.tuples(TIMES, TIMES).map(sorted), max_size=8))
def test_disjoint_gaps_overlap_the_same_times(given_gaps, asked):
    starts, ends = disjoint(array(given_gaps))
    assert (starts[1:] >= ends[:-1]).all()
    for after, before in asked:
        wanted = any(start < before and end > after for start, end in given_gaps)
        assert ((starts < before) & (ends > after)).any() == wanted


@given(GAPS)
def test_few_gaps_cover_all(given_gaps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "MOST", 3)
        kept = few(array(given_gaps))
    assert len(kept) <= 3
    assert all(any(start <= a and b <= end for start, end in kept.tolist()) for a, b in given_gaps)
