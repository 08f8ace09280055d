"""Raw ring-buffer pages of the kernel's tracer -> columns of a batch.

A page is a header (time stamp, bytes used), then events that each begin with a 4-byte word: 5 bits of `type_len`,
27 bits of time since the event before (include/linux/ring_buffer.h, `enum ring_buffer_type`):

    1..28   data, of type_len * 4 bytes
    0       data, of array[0] - 4 bytes after array[0]
    29      padding: with time_delta 0 to the end of the page, else of array[0] bytes, counted from array[0]
    30      time extend: array[0] is the time since the event before, from bit 27 on
    31      time stamp: the same, but absolute; its bits 59 and up are those of the time before

So the place of an event is known only from the event before it. Walking many pages in lockstep makes this
vectors: step i finds event i + 1 of all pages at once, in three numpy calls. To need no test for the end of a page in
there, the word after the last event is overwritten by a `_STOP` (padding of time_delta 0), whose advance is 0, as are
those of types 0 and 29, that need a closer look: a walk that no longer moves has come to one of the three.
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

# `commit` of a page that was read (kernel/trace/ring_buffer.c): bytes of data, and these two.
_MISSED_EVENTS: Final = 1 << 31
"""Events were lost right before this page."""
_MISSED_STORED: Final = 1 << 30
"""How many is stored as an unsigned long after the data."""
MISSED: Final = _MISSED_EVENTS | _MISSED_STORED

_DATA_MAX: Final = 28
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_STOP: Final = _PADDING
"""The word that a walk does not leave: padding, time_delta 0."""
_SLACK_WORDS: Final = 32
"""A step is at most 29 words: one from inside the last page cannot jump over this many `_STOP`s behind it."""

_DELTA_BITS: Final = 27
_STAMP_BITS: Final = 59
"""A time stamp event has 32 + 27 bits; ABS_TS_MASK in ring_buffer.c."""

_ADVANCE: Final = np.array(
    [(t + 1) * 4 if 1 <= t <= _DATA_MAX else 8 if t in (_TIME_EXTEND, _TIME_STAMP) else 0 for t in range(32)] * 8,
    np.int64,
)
"""Bytes from one event to the next, by the lowest byte of its header (5 bits of it are type_len)."""

_NAME_MAX: Final = 16
"""IFNAMSIZ (include/uapi/linux/if.h): the longest device name with its final NUL."""
_NAME_MASK: Final = np.array([(1 << 8 * min(max(n - 1, 0), 8)) - 1 for n in range(_NAME_MAX + 1)], np.uint64)
"""What of a name's first 8 bytes is name, by length with NUL. Behind it lies whatever was there before."""
_NAME_MASK_HIGH: Final = np.array([(1 << 8 * min(max(n - 9, 0), 8)) - 1 for n in range(_NAME_MAX + 1)], np.uint64)
"""The same for the second 8 bytes."""

_HEAD: Final = 256
"""New names are looked for in so many events at a time."""

_ETH_HLEN: Final = 14
"""Bytes of an Ethernet header (include/uapi/linux/if_ether.h): taken off where the event does not tell better."""


