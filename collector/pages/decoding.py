"""Decodes raw ring-buffer pages of the kernel's tracer into the columns of a batch.

A page is a header (time stamp, bytes used), then events that each begin with a 4-byte word: 5 bits of `type_len`,
27 bits of time since the event before (include/linux/ring_buffer.h, `enum ring_buffer_type`):

    1..28   data, of type_len * 4 bytes
    0       data, of array[0] - 4 bytes after array[0]
    29      padding: with time_delta 0 to the end of the page, else of array[0] bytes, counted from array[0]
    30      time extend: array[0] is the time since the event before, from bit 27 on
    31      time stamp: array[0] is the absolute time, from bit 27 on; bits 59 and up are those of the time before

The position of an event is known only from the event before it. The decoder therefore walks many pages in lockstep:
step i finds event i + 1 of all pages at once, in three numpy calls. The step has no test for the end of a page.
Instead, the word after the last event is overwritten by a `_STOP` (padding of time_delta 0), whose advance is 0. Events
of types 0 and 29, whose length is not in the header, also have advance 0. A walk that no longer moves has reached one
of the three.
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

from collector.pages.formats import MAX_EVENT_ID, EventField, EventFormat, PageLayout
from contracts.arrays import U64, Bytes, Ints
from contracts.errors import SourceError
from contracts.hooks import BY_TRACEPOINT, HOOKS, Hook, Way
from contracts.names import text_of
from contracts.records import Batch
from contracts.topology import NO_DEVICE, Sighting

Words = npt.NDArray[np.uint32]

# `commit` of a page that was read (kernel/trace/ring_buffer.c) holds the bytes of data and these two flags.
_MISSED_EVENTS: Final = 1 << 31
"""Flag: events were lost right before this page."""
_MISSED_STORED: Final = 1 << 30
"""Flag: the number of lost events is stored as an unsigned long after the data."""
MISSED: Final = _MISSED_EVENTS | _MISSED_STORED

_DATA_MAX: Final = 28
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_STOP: Final = _PADDING
"""Word at which a walk stops: padding with time_delta 0."""
_SLACK_WORDS: Final = 32
"""Number of `_STOP`s behind the last page. A step is at most 29 words, so that no walk can jump over them."""

_DELTA_BITS: Final = 27
_STAMP_BITS: Final = 59
"""Bits of a time stamp event: 32 + 27 (ABS_TS_MASK in ring_buffer.c)."""

_ADVANCE: Final = np.array(
    [(t + 1) * 4 if 1 <= t <= _DATA_MAX else 8 if t in (_TIME_EXTEND, _TIME_STAMP) else 0 for t in range(32)] * 8,
    np.int64,
)
"""Bytes from one event to the next, by the lowest byte of its header (5 bits of it are type_len)."""

_NAME_MAX: Final = 16
"""IFNAMSIZ (include/uapi/linux/if.h): the longest device name with its final NUL."""
_NAME_MASK: Final = np.array([(1 << 8 * min(max(n - 1, 0), 8)) - 1 for n in range(_NAME_MAX + 1)], np.uint64)
"""Mask of a name's first 8 bytes, by the name's length with NUL: bytes behind the name are undefined."""
_NAME_MASK_HIGH: Final = np.array([(1 << 8 * min(max(n - 9, 0), 8)) - 1 for n in range(_NAME_MAX + 1)], np.uint64)
"""Mask of a name's second 8 bytes, by the name's length with NUL."""

_HEAD: Final = 256
"""Number of events with unknown names that are searched for new names at a time."""

_ETH_HLEN: Final = 14
"""Bytes of an Ethernet header (include/uapi/linux/if_ether.h), subtracted if the event has no `network_offset`."""


class Sightings:
    """Assigns codes to device names, in order of appearance, and keeps the names as `contracts.topology.Sighting`s.

    A name is two 64-bit words. A lookup hashes them into a direct-mapped table, then, if the name is not in its slot,
    into a second table with another hash, and finally searches a dictionary.
    """

    _BITS: Final = 16

    def __init__(self) -> None:
        self._names: list[Sighting] = [NO_DEVICE]
        self._codes: dict[tuple[int, int], int] = {(0, 0): 0}
        size = 1 << self._BITS
        # For each slot both words of its name, and the name's code. An empty slot holds (0, 0) with code 0, which is
        # the correct entry for the empty name: no device.
        self._tables = [(np.zeros(size, np.uint64), np.zeros(size, np.uint64), np.zeros(size, np.uint32)) for _ in "12"]
        # Odd constants: the golden ratio's and MurmurHash3's finalizer.
        self._multipliers = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD))
        self._shift = np.uint64(64 - self._BITS)

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
            raw = (low | high << 64).to_bytes(_NAME_MAX, "little").rstrip(b"\0")
            code = self._codes[key] = len(self._names)
            self._names.append(Sighting(text_of(raw)))
            self._settle(low, high, code)
        return code

    def _settle(self, low: int, high: int, code: int) -> None:
        for (lows, highs, codes), multiplier in zip(self._tables, self._multipliers, strict=True):
            slot = int(self._slots(np.array([low], np.uint64), np.array([high], np.uint64), multiplier)[0])
            if codes[slot] == 0:
                lows[slot], highs[slot], codes[slot] = low, high, code
                return

    def _slots(self, low: U64, high: U64, multiplier: np.uint64) -> U64:
        slots: U64 = ((low ^ (high >> np.uint64(7)) ^ (high << np.uint64(9))) * multiplier) >> self._shift
        return slots

    def codes(self, low: U64, high: U64) -> npt.NDArray[np.uint32]:
        """Return the codes (uint32) of many names, given as words like in `code`; new names get new codes."""
        while True:
            found, missing = self._look_up(low, high)
            # At first most names that are not in the tables are new, with few events each: add those of some events.
            known = len(self)
            head = missing[:_HEAD]
            for pair in zip(low[head].tolist(), high[head].tolist(), strict=True):
                self.code(*pair)
            if len(self) == known:
                break
        if len(missing):
            pairs, inverse = np.unique(np.stack([low[missing], high[missing]], axis=1), axis=0, return_inverse=True)
            # Assign codes by first appearance, not by name: they must not depend on the division into batches.
            first = np.full(len(pairs), len(missing))
            np.minimum.at(first, inverse.ravel(), np.arange(len(missing)))
            code_of = np.zeros(len(pairs), np.uint32)
            for i in np.argsort(first):
                code_of[i] = self.code(int(pairs[i, 0]), int(pairs[i, 1]))
            found[missing] = code_of[inverse.ravel()]
        return found

    def _look_up(self, low: U64, high: U64) -> tuple[npt.NDArray[np.uint32], Ints]:
        """Return codes from the tables, and the indices of names that are in neither."""
        found: npt.NDArray[np.uint32] = np.zeros(len(low), np.uint32)
        missing: Ints | None = None
        for (lows, highs, codes), multiplier in zip(self._tables, self._multipliers, strict=True):
            slots = self._slots(low, high, multiplier).view(np.int64)
            code = codes.take(slots)
            miss = np.flatnonzero((lows.take(slots) != low) | (highs.take(slots) != high))
            if missing is None:
                found, missing = code, miss
            else:
                found[missing] = code
                missing = missing[miss]
            if not len(miss):
                break
            low, high = low[miss], high[miss]
        assert missing is not None
        return found, missing


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
    begin: Ints
    """Byte where each page's data begins, and the end of the last page."""
    cpus: npt.NDArray[np.uint16]
    """CPU of each page."""
    missed: dict[int, int | None]
    """Page -> events lost right before it; None if the page has no count."""

    @property
    def first(self) -> Ints:
        """Index of the first event of each page, and the number of all events."""
        return np.searchsorted(self.at, self.begin >> 2)

    def ids(self) -> Words:
        """Return `common_type`, the event id, of each event."""
        return self.words.take(self.at, mode="clip") & np.uint32(0xFFFF)

    def __getitem__(self, index: Ints) -> Located:
        """Return the events at `index`."""
        at, ts, size = self.at[index], self.ts[index], self.size[index]
        return Located(self.words, at, ts, size, self.begin, self.cpus, self.missed)


