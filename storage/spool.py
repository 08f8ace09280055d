"""What waits to be delivered, on the disk and in bounds, so that neither a dead server nor a crash loses it.

    append() ──► segment files, whole frames ──► take() ... acknowledge()
                 the oldest segment goes when there is no room

    DIRECTORY/lock            one writer, by flock
    DIRECTORY/acknowledged    segment and offset up to which all is delivered
    DIRECTORY/NNNNNNNN.frames frames: header with checksum, label, payload

Everything is appended before it is sent, so what a killed process leaves is the truth: at the next start it goes on
where the last acknowledgement was. A request under way at the kill is made again; who receives it must not mind.
A frame that was being written when the process was killed has its header's checksum or its end missing, and is cut off.

Where there is no directory, or the disk takes no more, frames wait in memory, in bounds of their own, and are lost with
the process. Synchronous; may block on the disk; for several threads.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import BinaryIO, Final
from zlib import crc32

from contracts.errors import StoreError, Unavailable
from storage.ownership import NO_LINK, refuse_foreign

_LOG: Final = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("<4sIIHxxI")
"""Magic, bytes of the payload, rows, bytes of the label, checksum of label and payload; a checksum of these follows."""
_CRC: Final = struct.Struct("<I")
_HEADER_BYTES: Final = _HEADER.size + _CRC.size
_MAGIC: Final = b"MSP1"
_SEGMENT_NAME: Final = re.compile(r"[0-9]{8,18}\.frames")
_POSITION: Final = struct.Struct("<QQ")
_SEGMENTS: Final = 16
"""The spool is cut into at least so many files: what is dropped at once when it is full is one of them."""
_SEGMENT_BYTES: Final = 64 << 20
"""... and a file is at most so large."""
_TIDY_BYTES: Final = 4 << 20
"""When all is delivered, a file of this size is begun anew."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Encoded rows that are delivered together."""

    payload: bytes
    rows: int
    label: str = ""
    """What the receiver needs to know besides, such as a topic."""


@dataclass(slots=True)
class _SpooledFrame:
    rows: int
    size: int
    segment: int
    """0: in memory only."""
    offset: int = 0
    frame: Frame | None = None
    """None: on the disk only."""
    taken: bool = False
    """Under way, or delivered: it is not dropped, for it may be stored already."""
    delivered: bool = False


@dataclass(frozen=True, slots=True)
class FrameInDelivery:
    """A frame that is under way."""

    frame: Frame
    entry: _SpooledFrame


