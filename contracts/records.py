"""Records and batches: what flows from a source to the correlator.

A record is one packet at one hook. A batch holds the records of one stretch of time as columns of equal
length; nothing in MACE handles single events. A batch is columns and not an array of structs, because files and
network messages hold columns, and the module's 64-byte records can be viewed as strided columns without a copy.

Values read from the packet's own bytes (content key, ports, sequence numbers) form a separate part of the batch, which
sources that do not read packets omit.

Lost records are visible in the stream: a record with hook `LOST` says that CPU `cpu` lost `l3_len` records
(saturating) after `ts_ns` and before `skb_id`, which holds a time in this record. The marker precedes every record of
the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntFlag
from operator import attrgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Values
from contracts.hooks import Hook

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
"""Name and dtype of every column that each batch has, in the order of the wire format."""

CONTENT_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "packet_key": np.dtype("<u8"),
    "l4_seq": np.dtype("<u4"),
    "l4_src": np.dtype("<u2"),
    "l4_dst": np.dtype("<u2"),
    "ip_id": np.dtype("<u2"),
    "vlan": np.dtype("<u2"),
    "ip_version": np.dtype("u1"),
    "l4_proto": np.dtype("u1"),
    "l4_bits": np.dtype("u1"),
    "flags": np.dtype("u1"),
}
"""Name and dtype of every column of a batch's content, in the order of the wire format, after those of `DTYPES`."""


class Flag(IntFlag):
    """Bits of `Content.flags`; the numbers are those of the module's ABI."""

    KEY = 0x01
    """`packet_key` is known."""
    FRAGMENT = 0x02
    """A fragment of an IP packet; `l4_seq` holds its offset in bytes."""
    TUNNEL = 0x04
    """The packet carries another (VXLAN, Geneve, GRE, IP in IP): `packet_key` is of the inner packet, all other
    columns are of the outer one."""
    VLAN = 0x08
    """Tagged: `vlan` holds the tag."""
    CLONED = 0x10
    """The buffer's data is shared with a clone."""
    RECALLED = 0x20
    """The hook has no device: `Batch.dev` is the last device at which the packet was seen."""
    FLOW = 0x40
    """`l4_src`, `l4_dst`, `l4_seq` and `l4_bits` were read."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Values read from the packets' bytes, one per record; zero and without flags for a record without a packet.

    All columns have one length; dtypes are those of `CONTENT_DTYPES`. Numbers are in host byte order.
    """

    packet_key: npt.NDArray[np.uint64]
    """Hash of the fields that NAT, routing, bridging and tunnels do not rewrite (listed in kmod/mace_packet.c); 0 if
    unknown."""
    l4_seq: npt.NDArray[np.uint32]
    """TCP sequence number, SCTP verification tag, or the fragment's offset, bytes."""
    l4_src: npt.NDArray[np.uint16]
    """Source port, or ICMP identifier."""
    l4_dst: npt.NDArray[np.uint16]
    """Destination port, or ICMP sequence number."""
    ip_id: npt.NDArray[np.uint16]
    """IPv4 identification; 0 for IPv6."""
    vlan: npt.NDArray[np.uint16]
    """VLAN tag control information."""
    ip_version: npt.NDArray[np.uint8]
    """4, 6, or 0 for what is not IP."""
    l4_proto: npt.NDArray[np.uint8]
    """IP protocol number after the extension headers; 0 if not IP."""
    l4_bits: npt.NDArray[np.uint8]
    """TCP flags (FIN is bit 0), or ICMP type."""
    flags: npt.NDArray[np.uint8]
    """`Flag`s."""

    def __len__(self) -> int:
        return len(self.packet_key)

    def columns(self) -> Iterator[tuple[str, Values]]:
        """Names and arrays, in the order of `CONTENT_DTYPES`."""
        return ((name, getattr(self, name)) for name in CONTENT_DTYPES)

    def __getitem__(self, index: slice | Values) -> Content:
        """Return the content of the records at `index` (a slice gives views; a mask or an index array copies)."""
        return Content(*[column[index] for column in _columns_of(self)])

    @classmethod
    def of(cls, length: int, **given: Any) -> Content:
        """Make the content of `length` records from some columns, cast to `CONTENT_DTYPES`; the others are zero."""
        return cls(*_made(CONTENT_DTYPES, length, given))


