"""Receive softirqs: counts equal those of a naive loop, for any events and cuts, and on this machine's kernel."""

import os
import subprocess
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.ftrace.softirqs import SoftirqCounter, SoftirqEvents, SoftirqTrace, ksoftirqd
from contracts.histogram import bins_of
from tests.measuring import trace_instances

RAISE, ENTRY, EXIT = 0, 1, 2
KSOFTIRQD = 14


def naive(events):
    """Return count, count by ksoftirqd, sum of runs, and the waits."""
    raised = entered = None
    count = mine = run_ns = 0
    waits = []
    for ts, kind, pid in events:
        if kind == RAISE:
            raised = ts if raised is None else raised
        elif kind == ENTRY:
            entered, raised = (ts, pid, raised), None
        elif entered is not None:
            began, task, since = entered
            count, mine, run_ns = count + 1, mine + (task == KSOFTIRQD), run_ns + ts - began
            waits += [] if since is None else [began - since]
            entered = None
    return count, mine, run_ns, waits


def columns(events):
    ts, kind, pid = zip(*events, strict=True) if events else ((), (), ())
    return SoftirqEvents(np.array(ts, np.int64), np.array(kind, np.uint8), np.array(pid, np.int64))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([RAISE, ENTRY, EXIT]), st.sampled_from([1, KSOFTIRQD]))),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_counts_equal_naive_counts(steps, cuts):
    """Events in any order: the ring may have lost some without a count, and the trace begins in the middle."""
    ts = np.cumsum([step for step, *_ in steps]).tolist()
    events = [(at, kind, pid) for at, (_, kind, pid) in zip(ts, steps, strict=True)]
    counter = SoftirqCounter(3)
    for a, b in pairwise([0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]):
        counter.add(columns(events[a:b]), np.array([KSOFTIRQD]))
    found = counter.taken(9)
    count, mine, run_ns, waits = naive(events)
    assert (found.utc_ns, found.cpu, found.lost) == (9, 3, 0)
    assert (found.count, found.by_ksoftirqd, found.run_ns) == (count, mine, run_ns)
    assert (found.wait_ns, found.wait_max_ns) == (sum(waits), max(waits, default=0))
    assert np.repeat(found.bins, found.counts).tolist() == sorted(bins_of(np.array(waits, np.int64)).tolist())
    again = counter.taken(10)
    assert (again.count, again.run_ns, again.wait_ns, len(again.bins)) == (0, 0, 0, 0)


def test_nothing_is_counted_over_a_gap():
    counter = SoftirqCounter(0)
    counter.add(columns([(1, RAISE, 1), (2, ENTRY, 1)]), ksoftirqd())
    counter.gap(5)
    counter.add(columns([(9, EXIT, 1), (10, ENTRY, 1), (12, EXIT, 1)]), ksoftirqd())
    found = counter.taken(0)
    assert (found.count, found.run_ns, found.wait_ns, len(found.bins), found.lost) == (1, 2, 0, 0, 5)


@pytest.mark.needs("root", "tracefs")
def test_pings_of_this_machine():
    """Each echo request and reply on the loopback is a softirq of its own, because the next waits for the reply."""
    pings, cpu = 50, min(os.sched_getaffinity(0))
    trace = SoftirqTrace()
    trace.open()
    try:
        argv = ["taskset", "-c", str(cpu), "ping", "-q", "-c", str(pings), "-i", "0.002", "127.0.0.1"]
        subprocess.run(argv, check=True, capture_output=True)
        found = {each.cpu: each for each in trace.taken()}[cpu]
    finally:
        trace.close()
    assert found.count + found.lost >= pings
    assert 0 <= found.by_ksoftirqd <= found.count
    assert 0 < int(found.counts.sum()) <= found.count
    assert 0 < found.wait_max_ns <= found.wait_ns
    assert found.run_ns > 0
    assert trace_instances(os.getpid()) == []
