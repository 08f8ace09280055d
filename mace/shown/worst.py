"""Keeps the packets with the largest overhead of a live stream's last minute, hop by hop, in bounded memory.

The minute is cut into slots of ten seconds. Each slot keeps `KEPT` packets of each container, so that the worst packets
of any choice of containers are exact up to that number, and a slot is forgotten as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.figures import DevicePlace, ranks
from contracts.results import Results
from contracts.schema import Delays, Direction, Grade, Outcome, Segment
from contracts.topology import Device
from storage.query import Hop, PacketPath

KEPT: Final = 5
"""Packets that are kept of each container and slot."""
SLOT_NS: Final = 10_000_000_000
SLOTS: Final = 7
"""Slots that are kept: a minute touches seven."""


@dataclass(frozen=True, slots=True)
class _Packet:
    delay_ns: int
    """The overhead; the larger one of a packet with two."""
    number: int
    rows: Delays
    devices: tuple[Device, ...]


@dataclass(slots=True)
class WorstPackets:
    """The worst packets of one run. Not thread-safe."""

    host: str
    run: str
    _slots: dict[int, dict[str, list[_Packet]]] = field(default_factory=dict)
    """Slot's number -> container's id or name -> packets, worst first."""
    _devices: tuple[Device, ...] = ()
    _containers: list[str] = field(default_factory=list)
    _codes: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    _latest: int = 0

    def add(self, results: Results) -> None:
        """Add the correlator's next results, which need rows (`EngineConfig.rows`)."""
        delays = results.rows.delays
        whole = np.flatnonzero(delays.segment == Segment.OVERHEAD)
        if not len(whole):
            return
        self._know(results.rows.devices)
        slot = delays.utc_ns[whole] // SLOT_NS
        code = self._codes[delays.device[whole]]
        order = np.lexsort((-delays.delay_ns[whole], code, slot))
        group = slot[order] * len(self._containers) + code[order]
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        rank = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
        for at in order[rank < KEPT].tolist():
            row = int(whole[at])
            self._offer(int(slot[at]), self._containers[int(code[at])], delays, row, results.rows.devices)
        self._latest = max(self._latest, int(slot.max()))
        for number in [number for number in self._slots if number <= self._latest - SLOTS]:
            del self._slots[number]

    def worst(self, limit: int, since_utc_ns: int, chosen: Callable[[str], bool] = lambda _: True) -> list[PacketPath]:
        """Return the packets that began at a time or later, largest overhead first, at most `limit`.

        `chosen` decides by the container's name, or its namespace's. Exact for a `limit` of up to `KEPT`.
        """
        found = [
            packet
            for of_slot in self._slots.values()
            for packets in of_slot.values()
            for packet in packets
            if int(packet.rows.utc_ns.min()) >= since_utc_ns
        ]
        found.sort(key=lambda packet: (-packet.delay_ns, packet.number))
        paths = (self._path(packet) for packet in found)
        return [path for path in paths if chosen(path.container)][:limit]

    def _know(self, devices: tuple[Device, ...]) -> None:
        if devices is self._devices or devices == self._devices:
            return
        self._devices = devices
        names = [d.container_id or d.container or d.netns_name or str(d.netns) for d in devices]
        self._containers = list(dict.fromkeys(names))
        number = {name: n for n, name in enumerate(self._containers)}
        self._codes = np.array([number[name] for name in names], np.int64)

    def _offer(self, slot: int, container: str, delays: Delays, row: int, devices: tuple[Device, ...]) -> None:
        kept = self._slots.setdefault(slot, {}).setdefault(container, [])
        delay_ns, number = int(delays.delay_ns[row]), int(delays.packet[row])
        if len(kept) >= KEPT and delay_ns <= kept[-1].delay_ns:
            return
        if any(packet.number == number for packet in kept):
            return
        rows = delays[np.flatnonzero(delays.packet == delays.packet[row])]
        kept.append(_Packet(delay_ns, number, rows, devices))
        kept.sort(key=lambda packet: (-packet.delay_ns, packet.number))
        del kept[KEPT:]

    def _path(self, packet: _Packet) -> PacketPath:
        rows = packet.rows
        rank = ranks(packet.devices)
        start = int(rows.utc_ns.min())
        hops, overhead_ns, container = [], dict[Direction, int](), ""
        for at in np.lexsort((rows.utc_ns, rows.position)).tolist():
            device = packet.devices[int(rows.device[at])]
            container = container or device.container or device.netns_name
            direction, segment = Direction(int(rows.direction[at])), Segment(int(rows.segment[at]))
            delay_ns = int(rows.delay_ns[at])
            if segment is Segment.OVERHEAD:
                overhead_ns[direction] = overhead_ns.get(direction, 0) + delay_ns
                continue
            place = DevicePlace.of(device, rank[int(rows.device[at])])
            hops.append(Hop(place, direction, segment, int(rows.position[at]), int(rows.utc_ns[at]) - start, delay_ns))
        return PacketPath(
            self.host,
            self.run,
            packet.number,
            start,
            container,
            int(rows.l3_len[0]),
            Grade(int(rows.grade[0])).name.lower(),
            Outcome(int(rows.outcome[0])).name.lower(),
            tuple(hops),
            overhead_ns,
        )
