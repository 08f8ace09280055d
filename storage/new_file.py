"""A file that appears when it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

from contracts.errors import StoreError
from storage.ownership import open_new


class NewFile:
    """A file that has a temporary name until `close` gives it its own; `abort` removes it. Raises `StoreError`."""

    def __init__(self, path: Path | str, *, overwrite: bool) -> None:
        self.path: Final = Path(path)
        self.bytes_written = 0
        self._partial: Final = self.path.with_name(self.path.name + ".part")
        if self.path.exists() and not overwrite:
            raise StoreError(f"{self.path}: exists already; choose another name, or overwrite it with --force")
        try:
            self._file: BinaryIO = open_new(self._partial)
        except OSError as error:
            raise StoreError(f"{self._partial}: cannot be created: {error.strerror}") from error

    @property
    def closed(self) -> bool:
        """Whether the file was closed or aborted."""
        return self._file.closed

    def write(self, data: bytes) -> None:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.bytes_written += len(data)

    def close(self) -> None:
        """Give the file its name. May be called again."""
        if self._file.closed:
            return
        try:
            self._file.close()
            self._partial.replace(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from error

    def abort(self) -> None:
        """Remove the incomplete file. Does nothing after `close`."""
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)
