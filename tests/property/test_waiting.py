"""How long a made-up tool waited for a CPU, from the changes of its task, and from the plan that made them."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.scheduling import TaskChange, TaskChanges
from correlator.correction import Corrections, Reason
from correlator.samples import Samples
from correlator.stamps import PING, PING_USER
from correlator.waiting import UNKNOWN, Waited, waited

OFFSET_NS = 1_700_000_000_000_000_000
TOOL, SHELL = 4711, 4710
# A wait is longer than all that the tool does by itself between two waits, as it is on a machine.
WORK = st.integers(200, 4_000)
WAIT = st.one_of(st.just(0), st.integers(50_000, 3_000_000))


@dataclass
class Plan:
    """One tool's run: its changes, its waits, and what was true of each sample. CLOCK_MONOTONIC, ns."""

    now: int = 10_000_000
    changes: list[tuple[int, int, int]] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)

    def change(self, change, after=0, pid=TOOL):
        self.now += after
        self.changes.append((self.now, pid, change))

    def ready(self, wait):
        """The tool waits, and runs."""
        self.waits.append((self.now, self.now + wait))
        self.change(TaskChange.RUNS, wait)

    def preempted(self, wait):
        if wait:
            self.change(TaskChange.PREEMPTED)
            self.ready(wait)

    def woken(self, wait):
        self.change(TaskChange.WOKEN)
        self.ready(wait)

    def waited(self, begin, end):
        """The waits between two times, cut at both."""
        return sum(max(min(e, end) - max(b, begin), 0) for b, e in self.waits)

    def table(self):
        """Changes in the order of time, with a shell that started the tool and sleeps."""
        first = self.changes[0][0]
        shell = [(first - 300, SHELL, TaskChange.RUNS), (first - 200, SHELL, TaskChange.SLEEPS)]
        ts, pid, change = zip(*shell, *self.changes, strict=True)
        return TaskChanges(np.array(ts), np.array(pid, np.int32), np.array(change, np.uint8))


@st.composite
def plans(draw, mixed=False):
    """`mixed`: the tool is preempted both inside and outside of one round trip, which nobody can tell apart."""
    plan = Plan()
    for _ in range(draw(st.integers(1, 6))):
        outside = draw(st.booleans())
        within, beside = (WAIT if mixed or outside == there else st.just(0) for there in (False, True))
        woken = plan.now
        plan.woken(draw(WAIT))
        plan.now += draw(st.integers(15_000, 30_000))
        plan.preempted(draw(beside))
        plan.now += draw(st.integers(15_000, 30_000))  # longer than the tool's own work after a reply
        sent = plan.now
        plan.now += draw(WORK)
        plan.preempted(draw(within))
        plan.now += draw(WORK)
        queued = plan.now
        if draw(st.booleans()):  # the reply is there before the tool asks for it
            arrived = queued + draw(st.integers(100, 10_000))
            plan.now = arrived + draw(WORK)
            plan.preempted(draw(within))
            receive = 0
        elif draw(st.booleans()):  # the reply arrives while the tool waits
            plan.now += draw(WORK)
            wait = draw(st.integers(50_000, 3_000_000))
            arrived = plan.now + draw(st.integers(0, wait - 1))
            receive = plan.now + wait - arrived
            plan.preempted(wait)
        else:
            plan.change(TaskChange.SLEEPS, draw(WORK))
            arrived = plan.now = plan.now + draw(st.integers(1_000, 5_000_000))
            plan.now += draw(WORK)
            receive = draw(WAIT)
            plan.woken(receive)
        plan.now += draw(WORK)
        read = plan.now
        plan.samples.append(
            {
                "sent": sent, "queued": queued, "arrived": arrived, "read": read, "woken": woken, "receive": receive,
            }
        )  # fmt: skip
        plan.now += draw(WORK)
        plan.preempted(draw(beside))
        plan.change(TaskChange.SLEEPS, draw(WORK))
        plan.now += draw(st.integers(100_000, 20_000_000))
    return plan


def found(plan, stamps, *, gaps=(), changes=None, user=False):
    rows = plan.samples
    count = len(rows)
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    rtt = (column["read"] if user else column["arrived"]) - column["sent"]
    corrections = Corrections(**{name: np.zeros(count, dtype) for name, dtype in Corrections._DTYPES.items()})
    corrections.reason[:] = Reason.PAIRED
    corrections.sent_utc_ns[:] = column["queued"] + OFFSET_NS
    corrections.arrived_utc_ns[:] = column["arrived"] + OFFSET_NS
    corrections.tool_rtt_ns[:] = rtt
    samples = Samples.of(count, rtt_ns=rtt)
    return waited(samples, corrections, stamps, plan.table() if changes is None else changes, gaps, OFFSET_NS)


