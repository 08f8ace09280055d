"""A file read from front to back, and decompressed if it is compressed with gzip, bzip2, xz or zstd.

Captures are often kept compressed, and Wireshark reads them so. The decompressed size is bounded by a multiple of the
file's size: a decompression bomb is refused before it fills the memory.
"""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import zstandard

from contracts.errors import CaptureError, Unavailable

_STEP_BYTES: Final = 1 << 10
"""Bytes given to a decompressor at once, which bounds its output: zstd makes up to 128 KiB of four bytes, which is
32 MiB per step."""
_MEMORY_BYTES: Final = 1 << 28
"""Memory limit of a decompressor: `xz -9` needs 65 MiB, `zstd --ultra -22` a window of 128 MiB."""
_RATIO_MAX: Final = 1100
"""Largest ratio of decompression: deflate makes at most 1032 bytes of one; a capture that shrinks more contains nothing
but zeros."""
_SLACK_BYTES: Final = 1 << 20
"""Decompressed bytes below which the ratio is not checked."""

_PACKED: Final[dict[str, tuple[bytes, Callable[[], Any]]]] = {
    "gzip": (b"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31)),
    "bzip2": (b"BZh", bz2.BZ2Decompressor),
    "xz": (b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)),
    "zstd": (
        b"\x28\xb5\x2f\xfd",
        lambda: zstandard.ZstdDecompressor(max_window_size=_MEMORY_BYTES // 2).decompressobj(),
    ),
}
"""Kind of compression -> (first bytes of a file, function that makes a decompressor for one member)."""
_FOREIGN: Final = {
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
_DAMAGE: Final = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError)


def compression_of(head: bytes) -> str:
    """Return the compression of a file with this beginning: `gzip`, `bzip2`, `xz`, `zstd` or an empty string."""
    return next((kind for kind, (magic, _) in _PACKED.items() if head.startswith(magic)), "")


def foreign_compression_of(head: bytes) -> str:
    """Return the name of a compression that MACE does not read, or an empty string."""
    return next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), "")


def unpacked_head(head: bytes, size: int) -> bytes:
    """Return the first `size` decompressed bytes, or fewer, of a file with this beginning. Never raises."""
    kind = compression_of(head)
    if not kind:
        return head[:size]
    one, found = _PACKED[kind][1](), b""
    try:
        for at in range(0, len(head), _STEP_BYTES):
            found += one.decompress(head[at : at + _STEP_BYTES])
            if len(found) >= size or getattr(one, "eof", False):
                break
    except _DAMAGE:
        pass
    return found[:size]


class UnpackedFile:
    """Reads the decompressed bytes of a file from front to back; raises `Unavailable` if it cannot be opened."""

    def __init__(self, path: Path, remedy: str) -> None:
        self.path: Final = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise Unavailable(str(path), error.strerror or str(error), remedy) from error
        self.bytes_total: Final = os.fstat(self._file.fileno()).st_size
        """Size of the file, compressed or not."""
        self.bytes_read = 0
        """Bytes of the file read so far, compressed or not."""
        self.offset = 0
        """Decompressed bytes returned so far."""
        try:
            head = self._file.read(8)
            self.compression: Final = compression_of(head)
            self._packed = head if self.compression else b""
            self._ready = bytearray() if self.compression else bytearray(head)
            self.bytes_read = len(head)
            self._one: Any = None
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call again."""
        self._file.close()

    @property
    def left(self) -> int:
        """Decompressed bytes not returned yet; for a compressed file an estimate from the ratio so far."""
        rest = max(self.bytes_total - self.bytes_read, 0)
        if self.compression:
            rest = rest * (self.offset + len(self._ready)) // max(self.bytes_read, 1)
        return len(self._ready) + rest

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none only at the end; raises `CaptureError` if the file is damaged."""
        if self.compression:
            while len(self._ready) < size and self._unpack():
                pass
        elif len(self._ready) < size:
            block = self._raw(size - len(self._ready))
            self._ready += block
        found = bytes(self._ready[:size])
        del self._ready[:size]
        self.offset += len(found)
        return found

    def skip(self, size: int) -> int:
        """Skip `size` bytes, or to the end, and return how many; raises `CaptureError` if the file is damaged."""
        gone = 0
        if not self.compression:
            gone = min(len(self._ready), size)
            del self._ready[:gone]
            there = min(size - gone, max(self.bytes_total - self.bytes_read, 0))
            self._file.seek(there, os.SEEK_CUR)
            self.bytes_read += there
            gone += there
            self.offset += gone
        while gone < size:
            block = self.read(min(size - gone, _SLACK_BYTES))
            if not block:
                break
            gone += len(block)
        return gone

    def _raw(self, size: int) -> bytes:
        try:
            block = self._file.read(size)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        self.bytes_read += len(block)
        return block

    def _unpack(self) -> bool:
        """Decompress another step, and return whether there may be more."""
        if not self._packed:
            self._packed = self._raw(_STEP_BYTES)
        if not self._packed:
            if self._one is not None:
                self._one = None
                raise self._damaged(f"the file is cut: its {self.compression} stream has no end")
            return False
        if self._one is None:
            # A file may have several members, and zeros behind the last.
            if not self._packed.strip(b"\0"):
                self._packed = b""
                return True
            self._one = _PACKED[self.compression][1]()
        try:
            self._ready += self._one.decompress(self._packed)
        except _DAMAGE as error:
            self._one, self._packed = None, b""
            raise self._damaged(f"its {self.compression} stream is damaged: {error}") from error
        ended = self._one.eof
        self._packed = self._one.unused_data if ended else b""
        if ended:
            self._one = None
        unpacked = self.offset + len(self._ready)
        if unpacked > _SLACK_BYTES + _RATIO_MAX * self.bytes_read:
            raise self._damaged(f"{self.bytes_read} bytes of it unpack to {unpacked}, which no capture does")
        return True

    def _damaged(self, why: str) -> CaptureError:
        return CaptureError(self.path, self.bytes_read, why)
