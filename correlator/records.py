"""Records as the engine keeps them: the columns in which open lives are saved, and those that the loop gets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Bytes, Ints, Mask
from contracts.ordering import GOLDEN
from contracts.records import Batch
from correlator import content
from correlator.content import keys, traits
from correlator.identity import HAS_DEVICE, place
from correlator.numbers import DROP

NEVER: Final = np.iinfo(np.int64).max
_OPTIONAL: Final[dict[str, Any]] = {
    "key": np.uint64,
    "trait": np.uint8,
    "flow": np.uint64,
    "proto": np.uint8,
    "cpu": np.uint16,
}
"""The optional columns of `Records`."""


@dataclass(frozen=True, slots=True)
class Records:
    """The columns that the engine keeps of records, in order of time."""

    ts: Ints
    skb: U64
    place: Ints
    """Hook and sighting, as `correlator.identity.place` packs them."""
    length: npt.NDArray[np.uint32]
    """Bytes; at a drop `Batch.drop_reason` instead, because the length at a drop is not needed."""
    key: U64 | None = None
    """Content keys, 0 if unknown; None if no record has one."""
    trait: npt.NDArray[np.uint8] | None = None
    """`correlator.content.traits`; None if `key` is None."""
    flow: U64 | None = None
    """`correlator.content.flows`; None if they are not needed, or `key` is None."""
    proto: npt.NDArray[np.uint8] | None = None
    """IP protocol number, 0 if none; None if `flow` is None."""
    cpu: npt.NDArray[np.uint16] | None = None
    """CPU of each record; None if it is not needed."""

    def __len__(self) -> int:
        return len(self.ts)

    @classmethod
    def of(cls, batch: Batch, *, flows: bool = False, cpus: bool = False) -> Records:
        """Make the records of a batch, which has no markers.

        `flows` includes the columns `flow` and `proto`, `cpus` the column `cpu`.
        """
        dev = batch.dev
        if batch.content is not None:
            # At a delivery or an end, `dev` may be an earlier device of the packet (RECALLED): clear it.
            dev = dev * HAS_DEVICE.take(batch.hook)
        length = batch.l3_len
        if batch.drop_reason.any():
            length = np.where(batch.hook == DROP, batch.drop_reason, length)
        flow, proto = content.flows(batch) if flows else (None, None)
        return cls(
            batch.ts_ns,
            batch.skb_id,
            place(batch.hook, dev),
            length,
            keys(batch),
            traits(batch),
            flow,
            proto,
            batch.cpu if cpus else None,
        )

    def __getitem__(self, index: Ints) -> Records:
        """Return the records at `index`."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Records(**{name: column[index] for name, column in given if column is not None})

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column, zeros if it is absent."""
        column = getattr(self, name)
        return np.zeros(len(self), _OPTIONAL[name]) if column is None else column


@dataclass(frozen=True, slots=True)
class Open:
    """Records of lives that have not ended, with the results so far, in order of time."""

    records: Records
    number: Ints
    """Device numbers, as in `correlator.hops.Path`."""
    cross: Mask
    """Whether each record is the first on its device, as in `correlator.hops.Path`."""

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, slots=True)
class LifeTimes:
    """What a life's crossing and stages are computed from, for lives with rows, in the order in which they ended."""

    shape: Ints
    """Index into `Answers.measured`. This array and the following ones have one element per life."""
    packet: U64
    start: Ints
    """Index of each life's first record."""
    length: npt.NDArray[np.uint32]
    grade: Bytes
    waited: Mask
    ts: Ints
    """Times. This array and the following ones have one element per record, life by life."""
    records: Records
    """Their other columns, without `skb`, which is 0."""


def laid_out(starts: Ints, size: Ints) -> Ints:
    """Return the concatenated indices of stretches that begin at `starts` and are `size` long."""
    index: Ints = np.arange(int(size.sum())) + np.repeat(starts - (np.cumsum(size) - size), size)
    return index


def named(first: Records) -> U64:
    """Return the identifier (`contracts.schema.Delays.packet`) of the life that begins with each of these records."""
    mixed = first.skb ^ (first.ts.view(np.uint64) * GOLDEN)
    mixed ^= mixed >> np.uint64(32)
    names: U64 = mixed * np.uint64(0xD6E8FEB86659FD93)
    return names
