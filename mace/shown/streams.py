"""Makes standard input, output and error usable if they are closed, full, or in an encoding that lacks characters.

`claim` is called before other imports: if one of the three is closed, the first file that is opened would get its
number, and output for the terminal would be written into that file.
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
"""Name of the error handler. It replaces characters that tables are drawn with by ASCII characters of the same width,
which keeps columns aligned, and escapes all others, so that two names never become equal.
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
    """Make the three standard streams usable, in whatever state they are. Call it once, when the process starts."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is this one. Reading 0 and writing 1 then fail, as on a closed stream; what is
            # written to 2 is discarded.
            os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_WRONLY)
    codecs.register_error(_SUBSTITUTES, _substituted)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (for as long as the process lives)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # An ASCII locale does not say how other characters are encoded, so UTF-8 is assumed. Undecodable bytes are
        # kept as surrogates, which the command that reads them has to judge.
        encoding = sys.stdin.encoding
        ascii_only = codecs.lookup(encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else encoding, errors="surrogateescape")
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def finished(status: int) -> int:
    """Flush the output and return the exit status: 1 if writing standard error failed. Raises `OutputError`."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
    return status or int(isinstance(raw, _Raw) and raw.failed)


class _Raw(io.FileIO):
    """Standard output or error. After a failed write it accepts everything and writes nothing.

    Python flushes the streams when it ends; a second failure would print another error and change the exit status.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.failed = False

    def write(self, data: Any, /) -> int:
        """Write; for standard output, raises `OutputError`, or `BrokenPipeError` if the reader has closed its end.

        A failure of standard error cannot be printed; `finished` reports it by the exit status.
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
