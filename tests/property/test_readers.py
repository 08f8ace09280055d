"""How much of made-up deliveries a made-up reader waited, against the plan that made them, however they are cut."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.scheduling import Copies, TaskChange, TaskChanges, TaskReading
from contracts.schema import Delays, Direction, Segment
from correlator.readers import NEAR_NS, Readers

OFFSET_NS = 1_700_000_000_000_000_000
READER, OTHER = 4711, 4712
NETNS = np.array([11, 12])
WORK, PAUSE = st.integers(200, 4_000), st.integers(100_000, 5_000_000)
WAIT = st.one_of(st.just(0), st.integers(1_000, 3_000_000))


@dataclass
class Plan:
    """One reader's run: its changes, its copies, its waits, and when each packet that it copied had arrived."""

    now: int = 10_000_000
    changes: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)
    delivered: list[tuple[int, int]] = field(default_factory=list)

    def change(self, change, after=0):
        self.now += after
        self.changes.append((self.now, READER, change))

    def ready(self, wait):
        self.waits.append((self.now, self.now + wait))
        self.change(TaskChange.RUNS, wait)

    def copy(self, arrived, off=0):
        self.delivered.append((arrived, self.now))
        self.copies.append((self.now + off, READER, 11))

    def expected(self):
        return [sum(max(min(e, end) - max(b, begin), 0) for b, e in self.waits) for begin, end in self.delivered]


@st.composite
def plans(draw):
    plan = Plan()
    plan.change(TaskChange.WOKEN)
    plan.ready(draw(WAIT))
    for _ in range(draw(st.integers(1, 8))):
        plan.now += draw(WORK)
        arrived = plan.now
        plan.now += draw(WORK)
        if draw(st.booleans()):
            plan.change(TaskChange.SLEEPS)
            arrived = plan.now = plan.now + draw(PAUSE)
            plan.change(TaskChange.WOKEN, draw(WORK))
            plan.ready(draw(WAIT))
        for _ in range(draw(st.integers(0, 2))):
            plan.change(TaskChange.PREEMPTED, draw(WORK))
            plan.ready(draw(WAIT))
        plan.now += draw(WORK)
        plan.copy(arrived, draw(st.integers(-100, 100)))
        plan.now += NEAR_NS
    return plan


def table(kind, rows):
    names = kind._DTYPES
    return kind(**{n: np.array([row[i] for row in rows], dtype) for i, (n, dtype) in enumerate(names.items())})


def readings(plan, cuts, gaps=()):
    """The plan's events in readings, cut at these times."""
    edges = [0, *sorted(cuts), 1 << 62]
    for first, last in pairwise(edges):
        changes, copies = ([row for row in rows if first <= row[0] < last] for rows in (plan.changes, plan.copies))
        yield last, TaskReading(table(TaskChanges, changes), table(Copies, copies), tuple(gaps if not first else ()))


def delays(delivered, device=0):
    columns = {name: np.zeros(len(delivered), dtype) for name, dtype in Delays._DTYPES.items()}
    begin, end = np.array(delivered, np.int64).reshape(-1, 2).T
    columns |= {"utc_ns": begin + OFFSET_NS, "delay_ns": end - begin, "packet": np.arange(len(begin), dtype=np.uint64)}
    columns["device"] += device
    columns["segment"] += np.uint8(Segment.DELIVERY)
    columns["direction"] += np.uint8(Direction.INGRESS)
    return Delays(**columns)


def found(plan, cuts=(), gaps=(), device=0):
    readers, left, told = Readers(OFFSET_NS), list(plan.delivered), {}
    for upto, reading in readings(plan, cuts, gaps):
        readers.add(reading)
        ready = [each for each in left if each[1] + 200 < upto]
        left = left[len(ready) :]
        waits = readers.waits(delays(ready, device), NETNS)
        told |= {ready[n]: w for n, w in zip(waits.packet.astype(int).tolist(), waits.delay_ns.tolist(), strict=True)}
        if left:
            readers.forget(left[0][0] + OFFSET_NS)
    return [told.get(each) for each in plan.delivered]


@given(plans())
def test_the_waits_within_each_delivery(plan):
    # The tracer's own time of a copy is some ns off, in which the reader runs.
    assert found(plan) == plan.expected()


