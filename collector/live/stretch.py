"""Successive records of one ring, viewed where the kernel wrote them until they have to be copied."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from contracts.abi import COLUMNS, WORDS

RingRecords = npt.NDArray[Any]
"""A ring's records as columns of a batch: one-dimensional, of dtype `contracts.abi.COLUMNS`."""


class Stretch:
    """Successive records of one ring that were not passed on yet."""

    __slots__ = ("_held", "records")

    def __init__(self, records: RingRecords, *, held: bool = True) -> None:
        self.records = records
        """A view into the ring, or a copy; ordered by time."""
        self._held = held

    @property
    def held(self) -> bool:
        """Whether the stretch has records whose only copy is in the ring."""
        return self._held and len(self.records) > 0

    def given(self, count: int) -> None:
        """Note that the first `count` records were passed on."""
        self.records = self.records[count:]

    def copy_out(self) -> None:
        """Copy the records, so that the ring's memory can be released."""
        if self._held:
            # Copy as uint64 words: numpy copies structs member by member, which takes four times as long.
            self.records = self.records.view(WORDS).copy().view(COLUMNS).reshape(-1)
            self._held = False