class Sightings:
    """Device names -> codes, in order of appearance; the names as `contracts.topology.Sighting`s.

    A name is two 64-bit words, found in a direct-mapped table by their hash. What is not where it is looked for
    goes on to a second table with another hash, and from there to a dictionary.
    """

    _BITS: Final = 16

    def __init__(self) -> None:
        self._names: list[Sighting] = [NO_DEVICE]
        self._codes: dict[tuple[int, int], int] = {(0, 0): 0}
        size = 1 << self._BITS
        # Slot by slot: both words of the name that lives there, and its code. No name hashes elsewhere than (0, 0),
        # so an empty slot (0, 0) is right about itself: no device.
        self._tables = [(np.zeros(size, np.uint64), np.zeros(size, np.uint64), np.zeros(size, np.uint32)) for _ in "12"]
        # Odd constants: the golden ratio's and MurmurHash3's finalizer.
        self._multipliers = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD))
        self._shift = np.uint64(64 - self._BITS)

    def __len__(self) -> int:
        return len(self._names)

    def snapshot(self) -> tuple[Sighting, ...]:
        """All sightings so far; index is code."""
        return tuple(self._names)

    def code(self, low: int, high: int) -> int:
        """The code of one name, given as its bytes 0..7 and 8..15, little-endian; a new one if it is new."""
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
        """The codes of many names."""
        while True:
            found, missing = self._look_up(low, high)
            # Names that are not in the tables are new, at first; the new ones come with few events each.
            known = len(self)
            head = missing[:_HEAD]
            for pair in zip(low[head].tolist(), high[head].tolist(), strict=True):
                self.code(*pair)
            if len(self) == known:
                break
        if len(missing):
            pairs, inverse = np.unique(np.stack([low[missing], high[missing]], axis=1), axis=0, return_inverse=True)
            # By first appearance, not by name: codes must not depend on how the stream is cut.
            first = np.full(len(pairs), len(missing))
            np.minimum.at(first, inverse.ravel(), np.arange(len(missing)))
            code_of = np.zeros(len(pairs), np.uint32)
            for i in np.argsort(first):
                code_of[i] = self.code(int(pairs[i, 0]), int(pairs[i, 1]))
            found[missing] = code_of[inverse.ravel()]
        return found

    def _look_up(self, low: U64, high: U64) -> tuple[npt.NDArray[np.uint32], Ints]:
        """Codes out of the tables, and where there was none."""
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
    """Records that the ring lost right before record `index` of a batch; `lost` is None where the page does not say."""

    index: int
    lost: int | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pages of one CPU, one after the other in a buffer and in the ring."""

    cpu: int
    pages: int
    skip: int = 0
    """Bytes of the first page's data that were decoded before."""


