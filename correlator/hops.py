"""Computes hops and delays of a life: which devices a packet crossed, and between which records each crossing lies.

A *hop* is a run of records on one device. It lasts from its first record until the next hop begins, the last hop until
its last record. Hops therefore follow one another without gap or overlap, and their delays add up. For a packet to a
container through the outer device, the path begins with that device's `netif_receive_skb`, as it does for a host
process; the delays of the hops from there on add up to the packet's overhead.

Times are not needed: all lives of one path have the same hops, and each delay lies between two records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from contracts.hooks import Way
from contracts.schema import Direction, Outcome, Segment
from contracts.topology import Role
from correlator.identity import ROLES, WAYS, Resolver
from correlator.numbers import COPY, DROP, IP_RCV, QUEUE, RECEIVE_SKB, RX, XMIT

LAST_POSITION: Final = 254
"""Largest position: positions are one byte, and 255 means the whole path."""
WHOLE_PATH: Final = 255
_RECEIVED: Final = (RECEIVE_SKB, IP_RCV)
_PLACED: Final = (Way.TRANSMIT, Way.RECEIVE)


@dataclass(frozen=True, slots=True)
class Path:
    """The records of a life without their times; lists of one length, at least one."""

    hooks: list[int]
    numbers: list[int]
    """Device number of each record; -1: no device or unknown; -2: moves disagree."""
    crosses: list[bool]
    """Whether each record is the first on its device."""

    def __len__(self) -> int:
        return len(self.hooks)

    @property
    def ways(self) -> list[int]:
        """`Way` of each record; 0 for an unknown hook."""
        return [WAYS[hook] for hook in self.hooks]


class Row(NamedTuple):
    """A delay of a life, from one record to another, which are given by their index."""

    begin: int
    end: int
    device: int
    """Device number."""
    owner: int
    """Number of the inner device of the container that the packet belongs to."""
    direction: Direction
    segment: Segment
    position: int


class Crossed(NamedTuple):
    """The records whose times are those of `contracts.schema.Crossings`, given by their index."""

    at: int
    """The record at the inner device."""
    owner: int
    direction: Direction
    inner: int
    outer: int
    inner_stamp: int
    outer_stamp: int
    outer_edge: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What all lives of a path have in common."""

    rows: list[Row]
    outcome: Outcome
    unclear: bool = False
    """Whether a device on the path has several candidates, and the packet was not dropped."""
    crossed: Crossed | None = None
    """None if the path is not a whole path of a container."""

    @property
    def dropped(self) -> bool:
        """Whether the kernel dropped the packet before it had arrived anywhere."""
        return self.outcome is Outcome.DROPPED


@dataclass(frozen=True, slots=True)
class _Hop:
    first: int
    end: int
    """Index of the last record on the device."""
    device: int
    """Device number, or -1."""
    role: Role
    serves: int
    sent: bool
    """Whether the packet was sent there, not received."""
    queued: bool
    received: bool

    @property
    def inner(self) -> bool:
        return self.role is Role.INNER


