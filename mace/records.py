"""Records and batches: what flows from a source to the correlator.

A record is one packet at one hook. A batch holds the records of one stretch of time as columns of equal
length; nothing in MACE handles single events. Columns, not an array of structs: a file or a network message
is columns already, and a module's 64-byte records are viewed as strided columns without a copy.

Lost records are visible in the stream: a record with hook `LOST` says that CPU `cpu` lost `l3_len` records
(saturating) after `ts_ns` and before `skb_id` (a time, here). It stands before every record of the gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mace.hooks import Hook

Column = npt.NDArray[Any]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "ts_ns": np.dtype("<i8"),
    "skb_id": np.dtype("<u8"),
    "dev": np.dtype("<u4"),
    "l3_len": np.dtype("<u4"),
    "cpu": np.dtype("<u2"),
    "drop_reason": np.dtype("<u2"),
    "gso_segs": np.dtype("<u2"),
    "hook": np.dtype("u1"),
}
"""Every column of a batch and its type, in the order in which they travel."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Records of one source, in non-decreasing order of `ts_ns`; equal times are ordered by CPU.

    All columns have one length; dtypes are those of `DTYPES`.
    """

    ts_ns: npt.NDArray[np.int64]
    """CLOCK_MONOTONIC, ns."""
    skb_id: npt.NDArray[np.uint64]
    """Identity of the kernel buffer: equal while the same buffer lives, reused afterwards."""
    dev: npt.NDArray[np.uint32]
    """Index into the stream's sightings (`mace.topology.Topology.sightings`); 0 where the hook has no device."""
    l3_len: npt.NDArray[np.uint32]
    """Bytes without the link-layer header; at a copy to a reader the bytes copied; 0 where the hook does not tell."""
    cpu: npt.NDArray[np.uint16]
    drop_reason: npt.NDArray[np.uint16]
    """The kernel's `enum skb_drop_reason` at `kfree_skb`, else 0."""
    gso_segs: npt.NDArray[np.uint16]
    """Segments this buffer will become on a wire; 0 where the hook does not tell."""
    hook: npt.NDArray[np.uint8]
    """A `mace.hooks.Hook`."""

    def __len__(self) -> int:
        return len(self.ts_ns)

    def columns(self) -> Iterator[tuple[str, Column]]:
        """Names and arrays, in the order of `DTYPES`."""
        return ((name, getattr(self, name)) for name in DTYPES)

    def __getitem__(self, index: slice | Column) -> Batch:
        """The records at `index` (a slice gives views; a mask or an index array copies)."""
        return Batch(*(column[index] for _, column in self.columns()))

    @property
    def lost(self) -> int:
        """Records that the ring lost, as told by this batch's markers."""
        return int(self.l3_len[self.hook == Hook.LOST].sum(dtype=np.int64))

    @classmethod
    def of(cls, length: int, **given: Any) -> Batch:
        """A batch of `length` records from some columns; the others are zero. Casts to `DTYPES`."""
        unknown = given.keys() - DTYPES.keys()
        if unknown:
            raise TypeError(f"no such column: {', '.join(sorted(unknown))}")
        columns = []
        for name, dtype in DTYPES.items():
            if name in given:
                column = np.asarray(given[name]).astype(dtype, copy=False)
                if column.shape != (length,):
                    raise ValueError(f"column {name} has shape {column.shape}, expected ({length},)")
            else:
                column = np.zeros(length, dtype)
            columns.append(column)
        return cls(*columns)

    @classmethod
    def empty(cls) -> Batch:
        """No records."""
        return cls.of(0)

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Batch:
        """One batch after the other, as given; the caller answers for the order."""
        if len(batches) == 1:
            return batches[0]
        if not batches:
            return cls.empty()
        return cls(*(np.concatenate([getattr(b, name) for b in batches]) for name in DTYPES))


assert tuple(DTYPES) == tuple(f.name for f in fields(Batch))
