"""Open a file for reading on this machine, or at a URL that fsspec supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from contracts.errors import MissingExtra, Unavailable

_REMEDY: Final = "name a file that `mace record` or another tracer made"


def is_url(location: str | Path) -> bool:
    """Return whether a location is a URL (`s3://...`, `memory://...`, `file://...`) and not a path."""
    return "://" in str(location)


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises `MissingExtra` without fsspec, `Unavailable` for a URL that fsspec does not support.
    """
    try:
        import fsspec  # noqa: PLC0415 (an extra, and slow to import)
    except ImportError as error:
        raise MissingExtra("cluster", "fsspec") from error
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Unavailable(
            url, str(error), "s3:// needs the extra `s3`; other schemes need the package that fsspec uses for them"
        ) from error
    return found


def open_binary(location: str | Path) -> tuple[BinaryIO, int]:
    """Open a file for reading and seeking; return it and its size (0 if it is no regular file).

    Local files are unbuffered. Raises `Unavailable`.
    """
    try:
        if is_url(location):
            remote, path = filesystem(str(location))
            file = cast("BinaryIO", remote.open(path, "rb"))
            return file, int(remote.size(path) or 0)
        local = Path(location)
        return cast("BinaryIO", local.open("rb", buffering=0)), local.stat().st_size
    except OSError as error:
        raise Unavailable(str(location), error.strerror or str(error) or "cannot be opened", _REMEDY) from error