class Spool:
    """First in, first out. `directory` None: in memory only.

    `rows` and `frames` wait; `dropped_rows` were given up for want of room, `damaged_rows` could not be read back.
    """

    def __init__(self, directory: Path | None, *, max_bytes: int, memory_bytes: int, sync: bool = False) -> None:
        self._directory = directory
        self._max_bytes, self._memory_bytes, self._sync = max_bytes, memory_bytes, sync
        self._segment_bytes = min(max_bytes // _SEGMENTS, _SEGMENT_BYTES)
        self._entries: deque[_SpooledFrame] = deque()
        self._sizes: dict[int, int] = {}
        """Bytes of each segment file, oldest first."""
        self._next = 1
        """Number of the next segment. Never one that was there before: the acknowledged position must stay true."""
        self._fd = -1
        """Of the newest segment, while it is appended to."""
        self._position_fd = -1
        self._lock_fd = -1
        self._memory = 0
        self._lock = RLock()
        self.rows = 0
        self.dropped_rows = 0
        self.damaged_rows = 0
        self.trouble = ""
        """Why the disk took the last frame not; empty if it did."""

    @property
    def frames(self) -> int:
        """Frames that are in it, also those under way."""
        return len(self._entries)

    @property
    def waiting(self) -> bool:
        """Whether there is one to be taken."""
        with self._lock:
            return any(not entry.taken for entry in self._entries)

    @property
    def bytes(self) -> int:
        """Of the segment files on the disk, delivered frames in them included."""
        return sum(self._sizes.values())

    # Lifecycle: what open takes, close gives back.

    def open(self) -> int:
        """Take hold of the directory and of what an earlier process left there; returns its rows.

        Raises `Unavailable` if another process has it, `StoreError` if it cannot be used.
        """
        if self._directory is None:
            return 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # The spool's folder too: the directories of all sinks stand in it.
            refuse_foreign(self._directory.parent)
            refuse_foreign(self._directory)
            self._lock_fd = _locked(self._directory)
            self._position_fd = os.open(self._directory / "acknowledged", os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
            self._recover()
        except OSError as error:
            self._release()
            raise StoreError(f"{self._directory}: the spool cannot be used: {error.strerror}") from error
        return self.rows

    def close(self) -> int:
        """Let go of it. Returns how many rows waited that are in memory only, and so are lost now."""
        with self._lock:
            # A copy: in a full spool each takes the place of the oldest, and those given up have no frame any more.
            for entry in list(self._entries):
                if entry.segment == 0 and entry.frame is not None and self._directory is not None:
                    self._store(entry, entry.frame)
            # They wait no more: `rows` is what the next process will find.
            lost = [entry for entry in self._entries if entry.segment == 0]
            for entry in lost:
                self._entries.remove(entry)
                self._forget(entry)
            self._release()
            return sum(entry.rows for entry in lost)

    def _release(self) -> None:
        for fd in (self._fd, self._position_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._position_fd = self._lock_fd = -1

    # In and out.

    def full(self, size: int) -> bool:
        """Whether a frame of `size` bytes would cost older ones their place."""
        with self._lock:
            if self._directory is None or self.trouble:
                return self._memory + size > self._memory_bytes
            return self.bytes + size + _HEADER_BYTES > self._max_bytes and bool(self._entries)

    def append(self, frame: Frame) -> None:
        """Keep a frame. Where there is no room the oldest go, all but one that is under way, and are counted."""
        with self._lock:
            entry = _SpooledFrame(frame.rows, len(frame.payload), 0)
            self._entries.append(entry)
            self.rows += frame.rows
            if self._directory is not None:
                self._store(entry, frame)
            if entry.segment == 0 or self._memory + entry.size <= self._memory_bytes:
                entry.frame = frame
                self._memory += entry.size
            while self._memory > self._memory_bytes and self._drop_from_memory():
                pass

    def take(self) -> FrameInDelivery | None:
        """The oldest frame that is not under way; None if there is none. It stays until it is acknowledged.

        What is damaged on the disk is counted and left out.
        """
        with self._lock:
            for entry in self._entries:
                if entry.taken:
                    continue
                entry.taken = True
                found = entry.frame or self._read(entry)
                if found is not None:
                    return FrameInDelivery(found, entry)
                self.damaged_rows += entry.rows
                entry.delivered = True
            self._leave()
            return None

    def first(self) -> Frame | None:
        """The oldest frame, for who has one under way at a time; None if there is none. Asked again it is the same."""
        with self._lock:
            while self._entries:
                entry = self._entries[0]
                entry.taken = True
                found = entry.frame or self._read(entry)
                if found is not None:
                    return found
                self.damaged_rows += entry.rows
                entry.delivered = True
                self._leave()
            return None

    def ahead(self, index: int) -> Frame | None:
        """The frame behind `index` others, to be sent before those are acknowledged; None if there is none, or none
        that can be read. It may still be dropped.
        """
        with self._lock:
            if index >= len(self._entries):
                return None
            entry = self._entries[index]
            return entry.frame or self._read(entry)

    def acknowledge(self, taken: FrameInDelivery | None = None) -> None:
        """It is delivered; without a name the one that `first` gave."""
        with self._lock:
            entry = taken.entry if taken is not None else next((e for e in self._entries if e.taken), None)
            if entry is not None:
                entry.delivered = True
                self._leave()

    def _leave(self) -> None:
        """Take the oldest frames out for good, as far as they are delivered.

        One behind a frame that is still under way stays: after a crash it would be delivered once more.
        """
        position = None
        while self._entries and self._entries[0].delivered:
            entry = self._entries.popleft()
            self._forget(entry)
            if entry.segment:
                position = (entry.segment, entry.offset + _HEADER_BYTES + entry.size)
        if position is not None:
            self._write_position(*position)
            self._tidy()

    def _write_position(self, segment: int, offset: int) -> None:
        try:
            os.pwrite(self._position_fd, _position(segment, offset), 0)
        except OSError as error:
            # Only a crash would make a difference: some of what is delivered would be delivered once more.
            _LOG.warning("%s: the acknowledgement was not written: %s", self._directory, error.strerror)

    def _forget(self, entry: _SpooledFrame) -> None:
        self.rows -= entry.rows
        if entry.frame is not None:
            self._memory -= entry.size
            entry.frame = None

    # Memory.

    def _drop_from_memory(self) -> bool:
        """Make room in memory: forget copies of what is on the disk, the newest first, then give up the oldest."""
        for entry in reversed(self._entries):
            if entry.segment and entry.frame is not None and not entry.taken:
                self._memory -= entry.size
                entry.frame = None
                return True
        for entry in self._entries:
            if entry.segment == 0 and not entry.taken:
                self._give_up(entry)
                return True
        return False

    def _give_up(self, entry: _SpooledFrame) -> None:
        self._entries.remove(entry)
        self._forget(entry)
        self.dropped_rows += entry.rows

    # Disk.

    def _store(self, entry: _SpooledFrame, frame: Frame) -> None:
        """Append to the newest segment; `entry.segment` stays 0 if that cannot be done."""
        label = frame.label.encode()
        body = label + frame.payload
        head = _HEADER.pack(_MAGIC, len(frame.payload), frame.rows, len(label), crc32(body))
        whole = head + _CRC.pack(crc32(head)) + body
        while self._sizes and self.bytes + len(whole) > self._max_bytes:
            if not self._drop_segment():
                break
        if self.bytes + len(whole) > self._max_bytes:
            self.trouble = f"{self._directory}: the spool of {self._max_bytes:,} bytes has no room"
            return
        if (self._fd < 0 or self._sizes[self._next - 1] + len(whole) > self._segment_bytes) and not self._begin():
            return
        segment = self._next - 1
        offset = self._sizes[segment]
        try:
            left = memoryview(whole)
            while left:
                left = left[os.write(self._fd, left) :]
            if self._sync:
                os.fdatasync(self._fd)
        except OSError as error:
            self._note(error)
            try:
                os.ftruncate(self._fd, offset)
            except OSError:
                self._end_segment()  # half a frame stays at its end, where it is cut off
            return
        self.trouble = ""
        entry.segment, entry.offset, entry.size = segment, offset, len(body)
        self._sizes[segment] = offset + len(whole)

    def _begin(self) -> bool:
        """A new segment file; whether the disk has room for it."""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            fd = os.open(self._path(self._next), flags, 0o600)
        except OSError as error:
            self._note(error)
            return False
        self._end_segment()
        self._fd = fd
        self._sizes[self._next] = 0
        self._next += 1
        return True

    def _end_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _note(self, error: OSError) -> None:
        if not self.trouble:
            _LOG.warning("%s: the spool takes no more (%s): rows wait in memory", self._directory, error.strerror)
        self.trouble = f"{self._directory}: {error.strerror}"

    def _drop_segment(self) -> bool:
        """Remove the oldest segment that nothing under way is in, with the frames that wait in it."""
        under_way = {entry.segment for entry in self._entries if entry.taken}
        segment = next((s for s in self._sizes if s not in under_way), 0)
        if not segment:
            return False
        for entry in [e for e in self._entries if e.segment == segment]:
            self._give_up(entry)
        self._remove(segment)
        return True

    def _tidy(self) -> None:
        """Remove the segments in which nothing waits: the oldest ones, and the newest when it has grown."""
        waiting = next((e.segment for e in self._entries if e.segment), 0)
        for segment in list(self._sizes):
            appended_to = segment == self._next - 1 and self._fd >= 0
            if segment == waiting or (appended_to and self._sizes[segment] < _TIDY_BYTES):
                return
            self._remove(segment)

    def _remove(self, segment: int) -> None:
        if segment == self._next - 1:
            self._end_segment()
        del self._sizes[segment]
        self._path(segment).unlink(missing_ok=True)

    def _path(self, segment: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{segment:08d}.frames"

    def _read(self, entry: _SpooledFrame) -> Frame | None:
        try:
            with self._path(entry.segment).open("rb") as file:
                file.seek(entry.offset)
                head = file.read(_HEADER_BYTES)
                body = file.read(entry.size)
        except OSError as error:
            _LOG.warning("%s: a frame of %d rows cannot be read: %s", self._directory, entry.rows, error.strerror)
            return None
        _, _, rows, label_bytes, checksum = _HEADER.unpack_from(head)
        if len(body) < entry.size or crc32(body) != checksum:
            _LOG.warning("%s: a frame of %d rows is damaged", self._path(entry.segment), entry.rows)
            return None
        return Frame(body[label_bytes:], rows, body[:label_bytes].decode())

    # What an earlier process left.

    def _recover(self) -> None:
        assert self._directory is not None
        done_segment, done_offset = _read_position(os.pread(self._position_fd, 64, 0))
        for path in sorted(self._directory.glob("*.frames")):
            if not _SEGMENT_NAME.fullmatch(path.name):
                _LOG.warning("%s: not a file of a spool, left alone", path)
                continue
            segment = int(path.stem)
            if segment < done_segment:
                path.unlink()
                continue
            end = 0
            for entry in _frames_of(path, segment):
                end = entry.offset + _HEADER_BYTES + entry.size
                if segment > done_segment or entry.offset >= done_offset:
                    self._entries.append(entry)
                    self.rows += entry.rows
            size = path.stat().st_size
            if end < size:
                _LOG.warning("%s: %d bytes at the end are no whole frame, cut off", path, size - end)
                os.truncate(path, end)
            self._sizes[segment] = end
        # This process begins a file of its own; the old ones are only read.
        self._next = max(done_segment, next(reversed(self._sizes), 0)) + 1
        self._write_position(done_segment, done_offset)  # the page is there before the disk is full
        self._tidy()


def _locked(directory: Path) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = os.pread(fd, 64, 0).decode("utf-8", "replace").strip() or "another process"
        os.close(fd)
        raise Unavailable(
            f"spool {directory}", f"{held} is using it", "stop that one, or give each its own [sinks.NAME] spool"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()}\n".encode(), 0)
    return fd


def _position(segment: int, offset: int) -> bytes:
    packed = _POSITION.pack(segment, offset)
    return packed + _CRC.pack(crc32(packed))


def _read_position(packed: bytes) -> tuple[int, int]:
    """Segment and offset up to which all is delivered. Without a readable one everything is delivered once more."""
    if len(packed) < _POSITION.size + _CRC.size:
        return 0, 0
    segment, offset = _POSITION.unpack_from(packed)
    return (segment, offset) if packed == _position(segment, offset) else (0, 0)


def _frames_of(path: Path, segment: int) -> Iterator[_SpooledFrame]:
    """Whole frames of a segment file, by their headers. What is none is passed over up to the next one, with a word."""
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = 0
        while offset + _HEADER_BYTES <= size:
            file.seek(offset)
            head = file.read(_HEADER_BYTES)
            if not _is_header(head, size - offset):
                found = _next_header(file, offset + 1, size)
                if found < 0:
                    return
                _LOG.warning("%s: %d bytes from %d on are no frame, passed over", path, found - offset, offset)
                offset = found
                continue
            _, payload_bytes, rows, label_bytes, _ = _HEADER.unpack_from(head)
            body = payload_bytes + label_bytes
            yield _SpooledFrame(rows, body, segment, offset)
            offset += _HEADER_BYTES + body


def _is_header(head: bytes, left: int) -> bool:
    """Whether it is the header of a frame that ends within the `left` bytes from its beginning on."""
    magic, payload_bytes, _, label_bytes, _ = _HEADER.unpack_from(head)
    sound = magic == _MAGIC and _CRC.unpack_from(head, _HEADER.size)[0] == crc32(head[: _HEADER.size])
    return bool(sound and _HEADER_BYTES + payload_bytes + label_bytes <= left)


def _next_header(file: BinaryIO, offset: int, size: int) -> int:
    """Offset of the first header of a frame from `offset` on; -1 if there is none."""
    file.seek(offset)
    data = file.read(size - offset)  # a segment's file is 64 MiB at most
    at = data.find(_MAGIC)
    while at >= 0:
        head = data[at : at + _HEADER_BYTES]
        if len(head) == _HEADER_BYTES and _is_header(head, len(data) - at):
            return offset + at
        at = data.find(_MAGIC, at + 1)
    return -1
