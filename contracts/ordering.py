"""Sorting integers by their digits: what the correlator does most is to bring the records of one buffer, or the rows of
one time, together.

numpy sorts 16-bit integers by radix and wider ones by comparing them, which takes ten times as long. So wider ones are
sorted here by one digit of 16 bits after the other, the lowest first (Knuth, TAOCP 3, 5.2.5), and what only has to
come together by a digit or two of its hash.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints, Mask

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
"""2**64 / golden ratio: the upper bits of a product with it depend on all bits of the factor (Knuth, TAOCP 3, 6.4)."""
_DIGIT_BITS: Final = 16


def stable_order(values: npt.NDArray[Any]) -> Ints:
    """The stable argsort of `values`, int64 or uint64, one dimension: a pass for each 16 bits of their range."""
    if not len(values):
        return np.zeros(0, np.int64)
    above = (values - values.min()).view(np.uint64)
    order: Ints = _digit(above, 0).argsort(kind="stable")
    for shift in range(_DIGIT_BITS, int(above.max()).bit_length(), _DIGIT_BITS):
        order = order[_digit(above, shift)[order].argsort(kind="stable")]
    return order


def grouped(values: npt.NDArray[np.uint64]) -> tuple[Ints, Mask]:
    """Indices that bring equal values together, each value's in the order in which they were given; and whether the
    one before it there is the same.
    """
    hashed = values * GOLDEN
    digit = _digit(hashed, 3 * _DIGIT_BITS)
    order: Ints = digit.argsort(kind="stable")
    same, together = _as_before(values[order]), _as_before(digit[order])
    if np.count_nonzero(together & ~same) > len(values) // 8:
        # Many different values: two digits.
        digits = hashed >> np.uint64(2 * _DIGIT_BITS)
        order = stable_order(digits)
        same, together = _as_before(values[order]), _as_before(digits[order])
    mixed = together & ~same
    if mixed.any():
        # Different values with the same digits: those are sorted within their places.
        run = np.cumsum(~together)
        crowded = np.zeros(int(run[-1]) + 1, np.bool_)
        crowded[run[mixed]] = True
        at = np.flatnonzero(crowded[run])
        apart = stable_order(values[order[at]])
        order[at] = order[at[apart[stable_order(run[at[apart]])]]]
        same = _as_before(values[order])
    return order, same


def _as_before(values: npt.NDArray[Any]) -> Mask:
    same = np.zeros(len(values), np.bool_)
    np.equal(values[1:], values[:-1], out=same[1:])
    return same


def _digit(values: npt.NDArray[np.uint64], shift: int) -> npt.NDArray[np.uint16]:
    return (values >> np.uint64(shift)).astype(np.uint16)
