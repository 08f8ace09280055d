"""Lines of text and JSON for standard output and error, in which names are text, whatever is in them.

Needs no library: a command that only prints lines starts without Rich (`mace.shown.terminal`).
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Final

from contracts import strict_json
from contracts.names import printable

WIDTH: Final = 120
"""Of tables that do not go to a terminal, in characters: a pipe or a file has no width, and 80 would cut names."""
_NARROWEST: Final = 20
"""Of a column that is wrapped, in characters, however narrow the terminal."""


def line(text: str, *, flush: bool = False) -> None:
    """Print one line of text to standard output."""
    print(printable(text), flush=flush)


def complaint(text: str) -> None:
    """Print one line of text to standard error."""
    print(printable(text), file=sys.stderr)


def json_line(value: Any, *, flush: bool = False) -> None:
    """Print a value as JSON, on one line."""
    print(strict_json.dumps(value), flush=flush)


def columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose last column is wrapped; for a command that starts faster than Rich does."""
    widths = [max(map(len, column)) for column in zip(headings[:-1], *(row[:-1] for row in rows), strict=True)]
    before = sum(widths) + 2 * len(widths)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    drawn = []
    for *cells, last in (headings, *rows):
        parts = textwrap.wrap(last, max(width - before, _NARROWEST)) or [""]
        first = "".join(f"{cell:<{size + 2}}" for cell, size in zip(cells, widths, strict=True))
        drawn += [first + parts[0], *(" " * before + part for part in parts[1:])]
    return drawn
