"""What an engine carries from one record to the next, taken out of it at a cut of the stream.

Two engines in the same state give the same answers from there on. That is what lets a stream be worked on in parts: an
engine that begins with the last one's state goes on as if there were no cut; and one that has begun a little before the
cut with no state at all is as good, if the two states' digests are equal. Counts, windows and rows are no part of it:
these add up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

import numpy as np

from correlator.identity import ResolverState
from correlator.lives import Gaps, Ints, Open


@dataclass(frozen=True, slots=True, eq=False)
class EngineState:
    """Of an engine that has worked on all records before a time."""

    resolver: ResolverState
    open: Open
    """Records of lives that have not ended. `number` counts the resolver's devices."""
    gaps: Gaps
    """Those that can still part two records."""
    latest_ns: int
    """Time of the last record."""

    def digest(self) -> str:
        """The same for two states from which the same follows, whatever their devices' numbers are; SHA-256, hex.

        `latest_ns` is left out: it is known from the cut itself.
        """
        resolver, rank = self.resolver.canonical()
        told = hashlib.sha256(repr((resolver, tuple(self.gaps), len(self.open))).encode())
        records = self.open.records.with_content()
        for field in fields(records):
            told.update(np.ascontiguousarray(getattr(records, field.name)).tobytes())
        told.update(renumbered(self.open.number, rank).tobytes())
        told.update(np.ascontiguousarray(self.open.cross).tobytes())
        return told.hexdigest()


def renumbered(numbers: Ints, new: Ints) -> Ints:
    """Device numbers by their new ones; those below 0 are none and stay."""
    changed = numbers.copy()
    real = np.flatnonzero(numbers >= 0)
    changed[real] = new[numbers[real]]
    return changed


def with_numbers(carried: Open, new: Ints) -> Open:
    """The same open lives, their devices renumbered."""
    return replace(carried, number=renumbered(carried.number, new))
