"""Cost of the live table: the CPU time of drawing it twice a second, with 50 containers and windows that arrive.

The table is drawn as in `mace top`, by Textual to a terminal of 80 × 24 that is read. The peer is the same table with
Textual's own `DataTable`, whose cells are updated at the same pace.
"""

import asyncio
import os
import pty
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

from contracts.ledger import Ledger
from contracts.recent import Recent
from mace.shown.top.drawing import sparkline
from mace.shown.top.feed import Look
from mace.shown.top.rows import TableView
from tests.benchmark.figures import figure
from tests.made_minutes import NS, make_minute
from tests.made_results import with_rows, with_totals

CONTAINERS = 50
PACKETS_PER_S = 10_000
SECONDS = 12
ROUNDS = 3
TARGET = 0.05


class _Feed:
    """A feed whose windows are those of one made second, moved on by a second each second."""

    title = "host · made"
    is_live = True

    def __init__(self) -> None:
        _, _, [self._second] = make_minute(seconds=1, containers=CONTAINERS, packets_per_s=PACKETS_PER_S)
        self._recent = Recent()
        self._number = 0
        for _ in range(60):
            self.advance()
        self.ends = 0.0

    def advance(self) -> None:
        """Add the windows of the next second."""
        move = self._number * NS
        windows = self._second.rows.windows
        results = with_rows(
            self._second, windows=windows.with_column("start_utc_ns", windows.column("start_utc_ns") + move)
        )
        totals = self._second.totals
        self._recent.add(
            with_totals(results, settled_utc_ns=totals.settled_utc_ns + move, upto_utc_ns=totals.upto_utc_ns + move)
        )
        self._number += 1

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.ends

    async def look(self) -> Look:
        return Look(self._recent.moment(), Ledger(records=self._number, matched=self._number), (), kept_s=10.0)


def _in_a_terminal(work: Callable[[], None]) -> float:
    """Return the CPU time, s, of this thread and of the threads it starts, while `work` draws to a terminal."""
    master, tty = pty.openpty()
    termios.tcsetwinsize(tty, (24, 80))

    def drain() -> None:
        try:
            while os.read(master, 1 << 16):
                pass
        except OSError:
            pass  # closed

    threading.Thread(target=drain, daemon=True).start()
    before = sys.__stdin__, sys.__stderr__, os.environ.get("TERM")
    stream = os.fdopen(tty, "r+b", buffering=0)
    os.environ["TERM"] = "xterm-256color"
    saved = [os.dup(number) for number in (0, 1, 2)]
    try:
        for number in (0, 1, 2):
            os.dup2(tty, number)
        begin = time.process_time()
        work()
        return time.process_time() - begin
    finally:
        for number, fd in enumerate(saved):
            os.dup2(fd, number)
            os.close(fd)
        if before[2] is None:
            del os.environ["TERM"]
        else:
            os.environ["TERM"] = before[2]
        stream.close()
        os.close(master)


def _cores(make: Callable[[_Feed], Any]) -> float:
    """Return the cores that a screen uses, without those of the windows that arrive, in `SECONDS` seconds."""
    from textual.app import App

    feed = _Feed()

    def work() -> None:
        app: App[None] = make(feed)

        async def run() -> None:
            feed.ends = time.monotonic() + SECONDS
            arriving = asyncio.create_task(_arrive(feed))
            await app.run_async(mouse=False)
            arriving.cancel()

        asyncio.run(run())

    def nothing() -> None:
        async def run() -> None:
            feed.ends = time.monotonic() + SECONDS
            await _arrive(feed)

        asyncio.run(run())

    return (_in_a_terminal(work) - _in_a_terminal(nothing)) / SECONDS


async def _arrive(feed: _Feed) -> None:
    while not feed.is_over:
        await asyncio.sleep(1)
        feed.advance()


def _ours(feed: _Feed) -> Any:
    from mace.shown.top.screen import Messages, TopApp

    return TopApp(feed, Messages())  # type: ignore[arg-type]


def _with_data_table(feed: _Feed) -> Any:
    from textual.app import App, ComposeResult
    from textual.widgets import DataTable

    class Peer(App[None]):
        def __init__(self) -> None:
            super().__init__(ansi_color=True)
            self.view = TableView()

        def compose(self) -> ComposeResult:
            yield DataTable()

        async def on_mount(self) -> None:
            self.view.show((await feed.look()).moment)
            table = self.query_one(DataTable)
            for name in ("name", "way", "rate", "p50", "p99", "max", "minute"):
                table.add_column(name, key=name, width=12)
            for number in range(len(self.view.rows)):
                table.add_row(*[""] * 7, key=str(number))
            self.set_interval(0.5, self.draw)

        async def draw(self) -> None:
            if feed.is_over:
                self.exit()
                return
            self.view.show((await feed.look()).moment)
            table = self.query_one(DataTable)
            for number, row in enumerate(self.view.rows):
                f = row.figures
                values = (row.owner.name, row.direction.name, f.per_second, f.p50_ns, f.p99_ns, f.max_ns)
                for name, value in zip(("name", "way", "rate", "p50", "p99", "max"), values, strict=True):
                    table.update_cell(str(number), name, str(value))
                table.update_cell(str(number), "minute", sparkline(f.p99s_ns, 12))

    return Peer()


def run() -> list[dict[str, Any]]:
    """Return the cores of drawing, with every container shown as a row in each direction."""
    ours = [_cores(_ours) for _ in range(ROUNDS)]
    peer = _cores(_with_data_table)
    return [figure("top_cost", "cores", ours, "Textual's DataTable", peer)]
