"""Draws the table of `mace top` as lines of styled pieces of text; knows no terminal.

Names are shown as in all tables (`contracts.names.printable`): as text, never as markup or control sequences. What a
colour says, a word or a sign says too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size

from contracts.figures import COUNTS_AS
from contracts.ledger import Ledger
from contracts.names import printable
from contracts.recent import SECONDS, Row
from mace.shown import tables
from mace.shown.top.feed import Look
from mace.shown.top.rows import COLUMNS, TableView


class Piece(NamedTuple):
    """Text in one style; `style` is a style of Rich."""

    text: str
    style: str = ""


Line = list[Piece]

_LEVELS: Final = "▁▂▃▄▅▆▇█"
_SPAN: Final = 4
"""A sparkline's scale spans at least this factor, so that small changes look small."""
_SPARK_CELLS: Final = (60, 30, 20, 15, 12, 10)
"""Widths of a sparkline: each cell is a whole number of seconds."""
_WIDTHS: Final = (10, 10, 8, 8, 9)
"""Widths of the columns between the name and the sparkline."""
_NAME: Final = (16, 40)
"""Smallest and largest width of the name, in cells."""
_ASCII: Final = str.maketrans(
    dict(zip(_LEVELS, ".:-=+*#@", strict=True)) | dict(zip("▸▾▴→·µ–…", ">v^>|u-~", strict=True))
)

HELP: Final = """\
mace top: the time that packets spend in containers' devices, as it happens

  up, down, page up, page down, home, end   move the cursor
  enter          show or hide the devices in the path of the row's packets
  e              show the devices of all rows, or hide them
  s, S           sort by the next or the previous column; o reverses the order
  /              show containers whose name contains a text; enter keeps it, escape removes it
  1, 2, 3        figures of the last 1, 10 or 60 s
  f              freeze the table, and let it go on; the ledger always goes on
  w              the packets with the largest overhead of the last minute, hop by hop
  c              which CPU works on the packets of the last minute, as mace report --cpus
  l              all messages since the start
  ?              this page; escape closes it
  q, ctrl+c      quit

while it measures
  r              record from now on into a capture file, and end that; its name is shown
  t              write the last seconds as a Perfetto trace; the first line says how many are kept

with a store or a recording
  left, right    go back or forward by the window's length; b and n go to the first and the last second

A row is a container in one direction: egress leaves it, ingress enters it. packets/s, p50, p99 and max are of the
window; p50, p99 and max are µs. The sparkline shows each second's p99 in the last minute, on a scale of its own; a
gap is a second without packets. A device counts as overhead if only the container's packets cross it, as outside if
the host's own packets do, too, and as delivery from the container's device to the reader.

The ledger accounts for every record. Its line is red, and begins with a !, when records or rows were lost."""


