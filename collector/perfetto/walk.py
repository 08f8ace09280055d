"""Walks many protobuf messages in one buffer at once, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.perfetto.wire import BYTES, FIXED32, FIXED64, VARINT
from contracts.arrays import U64, Ints, Mask

MOST_FIELDS: Final = 256
"""Largest number of fields in one message."""
_SLACK: Final = 64
_U: Final = np.uint64
_MSB: Final = _U(0x8080808080808080)


class Buffer:
    """The bytes of many bundles; reads vectors of numbers from them."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.size = sum(map(len, pieces))
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(b"".join([*pieces, bytes(_SLACK)]), np.uint8)
        # An 8-byte word at every byte offset: a view with overlapping elements.
        self.words: U64 = np.ndarray((len(self.bytes) - 8,), "<u8", self.bytes, strides=(1,))

    def clip(self, at: Ints) -> Ints:
        return np.minimum(at, self.size + _SLACK // 2)

    def varints(self, at: Ints) -> tuple[U64, Ints]:
        """Return the varints at offsets, and where they end; a varint of more than ten bytes ends behind the buffer."""
        at = self.clip(at)
        word = self.words[at]
        stop = ~word & _MSB
        lowest = stop & (~stop + _U(1))
        taken = (np.bitwise_count(lowest - _U(1)).astype(np.int64) + 1) >> 3
        word &= (lowest << _U(1)) - _U(1)
        value = _packed(word)
        long = np.flatnonzero(stop == 0)
        if len(long):
            more = self.words[at[long] + 8]
            ninth, tenth = more & _U(0xFF), more >> _U(8) & _U(0xFF)
            value[long] = _packed(self.words[at[long]]) | (ninth & _U(0x7F)) << _U(56)
            two = ninth > 127
            value[long] |= np.where(two, (tenth & _U(1)) << _U(63), _U(0))
            taken[long] = np.where(two, np.where(tenth > 127, self.size + 2 * _SLACK, 10), 9)
        return value, at + taken

    def text(self, start: Ints, length: Ints) -> tuple[U64, U64]:
        """Return the first 16 bytes of texts as two little-endian words, zero behind the text's end."""
        start = self.clip(start)
        low, high = self.words[start], self.words[self.clip(start + 8)]
        return low & TEXT_MASK.take(length, mode="clip"), high & TEXT_MASK.take(np.maximum(length - 8, 0), mode="clip")


TEXT_MASK: Final = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


def _packed(word: U64) -> U64:
    """Combine seven bits of each byte into a number (the last step of decoding a varint)."""
    word = word & _U(0x7F7F7F7F7F7F7F7F)
    word = (word & _U(0x007F007F007F007F)) | ((word & _U(0x7F007F007F007F00)) >> _U(1))
    word = (word & _U(0x00003FFF00003FFF)) | ((word & _U(0x3FFF00003FFF0000)) >> _U(2))
    packed: U64 = (word & _U(0x000000000FFFFFFF)) | ((word & _U(0x0FFFFFFF00000000)) >> _U(4))
    return packed


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The next field of each message; `varints` and `payloads` are indices into the other arrays."""

    rows: Ints
    number: Ints
    value: U64
    """Values of the fields in `varints`."""
    at: Ints
    """Offsets of the bytes of the fields in `payloads`."""
    after: Ints
    varints: Ints
    payloads: Ints


def walk(buffer: Buffer, rows: Ints, at: Ints, end: Ints, bad: Mask) -> Iterator[Step]:
    """Yield the fields of messages step by step; sets `bad` for the rows of invalid messages."""
    for _ in range(MOST_FIELDS):
        if not len(rows):
            return
        tag, value_at = buffer.varints(at)
        wire = (tag & _U(7)).astype(np.int64)
        value, after = buffer.varints(value_at)
        start = after
        is_bytes = wire == BYTES
        # Sizes beyond the buffer must not overflow when they are added.
        size = np.where(is_bytes, np.minimum(value, _U(1 << 40)).astype(np.int64), 0)
        after = after + size
        odd = (wire == FIXED64) | (wire == FIXED32)
        if odd.any():
            after = np.where(odd, value_at + np.where(wire == FIXED64, 8, 4), after)
        number = np.minimum(tag >> _U(3), _U(1 << 30)).astype(np.int64)
        wrong = (after > end) | ((wire != VARINT) & ~is_bytes & ~odd) | (number == 0)
        if wrong.any():
            bad[rows[wrong]] = True
            keep = ~wrong
            rows, number, value, start, after, end = (
                column[keep] for column in (rows, number, value, start, after, end)
            )
            wire, is_bytes = wire[keep], is_bytes[keep]
        yield Step(rows, number, value, start, after, np.flatnonzero(wire == VARINT), np.flatnonzero(is_bytes))
        going_on = after < end
        if going_on.all():
            at = after
        else:
            rows, at, end = rows[going_on], after[going_on], end[going_on]
    bad[rows] = True
