"""A table of windows behaves like the sequence of its windows."""

import pickle

from contracts.windowtable import NUMBERS, WindowTable
from tests.made_results import make_delays, make_windows


def test_a_table_gives_the_windows_that_it_was_made_of():
    windows = make_windows(make_delays(500))
    table = WindowTable.of(windows)
    assert len(table) == len(windows) > 1
    assert table == tuple(windows)
    assert list(table) == list(windows)
    for made, window in zip(table, windows, strict=True):
        assert (made.direction, made.segment) == (window.direction, window.segment)
        assert made.bins.tolist() == window.bins.tolist()
        assert made.counts.tolist() == window.counts.tolist()
    assert table[0] == windows[0]
    assert table[1:] == tuple(windows[1:])
    assert table != tuple(windows[1:])
    for name in NUMBERS:
        assert table.column(name).tolist() == [getattr(window, name) for window in windows]


def test_tables_end_to_end_and_elsewhere():
    windows = make_windows(make_delays(500))
    whole = WindowTable.of(windows)
    parts = [WindowTable.of(windows[:1]), WindowTable.of(()), WindowTable.of(windows[1:])]
    joined = WindowTable.concatenate(parts)
    assert joined == whole
    assert joined.bins.tolist() == whole.bins.tolist()
    assert joined.edges.tolist() == whole.edges.tolist()
    assert pickle.loads(pickle.dumps(joined)) == whole
    assert not WindowTable.concatenate([])
    assert WindowTable.of(()) == ()
