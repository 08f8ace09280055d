"""The test for lost records between two times."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from correlator.lives import spans_gap

TIMES = st.integers(-20, 20)
FOREVER = -(1 << 63) + 1


@given(
    st.lists(st.tuples(st.one_of(TIMES, st.just(FOREVER)), TIMES).map(sorted).map(tuple), max_size=6),
    st.lists(st.tuples(TIMES, TIMES).map(sorted), max_size=8),
)
def test_a_gap_that_overlaps_is_found(gaps, asked):
    after, before = np.array(asked, np.int64).reshape(-1, 2).T
    wanted = [any(start < b and end > a for start, end in gaps) for a, b in asked]
    assert spans_gap(gaps, after, before).tolist() == wanted
