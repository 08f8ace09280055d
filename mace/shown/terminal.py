"""What Rich draws for people: consoles and tables in which names are text, whatever is in them (`contracts.names`).

Rich takes square brackets in strings for styles and `:warning:` for a sign; a terminal takes ESC for a command. Here
strings are neither, on whatever console they are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich import console as rich_console
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from contracts.names import printable
from mace.shown.lines import WIDTH


class PlainConsole(rich_console.Console):
    """Rich's console, to which strings are text."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def output(width: int = WIDTH) -> PlainConsole:
    """The console on standard output; `width` where that is no terminal."""
    return PlainConsole() if sys.stdout.isatty() else PlainConsole(width=width)


def styled(text: str, style: str) -> Text:
    """A line of text, whole in one style."""
    return Text(printable(text), style=style)


def warn(console: rich_console.Console, warnings: Iterable[str]) -> None:
    """Print warnings, a line each."""
    for warning in warnings:
        console.print(styled(warning, "yellow"))


class PlainTable(Table):
    """A table without frames: 80 columns must do for a path with its figures. Strings in it are text."""

    def __init__(self, title: str | None = None) -> None:
        super().__init__(
            title=None if title is None else styled(title, "bold"),
            title_justify="left",
            header_style="underline",
            box=None,
            pad_edge=False,
        )

    def add_column(self, header: RenderableType = "", *args: Any, **kwargs: Any) -> None:
        """As Rich's."""
        super().add_column(_as_text(header), *args, **kwargs)

    def add_row(self, *cells: RenderableType | None, **kwargs: Any) -> None:
        """As Rich's."""
        super().add_row(*(_as_text(cell) for cell in cells), **kwargs)


def _as_text(cell: Any) -> Any:
    return Text(printable(cell)) if isinstance(cell, str) else cell
