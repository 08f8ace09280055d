"""Joins lives of different buffers that are of one packet, by the packet's content key.

The kernel continues in another buffer when it reassembles fragments and cuts them again, or copies a packet. A life
that ends inside the host (a *tail*) and a life that begins there (a *head*) are of one packet if they have the same
key, that key tells the packet from others (`correlator.content.traits`), and no other life with it ends or begins there
about that time. See the essay in `correlator.identity`.

Tails and heads wait until no further record can affect the decision, which depends on the records alone, never on how
the stream is divided: they are grouped by key and time, a group of one tail and a later head is joined, and all others
are measured as they are (`correlator/compiled/ends.c`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Ints, Mask
from contracts.hooks import Way
from contracts.topology import Role
from correlator.hops import Path
from correlator.identity import ROLES, Resolver
from correlator.numbers import CONSUMED, IP_RCV, QUEUE, RECEIVE_SKB
from correlator.records import Records, laid_out

_ON_THE_HOST: Final = (Role.HOST, Role.OUTER)
_OF_RECORDS: Final = ("records", "number", "cross")
"""The columns of `LooseEnds` with one element per record."""


class Loose(IntEnum):
    """Which end of a life is loose."""

    NEITHER = 0
    TAIL = 1
    HEAD = 2


def loose_end(path: Path, resolver: Resolver) -> tuple[Loose, int]:
    """Return which end of a life is loose, and the index of a tail's last record on a device, or of a head's first."""
    hooks, ways = path.hooks, path.ways
    last = end = len(path) - 1
    for _ in range(2):  # at most a copy to a reader and the end follow the last device
        last -= last > 0 and ways[last] >= Way.DELIVERY
    if hooks[0] == QUEUE and _on_the_host(path.numbers[0], resolver):
        return Loose.HEAD, 0
    not_delivered = last == end or (end - last == 1 and hooks[end] == CONSUMED)
    if hooks[last] in (RECEIVE_SKB, IP_RCV) and not_delivered and _on_the_host(path.numbers[last], resolver):
        return Loose.TAIL, last
    return Loose.NEITHER, 0


def passes(source: int, target: int, resolver: Resolver) -> bool:
    """Return whether a packet passes from a tail's last device to a head's first one, given by their numbers."""
    a, b = resolver.devices[source], resolver.devices[target]
    return a.netns == b.netns and (source != target or a.kind == "bridge")


def _on_the_host(number: int, resolver: Resolver) -> bool:
    return number >= 0 and ROLES[resolver.role[number]] in _ON_THE_HOST


@dataclass(frozen=True, slots=True)
class LooseEnds:
    """Tails and heads that wait. Records are grouped by life, in order of time within each life."""

    records: Records
    number: Ints
    """Device numbers, as in `correlator.hops.Path`."""
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