@dataclass(frozen=True, slots=True)
class DecodedPages:
    """What the pages of a stretch hold, in the ring's order."""

    batch: Batch
    gaps: tuple[Gap, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Where the events of some pages are; all arrays but those of the pages have one length."""

    words: Words
    """The buffer."""
    at: Ints
    """First word of each event's payload, ascending."""
    ts: Ints
    """Its time, ns."""
    size: Words
    """Bytes of its payload; up to three at the end are nobody's."""
    begin: Ints
    """Byte where each page's data begins, and one past the last page."""
    cpus: npt.NDArray[np.uint16]
    """CPU of each page."""
    missed: dict[int, int | None]
    """Events lost right before a page; None where it does not say how many."""

    @property
    def first(self) -> Ints:
        """Number of the first event of each page, and of all events."""
        return np.searchsorted(self.at, self.begin >> 2)

    def ids(self) -> Words:
        """`common_type` of each event."""
        return self.words.take(self.at, mode="clip") & np.uint32(0xFFFF)

    def __getitem__(self, index: Ints) -> Located:
        """Some of the events."""
        at, ts, size = self.at[index], self.ts[index], self.size[index]
        return Located(self.words, at, ts, size, self.begin, self.cpus, self.missed)


@dataclass(frozen=True, slots=True)
class _Value:
    """How to get an integer field of at most 4 bytes out of the word that it lies in."""

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
    """The formats of all known events as tables, indexed by hook; 0 for what an event does not have."""

    def __init__(self, formats: Iterable[EventFormat]) -> None:
        size = max(info.hook for info in HOOKS) + 1
        self.hook_of_id = np.zeros(MAX_EVENT_ID + 1, np.uint8)
        self.skb = np.zeros(size, np.int64)
        self.name = np.zeros(size, np.int64)
        self.name_mask = np.zeros(size, np.uint32)
        self.len = np.zeros(size, np.int64)
        self.len_mask = np.zeros(size, np.uint32)
        self.header = np.zeros(size, np.uint32)
        """Bytes of link-layer header in the length."""
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
        # Fields that not every kernel has, each with its table.
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
    """Memory for `pages` pages and what the decoder needs behind them."""
    buffer = np.zeros(pages * layout.page_size + _SLACK_WORDS * 4, np.uint8)
    buffer[-_SLACK_WORDS * 4 :].view(np.uint32)[:] = _STOP
    return buffer


@functools.cache
def process_key() -> tuple[int, int, int]:
    """For files: drawn once in a process, so that one that is read twice names its packets alike."""
    return secrets.randbits(64), secrets.randbits(64), secrets.randbits(64)


class PageDecoder:
    """Decodes pages of one machine's kernel. Keeps the sightings and the key of skb_id, and no other state."""

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
        """Events of other kinds than the hooks'."""
        self._events = _Events(formats)
        # A bijection on 64 bits (xor, odd multiplications, xor-shift), so that no two buffers share an id, with
        # constants of this run, so that no kernel address leaves the machine.
        self.key: Final = key or (secrets.randbits(64), secrets.randbits(64), secrets.randbits(64))
        xor, first, second = self.key
        self._key = np.uint64(xor), np.uint64(first | 1), np.uint64(second | 1)

    def skb_ids(self, addresses: U64) -> U64:
        """The ids of kernel buffers at these addresses; works in place and returns its argument."""
        xor, first, second = self._key
        half = np.uint64(32)
        addresses ^= xor
        addresses *= first
        addresses ^= addresses >> half
        addresses *= second
        addresses ^= addresses >> half
        return addresses

    def decode(self, buffer: Bytes, stretches: Sequence[Stretch]) -> list[DecodedPages]:
        """The records of each stretch; they lie one after the other in a `page_buffer`, which is scribbled on.

        Many CPUs with a few events each cost hardly more than one of them, if they are decoded together.
        Raises `SourceError` naming the page where a page is not one.
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
        """All events of all kinds, as `decode` finds them."""
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
        """Refuse the first of the pages (or events) `wrong`, indexes into `cpus`."""
        if len(wrong):
            raise SourceError(
                f"ring of CPU {cpus[wrong[0]]}: a page {what}; expected up to {self.layout.data_size} bytes of whole "
                "events in the format that the kernel tells"
            )

    def _stored_loss(self, words: Words, end: int, commit: int, used: int) -> int | None:
        size = self.layout.commit_size  # both are a long
        if not commit & _MISSED_STORED or used + size > self.layout.data_size:
            return None
        return int(words[end // 4]) | (int(words[end // 4 + 1]) << 32 if size == 8 else 0)

    def _walk(self, buffer: Bytes, words: Words, begin: Ints, end: Ints, cpus: npt.NDArray[np.uint16]) -> Ints:
        """Word indexes of all event headers in ring order, without padding."""
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
            # Events that say themselves how long they are: type 0, and padding (a discarded event, or the rest of
            # a page in its full length).
            current, until, head, cpus = last[halted], until[halted], head[halted], cpus[halted]
            length = words.take((current >> 2) + 1, mode="clip").astype(np.int64)
            following = current + 4 + length
            wrong = (length < 4) | (length & 3 != 0) | (following > until)
            self._complain(cpus, np.flatnonzero(wrong), "has an event of no valid length")
            # A discarded event counts as time passed; the padding that ends a page has no event after it.
            kept = np.flatnonzero(((head & 31) == 0) | (following < until))
            if len(kept):
                collected.append(current[kept] >> 2)
            current = following
        if len(collected) == 1:
            return collected[0]
        # Each is in order, so the stable sort only merges them.
        return np.sort(np.concatenate(collected), kind="stable") if collected else np.zeros(0, np.int64)

    def _lockstep(self, buffer: Bytes, start: Ints, longest: int) -> Ints:
        """Byte offsets [step, page], from `start` until no walk moves any more."""
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
            # Looked at now and then only: a step too many changes nothing.
            if step % 8 == 0 and not advance.any():
                return rows[: step + 1]

    def _times(self, words: Words, at: Ints, head: Words, kind: Words, first: Ints, page_times: Ints) -> Ints:
        """Time of each event, ns: its page's (or the last absolute stamp's) plus all time deltas since."""
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
            # The upper bits are those of the time before (rb_fix_abs_ts); the page's own time is near enough.
            page = np.searchsorted(start, stamps, side="right") - 1
            absolute = delta[stamps] | base[page] & ~((1 << _STAMP_BITS) - 1)
            absolute += (absolute < base[page]) * np.int64(1 << _STAMP_BITS) * (base[page] >> _STAMP_BITS != 0)
            delta[stamps] = 0
            # Where a page begins with a stamp, the stamp has the last word.
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
        """Both halves of names that do not begin at a word; the high half masked."""
        start = at + (offset >> np.uint32(2))
        word: list[Any] = [words.take(start + i, mode="clip").astype(np.uint64) for i in range(5)]
        shift = ((offset & np.uint32(3)) << np.uint32(3)).astype(np.uint64)  # 8, 16 or 24
        up = np.uint64(64) - shift
        half = np.uint64(32)
        first, second, third = word[0] | word[1] << half, word[2] | word[3] << half, word[4]
        high = (second >> shift | third << up) & _NAME_MASK_HIGH.take(length, mode="clip")
        return first >> shift | second << up, high
