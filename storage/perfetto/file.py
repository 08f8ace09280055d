"""Writes Perfetto trace files: compressed packets, with the texts and tracks that they refer to by number."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Final

from contracts.interfaces import StreamHeader
from storage.new_file import NewFile
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

# Field numbers and names of protos/perfetto/trace/perfetto_trace.proto.
_INTERNED_DATA, _CLOCK_SNAPSHOT, _TRACK_DESCRIPTOR, _COMPRESSED_PACKETS = 12, 6, 60, 50
_REALTIME, _MONOTONIC = 1, 3
_EXPLICIT_ORDER: Final = 3
UNIT_NS, UNIT_COUNT = 1, 2
_CATEGORIES, _EVENT_NAMES, _ANNOTATION_NAMES, _STRINGS = 1, 2, 3, 29
"""Fields of InternedData."""

_CHUNK_BYTES: Final = 1 << 20
"""Packets are compressed in pieces of this size: larger pieces save nothing, and readers inflate one at a time."""
_LEVEL: Final = 1
"""Level of zlib: level 6 takes three times as long and saves a fifth of the bytes."""


class _Interned:
    """Texts that are written once and then referred to by a number, from 1; each kind has its own numbers."""

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
        """Return the texts that are not written yet, as the content of an InternedData."""
        new, self._new = b"".join(self._new), []
        return new


class PerfettoTrace:
    """One trace file. Call `add_host` for each stream, write with `HostTracks`, then `close`. Not thread-safe.

    The file appears when it is complete: until `close` it has a temporary name, which `abort` removes. Raises
    `StoreError`.
    """

    def __init__(self, path: Path | str, *, overwrite: bool = False) -> None:
        self.slices = 0
        """Number of hops and whole paths written."""
        self.instants = 0
        """Number of records written."""
        self._names = _Interned()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._hosts = 0
        self._file = NewFile(path, overwrite=overwrite)
        for name in ANNOTATIONS:
            self._names.number(_ANNOTATION_NAMES, name)
        self._put_packet(
            field(SEQUENCE_ID, SEQUENCE)
            + field(SEQUENCE_FLAGS, STATE_CLEARED)
            + field(_INTERNED_DATA, self._names.pending())
        )

    @property
    def bytes_written(self) -> int:
        """Size of the file so far."""
        return self._file.bytes_written

    def add_host(self, header: StreamHeader) -> int:
        """Add a host; returns its number, from 1."""
        if not self._hosts:
            # Times are UTC, so that hosts are comparable. The monotonic clock of the first host is written too.
            clocks = [(_REALTIME, header.clock.utc_ns), (_MONOTONIC, header.clock.monotonic_ns)]
            told = b"".join(field(1, field(1, clock) + field(2, time)) for clock, time in clocks)
            self._put_packet(field(SEQUENCE_ID, SEQUENCE) + field(_CLOCK_SNAPSHOT, told + field(2, _REALTIME)))
        self._hosts += 1
        return self._hosts

    def close(self) -> None:
        """Write the waiting packets and give the file its name. May be called again."""
        if not self._file.closed:
            self._flush()
        self._file.close()

    def abort(self) -> None:
        """Remove the incomplete file. Does nothing after `close`."""
        self._file.abort()

    # For HostTracks ---------------------------------------------------------------------------------------

    def text(self, value: str) -> int:
        """Return the number of an argument's value."""
        return self._names.number(_STRINGS, value)

    def name(self, value: str) -> int:
        """Return the number of a slice's name."""
        return self._names.number(_EVENT_NAMES, value)

    def category(self, value: str) -> int:
        """Return the number of a category."""
        return self._names.number(_CATEGORIES, value)

    def track(self, key: str, name: str, *, parent: int = 0, rank: int = 0, unit: int = 0) -> int:
        """Describe a track; returns its uuid, which depends only on `key`. With a unit the track is a counter."""
        # 62 bits, so that uuids are unique among all traces that are opened together.
        uuid = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()) >> 2
        told = field(1, uuid) + field(2, name) + field(11, _EXPLICIT_ORDER) + field(12, rank)
        if parent:
            told += field(5, parent)
        if unit:
            told += field(8, field(3, unit))
        self._put_packet(field(SEQUENCE_ID, SEQUENCE) + field(_TRACK_DESCRIPTOR, told))
        return uuid

    def put(self, packets: bytes) -> None:
        """Write encoded packets, after the texts that they refer to. Raises `StoreError`."""
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
        """Compress and write the waiting packets, which are all whole, so a piece may have any size."""
        packed = zlib.compress(b"".join(self._waiting), _LEVEL)
        raw = field(TRACE_PACKET, field(_COMPRESSED_PACKETS, packed))
        self._waiting, self._waiting_bytes = [], 0
        self._file.write(raw)
