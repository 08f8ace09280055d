"""Shared parts of experiments in rounds, and the commands' usage errors, which need no kernel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from correlator.intervals import bounds
from mace.cli import main
from mace.trials.rounds import dithered, interval_text, machine, machine_text, median_us


@given(st.floats(5_300, 9_700), st.integers(400, 2_000))
def test_a_median_of_truncated_stamps_is_interpolated(true_ns, count):
    """With two stamps truncated to µs and a constant true round trip, the median's error is a few per cent of a µs."""
    begin = np.random.default_rng(3).uniform(0, 1e6, count)
    told = ((begin + true_ns) // 1000 - begin // 1000).astype(np.int64) * 1000
    # The share of either value scatters by 0.5/sqrt(n) of a unit, and the interpolation has a kink at halves.
    assert abs(median_us([dithered(told)]) * 1000 - true_ns) < 4 * 500 / np.sqrt(count) + 150


def test_dithering_keeps_the_order_and_moves_by_less_than_half_a_unit():
    values = np.array([3_000, 1_000, 3_000, 1_000] * 50)
    moved = dithered(values)
    assert np.abs(moved - values).max() <= 500
    assert abs((moved - values).mean()) < 20


def test_no_values_have_no_median():
    assert np.isnan(median_us([np.zeros(0, np.int64)]))
    assert bounds(None) is None
    assert interval_text(None) == "-"
    assert interval_text([-1.25, 0.5]) == "-1.2 … +0.5"


def test_the_machine_is_described():
    found = machine()
    assert found["cores"] >= 1
    assert found["kernel"] in machine_text(found)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("experiment", "--paces", "floor"), "no 'floor'; there are flood, 10ms"),
        (("experiment", "--repetitions", "0"), "expected at least 1"),
        (("experiment", "--count", "9"), "expected at least 10"),
        (("experiment", "--guest-kernel", "vmlinuz"), "--far-end guest"),
        (("experiment", "--flood", "17"), "0 to 16"),
        (("compare", "--sources", "ftrase"), "no 'ftrase' (did you mean 'ftrace'?)"),
        (("compare", "--sources", "none"), "at least one source besides none"),
        (("compare", "--count", "0"), "expected at least 1"),
    ],
)
def test_invalid_options_are_refused_at_once(argv, why, capsys):
    assert main(argv) == 2
    assert why in capsys.readouterr().err
