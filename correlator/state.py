"""What an engine carries from one record to the next, taken out of it at a cut of the stream.

Two engines in the same state give the same answers from there on. That is what lets a stream be worked on in parts: an
engine that begins with the last one's state goes on as if there were no cut; and one that has begun a little before the
cut with no state at all is as good, if the two states' digests are equal. Counts, windows and rows are no part of it:
these add up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints
from correlator.identity import ResolverState
from correlator.links import LooseEnds
from correlator.lives import Gaps, Open, Records
from correlator.neighbours import Asked

_Carried = TypeVar("_Carried", Open, LooseEnds)


@dataclass(frozen=True, slots=True, eq=False)
class EngineState:
    """Of an engine that has worked on all records before a time."""

    resolver: ResolverState
    open: Open
    """Records of lives that have not ended. `number` counts the resolver's devices."""
    waiting: LooseEnds
    """Lives that have ended and may go on in another buffer. `number` as in `open`."""
    gaps: Gaps
    """Those that can still part two records."""
    asked: Asked
    """Requests for neighbours that packets can have waited for."""
    latest_ns: int
    """Time of the last record, or marker."""
    began_ns: int | None
    """Time of the first record; None if there was none but markers."""

    def digest(self) -> str:
        """The same for two states from which the same follows, whatever their devices' numbers are; SHA-256, hex.

        `latest_ns` and when it began are left out: the one is known from the cut itself, the other asked for no more.
        """
        resolver, rank = self.resolver.canonical()
        waiting = self.waiting.sorted()
        told = hashlib.sha256(
            repr((resolver, tuple(self.gaps), len(self.open), len(waiting.size), self.began_ns is None)).encode()
        )
        for carried in (self.open, waiting):
            _tell(told, [carried.records.column(f.name) for f in fields(Records)])
            _tell(told, [renumbered(carried.number, rank), carried.cross])
        _tell(told, [self.asked.dev, self.asked.ts])
        _tell(told, [getattr(waiting, name) for name in ("size", "key", "at_ns", "head", "end", "freed", "grade")])
        return told.hexdigest()


def _tell(told: hashlib._Hash, columns: list[npt.NDArray[Any]]) -> None:
    for column in columns:
        told.update(np.ascontiguousarray(column).tobytes())


def renumbered(numbers: Ints, new: Ints) -> Ints:
    """Device numbers by their new ones; those below 0 are none and stay."""
    changed = numbers.copy()
    real = np.flatnonzero(numbers >= 0)
    changed[real] = new[numbers[real]]
    return changed


def with_numbers(carried: _Carried, new: Ints) -> _Carried:
    """The same lives, their devices renumbered."""
    return replace(carried, number=renumbered(carried.number, new))
