"""Chooses the device to measure at in a capture of several devices.

`tcpdump -i any` on the host captures a packet at the bridge's port, at the bridge and at the outer device; a pcapng
file may have several interfaces. All these are the packet that the container's capture has, but the distance to the
nearest of them is not the overhead of the path. In a host's capture the outer device is the last on the way out and the
first on the way in; in a container's capture the inner device is the first and the last. In both cases it is the device
at which packets are always farthest, in time, from the other capture. If no device or several devices qualify, the
user has to choose.
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
"""Packets that are counted together: some 70 MB."""
_NEARLY_ALWAYS: Final = 0.95
"""Share of a device's packets that must be farthest at this device. A few packets are misjudged: those at the boundary
of a counted group, and those whose content repeats."""


class DeviceSurvey:
    """Counts, from the packets of both files in step, which place of each file is at the end of the path."""

    def __init__(self, within_ns: int) -> None:
        self._within_ns = within_ns
        self._waiting: list[list[PacketColumns]] = [[], []]
        self._seen: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._farthest: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._several = [0, 0]

    def push(self, file: int, packets: PacketColumns) -> None:
        """Add packets of one file, in the file's order."""
        self._waiting[file].append(packets)

    def look(self, complete_ns: int, *, ended: bool = False) -> None:
        """Count the packets before `complete_ns`, up to which both files were pushed, once there are enough of them."""
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
        """Return the places of a file at which packets are nearly always farthest from the other file, sorted.

        Empty if no packet was seen at two places: then there is nothing to choose.
        """
        if not self._several[file]:
            return []
        seen, farthest = self._seen[file], self._farthest[file]
        return sorted(place for place in seen if farthest[place] >= _NEARLY_ALWAYS * seen[place])

    def must_choose(self, file: int) -> bool:
        """Return whether packets that are also in the other file were seen at several places of this file."""
        return self._several[file] > 0

    def shared(self, file: int) -> Counter[int]:
        """Return place -> number of packets seen there that are also in the other file."""
        return self._seen[file]

    def _count(self, packets: PacketColumns, file: npt.NDArray[np.uint8]) -> None:
        by_time = np.argsort(packets.utc_ns, kind="stable")
        together, same = grouped(packets.content.packet_key[by_time])
        order = by_time[together]
        # Frames with the same content and without a long pause between them count as one packet.
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
        """[file, first or last, packet] -> index of the frame, -1 without one."""
        sides[file[first], 0, packet[first]] = first
        sides[file[first], 1, packet[first]] = last
        both = (sides[INNER, 0] >= 0) & (sides[OUTER, 0] >= 0)
        both[packet[packets.content.packet_key[order] == 0]] = False
        # If one place has the content twice, two packets share it and cannot be distinguished: ignore both.
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
    """Return value -> number of occurrences."""
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))
