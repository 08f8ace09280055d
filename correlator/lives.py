"""Records -> lives of kernel buffers: which records are of one packet, by the moves of `correlator.identity`.

Records are brought into buffer order (all of one buffer together, in the order of time); a life is then a run of
them, and everything is said by arrays over records and over lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Ints, Mask
from contracts.ordering import GOLDEN, grouped
from contracts.records import Batch
from contracts.schema import Grade
from correlator import content
from correlator.content import changes, explained, keys, traits
from correlator.identity import (
    CODE_BITS,
    CODES,
    COPIED_BEHIND,
    CROSS,
    HAS_DEVICE,
    JOIN,
    SAME_LENGTH,
    WAY,
    WHOLE_COPY,
    Resolver,
    from_device,
    place,
    to_device,
)
from correlator.numbers import DROP, END, RECEIVE

Gaps = Sequence[tuple[int, int]]
"""Stretches of time, (start, end) in ns, in which some CPU's ring lost records."""

NEVER: Final = np.iinfo(np.int64).max
_COPIED: Final = np.isin(np.arange(max(COPIED_BEHIND) + 2), COPIED_BEHIND)
"""Whether a number of bytes is one of COPIED_BEHIND; the last entry stands for all others, at -1 too."""
_OF_CONTENT: Final[dict[str, Any]] = {"key": np.uint64, "trait": np.uint8, "flow": np.uint64, "proto": np.uint8}
"""The columns of `Records` that it may not have."""


@dataclass(frozen=True, slots=True)
class Records:
    """What the engine keeps of each record, in the order of time."""

    ts: Ints
    skb: U64
    place: Ints
    """Hook and sighting, as `correlator.identity.place` packs them."""
    length: npt.NDArray[np.uint32]
    """Bytes; where a packet is dropped, why (`Batch.drop_reason`): nobody asks how long it is then."""
    key: U64 | None = None
    """Content keys, 0 where none is known; None if no record has one."""
    trait: npt.NDArray[np.uint8] | None = None
    """What else `correlator.content` asks of a record; None where `key` is."""
    flow: U64 | None = None
    """`correlator.content.flows`; None where it is not asked for, or `key` is None."""
    proto: npt.NDArray[np.uint8] | None = None
    """IP protocol number, 0 if none; None where `flow` is."""

    def __len__(self) -> int:
        return len(self.ts)

    @classmethod
    def of(cls, batch: Batch, *, flows: bool = False) -> Records:
        """The records of a batch (no markers). `flows`: with what tells one flow's packets from another's."""
        dev = batch.dev
        if batch.content is not None:
            # The device that a packet was at before it was delivered or freed is not where it is now.
            dev = dev * HAS_DEVICE.take(batch.hook)
        length = batch.l3_len
        if batch.drop_reason.any():
            length = np.where(batch.hook == DROP, batch.drop_reason, length)
        told = (keys(batch), traits(batch), *(content.flows(batch) if flows else ()))
        return cls(batch.ts_ns, batch.skb_id, place(batch.hook, dev), length, *told)

    def __add__(self, later: Records) -> Records:
        if not len(self):
            return later
        names = [f.name for f in fields(self)]
        absent = [name for name in _OF_CONTENT if getattr(self, name) is None and getattr(later, name) is None]
        return Records(
            **{name: np.concatenate([self.column(name), later.column(name)]) for name in names if name not in absent}
        )

    def __getitem__(self, index: Ints) -> Records:
        """The records at `index`."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Records(**{name: column[index] for name, column in given if column is not None})

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column, zeros if it is not there."""
        column = getattr(self, name)
        return np.zeros(len(self), _OF_CONTENT[name]) if column is None else column


@dataclass(frozen=True, slots=True)
class Open:
    """Records of lives that have not ended, with what was found out about them."""

    records: Records
    number: Ints
    """As in `Lives`."""
    cross: Mask
    """As in `Lives`."""

    def __len__(self) -> int:
        return len(self.records)


