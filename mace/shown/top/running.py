"""Runs the screen of `mace top` on this process's terminal, and leaves the terminal as it was.

The screen is drawn to standard error and reads keys from standard input. While it is open, log records are messages in
the screen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from typing import Final

from contracts.errors import MaceError, Unavailable
from contracts.names import printable
from mace.shown.top.feed import Feed

_STUCK_S: Final = 2
"""Seconds that a terminal may take to accept the last output; then that output is discarded."""
_WRITER: Final = "textual-output"
"""Name of Textual's thread that writes to the terminal."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def require_terminal() -> None:
    """Raise `Unavailable` if a screen cannot be drawn here."""
    remedy = "`mace run` prints figures as it measures, `mace report` those of a store or a recording"
    for number, name in enumerate(("standard input", "standard output", "standard error")):
        if not os.isatty(number):
            raise Unavailable("mace top", f"{name} is not a terminal", remedy)
    if (term := os.environ.get("TERM", "")) in {"", "dumb", "unknown"}:
        raise Unavailable(
            "mace top", f"TERM={term or '(not set)'} names no terminal that a screen can be drawn on", remedy
        )


def require_library() -> None:
    """Raise `MissingExtra` if Textual is not installed, before anything is measured or read."""
    from mace.shown.top import screen  # noqa: F401, PLC0415


@contextlib.contextmanager
def interrupted_by_signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """Call `interrupt` for each SIGINT, SIGTERM and SIGHUP within the block; restore their handlers after it."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            signal.signal(number, lambda *_: interrupt())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(feed: Feed, remarks: list[str]) -> list[str]:
    """Show a feed until it is over or the user quits; returns all messages, of which `remarks` are the first.

    Raises `MissingExtra` without Textual.
    """
    from mace.shown.top.screen import Messages, TopApp  # noqa: PLC0415 (an extra; a third of a second)

    messages = Messages()
    for remark in remarks:
        messages.add(remark)
    with _logged_to(messages.add), _unstuck(feed):
        app = TopApp(feed, messages, ascii_only=not _has_blocks())
        app.run(mouse=False)
    if app.return_code:
        raise MaceError("the screen failed: a defect, please report the traceback above")
    return messages.all()


def _has_blocks() -> bool:
    stream = sys.__stderr__
    try:
        "▁▸→µ".encode((stream.encoding if stream is not None else None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _logged_to(add: Callable[[str], None]) -> Iterator[None]:
    """Give warnings and errors of all loggers to `add` within the block, in place of the handlers before."""
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers = [_Messages(add)]
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers = before


class _Messages(logging.Handler):
    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add(printable(" ".join(record.getMessage().split("\n"))))


@contextlib.contextmanager
def _unstuck(feed: Feed) -> Iterator[None]:
    """Discard output that the terminal does not accept once the feed is over: the screen could not be closed."""
    closed = threading.Event()

    def watch() -> None:
        over_s = 0
        while not closed.wait(1):
            over_s = over_s + 1 if feed.is_over else 0
            if over_s >= _STUCK_S:
                _discard_output()

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    thread = threading.Thread(target=watch, name="terminal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def _discard_output() -> None:
    """Discard what the terminal has not taken, and let the thread that writes to it go on."""
    with contextlib.suppress(termios.error):
        termios.tcflush(2, termios.TCOFLUSH)
    # A pseudo-terminal that is flushed does not wake who waits for room in it (pty_flush_buffer); a signal does.
    for thread in threading.enumerate():
        if thread.name == _WRITER and thread.ident is not None:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
