"""Where seals are: `FILE.seal` beside a capture file, `STORE/seal` in a store. Needs no extra."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from contracts.errors import StoreError

SUFFIX: Final = ".seal"
"""Added to the name of a capture file."""
NAME: Final = "seal"
"""Name of the seal's file in a store."""


def seal_path(sealed: Path) -> Path:
    """Return the path of the seal of a store (a directory) or a capture file."""
    return sealed / NAME if sealed.is_dir() else sealed.with_name(sealed.name + SUFFIX)


def has_seal(sealed: Path) -> bool:
    """Return whether a store or a capture file has a seal."""
    return seal_path(sealed).is_file()


def refuse_existing(capture: Path) -> None:
    """Raise `StoreError` if a seal is where this capture's seal would be written."""
    path = capture.with_name(capture.name + SUFFIX)
    if path.exists():
        raise StoreError(f"{path}: a seal exists already; choose another name, or overwrite both with --force")
