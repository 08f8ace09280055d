"""Records in a row of one ring, seen where the kernel wrote them until there is a reason to copy them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from contracts.abi import COLUMNS, WORDS

Records = npt.NDArray[Any]
"""One-dimensional, of dtype `contracts.abi.COLUMNS`: the kernel's records, seen as columns of a batch."""


class Stretch:
    """The records of a stretch that are still to be given out."""

    __slots__ = ("_held", "records")

    def __init__(self, records: Records, *, held: bool = True) -> None:
        self.records = records
        """A view into the ring, or a copy; in order of time."""
        self._held = held

    @property
    def held(self) -> bool:
        """Whether there are records in it that are only in the ring."""
        return self._held and len(self.records) > 0

    def given(self, count: int) -> None:
        """The first `count` records were given out."""
        self.records = self.records[count:]

    def copy_out(self) -> None:
        """Keep the records elsewhere, so that the ring can go on."""
        if self._held:
            # As whole numbers: numpy copies structs member by member, four times as slowly.
            self.records = self.records.view(WORDS).copy().view(COLUMNS).reshape(-1)
            self._held = False
