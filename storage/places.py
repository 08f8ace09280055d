"""The place of a dataset: a directory of this machine, or a URL that fsspec supports.

There are few operations, because object stores have few: a file is written whole, read whole, moved, removed. Names are
relative, with `/` between their parts.
"""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from contracts.errors import MissingExtra, StoreError
from storage import segments
from storage.ownership import open_new


class Place(Protocol):
    """A directory on this machine or at a URL. OSErrors pass."""

    location: str
    """Path or URL, from which another process can make the same place."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; replaces a file of that name."""
        ...

    def sink(self, name: str) -> Any:
        """Return a new file to write Parquet to, a context manager. It need not be complete before it is closed."""
        ...

    def move(self, source: str, target: str) -> None:
        """Rename a closed file; replaces a file of the new name."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or a directory with its content, if it exists."""
        ...

    def names(self) -> list[str]:
        """Return the names of the files and directories directly in the place."""
        ...


class LocalPlace:
    """A directory of this machine."""

    def __init__(self, path: Path, *, fsync: bool = True) -> None:
        self.path = path
        self.location = str(path)
        self._fsync = fsync

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Place`."""
        segments.write_whole(self.path / name, segments.write_bytes(memoryview(data)), fsync=self._fsync)

    def sink(self, name: str) -> Any:
        """See `Place`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_new(path)

    def move(self, source: str, target: str) -> None:
        """See `Place`."""
        segments.write_whole(self.path / target, (self.path / source).rename, fsync=self._fsync)

    def remove(self, name: str) -> None:
        """See `Place`."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """See `Place`."""
        return sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []


class RemotePlace:
    """A URL of fsspec. A move is one step if the store supports that, otherwise a copy and a removal."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec  # noqa: PLC0415 (an extra, and slow to import)
        except ImportError as error:
            raise MissingExtra("cluster", "fsspec") from error
        self.location = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{url}: {error}; install the extra `s3` for s3://, or fsspec's package for another scheme"
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            found: bytes = self._files.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        return found

    def write(self, name: str, data: bytes) -> None:
        """See `Place`."""
        temporary = f"{name}.{uuid.uuid4().hex}.tmp"
        with self.sink(temporary) as file:
            file.write(data)
        self.move(temporary, name)

    def sink(self, name: str) -> Any:
        """See `Place`."""
        path = self._at(name)
        self._files.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH120 (a URL's path is no path of ours)
        return self._files.open(path, "wb")

    def move(self, source: str, target: str) -> None:
        """See `Place`."""
        path = self._at(target)
        self._files.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH120 (as above)
        with suppress(FileNotFoundError):
            self._files.rm_file(path)
        self._files.mv(self._at(source), path)
        self._files.invalidate_cache()

    def remove(self, name: str) -> None:
        """See `Place`."""
        with suppress(FileNotFoundError):
            self._files.rm(self._at(name), recursive=True)

    def names(self) -> list[str]:
        """See `Place`."""
        try:
            listed = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(each.rstrip("/").rsplit("/", 1)[-1] for each in listed)


def place_at(location: str | Path, *, fsync: bool = True) -> Place:
    """Return the place at a path or URL. Raises `StoreError`, and `MissingExtra` for a URL without fsspec."""
    if "://" in str(location):
        return RemotePlace(str(location))
    return LocalPlace(Path(location).absolute(), fsync=fsync)