def plain(text: str) -> str:
    """Return the text in ASCII, with signs of the same width for those of the table."""
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def title_line(view: TableView, look: Look, title: str, frozen: bool, width: int) -> Line:
    """Return the first line: where the figures are from, their time, and what applies to them."""
    until = datetime.fromtimestamp(look.moment.until_utc_ns // 1_000_000_000, UTC)
    told = [
        f"mace top · {title}",
        f"{view.window_s} s to {until:%H:%M:%S} UTC" if look.moment.until_utc_ns else "waiting",
    ]
    if look.moment.seconds and (covered := look.moment.covered_s(view.window_s)) < view.window_s:
        told[-1] += f" ({covered} s so far)"
    if view.text:
        told.append(f"filter {view.text!r} hides {view.hidden}")
    if look.kept_s is not None and not look.recording:
        told.append(f"t: {look.kept_s:.0f} s kept")
    pieces = [Piece(printable(" · ".join(told)), "bold")]
    if look.recording:
        pieces.append(Piece(printable(f" · REC {look.recording}"), "bold red"))
    if frozen:
        pieces.append(Piece(" · FROZEN", "bold reverse"))
    return _fitted(pieces, width)


def table_lines(view: TableView, look: Look, width: int, height: int) -> list[Line]:
    """Return the heading and the visible rows, `height` lines in all; scrolls the view to its cursor."""
    name_width, spark = _layout(view, width)
    lines = [_heading(view, name_width, spark, width)]
    room = max(height - 1, 1)
    shared = sorted(look.on_host_network)
    if shared and room > 3:
        room -= 1
    view.scroll(room)
    for n, row in enumerate(view.rows[view.top : view.top + room], view.top):
        lines.append(_row(view, row, name_width, spark, width, at_cursor=n == view.cursor))
    if not view.rows:
        lines.append(_fitted([Piece(_why_empty(view, look), "dim")], width))
    lines += [[Piece(" " * width)] for _ in range(room + 1 - len(lines))]
    if shared and height - 1 > 3:
        told = f"on the host's network, without a device of their own: {', '.join(shared)}"
        lines.append(_fitted([Piece(printable(told), "dim")], width))
    return lines


def ledger_lines(look: Look, width: int) -> list[Line]:
    """Return the ledger, in one line if it fits, else in two, and a line with the losses if there are any.

    It is red, and begins with a `!`, if records or rows were lost.
    """
    style = "bold red" if look.losses else "dim"
    mark = "! " if look.losses else ""
    of_runs = " (whole runs)" if look.whole_runs else ""
    whole = f"{mark}{look.ledger.line()}{of_runs}"
    short = f"{mark}{_short_ledger(look.ledger)}{of_runs}"
    text = whole if cell_len(whole) <= width else short
    lines = _wrapped(text, style, width)[:2]
    if look.losses:
        more = f" ({len(look.losses)} losses, l shows all)" if len(look.losses) > 1 else ""
        lines.append(_ended(look.losses[0], more, style, width))
    return lines


def _short_ledger(ledger: Ledger) -> str:
    """Return the ledger with what is lost first, and with what is zero in one word."""
    counts = ledger.as_dict()
    first = " · ".join(f"{name} {_short(counts.pop(name))}" for name in ("lost", "discarded"))
    records = counts.pop("records")
    told = [f"{name.replace('_', ' ')} {_short(count)}" for name, count in counts.items() if count]
    rest = ["others 0"] if len(told) < len(counts) else []
    return f"{first} · records {_short(records)}: {', '.join([*told, *rest])}"


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 10 * size:
            return f"{count // size:,}{unit}"
    return f"{count:,}"


def sparkline(p99s_ns: Sequence[int], cells: int) -> str:
    """Return p99 of each second as signs of eight heights, on a logarithmic scale; a space where nothing is known.

    Each of `cells`, a divisor of the number of seconds, shows the largest value of its seconds.
    """
    each = len(p99s_ns) // cells
    tops = [max(p99s_ns[at * each : (at + 1) * each]) for at in range(cells)]
    known = [max(top, 1) for top in tops if top >= 0]
    if not known:
        return " " * cells
    low, high = min(known), max(*known, _SPAN * min(known))
    steps = (len(_LEVELS) - 1) / math.log(high / low)
    return "".join(" " if top < 0 else _LEVELS[round(math.log(max(top, 1) / low) * steps)] for top in tops)


def keys_line(feed_is_live: bool, width: int) -> Line:
    """Return the line of keys."""
    shared = "? help  q quit  / filter  s sort  enter path  f freeze  1 2 3 s  w worst  c CPUs"
    more = "  r record  t trace" if feed_is_live else "  left right time"
    return _fitted([Piece(shared + more if cell_len(shared + more) <= width else shared, "dim")], width)


def message_line(look: Look, newest: str, count: int, width: int) -> Line:
    """Return the newest message; without one, what the source does not show."""
    told = [newest, *look.unseen] if newest else [*look.unseen]
    more = f" ({count + len(look.unseen)} messages, l shows all)" if count + len(look.unseen) > 1 else ""
    return _ended(told[0] if told else "", more, "yellow", width)


def text_line(text: str, style: str, width: int) -> Line:
    """Return one line of text, cut to the width."""
    return _fitted([Piece(printable(text), style)], width)


def _layout(view: TableView, width: int) -> tuple[int, int]:
    """Return the widths of the name and of the sparkline, which may be 0."""
    longest = max((cell_len(_name(view, row)) for row in view.rows), default=0)
    fixed = sum(_WIDTHS) + len(_WIDTHS)
    wanted = min(max(longest, _NAME[0]), _NAME[1])
    for spark in (*_SPARK_CELLS, 0):
        if spark == 0 or fixed + wanted + 1 + spark <= width:
            break
    else:
        spark = 0
    if not spark and fixed + _NAME[0] + 1 + _SPARK_CELLS[-1] <= width:
        spark = _SPARK_CELLS[-1]
    return max(width - fixed - (spark + 1 if spark else 0), _NAME[0]), spark


def _name(view: TableView, row: Row) -> str:
    if row.place is not None:
        return f"    {printable(row.place.device)}"
    mark = "▾" if (row.owner, row.direction) in view.expanded else "▸"
    host = f"{row.owner.host}/" if row.owner.host else ""
    return f"{mark} {printable(host + row.owner.name)}"


def _heading(view: TableView, name_width: int, spark: int, width: int) -> Line:
    figures = view.column > 1
    mark = "▾" if figures != view.reverse else "▴"
    names = [f"{name}{mark}" if n == view.column else name for n, name in enumerate(COLUMNS)]
    cells = [_left(names[0], name_width), _left(names[1], _WIDTHS[0])]
    cells += [f"{name:>{size}}" for name, size in zip(names[2:], _WIDTHS[1:], strict=True)]
    if spark:
        cells.append(_left(f"p99, {SECONDS} s", spark))
    return _fitted([Piece(" ".join(cells), "bold underline")], width)


def _row(view: TableView, row: Row, name_width: int, spark: int, width: int, *, at_cursor: bool) -> Line:
    figures = row.figures
    if figures.count:
        told = (_rate(figures.per_second), *map(tables.microseconds, (figures.p50_ns, figures.p99_ns, figures.max_ns)))
    else:
        told = ("0", "–", "–", "–")
    way = row.direction.name.lower() if row.place is None else COUNTS_AS[row.segment]
    cells = [_left(_name(view, row), name_width), _left(way, _WIDTHS[0])]
    cells += [_right(value, size) for value, size in zip(told, _WIDTHS[1:], strict=True)]
    style = "reverse" if at_cursor else "" if row.place is None else "dim"
    pieces = [Piece(" ".join(cells), style)]
    if spark:
        pieces += [Piece(" ", style), Piece(sparkline(figures.p99s_ns, spark), style or "cyan")]
    return _fitted(pieces, width)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def _why_empty(view: TableView, look: Look) -> str:
    if view.hidden:
        return f"no container's name contains the filter's text; it hides {view.hidden} rows"
    if look.ledger.records:
        return "no packet has crossed a container's devices in the last minute"
    return "no packet yet: the first figures appear two to three seconds after a packet"


def _wrapped(text: str, style: str, width: int) -> list[Line]:
    lines, rest = [], printable(text).split(" ")
    while rest:
        taken = [rest.pop(0)]
        while rest and cell_len(" ".join([*taken, rest[0]])) <= width:
            taken.append(rest.pop(0))
        lines.append(_fitted([Piece(" ".join(taken), style)], width))
    return lines


def _ended(text: str, end: str, style: str, width: int) -> Line:
    """Return one line with a text, which is cut so that its end has room."""
    return _fitted([Piece(_cut(printable(text), width - cell_len(end)) + end, style)], width)


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else _left(text, max(width, 1))


def _left(text: str, width: int) -> str:
    """Return the text in `width` cells; what is longer ends with an ellipsis."""
    return set_cell_size(text, width) if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"


def _right(text: str, width: int) -> str:
    return f"{text:>{width}}" if len(text) <= width else f"{text[: width - 1]}…"


def _fitted(pieces: Iterable[Piece], width: int) -> Line:
    """Return the pieces in exactly `width` cells."""
    line, left = [], width
    for piece in pieces:
        size = cell_len(piece.text)
        if size > left:
            line.append(piece._replace(text=_left(piece.text, left))) if left else None
            return line
        line.append(piece)
        left -= size
    if left:
        line.append(Piece(" " * left, line[-1].style if line and "reverse" in line[-1].style else ""))
    return line
