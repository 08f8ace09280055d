"""Standard input, output and error as a command finds them: closed, full, or in an encoding that lacks characters.

Called before anything else is imported: where one of the three is closed, the first file that is opened would take its
place, and what is meant for the terminal would go into it.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any, Final, TextIO

from contracts.errors import OutputError
from contracts.names import spelt

_SUBSTITUTES: Final = "mace-substitutes"
"""Name of the error handler: an ASCII character of the same width for those that tables are drawn with, so that columns
stay columns; all others are spelt out, so that two names never become the same.
"""
_STAND_INS: Final = {
    **dict.fromkeys("─━┄┈", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┏┓┗┛┌┐└┘╭╮╰╯├┤┬┴┼┡┩╇", "+"),
    "█": "#",
    "→": ">",
    "←": "<",
    "µ": "u",
    "·": "|",
    "×": "x",
    "–": "-",
    "…": "~",
    "±": "~",
}


def claim() -> None:
    """Make the three streams fit to be used, whatever they are. For the process's own entry, once."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free is this one. Reading from 0 and writing to 1 fail, as on a closed stream;
            # what is for nobody to read goes nowhere.
            os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_WRONLY)
    codecs.register_error(_SUBSTITUTES, _substituted)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (for as long as the process lives)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A locale that knows ASCII only says nothing of what is beyond; what cannot be read is for the reader to judge.
        encoding = sys.stdin.encoding
        ascii_only = codecs.lookup(encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else encoding, errors="surrogateescape")
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def finished(status: int) -> int:
    """The exit status when all is written: 1 where standard error could not be written. Raises `OutputError`."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
    return status or int(isinstance(raw, _Raw) and raw.failed)


class _Raw(io.FileIO):
    """Standard output or error. Once writing has failed it takes everything and writes nothing.

    Python writes what is left when it ends, and would complain once more, with an exit status of its own.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.failed = False

    def write(self, data: Any, /) -> int:
        """Raises `OutputError` from standard output, and `BrokenPipeError` where its reader has seen enough.

        Standard error has nowhere to complain: `finished` does, by the exit status.
        """
        if not self.failed:
            try:
                return super().write(data)
            except OSError as error:
                self.failed = True
                if self.fileno() == 1:
                    if isinstance(error, BrokenPipeError):
                        raise
                    raise OutputError(f"cannot write: {error.strerror}") from error
        return memoryview(data).nbytes


def _stream(fd: int, before: TextIO | None) -> TextIO:
    encoding = before.encoding if before is not None else "utf-8"
    if before is not None:
        before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(fd)),
        encoding,
        _SUBSTITUTES,
        line_buffering=fd == 2 or os.isatty(fd),
        write_through=bool(getattr(before, "write_through", False)),
    )


def _substituted(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_STAND_INS.get(character) or spelt(character) for character in lacking), error.end
