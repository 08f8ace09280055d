"""A memoized function of one integer that is applied to whole arrays.

The correlator evaluates the same few hundred moves millions of times (can a packet go from here to there?). A
direct-mapped table answers all keys of an array at once; missing keys are computed one by one. The table begins small,
because each of a fleet's thousand streams has several, and grows when two known keys share a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.ordering import GOLDEN


class Memo:
    """Applies `answer` elementwise and remembers the results. Keys are >= 0."""

    _LEAST_BITS: Final = 8
    _MOST_BITS: Final = 14
    """Bounds of the binary logarithm of the number of slots: 4 KiB to 256 KiB of table."""
    _SAMPLE: Final = 1 << 10
    """Number of missing keys that are computed first. In a new table all keys are missing, but the first few contain
    nearly all distinct keys, so that the others need not be sorted."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self._answer = answer
        self._known: dict[int, int] = {}
        self._begin(self._LEAST_BITS)

    def _begin(self, bits: int) -> None:
        """Make a table of 2**bits slots with all known answers."""
        self._bits = bits
        self._shift = np.uint64(64 - bits)
        self._keys = np.full(1 << bits, -1, np.int64)
        self._values = np.zeros(1 << bits, np.int64)
        keys = np.array(list(self._known), np.int64)
        slots = self._slots(keys)
        self._keys[slots], self._values[slots] = keys, list(self._known.values())

    def forget(self) -> None:
        """Forget all answers, because they may have changed."""
        self._known.clear()
        self._keys.fill(-1)

    def __getstate__(self) -> tuple[Callable[[int], int], dict[int, int]]:
        """Return the state without the table, which can be rebuilt from `_known` and is mostly empty."""
        return self._answer, self._known

    def __setstate__(self, state: tuple[Callable[[int], int], dict[int, int]]) -> None:
        self._answer, self._known = state
        self._begin(self._LEAST_BITS)

    def __call__(self, keys: Ints) -> Ints:
        """Return the answers for an array of keys (one dimension); int64, same shape."""
        slots = self._slots(keys)
        values = self._values[slots]
        known = self._keys[slots] == keys
        if not known.all():
            missing = np.flatnonzero(~known)
            if len(missing) > self._SAMPLE:
                self._ask(keys, slots, values, missing[: self._SAMPLE])
                missing = missing[self._SAMPLE :]
                slots = self._slots(keys)  # the table may have grown
                values[missing] = self._values[slots[missing]]
                missing = missing[self._keys[slots[missing]] != keys[missing]]
            if len(missing):
                self._ask(keys, slots, values, missing)
        return values

    def _ask(self, keys: Ints, slots: Ints, values: Ints, missing: Ints) -> None:
        """Compute the values at the indices `missing`, and enter them into the table."""
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
        """Grow the table to the smallest size at which every known key has a slot of its own."""
        mixed = np.array(list(self._known), np.uint64) * GOLDEN
        bits = self._bits + 1
        while bits < self._MOST_BITS and len(set((mixed >> np.uint64(64 - bits)).tolist())) < len(mixed):
            bits += 1
        self._begin(bits)

    def _slots(self, keys: Ints) -> Ints:
        slots: Ints = ((keys.view(np.uint64) * GOLDEN) >> self._shift).view(np.int64)
        return slots

    def of(self, key: int) -> int:
        """Return the answer for one key."""
        if key not in self._known:
            self._known[key] = self._answer(key)
        return self._known[key]
