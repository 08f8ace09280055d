"""A function of one integer, remembered for whole arrays of them.

The correlator asks the same few hundred questions millions of times (can a packet go from here to there?). A
direct-mapped table answers those of an array at once; what it does not hold is asked one by one. It begins small, as
each of a fleet's thousand streams has some, and grows where two of what it knows want one slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.ordering import GOLDEN


class Memo:
    """`answer`, elementwise. Keys are >= 0."""

    _LEAST_BITS: Final = 8
    _MOST_BITS: Final = 14
    """Slots of the table, as a power of two: 4 KiB to 256."""
    _SAMPLE: Final = 1 << 10
    """Of many keys that are missing so many are asked first: a new table misses everything, and those few hold nearly
    all that there is to ask, so that the others need no sort."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self._answer = answer
        self._known: dict[int, int] = {}
        self._begin(self._LEAST_BITS)

    def _begin(self, bits: int) -> None:
        """A table of that size, with what is known."""
        self._bits = bits
        self._shift = np.uint64(64 - bits)
        self._keys = np.full(1 << bits, -1, np.int64)
        self._values = np.zeros(1 << bits, np.int64)
        keys = np.array(list(self._known), np.int64)
        slots = self._slots(keys)
        self._keys[slots], self._values[slots] = keys, list(self._known.values())

    def forget(self) -> None:
        """The answers may have changed: ask again."""
        self._known.clear()
        self._keys.fill(-1)

    def __getstate__(self) -> tuple[Callable[[int], int], dict[int, int]]:
        """Without the table: it holds nothing that `_known` does not, and is mostly empty."""
        return self._answer, self._known

    def __setstate__(self, state: tuple[Callable[[int], int], dict[int, int]]) -> None:
        self._answer, self._known = state
        self._begin(self._LEAST_BITS)

    def __call__(self, keys: Ints) -> Ints:
        """The answers, int64, same shape (one dimension)."""
        slots = self._slots(keys)
        values = self._values[slots]
        known = self._keys[slots] == keys
        if not known.all():
            missing = np.flatnonzero(~known)
            if len(missing) > self._SAMPLE:
                self._ask(keys, slots, values, missing[: self._SAMPLE])
                missing = missing[self._SAMPLE :]
                slots = self._slots(keys)  # it may have grown
                values[missing] = self._values[slots[missing]]
                missing = missing[self._keys[slots[missing]] != keys[missing]]
            if len(missing):
                self._ask(keys, slots, values, missing)
        return values

    def _ask(self, keys: Ints, slots: Ints, values: Ints, missing: Ints) -> None:
        """Fill in the values at `missing`, and the table."""
        wanted = keys[missing]
        distinct, inverse = np.unique(wanted, return_inverse=True)
        asked = distinct.tolist()
        crowded = any(key in self._known for key in asked)
        values[missing] = np.array([self.of(key) for key in asked], np.int64)[inverse]
        if crowded and self._bits < self._MOST_BITS:
            self._grow()
            return
        self._keys[slots[missing]] = wanted
        self._values[slots[missing]] = values[missing]

    def _grow(self) -> None:
        """To the least size at which each key that is known has a slot of its own."""
        mixed = np.array(list(self._known), np.uint64) * GOLDEN
        bits = self._bits + 1
        while bits < self._MOST_BITS and len(set((mixed >> np.uint64(64 - bits)).tolist())) < len(mixed):
            bits += 1
        self._begin(bits)

    def _slots(self, keys: Ints) -> Ints:
        slots: Ints = ((keys.view(np.uint64) * GOLDEN) >> self._shift).view(np.int64)
        return slots

    def of(self, key: int) -> int:
        """The answer for one key."""
        if key not in self._known:
            self._known[key] = self._answer(key)
        return self._known[key]
