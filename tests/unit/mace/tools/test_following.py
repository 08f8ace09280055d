"""What is said of a tool whose waits are not known, and of its control group."""

import os

import pytest

from collector.ftrace.scheduling import TaskTrace
from collector.machine.cgroups import CpuWant
from contracts.errors import SourceError, Unavailable
from correlator.waiting import Waited
from mace.tools.following import Followed, Following


class Refusing(TaskTrace):
    """A trace that fails at one of its calls, as on a machine without tracefs, or when it is unmounted."""

    def __init__(self, fails):
        super().__init__()
        self.fails, self.closed = fails, False

    def _fail_at(self, name):
        if name == self.fails:
            raise Unavailable("ftrace", "tracefs is for root only", "run as root (sudo)")

    def open(self):
        self._fail_at("open")

    def read(self):
        self._fail_at("read")

    def finish(self):
        self._fail_at("finish")

    def close(self):
        self.closed = True


@pytest.mark.parametrize("fails", ["open", "read", "finish"])
def test_what_cannot_be_followed_is_said_and_stops_nothing(fails, monkeypatch):
    made = Refusing(fails)
    monkeypatch.setattr("mace.tools.following.TaskTrace", lambda: made)
    with Following.opened() as following:
        following.started(os.getpid())
        following.read()
        following.read()
        found = following.finished(*no_samples())
    assert made.closed
    assert found.as_dict()["why_not"] == "ftrace: tracefs is for root only; run as root (sudo)"
    assert next(found.remarks()).startswith("waiting for a CPU is not known: ftrace: tracefs is for root only")


def no_samples():
    from correlator.correction import Corrections
    from correlator.samples import Samples
    from correlator.stamps import PING

    return Samples.of(0), Corrections.empty(), PING, 0


def test_another_error_of_the_trace_is_said_too(monkeypatch):
    made = Refusing(None)
    made.read = lambda: (_ for _ in ()).throw(SourceError("ring of CPU 0: a page has an event of no valid length"))
    monkeypatch.setattr("mace.tools.following.TaskTrace", lambda: made)
    with Following.opened() as following:
        following.read()
        assert "no valid length" in following.finished(*no_samples()).why_not


@pytest.mark.parametrize(
    ("want", "said"),
    [
        (None, []),
        (CpuWant(None, None, None), []),
        (CpuWant(0, 0, 9_000_000), []),
        (
            CpuWant(3, 210_000_000, 370_000_000),
            [
                "the tool's control group used up its CPU quota 3 times, for 210.0 ms",
                "pressure (PSI): some task waited for a CPU in 37% of the time",
            ],
        ),
        (CpuWant(0, 0, 1_100_000_000), ["pressure (PSI): some task waited for a CPU in 100% of the time"]),
    ],
)
def test_quota_and_pressure_are_said_where_they_matter(want, said):
    assert list(Followed(Waited.unknown(0), "", want, 1_000_000_000).remarks()) == said
