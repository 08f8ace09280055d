"""The reader of a ring has real-time priority while the ring fills, and only then."""

import os
import threading

import pytest

from collector.live.urgency import Urgency

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def urgency():
    found = Urgency(begins=0.4)
    yield found
    found.end()


def policy():
    """Return the scheduling policy of this thread, without the flag SCHED_RESET_ON_FORK."""
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


def test_priority_lasts_from_a_filling_ring_to_an_empty_one(urgency):
    seen = []
    for filled in (0.0, 0.39, 0.4, 0.3, 0.2, 0.19, 0.3, 1.0, 0.0):
        urgency.felt(filled)
        seen.append(policy() == os.SCHED_RR)
    assert seen == [False, False, True, True, True, False, False, True, False]


def test_started_threads_have_the_ordinary_policy(urgency):
    urgency.felt(1.0)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    assert (policy(), seen) == (os.SCHED_RR, [os.SCHED_OTHER])


def test_a_policy_that_the_user_chose_stays():
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        urgency = Urgency(begins=0.4)
        urgency.felt(1.0)
        urgency.end()
        assert policy() == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_a_missing_privilege_is_only_logged(monkeypatch, caplog):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    urgency = Urgency(begins=0.4)
    with caplog.at_level("INFO"):
        for _ in range(3):
            urgency.felt(1.0)
    urgency.end()
    assert caplog.text.count("real time") == 1