@given(plans(mixed=True))
def test_with_the_kernels_clock_only_waits_before_the_request_count(plan):
    told = found(plan, PING)
    assert told.temporal_error_ns.tolist() == [plan.waited(s["sent"], s["queued"]) for s in plan.samples]


@given(plans())
def test_with_the_users_clock_waits_after_the_reply_count_too(plan):
    told = found(plan, PING_USER, user=True)
    assert told.temporal_error_ns.tolist() == [
        plan.waited(s["sent"], s["queued"]) + plan.waited(s["arrived"], s["read"]) for s in plan.samples
    ]


@given(plans(mixed=True))
def test_the_temporal_error_fits_into_the_round_trip(plan):
    told = found(plan, PING_USER, user=True)
    for error, s in zip(told.temporal_error_ns.tolist(), plan.samples, strict=True):
        assert plan.waited(s["arrived"], s["read"]) * (s["receive"] > 0) <= error
        assert error <= s["queued"] - s["sent"] + s["read"] - s["arrived"]


@given(plans(mixed=True))
def test_what_the_tool_waited_on_sending_and_on_receiving(plan):
    told = found(plan, PING_USER, user=True)
    assert told.send_ns.tolist() == [plan.waited(s["woken"], s["queued"]) for s in plan.samples]
    assert told.receive_ns.tolist() == [s["receive"] for s in plan.samples]


def assert_known_are_the_same(part, whole):
    for name in Waited._DTYPES:
        assert (getattr(part, name)[part.known] == getattr(whole, name)[part.known]).all()


@given(plans(mixed=True), st.data())
def test_lost_changes_make_the_samples_beside_them_unknown(plan, data):
    """What is still known is what was known with all changes."""
    table = plan.table()
    begin = data.draw(st.integers(0, len(table) - 1))
    end = data.draw(st.integers(begin + 1, len(table)))
    keep = np.r_[0:begin, end : len(table)]
    gap = (int(table.ts_ns[begin]) - 1, int(table.ts_ns[end - 1]) + 1)
    whole = found(plan, PING_USER, user=True)
    part = found(plan, PING_USER, user=True, gaps=[gap], changes=table[keep])
    assert_known_are_the_same(part, whole)
    inside = [s["queued"] <= gap[1] and s["arrived"] >= gap[0] for s in plan.samples]
    assert not part.known[inside].any()


@given(plans(mixed=True), st.data())
def test_a_kernel_that_records_some_switches_to_the_task_not_at_all(plan, data):
    """No reader counts these; a kernel does so for switches from the idle task of some CPU."""
    table = plan.table()
    runs = np.flatnonzero((table.change == TaskChange.RUNS) & (table.pid == TOOL))
    lost = data.draw(st.lists(st.sampled_from(runs.tolist()), min_size=1, unique=True))
    whole = found(plan, PING_USER, user=True)
    part = found(plan, PING_USER, user=True, changes=table[np.delete(np.arange(len(table)), lost)])
    assert_known_are_the_same(part, whole)
    for row in lost:
        ran = int(table.ts_ns[row])
        within = [s["sent"] <= ran <= s["read"] for s in plan.samples]
        assert not part.known[within].any()


def test_two_tasks_that_may_both_have_sent_a_sample_leave_it_unknown():
    plan = Plan()
    plan.woken(0)
    queued = plan.now + 1_000
    plan.samples.append({"sent": queued - 100, "queued": queued, "arrived": queued + 500, "read": queued + 900})
    plan.change(TaskChange.SLEEPS, 5_000)
    alone = found(plan, PING)
    assert alone.known.all()
    twin = [(ts, TOOL + 1, change) for ts, _, change in plan.changes]
    plan.changes += twin
    assert (found(plan, PING).temporal_error_ns == UNKNOWN).all()


@pytest.mark.parametrize("changes", [[], [(1, TOOL, TaskChange.WOKEN)], [(1, TOOL, TaskChange.SLEEPS)]])
def test_without_a_task_that_ran_nothing_is_known(changes):
    plan = Plan(samples=[{"sent": 0, "queued": 1, "arrived": 2, "read": 3}])
    ts, pid, change = (np.array(column) for column in zip(*changes, strict=True)) if changes else [np.zeros(0)] * 3
    table = TaskChanges(ts.astype(np.int64), pid.astype(np.int32), change.astype(np.uint8))
    assert not found(plan, PING, changes=table).known.any()