def measure(path: Path, resolver: Resolver) -> Measured:
    """Return the rows of a life: the devices crossed, the whole path, and the delivery to the reader, in this order."""
    hops, last = _hops(path, resolver)
    dropped = path.hooks[-1] == DROP
    outcome = Outcome.CONSUMED if WAYS[path.hooks[-1]] == Way.END else Outcome.OPEN
    if not hops:
        return Measured([], Outcome.DROPPED if dropped else outcome)
    head, tail = hops[0], hops[-1]
    if dropped and not (tail.received and (tail.inner or tail.role is Role.REMOTE)):
        outcome = Outcome.DROPPED
    if any(hop.device < 0 for hop in hops):
        return Measured([], outcome, unclear=outcome is not Outcome.DROPPED)

    # The packet's container: its own device sent the packet, or the packet was last seen on the way into it.
    origin = head.serves if head.sent == head.inner else -1
    target = tail.serves if tail.sent != tail.inner else -1
    if origin < 0 and target < 0:
        return Measured([], outcome)
    entering, leaving = origin < 0, target < 0
    outer = next((i for i, hop in enumerate(hops) if hop.role is Role.OUTER), None)
    # Between two containers the way in begins where the packet is first sent on.
    turn = next((i for i, hop in enumerate(hops) if i and hop.sent), len(hops))

    begins = [hop.first for hop in hops]
    leaves = [*begins[1:], tail.end]
    if entering and outer is not None and hops[outer].received:
        begins[outer] = hops[outer].end

    rows = []
    for i, hop in enumerate(hops):
        if hop is tail and hop.end == hop.first:
            continue
        inward = entering or (not leaving and i >= turn)
        outside = outer is not None and (i < outer) == inward
        outside |= hop.role in (Role.REMOTE, Role.OTHER, Role.LOOPBACK)
        segment = Segment.OUTSIDE if outside else Segment.DEVICE
        owner, direction = (target, Direction.INGRESS) if inward else (origin, Direction.EGRESS)
        rows.append(Row(begins[i], leaves[i], hop.device, owner, direction, segment, min(i, LAST_POSITION)))

    crossed = None
    if outer is not None:
        gate = hops[outer]
        if leaving and head.inner and head.queued and gate.queued:
            rows.append(Row(head.first, gate.first, origin, origin, Direction.EGRESS, Segment.OVERHEAD, WHOLE_PATH))
            # Without a call of the outer driver it is unknown whether the packet left.
            if path.hooks[head.end] == path.hooks[gate.end] == XMIT:
                crossed = Crossed(
                    head.first, origin, Direction.EGRESS, head.first, gate.first, head.end, gate.end, gate.end
                )
        if entering and tail.inner and tail.received and gate.received:
            rows.append(Row(gate.end, tail.end, target, target, Direction.INGRESS, Segment.OVERHEAD, WHOLE_PATH))
            inner_stamp, outer_stamp = (hop.first if path.hooks[hop.first] == RX else hop.end for hop in (tail, gate))
            crossed = Crossed(
                tail.end, target, Direction.INGRESS, tail.end, gate.end, inner_stamp, outer_stamp, gate.first
            )

    after = last + 1
    if entering and tail.inner and tail.received and after < len(path) and path.hooks[after] == COPY:
        position = min(len(hops), LAST_POSITION)
        rows.append(Row(tail.end, after, tail.device, target, Direction.INGRESS, Segment.DELIVERY, position))
    return Measured(rows, outcome, crossed=crossed)


def _hops(path: Path, resolver: Resolver) -> tuple[list[_Hop], int]:
    """Return the hops of a life, and the index of its last record on a device."""
    ways = path.ways
    firsts = [i for i, way in enumerate(ways) if path.crosses[i] and way in _PLACED]
    # Records after the last device are not on it: at most one copy to the reader, and the end.
    last = len(path) - 1
    for _ in range(2):
        last -= last > 0 and ways[last] not in _PLACED
    hops = []
    for i, first in enumerate(firsts):
        end = min(firsts[i + 1] - 1, last) if i + 1 < len(firsts) else last
        # IP_RCV behind NETIF_RECEIVE_SKB on one device repeats that record.
        end -= path.hooks[end] == IP_RCV and end > first and path.hooks[end - 1] == RECEIVE_SKB
        device = _agreed(path.numbers[first], path.numbers[end])
        hops.append(
            _Hop(
                first,
                end,
                device,
                ROLES[resolver.role[device]] if device >= 0 else Role.OTHER,
                int(resolver.serves[device]) if device >= 0 else -1,
                ways[first] == Way.TRANSMIT,
                path.hooks[first] == QUEUE,
                path.hooks[end] in _RECEIVED,
            )
        )
    return hops, last


def _agreed(first: int, end: int) -> int:
    """Return the device that a hop's first and last record name; -1 if they name none or two different ones.

    In the arguments -1 means an unnamed device. The records between were reached on the same device, so that their
    moves add no information.
    """
    if end in (first, -1):
        return max(first, -1)
    return max(end, -1) if first == -1 else -1
