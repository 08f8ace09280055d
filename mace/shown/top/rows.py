"""Which rows the table of `mace top` has, and in which order: sorting, filtering, expanding and the cursor."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from contracts.names import printable
from contracts.recent import NOTHING, Moment, Owner, Row, containers, paths
from contracts.schema import Direction

COLUMNS: Final = ("container", "direction", "packets/s", "p50", "p99", "max")
"""Columns by which the table is sorted, in the order in which `s` goes through them."""
_FIGURES: Final = ("per_second", "p50_ns", "p99_ns", "max_ns")
WINDOWS_S: Final = {"1": 1, "2": 10, "3": 60}
"""Key -> length of the window, s."""


@dataclass(slots=True)
class TableView:
    """The state of a table, and its rows. Rows keep their order from look to look if the table is sorted by name."""

    window_s: int = 10
    column: int = 0
    """Index into `COLUMNS`."""
    reverse: bool = False
    """Against the column's usual order: names ascend, figures descend."""
    text: str = ""
    """Rows of containers whose name contains it are shown, in any case of letters."""
    expanded: set[tuple[Owner, Direction]] = field(default_factory=set)
    cursor: int = 0
    top: int = 0
    """Index of the first visible row."""
    rows: list[Row] = field(default_factory=list)
    hidden: int = 0
    """Number of rows of containers that the filter leaves out."""
    _moment: Moment = NOTHING
    _made: tuple[Moment, int] | None = None
    _whole: list[Row] = field(default_factory=list)
    _expanded: tuple[Moment, int, frozenset[tuple[Owner, Direction]]] | None = None
    _devices: dict[tuple[Owner, Direction], list[Row]] = field(default_factory=dict)

    def show(self, moment: Moment) -> None:
        """Take another moment."""
        self._moment = moment
        self.update()

    def update(self) -> None:
        """Compute the rows anew; the cursor stays at its row."""
        at = self.selected
        if self._made is None or self._made[0] is not self._moment or self._made[1] != self.window_s:
            self._made = self._moment, self.window_s
            self._whole = containers(self._moment, self.window_s)
        chosen = [row for row in self._whole if self.admits(row.owner.name)]
        self.hidden = len(self._whole) - len(chosen)
        visible = self.expanded & {(row.owner, row.direction) for row in chosen}
        devices = self._paths(visible)
        self.rows = []
        for row in self._sorted(chosen):
            self.rows += [row, *devices.get((row.owner, row.direction), ())]
        if at is not None:
            self.cursor = next((n for n, row in enumerate(self.rows) if row.key == at.key), self.cursor)
        self.move(0)

    def _paths(self, visible: set[tuple[Owner, Direction]]) -> dict[tuple[Owner, Direction], list[Row]]:
        key = self._moment, self.window_s, frozenset(visible)
        if self._expanded is None or self._expanded[0] is not key[0] or self._expanded[1:] != key[1:]:
            self._devices, self._expanded = paths(*key), key
        return self._devices

    def admits(self, name: str) -> bool:
        """Return whether the filter admits a container of this name."""
        return self.text.casefold() in printable(name).casefold()

    @property
    def selected(self) -> Row | None:
        """The row at the cursor."""
        return self.rows[self.cursor] if self.cursor < len(self.rows) else None

    def move(self, rows: int) -> None:
        """Move the cursor."""
        self.cursor = min(max(self.cursor + rows, 0), max(len(self.rows) - 1, 0))

    def scroll(self, height: int) -> None:
        """Choose the first visible row, so that the cursor is among `height` visible rows."""
        self.top = max(min(self.top, self.cursor), self.cursor - height + 1)
        self.top = min(self.top, max(len(self.rows) - height, 0))

    def toggle(self) -> None:
        """Show or hide the devices in the path of the row at the cursor."""
        row = self.selected
        if row is None:
            return
        key = row.owner, row.direction
        if key in self.expanded:
            self.expanded.remove(key)
            self.cursor = next(n for n, each in enumerate(self.rows) if (each.owner, each.direction) == key)
        else:
            self.expanded.add(key)
        self.update()

    def toggle_all(self) -> None:
        """Show the devices of all rows, or hide them if any are shown."""
        if self.expanded:
            self.expanded.clear()
        else:
            self.expanded.update((row.owner, row.direction) for row in self.rows)
        self.update()

    def sort_by(self, step: int) -> None:
        """Sort by the next column, or by the one before it."""
        self.column = (self.column + step) % len(COLUMNS)
        self.reverse = False
        self.update()

    def _sorted(self, rows: list[Row]) -> list[Row]:
        """Return rows, which are in the order of their names, in the chosen order."""
        if self.column == 0:
            return sorted(rows, key=lambda row: row.owner, reverse=self.reverse)
        if self.column == 1:
            return sorted(rows, key=lambda row: row.direction, reverse=self.reverse)
        # A container without packets has no figures: it comes last, however the table is sorted.
        with_figures = [row for row in rows if row.figures.count]
        with_figures.sort(key=attrgetter(f"figures.{_FIGURES[self.column - 2]}"), reverse=not self.reverse)
        return [*with_figures, *(row for row in rows if not row.figures.count)]
