"""Divides records into lives of kernel buffers, by the moves of `correlator.identity`.

Records are brought into *buffer order*: grouped by buffer, in order of time within each. A life is then a run of
records, described by arrays with one element per record or per life.
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
"""Whether a number of bytes is in COPIED_BEHIND; all other numbers are clipped to the last entry (index -1)."""
_OPTIONAL: Final[dict[str, Any]] = {
    "key": np.uint64,
    "trait": np.uint8,
    "flow": np.uint64,
    "proto": np.uint8,
    "cpu": np.uint16,
}
"""The optional columns of `Records`."""


@dataclass(frozen=True, slots=True)
class Records:
    """The columns that the engine keeps of records, in order of time."""

    ts: Ints
    skb: U64
    place: Ints
    """Hook and sighting, as `correlator.identity.place` packs them."""
    length: npt.NDArray[np.uint32]
    """Bytes; at a drop `Batch.drop_reason` instead, because the length at a drop is not needed."""
    key: U64 | None = None
    """Content keys, 0 if unknown; None if no record has one."""
    trait: npt.NDArray[np.uint8] | None = None
    """`correlator.content.traits`; None if `key` is None."""
    flow: U64 | None = None
    """`correlator.content.flows`; None if they are not needed, or `key` is None."""
    proto: npt.NDArray[np.uint8] | None = None
    """IP protocol number, 0 if none; None if `flow` is None."""
    cpu: npt.NDArray[np.uint16] | None = None
    """CPU of each record; None if it is not needed."""

    def __len__(self) -> int:
        return len(self.ts)

    @classmethod
    def of(cls, batch: Batch, *, flows: bool = False, cpus: bool = False) -> Records:
        """Make the records of a batch, which has no markers.

        `flows` includes the columns `flow` and `proto`, `cpus` the column `cpu`.
        """
        dev = batch.dev
        if batch.content is not None:
            # At a delivery or an end, `dev` may be an earlier device of the packet (RECALLED): clear it.
            dev = dev * HAS_DEVICE.take(batch.hook)
        length = batch.l3_len
        if batch.drop_reason.any():
            length = np.where(batch.hook == DROP, batch.drop_reason, length)
        flow, proto = content.flows(batch) if flows else (None, None)
        return cls(
            batch.ts_ns,
            batch.skb_id,
            place(batch.hook, dev),
            length,
            keys(batch),
            traits(batch),
            flow,
            proto,
            batch.cpu if cpus else None,
        )

    def __add__(self, later: Records) -> Records:
        if not len(self):
            return later
        names = [f.name for f in fields(self)]
        absent = [name for name in _OPTIONAL if getattr(self, name) is None and getattr(later, name) is None]
        return Records(
            **{name: np.concatenate([self.column(name), later.column(name)]) for name in names if name not in absent}
        )

    def __getitem__(self, index: Ints) -> Records:
        """Return the records at `index`."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Records(**{name: column[index] for name, column in given if column is not None})

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column, zeros if it is absent."""
        column = getattr(self, name)
        return np.zeros(len(self), _OPTIONAL[name]) if column is None else column


@dataclass(frozen=True, slots=True)
class Open:
    """Records of lives that have not ended, with the results so far."""

    records: Records
    number: Ints
    """Device numbers, as in `Lives`."""
    cross: Mask
    """Whether each record is the first on its device, as in `Lives`."""

    def __len__(self) -> int:
        return len(self.records)


NOTHING_OPEN: Final = Open(Records.of(Batch.empty()), np.zeros(0, np.int64), np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """The paths of lives: arrays with one element per record, in buffer order, and arrays with one per life."""

    ts: Ints
    place: Ints
    number: Ints
    """Device number of each record; -1: no device or unknown; -2: moves disagree."""
    cross: Mask
    """Whether each record is the first on its device."""
    life: Ints
    """Index of each record's life."""

    starts: Ints
    ends: Ints
    """Index of each life's last record."""
    freed: Mask
    """Whether each life's last record is the buffer's end."""

    @property
    def size(self) -> Ints:
        """Number of records of each life."""
        return self.ends - self.starts + 1

    def numbered(self, which: Ints) -> Paths:
        """Return the lives `which`, with each record's index in its life, from 0, in place of its time."""
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
    """Lives: their paths, records, and the evidence that each is of one packet."""

    records: Records
    """Records in order of time; `order` is the index into them of each record in buffer order."""
    order: Ints
    reused: Mask
    """Whether another life of the same buffer follows."""
    late: Mask
    """Whether that life follows after the timeout, so that no partner could have followed in time."""
    grade: npt.NDArray[np.uint8]
    """`contracts.schema.Grade`: EXACT, BUFFER or CONTENT."""
    told_apart: int
    """Number of lives that the content key alone ended in this step."""

    def packet(self) -> U64:
        """Return an identifier for each life that depends on its first record only."""
        return named(self.records[self.order[self.starts]])

    def length(self) -> npt.NDArray[np.uint32]:
        """Return the length at each life's first record, bytes."""
        return self.records.length[self.order[self.starts]]

    def drop_reason(self) -> npt.NDArray[np.uint16]:
        """Return the drop reason at each life's end; meaningless for a life that does not end with a drop."""
        return self.records.length[self.order[self.ends]].astype(np.uint16)

    def still_open(self, which: Mask) -> Open:
        """Return the records of the lives in `which`, back in order of time."""
        first, size = self.starts[which], self.size[which]
        if not len(first):
            return NOTHING_OPEN
        kept = laid_out(first, size)
        kept = kept[np.argsort(self.order[kept])]
        return Open(self.records[self.order[kept]], self.number[kept], self.cross[kept])


