"""Decodes raw ring-buffer pages of the kernel's tracer into the columns of a batch.

A page is a header (time stamp, bytes used), then events that each begin with a 4-byte word: 5 bits of `type_len`,
27 bits of time since the event before (include/linux/ring_buffer.h, `enum ring_buffer_type`):

    1..28   data, of type_len * 4 bytes
    0       data, of array[0] - 4 bytes after array[0]
    29      padding: with time_delta 0 to the end of the page, else of array[0] bytes, counted from array[0]
    30      time extend: array[0] is the time since the event before, from bit 27 on
    31      time stamp: array[0] is the absolute time, from bit 27 on; bits 59 and up are those of the time before

The position of an event is known only from the event before it. The loop over the events is therefore compiled
(`collector/compiled/pages.c`). What an event means to the records, it takes from the tables of this module: which hook
an event id is, and where the fields of its format are.
"""

from __future__ import annotations

import functools
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.compiled import loops
from collector.pages.formats import MAX_EVENT_ID, EventField, EventFormat, PageLayout
from contracts.arrays import U64, Bytes, Ints
from contracts.errors import SourceError
from contracts.hooks import BY_TRACEPOINT, Hook, Way
from contracts.names import text_of
from contracts.records import DTYPES, Batch
from contracts.topology import NO_DEVICE, Sighting

Words = npt.NDArray[np.uint32]

# `commit` of a page that was read (kernel/trace/ring_buffer.c) holds the bytes of data and these two flags.
_MISSED_EVENTS: Final = 1 << 31
"""Flag: events were lost right before this page."""
_MISSED_STORED: Final = 1 << 30
"""Flag: the number of lost events is stored as an unsigned long after the data."""
MISSED: Final = _MISSED_EVENTS | _MISSED_STORED

_HEADER_BYTES: Final = 4
"""Bytes of the word before an event's payload."""
_SHORTEST: Final = 8
"""Bytes of the shortest event with data."""
_NAME_BYTES: Final = 16
"""IFNAMSIZ (include/uapi/linux/if.h): the longest device name with its final NUL."""
_NAME: Final = np.dtype([("low", "<u8"), ("high", "<u8")])

_ETH_HLEN: Final = 14
"""Bytes of an Ethernet header (include/uapi/linux/if_ether.h), subtracted if the event has no `network_offset`."""

_VALUE: Final = np.dtype([("word", "<i4"), ("shift", "<u4"), ("mask", "<u4")])
"""An integer field of at most 4 bytes, in the word of the event that contains it; `word` is -1 for no field."""
FORMAT: Final = np.dtype(
    [
        ("skb", "<i4"),
        ("name", "<i4"),
        ("len", "<i4"),
        ("size", "<u4"),
        ("header", "<u4"),
        ("network_offset", _VALUE),
        ("gso_segs", _VALUE),
        ("reason", _VALUE),
    ]
)
"""Where the fields of one hook's events are: `struct format` of collector/compiled/pages.c, which explains it."""
_HOOKS: Final = 256
"""Formats in a table that is indexed by hook, a byte."""


