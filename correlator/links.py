"""Joins lives of different buffers that are of one packet, by the packet's content key.

The kernel continues in another buffer when it reassembles fragments and cuts them again, or copies a packet. A life
that ends inside the host (a *tail*) and a life that begins there (a *head*) are of one packet if they have the same key
and no other life with that key ends or begins there about that time. See the essay in `correlator.identity`.

Tails and heads wait here until no further record can affect the decision. The decision depends on the records alone,
never on how the stream is divided.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Ints, Mask
from contracts.records import Batch
from contracts.schema import Grade
from contracts.topology import Role
from correlator.identity import CODE_BITS, ROLES, WAY, Resolver
from correlator.lives import NEVER, Gaps, Lives, Records, laid_out, spans_gap
from correlator.numbers import CONSUMED, DELIVERY, IP_RCV, QUEUE, RECEIVE_SKB

_ON_THE_HOST: Final = np.array([role in (Role.HOST, Role.OUTER) for role in ROLES])

_OF_RECORDS: Final = ("records", "number", "cross")
"""The columns of `LooseEnds` with one element per record."""


@dataclass(frozen=True, slots=True)
class LooseEnds:
    """Tails and heads that wait. Records are grouped by life, in order of time within each life."""

    records: Records
    number: Ints
    """Device numbers, as in `Lives`."""
    cross: Mask
    size: Ints
    """Records of each life. This array and the following ones have one element per life."""
    key: U64
    at_ns: Ints
    """Time of a tail's last record on a device, or of a head's first."""
    first_ns: Ints
    head: Mask
    end: Ints
    """Index in the life of a tail's last record on a device, or of a head's first."""
    freed: Mask
    grade: npt.NDArray[np.uint8]

    def sorted(self) -> LooseEnds:
        """Return the lives in an order that does not depend on how the stream was divided."""
        first = np.cumsum(self.size) - self.size
        return self[np.lexsort((self.records.skb[first], self.first_ns, self.at_ns, self.key))]

    def __getitem__(self, lives: Ints) -> LooseEnds:
        """Return the lives with the given indices, in the given order."""
        starts = np.cumsum(self.size) - self.size
        size = self.size[lives]
        index = laid_out(starts[lives], size)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return LooseEnds(**{name: column[index if name in _OF_RECORDS else lives] for name, column in columns.items()})

    def __add__(self, other: LooseEnds) -> LooseEnds:
        names = [f.name for f in fields(self)][1:]
        both = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        return LooseEnds(self.records + other.records, **both)

    def lives(self) -> Lives:
        """Return the waiting lives as `Lives`, in the same order."""
        count, total = len(self.size), len(self.records)
        ends = np.cumsum(self.size) - 1
        return Lives(
            records=self.records,
            order=np.arange(total),
            ts=self.records.ts,
            place=self.records.place,
            number=self.number,
            cross=self.cross,
            life=np.repeat(np.arange(count), self.size),
            starts=ends - self.size + 1,
            ends=ends,
            freed=self.freed,
            reused=np.ones(count, np.bool_),
            late=np.zeros(count, np.bool_),
            grade=self.grade,
            told_apart=0,
        )


def _nobody() -> LooseEnds:
    none, no = np.zeros(0, np.int64), np.zeros(0, np.bool_)
    grades = np.zeros(0, np.uint8)
    ids = np.zeros(0, np.uint64)
    return LooseEnds(Records.of(Batch.empty()), none, no, none, ids, none, none, no, none, no, grades)


class Links:
    """Holds the waiting tails and heads of one stream, and joins them.

    A head follows its tail within `link_ns`; tails and heads with the same key within that time are candidates. At most
    `most_records` records wait; beyond that the oldest lives are released without being joined.
    """

    def __init__(self, resolver: Resolver, link_ns: int, most_records: int) -> None:
        self._resolver = resolver
        self._link_ns = link_ns
        self._most = most_records
        self.waiting = _nobody()
        """Tails and heads that wait."""
        self.ambiguous = 0
        """Tails with a head of the same key that have several candidates."""
        self.spare = 0
        """Records in no returned life: the ends of buffers whose packet continued in another buffer."""

    def __len__(self) -> int:
        return len(self.waiting.records)

    @property
    def oldest_ns(self) -> int:
        """Time of the first record of all waiting lives; `NEVER` without one."""
        return int(self.waiting.first_ns.min()) if len(self.waiting.size) else NEVER

    def take(self, lives: Lives, ended: Mask) -> Mask:
        """Keep the tails and heads among the lives in `ended`, and return a mask of those kept."""
        kept = np.zeros(len(ended), np.bool_)
        if lives.records.key is None:
            return kept
        which = np.flatnonzero(ended)
        start, last = lives.starts[which], lives.ends[which]
        for _ in range(2):  # at most a copy to a reader and the end follow the last device
            last = last - ((WAY[lives.place[last] >> CODE_BITS] >= DELIVERY) & (last > start))
        hook = lives.place >> CODE_BITS
        head = (hook[start] == QUEUE) & self._on_the_host(lives.number[start])
        tail = (
            ~head
            & ((hook[last] == RECEIVE_SKB) | (hook[last] == IP_RCV))
            & self._on_the_host(lives.number[last])
            & ((last == lives.ends[which]) | (hook[lives.ends[which]] == CONSUMED))
            & (lives.ends[which] - last < 2)  # not delivered
        )
        if not (head | tail).any():
            return kept
        end = np.where(head, start, last)
        key = lives.records.key[lives.order[end]]
        chosen = np.flatnonzero((head | tail) & (key != 0))
        which, end, head, key = which[chosen], end[chosen], head[chosen], key[chosen]
        kept[which] = True
        size, start = lives.size[which], lives.starts[which]
        index = laid_out(start, size)
        self.waiting += LooseEnds(
            records=lives.records[lives.order[index]],
            number=lives.number[index],
            cross=lives.cross[index],
            size=size,
            key=key,
            at_ns=lives.ts[end],
            first_ns=lives.ts[start],
            head=head,
            end=end - start,
            freed=lives.freed[which],
            grade=lives.grade[which],
        )
        return kept

    def _on_the_host(self, number: Ints) -> Mask:
        known = number >= 0
        on: Mask = known & _ON_THE_HOST[self._resolver.role[np.where(known, number, 0)]]
        return on

    def release(self, settled_ns: int | None, gaps: Gaps) -> Lives | None:
        """Return the lives that are decided, joined if they are of one packet; None if there is none.

        No further life begins before `settled_ns`; None means that no life follows at all.
        """
        waiting = self.waiting
        count = len(waiting.size)
        if not count:
            return None
        if (
            settled_ns is not None
            and int(waiting.at_ns.min()) + self._link_ns >= settled_ns
            and len(waiting.records) <= self._most
        ):
            return None  # all lives must wait, and there is room for them
        order = np.lexsort((waiting.head, waiting.at_ns, waiting.key))
        key, at, head = waiting.key[order], waiting.at_ns[order], waiting.head[order]
        apart = (key[1:] != key[:-1]) | (at[1:] - at[:-1] > self._link_ns)
        begins = np.append(0, np.flatnonzero(apart) + 1)
        closes = np.append(begins[1:], count) - 1
        done = np.ones(len(begins), np.bool_) if settled_ns is None else at[closes] + self._link_ns < settled_ns
        heads = np.add.reduceat(head, begins, dtype=np.int64)
        size = closes - begins + 1
        pair = done & (size == 2) & (heads == 1) & head[closes]
        several = done & (heads > 0) & (heads < size) & (size > 2)
        self.ambiguous += int((size - heads)[several].sum())
        tails, successors = order[begins[pair]], order[closes[pair]]
        fits = self._fits(tails, successors, gaps)
        tails, successors = tails[fits], successors[fits]

        out = np.repeat(done, size)
        leaving = np.zeros(count, np.bool_)
        leaving[order[out]] = True
        leaving |= self._overfull(leaving)
        if not leaving.any():
            return None
        alone = leaving.copy()
        alone[tails] = alone[successors] = False
        self.waiting = waiting[np.flatnonzero(~leaving)]
        return (waiting[np.flatnonzero(alone)] + self._joined(waiting[tails], waiting[successors])).lives()

    def _fits(self, tails: Ints, heads: Ints, gaps: Gaps) -> Mask:
        """Return whether a packet can go from each tail's last device to its head's first, without losses between."""
        waiting, devices = self.waiting, self._resolver.devices
        starts = np.cumsum(waiting.size) - waiting.size
        source = waiting.number[(starts + waiting.end)[tails]]
        target = waiting.number[(starts + waiting.end)[heads]]
        passes = [
            devices[a].netns == devices[b].netns and (a != b or devices[a].kind == "bridge")
            for a, b in zip(source.tolist(), target.tolist(), strict=True)
        ]
        return np.array(passes, np.bool_) & ~spans_gap(gaps, waiting.at_ns[tails], waiting.at_ns[heads])

    def _joined(self, tails: LooseEnds, heads: LooseEnds) -> LooseEnds:
        """Join each tail and its head into one life, without the tail's records behind its last device."""
        count = len(tails.size)
        rest = tails.size - tails.end - 1
        self.spare += int(rest.sum())
        both = tails + heads
        by_life = np.argsort(np.tile(np.arange(count), 2), kind="stable")
        turned = both[by_life]
        behind = np.repeat(turned.size - 1, turned.size)
        within = np.arange(len(turned.records)) - np.repeat(np.cumsum(turned.size) - turned.size, turned.size)
        last = np.repeat(np.where(turned.head, turned.size - 1, turned.end), turned.size)
        kept = np.flatnonzero((within <= last) & (within <= behind))
        return replace(
            heads,
            records=turned.records[kept],
            number=turned.number[kept],
            cross=turned.cross[kept],
            size=tails.end + 1 + heads.size,
            first_ns=tails.first_ns,
            grade=np.full(count, Grade.CONTENT, np.uint8),
        )

    def _overfull(self, leaving: Mask) -> Mask:
        """Return a mask of lives to release without joining, oldest first, because too many records wait."""
        chosen = np.zeros(len(leaving), np.bool_)
        staying = np.flatnonzero(~leaving)
        size = self.waiting.size[staying]
        excess = int(size.sum()) - self._most
        if excess > 0:
            oldest = np.argsort(self.waiting.at_ns[staying], kind="stable")
            chosen[staying[oldest[: int(np.searchsorted(np.cumsum(size[oldest]), excess)) + 1]]] = True
        return chosen
