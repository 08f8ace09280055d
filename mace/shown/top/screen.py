"""The screen of `mace top`, with Textual: keys, and one widget that draws everything twice a second.

Textual is an extra: importing this module without it raises `MissingExtra`. With 50 containers, Textual's
`DataTable` takes a tenth of a core at this pace; one widget that makes its own lines takes a seventh of that
(docs/benchmarks.md, `top_cost`).
"""

from __future__ import annotations

import asyncio
import select
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import ClassVar, Final

from rich.console import Console, Group, RenderableType
from rich.segment import Segment as Drawn
from rich.style import Style
from rich.table import Table

from contracts.errors import MaceError, MissingExtra
from contracts.ledger import Ledger
from contracts.recent import NOTHING
from mace.shown import cpus, report
from mace.shown.terminal import styled
from mace.shown.top import drawing
from mace.shown.top.drawing import Line, Piece
from mace.shown.top.feed import Feed, Look
from mace.shown.top.rows import WINDOWS_S, TableView

try:
    from textual import events
    from textual.app import App, ComposeResult
    from textual.strip import Strip
    from textual.widget import Widget
except ImportError as e:
    raise MissingExtra("top", "textual") from e

INTERVAL_S: Final = 0.5
"""Time between two drawings."""
WORST: Final = 10
"""Packets that `w` shows."""
_PAGES: Final = {"?": "help", "w": "worst", "c": "cpus", "l": "messages"}
_WIDEST: Final = 300
"""Columns of the widest table."""
_PAN: Final = 20
"""Columns by which left and right move a page that is wider than the screen."""


class Messages:
    """The last messages of a run, of any thread: the newest is shown in the screen, all are printed after it."""

    def __init__(self) -> None:
        self._kept: deque[str] = deque(maxlen=200)
        self.count = 0

    def add(self, text: str) -> None:
        """Add a message."""
        self._kept.append(text)
        self.count += 1

    def all(self) -> list[str]:
        """Return the last messages, oldest first; if there were more, a line says so."""
        kept = list(self._kept)
        return kept if self.count == len(kept) else [f"{self.count - len(kept):,} earlier messages", *kept]

    @property
    def newest(self) -> str:
        """The last message; "" if there is none."""
        return self._kept[-1] if self._kept else ""


