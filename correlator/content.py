"""Does the buffer still carry the same packet? Decides it by the content keys of a life's records.

The moves of `correlator.identity` join records into a life; the content keys may divide the life again. The essay in
that module explains the rules.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from contracts.arrays import U64, Bytes, Ints, Mask
from contracts.records import Batch, Flag
from correlator.identity import CODE_BITS, OTHER_CONTENT
from correlator.numbers import GRO, QUEUE, RECEIVE_SKB, XMIT

SEGMENTS: Final = 0x80
"""Bit of a record's traits: the buffer holds several segments, which will become packets or have been packets."""
assert all(flag < SEGMENTS for flag in Flag)


def keys(batch: Batch) -> U64 | None:
    """Return the content keys of a batch, uint64, 0 for an unknown key; None if the source reads no packets."""
    return None if batch.content is None else batch.content.packet_key


def traits(batch: Batch) -> Bytes | None:
    """Return each record's `contracts.records.Flag`s and `SEGMENTS`, uint8; None if the source reads no packets."""
    if batch.content is None:
        return None
    if not batch.gso_segs.any():
        return batch.content.flags
    several: Bytes = batch.content.flags | ((batch.gso_segs > 1) * np.uint8(SEGMENTS))
    return several


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


def changes(key: U64, joined: Mask) -> Ints:
    """Return the indices of records whose key differs from the last key before them in their life.

    Both arrays are in buffer order; `joined` marks records that belong to the life of the record before them. Records
    without a key are ignored.
    """
    at: Ints = np.flatnonzero(joined[1:] & (key[1:] != 0) & (key[1:] != key[:-1])) + 1
    passed_over = np.flatnonzero(key[at - 1] == 0)
    if not len(passed_over):
        return at
    life, keyed = np.cumsum(~joined), np.flatnonzero(key)
    here = at[passed_over]
    # The first keyed record wraps to the last one, which fails the comparison of positions below.
    before = keyed[np.searchsorted(keyed, here) - 1]
    agree = (before >= here) | (life[before] != life[here]) | (key[before] == key[here])
    return np.delete(at, passed_over[agree])


def explained(at: Ints, places: Ints, moves: Ints, trait: Bytes) -> Mask:
    """Return a mask of the records in `at` whose key changed because the kernel changes the packet in its buffer there.

    `places` and `moves` (the move into each record) are as in `correlator.identity`, `trait` as in `traits`, all in
    buffer order.
    """
    hook, hook_before = places[at] >> CODE_BITS, places[at - 1] >> CODE_BITS
    now, then = trait[at], trait[at - 1]
    # SEGMENTS is the highest bit, so that a comparison tests it.
    several, were_several = now >= SEGMENTS, then >= SEGMENTS
    joined_up = (hook_before == GRO) & (hook == RECEIVE_SKB) & several
    taken_apart = (hook_before == QUEUE) & (hook == XMIT) & were_several & ~several
    packed = hook == QUEUE
    outer, inner = np.where(packed, now, then), np.where(packed, then, now)
    readable = ((outer & Flag.TUNNEL) != 0) & ((inner & Flag.TUNNEL) == 0)
    through_tunnel = ((moves[at] & OTHER_CONTENT) != 0) & ~readable
    known: Mask = joined_up | taken_apart | through_tunnel
    return known