class Sightings:
    """Assigns codes to device names, in order of appearance, and keeps the names as `contracts.topology.Sighting`s."""

    def __init__(self) -> None:
        self._names: list[Sighting] = [NO_DEVICE]
        self._codes: dict[tuple[int, int], int] = {(0, 0): 0}

    def __len__(self) -> int:
        return len(self._names)

    def snapshot(self) -> tuple[Sighting, ...]:
        """Return all sightings so far, indexed by code."""
        return tuple(self._names)

    def code(self, low: int, high: int) -> int:
        """Return the code of one name, given as its bytes 0..7 and 8..15, little-endian; a new name gets a new code."""
        key = (low, high)
        code = self._codes.get(key)
        if code is None:
            raw = (low | high << 64).to_bytes(_NAME_BYTES, "little").rstrip(b"\0")
            code = self._codes[key] = len(self._names)
            self._names.append(Sighting(text_of(raw)))
        return code

    def codes(self, low: U64, high: U64) -> npt.NDArray[np.uint32]:
        """Return the codes (uint32) of many names, given as words like in `code`; new names get new codes."""
        index = np.empty(len(low), np.uint32)
        return self.codes_of(loops.distinct(low, high, index), index)

    def codes_of(self, names: bytes, index: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Return the codes (uint32) of the names at `index` among `names`, 16 bytes each, in order of appearance."""
        codes = [self.code(low, high) for low, high in np.frombuffer(names, _NAME).tolist()]
        return np.array(codes, np.uint32).take(index)


@dataclass(frozen=True, slots=True)
class Gap:
    """The ring lost `lost` events right before record `index` of a batch; None if the page has no count."""

    index: int
    lost: int | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive pages of one CPU's ring in a buffer."""

    cpu: int
    pages: int
    skip: int = 0
    """Bytes of the first page's data that were decoded before and are skipped."""


@dataclass(frozen=True, slots=True)
class DecodedPages:
    """Records and gaps of a stretch, in the ring's order."""

    batch: Batch
    gaps: tuple[Gap, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Positions of the events of some pages; `at`, `ts` and `size` have one element per event."""

    words: Words
    """The buffer of pages."""
    at: Ints
    """Index in `words` of the first word of each event's payload, ascending."""
    ts: Ints
    """Time of each event, ns."""
    size: Words
    """Bytes of each event's payload, including up to three bytes of padding at the end."""
    first: Ints
    """Index of each page's first event, and the number of all events."""
    missed: dict[int, int | None]
    """Page -> events lost right before it; None if the page has no count."""

    def ids(self) -> Words:
        """Return `common_type`, the event id, of each event."""
        return self.words.take(self.at, mode="clip") & np.uint32(0xFFFF)

    def __getitem__(self, index: Ints) -> Located:
        """Return the events at `index`, ascending."""
        first = np.searchsorted(index, self.first)
        return Located(self.words, self.at[index], self.ts[index], self.size[index], first, self.missed)


def _value(event: str, field: EventField) -> tuple[int, int, int]:
    """Return a field's element of `_VALUE`; raises `SourceError` for a field that no aligned word contains."""
    at = field.offset % 4
    if field.size not in (1, 2, 4) or at + field.size > 4:
        raise SourceError(
            f"{event}: field {field.name!r} has {field.size} bytes at offset {field.offset}, expected an aligned "
            "integer of at most 4 bytes"
        )
    return field.offset // 4, 8 * at, (1 << 8 * field.size) - 1


class _Events:
    """The formats of all known events as tables for `loops.decode`."""

    def __init__(self, formats: Iterable[EventFormat]) -> None:
        none = (-1, 0, 0)
        self.hook_of_id = np.zeros(MAX_EVENT_ID + 1, np.uint8)
        self.formats = np.full(_HOOKS, np.array((0, -1, -1, 8, 0, none, none, none), FORMAT))
        self.smallest = MAX_EVENT_ID
        """Bytes of the smallest format."""
        for form in formats:
            self._add(form)

    def _add(self, form: EventFormat) -> None:
        info = BY_TRACEPOINT[form.event]
        table = self.formats[int(info.hook)]
        ident = form.field("common_type")
        if (ident.offset, ident.size) != (0, 2):
            raise SourceError(f"{form.event}: common_type has {ident.size} bytes at {ident.offset}, expected 2 at 0")
        self.hook_of_id[form.id] = info.hook
        skb = form.field("skbaddr")
        if skb.size != 8 or skb.offset % 4:
            raise SourceError(
                f"{form.event}: field 'skbaddr' has {skb.size} bytes at offset {skb.offset}, expected 8, aligned; only "
                "64-bit kernels are read"
            )
        table["skb"] = skb.offset // 4
        used = [ident, skb]
        if info.has_device:
            name = form.field("name")
            if not name.is_data_loc or name.size != 4 or name.offset % 4:
                raise SourceError(f"{form.event}: field 'name' is {name.type!r}, expected a __data_loc")
            table["name"] = name.offset // 4
            used.append(name)
        if info.has_device or info.way is Way.DELIVERY:
            length = form.field("len")
            if length.size != 4 or length.offset % 4:
                raise SourceError(f"{form.event}: field 'len' has {length.size} bytes at {length.offset}, expected 4")
            table["len"] = length.offset // 4
            used.append(length)
            if info.way is Way.TRANSMIT:
                table["header"] = _ETH_HLEN
        # Fields that only some kernels have. The reason exists since Linux kernel commit c504e5c2f964 ("net: skb:
        # introduce kfree_skb_reason()") (in v5.17). Subsystems number their own reasons from bit 16 on
        # (include/net/dropreason.h); the column keeps the low half.
        for optional in ("reason",) if info.hook is Hook.KFREE_SKB else ("network_offset", "gso_segs"):
            if optional in form.fields:
                table[optional] = _value(form.event, form.fields[optional])
                used.append(form.fields[optional])
        size = max(field.offset + field.size for field in used)
        table["size"] = size
        self.smallest = min(self.smallest, size)


def page_buffer(layout: PageLayout, pages: int) -> Bytes:
    """Allocate memory for `pages` pages."""
    return np.zeros(pages * layout.page_size, np.uint8)


@functools.cache
def process_key() -> tuple[int, int, int]:
    """Return a random key for the buffer ids of files, constant in a process: reading a file twice gives equal ids."""
    return secrets.randbits(64), secrets.randbits(64), secrets.randbits(64)


class PageDecoder:
    """Decodes pages of one machine's kernel; its only state is the sightings, the key of skb_id, and `skipped`."""

    def __init__(
        self,
        layout: PageLayout,
        formats: Iterable[EventFormat],
        sightings: Sightings | None = None,
        key: tuple[int, int, int] | None = None,
    ) -> None:
        if sys.byteorder != "little":
            raise SourceError("trace pages are read on little-endian machines only")
        self.layout = layout
        self.sightings = Sightings() if sightings is None else sightings
        self.skipped = 0
        """Events that belong to no hook."""
        self._events = _Events(formats)
        self._places = (layout.page_size, layout.timestamp_offset, layout.commit_offset, layout.data_offset)
        # A bijection on 64 bits (xor, odd multiplications, xor-shift), so that no two buffers share an id. Its
        # constants are random for each run, so that no kernel address leaves the machine.
        self.key: Final = key or (secrets.randbits(64), secrets.randbits(64), secrets.randbits(64))
        xor, first, second = self.key
        self._key = xor, first | 1, second | 1

    def skb_ids(self, addresses: U64) -> U64:
        """Replace kernel buffer addresses by their ids, in place, and return the array."""
        xor, first, second = map(np.uint64, self._key)
        half = np.uint64(32)
        addresses ^= xor
        addresses *= first
        addresses ^= addresses >> half
        addresses *= second
        addresses ^= addresses >> half
        return addresses

    def decode(self, buffer: Bytes, stretches: Sequence[Stretch]) -> list[DecodedPages]:
        """Return the records of each stretch; the stretches are contiguous in a `page_buffer`.

        Raises `SourceError` for an invalid page.
        """
        table, first = _table(stretches)
        room = self._room(len(first) - 1, self._events.smallest)
        columns: dict[str, Any] = {name: np.empty(room, dtype) for name, dtype in DTYPES.items()}
        try:
            records, skipped, names = loops.decode(
                buffer,
                self._places,
                table,
                first,
                self._events.hook_of_id,
                self._events.formats,
                self._key,
                tuple(columns.values()),
            )
        except ValueError as error:
            raise SourceError(str(error)) from None
        _shrink(columns.values(), records)
        self.skipped += skipped
        columns["dev"] = self.sightings.codes_of(names, columns["dev"])
        return _divided(Batch(**columns), stretches, first, self._missed(buffer, len(first) - 1))

    def locate(self, buffer: Bytes, stretches: Sequence[Stretch]) -> Located:
        """Return the positions of all events of all kinds; arguments and errors as in `decode`."""
        table, first = _table(stretches)
        pages = len(first) - 1
        room = self._room(pages, _SHORTEST - _HEADER_BYTES)
        at, ts, size = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.uint32)
        try:
            events = loops.locate(buffer, self._places, table, first, (at, ts, size))
        except ValueError as error:
            raise SourceError(str(error)) from None
        _shrink((at, ts, size), events)
        return Located(buffer.view(np.uint32), at, ts, size, first, self._missed(buffer, pages))

    def _room(self, pages: int, smallest: int) -> int:
        """Return the largest number of events, each with a payload of at least `smallest` bytes, on some pages."""
        return pages * (self.layout.data_size // (_HEADER_BYTES + smallest))

    def _missed(self, buffer: Bytes, pages: int) -> dict[int, int | None]:
        """Return page -> events lost right before it; None if the page has no count."""
        layout = self.layout
        matrix = buffer.view(np.uint32)[: pages * layout.page_size // 4].reshape(pages, layout.page_size // 4)
        commits = matrix[:, layout.commit_offset // 4]
        flagged = np.flatnonzero(commits & np.uint32(_MISSED_EVENTS)).tolist()
        return {page: self._stored_loss(matrix[page], int(commits[page])) for page in flagged}

    def _stored_loss(self, page: Words, commit: int) -> int | None:
        used = commit & ~MISSED
        size = self.layout.commit_size  # both are a long
        if not commit & _MISSED_STORED or used + size > self.layout.data_size:
            return None
        at = (self.layout.data_offset + used) // 4
        return int(page[at]) | (int(page[at + 1]) << 32 if size == 8 else 0)


def _table(stretches: Sequence[Stretch]) -> tuple[Ints, Ints]:
    """Return the stretches as an array for `loops`, and the array `first` that `loops` fills for their pages."""
    table = np.array([(stretch.cpu, stretch.pages, stretch.skip) for stretch in stretches], np.int64)
    return table, np.zeros(sum(stretch.pages for stretch in stretches) + 1, np.int64)


def _shrink(columns: Iterable[npt.NDArray[Any]], length: int) -> None:
    """Give back the memory behind the first `length` elements; nothing else refers to the columns yet."""
    for column in columns:
        column.resize(length, refcheck=False)


def _divided(
    batch: Batch, stretches: Sequence[Stretch], first: Ints, missed: dict[int, int | None]
) -> list[DecodedPages]:
    decoded, page = [], 0
    for stretch in stretches:
        start, page_after = int(first[page]), page + stretch.pages
        gaps = tuple(Gap(int(first[p]) - start, missed[p]) for p in range(page, page_after) if p in missed)
        decoded.append(DecodedPages(batch[start : int(first[page_after])], gaps))
        page = page_after
    return decoded
