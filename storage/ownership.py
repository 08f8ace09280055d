"""Protects against directories of other users.

Root writes most stores, spools and journals, into a directory that a user has named. The owner of that directory could
replace any file in it, at any time, by a link to a file of root. MACE therefore refuses a directory of another user,
and never follows a link to a file that it truncates or overwrites.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final

from contracts.errors import StoreError

NO_LINK: Final = os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of every open(2) for writing: if the file is a link, it fails with ELOOP."""


def refuse_foreign(directory: Path) -> None:
    """Raise `StoreError` if a directory, or the link that it is reached by, belongs neither to this user nor to root.

    OSErrors pass.
    """
    for status in (directory.lstat(), directory.stat()):
        if status.st_uid not in (0, os.geteuid()):
            what = "the link" if stat.S_ISLNK(status.st_mode) else "it"
            raise StoreError(
                f"{directory}: {what} belongs to user {status.st_uid}, this process to user {os.geteuid()}; the owner"
                " could redirect the writes into other files: name a directory of your own, or chown it to this user"
            )


def open_new(path: Path) -> Any:
    """Open a file for binary writing, truncated; never through a link. OSErrors pass."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o644), "wb")
