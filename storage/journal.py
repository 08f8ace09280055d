"""What an ingest has taken over, in the order in which it came: the ground on which nothing is lost or stored twice.

    DIRECTORY/0000000007.journal, 0000000008.journal, ...   entries back to back

    entry  = kind, length of the host's name, size of the payload, checksum | name | payload
    FRAME     a host's frame, as it was received
    SNAPSHOT  all that the ingest knows of a host, here: what is before it need not be read again for this host
    COMMIT    the store's flush F holds the results of all that is before a position P

A frame counts as taken over when the file it is in was brought to the disk. After a crash, the store is put back to the
last COMMIT; from each host's last snapshot before P its frames are worked through again, and what comes out of those
after P goes to the store: the same rows that the crash took, because the same records give the same answers. A
half-written entry at the end was never taken over. Files in which no host has anything to be read again are removed.

Append, sync and read are for one thread at a time.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final
from zlib import crc32

from contracts.errors import StoreError

FILE_BYTES: Final = 64 << 20
"""A new file is begun beyond: some 20 M records, half a minute at a million a second."""
FIRST_SLICE_NS: Final = 1_900_000_000
"""Of the journals whose commits do not say it."""
_ENTRY: Final = struct.Struct("<BBxxII")
_COMMIT: Final = struct.Struct("<QQQQ")
_FIRST_COMMIT: Final = struct.Struct("<QQQ")
_LOG: Final = logging.getLogger(__name__)
_NAME: Final = re.compile(r"(\d{10})\.journal")

JournalPosition = tuple[int, int]
"""Number of the file and offset in it; positions compare in the order of writing."""


class EntryKind(IntEnum):
    """What an entry is (u8). Append only."""

    FRAME = 1
    SNAPSHOT = 2
    COMMIT = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, read back."""

    position: JournalPosition
    kind: int
    """An `EntryKind`, or a number that this version does not know."""
    host: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """The store's flush up to `flush` holds the results of all entries before `upto`."""

    flush: int
    upto: JournalPosition
    slice_ns: int
    """How much of a stream its engine works on at a time: which results are of an entry before `upto` depends on it."""

    @classmethod
    def parse(cls, payload: bytes) -> Commit:
        if len(payload) == _FIRST_COMMIT.size:
            flush, file, offset = _FIRST_COMMIT.unpack(payload)
            return cls(flush, (file, offset), FIRST_SLICE_NS)
        if len(payload) != _COMMIT.size:
            raise StoreError(
                f"the journal has a commit of {len(payload)} bytes, of another version of MACE: let that version run"
                " until the hosts' runs have ended, or move the journal (ingest/) away and begin those runs anew"
            )
        flush, file, offset, slice_ns = _COMMIT.unpack(payload)
        return cls(flush, (file, offset), slice_ns)


class Journal:
    """The journal of one ingest. OSErrors of `sync` become `StoreError`, as does what another version has written."""

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        self._directory, self._fsync = directory, fsync
        self._fd = -1
        self._file = 0
        self._offset = 0
        self._buffer: list[bytes] = []
        self._kept_from = 0
        self._aside: set[Path] = set()
        self._failure: StoreError | None = None

    def open(self) -> int:
        """Begin a new file behind those that are there; their number."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            numbers = self._numbers()
            self._kept_from = numbers[0] if numbers else 1
            self._begin(numbers[-1] + 1 if numbers else 1)
        except OSError as error:
            raise self._cannot(error) from error
        return len(numbers)

    @property
    def position(self) -> JournalPosition:
        """Of the next entry."""
        return self._file, self._offset

    def append(self, kind: EntryKind, host: str, payload: bytes) -> JournalPosition:
        """Add an entry, in memory until `sync`; its position."""
        position = self.position
        entry = packed(kind, host, payload)
        self._buffer += entry
        self._offset += sum(map(len, entry))
        return position

    def commit(self, commit: Commit) -> None:
        """Note what the store holds."""
        self.append(EntryKind.COMMIT, "", _COMMIT.pack(commit.flush, *commit.upto, commit.slice_ns))

    def taken(self) -> list[bytes]:
        """What was appended since the last call, to be given to `sync`."""
        buffer, self._buffer = self._buffer, []
        return buffer

    @property
    def has_unsynced(self) -> bool:
        """Whether something was appended since the last `taken`."""
        return bool(self._buffer)

    def sync(self, buffer: list[bytes]) -> None:
        """Bring it to the disk. After a failure nothing more is: it would stand behind half an entry."""
        if self._failure is not None:
            raise self._failure
        try:
            left = memoryview(b"".join(buffer))
            while left:
                left = left[os.write(self._fd, left) :]
            if self._fsync:
                os.fdatasync(self._fd)
        except OSError as error:
            self._failure = self._cannot(error)
            raise self._failure from error

    @property
    def is_full(self) -> bool:
        """Whether it is time for a new file."""
        return self._offset >= FILE_BYTES

    def rotate(self) -> None:
        """Begin a new file; everything was synced."""
        assert not self._buffer
        try:
            self._begin(self._file + 1)
        except OSError as error:
            raise self._cannot(error) from error

    def forget_before(self, file: int) -> None:
        """No file before this one is needed any more."""
        for number in range(self._kept_from, file):
            self._path(number).unlink(missing_ok=True)
        self._kept_from = max(self._kept_from, file)

    def close(self) -> None:
        """Close the file; what was not synced is gone."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def set_aside(self, entry: Entry) -> Path:
        """Keep a copy of an entry that cannot be applied beside the journal, in the same form; where.

        A journal that is read again gives the same file again.
        """
        path = self._path(entry.position[0]).with_suffix(".aside")
        mode = "ab" if path in self._aside else "wb"
        try:
            with open(path, mode, opener=_private) as file:
                file.writelines(packed(entry.kind, entry.host, entry.payload))
        except OSError as error:
            raise self._cannot(error) from error
        self._aside.add(path)
        return path

    def read(self) -> Iterator[Entry]:
        """All whole entries of the files before the one that is written now, in order.

        Of a file only what is before its first damage: what follows it was not yet taken over, or is lost.
        """
        for number in self._numbers():
            if number < self._file:
                yield from _entries(number, self._path(number))

    def _numbers(self) -> list[int]:
        return sorted(int(m[1]) for m in (_NAME.fullmatch(path.name) for path in self._directory.iterdir()) if m)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:010d}.journal"

    def _begin(self, number: int) -> None:
        self.close()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path(number), flags, 0o600)
        self._file, self._offset = number, 0
        if self._fsync:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _cannot(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._directory}: cannot write the journal: {error.strerror}; nothing that was acknowledged is lost:"
            " free space and start again"
        )


def packed(kind: int, host: str, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """An entry's bytes, in pieces."""
    name = host.encode()
    return _ENTRY.pack(kind, len(name), len(payload), crc32(payload, crc32(name))), name, payload


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _entries(number: int, path: Path) -> Iterator[Entry]:
    data = path.read_bytes()
    at = 0
    while at + _ENTRY.size <= len(data):
        kind, name_bytes, size, checksum = _ENTRY.unpack_from(data, at)
        start = at + _ENTRY.size
        name, end = data[start : start + name_bytes], start + name_bytes + size
        payload = data[start + name_bytes : end]
        if end > len(data):
            return
        if crc32(payload, crc32(name)) != checksum:
            _LOG.warning("%s: damaged at byte %d: its last %d bytes are not read", path, at, len(data) - at)
            return
        yield Entry((number, at), kind, name.decode(), payload)
        at = end
