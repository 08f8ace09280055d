"""A function of one integer, remembered for whole arrays of them.

The correlator asks the same few hundred questions millions of times (can a packet go from here to there?). A
direct-mapped table answers those of an array at once; what it does not hold is asked one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
"""2**64 / golden ratio: the upper bits of a product with it depend on all bits of the factor (Knuth, TAOCP 3, 6.4)."""


class Memo:
    """`answer`, elementwise. Keys are >= 0."""

    _SLOT_BITS: Final = 14
    _SAMPLE: Final = 1 << 10
    """Of many keys that are missing so many are asked first: a new table misses everything, and those few hold nearly
    all that there is to ask, so that the others need no sort."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self._answer = answer
        self._known: dict[int, int] = {}
        self._keys = np.full(1 << self._SLOT_BITS, -1, np.int64)
        self._values = np.zeros(1 << self._SLOT_BITS, np.int64)

    def forget(self) -> None:
        """The answers may have changed: ask again."""
        self._known.clear()
        self._keys.fill(-1)

    def __getstate__(self) -> tuple[Callable[[int], int], dict[int, int]]:
        """Without the table: it holds nothing that `_known` does not, and is mostly empty."""
        return self._answer, self._known

    def __setstate__(self, state: tuple[Callable[[int], int], dict[int, int]]) -> None:
        self.__init__(state[0])  # type: ignore[misc] # the same as a new one's ...
        self._known = state[1]

    def __call__(self, keys: Ints) -> Ints:
        """The answers, int64, same shape (one dimension)."""
        slots = ((keys.view(np.uint64) * GOLDEN) >> np.uint64(64 - self._SLOT_BITS)).view(np.int64)
        values = self._values[slots]
        known = self._keys[slots] == keys
        if not known.all():
            missing = np.flatnonzero(~known)
            if len(missing) > self._SAMPLE:
                self._ask(keys, slots, values, missing[: self._SAMPLE])
                missing = missing[self._SAMPLE :]
                values[missing] = self._values[slots[missing]]
                missing = missing[self._keys[slots[missing]] != keys[missing]]
            if len(missing):
                self._ask(keys, slots, values, missing)
        return values

    def _ask(self, keys: Ints, slots: Ints, values: Ints, missing: Ints) -> None:
        """Fill in the values at `missing`, and the table."""
        wanted = keys[missing]
        distinct, inverse = np.unique(wanted, return_inverse=True)
        values[missing] = np.array([self.of(key) for key in distinct.tolist()], np.int64)[inverse]
        self._keys[slots[missing]] = wanted
        self._values[slots[missing]] = values[missing]

    def of(self, key: int) -> int:
        """The answer for one key."""
        if key not in self._known:
            self._known[key] = self._answer(key)
        return self._known[key]
