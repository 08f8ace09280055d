"""Writes capture files (`.mace`): the raw stream, unchanged, for a replay.

    open(): signature + HEADER     write(): one frame a call     aclose(): END, fsync

The file grows by whole frames, each written with one system call where possible: a killed writer leaves a readable
capture without the END mark. docs/capture-format.md describes the format.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from contracts.errors import StoreError, WireError
from contracts.interfaces import Progress, StreamHeader, StreamItem
from contracts.records import Batch
from contracts.wire import FILE_HEAD, MAX_RECORDS, Encoder
from storage.sealing.places import refuse_existing

if TYPE_CHECKING:  # sealing needs an extra
    from storage.sealing.capture import CaptureSeal
    from storage.sealing.keys import SealKey

_LOG: Final = logging.getLogger(__name__)


class CaptureSink:
    """A `StreamSink` that writes to one file.

    `sync` says when the file is synchronised to the disk: `close` (default) once at the end, `frame` after every write,
    `never`. Without it a killed process loses nothing; a power failure may lose the last seconds.

    A thread writes, so that a disk that hangs for a second does not stop the event loop, which has to empty the rings.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        overwrite: bool = False,
        sync: Literal["close", "frame", "never"] = "close",
        seal: SealKey | None = None,
    ) -> None:
        """With `seal`, `FILE.seal` states each frame, signed by this key (`storage.sealing.capture`)."""
        self.path: Final = Path(path)
        self.bytes_written = 0
        """Number of bytes of whole frames in the file."""
        self._overwrite = overwrite
        self._sync = sync
        self._encoder = Encoder()
        self._fd: int | None = None
        self._regular = True
        self._failed: str | None = None
        self._key = seal
        self._seal: CaptureSeal | None = None
        # A cancelled write continues in its thread, and later writes have to wait for it.
        self._lock = Lock()

    @property
    def records(self) -> int:
        """Number of records in the file."""
        return self._encoder.records

    @property
    def seal_head(self) -> str:
        """SHA-256 of the seal's last line, in hexadecimal; "" without a seal."""
        return self._seal.head if self._seal else ""

    async def open(self, header: StreamHeader) -> None:
        """Create the file. Raises `StoreError`, also if the file exists and `overwrite` is false."""
        await asyncio.to_thread(self._open, header)

    async def write(self, item: StreamItem) -> None:
        """Append an item. Raises `StoreError` (disk full, ...), and `WireError` for an item out of order.

        `Progress` is not written, because nothing waits for it in a replay.
        """
        if isinstance(item, Progress):
            return
        await asyncio.to_thread(self._write, item)

    async def aclose(self) -> None:
        """Append the END mark, unless a write failed, and close the file. May be called again."""
        await asyncio.to_thread(self._close)

    def _open(self, header: StreamHeader) -> None:
        with self._lock:
            if self._key is not None and not self._overwrite:
                refuse_existing(self.path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            try:
                fd = os.open(self.path, flags | (0 if self._overwrite else os.O_EXCL), 0o644)
            except FileExistsError:
                raise StoreError(
                    f"{self.path}: exists already; choose another name, or overwrite it with --force"
                ) from None
            except OSError as error:
                raise StoreError(f"{self.path}: cannot be created: {error.strerror}") from error
            self._fd = fd
            try:
                self._empty(fd)
                if self._key is not None and not self._regular:
                    raise StoreError(f"{self.path}: not a regular file, so it cannot be sealed; leave out --seal")
                frame = self._encoder.header(header)
                self._append(FILE_HEAD + frame)
                if self._key is not None:
                    self._begin_seal(self._key, header, frame)
            except BaseException:
                self._fd = None
                os.close(fd)
                if self._seal is not None:
                    self._seal.close()
                raise

    def _begin_seal(self, key: SealKey, header: StreamHeader, frame: bytes) -> None:
        from storage.sealing.capture import CaptureSeal  # noqa: PLC0415 (needs an extra)

        try:
            self._seal = CaptureSeal(self.path, key, header, overwrite=self._overwrite, sync=self._sync == "frame")
            self._seal.frame(frame)
        except OSError as error:
            raise StoreError(f"{self.path}: its seal cannot be written: {error.strerror}") from error

    def _empty(self, fd: int) -> None:
        try:
            # Before truncating: another recording may be writing this file.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{self.path}: another recording is writing it") from None
        except OSError:
            _LOG.debug("%s: no file locks here", self.path)
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if self._regular:
            os.ftruncate(fd, 0)

    def _write(self, item: StreamItem) -> None:
        with self._lock:
            if self._failed is not None:
                raise StoreError(self._failed)
            pieces: list[StreamItem] = [item]
            if isinstance(item, Batch) and len(item) > MAX_RECORDS:
                pieces = [item[start : start + MAX_RECORDS] for start in range(0, len(item), MAX_RECORDS)]
            for piece in pieces:
                try:
                    frame = self._encoder.item(piece)
                except WireError as error:
                    # Not in the file, so the file must not claim to be complete.
                    self._failed = f"{self.path}: {error}"
                    raise
                self._append(frame)
                self._state(frame, piece if isinstance(piece, Batch) else None)

    def _state(self, frame: bytes, batch: Batch | None = None) -> None:
        """Let the seal state a frame that has been written."""
        if self._seal is None:
            return
        try:
            self._seal.frame(frame, batch)
        except OSError as error:
            self._failed = (
                f"{self.path}: its seal cannot be written: {error.strerror}; the frames that it states can be verified"
            )
            raise StoreError(self._failed) from error

    def _close(self) -> None:
        with self._lock:
            if self._fd is None:
                return
            try:
                if self._failed is None:
                    frame = self._encoder.end()
                    self._append(frame)
                    self._flush(self._sync == "close")
                    self._state(frame)
                self._end_seal()
            finally:
                fd, self._fd = self._fd, None
                os.close(fd)
                if self._seal is not None:
                    self._seal.close()

    def _end_seal(self) -> None:
        if self._seal is None:
            return
        whole = self._failed is None
        try:
            self._seal.end(self._encoder.records, self._encoder.lost, whole=whole, sync=self._sync == "close")
        except OSError as error:
            if whole:
                raise StoreError(f"{self.path}: the end of its seal cannot be written: {error.strerror}") from error
            _LOG.warning("%s: the end of its seal cannot be written: %s", self.path, error.strerror)

    def _append(self, frame: bytes) -> None:
        if self._fd is None:
            raise StoreError(f"{self.path}: not open")
        left = memoryview(frame)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            self._fail(error)
        self.bytes_written += len(frame)
        self._flush(self._sync == "frame")

    def _flush(self, now: bool) -> None:
        if not now or self._fd is None or not self._regular:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        assert self._fd is not None
        if self._regular:
            # Back to whole frames. A reader can handle half a frame; this only avoids its warning.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.bytes_written)
        self._failed = (
            f"{self.path}: {error.strerror} after {self.bytes_written} bytes; "
            "the records written before can be replayed"
        )
        raise StoreError(self._failed) from error