class TopScreen(Widget, can_focus=True):
    """The whole screen: title, table or page, ledger, message, keys."""

    DEFAULT_CSS = "TopScreen { width: 100%; height: 100%; background: ansi_default; color: ansi_default; }"

    def __init__(self, feed: Feed, messages: Messages, *, ascii_only: bool = False) -> None:
        super().__init__()
        self.feed, self.messages, self._ascii = feed, messages, ascii_only
        self.view = TableView()
        self.seen = Look(NOTHING, Ledger(), ())
        """The newest look."""
        self.shown = self.seen
        """The look in the table; older than `seen` while the table is frozen."""
        self.frozen = False
        self.typing = False
        """Whether keys go into the filter."""
        self.page = ""
        """What is shown in place of the table: a value of `_PAGES`, or "" for the table."""
        self._page_lines: list[Strip] = []
        self._page_top = self._page_left = 0
        self._lines: list[Strip] = []
        self._stale = True
        self._busy: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_mount(self) -> None:
        """Draw from now on."""
        self.focus()
        self.set_interval(INTERVAL_S, self.tick)
        self.call_later(self.tick)

    async def tick(self) -> None:
        """Look again, and draw unless the terminal has not even taken the last drawing."""
        if self.feed.is_over:
            self.app.exit()
            return
        if self._stale or self.feed.is_live:
            self._stale = False
            try:
                self.seen = await self.feed.look()
            except MaceError as error:
                self.messages.add(str(error))
            if not self.frozen:
                self._take()
        if takes_more():
            self.draw()

    def draw(self) -> None:
        """Make all lines anew."""
        width, height = self.size
        if width and height:
            self._lines = [self._strip(line) for line in self._made(width, height)][:height]
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Return one line."""
        return self._lines[y] if y < len(self._lines) else Strip.blank(self.size.width)

    def on_resize(self) -> None:
        """Draw in the new size."""
        if self.page and not self._busy & {"the worst packets", "the CPUs"}:
            self._turn_to(self.page)
        self.draw()

    def _take(self) -> None:
        if self.shown is not self.seen:
            moved = self.shown.moment is not self.seen.moment
            self.shown = self.seen
            if moved:
                self.view.show(self.seen.moment)

    # Lines ------------------------------------------------------------------------------------------------

    def _made(self, width: int, height: int) -> list[Line | Strip]:
        look = self.shown
        top: list[Line | Strip] = [drawing.title_line(self.view, look, self.feed.title, self.frozen, width)]
        bottom: list[Line | Strip] = [*drawing.ledger_lines(self.seen, width), self._message_line(width)]
        bottom.append(self._last_line(width))
        room = max(height - len(top) - len(bottom), 2)
        if self.page:
            self._page_top = min(self._page_top, max(len(self._page_lines) - room, 0))
            at = min(self._page_left, max(max((s.cell_length for s in self._page_lines), default=0) - width, 0))
            self._page_left = at
            seen = self._page_lines[self._page_top : self._page_top + room]
            middle: list[Line | Strip] = [each.crop(at, at + width) for each in seen]
            middle += [Strip.blank(width)] * (room - len(middle))
        else:
            middle = list(drawing.table_lines(self.view, look, width, room))
        return [*top, *middle, *bottom]

    def _message_line(self, width: int) -> Line:
        return drawing.message_line(self.seen, self.messages.newest, self.messages.count, width)

    def _last_line(self, width: int) -> Line:
        if self.typing:
            return drawing.text_line(f"filter: {self.view.text}_  enter keeps it, escape removes it", "bold", width)
        if self.page:
            return drawing.text_line("escape closes this page; arrows, page up, page down move it", "dim", width)
        return drawing.keys_line(self.feed.is_live, width)

    def _strip(self, line: Line | Strip) -> Strip:
        if isinstance(line, Strip):
            return line
        return Strip([Drawn(drawing.plain(text) if self._ascii else text, _style(style)) for text, style in line])

    # Keys -------------------------------------------------------------------------------------------------

    async def on_key(self, event: events.Key) -> None:
        """Do what a key asks for."""
        event.stop()
        event.prevent_default()
        if event.key == "ctrl+c":
            self.app.exit()
        elif self.typing:
            self._type(event)
        elif self.page:
            self._turn(event)
        else:
            self._act(event)
        self.draw()

    def _type(self, event: events.Key) -> None:
        if event.key == "enter":
            self.typing = False
        elif event.key == "escape":
            self.typing, self.view.text = False, ""
        elif event.key == "backspace":
            self.view.text = self.view.text[:-1]
        elif event.is_printable and event.character is not None:
            self.view.text += event.character
        self.view.update()

    def _turn(self, event: events.Key) -> None:
        """Move or leave a page."""
        rows = self._rows_of_key(event.key)
        if rows is not None:
            self._page_top = max(self._page_top + rows, 0)
        elif event.key in ("left", "right"):
            self._page_left = max(self._page_left + (_PAN if event.key == "right" else -_PAN), 0)
        elif event.key == "escape" or event.character in {"q", *_PAGES}:
            self.page, self._page_lines = "", []

    def _act(self, event: events.Key) -> None:
        """Do what a key asks for in the table."""
        key = event.character if event.is_printable and event.character else event.key
        rows = self._rows_of_key(event.key)
        if rows is not None:
            self.view.move(rows)
        elif key in WINDOWS_S:
            self.view.window_s = WINDOWS_S[key]
            self.view.update()
        elif key in _PAGES:
            self._turn_to(_PAGES[key])
        elif not self.feed.is_live and key in _MOVES:
            self._go(*_MOVES[key])
        elif (act := self._ACTIONS.get(key)) is not None:
            act(self)

    def _rows_of_key(self, key: str) -> int | None:
        """Return how far a key moves the cursor or a page; None for another key."""
        page = max(self.size.height - 8, 1)
        steps = {"up": -1, "down": 1, "pageup": -page, "pagedown": page, "home": -(1 << 30), "end": 1 << 30}
        return steps.get(key)

    def _quit(self) -> None:
        self.app.exit()

    def _filter(self) -> None:
        self.typing = True

    def _sort_next(self) -> None:
        self.view.sort_by(1)

    def _sort_previous(self) -> None:
        self.view.sort_by(-1)

    def _reverse(self) -> None:
        self.view.reverse = not self.view.reverse
        self.view.update()

    def _expand(self) -> None:
        self.view.toggle()

    def _expand_all(self) -> None:
        self.view.toggle_all()

    def _unfilter(self) -> None:
        self.view.text = ""
        self.view.update()

    def _freeze(self) -> None:
        self.frozen = not self.frozen
        if not self.frozen:
            self._take()

    def _record(self) -> None:
        self._begin("a recording", self._said(self.feed.record))

    def _trace(self) -> None:
        self.messages.add("writing a trace ...")
        self._begin("a trace", self._said(self.feed.trace))

    _ACTIONS: ClassVar[dict[str, Callable[[TopScreen], None]]] = {
        "q": _quit,
        "/": _filter,
        "s": _sort_next,
        "S": _sort_previous,
        "o": _reverse,
        "enter": _expand,
        "e": _expand_all,
        "escape": _unfilter,
        "f": _freeze,
        "r": _record,
        "t": _trace,
    }

    def _go(self, windows: int | None, to_end: bool) -> None:
        self.feed.move(None if windows is None else windows * self.view.window_s, to_end=to_end)
        self._stale, self.frozen = True, False
        if "a look" not in self._busy:
            self._begin("a look", self.tick)

    def _begin(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start work that takes a while, unless such work is being done."""
        if what in self._busy:
            self.messages.add(f"wait for {what} to end")
            return

        async def done() -> None:
            try:
                await work()
            finally:
                self._busy.discard(what)
                self.draw()

        self._busy.add(what)
        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _said(self, work: Callable[[], Awaitable[str]]) -> Callable[[], Awaitable[None]]:
        async def said() -> None:
            try:
                self.messages.add(await work())
            except MaceError as error:
                self.messages.add(str(error))

        return said

    async def on_unmount(self) -> None:
        """Stop the work that keys have started."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Pages ------------------------------------------------------------------------------------------------

    def _turn_to(self, page: str) -> None:
        if page != self.page:
            self._page_top = self._page_left = 0
        self.page = page
        if page == "help":
            self._fill([styled(line, "") for line in drawing.HELP.split("\n")])
        elif page == "messages":
            told = [*(styled(each, "bold red") for each in self.seen.losses)]
            told += [styled(each, "yellow") for each in (*self.seen.unseen, *self.messages.all())]
            self._fill(told or [styled("no messages yet", "dim")])
        elif page == "cpus":
            self._page_lines = []
            self._begin("the CPUs", self._show_cpus)
        else:
            self._page_lines = []
            self._begin("the worst packets", self._show_worst)

    async def _show_cpus(self) -> None:
        try:
            found = await self.feed.cpus(self.shown)
            told = "which CPU worked on the packets of the last minute, of all containers"
            made: list[RenderableType] = [styled(told, "bold"), "", *cpus.drawn(found)]
            made += [styled(one.sentence(), "") for one in found.containers]
        except MaceError as error:
            made = [styled(str(error), "yellow")]
        if self.page == "cpus":
            self._fill(made)

    async def _show_worst(self) -> None:
        chosen = self.view.admits if self.view.text else None
        try:
            paths = await self.feed.worst(WORST, self.shown, chosen)
        except MaceError as error:
            self.messages.add(str(error))
            paths = []
        if self.page != "worst":
            return
        of = f"containers with {self.view.text!r} in their name" if self.view.text else "all containers"
        told = f"the {len(paths)} packets with the largest overhead of the last minute, {of}"
        self._fill([styled(told, "bold"), *(each for path in paths for each in ("", report.packet_table(path)))])

    def _fill(self, drawn: Sequence[RenderableType]) -> None:
        """Set the lines of a page, which are longer than the screen's if a table needs more."""
        console = Console(
            width=max(self.size.width, 1), color_system="standard", markup=False, emoji=False, highlight=False
        )
        if self.page == "cpus":
            wide = console.options.update(width=_WIDEST)
            needed = [console.measure(each, options=wide).maximum for each in drawn if isinstance(each, Table)]
            console.width = max(console.width, *needed, 1)
        lines = console.render_lines(Group(*drawn), pad=True)
        self._page_lines = [self._strip([Piece(text, str(style or "")) for text, style, _ in line]) for line in lines]


_MOVES: Final[dict[str, tuple[int | None, bool]]] = {
    "left": (-1, False),
    "right": (1, False),
    "b": (None, False),
    "n": (0, True),
}
"""Key -> windows to go, None for the first second; whether to go to the last second."""


class TopApp(App[None]):
    """Shows one feed until a key, a signal or the feed's end closes it."""

    ENABLE_COMMAND_PALETTE = False
    CSS = "Screen { background: ansi_default; color: ansi_default; }"

    def __init__(self, feed: Feed, messages: Messages, *, ascii_only: bool = False) -> None:
        super().__init__(ansi_color=True)
        self.table = TopScreen(feed, messages, ascii_only=ascii_only)

    def compose(self) -> ComposeResult:
        """Return the one widget."""
        yield self.table


def takes_more() -> bool:
    """Return whether the terminal can take output now. Otherwise a drawing would wait, and keys and signals with it."""
    stream = sys.__stderr__
    try:
        return stream is None or bool(select.select((), (stream,), (), 0)[1])
    except (OSError, ValueError):
        return True  # nothing is drawn to this stream


@lru_cache(maxsize=64)
def _style(style: str) -> Style:
    return Style.parse(style) if style else Style.null()
