import io
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mace.replaying.progress import bar
from mace.replaying.remaining import KNOWN_AFTER_S, WINDOW_S, Remaining, told


@given(st.floats(1e3, 1e9), st.integers(0, 10**9), st.integers(1, 600))
def test_the_estimate_is_right_at_an_even_pace(pace, begun_at, seconds):
    """A resumed replay does not count the bytes done before for its pace."""
    total = begun_at + int(pace * 1000)
    left = Remaining(total, begun_at, 50.0)
    for tenth in range(1, seconds * 4 + 1):
        left.update(begun_at + int(pace * tenth / 4), 50.0 + tenth / 4)
    said = left.seconds(50.0 + seconds)
    if seconds < KNOWN_AFTER_S:
        assert said is None
    else:
        assert abs(said - (1000 - seconds)) < 1.5


def test_there_is_no_estimate_before_any_progress():
    left = Remaining(100, 0, 0.0)
    assert left.seconds(0.0) is None
    left.update(0, 30.0)
    assert left.seconds(30.0) is None, "nothing was done yet"
    left.update(100, 31.0)
    assert left.seconds(31.0) == 0.0


def test_a_slower_stretch_shows_within_a_minute():
    left = Remaining(10_000, 0, 0.0)
    done = 0
    for second in range(1, 201):
        done += 10 if second <= 100 else 1
        left.update(done, float(second))
    assert abs(left.seconds(200.0) - (10_000 - done) / 1) < (10_000 - done) * 0.05
    assert WINDOW_S <= 100


def test_time_that_passes_between_two_updates_counts():
    left = Remaining(1000, 0, 0.0)
    for second in range(1, 11):
        left.update(second * 10, float(second))
    assert left.seconds(10.0) == 90.0
    assert left.seconds(15.0) == 85.0
    assert left.seconds(500.0) == 0.0


def test_the_estimate_in_words():
    assert [told(s) for s in (None, 0.4, 65, 3725)] == ["-:--", "0:00", "1:05", "1:02:05"]


def test_the_bar_shows_bytes_and_remaining_time():
    shown = io.StringIO()
    with bar(Console(file=shown, force_terminal=True, width=100), quiet=False) as told:
        told(0, 80_000_000)
        told(20_000_000, 80_000_000)
        told(80_000_000, 80_000_000)
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
    assert any("-:-- left" in line for line in lines)
    assert re.search(r"80\.0/80\.0 MB.*0:00 left", lines[-1] or lines[-2])


def test_a_bar_writes_nothing_if_quiet_or_without_terminal():
    for terminal, quiet in ((True, True), (False, False)):
        shown = io.StringIO()
        with bar(Console(file=shown, force_terminal=terminal, width=100), quiet=quiet) as told:
            told(1, 2)
        assert not shown.getvalue().strip()
