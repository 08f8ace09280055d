"""Radix sorts of integers, for the correlator's most frequent work: grouping records by buffer and rows by time.

numpy sorts 16-bit integers by radix and wider ones by comparison, which takes ten times as long. Wider integers are
therefore sorted here digit by digit, 16 bits at a time, the lowest digit first (Knuth, TAOCP 3, 5.2.5). Values that
need grouping but no order are sorted by one or two digits of their hash.
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
    """Return the stable argsort of `values` (int64 or uint64, one dimension) in one pass per 16 bits of their range."""
    if not len(values):
        return np.zeros(0, np.int64)
    above = (values - values.min()).view(np.uint64)
    order: Ints = _digit(above, 0).argsort(kind="stable")
    for shift in range(_DIGIT_BITS, int(above.max()).bit_length(), _DIGIT_BITS):
        order = order[_digit(above, shift)[order].argsort(kind="stable")]
    return order


def grouped(values: npt.NDArray[np.uint64]) -> tuple[Ints, Mask]:
    """Return indices that bring equal values together, and a mask of those whose predecessor has the same value.

    Equal values stay in the order in which they were given; different values are in no particular order.
    """
    hashed = values * GOLDEN
    digit = _digit(hashed, 3 * _DIGIT_BITS)
    order: Ints = digit.argsort(kind="stable")
    same, together = _as_before(values[order]), _as_before(digit[order])
    if np.count_nonzero(together & ~same) > len(values) // 8:
        # Too many different values share a digit: sort by two digits.
        digits = hashed >> np.uint64(2 * _DIGIT_BITS)
        order = stable_order(digits)
        same, together = _as_before(values[order]), _as_before(digits[order])
    mixed = together & ~same
    if mixed.any():
        # Different values share the digits: sort these within their run.
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
