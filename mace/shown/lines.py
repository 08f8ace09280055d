"""Prints lines of text and JSON to standard output and error; control characters in names are escaped.

This module needs no library, so a command that only prints lines starts without Rich (`mace.shown.terminal`).
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
"""Width in characters of a table for a pipe or file, which have no width; 80 would cut names."""
_NARROWEST: Final = 20
"""Minimum width of a wrapped column, in characters, on any terminal."""


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
    """Return the lines of a table whose last column is wrapped, without importing Rich."""
    widths = [max(map(len, column)) for column in zip(headings[:-1], *(row[:-1] for row in rows), strict=True)]
    before = sum(widths) + 2 * len(widths)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    drawn = []
    for *cells, last in (headings, *rows):
        parts = textwrap.wrap(last, max(width - before, _NARROWEST)) or [""]
        first = "".join(f"{cell:<{size + 2}}" for cell, size in zip(cells, widths, strict=True))
        drawn += [first + parts[0], *(" " * before + part for part in parts[1:])]
    return drawn
