r"""Names of devices, namespaces, processes, containers and hosts as safe text: neither markup nor terminal commands.

Anyone who can create a container chooses its name, any process chooses its own (prctl), and the kernel accepts any
bytes but `/`, `:` and white space in a device's name (`dev_valid_name`). Names are therefore sanitised in three places,
and nowhere else:

    bytes ──text_of()──► text ──text()──► Device, StreamHeader ──► stores, wire, JSON, Prometheus, Perfetto
                                                               └──printable()──► terminals, logs, pictures, HTML, CSV

Most names are UTF-8, but nothing enforces it. A byte that is not part of UTF-8 is spelt `\xNN` where the name is read.
A name is thereby the same text live, in a recording, in the store and in a database, and different names stay
different. A backslash is spelt `\x5c` only where it would read as such an escape. `printable` spells a character as
Python does, `\x1b`, and leaves backslashes alone: a name that contains those four characters looks the same. Line
protocol cannot hold every character; `storage.lines` adds rules of its own.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from typing import Final

_READS_AS_ESCAPE: Final = re.compile(r"\\(?=x(?:00|5c|[89a-f][0-9a-f]))")
"""A backslash that reads as an escape. `text_of` escapes only NUL, the backslash and bytes from 0x80 on."""
_ESCAPE: Final = re.compile(rb"\\x(00|5c|[89a-f][0-9a-f])")
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
"""Characters that an output format cannot hold: NUL breaks off a scrape of Prometheus, UTF-8 has no surrogates."""
_FIRST_ESCAPED, _LAST_ESCAPED = 0xDC80, 0xDCFF
"""Python's surrogates for the bytes 0x80 to 0xff where they are not UTF-8 (PEP 383)."""


def text_of(raw: bytes) -> str:
    """Return a name, given in the kernel's bytes, as text; `bytes_of` is the inverse."""
    given = raw.decode("utf-8", "surrogateescape")
    if "\\" in given:
        given = _READS_AS_ESCAPE.sub(lambda _: "\\x5c", given)
    return text(given)


def bytes_of(text: str) -> bytes:
    """Return the bytes of a name that `text_of` returned as text."""
    return _ESCAPE.sub(lambda spelt: bytes([int(spelt[1], 16)]), text.encode())


def text(name: str) -> str:
    r"""Return the name with NUL and bytes that are not UTF-8 (Python's lone surrogates) escaped: `\x00`, `\xff`."""
    return name if name.isascii() and "\0" not in name else _NO_TEXT.sub(lambda found: spelt(found[0]), name)


def printable(name: str) -> str:
    r"""Return the name, each character escaped that moves a cursor, reverses the writing direction or is invisible.

    `str.isprintable` decides which: `\x1b`, `\n`, `\u202e`.
    """
    return name if name.isprintable() else "".join(c if c.isprintable() else spelt(c) for c in name)


def spelt(character: str) -> str:
    """Return one character as an ASCII escape in Python's spelling."""
    code = ord(character)
    if _FIRST_ESCAPED <= code <= _LAST_ESCAPED:
        return f"\\x{code & 0xFF:02x}"
    return character.encode("unicode_escape").decode("ascii") if code != ord("\\") else "\\x5c"


def name_of_this_machine() -> str:
    """Return the host name, as `hostname` prints it."""
    return text_of(os.fsencode(platform.node()))


def command_line() -> tuple[str, ...]:
    """Return the command line of this process, word by word."""
    return tuple(text_of(os.fsencode(word)) for word in sys.argv)
