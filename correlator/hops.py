"""Computes hops and delays from lives: which devices a packet crossed, and how long each crossing took.

A *hop* is a run of records on one device. It lasts from its first record until the next hop begins, the last hop until
its last record. Hops therefore follow one another without gap or overlap, and their delays add up. For a packet to a
container through the outer device, the path begins with that device's `netif_receive_skb`, as it does for a host
process; the delays of the hops from there on add up to the packet's overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from contracts.arrays import Bytes, Ints, Mask
from contracts.ordering import stable_order
from contracts.schema import Direction, Outcome, Segment
from contracts.topology import Role
from correlator.identity import CODE_BITS, ROLES, WAY, Resolver
from correlator.lives import NEVER, Paths
from correlator.numbers import COPY, DROP, IP_RCV, QUEUE, RECEIVE, RECEIVE_SKB, RX, TRANSMIT, XMIT

LAST_POSITION: Final = 254
"""Largest position: positions are one byte, and 255 means the whole path."""
WHOLE_PATH: Final = 255
_ROLE: Final = {role: np.uint8(number) for number, role in enumerate(ROLES)}

_INNER, _OUTER, _REMOTE = _ROLE[Role.INNER], _ROLE[Role.OUTER], _ROLE[Role.REMOTE]
_OTHER, _LOOPBACK = _ROLE[Role.OTHER], _ROLE[Role.LOOPBACK]
_IN, _OUT = np.uint8(Direction.INGRESS), np.uint8(Direction.EGRESS)


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows, one per life and segment, and the outcome of the lives."""

    life: Ints
    ts: Ints
    """When the segment began."""
    device: Ints
    """Device number."""
    owner: Ints
    """Number of the inner device of the container that the packet belongs to."""
    direction: Bytes
    segment: Bytes
    position: Bytes
    delay: Ints

    dropped: Mask
    """For each life: whether the kernel dropped the packet before it had arrived anywhere."""
    unclear: Mask
    """For each life: whether a device on the path has several candidates."""
    outcome: Bytes
    """For each life: a `contracts.schema.Outcome`."""
    packets: Ints
    """Lives that have a row."""
    crossed: Crossed | None = None
    """Lives that were seen over the whole path of a container; None if there are no rows."""


@dataclass(frozen=True, slots=True)
class Crossed:
    """One row per life with a whole path: its times at the inner and outer device, as in `schema.Crossings`."""

    life: Ints
    at: Ints
    """Index, in buffer order, of the record at the inner device."""
    owner: Ints
    direction: Bytes
    inner: Ints
    outer: Ints
    inner_stamp: Ints
    outer_stamp: Ints
    outer_edge: Ints


