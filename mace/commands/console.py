"""Prints for a command: results to standard output, everything else to standard error.

Rich is imported when the first table is drawn.
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

    def line(self, text: str, *, flush: bool = False) -> None:
        """Print one line of the result."""
        lines.line(text, flush=flush)

    def json(self, value: Any, *, flush: bool = False) -> None:
        """Print the result, or a self-contained part of it, as JSON on one line."""
        lines.json_line(value, flush=flush)

    def show(self, *drawn: RenderableType) -> None:
        """Print tables and texts of the result."""
        self.out().print(*drawn)

    def complain(self, text: str) -> None:
        """Print one line on standard error."""
        lines.complaint(text)

    def out(self, width: int | None = None) -> Rich:
        """Return Rich's console on standard output; `width`, in characters, applies where that is no terminal."""
        from mace.shown import terminal

        return terminal.output() if width is None else terminal.output(width)

    def err(self) -> Rich:
        """Return Rich's console on standard error, for progress."""
        from mace.shown import terminal

        return terminal.PlainConsole(stderr=True)

    def table(self, *headings: str) -> PlainTable:
        """Return an empty table with these columns."""
        from mace.shown.terminal import PlainTable

        table = PlainTable()
        for heading in headings:
            table.add_column(heading)
        return table
