"""No two slices on one lane overlap, and slices that do not overlap share the first lane."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.perfetto.lanes import Lanes

slices = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 12)), max_size=25)


@given(st.lists(slices, min_size=1, max_size=4))
def test_slices_on_a_lane_follow_one_another(calls):
    lanes, placed = Lanes(), {}
    for call in calls:
        call = sorted(call, key=lambda one: one[1])
        group, begin, length = (np.array([one[i] for one in call], np.int64) for i in range(3))
        for lane, (which, start, size) in zip(lanes.place(group, begin, begin + length).tolist(), call, strict=True):
            placed.setdefault((which, lane), []).append((start, start + size))
    for ranges in placed.values():
        for (_, end), (start, _) in pairwise(sorted(ranges)):
            assert start >= end


@given(slices)
def test_a_slice_gets_the_first_free_lane(call):
    call = sorted(call, key=lambda one: one[1])
    group, begin, length = (np.array([one[i] for one in call], np.int64) for i in range(3))
    until, expected = {}, []
    for which, start, size in call:
        lane = next(n for n in range(len(call) + 1) if until.get((which, n), 0) <= start)
        until[which, lane] = start + size
        expected.append(lane)
    assert Lanes().place(group, begin, begin + length).tolist() == expected
