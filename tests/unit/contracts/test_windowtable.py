"""A table of windows holds the figures of the windows that it was made of."""

import pickle

import numpy as np
import pytest

from contracts.windowtable import NUMBERS, WindowTable
from tests.made_results import make_delays, make_windows

WINDOWS = make_windows(make_delays(500))


def same(table, windows):
    """Whether a table has these windows, histograms included."""
    made = list(table)
    return made == list(windows) and all(
        one.bins.tolist() == other.bins.tolist() and one.counts.tolist() == other.counts.tolist()
        for one, other in zip(made, windows, strict=True)
    )


def test_a_table_gives_the_windows_that_it_was_made_of():
    table = WindowTable.of(WINDOWS)
    assert len(table) == len(WINDOWS) > 1
    assert same(table, WINDOWS)
    assert not same(table, WINDOWS[1:])
    for made, window in zip(table, WINDOWS, strict=True):
        assert (made.direction, made.segment) == (window.direction, window.segment)
    for name in NUMBERS:
        assert table.column(name).tolist() == [getattr(window, name) for window in WINDOWS]


@pytest.mark.parametrize(
    "index",
    [
        slice(1, None),
        slice(0, 0),
        np.arange(len(WINDOWS)) % 3 == 1,
        np.zeros(len(WINDOWS), np.bool_),
        np.array([4, 0, 4, len(WINDOWS) - 1]),
    ],
    ids=["slice", "empty slice", "mask", "empty mask", "positions"],
)
def test_selected_rows_are_the_windows_of_their_positions(index):
    positions = np.arange(len(WINDOWS))[index]
    assert same(WindowTable.of(WINDOWS)[index], [WINDOWS[at] for at in positions])


def test_replacing_a_column_keeps_the_others():
    table = WindowTable.of(WINDOWS)
    moved = table.with_column("device", table.column("device") + 7)
    for name in NUMBERS:
        assert (moved.column(name) - table.column(name)).tolist() == [7 * (name == "device")] * len(table)
    assert same(table, WINDOWS)
    assert moved.bins.tolist() == table.bins.tolist()


def test_tables_are_concatenated_and_pickled():
    whole = WindowTable.of(WINDOWS)
    parts = [WindowTable.of(WINDOWS[:1]), WindowTable.of(()), WindowTable.of(WINDOWS[1:])]
    joined = WindowTable.concatenate(parts)
    assert same(joined, WINDOWS)
    assert joined.edges.tolist() == whole.edges.tolist()
    assert same(pickle.loads(pickle.dumps(joined)), WINDOWS)
    for nothing in (WindowTable.concatenate([]), WindowTable.of(()), WindowTable.empty()):
        assert len(nothing) == 0
        assert list(nothing) == []
