"""Which tasks are followed, and how often they are searched for, without a kernel that traces."""

from types import SimpleNamespace

import pytest

from collector.ftrace import readers
from collector.ftrace.readers import LOOK_S, ReaderTrace


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose processes and clock the test sets; `looked` has the number of searches."""
    here = SimpleNamespace(processes={11: [100]}, tasks={100: [100, 101], 200: [200]}, now=5.0, looked=0)
    here.list = tmp_path / "set_event_pid"
    here.list.write_text("7\n")

    def occupied():
        here.looked += 1
        return here.processes

    monkeypatch.setattr(readers, "occupied", occupied)
    monkeypatch.setattr(readers, "_tasks", lambda process: here.tasks.get(process, []))
    monkeypatch.setattr(readers.time, "monotonic", lambda: here.now)
    return here


@pytest.fixture
def trace(machine, monkeypatch):
    made = ReaderTrace()
    monkeypatch.setattr(made, "read", lambda: None)
    made._own.instance = SimpleNamespace(path=machine.list.parent)
    yield made
    made._own.instance = None


def test_tasks_are_searched_for_once_a_second_and_added_once(machine, trace):
    for _ in range(5):
        trace.reading({11, 12})  # 12 has no process
    assert machine.looked == 1
    assert machine.list.read_text() == "7\n100 101"
    machine.now += LOOK_S
    machine.tasks[100] = [100, 102]
    trace.reading({11, 12})
    assert machine.looked == 2
    assert machine.list.read_text().endswith("101102")  # each writing is a list of its own for the kernel


def test_a_new_namespace_is_searched_at_once(machine, trace):
    trace.reading({11})
    machine.processes[12] = [200]
    trace.reading({11, 12})
    assert machine.looked == 2
    assert machine.list.read_text().endswith("200")
    assert (trace._netns[100], trace._netns[200]) == (11, 12)


def test_without_a_namespace_nothing_is_searched(machine, trace):
    trace.reading(frozenset())
    assert machine.looked == 0
    assert machine.list.read_text() == "7\n"


def test_children_are_in_the_namespace_of_their_parent(trace):
    trace.reading({11})
    trace._forks = [(150, 151), (101, 150), (999, 998)]
    trace._add_children()
    assert (trace._netns[150], trace._netns[151]) == (11, 11)
    assert {150, 151} <= trace._family
    assert 998 not in trace._family
    assert trace._forks == []


def test_a_task_that_has_ended_is_known_until_the_second_search_after(machine, trace):
    trace.reading({11})
    machine.processes = {}
    for known in (True, False):
        machine.now += LOOK_S
        trace.reading({11})
        assert (100 in trace._family) is known
