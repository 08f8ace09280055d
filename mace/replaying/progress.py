"""Shows the progress of a replay on a terminal, and notes requests to stop it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from mace.replaying import remaining


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGINT or SIGTERM has arrived in the block.

    A second signal has the effect of the previous handler, which usually ends the process.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del frame
        asked = True
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _TimeLeft(ProgressColumn):
    """A column of the progress bar with the estimate of `mace.replaying.remaining`."""

    def __init__(self) -> None:
        super().__init__()
        self.left: remaining.Remaining | None = None

    def render(self, task: Task) -> Text:
        del task
        seconds = self.left.seconds(time.monotonic()) if self.left is not None else None
        return Text(f"{remaining.told(seconds)} left", style="progress.remaining")


@contextmanager
def bar(console: Console, *, quiet: bool, what: str = "replay") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar labelled `what`; yields the function to pass to `into_store` as `told`."""
    column = _TimeLeft()
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        column,
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    task = shown.add_task(what, total=None)

    def told(done: int, total: int) -> None:
        if column.left is None:
            column.left = remaining.Remaining(total, done, time.monotonic())
        column.left.update(done, time.monotonic())
        shown.update(task, completed=done, total=total)

    with shown:
        yield told