def measure(lives: Paths, which: Mask, resolver: Resolver) -> Measured:
    """Return the rows of the lives in `which`, in the order of lives.

    The rows depend on the lives' shapes alone: times are subtracted, but never compared.
    """
    ts, count = lives.ts, len(lives.starts)
    hook = (lives.place >> CODE_BITS).astype(np.uint8)
    way = WAY[hook]
    placed = (way == TRANSMIT) | (way == RECEIVE)

    first = np.flatnonzero(lives.cross & placed)
    of = lives.life[first]
    ended = which[of]
    if not ended.all():
        first, of = first[ended], of[ended]
    # Records after the last device are not on it: at most one copy to the reader, and the end.
    last_placed = lives.ends - ~placed[lives.ends]
    last_placed -= ~placed[last_placed] & (last_placed >= lives.starts)
    last = np.minimum(np.append(first[1:], len(ts)) - 1, last_placed[of])
    # IP_RCV behind NETIF_RECEIVE_SKB on one device repeats that record.
    end = last - ((hook[last] == IP_RCV) & (last > first) & (hook[last - 1] == RECEIVE_SKB))

    dropped = (hook[lives.ends] == DROP) & which
    unclear = np.zeros(count, np.bool_)
    outcome = np.where(lives.freed, np.uint8(Outcome.CONSUMED), np.uint8(Outcome.OPEN))
    if not len(first):
        none, no_bytes = np.zeros(0, np.int64), np.zeros(0, np.uint8)
        outcome[dropped] = Outcome.DROPPED
        return Measured(none, none, none, none, no_bytes, no_bytes, no_bytes, none, dropped, unclear, outcome, none)

    # A path is the hops of one life: `path` is the path of each hop, `head` and `tail` are each path's first and last
    # hop.
    changes = np.flatnonzero(of[1:] != of[:-1])
    head = np.append(0, changes + 1)
    tail = np.append(changes, len(of) - 1)
    path = np.repeat(np.arange(len(head)), tail - head + 1)
    index = np.arange(len(of))
    alive = of[head]

    begin, leave = ts[first], ts[end]
    leave[:-1] = np.where(path[1:] == path[:-1], begin[1:], leave[:-1])

    device = _agreed(lives.number[first], lives.number[end])
    role, serves = resolver.role[device], resolver.serves[device]
    known = device >= 0
    clear = np.ones(len(head), np.bool_)
    if not known.all():
        clear = np.logical_and.reduceat(known, head)
        role[~known], serves[~known] = _OTHER, -1
    sent = way[first] == TRANSMIT
    inner = role == _INNER

    # The packet's container: its own device sent the packet, or the packet was last seen on the way into it.
    origin = np.where(sent[head] == inner[head], serves[head], -1)
    target = np.where(sent[tail] != inner[tail], serves[tail], -1)
    entering = (target >= 0) & (origin < 0)
    leaving = (origin >= 0) & (target < 0)
    ours = clear & ((origin >= 0) | (target >= 0))
    outer = np.full(len(head), NEVER)
    gates = np.flatnonzero(role == _OUTER)[::-1]
    outer[path[gates]] = gates  # the first of several outer devices, which is written last

    inward = entering[path]
    between = (origin >= 0) & (target >= 0)
    if between.any():
        # Between two containers the way in begins where the packet is first sent on.
        turn = np.minimum.reduceat(np.where(sent & (index != head[path]), index, NEVER), head)
        inward |= between[path] & (index >= turn[path])
    # On the way in, hops before the outer device are outside; if the outer device was not seen, none is.
    gate = outer[path]
    gate[inward & (gate == NEVER)] = -1
    outside = (index < gate) == inward
    outside |= (role == _REMOTE) | (role == _OTHER) | (role == _LOOPBACK)
    queued = hook[first] == QUEUE
    received = (hook[end] == RECEIVE_SKB) | (hook[end] == IP_RCV)
    entry = outer[entering & (outer != NEVER)]
    entry = entry[received[entry]]
    begin[entry] = ts[end[entry]]
    shown = np.flatnonzero(((end > first) | (index != tail[path])) & ours[path])

    whole = np.full(len(head), -1, np.int64)
    at = np.flatnonzero(leaving & ours & (outer != NEVER) & (inner & queued)[head])
    at = at[queued[outer[at]]]
    whole[at] = begin[outer[at]] - begin[head[at]]
    at = np.flatnonzero(entering & ours & (outer != NEVER) & (inner & received)[tail])
    at = at[received[outer[at]]]
    whole[at] = ts[end[tail[at]]] - begin[outer[at]]
    total = np.flatnonzero(whole >= 0)
    total_begin = begin[np.where(entering[total], outer[total], head[total])]

    after = np.minimum(last[tail] + 1, len(ts) - 1)
    read = np.flatnonzero(
        entering & ours & (inner & received)[tail] & (hook[after] == COPY) & (lives.life[after] == alive)
    )

    arrived = received[tail] & (inner[tail] | (role[tail] == _REMOTE))
    dropped[alive[arrived]] = False
    outcome[dropped] = Outcome.DROPPED
    unclear[alive] = ~clear
    unclear &= ~dropped

    # Without a call of the outer driver it is unknown whether an egress packet left.
    way_in = entering[total]
    near, far = np.where(way_in, tail[total], head[total]), outer[total]
    sent_on = (hook[end[near]] == XMIT) & (hook[end[far]] == XMIT)
    seen = np.flatnonzero(way_in | sent_on)
    near, far, way_in = near[seen], far[seen], way_in[seen]
    stamp = np.where(hook[first] == RX, first, end)
    crossed = Crossed(
        life=alive[total[seen]],
        at=np.where(way_in, end[near], first[near]),
        owner=np.where(way_in, target[total[seen]], origin[total[seen]]),
        direction=np.where(way_in, _IN, _OUT),
        inner=np.where(way_in, ts[end[near]], begin[near]),
        outer=begin[far],
        inner_stamp=np.where(way_in, ts[stamp[near]], ts[end[near]]),
        outer_stamp=np.where(way_in, ts[stamp[far]], ts[end[far]]),
        outer_edge=np.where(way_in, ts[first[far]], ts[end[far]]),
    )

    # Rows life by life: the devices crossed, the whole path, and the delivery to the reader.
    row_path = np.concatenate([path[shown], total, read])
    order = stable_order(row_path)
    row_path = row_path[order]
    into = np.concatenate([inward[shown], entering[total], np.ones(len(read), np.bool_)])[order]
    owner = np.where(into, target[row_path], origin[row_path])
    of_container = np.where(entering[total], target[total], origin[total])
    has_row = np.zeros(len(head), np.bool_)
    has_row[row_path] = True
    return Measured(
        life=alive[row_path],
        ts=np.concatenate([begin[shown], total_begin, ts[end[tail[read]]]])[order],
        device=np.concatenate([device[shown], of_container, device[tail[read]]])[order],
        owner=owner,
        direction=np.where(into, _IN, _OUT),
        segment=np.concatenate(
            [
                np.where(outside[shown], np.uint8(Segment.OUTSIDE), np.uint8(Segment.DEVICE)),
                np.full(len(total), Segment.OVERHEAD, np.uint8),
                np.full(len(read), Segment.DELIVERY, np.uint8),
            ]
        )[order],
        position=np.concatenate(
            [
                np.minimum(shown - head[path[shown]], LAST_POSITION).astype(np.uint8),
                np.full(len(total), WHOLE_PATH, np.uint8),
                np.minimum(tail - head + 1, LAST_POSITION)[read].astype(np.uint8),
            ]
        )[order],
        delay=np.concatenate([(leave - begin)[shown], whole[total], (ts[after] - ts[end[tail]])[read]])[order],
        dropped=dropped,
        unclear=unclear,
        outcome=outcome,
        packets=alive[has_row],
        crossed=crossed,
    )


def _agreed(first: Ints, end: Ints) -> Ints:
    """Return the device that a hop's first and last record name; -1 if they name none or two different ones.

    In the arguments -1 means an unnamed device. The records between were reached on the same device, so that their
    moves add no information.
    """
    device = first.copy()
    differ = np.flatnonzero(first != end)
    one, other = first[differ], end[differ]
    device[differ] = np.where(one == -1, other, np.where(other == -1, one, -1))
    return np.maximum(device, -1, out=device)
