"""A program's tasks, followed through the scheduler of this machine."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest

from collector.ftrace.scheduling import TaskTrace
from contracts.errors import Unavailable
from contracts.scheduling import TaskChange, TaskChanges
from tests.measuring import trace_instances
from tests.places import ROOT

pytestmark = pytest.mark.needs("root", "tracefs")

CPU = str(min(os.sched_getaffinity(0)))
BEHIND = ("taskset", "-c", CPU, "nice", "-n", "19")
"""Runs a program where `in_the_way` runs, and mostly after it."""
ON, OFF = {TaskChange.RUNS}, {TaskChange.PREEMPTED, TaskChange.SLEEPS, TaskChange.ENDED}


@contextmanager
def in_the_way():
    busy = subprocess.Popen(["taskset", "-c", CPU, "sh", "-c", "while :; do :; done"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


@contextmanager
def traced(**how):
    trace = TaskTrace(**how)
    trace.open()
    try:
        yield trace
    finally:
        trace.close()


def followed(*argv, **how):
    """Run a program to its end; returns its trace, its changes and its output."""
    with traced(**how) as trace:
        program = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        trace.follow(program.pid)
        said, _ = program.communicate(timeout=120)
        trace.finish()
    return trace, TaskChanges.concatenate(trace.changes), said


def of_task(changes, pid):
    mine = changes[changes.pid == pid]
    return mine.ts_ns.tolist(), [TaskChange(change) for change in mine.change.tolist()]


def test_children_and_threads_are_followed_and_nobody_else():
    script = "import os, threading; t = threading.Thread(target=lambda: print(threading.get_native_id())); t.start()"
    stranger = subprocess.Popen(["sleep", "0.01"])
    trace, changes, said = followed("sh", "-c", f"echo $$; {sys.executable} -c '{script}'; sleep 0.01 & echo $!; wait")
    stranger.wait()
    assert not trace.gaps
    parts = set(map(int, said.split()))
    seen = set(changes.pid.tolist())
    assert len(parts) == 3
    assert parts < seen  # and Python's first thread
    assert not {os.getpid(), stranger.pid} & seen


def test_a_task_runs_and_stops_in_turns_until_it_ends():
    """Some kernels record no switch from the idle task of some CPU, so that a task may stop twice in a row."""
    _, changes, said = followed("sh", "-c", "echo $$; sleep 0.01; sleep 0.01")
    assert (np.diff(changes.ts_ns) >= 0).all()
    _, kinds = of_task(changes, int(said))
    switches = [kind for kind in kinds if kind is not TaskChange.WOKEN]
    assert not [pair for pair in pairwise(switches) if set(pair) <= ON]
    assert switches[-1] is TaskChange.ENDED
    assert switches.count(TaskChange.SLEEPS) >= 2


@pytest.mark.slow
@pytest.mark.needs("schedstat")
def test_waits_add_up_to_what_the_kernel_counts():
    """/proc/PID/schedstat has the time on a run queue without a CPU, by the scheduler's own account."""
    script = (
        "import time\n"
        "account = lambda: int(open('/proc/thread-self/schedstat').read().split()[1])\n"
        "for _ in range(60):\n"
        "    time.sleep(0.002)\n"
        "    for _ in range(5_000): pass\n"
        "    print(time.monotonic_ns(), account(), time.monotonic_ns())\n"
    )
    with in_the_way():
        _, changes, said = followed(*BEHIND, sys.executable, "-c", script)
    marks = [tuple(map(int, line.split())) for line in said.splitlines()]
    (pid,) = set(changes.pid.tolist())
    switches = [change for change in zip(*of_task(changes, pid), strict=True) if change[1] is not TaskChange.WOKEN]
    unsaid = [(first, last) for (first, one), (last, other) in pairwise(switches) if {one, other} <= OFF]
    waits, since = [], None
    for ts, kind in zip(*of_task(changes, pid), strict=True):
        if kind in (TaskChange.WOKEN, TaskChange.PREEMPTED):
            since = since or ts
        elif kind is TaskChange.RUNS and since:
            waits.append((since, ts))
            since = None
    counted = waited = parts = 0
    for (asked, before, began), (ended, after, answered) in pairwise(marks):
        if any(first < ended and last > began for first, last in unsaid):
            continue
        # Of a wait while the account was read it is not known whether the account had it.
        read = ((asked, began), (ended, answered))
        if any(start < last and end > first for start, end in waits for first, last in read):
            continue
        parts += 1
        counted += after - before
        waited += sum(end - start for start, end in waits if began <= start and end <= ended)
    assert parts > len(marks) // 2
    assert counted > 0
    # From the wake-up to the run queue is a part of the wait of which the account knows nothing.
    assert 0.9 * counted < waited < 1.1 * counted


def test_a_ring_that_overflows_says_where():
    with traced(ring_kib_per_cpu=8) as trace:
        program = subprocess.Popen(["sh", "-c", "i=0; while [ $i -lt 400 ]; do /bin/true; i=$((i+1)); done"])
        trace.follow(program.pid)
        began_ns = time.monotonic_ns()
        program.wait()
        trace.finish()
        assert trace.gaps
        assert all(start < end for start, end in trace.gaps)
        assert max(end for _, end in trace.gaps) > began_ns


def test_reading_in_between_changes_nothing():
    with traced() as trace:
        program = subprocess.Popen(["sh", "-c", "for n in 1 2 3 4 5 6 7 8; do sleep 0.01; done"])
        trace.follow(program.pid)
        while program.poll() is None:
            trace.read()
        trace.finish()
        whole = TaskChanges.concatenate(trace.changes)
    assert len(trace.changes) > 1
    assert (np.diff(whole.ts_ns) >= 0).all()
    _, kinds = of_task(whole, program.pid)
    assert kinds.count(TaskChange.SLEEPS) >= 8  # sh waits for each
    assert kinds[-1] is TaskChange.ENDED


def test_nothing_stays_behind():
    with traced():
        assert len(trace_instances(os.getpid())) == 1
    assert not trace_instances(os.getpid())


@pytest.mark.slow
def test_in_a_pid_namespace_of_its_own_numbers_mean_others():
    script = "from collector.ftrace.scheduling import TaskTrace; TaskTrace().open()"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"{Unavailable.__name__}: ftrace: this process has a PID namespace of its own" in done.stderr
    assert "--pid=host" in done.stderr


def test_a_trace_removes_the_instance_of_a_killed_one_but_not_of_a_live_one():
    script = (
        "import sys; from collector.ftrace.scheduling import TaskTrace; TaskTrace().open(); print(flush=True); "
        "sys.stdin.read()"
    )
    live, killed = (
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        for _ in range(2)
    )
    try:
        for process in (live, killed):
            assert process.stdout.readline() == b"\n"
        killed.kill()
        killed.communicate()
        assert len(trace_instances(killed.pid)) == 1
        with traced():
            assert trace_instances(killed.pid) == []
            assert len(trace_instances(live.pid)) == 1
        live.communicate()
        assert live.returncode == 0
        assert trace_instances(live.pid) == []
    finally:
        for process in (live, killed):
            process.kill()
            process.communicate()