@dataclass(frozen=True, slots=True)
class _Value:
    """Extracts an integer field of at most 4 bytes from the word that contains it."""

    word: int
    shift: np.uint32
    mask: np.uint32

    @classmethod
    def of(cls, event: str, field: EventField) -> _Value:
        at = field.offset % 4
        if field.size not in (1, 2, 4) or at + field.size > 4:
            raise SourceError(
                f"{event}: field {field.name!r} has {field.size} bytes at offset {field.offset}, expected an aligned "
                "integer of at most 4 bytes"
            )
        return cls(field.offset // 4, np.uint32(8 * at), np.uint32((1 << 8 * field.size) - 1))

    def read(self, words: Words, events: Ints) -> Words:
        return (words.take(events + self.word, mode="clip") >> self.shift) & self.mask


class _Events:
    """The formats of all known events as tables, indexed by hook; 0 for a field that an event lacks."""

    def __init__(self, formats: Iterable[EventFormat]) -> None:
        size = max(info.hook for info in HOOKS) + 1
        self.hook_of_id = np.zeros(MAX_EVENT_ID + 1, np.uint8)
        self.skb = np.zeros(size, np.int64)
        self.name = np.zeros(size, np.int64)
        self.name_mask = np.zeros(size, np.uint32)
        self.len = np.zeros(size, np.int64)
        self.len_mask = np.zeros(size, np.uint32)
        self.header = np.zeros(size, np.uint32)
        """Bytes of link-layer header that the event's length includes."""
        self.fixed_size = np.zeros(size, np.uint32)
        self.network_offset: dict[int, _Value] = {}
        self.gso_segs: dict[int, _Value] = {}
        self.reason: dict[int, _Value] = {}
        for form in formats:
            self._add(form)

    def _add(self, form: EventFormat) -> None:
        info = BY_TRACEPOINT[form.event]
        hook = int(info.hook)
        ident = form.field("common_type")
        if (ident.offset, ident.size) != (0, 2):
            raise SourceError(f"{form.event}: common_type has {ident.size} bytes at {ident.offset}, expected 2 at 0")
        self.hook_of_id[form.id] = hook
        skb = form.field("skbaddr")
        if skb.size != 8 or skb.offset % 4:
            raise SourceError(
                f"{form.event}: field 'skbaddr' has {skb.size} bytes at offset {skb.offset}, expected 8, aligned; only "
                "64-bit kernels are read"
            )
        self.skb[hook] = skb.offset // 4
        used = [ident, skb]
        if info.has_device:
            name = form.field("name")
            if not name.is_data_loc or name.size != 4 or name.offset % 4:
                raise SourceError(f"{form.event}: field 'name' is {name.type!r}, expected a __data_loc")
            self.name[hook] = name.offset // 4
            self.name_mask[hook] = 0xFFFFFFFF
            used.append(name)
        if info.has_device or info.way is Way.DELIVERY:
            length = form.field("len")
            if length.size != 4 or length.offset % 4:
                raise SourceError(f"{form.event}: field 'len' has {length.size} bytes at {length.offset}, expected 4")
            self.len[hook] = length.offset // 4
            self.len_mask[hook] = 0xFFFFFFFF
            used.append(length)
            if info.way is Way.TRANSMIT:
                self.header[hook] = _ETH_HLEN
        # Fields that only some kernels have, each with its table.
        optional = {"network_offset": self.network_offset, "gso_segs": self.gso_segs}
        if info.hook is Hook.KFREE_SKB:
            # Since Linux kernel commit c504e5c2f964 ("net: skb: introduce kfree_skb_reason()") (in v5.17).
            optional = {"reason": self.reason}
        for name_, table in optional.items():
            if name_ in form.fields:
                table[hook] = _Value.of(form.event, form.fields[name_])
                used.append(form.fields[name_])
        self.fixed_size[hook] = max(f.offset + f.size for f in used)


def page_buffer(layout: PageLayout, pages: int) -> Bytes:
    """Allocate memory for `pages` pages and the words that the decoder needs behind them."""
    buffer = np.zeros(pages * layout.page_size + _SLACK_WORDS * 4, np.uint8)
    buffer[-_SLACK_WORDS * 4 :].view(np.uint32)[:] = _STOP
    return buffer


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
        # A bijection on 64 bits (xor, odd multiplications, xor-shift), so that no two buffers share an id. Its
        # constants are random for each run, so that no kernel address leaves the machine.
        self.key: Final = key or (secrets.randbits(64), secrets.randbits(64), secrets.randbits(64))
        xor, first, second = self.key
        self._key = np.uint64(xor), np.uint64(first | 1), np.uint64(second | 1)

    def skb_ids(self, addresses: U64) -> U64:
        """Replace kernel buffer addresses by their ids, in place, and return the array."""
        xor, first, second = self._key
        half = np.uint64(32)
        addresses ^= xor
        addresses *= first
        addresses ^= addresses >> half
        addresses *= second
        addresses ^= addresses >> half
        return addresses

    def decode(self, buffer: Bytes, stretches: Sequence[Stretch]) -> list[DecodedPages]:
        """Return the records of each stretch; the stretches are contiguous in a `page_buffer`, which is overwritten.

        Decoding the few events of many CPUs together costs hardly more than those of one CPU. Raises `SourceError` for
        an invalid page.
        """
        found = self.locate(buffer, stretches)
        hook = self._events.hook_of_id.take(found.ids(), mode="clip")
        if not hook.all():
            keep = np.flatnonzero(hook)
            self.skipped += len(hook) - len(keep)
            found, hook = found[keep], hook[keep]

        first = found.first
        cpus = np.repeat(found.cpus, np.diff(first))
        batch = self._columns(found.words, found.at, found.ts, found.size, hook, cpus)
        decoded, page, missed = [], 0, found.missed
        for stretch in stretches:
            start, page_after = int(first[page]), page + stretch.pages
            gaps = tuple(Gap(int(first[p]) - start, missed[p]) for p in range(page, page_after) if p in missed)
            decoded.append(DecodedPages(batch[start : int(first[page_after])], gaps))
            page = page_after
        return decoded

    def locate(self, buffer: Bytes, stretches: Sequence[Stretch]) -> Located:
        """Return the positions of all events of all kinds; arguments and errors as in `decode`."""
        layout = self.layout
        words: Words = buffer.view(np.uint32)
        page_words = layout.page_size // 4
        counts = [stretch.pages for stretch in stretches]
        cpus = np.repeat(np.array([stretch.cpu for stretch in stretches], np.uint16), counts)
        pages = len(cpus)
        words[pages * page_words : pages * page_words + _SLACK_WORDS] = _STOP
        heads = words[: pages * page_words].reshape(pages, page_words)
        stamp = layout.timestamp_offset // 4
        times = heads[:, stamp].astype(np.int64) | heads[:, stamp + 1].astype(np.int64) << 32
        commit = heads[:, layout.commit_offset // 4].astype(np.int64)
        used = commit & ~MISSED
        self._complain(
            cpus, np.flatnonzero((used > layout.data_size) | (used & 3 != 0)), "holds no such number of bytes"
        )

        begin = np.arange(pages, dtype=np.int64) * layout.page_size + layout.data_offset
        end = begin + used
        missed = {
            int(page): self._stored_loss(words, int(end[page]), int(commit[page]), int(used[page]))
            for page in np.flatnonzero(commit & _MISSED_EVENTS)
        }
        words[end >> 2] = _STOP
        at = self._walk(buffer, words, begin, end, cpus)

        first = np.searchsorted(at, begin >> 2)
        head = words.take(at, mode="clip")
        kind = head & np.uint32(31)
        ts = self._times(words, at, head, kind, first, times)
        wanted = kind < _PADDING
        page = 0
        for stretch in stretches:
            if stretch.skip:
                wanted[first[page] : np.searchsorted(at, (begin[page] + stretch.skip) >> 2)] = False
            page += stretch.pages
        if not wanted.all():
            keep = np.flatnonzero(wanted)
            at, ts, kind = at[keep], ts[keep], kind[keep]
        size = kind << np.uint32(2)
        at += 1
        if not kind.all():
            long = np.flatnonzero(kind == 0)
            size[long] = words[at[long]] - np.uint32(4)
            at[long] += 1
        return Located(words, at, ts, size, np.append(begin, pages * layout.page_size), cpus, missed)

    def _complain(self, cpus: npt.NDArray[np.uint16], wrong: Ints, what: str) -> None:
        """Raise `SourceError` for the first of the invalid pages (or events) `wrong`, given as indices into `cpus`."""
        if len(wrong):
            raise SourceError(
                f"ring of CPU {cpus[wrong[0]]}: a page {what}; expected up to {self.layout.data_size} bytes of whole "
                "events in the format that the kernel describes"
            )

    def _stored_loss(self, words: Words, end: int, commit: int, used: int) -> int | None:
        size = self.layout.commit_size  # both are a long
        if not commit & _MISSED_STORED or used + size > self.layout.data_size:
            return None
        return int(words[end // 4]) | (int(words[end // 4 + 1]) << 32 if size == 8 else 0)

    def _walk(self, buffer: Bytes, words: Words, begin: Ints, end: Ints, cpus: npt.NDArray[np.uint16]) -> Ints:
        """Return the word indices of all event headers in ring order, without padding."""
        collected: list[Ints] = []
        longest = self.layout.data_size // 8 + 1
        current, until = begin, end
        while len(current):
            path = self._lockstep(buffer, current, longest)
            last = path[-1].copy()
            walked = np.ascontiguousarray(path.T)
            moved = walked[:, :-1] != walked[:, 1:]
            collected.append(walked[:, :-1].ravel().compress(moved.ravel()) >> 2)
            head = words.take(last >> 2, mode="clip")
            self._complain(cpus, np.flatnonzero(last > until), "has an event that reaches over its end")
            halted = np.flatnonzero((last < until) & (head != _STOP))
            # Events with their length in array[0]: type 0, and padding (a discarded event, or the rest of a page in its
            # full length).
            current, until, head, cpus = last[halted], until[halted], head[halted], cpus[halted]
            length = words.take((current >> 2) + 1, mode="clip").astype(np.int64)
            following = current + 4 + length
            wrong = (length < 4) | (length & 3 != 0) | (following > until)
            self._complain(cpus, np.flatnonzero(wrong), "has an event of no valid length")
            # Keep discarded events for their time delta; the padding that ends a page has no event after it.
            kept = np.flatnonzero(((head & 31) == 0) | (following < until))
            if len(kept):
                collected.append(current[kept] >> 2)
            current = following
        if len(collected) == 1:
            return collected[0]
        # Each part is in order, so that the stable sort only merges them.
        return np.sort(np.concatenate(collected), kind="stable") if collected else np.zeros(0, np.int64)

    def _lockstep(self, buffer: Bytes, start: Ints, longest: int) -> Ints:
        """Return byte offsets [step, page], from `start` until no walk moves any more."""
        rows = np.empty((min(longest, 128) + 1, len(start)), np.int64)
        rows[0] = start
        low = np.empty(len(start), np.uint8)
        advance = np.empty(len(start), np.int64)
        step = 0
        while True:
            if step + 1 == len(rows):
                rows = np.concatenate([rows, np.empty_like(rows)])
            buffer.take(rows[step], out=low, mode="clip")
            _ADVANCE.take(low, out=advance, mode="clip")
            np.add(rows[step], advance, out=rows[step + 1])
            step += 1
            # Test only every eighth step: a superfluous step changes nothing.
            if step % 8 == 0 and not advance.any():
                return rows[: step + 1]

    def _times(self, words: Words, at: Ints, head: Words, kind: Words, first: Ints, page_times: Ints) -> Ints:
        """Return the time of each event, ns: that of its page (or of the last absolute stamp) plus all deltas since."""
        delta = np.right_shift(head, 5, dtype=np.int64)
        if not len(at):
            return delta
        special = np.flatnonzero(kind >= _TIME_EXTEND)
        if len(special):
            delta[special] += words[at[special] + 1].astype(np.int64) << _DELTA_BITS
        occupied = np.flatnonzero(np.diff(first, append=len(at)))
        start, base = first[occupied], page_times[occupied]
        stamps = special[kind[special] == _TIME_STAMP]
        if len(stamps):
            # The upper bits are those of the time before (rb_fix_abs_ts), which the page's own time has too.
            page = np.searchsorted(start, stamps, side="right") - 1
            absolute = delta[stamps] | base[page] & ~((1 << _STAMP_BITS) - 1)
            absolute += (absolute < base[page]) * np.int64(1 << _STAMP_BITS) * (base[page] >> _STAMP_BITS != 0)
            delta[stamps] = 0
            # If a page begins with a stamp, the stamp's time replaces that of the page.
            start, keep = np.unique(np.concatenate([stamps, start]), return_index=True)
            base = np.concatenate([absolute, base])[keep]
        sums = np.add.reduceat(delta, start)
        # One running sum over all pages: at each start, jump from where the stretch before ended to the base.
        delta[start] += base - np.concatenate([[0], base[:-1] + sums[:-1]])
        return np.cumsum(delta)

    def _columns(
        self, words: Words, at: Ints, ts: Ints, size: Words, hook: Bytes, cpus: npt.NDArray[np.uint16]
    ) -> Batch:
        known = self._events
        count = len(at)
        if not count:
            return Batch.empty()
        short = size < known.fixed_size.take(hook, mode="clip")
        self._complain(cpus, np.flatnonzero(short), "has an event that is shorter than its format")
        address = known.skb.take(hook, mode="clip")
        address += at
        skb: U64 = words.take(address, mode="clip").astype(np.uint64)
        address += 1
        skb |= words.take(address, mode="clip").astype(np.uint64) << np.uint64(32)

        address = known.len.take(hook, mode="clip")
        address += at
        length = words.take(address, mode="clip")
        length &= known.len_mask.take(hook, mode="clip")
        header = known.header.take(hook, mode="clip")

        reason = np.zeros(count, np.uint16)
        segments = np.zeros(count, np.uint16)
        for ident, value in known.network_offset.items():
            of = np.flatnonzero(hook == ident)
            offset = value.read(words, at[of]).view(np.int32)
            header[of] = np.where(offset > 0, offset.view(np.uint32), header[of])
        for ident, value in known.gso_segs.items():
            of = np.flatnonzero(hook == ident)
            segments[of] = value.read(words, at[of])
        for ident, value in known.reason.items():
            of = np.flatnonzero(hook == ident)
            # Subsystems number their own reasons from bit 16 on (include/net/dropreason.h); the low half is kept.
            reason[of] = value.read(words, at[of]) & np.uint32(0xFFFF)
        length -= np.minimum(header, length)

        return Batch(
            ts_ns=ts,
            skb_id=self.skb_ids(skb),
            dev=self._devices(words, at, size, hook, cpus),
            l3_len=length,
            cpu=cpus,
            drop_reason=reason,
            gso_segs=segments,
            hook=hook,
        )

    def _devices(
        self, words: Words, at: Ints, size: Words, hook: Bytes, cpus: npt.NDArray[np.uint16]
    ) -> npt.NDArray[np.uint32]:
        known = self._events
        address = known.name.take(hook, mode="clip")
        address += at
        place = words.take(address, mode="clip")
        place &= known.name_mask.take(hook, mode="clip")  # no device: offset 0, length 0, and so the empty name
        offset = place & np.uint32(0xFFFF)
        length = place >> np.uint32(16)
        wrong = (length > _NAME_MAX) | (offset + length > size)
        self._complain(
            cpus, np.flatnonzero(wrong), f"has a device name of more than {_NAME_MAX} bytes or outside its event"
        )
        start = at + (offset >> np.uint32(2))
        low: U64 = words.take(start, mode="clip").astype(np.uint64)
        start += 1
        low |= words.take(start, mode="clip").astype(np.uint64) << np.uint64(32)
        high: U64
        if int(length.max()) <= 9:  # eight letters and the NUL
            high = np.zeros(len(low), np.uint64)
        else:
            start += 1
            high = words.take(start, mode="clip").astype(np.uint64)
            start += 1
            high |= words.take(start, mode="clip").astype(np.uint64) << np.uint64(32)
            high &= _NAME_MASK_HIGH.take(length, mode="clip")
        askew = np.flatnonzero(offset & np.uint32(3))
        if len(askew):
            # A name follows the last field without alignment; in napi_gro_receive_entry that is a u16.
            low[askew], high[askew] = self._askew(words, at[askew], offset[askew], length[askew])
        low &= _NAME_MASK.take(length, mode="clip")
        return self.sightings.codes(low, high)

    @staticmethod
    def _askew(words: Words, at: Ints, offset: Words, length: Words) -> tuple[U64, U64]:
        """Return both halves of names that do not begin at a word boundary; the high half is masked."""
        start = at + (offset >> np.uint32(2))
        word: list[Any] = [words.take(start + i, mode="clip").astype(np.uint64) for i in range(5)]
        shift = ((offset & np.uint32(3)) << np.uint32(3)).astype(np.uint64)  # 8, 16 or 24
        up = np.uint64(64) - shift
        half = np.uint64(32)
        first, second, third = word[0] | word[1] << half, word[2] | word[3] << half, word[4]
        high = (second >> shift | third << up) & _NAME_MASK_HIGH.take(length, mode="clip")
        return first >> shift | second << up, high
