"""Sorting, filtering, expanding and the cursor of the live table."""

import numpy as np
import pytest

from contracts.recent import containers, moment_of
from contracts.schema import Direction
from contracts.windowtable import WindowTable
from mace.shown.top.rows import COLUMNS, TableView
from tests.made_minutes import BEGIN_NS, make_minute, moment_after

CONTAINERS = 4


@pytest.fixture(scope="module")
def results():
    return make_minute(seconds=20, containers=CONTAINERS)[2]


@pytest.fixture(scope="module")
def moment(results):
    return moment_after(results)


@pytest.fixture
def view(moment):
    made = TableView()
    made.show(moment)
    return made


def names(view):
    return [(row.owner.name, row.direction) for row in view.rows if row.place is None]


def test_rows_are_in_order_of_their_names(view):
    ways = (Direction.EGRESS, Direction.INGRESS)
    assert names(view) == [(f"c{n}", way) for n in range(CONTAINERS) for way in ways]


@pytest.mark.parametrize(("column", "figure"), [(2, "per_second"), (3, "p50_ns"), (4, "p99_ns"), (5, "max_ns")])
def test_figures_are_sorted_from_the_largest(view, column, figure):
    for _ in range(column):
        view.sort_by(1)
    values = [getattr(row.figures, figure) for row in view.rows]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 2
    view.reverse = True
    view.update()
    assert [getattr(row.figures, figure) for row in view.rows] == sorted(values)


def test_the_columns_go_round(view):
    for _ in COLUMNS:
        view.sort_by(1)
    assert view.column == 0
    view.sort_by(-1)
    assert COLUMNS[view.column] == "max"


def test_names_and_directions_are_sorted_in_both_orders(view):
    view.reverse = True
    view.update()
    assert names(view)[0][0] == f"c{CONTAINERS - 1}"
    view.sort_by(1)
    assert [way for _, way in names(view)] == [Direction.EGRESS] * CONTAINERS + [Direction.INGRESS] * CONTAINERS


def test_what_has_no_packets_comes_last_in_both_orders(results, moment):
    late = results[-1].rows
    mine = np.array([device.container != "c0" for device in late.devices])
    table = WindowTable.concatenate([results[0].rows.windows, late.windows[mine[late.windows.column("device")]]])
    view = TableView(window_s=1, column=3)
    view.show(moment_of(table, moment.places, BEGIN_NS, moment.until_utc_ns))
    for view.reverse in (False, True):
        view.update()
        assert [name for name, _ in names(view)[-2:]] == ["c0", "c0"]


def test_the_filter_ignores_case_and_counts_what_it_hides(view):
    view.text = "C2"
    view.update()
    assert {name for name, _ in names(view)} == {"c2"}
    assert view.hidden == 2 * (CONTAINERS - 1)
    view.text = "nothing"
    view.update()
    assert view.rows == []
    assert view.selected is None
    view.toggle()
    view.move(5)


def test_a_row_expands_into_its_path_and_back(view):
    view.move(2)
    view.toggle()
    assert [row.place.device for row in view.rows[3:8]] == ["eth0", "vethc1", "br0", "out0", "rem0"]
    assert len(view.rows) == 2 * CONTAINERS + 5
    # From a device, too.
    view.move(3)
    view.toggle()
    assert len(view.rows) == 2 * CONTAINERS
    assert view.selected.owner.name == "c1"


def test_all_rows_expand_and_collapse(view):
    view.toggle_all()
    assert len(view.rows) == CONTAINERS * (1 + 5 + 1 + 6)
    view.toggle_all()
    assert len(view.rows) == 2 * CONTAINERS


def test_the_cursor_stays_at_its_row(view, results):
    view.move(5)
    key = view.selected.key
    view.sort_by(4)
    assert view.selected.key == key
    view.text = key[0].name
    view.update()
    assert view.selected.key == key
    view.show(moment_after(results[:-3]))
    assert view.selected.key == key


@pytest.mark.parametrize("height", [1, 3, 8, 50])
def test_the_cursor_is_always_visible(view, height):
    for step in (0, 100, -100, 3, -1, 2):
        view.move(step)
        view.scroll(height)
        assert view.top <= view.cursor < view.top + height
        assert view.top + min(height, len(view.rows)) <= len(view.rows)


def test_another_window_has_other_figures(view, moment):
    view.window_s = 1
    view.update()
    assert [row.figures.count for row in view.rows] == [row.figures.count for row in containers(moment, 1)]
