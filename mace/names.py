r"""Names that the kernel keeps as bytes, as text that every file and database takes.

Names of devices, processes, control groups and mounts are bytes; most are UTF-8, but nothing makes them so. A byte that
is not part of UTF-8 is spelt `\xNN` where the name is read, so that a name is the same text live, in a recording, in
the store and at a database, and two names stay two. A backslash is spelt `\x5c` only where it would read as one of
these; all other names are as they are.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from typing import Final

_READS_AS_ESCAPE: Final = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")
"""UTF-8 has all bytes below 0x80, so that only those above, and the backslash itself, are ever spelt out."""
_ESCAPE: Final = re.compile(rb"\\x(5c|[89a-f][0-9a-f])")


def text_of(raw: bytes) -> str:
    """A name as text; `bytes_of` has the bytes back."""
    given = raw.decode("utf-8", "surrogateescape")
    if "\\" in given:
        given = _READS_AS_ESCAPE.sub(lambda _: "\\x5c", given)
    if given.isascii():
        return given
    # surrogateescape has the byte 0xNN as U+DCNN.
    return "".join(f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char for char in given)


def bytes_of(text: str) -> bytes:
    """The bytes of a name that `text_of` has made text of."""
    return _ESCAPE.sub(lambda spelt: bytes([int(spelt[1], 16)]), text.encode())


def name_of_this_machine() -> str:
    """As `hostname` prints it."""
    return text_of(os.fsencode(platform.node()))


def command_line() -> tuple[str, ...]:
    """Of this process."""
    return tuple(text_of(os.fsencode(word)) for word in sys.argv)
