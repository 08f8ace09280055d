"""Write Perfetto trace files: packets of bytes, compressed, with the texts and tracks that they call by numbers."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import BinaryIO, Final

from contracts.errors import StoreError
from contracts.interfaces import StreamHeader
from storage.ownership import open_new
from storage.perfetto.events import (
    ANNOTATIONS,
    NEEDS_STATE,
    SEQUENCE,
    SEQUENCE_FLAGS,
    SEQUENCE_ID,
    STATE_CLEARED,
    TRACE_PACKET,
)
from storage.perfetto.protobuf import field

# Field numbers of protos/perfetto/trace/perfetto_trace.proto, by the names that they have there.
_INTERNED_DATA, _CLOCK_SNAPSHOT, _TRACK_DESCRIPTOR, _COMPRESSED_PACKETS = 12, 6, 60, 50
_REALTIME, _MONOTONIC = 1, 3
_EXPLICIT_ORDER: Final = 3
UNIT_NS, UNIT_COUNT = 1, 2
_CATEGORIES, _EVENT_NAMES, _ANNOTATION_NAMES, _STRINGS = 1, 2, 3, 29
"""Fields of InternedData."""

_CHUNK_BYTES: Final = 1 << 20
"""Packets are compressed in pieces of this size: larger ones save nothing, readers inflate one at a time."""
_LEVEL: Final = 1
"""zlib: level 6 takes three times as long and saves a fifth of the bytes."""


class _Interned:
    """Text that is written once and then called by a number, from 1; several kinds of it with numbers of their own."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], int] = {}
        self._count: dict[int, int] = {}
        self._new: list[bytes] = []

    def number(self, kind: int, text: str) -> int:
        found = self._known.get((kind, text))
        if found is None:
            found = self._known[kind, text] = self._count[kind] = self._count.get(kind, 0) + 1
            self._new.append(field(kind, field(1, found) + field(2, text)))
        return found

    def pending(self) -> bytes:
        """What was not written yet, as the content of an InternedData."""
        new, self._new = b"".join(self._new), []
        return new


class PerfettoTrace:
    """One trace file. `add_host` for each stream, then what `HostTracks` writes, then `close`; not for several threads.

    The file is there when it is whole: until `close` it has another name, which `abort` removes. Raises `StoreError`.
    """

    def __init__(self, path: Path | str, *, overwrite: bool = False) -> None:
        self.path: Final = Path(path)
        self.slices = 0
        """Hops and whole paths written."""
        self.instants = 0
        """Records written."""
        self.bytes_written = 0
        self._names = _Interned()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._hosts = 0
        self._partial: Final = self.path.with_name(self.path.name + ".part")
        if self.path.exists() and not overwrite:
            raise StoreError(f"{self.path}: exists already; give another name, or say that it may go")
        try:
            self._file: BinaryIO = open_new(self._partial)
        except OSError as error:
            raise StoreError(f"{self._partial}: cannot be created: {error.strerror}") from error
        for name in ANNOTATIONS:
            self._names.number(_ANNOTATION_NAMES, name)
        self._put_packet(
            field(SEQUENCE_ID, SEQUENCE)
            + field(SEQUENCE_FLAGS, STATE_CLEARED)
            + field(_INTERNED_DATA, self._names.pending())
        )

    def add_host(self, header: StreamHeader) -> int:
        """Its number, from 1."""
        if not self._hosts:
            # Times are UTC, so that hosts stand side by side. The monotonic clock of the first one is told as well.
            clocks = [(_REALTIME, header.clock.utc_ns), (_MONOTONIC, header.clock.monotonic_ns)]
            told = b"".join(field(1, field(1, clock) + field(2, time)) for clock, time in clocks)
            self._put_packet(field(SEQUENCE_ID, SEQUENCE) + field(_CLOCK_SNAPSHOT, told + field(2, _REALTIME)))
        self._hosts += 1
        return self._hosts

    def close(self) -> None:
        """Write what is waiting and give the file its name. Safe to call again."""
        if self._file.closed:
            return
        try:
            self._flush()
            self._file.close()
            self._partial.replace(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from error

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after `close`."""
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    # For HostTracks ---------------------------------------------------------------------------------------

    def text(self, value: str) -> int:
        """Number of a value of an argument."""
        return self._names.number(_STRINGS, value)

    def name(self, value: str) -> int:
        """Number of a slice's name."""
        return self._names.number(_EVENT_NAMES, value)

    def category(self, value: str) -> int:
        """Number of a category."""
        return self._names.number(_CATEGORIES, value)

    def track(self, key: str, name: str, *, parent: int = 0, rank: int = 0, unit: int = 0) -> int:
        """Describe a track; returns its uuid, which depends on `key` alone. With a unit it is a counter."""
        # 62 bits: uuids are to be unique among all traces that are ever opened together.
        uuid = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()) >> 2
        told = field(1, uuid) + field(2, name) + field(11, _EXPLICIT_ORDER) + field(12, rank)
        if parent:
            told += field(5, parent)
        if unit:
            told += field(8, field(3, unit))
        self._put_packet(field(SEQUENCE_ID, SEQUENCE) + field(_TRACK_DESCRIPTOR, told))
        return uuid

    def put(self, packets: bytes) -> None:
        """Encoded packets; raises `StoreError`."""
        if new := self._names.pending():
            self._put_packet(
                field(SEQUENCE_ID, SEQUENCE) + field(SEQUENCE_FLAGS, NEEDS_STATE) + field(_INTERNED_DATA, new)
            )
        self._waiting.append(packets)
        self._waiting_bytes += len(packets)
        if self._waiting_bytes >= _CHUNK_BYTES:
            self._flush()

    def _put_packet(self, packet: bytes) -> None:
        raw = field(TRACE_PACKET, packet)
        self._waiting.append(raw)
        self._waiting_bytes += len(raw)

    def _flush(self) -> None:
        """Whole packets only are in `_waiting`, so that a piece may be of any size."""
        packed = zlib.compress(b"".join(self._waiting), _LEVEL)
        raw = field(TRACE_PACKET, field(_COMPRESSED_PACKETS, packed))
        self._waiting, self._waiting_bytes = [], 0
        try:
            self._file.write(raw)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.bytes_written += len(raw)
