"""Whose directory it is that we write to.

Root writes most stores, spools and journals, into a directory that somebody named. The owner of that directory can
exchange any file in it, at any moment, for a link to a file of root's. So MACE refuses a directory of another user, and
opens no file that it empties or overwrites through a link.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final

from contracts.errors import StoreError

NO_LINK: Final = os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of every open(2) that writes: with a link in its place the file is not opened (ELOOP)."""


def refuse_foreign(directory: Path) -> None:
    """Raise `StoreError` if a directory, or the link that it is reached by, belongs neither to this user nor to root.

    OSErrors pass.
    """
    for status in (directory.lstat(), directory.stat()):
        if status.st_uid not in (0, os.geteuid()):
            what = "the link" if stat.S_ISLNK(status.st_mode) else "it"
            raise StoreError(
                f"{directory}: {what} belongs to user {status.st_uid}, this process to user {os.geteuid()}; the owner"
                " could lead what is written there into other files: name a directory of your own, or chown it to"
                " this user"
            )


def open_new(path: Path) -> Any:
    """A file to be written anew, binary; never through a link. OSErrors pass."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o644), "wb")
