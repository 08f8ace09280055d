"""A window that moves over a file from front to back, for readers that learn how much to read from what they read."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

from contracts.errors import CaptureError

_READ_BYTES: Final = 1 << 20
"""One read: some 400,000 records of a capture, far more than a system call costs, far less than anyone's memory."""


class FileWindow:
    """The bytes of a file from some place on, as many as were asked for."""

    def __init__(self, path: Path | str, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.bytes = bytearray()
        self.offset = 0
        """In the file, of the first of `bytes`."""

    def fill(self, size: int) -> int:
        """Read until there are `size` bytes or the file ends; how many there are, at most `size`.

        Raises `CaptureError` where the disk fails.
        """
        while len(self.bytes) < size:
            try:
                block = self._file.read(_READ_BYTES)
            except OSError as error:
                raise CaptureError(self.path, self.offset, error.strerror or str(error)) from error
            if not block:
                break
            self.bytes += block
        return min(len(self.bytes), size)

    def drop(self, size: int) -> None:
        """Go on `size` bytes further; there are as many."""
        del self.bytes[:size]
        self.offset += size

    def seek(self, offset: int) -> None:
        """Go to another place of the file."""
        self.bytes.clear()
        self.offset = self._file.seek(offset)
