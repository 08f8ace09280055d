"""Lives -> hops -> delays: what a packet's records say about the devices that it crossed.

A *hop* is a run of records on one device. It begins with its first record and lasts until the next hop begins,
the last one until its last record; so hops follow one another without a gap or an overlap, and their delays add
up. For a packet to a container through the outer device the path begins, as for a host process, with that device's
`netif_receive_skb`; so the delays of the hops from there on add up to the overhead of the packet.
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
from correlator.numbers import COPY, DROP, QUEUE, RECEIVE, RECEIVE_SKB, RX, TRANSMIT, XMIT

LAST_POSITION: Final = 254
"""Positions are one byte, and 255 means the whole path."""
WHOLE_PATH: Final = 255
_ROLE: Final = {role: np.uint8(number) for number, role in enumerate(ROLES)}

_INNER, _OUTER, _REMOTE = _ROLE[Role.INNER], _ROLE[Role.OUTER], _ROLE[Role.REMOTE]
_OTHER, _LOOPBACK = _ROLE[Role.OTHER], _ROLE[Role.LOOPBACK]
_IN, _OUT = np.uint8(Direction.INGRESS), np.uint8(Direction.EGRESS)


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows, one per life and segment, and what became of the lives."""

    life: Ints
    ts: Ints
    """When the segment began."""
    device: Ints
    """Device number."""
    owner: Ints
    """Number of the inner device of the container whose packet it is."""
    direction: Bytes
    segment: Bytes
    position: Bytes
    delay: Ints

    dropped: Mask
    """Over all lives: the kernel dropped the packet before it had arrived anywhere."""
    unclear: Mask
    """Over all lives: some device on the path could be several."""
    outcome: Bytes
    """Over all lives."""
    packets: Ints
    """Lives that have a row."""
    crossed: Crossed | None = None
    """Those that were seen over the whole of a container's path; None if there are no rows."""


@dataclass(frozen=True, slots=True)
class Crossed:
    """One row per life with a whole path: when it was at the inner and the outer device, as in `schema.Crossings`."""

    life: Ints
    at: Ints
    """The record at the inner device: index in buffer order."""
    owner: Ints
    direction: Bytes
    inner: Ints
    outer: Ints
    inner_stamp: Ints
    outer_stamp: Ints
    outer_edge: Ints


def measure(lives: Paths, which: Mask, resolver: Resolver) -> Measured:
    """Rows of the lives in `which`, in the order of lives. Times are compared with nothing."""
    ts, count = lives.ts, len(lives.starts)
    hook = (lives.place >> CODE_BITS).astype(np.uint8)
    way = WAY[hook]
    placed = (way == TRANSMIT) | (way == RECEIVE)

    first = np.flatnonzero(lives.cross & placed)
    of = lives.life[first]
    ended = which[of]
    if not ended.all():
        first, of = first[ended], of[ended]
    # What comes after the last device is not on it: a copy to the reader, at most one, and the end.
    last_placed = lives.ends - ~placed[lives.ends]
    last_placed -= ~placed[last_placed] & (last_placed >= lives.starts)
    end = np.minimum(np.append(first[1:], len(ts)) - 1, last_placed[of])

    dropped = (hook[lives.ends] == DROP) & which
    unclear = np.zeros(count, np.bool_)
    outcome = np.where(lives.freed, np.uint8(Outcome.CONSUMED), np.uint8(Outcome.OPEN))
    if not len(first):
        none, no_bytes = np.zeros(0, np.int64), np.zeros(0, np.uint8)
        outcome[dropped] = Outcome.DROPPED
        return Measured(none, none, none, none, no_bytes, no_bytes, no_bytes, none, dropped, unclear, outcome, none)

    # Paths: the hops of one life. `path` says for each hop which it is of, `head` and `tail` where one begins and ends.
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

    # Whose packet is it? Sent by a container's own device, or last seen on the way into one.
    origin = np.where(sent[head] == inner[head], serves[head], -1)
    target = np.where(sent[tail] != inner[tail], serves[tail], -1)
    entering = (target >= 0) & (origin < 0)
    leaving = (origin >= 0) & (target < 0)
    ours = clear & ((origin >= 0) | (target >= 0))
    outer = np.full(len(head), NEVER)
    gates = np.flatnonzero(role == _OUTER)[::-1]
    outer[path[gates]] = gates  # of several the first one, which is written last

    inward = entering[path]
    between = (origin >= 0) & (target >= 0)
    if between.any():
        # From one container to another: the way in begins where the packet is first sent on.
        turn = np.minimum.reduceat(np.where(sent & (index != head[path]), index, NEVER), head)
        inward |= between[path] & (index >= turn[path])
    # On the way in what comes before the outer device is outside; if that was not seen, nothing is.
    gate = outer[path]
    gate[inward & (gate == NEVER)] = -1
    outside = (index < gate) == inward
    outside |= (role == _REMOTE) | (role == _OTHER) | (role == _LOOPBACK)
    queued = hook[first] == QUEUE
    received = hook[end] == RECEIVE_SKB
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

    after = np.minimum(end[tail] + 1, len(ts) - 1)
    read = np.flatnonzero(
        entering & ours & (inner & received)[tail] & (hook[after] == COPY) & (lives.life[after] == alive)
    )

    arrived = received[tail] & (inner[tail] | (role[tail] == _REMOTE))
    dropped[alive[arrived]] = False
    outcome[dropped] = Outcome.DROPPED
    unclear[alive] = ~clear
    unclear &= ~dropped

    # Of an egress packet that the outer driver was not called for, nobody knows whether it left.
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

    # Life by life: the devices that are shown, the whole path, and what the reader waited.
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
    """The device that a hop's first and last record name (-1 names none); -1 for none, or two.

    These two are enough: what lies between was reached on the same device, and moves tell nothing there.
    """
    device = first.copy()
    differ = np.flatnonzero(first != end)
    one, other = first[differ], end[differ]
    device[differ] = np.where(one == -1, other, np.where(other == -1, one, -1))
    return np.maximum(device, -1, out=device)
