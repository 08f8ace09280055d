"""Does the buffer still carry the same packet? Decides it by the content keys of a life's records.

The moves of `correlator.identity` join records into a life; the content keys may divide the life again. The essay in
that module explains the rules.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np

from contracts.arrays import U64, Bytes, Ints
from contracts.protocols import ESP, UDP, UDPLITE
from contracts.records import Batch, Content, Flag
from correlator.identity import CODE_BITS, OTHER_CONTENT
from correlator.numbers import GRO, QUEUE, RECEIVE_SKB, XMIT

SEGMENTS: Final = 0x80
"""Bit of a record's traits: the buffer holds several segments, which will become packets or have been packets."""
assert all(flag < SEGMENTS for flag in Flag)

KINDS: Final = bytes((traits >= SEGMENTS) << 1 | bool(traits & Flag.TUNNEL) for traits in range(256))
"""By a record's traits: the two bits on which it depends whether the key may change, `_SEVERAL` and `_TUNNEL`."""
_TUNNEL, _SEVERAL = 1, 2


def keys(batch: Batch) -> U64 | None:
    """Return the content keys of a batch, uint64, 0 for an unknown key; None if the source reads no packets."""
    return None if batch.content is None else batch.content.packet_key


def traits(batch: Batch) -> Bytes | None:
    """Return each record's `contracts.records.Flag`s and `SEGMENTS`, uint8; None if the source reads no packets.

    `Flag.KEY` stays only where the key can join two buffers (`_alike` tells where it cannot).
    """
    told = batch.content
    if told is None:
        return None
    flags = told.flags
    if batch.gso_segs.any():
        flags = flags | ((batch.gso_segs > 1) * np.uint8(SEGMENTS))
    alike = _alike(told)
    if len(alike):
        flags = flags.copy()
        flags[alike] &= np.uint8(0xFF ^ Flag.KEY)
    return flags


def _alike(told: Content) -> Ints:
    """Return the indices of packets without a number of their own, which several senders may send alike.

    An IPv4 identification, an echo's sequence number, those of TCP, ESP and SCTP, and a fragment's identification are
    such numbers. A datagram counts as numbered by its payload, except between equal ports: mDNS, for example, has one
    question for all who ask. A tunnel's key is the inner packet's, of which nothing else is known.
    """
    kinds = (told.flags & np.uint8(Flag.FRAGMENT | Flag.TUNNEL) != 0) | (told.l4_proto == ESP)
    numbered = kinds | (told.ip_id != 0) | (told.ip_version == 0)
    datagram = (told.l4_proto == UDP) | (told.l4_proto == UDPLITE)
    one_port = datagram & (told.l4_src == told.l4_dst)
    # Of all records, and not of those without identification alone: choosing them costs more than looking at all.
    alike: Ints = np.flatnonzero(~numbered & ((told.flags & np.uint8(Flag.FLOW) == 0) | one_port))
    return alike


def flows(batch: Batch) -> tuple[U64 | None, Bytes | None]:
    """Return each record's ports and sequence number packed into one number, and its IP protocol.

    uint64 (unpacked by `ports` and `sequence`) and uint8, 0 where unknown; None if the source reads no packets.
    """
    told = batch.content
    if told is None:
        return None, None
    packed = (told.l4_src.astype(np.uint64) << np.uint64(48)) | (told.l4_dst.astype(np.uint64) << np.uint64(32))
    return packed | told.l4_seq, told.l4_proto


def ports(flow: U64) -> tuple[Ints, Ints]:
    """Return source and destination port, or identifier and sequence number of an ICMP echo, of packed flows."""
    both = (flow >> np.uint64(32)).astype(np.int64)
    return both >> 16, both & 0xFFFF


def sequence(flow: U64) -> Ints:
    """Return the TCP sequence number of packed flows."""
    return (flow & np.uint64(0xFFFFFFFF)).astype(np.int64)


def changes(source: int, target: int, verdict: int) -> int:
    """Return the kinds of records between which the key may change in a move, because the kernel changes the packet.

    `source`, `target` and `verdict` are those of `Resolver.judge`. Bit `before << 2 | now` of the result is set if the
    key may change from a record with `KINDS` `before` to one with `now`.
    """
    hooks = source >> CODE_BITS, target >> CODE_BITS
    found = 0
    for before, now in product(range(4), repeat=2):
        joined_up = hooks == (GRO, RECEIVE_SKB) and now & _SEVERAL
        taken_apart = hooks == (QUEUE, XMIT) and before & _SEVERAL and not now & _SEVERAL
        outer, inner = (now, before) if hooks[1] == QUEUE else (before, now)
        readable = outer & _TUNNEL and not inner & _TUNNEL
        through_tunnel = verdict & OTHER_CONTENT and not readable
        found |= bool(joined_up or taken_apart or through_tunnel) << (before << 2 | now)
    return found
