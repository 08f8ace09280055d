"""Which packet of one capture is which of the other: by what they carry, as long as that is beyond doubt.

The two captures are of one host, at a container's inner and at the host's outer device. A packet that crosses is in
both, with the same content key; which it was sent at first tells its direction. Where one content comes again and again
(requests repeated as they are, ARP), neighbours in time decide: two are a pair if each is the other's nearest of that
content, and they are at most `within_ns` apart. What has no such partner is left single, and what had
others of its content so near that it was not clear is counted as ambiguous. A wrong pair is worse than none.

A capture of several devices has a packet several times. The nearest of them is not the right one: it is at the first
device on the way, not at the last. So there is no pair either where a packet of the pair has another of its own file
beside it, with the same content and nobody of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.pcap.file import PacketColumns
from contracts.arrays import Ints, Mask
from contracts.ordering import grouped

EVERYTHING_NS: Final = 1 << 62
"""Later than any time: both files are at their end."""
_ENOUGH: Final = 1 << 20
"""Packets that are enough at once: some 70 MB."""
_STEPS: Final = 4
"""A pair depends on packets at most so many times `within_ns` away."""
INNER: Final = 0
OUTER: Final = 1


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """Packets of both files, in the order of time; equal times: the inner first."""

    packets: PacketColumns
    file: npt.NDArray[np.uint8]
    """INNER or OUTER."""
    partner_ns: Ints
    """Time of the same packet in the other file; that of its own where it has none."""
    paired: Mask

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: slice | Mask) -> Paired:
        return Paired(self.packets[index], self.file[index], self.partner_ns[index], self.paired[index])


class Pairing:
    """Takes packets of both files in time order and gives them out with their partners, in bounded memory.

    A packet is decided when all that can be its partner, or its neighbour, has come.
    """

    def __init__(self, within_ns: int) -> None:
        self._within_ns = within_ns
        self._waiting: list[list[PacketColumns]] = [[], []]
        self._kept: Paired | None = None
        """The last packets that were given out, and those that were decided but are too late for it."""
        self._given_ns = -EVERYTHING_NS
        self.ambiguous = 0
        """Packets that had a partner in reach, but not one that it was clear."""
        self.several = [0, 0]
        """By file: packets without a clear partner that had others of their own file beside them."""
        self.late = 0
        """Packets with a time before what was given out already."""

    def push(self, file: int, packets: PacketColumns) -> None:
        """Take packets of one file, in its order."""
        behind = packets.utc_ns < self._given_ns
        if behind.any():
            self.late += int(behind.sum())
            packets = packets[~behind]
        if len(packets):
            self._waiting[file].append(packets)

    def take(self, complete_ns: int) -> Paired | None:
        """What is decided when both files have given all before `complete_ns`; None if nothing is."""
        fresh = sum(len(part) for parts in self._waiting for part in parts)
        kept = 0 if self._kept is None else len(self._kept)
        # What is kept is gone through again each time: it has to be worth it.
        enough = min(2 * kept, max(kept // 2, _ENOUGH))
        if not fresh + kept or (fresh < enough and complete_ns < EVERYTHING_NS):
            return None
        # From a packet to its partner, to that one's twin, to the twin's partner, and to what is nearer to that.
        until_ns = complete_ns - _STEPS * self._within_ns
        both = self._gathered()
        self._waiting = [[], []]
        partner, unclear, several = self._matched(both)
        ts = both.packets.utc_ns
        out = (ts >= self._given_ns) & (ts < until_ns)
        # A packet is decided once, with its partner: what was said when the first of them was given out stays.
        decided = both.paired.copy()
        new = ~decided & (partner >= 0)
        paired = decided | new
        partner_ns = np.where(new, ts[partner], both.partner_ns)
        unclear &= out & ~paired
        self.ambiguous += int(unclear.sum())
        for file in (INNER, OUTER):
            self.several[file] += int((several & out & ~paired & (both.file == file)).sum())
        whole = Paired(both.packets, both.file, partner_ns, paired)
        # Partners of what is given out now are bound; of all others only the times are kept, to be looked at again.
        bound = decided | (new & (out | out[np.maximum(partner, 0)]))
        self._kept = Paired(both.packets, both.file, np.where(bound, partner_ns, ts), bound)[
            ts >= until_ns - _STEPS * self._within_ns
        ]
        self._given_ns = max(self._given_ns, until_ns)
        return whole[out] if out.any() else None

    def _gathered(self) -> Paired:
        """Kept and waiting, in the order of time."""
        parts = [] if self._kept is None else [self._kept]
        for file, waiting in enumerate(self._waiting):
            for packets in waiting:
                n = len(packets)
                parts.append(Paired(packets, np.full(n, file, np.uint8), packets.utc_ns, np.zeros(n, np.bool_)))
        both = Paired(
            PacketColumns.concatenate([part.packets for part in parts]),
            np.concatenate([part.file for part in parts]),
            np.concatenate([part.partner_ns for part in parts]),
            np.concatenate([part.paired for part in parts]),
        )
        order = np.lexsort((both.file, both.packets.utc_ns)) if len(parts) > 1 else np.arange(len(both))
        return Paired(both.packets[order], both.file[order], both.partner_ns[order], both.paired[order])

    def _matched(self, both: Paired) -> tuple[Ints, Mask, Mask]:
        """Index of each packet's partner, or -1; which were in reach of one without its being clear; and which had
        others of their file beside them.
        """
        key, ts, n = both.packets.content.packet_key, both.packets.utc_ns, len(both)
        partner = np.full(n, -1, np.int64)
        unclear, several = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        if n < 2:
            return partner, unclear, several
        order, same = grouped(key)
        sorted_ts, sorted_file = ts[order], both.file[order]
        same = same[1:] & (key[order[1:]] != 0)
        gap = np.where(same, sorted_ts[1:] - sorted_ts[:-1], EVERYTHING_NS)
        near = same & (gap <= self._within_ns)
        other = near & (sorted_file[1:] != sorted_file[:-1])
        before, after = np.append(1 << 62, gap[:-1]), np.append(gap[1:], EVERYTHING_NS)
        pair = other & (gap < before) & (gap < after)
        twin = near & ~other
        if twin.any():
            pair &= ~_beside_a_single(pair, twin)
        first = order[:-1][pair]
        second = order[1:][pair]
        partner[first], partner[second] = second, first
        for mark, which in ((unclear, other), (several, twin)):
            mark[order[:-1][which]] = True
            mark[order[1:][which]] = True
        return partner, unclear & (partner < 0), several


def _beside_a_single(pair: Mask, twin: Mask) -> Mask:
    """Pairs one of whose packets has one of its own file beside it that is in no pair. All are masks of neighbours."""
    taken = np.append(pair, False) | np.append(False, pair)
    doubtful = np.zeros(len(taken), np.bool_)
    doubtful[:-1] |= twin & taken[:-1] & ~taken[1:]
    doubtful[1:] |= twin & ~taken[:-1] & taken[1:]
    return doubtful[:-1] | doubtful[1:]
