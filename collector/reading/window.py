"""A window that moves over a file from front to back, for formats whose frames state their own length."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

from contracts.errors import CaptureError

_READ_BYTES: Final = 1 << 20
"""Bytes per read: some 400,000 records of a capture, enough to make the system call's cost negligible."""


class FileWindow:
    """Bytes of a file from `offset` on, as many as `fill` has requested."""

    def __init__(self, path: Path | str, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.bytes = bytearray()
        self.offset = 0
        """Offset in the file of the first byte in `bytes`."""

    def fill(self, size: int) -> int:
        """Read until `bytes` holds `size` bytes or the file ends; return how many it holds, at most `size`.

        Raises `CaptureError` if reading fails.
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
        """Move `size` bytes forward; `bytes` holds at least as many."""
        del self.bytes[:size]
        self.offset += size

    def seek(self, offset: int) -> None:
        """Move to another place of the file."""
        self.bytes.clear()
        self.offset = self._file.seek(offset)
