"""Lines of the live table: their width, their signs, and that names stay text."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from contracts.ledger import Ledger
from contracts.names import printable
from contracts.recent import NOTHING, SECONDS
from mace.shown.top import drawing
from mace.shown.top.feed import Look
from mace.shown.top.rows import TableView
from tests.made_minutes import make_minute, moment_after
from tests.nasty_names import NASTY, named_devices

WIDTHS = (40, 80, 81, 120, 200)
LEDGER = Ledger(
    records=1_361_495, matched=1_360_425, unmatched=420, ambiguous=33, expired=7, dropped=600, in_flight=10, lost=0
)


@pytest.fixture(scope="module")
def nasty():
    _, _, results = make_minute(
        seconds=3, containers=len(NASTY), packets_per_s=8 * len(NASTY), devices=named_devices(NASTY)
    )
    return moment_after(results)


def view_of(moment, **changes):
    view = TableView(**changes)
    view.show(moment)
    return view


def text(line):
    return "".join(piece.text for piece in line)


def is_whole(line, width):
    return cell_len(text(line)) == width and text(line).isprintable()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_line_fills_the_width_and_has_no_control_characters(nasty, width):
    view = view_of(nasty)
    view.toggle_all()
    look = Look(nasty, LEDGER, (), ("a\x1b[2Jb",), on_host_network=("\x1b]0;x\x07", "[red]"), kept_s=3.2)
    height = len(view.rows) + 4
    lines = drawing.table_lines(view, look, width, height)
    assert len(lines) == height
    assert all(is_whole(line, width) for line in lines)
    view.text = "\x1b[31m"
    others = [drawing.title_line(view, look, "h\x1b[1m · ftrace", True, width), drawing.keys_line(True, width)]
    others += [drawing.message_line(look, "a\nb\x1b", 3, width), *drawing.ledger_lines(look, width)]
    assert all(is_whole(line, width) for line in others)


def test_names_are_shown_as_text(nasty):
    view = view_of(nasty)
    view.toggle_all()
    shown = "\n".join(map(text, drawing.table_lines(view, Look(nasty, LEDGER, ()), 200, len(view.rows) + 1)))
    for name in NASTY:
        if name and cell_len(printable(name)) < 35:
            assert f" {printable(name)} " in shown


def test_a_name_that_is_too_long_says_so(nasty):
    view = view_of(nasty, text="n" * 255)
    lines = drawing.table_lines(view, Look(nasty, LEDGER, ()), 80, 4)
    assert "nnn…" in text(lines[1])


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_characters_keep_the_columns(nasty, width):
    """Two cells each in a terminal."""
    heading, row, *_ = drawing.table_lines(view_of(nasty, text="日本"), Look(nasty, LEDGER, ()), width, 3)
    assert "日本" in text(row)
    assert cell_len(text(row)[: text(row).index("egress")]) == text(heading).index("direction")


def test_the_ledger_has_every_count_in_any_width():
    look = Look(NOTHING, LEDGER, ())
    assert [text(line).strip() for line in drawing.ledger_lines(look, 200)] == [LEDGER.line()]
    narrow = " ".join(text(line).strip() for line in drawing.ledger_lines(look, 80))
    assert narrow == (
        "lost 0 · discarded 0 · records 1,361k: matched 1,360k, unmatched 420, ambiguous 33, expired 7, dropped 600, in"
        " flight 10"
    )
    few = drawing.ledger_lines(Look(NOTHING, Ledger(records=5, matched=5), ()), 80)
    assert [text(line).strip() for line in few] == ["lost 0 · discarded 0 · records 5: matched 5, others 0"]


def test_a_loss_is_red_and_is_marked_without_colour():
    lost = replace(LEDGER, lost=3)
    good, bad = Look(NOTHING, LEDGER, ()), Look(NOTHING, lost, ("3 records were lost.", "4 rows were not written."))
    for width in WIDTHS:
        assert {piece.style for line in drawing.ledger_lines(good, width) for piece in line} <= {"dim", ""}
        lines = drawing.ledger_lines(bad, width)
        assert lines[0][0].style == "bold red"
        assert text(lines[0]).startswith("! ")
        assert "(2 losses, l shows all)" in text(lines[-1])
    assert "3 records were lost. (2 losses" in text(drawing.ledger_lines(bad, 80)[-1])


def test_what_is_not_measured_is_a_message():
    look = Look(NOTHING, LEDGER, (), ("eth0 of c1 is a macvlan",))
    assert text(drawing.message_line(look, "", 0, 60)).startswith("eth0 of c1 is a macvlan  ")
    assert "later (2 messages, l shows all)" in text(drawing.message_line(look, "later", 1, 60))


def test_a_sparkline_shows_gaps_and_heights():
    values = [-1] * 50 + [100, 200, 400, 800, 1600, 3200, 6400, 12_800, -1, 100]
    assert drawing.sparkline(values, 60) == " " * 50 + "▁▂▃▄▅▆▇█ ▁"
    # Each of ten cells shows the largest value of its six seconds.
    assert drawing.sparkline(values, 10) == " " * 8 + "▁█"


def test_small_changes_look_small():
    assert set(drawing.sparkline([1000, 1010] * 30, 60)) == {"▁"}
    assert drawing.sparkline([-1] * 60, 12) == " " * 12


@given(st.lists(st.integers(-1, 1 << 40), min_size=SECONDS, max_size=SECONDS))
def test_any_sparkline_has_its_width(values):
    for cells in (60, 30, 20, 15, 12, 10):
        drawn = drawing.sparkline(values, cells)
        each = SECONDS // cells
        assert [sign == " " for sign in drawn] == [max(values[at * each : (at + 1) * each]) < 0 for at in range(cells)]


def test_the_first_line_says_what_applies():
    view = TableView(text="web")
    look = Look(NOTHING, LEDGER, (), kept_s=7.6)
    line = drawing.title_line(view, look, "host · ftrace", False, 200)
    assert "filter 'web' hides 0 · t: 8 s kept" in text(line)
    recording = replace(look, recording="5 records, x.mace")
    line = drawing.title_line(view, recording, "host · ftrace", True, 200)
    assert "REC 5 records, x.mace · FROZEN" in text(line)
    assert "kept" not in text(line)


@pytest.mark.parametrize(
    ("view", "look", "told"),
    [
        (TableView(), Look(NOTHING, Ledger(), ()), "no packet yet"),
        (TableView(), Look(NOTHING, Ledger(records=3), ()), "no packet has crossed"),
        (TableView(hidden=4), Look(NOTHING, Ledger(records=3), ()), "it hides 4 rows"),
    ],
)
def test_an_empty_table_says_why(view, look, told):
    assert told in text(drawing.table_lines(view, look, 100, 5)[1])


def test_in_ascii_every_sign_has_its_width(nasty):
    view = view_of(nasty)
    for line in drawing.table_lines(view, Look(nasty, LEDGER, ()), 120, 20):
        signs = "".join(c for c in text(line) if c in "▁▂▃▄▅▆▇█▸▾▴→·µ–…")
        assert drawing.plain(signs).isascii()
        assert len(drawing.plain(signs)) == len(signs)
