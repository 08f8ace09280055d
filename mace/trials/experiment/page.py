"""Writes an experiment as one page, or into a page that has more: tables and a picture, as Markdown or HTML.

    FILE.html   one file; the picture is inside
    FILE.md     beside it the picture, FILE.png

`python -m mace.trials.experiment.page RESULTS PAGE.md` writes the first two tables, the picture and what was measured
between the two marks of a Markdown page that is there already. It reads the results of any machine.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from contracts.errors import MaceError, UsageError
from contracts.names import printable
from mace.trials.experiment import results
from mace.trials.experiment.figures import Figures, Grid, draw

BEGIN: Final = "<!-- python -m mace.trials.experiment.page writes the lines up to the next mark -->"
END: Final = "<!-- up to here -->"
_TITLE: Final = "Host, container, corrected"
_PICTURE: Final = "Distributions of round trips on the host, in the container and corrected, and differences of medians"
_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}caption{text-align:left;font-weight:bold}"
    "th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child"
    "{text-align:left}img{max-width:100%}"
)


def write(found: Figures, path: Path) -> None:
    """Write the page. Raises `UsageError` for another ending, `MissingExtra`, and `MaceError` if it fails."""
    check(path)
    drawn = draw(found)
    if path.suffix == ".html":
        _write(path, _html(found, drawn).encode())
    else:
        beside = path.with_suffix(".png")
        _write(beside, drawn)
        _write(path, f"# {_TITLE}\n\n{_markdown(found, found.grids(), beside.name)}".encode())


def picture(found: Figures, path: Path) -> None:
    """Write the picture alone, as PNG. Raises `MissingExtra`, and `MaceError` if it cannot be written."""
    _write(path, draw(found))


def check(path: Path) -> None:
    """Raise `UsageError` for a file whose ending says neither Markdown nor HTML."""
    if path.suffix not in (".html", ".md"):
        raise UsageError(f"--page {path}: the name has to end in .html or .md")


def put(found: Figures, page: Path) -> None:
    """Write the first two tables and the picture between the marks of a Markdown page. Raises `MaceError`."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MaceError(f"{page}: cannot be read: {error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{page}: has no lines {BEGIN!r} and {END!r}")
    beside = page.with_suffix(".png")
    _write(beside, draw(found))
    inside = _markdown(found, found.grids()[:2], beside.name)
    _write(page, f"{before}{begin}\n\n{inside}\n{end}{after}".encode())


def _markdown(found: Figures, grids: Sequence[Grid], image: str) -> str:
    parts = [*(_markdown_table(grid) for grid in grids), f"![{_PICTURE}]({image})\n"]
    parts.append("\n".join(f"- {_cell(text)}" for text in found.remarks()) + "\n")
    return "\n".join(parts)


def _markdown_table(grid: Grid) -> str:
    rows = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
    return f"{grid.title}:\n\n" + "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _html(found: Figures, drawn: bytes) -> str:
    tables = "".join(_html_table(grid) for grid in found.grids())
    told = "".join(f"<li>{_escaped(text)}</li>" for text in found.remarks())
    image = f'<img alt="{_PICTURE}" src="data:image/png;base64,{base64.b64encode(drawn).decode()}">'
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_TITLE}</title><style>{_STYLE}</style>'
        f"<h1>{_TITLE}</h1>{tables}{image}<ul>{told}</ul></html>\n"
    )


def _html_table(grid: Grid) -> str:
    head = "".join(f"<th>{_escaped(name)}</th>" for name in grid.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    return f"<table><caption>{_escaped(grid.title)}</caption><tr>{head}</tr>{rows}</table>"


def _escaped(text: str) -> str:
    return escape(printable(text))


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise MaceError(f"{path}: cannot be written: {error.strerror}") from error


def main(argv: Sequence[str]) -> int:
    """Put the results of `argv[0]` into the page `argv[1]`."""
    if len(argv) != 2:
        sys.stderr.write("python -m mace.trials.experiment.page RESULTS PAGE.md\n")
        return 2
    try:
        found = results.read(Path(argv[0]))
        put(Figures(found.finished, found.machine), Path(argv[1]))
    except MaceError as error:
        sys.stderr.write(f"mace: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
