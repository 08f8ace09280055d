"""Computes the delays of lives by their shape: the hooks that a packet passed, at which devices, in which order.

The result of `correlator.hops` for a life depends on its shape only; times enter as differences. A host has a few dozen
shapes, and a slice has thousands of lives of each. One life of each shape is therefore measured, with the indices of
its records in place of their times. The result shows between which records each delay lies, for all lives of that
shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints, Mask
from contracts.ordering import GOLDEN, grouped
from contracts.schema import Outcome
from correlator.hops import Crossed, Measured, measure
from correlator.identity import CODE_BITS, Resolver
from correlator.lives import Lives, Paths, laid_out
from correlator.stages import Stages, stages

_FEW: Final = 256
"""Number of lives below which all are measured directly: finding their shapes would take longer."""
_NUMBER_AT: Final = 8
"""Bits of a record's code below its device number: hook, and whether the record is the first on its device."""
_WEIGHTS: Final = 1 << 8
"""Number of positions in a life with a weight of their own; later records share a weight, but are compared as well."""
_TIMES: Final = ("inner", "outer", "inner_stamp", "outer_stamp", "outer_edge")
"""The fields of `Crossed` that are times."""


@dataclass(frozen=True, slots=True)
class _Alike:
    """Lives, their shapes, and one life of each shape."""

    lives: Ints
    """Indices of the lives."""
    kind: Ints
    """Index of each life's shape."""
    paths: Paths
    """One life of each shape."""


def measure_all(lives: Lives, which: Mask, resolver: Resolver, *, crossings: bool) -> Measured:
    """Return the result of `correlator.hops.measure` for the lives in `which`, in the same order of rows.

    `crossed` may be None unless `crossings` is set.
    """
    alike = _alike(lives, np.flatnonzero(which))
    if alike is None:
        return measure(lives, which, resolver)
    return _spread(lives, alike, _measured(alike, resolver), crossings=crossings)


def measure_stages(lives: Lives, which: Mask, resolver: Resolver, *, crossings: bool) -> tuple[Measured, Stages]:
    """Return the result of `measure_all`, and the stages of the same lives, with positions in each life."""
    chosen = np.flatnonzero(which)
    alike = _alike(lives, chosen)
    if alike is None:
        alike = _Alike(chosen, np.arange(len(chosen)), lives.numbered(chosen))
    told = _measured(alike, resolver)
    return _spread(lives, alike, told, crossings=crossings), _spread_stages(alike, stages(alike.paths, told, resolver))


def _measured(alike: _Alike, resolver: Resolver) -> Measured:
    return measure(alike.paths, np.ones(len(alike.paths.starts), np.bool_), resolver)


def _alike(lives: Lives, chosen: Ints) -> _Alike | None:
    """Return the shapes of the lives in `chosen`; None if there are too few lives, or if two shapes' sums collide."""
    if len(chosen) < _FEW:
        return None
    size = lives.size
    code = _codes(lives)
    position = np.arange(len(code)) - np.repeat(lives.starts, size)
    weighted = code * _weights().take(position, mode="clip")
    order, same = grouped((np.add.reduceat(weighted, lives.starts) + lives.freed)[chosen])
    first = chosen[order[~same]]
    kind = np.empty(len(chosen), np.int64)
    kind[order] = np.cumsum(~same) - 1

    # Equal sums suggest equal shapes, but can collide: compare all records.
    paths = lives.numbered(first)
    of_kind = np.zeros(len(size), np.int64)
    of_kind[chosen] = paths.starts[kind]
    at = position + np.repeat(of_kind, size)
    left_out = np.ones(len(size), np.bool_)
    left_out[chosen] = False
    equal = _codes(paths).take(at, mode="clip") == code
    if (equal | np.repeat(left_out, size)).all() and all(
        np.array_equal(of_shape[kind], of_life[chosen])
        for of_shape, of_life in ((paths.size, size), (paths.freed, lives.freed))
    ):
        return _Alike(chosen, kind, paths)
    return None


def _codes(paths: Paths) -> npt.NDArray[np.uint64]:
    """Return everything that a record shows of its packet's path, packed into one number."""
    code = (paths.number + 2) << _NUMBER_AT
    code |= paths.place >> CODE_BITS << 1
    code |= paths.cross
    return code.view(np.uint64)


@functools.cache
def _weights() -> npt.NDArray[np.uint64]:
    """Return an odd random-looking weight for each position in a life."""
    weights = np.arange(1, _WEIGHTS + 1, dtype=np.uint64) * GOLDEN
    weights ^= weights >> np.uint64(29)
    weights *= np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64's
    weights ^= weights >> np.uint64(32)
    return weights | np.uint64(1)


def _spread(lives: Lives, alike: _Alike, told: Measured, *, crossings: bool) -> Measured:
    """Apply the results for one life of each shape to all lives."""
    ts, starts = lives.ts, lives.starts[alike.lives]
    rows = np.bincount(told.life, minlength=len(alike.paths.starts))
    count = rows[alike.kind]
    row = laid_out((np.cumsum(rows) - rows)[alike.kind], count)
    begin = np.repeat(starts, count) + told.ts[row]
    dropped, unclear = (np.zeros(len(lives.starts), np.bool_) for _ in range(2))
    outcome = np.where(lives.freed, np.uint8(Outcome.CONSUMED), np.uint8(Outcome.OPEN))
    dropped[alike.lives], unclear[alike.lives] = told.dropped[alike.kind], told.unclear[alike.kind]
    outcome[alike.lives] = told.outcome[alike.kind]
    return Measured(
        life=np.repeat(alike.lives, count),
        ts=ts[begin],
        device=told.device[row],
        owner=told.owner[row],
        direction=told.direction[row],
        segment=told.segment[row],
        position=told.position[row],
        delay=ts[begin + told.delay[row]] - ts[begin],
        dropped=dropped,
        unclear=unclear,
        outcome=outcome,
        packets=alike.lives[rows[alike.kind] > 0],
        crossed=_crossed(lives, alike, told.crossed) if crossings and told.crossed is not None else None,
    )


def _spread_stages(alike: _Alike, told: Stages) -> Stages:
    """Apply the stages of one life of each shape to all lives."""
    rows = np.bincount(told.life, minlength=len(alike.paths.starts))
    count = rows[alike.kind]
    row = laid_out((np.cumsum(rows) - rows)[alike.kind], count)
    columns = {f.name: getattr(told, f.name)[row] for f in fields(Stages)}
    return Stages(**columns | {"life": np.repeat(alike.lives, count)})


def _crossed(lives: Lives, alike: _Alike, told: Crossed) -> Crossed:
    of_kind = np.full(len(alike.paths.starts), -1, np.int64)
    of_kind[told.life] = np.arange(len(told.life))
    one = of_kind[alike.kind]
    has = np.flatnonzero(one >= 0)
    life, one = alike.lives[has], one[has]
    start = lives.starts[life]
    times = {name: lives.ts[start + getattr(told, name)[one]] for name in _TIMES}
    return Crossed(
        life=life,
        at=start + (told.at - alike.paths.starts[told.life])[one],
        owner=told.owner[one],
        direction=told.direction[one],
        **times,
    )
