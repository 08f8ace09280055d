"""Writes the protobuf wire format fast: single messages, and thousands of messages of the same shape at once.

A `Template` is a message with holes for numbers. The holes have a fixed size, because a varint may be longer than
necessary: 0x81 0x00 is 1 too (protobuf.dev/programming-guides/encoding; Perfetto's own writer reserves room for lengths
in this way). Every row of a template therefore has the same length, and one numpy statement per byte writes a column of
numbers into all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Bytes

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2


_WORD_BYTES: Final = 8
_SPREAD: Final = tuple(
    (np.uint64(low), np.uint64(high), np.uint64(shift))
    for low, high, shift in (
        (0x000000000FFFFFFF, 0x00FFFFFFF0000000, 4),
        (0x00003FFF00003FFF, 0x0FFFC0000FFFC000, 2),
        (0x007F007F007F007F, 0x3F803F803F803F80, 1),
    )
)
"""Masks and shifts that spread bits by halves: 2 groups of 28 bits, 4 of 14, 8 of 7, each starting at a byte."""
_MORE: Final = np.uint64(0x8080808080808080)


def _spread(values: U64) -> U64:
    """Spread the lowest 56 bits over 8 bytes, 7 bits in each, and set the continuation bit of every byte."""
    for low, high, shift in _SPREAD:
        values = values & low | (values & high) << shift
    return values | _MORE


def varint(value: int) -> bytes:
    """Return the shortest encoding of an unsigned number, or of a negative one's 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes | str) -> bytes:
    """Return one field: a number as a varint, text and bytes (an encoded message) with their length."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return varint(number << 3 | BYTES) + varint(len(raw)) + raw


@dataclass(frozen=True, slots=True)
class Hole:
    """A number that differs between rows: the name of its column, and its size in bytes."""

    column: str
    size: int
    """Number of bytes with 7 bits each; numbers that do not fit lose their upper bits."""
    fixed: bool = False
    """A fixed64 field instead of a varint; `size` is 8."""


TemplatePart: TypeAlias = "bytes | Hole"


def hole(number: int, column: str, bits: int = 64) -> list[TemplatePart]:
    """Return a field with a varint from a column."""
    return [varint(number << 3 | VARINT), Hole(column, -(-bits // 7))]


def fixed64(number: int, column: str) -> list[TemplatePart]:
    """Return a field of type fixed64 from a column."""
    return [varint(number << 3 | FIXED64), Hole(column, 8, fixed=True)]


def message(number: int, parts: list[TemplatePart]) -> list[TemplatePart]:
    """Return a field that is a message of these parts."""
    return [varint(number << 3 | BYTES) + varint(_size(parts)), *parts]


def _size(parts: list[TemplatePart]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.size for part in parts)


class Template:
    """A message of fixed parts and holes; `rows` makes many messages of it."""

    def __init__(self, parts: list[TemplatePart]) -> None:
        self.size: Final = _size(parts)
        self._holes: list[tuple[int, Hole]] = []
        self._blank: Final = np.zeros(self.size, np.uint8)
        at = 0
        for part in parts:
            if isinstance(part, Hole):
                self._holes.append((at, part))
                at += part.size
            else:
                self._blank[at : at + len(part)] = np.frombuffer(part, np.uint8)
                at += len(part)

    def rows(self, count: int, columns: Mapping[str, npt.NDArray[np.generic] | int]) -> Bytes:
        """Return `count` messages as an array of (count, size) bytes. `columns`: integers per row, or one for all."""
        out: Bytes = np.empty((count, self.size), np.uint8)
        out[:] = self._blank
        for at, what in self._holes:
            given = np.asarray(columns[what.column])
            values: U64 = (given if given.ndim else np.broadcast_to(given, (count,))).astype(np.uint64)
            if what.fixed:
                self._words(out, at)[:] = values
                continue
            done = 0
            if what.size >= _WORD_BYTES:
                self._words(out, at)[:] = _spread(values)
                done = _WORD_BYTES
            elif what.size > _WORD_BYTES // 2:
                out[:, at : at + what.size] = _spread(values).view(np.uint8).reshape(count, 8)[:, : what.size]
                done = what.size
            for place in range(done, what.size):
                out[:, at + place] = values >> np.uint64(7 * place) & np.uint64(127) | np.uint64(128)
            out[:, at + what.size - 1] &= 127
        return out

    def _words(self, out: Bytes, at: int) -> U64:
        """Return a view of 8 bytes of every row, from `at` on, as one number, so that one statement writes them."""
        return np.ndarray((len(out),), "<u8", out.data, at, (self.size,))


def interleaved(parts: list[tuple[npt.NDArray[np.int64], list[Bytes]]], count: int) -> bytes:
    """Return the rows of several templates, in the order of their row numbers.

    `parts` are pairs of row numbers and the templates' rows, which are written one after the other for each row number.
    Each row number in 0..count-1 is in exactly one part.
    """
    if len(parts) == 1:
        _, pieces = parts[0]
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)).tobytes()
    # One bytes object per row: copying single bytes takes three times as long.
    raws: list[bytes] = []
    for _, pieces in parts:
        whole = np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1))
        raws += whole.view(f"V{whole.shape[1]}").ravel().tolist()
    order = np.empty(count, np.int64)
    order[np.concatenate([rows for rows, _ in parts])] = np.arange(count)
    return b"".join(map(raws.__getitem__, order.tolist()))
