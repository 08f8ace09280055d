r"""Names of devices, namespaces, processes, containers and hosts are text: never markup, never a command to a terminal.

Whoever may make a container chooses its name, any process chooses its own (prctl), and the kernel takes any bytes but
`/`, `:` and white space as a device's (`dev_valid_name`). So names are brought into shape in three places, and nowhere
else:

    bytes ──text_of()──► text ──text()──► Device, StreamHeader ──► stores, wire, JSON, Prometheus, Perfetto
                                                               └──printable()──► terminals, logs, pictures, HTML, CSV

Most names are UTF-8, but nothing makes them so. A byte that is not part of UTF-8 is spelt `\xNN` where the name is
read, so that a name is the same text live, in a recording, in the store and at a database, and two names stay two. A
backslash is spelt `\x5c` only where it would read as one of these. `printable` spells a character out as Python does,
`\x1b`, and leaves a backslash alone: a name that contains those four characters looks the same. Line protocol cannot
hold every character; `storage.lines` has its own rules on top.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from typing import Final

_READS_AS_ESCAPE: Final = re.compile(r"\\(?=x(?:00|5c|[89a-f][0-9a-f]))")
"""UTF-8 has all bytes below 0x80, so that only those above, NUL and the backslash itself are ever spelt out."""
_ESCAPE: Final = re.compile(rb"\\x(00|5c|[89a-f][0-9a-f])")
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
"""What one of the formats that names go into cannot hold: NUL ends a scrape of Prometheus, UTF-8 has no surrogates."""
_FIRST_ESCAPED, _LAST_ESCAPED = 0xDC80, 0xDCFF
"""Python's surrogates for the bytes 0x80 to 0xff that are no UTF-8 (PEP 383)."""


def text_of(raw: bytes) -> str:
    """A name in the kernel's bytes as text; `bytes_of` has the bytes back."""
    given = raw.decode("utf-8", "surrogateescape")
    if "\\" in given:
        given = _READS_AS_ESCAPE.sub(lambda _: "\\x5c", given)
    return text(given)


def bytes_of(text: str) -> bytes:
    """The bytes of a name that `text_of` has made text of."""
    return _ESCAPE.sub(lambda spelt: bytes([int(spelt[1], 16)]), text.encode())


def text(name: str) -> str:
    r"""The name with NUL and bytes that are not UTF-8 (lone surrogates, to Python) spelt out: `\x00`, `\xff`."""
    return name if name.isascii() and "\0" not in name else _NO_TEXT.sub(lambda found: spelt(found[0]), name)


def printable(name: str) -> str:
    r"""The name as people may see it: whatever moves a cursor, turns the direction of writing round or cannot be seen
    is spelt out (`str.isprintable`): `\x1b`, `\n`, `\u202e`.
    """
    return name if name.isprintable() else "".join(c if c.isprintable() else spelt(c) for c in name)


def spelt(character: str) -> str:
    """One character in ASCII, as Python spells it."""
    code = ord(character)
    if _FIRST_ESCAPED <= code <= _LAST_ESCAPED:
        return f"\\x{code & 0xFF:02x}"
    return character.encode("unicode_escape").decode("ascii") if code != ord("\\") else "\\x5c"


def name_of_this_machine() -> str:
    """As `hostname` prints it."""
    return text_of(os.fsencode(platform.node()))


def command_line() -> tuple[str, ...]:
    """Of this process."""
    return tuple(text_of(os.fsencode(word)) for word in sys.argv)
