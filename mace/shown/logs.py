"""What is logged, shown on standard error as lines of text."""

from __future__ import annotations

import logging
from typing import Any

from contracts.names import printable


def log_to_stderr(*, debug: bool) -> None:
    """Show what is logged: warnings and errors, or with `debug` everything, with its time and place."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[_Shown(debug=debug)])


class _Shown(logging.Handler):
    """Hands records to Rich's handler, which the first record makes: most commands log nothing and start without it."""

    def __init__(self, *, debug: bool) -> None:
        super().__init__()
        self._debug = debug
        self._handler: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._handler is None:
            self._handler = self._made()
        self._handler.emit(record)

    def _made(self) -> logging.Handler:
        from rich.logging import RichHandler  # noqa: PLC0415 (nothing may ever be logged)

        from mace.shown.terminal import PlainConsole  # noqa: PLC0415

        made = RichHandler(console=PlainConsole(stderr=True), show_path=self._debug, show_time=self._debug)
        made.setFormatter(_Formatter("%(message)s"))
        return made


class _Formatter(logging.Formatter):
    """A message on one line of text; of a traceback the lines stay lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name in logging)
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 (the name in logging)
        return "\n".join(printable(each) for each in super().formatException(ei).split("\n"))
