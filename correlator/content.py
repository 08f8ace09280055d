"""Does the buffer still carry the same packet? What the content keys of a life's records say about it.

The moves of `correlator.identity` join records into a life; here the keys may part it again. See the essay there.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from contracts.arrays import U64, Bytes, Ints, Mask
from contracts.records import Batch, Flag
from correlator.identity import CODE_BITS, OTHER_CONTENT
from correlator.numbers import GRO, QUEUE, RECEIVE_SKB, XMIT

SEGMENTS: Final = 0x80
"""Bit of a record's traits: the buffer holds several segments of what will be packets, or were."""
assert all(flag < SEGMENTS for flag in Flag)


def keys(batch: Batch) -> U64 | None:
    """The content keys of a batch, uint64, 0 where none is known; None if the source gives none."""
    return None if batch.content is None else batch.content.packet_key


def traits(batch: Batch) -> Bytes | None:
    """What else counts of each record's content: `contracts.records.Flag`s and `SEGMENTS`, uint8; or None."""
    if batch.content is None:
        return None
    if not batch.gso_segs.any():
        return batch.content.flags
    several: Bytes = batch.content.flags | ((batch.gso_segs > 1) * np.uint8(SEGMENTS))
    return several


def flows(batch: Batch) -> tuple[U64 | None, Bytes | None]:
    """What each record says of its flow, as one number (`ports` and `sequence` read it), and its IP protocol.

    uint64 and uint8, 0 where nothing is known; None if the source does not read packets.
    """
    told = batch.content
    if told is None:
        return None, None
    packed = (told.l4_src.astype(np.uint64) << np.uint64(48)) | (told.l4_dst.astype(np.uint64) << np.uint64(32))
    return packed | told.l4_seq, told.l4_proto


def ports(flow: U64) -> tuple[Ints, Ints]:
    """Source and destination: ports, or identifier and sequence number of an ICMP echo."""
    both = (flow >> np.uint64(32)).astype(np.int64)
    return both >> 16, both & 0xFFFF


def sequence(flow: U64) -> Ints:
    """TCP sequence number."""
    return (flow & np.uint64(0xFFFFFFFF)).astype(np.int64)


def changes(key: U64, joined: Mask) -> Ints:
    """Indices of the records whose key is another than the last one of their life before them.

    Both arrays are in buffer order; `joined` says whether a record is of one life with the one before it. Records
    without a key say nothing and are passed over.
    """
    at: Ints = np.flatnonzero(joined[1:] & (key[1:] != 0) & (key[1:] != key[:-1])) + 1
    passed_over = np.flatnonzero(key[at - 1] == 0)
    if not len(passed_over):
        return at
    life, keyed = np.cumsum(~joined), np.flatnonzero(key)
    here = at[passed_over]
    # The first keyed record of all gets the last one, which is of no life before its own.
    before = keyed[np.searchsorted(keyed, here) - 1]
    agree = (before >= here) | (life[before] != life[here]) | (key[before] == key[here])
    return np.delete(at, passed_over[agree])


def explained(at: Ints, places: Ints, moves: Ints, trait: Bytes) -> Mask:
    """At which of these records the key has changed because of what the kernel does to a packet in its buffer there.

    `places` and `moves` (the one into each record) are as of `correlator.identity`, `trait` as of `traits`, all in
    buffer order.
    """
    hook, hook_before = places[at] >> CODE_BITS, places[at - 1] >> CODE_BITS
    now, then = trait[at], trait[at - 1]
    # The highest bit, so a comparison tells.
    several, were_several = now >= SEGMENTS, then >= SEGMENTS
    joined_up = (hook_before == GRO) & (hook == RECEIVE_SKB) & several
    taken_apart = (hook_before == QUEUE) & (hook == XMIT) & were_several & ~several
    packed = hook == QUEUE
    outer, inner = np.where(packed, now, then), np.where(packed, then, now)
    readable = ((outer & Flag.TUNNEL) != 0) & ((inner & Flag.TUNNEL) == 0)
    through_tunnel = ((moves[at] & OTHER_CONTENT) != 0) & ~readable
    known: Mask = joined_up | taken_apart | through_tunnel
    return known
