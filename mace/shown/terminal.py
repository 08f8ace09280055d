"""Rich's consoles and tables, with strings shown literally and control characters escaped (`contracts.names`).

Rich reads square brackets in strings as styles and `:warning:` as an emoji; a terminal reads ESC as the start of a
command. The classes here prevent that on every console.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO, Any

from rich import console as rich_console
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from contracts.names import printable
from mace.shown.lines import WIDTH


class PlainConsole(rich_console.Console):
    """Rich's console, which prints strings literally."""

    def __init__(self, *, stderr: bool = False, width: int | None = None, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, width=width, file=file, markup=False, emoji=False, highlight=False)


def output(width: int = WIDTH) -> PlainConsole:
    """Return the console on standard output; it has `width` characters if that is no terminal."""
    return PlainConsole() if sys.stdout.isatty() else PlainConsole(width=width)


def styled(text: str, style: str) -> Text:
    """Return a line of text in one style."""
    return Text(printable(text), style=style)


def warn(console: rich_console.Console, warnings: Iterable[str]) -> None:
    """Print warnings, one per line."""
    for warning in warnings:
        console.print(styled(warning, "yellow"))


class PlainTable(Table):
    """A table without frames, so that a path with its figures fits in 80 columns. It shows strings literally."""

    def __init__(self, title: str | None = None) -> None:
        super().__init__(
            title=None if title is None else styled(title, "bold"),
            title_justify="left",
            header_style="underline",
            box=None,
            pad_edge=False,
        )

    def add_column(self, header: RenderableType = "", *args: Any, **kwargs: Any) -> None:
        """Add a column, with the arguments of Rich's method."""
        super().add_column(_as_text(header), *args, **kwargs)

    def add_row(self, *cells: RenderableType | None, **kwargs: Any) -> None:
        """Add a row, with the arguments of Rich's method."""
        super().add_row(*(_as_text(cell) for cell in cells), **kwargs)


def _as_text(cell: Any) -> Any:
    return Text(printable(cell)) if isinstance(cell, str) else cell
