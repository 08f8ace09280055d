"""Which device of a capture of several is the one to measure at.

`tcpdump -i any` on the host has a packet at the bridge's port, at the bridge and at the outer device; a pcapng file may
have several interfaces. All of these are the same packet as the one in the container, and the distance to the nearest
is not what the path adds. Of a host's capture the outer device is the last one on the way out and the first one on the
way in, of a container's capture the inner device is the first one and the last one: the device at which packets are
always farthest from the other capture. Where there is no such device, or more than one, the user says which.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.pcap.file import PacketColumns
from collector.pcap.pairs import INNER, OUTER
from contracts.arrays import Ints
from contracts.ordering import grouped

_ENOUGH: Final = 1 << 20
"""Packets that are looked at together: some 70 MB."""
_NEARLY_ALWAYS: Final = 0.95
"""Of a device's packets, how many must have been farthest there. Packets that cross the end of what is looked at
together, and those whose content comes again, are not all seen for what they are."""


class DeviceSurvey:
    """Takes packets of both files in step, and says of each file which of its places is at the end of the path."""

    def __init__(self, within_ns: int) -> None:
        self._within_ns = within_ns
        self._waiting: list[list[PacketColumns]] = [[], []]
        self._seen: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._farthest: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._several = [0, 0]

    def push(self, file: int, packets: PacketColumns) -> None:
        """Take packets of one file, in its order."""
        self._waiting[file].append(packets)

    def look(self, complete_ns: int, *, ended: bool = False) -> None:
        """Count what is there, if it is worth it: both files have given all before `complete_ns`."""
        if not ended and sum(len(part) for parts in self._waiting for part in parts) < _ENOUGH:
            return
        kept: list[list[PacketColumns]] = [[], []]
        parts, files = [], []
        for file, waiting in enumerate(self._waiting):
            for part in waiting:
                parts.append(part)
                files.append(np.full(len(part), file, np.uint8))
                later = part.utc_ns >= complete_ns
                if not ended and later.any():
                    kept[file].append(part[later])
        self._waiting = kept
        if parts:
            self._count(PacketColumns.concatenate(parts), np.concatenate(files))

    def ends(self, file: int) -> list[int]:
        """Places at which packets are nearly always farthest from the other file, of all that have one packet twice.

        Empty as well where no packet was seen at two places: then there is nothing to choose.
        """
        if not self._several[file]:
            return []
        seen, farthest = self._seen[file], self._farthest[file]
        return sorted(place for place in seen if farthest[place] >= _NEARLY_ALWAYS * seen[place])

    def must_choose(self, file: int) -> bool:
        """Whether packets that are in the other file too were seen at several places of this one."""
        return self._several[file] > 0

    def shared(self, file: int) -> Counter[int]:
        """By place, how many packets were seen there that are in the other file too."""
        return self._seen[file]

    def _count(self, packets: PacketColumns, file: npt.NDArray[np.uint8]) -> None:
        by_time = np.argsort(packets.utc_ns, kind="stable")
        together, same = grouped(packets.content.packet_key[by_time])
        order = by_time[together]
        # One packet, as far as can be told: the same content without a long pause.
        pause_ns = np.diff(packets.utc_ns[order], prepend=0)
        packet = np.cumsum(~same | (pause_ns > self._within_ns)) - 1
        # By packet and file, each in the order of time.
        by_file = np.lexsort((file[order], packet))
        packet, order = packet[by_file], order[by_file]
        file, ts, place = file[order], packets.utc_ns[order], packets.place[order]
        group = packet * 2 + file
        first = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
        last = np.append(first[1:], len(group)) - 1
        sides = np.full((2, 2, int(packet[-1]) + 1), -1, np.int64)
        """[file, first or last, packet] -> where it stands."""
        sides[file[first], 0, packet[first]] = first
        sides[file[first], 1, packet[first]] = last
        both = (sides[INNER, 0] >= 0) & (sides[OUTER, 0] >= 0)
        both[packet[packets.content.packet_key[order] == 0]] = False
        # Where one place has the content twice it is of two packets, and which is which is not clear.
        twice = np.lexsort((place, group))
        again = np.flatnonzero((np.diff(group[twice]) == 0) & (np.diff(place[twice]) == 0))
        both[packet[twice[again]]] = False
        out = both & (ts[sides[INNER, 1]] < ts[sides[OUTER, 0]])
        back = both & (ts[sides[OUTER, 1]] < ts[sides[INNER, 0]])
        clear = out | back
        for one, end in ((INNER, np.where(out, 0, 1)), (OUTER, np.where(out, 1, 0))):
            mine = (file == one) & clear[packet]
            extreme: Any = ts[sides[one, end, np.arange(len(end))]]
            at_end = mine & (ts == extreme[packet])
            self._seen[one].update(_counted(place[mine]))
            self._farthest[one].update(_counted(place[at_end]))
            self._several[one] += int((clear & (sides[one, 0] != sides[one, 1])).sum())


def _counted(values: Ints) -> dict[int, int]:
    """How often each value is there."""
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))
