"""Where a command prints: results go to standard output, everything else to standard error.

Rich is imported by the first table that is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mace.shown import lines

if TYPE_CHECKING:
    from rich.console import Console as Rich
    from rich.console import RenderableType

    from mace.shown.terminal import PlainTable


class Console:
    """The standard streams of one command."""

    def line(self, text: str) -> None:
        """One line of text of the result."""
        lines.line(text)

    def json(self, value: Any, *, flush: bool = False) -> None:
        """The result, or a part that stands by itself, as JSON on one line."""
        lines.json_line(value, flush=flush)

    def show(self, *drawn: RenderableType) -> None:
        """Tables and texts of the result."""
        self.out().print(*drawn)

    def complain(self, text: str) -> None:
        """One line on standard error."""
        lines.complaint(text)

    def out(self, width: int | None = None) -> Rich:
        """Rich's console on standard output; `width`, in characters, where that is no terminal."""
        from mace.shown import terminal

        return terminal.output() if width is None else terminal.output(width)

    def err(self) -> Rich:
        """Rich's console on standard error, for what is shown while the command works."""
        from mace.shown import terminal

        return terminal.PlainConsole(stderr=True)

    def table(self, *headings: str) -> PlainTable:
        """An empty table with these columns."""
        from mace.shown.terminal import PlainTable

        table = PlainTable()
        for heading in headings:
            table.add_column(heading)
        return table
