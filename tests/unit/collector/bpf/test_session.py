"""The places of the BPF programs, which they read while the session replaces them."""

import random

import numpy as np

from collector.bpf.layout import NO_PLACE, STATE
from collector.bpf.session import _replace


def in_use(state):
    return [number for number in state["netns"][: state["netns_count"]].tolist() if number != NO_PLACE]


def test_places_that_stay_keep_their_element():
    """A program that looks while places change must find every place that is in the old set and in the new one."""
    made = random.Random(7)
    state = np.zeros((), STATE)
    before = []
    for _ in range(300):
        wanted = made.sample(range(1, 40), made.randrange(17))
        elements = state["netns"].tolist()
        _replace(state["netns"], state["netns_count"], wanted)
        assert sorted(in_use(state)) == sorted(wanted)
        for stays in set(before) & set(wanted):
            assert state["netns"][elements.index(stays)] == stays
        before = wanted
    _replace(state["netns"], state["netns_count"], [])
    assert state["netns_count"] == 0
