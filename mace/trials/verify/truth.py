"""Compares rows with the observers' packets: which rows are right, which packets have a row, and the delays' errors.

A row says when a packet was at each device, not which packet it was. That follows from the order of events in the
kernel, which takes a packet socket's stamp

    on the way out  after `net_dev_queue` at the device and before the packet is at the next device
    on the way in   after the packet left the device before, and before this device's first record of it

so each row bounds its packet's stamps from both sides, at the inner and at the outer device, mostly to a few
microseconds. A row is *right* if one packet's stamps fit both bounds, where each packet belongs to one row at most. If
no packet fits, a row too short for a number counts as *others* (a TCP acknowledgement; the kernel stamps forwarded ones
later than this), and any other row is *wrong*: its two ends are those of different packets. The result does not depend
on the order of simultaneous events on different CPUs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np

from contracts.schema import Delays, Direction, Segment
from contracts.topology import Device, Role

CLOCKS_NS: Final = 500
"""Generous bound on the error of the offset between the observer's clock (UTC) and the tracer's (monotonic)."""
UNBOUNDED_NS: Final = 1_000_000
"""If the record before a stamp is missing, the stamp is at most this long before the record after it."""
UNNUMBERED_BYTES: Final = 100
"""Length of the longest IPv6 and TCP headers. Numbered packets are longer, except the last bytes of a TCP write."""

Sight = tuple[int, bool, str]
"""A packet at an observer: UTC in ns, whether the device sent it, its number (see `observer.py`)."""
NumberedPacket = tuple[str, int]
"""A number, and which of the packets with this number it is: a retransmission has the same number."""
StampBounds = tuple[int, int | None]
"""Beginning and end of a time; None is unbounded, and then the first packet in it counts. (A buffer that is segmented
ends before its segments are sent, and the first segment has the buffer's number.)"""
_WAYS: Final = ((Direction.EGRESS, True), (Direction.INGRESS, False))


@dataclass(frozen=True, slots=True)
class PathRow:
    """One packet over the whole path, as MACE's rows describe it."""

    packet: int
    container: str
    direction: Direction
    l3_len: int
    delay_ns: int
    between: tuple[int, int]
    """When the stretch that the delay is of began and ended, UTC: times of records."""
    inner: StampBounds
    """Between which times the stamp at the inner device must be, UTC."""
    outer: StampBounds


@dataclass(slots=True)
class Score:
    """What became of all rows and all packets."""

    packets: int = 0
    """Numbered packets that were seen at both devices."""
    right: int = 0
    wrong: int = 0
    others: int = 0
    """Rows of packets without a number; in no figure."""
    errors_ns: list[int] = field(default_factory=list)
    """MACE's delay less the observers', of every right row."""
    trip_errors_ns: list[int] = field(default_factory=list)
    """The same of egress and ingress together, of each number with a right row both ways: a request and its echo."""
    matched: dict[int, NumberedPacket] = field(default_factory=dict)
    """By `Delays.packet`: the right rows."""

    @property
    def precision(self) -> float:
        """Share of right rows among all rows of numbered packets; 1 without rows."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    @property
    def recall(self) -> float:
        """Share of packets with a right row among all packets; 1 without packets."""
        return self.right / self.packets if self.packets else 1.0

    def error_ns(self, quantile: float) -> int:
        """Return a quantile of the delays' absolute errors; 0 without errors."""
        return _quantile(self.errors_ns, quantile)

    def trip_error_ns(self, quantile: float) -> int:
        """Return a quantile of the absolute errors of egress and ingress together; 0 without errors."""
        return _quantile(self.trip_errors_ns, quantile)


def _quantile(errors_ns: Sequence[int], quantile: float) -> int:
    return int(np.quantile(np.abs(errors_ns), quantile)) if errors_ns else 0


def rows(delays: Delays, devices: Sequence[Device]) -> list[PathRow]:
    """Return the packets with a row for the whole path, in the order of their beginnings."""
    whole = np.flatnonzero(delays.segment == Segment.OVERHEAD)
    wanted = np.isin(delays.packet, delays.packet[whole]) & (delays.segment <= Segment.OUTSIDE)
    hops: dict[int, dict[int, tuple[int, int, Device]]] = defaultdict(dict)
    parts = delays[np.flatnonzero(wanted)]
    for packet, position, begin, delay, device in zip(
        parts.packet.tolist(), parts.position.tolist(), parts.utc_ns.tolist(), parts.delay_ns.tolist(), parts.device,
        strict=True,
    ):  # fmt: skip
        hops[packet][position] = (begin, begin + delay, devices[device])
    found = []
    for i in whole:
        packet, begin, delay = int(delays.packet[i]), int(delays.utc_ns[i]), int(delays.delay_ns[i])
        length = int(delays.l3_len[i])
        way = Direction(int(delays.direction[i]))
        if way is Direction.EGRESS:
            inner = _out(hops[packet], Role.INNER, begin)
            outer = _out(hops[packet], Role.OUTER, begin + delay)
        else:
            outer = _in(hops[packet], Role.OUTER, begin)
            inner = _in(hops[packet], Role.INNER, begin + delay)
        found.append(
            PathRow(
                packet, devices[delays.device[i]].container, way, length, delay, (begin, begin + delay), inner, outer
            )
        )
    return found


def _out(hops: Mapping[int, tuple[int, int, Device]], role: Role, queued_ns: int) -> StampBounds:
    """Return the bounds on the stamp of a packet that was queued at the device of this role."""
    at = (hop for hop in hops.values() if hop[2].role is role and hop[0] == queued_ns)
    return next(((begin, end) for begin, end, _ in at), (queued_ns, None))


def _in(hops: Mapping[int, tuple[int, int, Device]], role: Role, received_ns: int) -> StampBounds:
    """Return the bounds on the stamp of a packet that the device of this role received.

    The packet is stamped on its way from the device before.
    """
    for position, (_, _, device) in hops.items():
        if device.role is role and position - 1 in hops:
            return hops[position - 1][:2]
    # The last hop has no row if it has only one record; the hop before it is then the last one with a row.
    last = hops[max(hops)] if hops else None
    if last is not None and last[2].role is not role and role is Role.INNER:
        return last[:2]
    return received_ns - UNBOUNDED_NS, received_ns


def score(found: Sequence[PathRow], inner: Mapping[str, Sequence[Sight]], outer: Sequence[Sight]) -> Score:
    """Judge rows by the observers' packets at the inner devices (by container name) and at the outer device."""
    result = Score()
    ways_ns: dict[tuple[str, NumberedPacket], list[int]] = defaultdict(list)
    for way, sent in _WAYS:
        for container, sights in inner.items():
            if sent:
                inner_places = _ObservedPackets(sights, sent)
                outer_places = _ObservedPackets(outer, sent, inner_places)
            else:
                outer_places = _ObservedPackets(outer, sent)
                inner_places = _ObservedPackets(sights, sent, outer_places)
            both = inner_places.at_ns.keys() & outer_places.at_ns.keys()
            result.packets += len(both)
            mine = [row for row in found if row.container == container and row.direction is way]
            fitting = []
            for row in mine:
                fitting.append(inner_places.within(row.inner, both) & outer_places.within(row.outer, both))
            taken = assigned(fitting)
            for row, packet in zip(mine, taken, strict=True):
                if packet is not None:
                    result.right += 1
                    result.matched[row.packet] = packet
                    true_ns = outer_places.at_ns[packet] - inner_places.at_ns[packet]
                    result.errors_ns.append(row.delay_ns - (true_ns if sent else -true_ns))
                    ways_ns[container, packet].append(result.errors_ns[-1])
                elif row.l3_len <= UNNUMBERED_BYTES:
                    result.others += 1
                else:
                    result.wrong += 1
    result.trip_errors_ns = [sum(both) for both in ways_ns.values() if len(both) == len(_WAYS)]
    return result


class _ObservedPackets:
    """The packets of one direction at one observer, for look-ups by time.

    `before` are the packets at the other observer, if packets pass that one first. A sight of a number that is not
    preceded by a sight there is left out: it is a segment that was cut out of a larger packet on the way, and TCP may
    later send this segment again as a packet of its own.
    """

    def __init__(self, sights: Sequence[Sight], sent: bool, before: _ObservedPackets | None = None) -> None:
        seen = sorted((at_ns, number) for at_ns, out, number in sights if out is sent and number)
        times: dict[str, int] = defaultdict(int)
        self.at_ns: dict[NumberedPacket, int] = {}
        self._stamps: list[int] = []
        self._packets: list[NumberedPacket] = []
        for at_ns, number in seen:
            packet = (number, times[number])
            if before is not None and before.at_ns.get(packet, at_ns + 1) > at_ns:
                continue
            times[number] += 1
            self.at_ns[packet] = at_ns
            self._stamps.append(at_ns)
            self._packets.append(packet)

    def within(self, span: StampBounds, wanted: Container[NumberedPacket]) -> set[NumberedPacket]:
        """Return the wanted packets whose stamps are within a span."""
        begin, end = span
        first = bisect_left(self._stamps, begin - CLOCKS_NS)
        if end is None:
            return set(islice((packet for packet in islice(self._packets, first, None) if packet in wanted), 1))
        inside = self._packets[first : bisect_right(self._stamps, end + CLOCKS_NS)]
        return {packet for packet in inside if packet in wanted}


def assigned(fitting: Sequence[set[NumberedPacket]]) -> list[NumberedPacket | None]:
    """Assign a different fitting packet to each of as many rows as possible (Kuhn's algorithm); None for the others."""
    taker: dict[NumberedPacket, int] = {}

    def take(row: int, tried: set[NumberedPacket]) -> bool:
        for packet in fitting[row]:
            if packet in tried:
                continue
            tried.add(packet)
            if packet not in taker or take(taker[packet], tried):
                taker[packet] = row
                return True
        return False

    for row in range(len(fitting)):
        take(row, set())
    packets = {row: packet for packet, row in taker.items()}
    return [packets.get(row) for row in range(len(fitting))]