@given(plans(), st.data())
def test_the_readings_may_be_cut_anywhere(plan, data):
    cuts = data.draw(st.lists(st.integers(plan.changes[0][0], plan.now), max_size=6))
    assert found(plan, cuts) == plan.expected()


@given(plans())
def test_a_reader_in_another_namespace_is_none(plan):
    assert found(plan, device=1) == [None] * len(plan.delivered)


@given(plans(), st.data())
def test_two_readers_of_a_namespace_at_one_time_are_none(plan, data):
    chosen = data.draw(st.integers(0, len(plan.copies) - 1))
    plan.copies.insert(chosen + 1, (plan.copies[chosen][0] + 50, OTHER, 11))
    expected = plan.expected()
    told = found(plan)
    assert told[chosen] is None
    assert told[:chosen] + told[chosen + 1 :] == expected[:chosen] + expected[chosen + 1 :]


@given(plans())
def test_two_readers_of_two_namespaces_are_told_apart(plan):
    plan.copies = [row for at, pid, netns in plan.copies for row in ((at, pid, netns), (at + 50, OTHER, 12))]
    assert found(plan) == plan.expected()


@given(plans(), st.data())
def test_where_events_were_lost_nothing_is_known(plan, data):
    chosen = data.draw(st.integers(0, len(plan.delivered) - 1))
    begin, end = plan.delivered[chosen]
    at = data.draw(st.integers(begin, end))
    told = found(plan, gaps=[(at, at)])
    assert told[chosen] is None
    assert all(mine in (None, its) for mine, its in zip(told, plan.expected(), strict=True))


def test_a_wait_whose_beginning_was_not_seen_is_not_known():
    plan = Plan()
    plan.change(TaskChange.RUNS)
    plan.copy(plan.now - 500_000)
    plan.change(TaskChange.SLEEPS, 1_000)
    arrived = plan.now + 1_000
    plan.change(TaskChange.WOKEN, 2_000)
    plan.ready(30_000)
    plan.now += 10
    plan.copy(arrived)
    assert found(plan) == [None, 30_000]


@pytest.mark.parametrize("lost", [1, 3_000])
def test_a_gap_since_a_task_s_last_change_is_remembered(lost):
    """It has lost that the task ran and slept, so that its last known change is a preemption."""
    plan = Plan()
    plan.change(TaskChange.WOKEN)
    plan.ready(1_000)
    plan.change(TaskChange.PREEMPTED, 1_000)
    gaps = tuple((plan.now + 10 * n + 1, plan.now + 10 * n + 2) for n in range(lost))
    readers = Readers(0)
    readers.add(TaskReading(table(TaskChanges, plan.changes), Copies.empty(), gaps))
    readers.forget(plan.now + 1_000_000)
    assert len(readers._gaps) <= 1_000
    plan.changes, plan.now = [], plan.now + 2_000_000
    arrived = plan.now
    plan.change(TaskChange.WOKEN, 500)
    plan.ready(500)
    plan.now += 10
    plan.copy(arrived)
    readers.add(TaskReading(table(TaskChanges, plan.changes), table(Copies, plan.copies), ()))
    assert len(readers.waits(replace(delays(plan.delivered), utc_ns=np.array([arrived])), NETNS)) == 0


@pytest.mark.parametrize("count", [1, 50])
def test_few_changes_of_a_task_are_kept(count):
    """A reader that sleeps for hours keeps its last changes, and one that has ended keeps none."""
    plan = Plan()
    for _ in range(count):
        plan.change(TaskChange.WOKEN, 1_000)
        plan.ready(1_000)
        plan.change(TaskChange.SLEEPS, 1_000)
    readers = Readers(0)
    for _, reading in readings(plan, ()):
        readers.add(reading)
    readers.forget(plan.now + 3_600_000_000_000)
    assert len(readers._changes) == min(3 * count, 4)
    readers.add(TaskReading(table(TaskChanges, [(plan.now + 10, READER, TaskChange.ENDED)]), Copies.empty(), ()))
    readers.forget(plan.now + 3_600_000_000_000)
    assert len(readers._changes) == 0
