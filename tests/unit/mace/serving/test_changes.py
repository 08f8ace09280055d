import pytest

from mace.serving.changes import Changes
from tests.made_results import header, make_delays, make_results
from tests.unit.storage.stored import fill


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def add(tmp_path):
    """Return a function that changes the store."""

    def added(number):
        fill(tmp_path, [make_results(make_delays(10))], head=header(f"run-{number}"))

    added(0)
    return added


@pytest.mark.parametrize(
    ("share", "spent_s", "seen_after_s"), [(0.1, 0.5, 5), (0.1, 0.01, 1), (None, 30, 1), (0.1, 600, 60)]
)
def test_the_more_views_cost_the_rarer_changes_are_seen(tmp_path, clock, add, share, spent_s, seen_after_s):
    changes = Changes(tmp_path, share, clock=clock)
    first = changes.state()
    changes.spend(spent_s / 2)
    changes.spend(spent_s / 2)
    add(1)
    clock.now_s = seen_after_s - 0.01
    assert changes.state() == first
    clock.now_s = seen_after_s
    assert changes.state().number == first.number + 1
    assert changes.state().flush > first.flush
    # What the views of the earlier state took is paid.
    add(2)
    clock.now_s += 1
    assert changes.state().number == first.number + 2


def test_rows_that_follow_their_ledger_are_a_change(tmp_path, clock, add):
    """A view that is read between the ledger and the rows of a flush is read anew."""
    changes = Changes(tmp_path, clock=clock)
    [rows] = (tmp_path / "delays").rglob("*.parquet")
    away = rows.rename(tmp_path / "away")
    before = changes.state()
    clock.now_s = 1.0
    assert changes.state() == before
    away.rename(rows)
    clock.now_s = 2.0
    assert changes.state().number == before.number + 1
