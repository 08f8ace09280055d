"""Reads one CPU's BPF ring buffer and returns views of its records, without copying them.

    consumer page   position of the oldest byte that the reader has not released; the reader writes it
    producer page   position behind the newest slot; the kernel writes it
    data            mapped twice in succession, so that records which wrap at the end are contiguous

A slot is a head of 8 bytes and a record of 64. A slot is busy from its reservation until its record is written; an
interrupt may reserve later slots meanwhile. The reader stops at the first busy slot, and reads the slots behind it once
that slot is complete.

The reader needs no barrier between the position and the records, because x86-64 keeps loads in order.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.bpf.layout import LOST_BITS
from collector.live.stretch import RingRecords, Stretch
from contracts.abi import COLUMNS, RECORD, WORDS
from contracts.errors import SourceError

_HEAD_BYTES: Final = 8
SLOT_BYTES: Final = _HEAD_BYTES + RECORD.itemsize
_BUSY: Final = 1 << 31
"""BPF_RINGBUF_BUSY_BIT (include/uapi/linux/bpf.h)."""
_WRAP: Final = 1 << LOST_BITS


class Taken(Stretch):
    """Successive records of a ring that one `CpuRing.take` returned."""

    __slots__ = ("end",)

    def __init__(self, records: RingRecords, end: int) -> None:
        super().__init__(records)
        self.end = end
        """Position in the ring behind the last record."""


class CpuRing:
    """Reads the ring buffer of `fd`, which has `size` bytes of data. The file descriptor stays the caller's."""

    def __init__(self, cpu: int, fd: int, size: int) -> None:
        self.cpu: Final = cpu
        self._size = size
        self._ours = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._theirs = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._consumed: npt.NDArray[np.uint64] = np.frombuffer(self._ours, np.uint64, 1)
        self._produced: npt.NDArray[np.uint64] = np.frombuffer(self._theirs, np.uint64, 1)
        self._unreleased: deque[Taken] = deque()
        self._next = 0
        """Position of the oldest slot that `take` has not returned."""
        self.seen = 0
        """Records that `take` has returned so far."""

    def close(self) -> None:
        """Unmap the ring. No view of it may be read afterwards."""
        self._unreleased.clear()
        del self._consumed, self._produced
        for one in (self._ours, self._theirs):
            try:
                one.close()
            except BufferError:
                pass  # a view exists, in the traceback of an error for instance; freeing the last view unmaps the ring

    @property
    def fill(self) -> float:
        """The share of the ring whose records were taken and not yet passed on or copied, 0 to 1."""
        return (self._next - self._oldest()) / self._size

    @property
    def waiting(self) -> float:
        """The share of the ring that the programs have filled and the reader has not released, 0 to 1."""
        return (int(self._produced[0]) - int(self._consumed[0])) / self._size

    def take(self) -> tuple[Taken | None, bool]:
        """Return the new records, or None if there are none, and whether no slot is busy.

        If no slot is busy, the reader has all records whose slots were reserved before the call. Raises `SourceError`
        for a slot of another size than a record.
        """
        count = (int(self._produced[0]) - self._next) // SLOT_BYTES
        if count == 0:
            return None, True
        start = mmap.PAGESIZE + self._next % self._size
        heads: npt.NDArray[np.uint32] = np.ndarray((count,), np.uint32, self._theirs, start, (SLOT_BYTES,))
        whole = heads == RECORD.itemsize
        ready = count if whole.all() else int(whole.argmin())
        if ready < count and not heads[ready] & _BUSY and heads[ready] != RECORD.itemsize:
            raise SourceError(
                f"bpf: the ring of CPU {self.cpu} holds a slot of {heads[ready]} bytes, expected {RECORD.itemsize}: the"
                " programs belong to another version of MACE; rebuild them: `make -C bpf -B`"
            )
        if ready == 0:
            return None, False
        records: RingRecords = np.ndarray((ready,), COLUMNS, self._theirs, start + _HEAD_BYTES, (SLOT_BYTES,))
        self._next += ready * SLOT_BYTES
        self.seen += ready
        taken = Taken(records, self._next)
        self._unreleased.append(taken)
        return taken, ready == count

    def release(self) -> None:
        """Release, oldest first, the part of the ring whose records were passed on or copied."""
        while self._unreleased and not self._unreleased[0].held:
            self._unreleased.popleft()
        self._consumed[0] = self._oldest()

    def copy_out(self) -> None:
        """Copy all records that wait in the ring; the next `release` releases their slots."""
        for taken in self._unreleased:
            taken.copy_out()

    def _oldest(self) -> int:
        """Return the position of the oldest record whose only copy is in the ring."""
        if not self._unreleased:
            return self._next
        first = self._unreleased[0]
        return first.end - len(first.records) * SLOT_BYTES


def lost_before(records: RingRecords, told: int) -> npt.NDArray[np.int64]:
    """Return how many records the CPU had lost when each record was written, less `told`: int64, never decreasing.

    The count is in the record's pad, the upper bytes of its last word, and has `LOST_BITS` bits. A difference of 2**23
    or more therefore means a count below `told`, and becomes 0.
    """
    words: npt.NDArray[Any] = records.view(WORDS)
    ahead = ((words[:, -1] >> np.uint64(64 - LOST_BITS)).astype(np.int64) - told) % _WRAP
    ahead[ahead >= _WRAP // 2] = 0
    return np.maximum.accumulate(ahead)


def is_sorted(records: RingRecords) -> bool:
    """Return whether records are in order of time.

    They are not if an interrupt reserved its slot before the program that it interrupted, which had read the clock
    already.
    """
    ts = records["ts_ns"]
    return bool((ts[1:] >= ts[:-1]).all())


def sorted_by_time(pieces: Sequence[RingRecords]) -> RingRecords:
    """Return copies of all records of `pieces` in order of time; records of equal time keep their order."""
    words = np.concatenate([piece.view(WORDS) for piece in pieces])
    ts = np.concatenate([piece["ts_ns"] for piece in pieces])
    return words[np.argsort(ts, kind="stable")].view(COLUMNS).reshape(-1)
