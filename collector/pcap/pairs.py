"""Pairs the packets of two captures by their content, as long as the pair is beyond doubt.

The two captures are of one host, at a container's inner device and at the host's outer device. A packet that crosses
the host is in both captures, with the same content key; the capture that has it first shows its direction. If content
repeats (identical requests, ARP), the distance in time decides: two packets are a pair if each is the other's nearest
packet with that content and they are at most `within_ns` apart. A packet without such a partner stays single. A packet
with several candidates so near that none is certain is counted as ambiguous. A wrong pair is worse than none.

A capture of several devices contains a packet several times. The nearest occurrence is not the right one: it is at the
first device on the way, not at the last. A pair is therefore also refused if one of its packets has a neighbour of the
same file and content that has no partner.
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
"""Later than any time: marks the end of both files."""
_ENOUGH: Final = 1 << 20
"""Number of packets that are paired at once: some 70 MB."""
_STEPS: Final = 4
"""Distance, in multiples of `within_ns`, of the farthest packets on which a pair depends."""
INNER: Final = 0
OUTER: Final = 1


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """Packets of both files, in order of time; for equal times the inner packet comes first."""

    packets: PacketColumns
    file: npt.NDArray[np.uint8]
    """INNER or OUTER."""
    partner_ns: Ints
    """Time of the partner in the other file; the packet's own time without a partner."""
    paired: Mask

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: slice | Mask) -> Paired:
        return Paired(self.packets[index], self.file[index], self.partner_ns[index], self.paired[index])


class Pairing:
    """Pairs the packets of both files, pushed in time order, in bounded memory.

    A packet is decided when all possible partners and neighbours have been pushed.
    """

    def __init__(self, within_ns: int) -> None:
        self._within_ns = within_ns
        self._waiting: list[list[PacketColumns]] = [[], []]
        self._kept: Paired | None = None
        """The last packets returned, and later ones that are not decided yet."""
        self._given_ns = -EVERYTHING_NS
        self.ambiguous = 0
        """Packets with candidates in reach of which none is certain."""
        self.several = [0, 0]
        """By file: packets without a certain partner that have neighbours of their own file and content."""
        self.late = 0
        """Packets with a time before those already returned."""

    def push(self, file: int, packets: PacketColumns) -> None:
        """Add packets of one file, in the file's order."""
        behind = packets.utc_ns < self._given_ns
        if behind.any():
            self.late += int(behind.sum())
            packets = packets[~behind]
        if len(packets):
            self._waiting[file].append(packets)

    def take(self, complete_ns: int) -> Paired | None:
        """Return the packets that are decided, given that all before `complete_ns` were pushed; None if none is."""
        fresh = sum(len(part) for parts in self._waiting for part in parts)
        kept = 0 if self._kept is None else len(self._kept)
        # Kept packets are paired again each time: wait until there are enough new ones.
        enough = min(2 * kept, max(kept // 2, _ENOUGH))
        if not fresh + kept or (fresh < enough and complete_ns < EVERYTHING_NS):
            return None
        # A pair depends on a chain of four steps: packet, partner, the partner's twin, the twin's partner, its nearest.
        until_ns = complete_ns - _STEPS * self._within_ns
        both = self._gathered()
        self._waiting = [[], []]
        partner, unclear, several = self._matched(both)
        ts = both.packets.utc_ns
        out = (ts >= self._given_ns) & (ts < until_ns)
        # A pair is decided when its first packet is returned, and does not change afterwards.
        decided = both.paired.copy()
        new = ~decided & (partner >= 0)
        paired = decided | new
        partner_ns = np.where(new, ts[partner], both.partner_ns)
        unclear &= out & ~paired
        self.ambiguous += int(unclear.sum())
        for file in (INNER, OUTER):
            self.several[file] += int((several & out & ~paired & (both.file == file)).sum())
        whole = Paired(both.packets, both.file, partner_ns, paired)
        # Partners of packets returned now are fixed; all other kept packets are paired again.
        bound = decided | (new & (out | out[np.maximum(partner, 0)]))
        self._kept = Paired(both.packets, both.file, np.where(bound, partner_ns, ts), bound)[
            ts >= until_ns - _STEPS * self._within_ns
        ]
        self._given_ns = max(self._given_ns, until_ns)
        return whole[out] if out.any() else None

    def _gathered(self) -> Paired:
        """Return kept and waiting packets, in order of time."""
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
        """Return the index of each packet's partner (-1 without one), and two masks.

        The first marks packets with a candidate in reach that is not certain, the second packets with a neighbour of
        their own file and content.
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
    """Return a mask of pairs one of whose packets has an unpaired neighbour of its own file.

    All masks are of neighbours: element i is about packets i and i + 1.
    """
    taken = np.append(pair, False) | np.append(False, pair)
    doubtful = np.zeros(len(taken), np.bool_)
    doubtful[:-1] |= twin & taken[:-1] & ~taken[1:]
    doubtful[1:] |= twin & ~taken[:-1] & taken[1:]
    return doubtful[:-1] | doubtful[1:]
