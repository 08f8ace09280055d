"""The state that an engine carries from one record to the next, extracted at a cut of the stream.

Two engines in the same state give the same results from there on, so that a stream can be processed in parts. An engine
that begins with the state of another one continues as if there were no cut. An engine that began a little before the
cut without any state is equivalent if the digests of the two states are equal. Counts, windows and rows are not part of
the state: they add up.
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
from correlator.neighbours import Asked
from correlator.records import Open, Records

_Carried = TypeVar("_Carried", Open, LooseEnds)


@dataclass(frozen=True, slots=True, eq=False)
class EngineState:
    """State of an engine that has processed all records before a time."""

    resolver: ResolverState
    open: Open
    """Records of lives that have not ended; `number` refers to the resolver's devices."""
    waiting: LooseEnds
    """Lives that have ended and may continue in another buffer; `number` refers to the resolver's devices."""
    gaps: list[tuple[int, int]]
    """Gaps that can still lie between two records of a packet."""
    asked: Asked
    """Neighbour requests for which packets may have waited."""
    latest_ns: int
    """Time of the last record, or marker."""
    began_ns: int | None
    """Time of the first record; None if there was none but markers."""

    def digest(self) -> str:
        """Return a SHA-256 digest (hex), equal for states that give the same results, whatever their device numbers.

        The digest omits `latest_ns`, which is known from the cut, and the value of `began_ns`, which has no further
        use.
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
    """Replace device numbers by their new ones; numbers below 0 mean no device and stay."""
    changed = numbers.copy()
    real = np.flatnonzero(numbers >= 0)
    changed[real] = new[numbers[real]]
    return changed


def with_numbers(carried: _Carried, new: Ints) -> _Carried:
    """Return the lives with their devices renumbered."""
    return replace(carried, number=renumbered(carried.number, new))