NOTHING_OPEN: Final = Open(Records.of(Batch.empty()), np.zeros(0, np.int64), np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Where lives went, one after the other. Arrays over records, in buffer order, then arrays over lives."""

    ts: Ints
    place: Ints
    number: Ints
    """Device number; -1: none, or not known; -2: moves disagree."""
    cross: Mask
    """Whether the record is the first on its device."""
    life: Ints
    """Which life each record is of."""

    starts: Ints
    ends: Ints
    """Index of the last record."""
    freed: Mask
    """The last record is the buffer's end."""

    @property
    def size(self) -> Ints:
        """Records of each life."""
        return self.ends - self.starts + 1

    def numbered(self, which: Ints) -> Paths:
        """These lives, with the numbers of a life's records, from 0, in place of their times."""
        size = self.size[which]
        ends = np.cumsum(size) - 1
        starts = ends - size + 1
        position = np.arange(int(size.sum())) - np.repeat(starts, size)
        index = laid_out(self.starts[which], size)
        return Paths(
            ts=position,
            place=self.place[index],
            number=self.number[index],
            cross=self.cross[index],
            life=np.repeat(np.arange(len(which)), size),
            starts=starts,
            ends=ends,
            freed=self.freed[which],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives(Paths):
    """The same with all that is known about them."""

    records: Records
    """As they came: `order` leads there."""
    order: Ints
    reused: Mask
    """Another life of the same buffer follows."""
    late: Mask
    """It follows after the timeout: a partner could not have come any more."""
    grade: npt.NDArray[np.uint8]
    """`contracts.schema.Grade`: EXACT or BUFFER."""
    told_apart: int
    """Lives that their key alone ended, of those that were decided about now."""

    def packet(self) -> U64:
        """A name for each life that depends on nothing but its first record."""
        return named(self.records[self.order[self.starts]])

    def length(self) -> npt.NDArray[np.uint32]:
        """Length at each life's first record, bytes."""
        return self.records.length[self.order[self.starts]]

    def drop_reason(self) -> npt.NDArray[np.uint16]:
        """Why each life's packet was dropped at its end, if it was; else meaningless."""
        return self.records.length[self.order[self.ends]].astype(np.uint16)

    def still_open(self, which: Mask) -> Open:
        """The records of the lives in `which`, back in the order of time."""
        first, size = self.starts[which], self.size[which]
        if not len(first):
            return NOTHING_OPEN
        kept = laid_out(first, size)
        kept = kept[np.argsort(self.order[kept])]
        return Open(self.records[self.order[kept]], self.number[kept], self.cross[kept])


def laid_out(starts: Ints, size: Ints) -> Ints:
    """The indices of stretches that begin at `starts` and are `size` long, one stretch after the other."""
    index: Ints = np.arange(int(size.sum())) + np.repeat(starts - (np.cumsum(size) - size), size)
    return index


def named(first: Records) -> U64:
    """The name of the life that begins with each of these records."""
    mixed = first.skb ^ (first.ts.view(np.uint64) * GOLDEN)
    mixed ^= mixed >> np.uint64(32)
    names: U64 = mixed * np.uint64(0xD6E8FEB86659FD93)
    return names


def join(carried: Open, new: Records, resolver: Resolver, gaps: Gaps, timeout_ns: int) -> Lives:
    """Cut the records of each buffer into lives.

    The records of `carried` stay joined as they are; `new` ones come after them in time. At least one in all.
    """
    records = carried.records + new
    order, same = grouped(records.skb)
    ts, places = records.ts[order], records.place[order]
    number = resolver.only[places & (CODES - 1)]
    old = order < len(carried)
    judged = same & ~old

    moves = np.zeros(len(order), np.int64)
    moves[1:] = resolver.moves(places[:-1], places[1:], judged[1:])
    joined = (moves & JOIN) != 0
    by_length = np.flatnonzero(moves & (SAME_LENGTH | WHOLE_COPY))
    less = records.length[order[by_length - 1]].astype(np.int64) - records.length[order[by_length]]
    routed = (moves[by_length] & SAME_LENGTH) != 0
    whole = _COPIED[np.maximum(np.minimum(less, len(_COPIED) - 1), -1)]
    joined[by_length] &= np.where(routed, less == 0, whole)
    joined[1:] &= ts[1:] - ts[:-1] <= timeout_ns
    if gaps:
        joined[1:] &= ~spans_gap(gaps, ts[:-1], ts[1:])
    if len(carried):
        joined |= same & old
    key = None if records.key is None else records.key[order]
    told_apart, other_content = _part(records, key, order, joined, judged, places, moves)
    cross = ((moves & CROSS) != 0) | ~joined
    if len(carried):
        at = np.flatnonzero(old)
        number[at], cross[at] = carried.number[order[at]], carried.cross[order[at]]

    unsure = number == -1
    if unsure.any():
        told = np.flatnonzero(unsure & joined & judged)
        _tell(number, told, to_device(moves[told]))
        told = np.flatnonzero(unsure[:-1] & joined[1:] & judged[1:])
        _tell(number, told, from_device(moves[told + 1]))
        _tell_starts(number, np.flatnonzero(unsure & ~joined & ~old), places, ts, resolver, gaps, timeout_ns)

    starts = np.flatnonzero(~joined)
    ends = np.append(starts[1:], len(order)) - 1
    reused = np.append(same[starts[1:]], False)
    waited = np.append(ts[starts[1:]] - ts[ends[:-1]] > timeout_ns, False)
    life = np.cumsum(~joined) - 1
    return Lives(
        records=records,
        order=order,
        ts=ts,
        place=places,
        number=number,
        cross=cross,
        life=life,
        starts=starts,
        ends=ends,
        freed=WAY[places[ends] >> CODE_BITS] == END,
        reused=reused,
        late=reused & waited,
        grade=_graded(records, key, order, starts, life[other_content]),
        told_apart=told_apart,
    )


def _part(
    records: Records, key: U64 | None, order: Ints, joined: Mask, judged: Mask, places: Ints, moves: Ints
) -> tuple[int, Ints]:
    """Clear `joined` where the key says that it is another packet: how often, and where a key changed otherwise.

    `key` is in buffer order.
    """
    if key is None or records.trait is None:
        return 0, np.zeros(0, np.int64)
    at = changes(key, joined)
    if not len(at):
        return 0, at
    # What was carried has been judged: where the key changes inside it, that was explained then.
    same_packet = ~judged[at] | explained(at, places, moves, records.trait[order])
    joined[at[~same_packet]] = False
    return len(at) - int(same_packet.sum()), at[same_packet]


def _graded(records: Records, key: U64 | None, order: Ints, starts: Ints, other_content: Ints) -> npt.NDArray[np.uint8]:
    """Grades of the lives that begin at `starts`; in those of `other_content` the key changed, for a known reason.

    `key` is in buffer order.
    """
    grade = np.full(len(starts), Grade.BUFFER, np.uint8)
    if key is not None:
        # Where nothing is without a key, a life has as many as records: no need to count.
        keyed = np.diff(starts, append=len(key)) if key.all() else np.add.reduceat(key != 0, starts, dtype=np.int64)
        grade[keyed > 1] = Grade.EXACT
        # A source that knows no buffers says so by giving the content's key for one.
        of_content = records.skb[order[starts]] == key[starts]
        grade[(keyed > 1) & of_content] = Grade.CONTENT
        grade[other_content] = Grade.BUFFER
    return grade


def spans_gap(gaps: Gaps, after_ns: Ints, before_ns: Ints) -> Mask:
    """Whether records were lost somewhere between two times, element by element."""
    if not gaps:
        return np.zeros(len(after_ns), np.bool_)
    merged: list[list[int]] = []
    for start, end in sorted(gaps):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    # They follow one another now, so only the first that ends later than `after_ns` is asked.
    starts, ends = np.array(merged, np.int64).T
    first = np.searchsorted(ends, after_ns, "right")
    spans: Mask = (first < len(ends)) & (starts[np.minimum(first, len(ends) - 1)] < before_ns)
    return spans


def _tell(number: Ints, at: Ints, told: Ints) -> None:
    """Enter the devices that moves tell; -2 where two moves of one record disagree."""
    news = np.flatnonzero(told >= 0)
    at, told = at[news], told[news]
    current = number[at]
    number[at] = np.where((current == -1) | (current == told), told, -2)


def _tell_starts(
    number: Ints, starts: Ints, places: Ints, ts: Ints, resolver: Resolver, gaps: Gaps, timeout_ns: int
) -> None:
    """Resolve devices at which a life starts with a reception, unless its beginning may have been lost."""
    unsure = starts[(number[starts] == -1) & (WAY[places[starts] >> CODE_BITS] == RECEIVE)]
    unsure = unsure[~spans_gap(gaps, ts[unsure] - timeout_ns, ts[unsure])]
    if len(unsure):
        codes, member = np.unique(places[unsure] & (CODES - 1), return_inverse=True)
        number[unsure] = np.array([resolver.start(int(code)) for code in codes], np.int64)[member]