PIECE_RECORDS: Final = 1 << 17
"""Largest number of records in a source's batch: 4.5 MB of columns. Later stages size their memory by it."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Records of one source, in non-decreasing order of `ts_ns`; equal times are ordered by CPU.

    All columns and `content` have the same length; dtypes are those of `DTYPES`.
    """

    ts_ns: npt.NDArray[np.int64]
    """CLOCK_MONOTONIC, ns."""
    skb_id: npt.NDArray[np.uint64]
    """Identity of the kernel buffer: equal while the same buffer lives, reused afterwards."""
    dev: npt.NDArray[np.uint32]
    """Index into the stream's sightings (`contracts.topology.Topology.sightings`). For a hook without a device: 0, or
    the packet's last device if the content has `Flag.RECALLED`."""
    l3_len: npt.NDArray[np.uint32]
    """Bytes without the link-layer header; at a copy to a reader the bytes copied; 0 if the hook does not report it."""
    cpu: npt.NDArray[np.uint16]
    drop_reason: npt.NDArray[np.uint16]
    """The kernel's `enum skb_drop_reason` at `kfree_skb`, else 0."""
    gso_segs: npt.NDArray[np.uint16]
    """Segments into which this buffer will be split on a wire; 0 if the hook does not report it."""
    hook: npt.NDArray[np.uint8]
    """A `contracts.hooks.Hook`."""
    content: Content | None = field(default=None, kw_only=True)
    """None from a source that does not read packets."""

    def __len__(self) -> int:
        return len(self.ts_ns)

    def columns(self) -> Iterator[tuple[str, Values]]:
        """Return (name, array) of each column, in the order of `DTYPES`; `content` is not included."""
        return ((name, getattr(self, name)) for name in DTYPES)

    def __getitem__(self, index: slice | Values) -> Batch:
        """Return the records at `index` (a slice gives views; a mask or an index array copies)."""
        content = None if self.content is None else self.content[index]
        return Batch(*[column[index] for column in _columns(self)], content=content)

    def pieces(self, most: int = PIECE_RECORDS) -> Iterator[Batch]:
        """Yield the batch in views of at most `most` records; an empty batch yields none."""
        if 0 < len(self) <= most:
            yield self
            return
        for start in range(0, len(self), most):
            yield self[start : start + most]

    @property
    def lost(self) -> int:
        """Records that the ring lost, by this batch's markers."""
        return int(self.l3_len[self.hook == Hook.LOST].sum(dtype=np.int64))

    @classmethod
    def of(cls, length: int, content: Content | None = None, **given: Any) -> Batch:
        """Make a batch of `length` records from some columns, cast to `DTYPES`; the others are zero."""
        if content is not None and len(content) != length:
            raise ValueError(f"content of {len(content)} records, expected {length}")
        return cls(*_made(DTYPES, length, given), content=content)

    @classmethod
    def empty(cls) -> Batch:
        """Make a batch of no records."""
        return cls.of(0)

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Batch:
        """Join batches in the given order, which the caller keeps ascending in time.

        If only some batches have content, the content of the others' records is zero.
        """
        if len(batches) == 1:
            return batches[0]
        if not batches:
            return cls.empty()
        content = None
        if any(batch.content is not None for batch in batches):
            parts = [Content.of(len(batch)) if batch.content is None else batch.content for batch in batches]
            content = Content(*map(np.concatenate, zip(*map(_columns_of, parts), strict=True)))
        return cls(*map(np.concatenate, zip(*map(_columns, batches), strict=True)), content=content)


_columns: Final[Callable[[Batch], tuple[Values, ...]]] = attrgetter(*DTYPES)
_columns_of: Final[Callable[[Content], tuple[Values, ...]]] = attrgetter(*CONTENT_DTYPES)
"""All columns at once: a live source slices some batches in each tick."""


def _made(dtypes: Mapping[str, np.dtype[Any]], length: int, given: Mapping[str, Any]) -> Iterator[Values]:
    unknown = given.keys() - dtypes.keys()
    if unknown:
        raise TypeError(f"no such column: {', '.join(sorted(unknown))}")
    for name, dtype in dtypes.items():
        if name not in given:
            yield np.zeros(length, dtype)
            continue
        column = np.asarray(given[name]).astype(dtype, copy=False)
        if column.shape != (length,):
            raise ValueError(f"column {name} has shape {column.shape}, expected ({length},)")
        yield column


assert (*DTYPES, "content") == tuple(f.name for f in fields(Batch))
assert tuple(CONTENT_DTYPES) == tuple(f.name for f in fields(Content))