def laid_out(starts: Ints, size: Ints) -> Ints:
    """Return the concatenated indices of stretches that begin at `starts` and are `size` long."""
    index: Ints = np.arange(int(size.sum())) + np.repeat(starts - (np.cumsum(size) - size), size)
    return index


def named(first: Records) -> U64:
    """Return the identifier of the life that begins with each of these records."""
    mixed = first.skb ^ (first.ts.view(np.uint64) * GOLDEN)
    mixed ^= mixed >> np.uint64(32)
    names: U64 = mixed * np.uint64(0xD6E8FEB86659FD93)
    return names


def join(carried: Open, new: Records, resolver: Resolver, gaps: Gaps, timeout_ns: int) -> Lives:
    """Divide the records of each buffer into lives.

    The records of `carried` stay joined as they are; the records of `new` follow them in time. There must be at least
    one record.
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
    """Clear `joined` at records whose key shows another packet.

    Returns the number of such records, and the indices of records at which the key changed for a known reason. `key` is
    in buffer order.
    """
    if key is None or records.trait is None:
        return 0, np.zeros(0, np.int64)
    at = changes(key, joined)
    if not len(at):
        return 0, at
    # Changes of the key inside carried lives were explained in an earlier step.
    same_packet = ~judged[at] | explained(at, places, moves, records.trait[order])
    joined[at[~same_packet]] = False
    return len(at) - int(same_packet.sum()), at[same_packet]


def _graded(records: Records, key: U64 | None, order: Ints, starts: Ints, other_content: Ints) -> npt.NDArray[np.uint8]:
    """Return the grades of the lives that begin at `starts`.

    `other_content` are lives in which the key changed for a known reason. `key` is in buffer order.
    """
    grade = np.full(len(starts), Grade.BUFFER, np.uint8)
    if key is not None:
        # If every record has a key, the number of keys is the number of records and need not be counted.
        keyed = np.diff(starts, append=len(key)) if key.all() else np.add.reduceat(key != 0, starts, dtype=np.int64)
        grade[keyed > 1] = Grade.EXACT
        # A source without kernel buffers uses the content key as `skb_id`.
        of_content = records.skb[order[starts]] == key[starts]
        grade[(keyed > 1) & of_content] = Grade.CONTENT
        grade[other_content] = Grade.BUFFER
    return grade


def spans_gap(gaps: Gaps, after_ns: Ints, before_ns: Ints) -> Mask:
    """Return, for each pair of times, whether records were lost between them."""
    if not gaps:
        return np.zeros(len(after_ns), np.bool_)
    merged: list[list[int]] = []
    for start, end in sorted(gaps):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    # The merged gaps are disjoint: only the first that ends later than `after_ns` can overlap.
    starts, ends = np.array(merged, np.int64).T
    first = np.searchsorted(ends, after_ns, "right")
    spans: Mask = (first < len(ends)) & (starts[np.minimum(first, len(ends) - 1)] < before_ns)
    return spans


def _tell(number: Ints, at: Ints, told: Ints) -> None:
    """Enter the devices that moves determine; -2 if two moves of one record disagree."""
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
