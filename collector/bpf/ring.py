"""Reads one CPU's ring and returns views of its records, without copying them.

`MappedRing` reads an array that the programs fill (struct mace_ring in `bpf/mace_bpf.h`), from Linux 6.2 on:

    head     number of slots that programs have reserved; the programs write it
    tail     number of slots that the reader has released; the reader writes it
    slots    records of 64 bytes

`BufferRing` reads a BPF ring buffer, on older kernels:

    consumer page   position of the oldest byte that the reader has not released; the reader writes it
    producer page   position behind the newest slot; the kernel writes it
    data            slots of 8 bytes of head and a record of 64, mapped twice in succession, so that records which wrap
                    at the end are contiguous

A slot is busy from its reservation until its record is written; an interrupt may reserve later slots meanwhile. The
reader stops at the first busy slot, and reads the slots behind it once that slot is complete.

The reader needs no barrier between a slot's mark, or the position, and the records, because x86-64 keeps loads and
stores in order.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.bpf.layout import LOST_BITS, RING, WRITTEN
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
        """Number of the record behind the last one: records of the ring are numbered from 0."""


class CpuRing(ABC):
    """Reads a ring of `capacity` slots, which `memory` maps, from record number `released` on.

    The file descriptor stays the caller's.
    """

    def __init__(self, cpu: int, capacity: int, released: int, *memory: mmap.mmap) -> None:
        self.cpu: Final = cpu
        self._capacity = capacity
        self._memory = memory
        self._unreleased: deque[Taken] = deque()
        self.seen = released
        """Number of the oldest record that `take` has not returned, or of the next if it has returned all."""
        self._released = released
        """Number of the oldest record whose slot was not released."""

    def close(self) -> None:
        """Unmap the ring. No view of it may be read afterwards."""
        self._unreleased.clear()
        self._forget()
        for one in self._memory:
            try:
                one.close()
            except BufferError:
                pass  # a view exists, in the traceback of an error for instance; freeing the last view unmaps the ring

    @property
    def fill(self) -> float:
        """The share of the ring whose records were taken and not yet passed on or copied, 0 to 1."""
        return (self.seen - self._oldest()) / self._capacity

    @property
    def fresh(self) -> float:
        """The share of the ring that the programs have filled since the last `take`, 0 to 1."""
        return (self._reserved() - self.seen) / self._capacity

    @property
    def waiting(self) -> float:
        """The share of the ring that the programs have filled and the reader has not released, 0 to 1."""
        return (self._reserved() - self._released) / self._capacity

    def take(self) -> tuple[list[Taken], bool]:
        """Return the new records, as successive stretches in the ring's memory, and whether no slot is busy.

        If no slot is busy, the reader has all records whose slots were reserved before the call. Raises `SourceError`
        for a slot of another size than a record.
        """
        until = self._reserved()
        taken: list[Taken] = []
        while self.seen < until:
            records = self._complete(until - self.seen)
            if len(records) == 0:
                return taken, False
            self.seen += len(records)
            taken.append(Taken(records, self.seen))
            self._unreleased.append(taken[-1])
        return taken, True

    def release(self) -> None:
        """Release, oldest first, the part of the ring whose records were passed on or copied."""
        while self._unreleased and not self._unreleased[0].held:
            self._unreleased.popleft()
        self._released = self._oldest()
        self._store_released()

    def copy_out(self) -> None:
        """Copy all records that wait in the ring; the next `release` releases their slots."""
        for taken in self._unreleased:
            taken.copy_out()

    def _oldest(self) -> int:
        """Return the number of the oldest record whose only copy is in the ring."""
        if not self._unreleased:
            return self.seen
        first = self._unreleased[0]
        return first.end - len(first.records)

    @abstractmethod
    def _reserved(self) -> int:
        """Return the number of slots that programs have reserved so far."""

    @abstractmethod
    def _complete(self, count: int) -> RingRecords:
        """Return a view of the complete records from number `seen` on, up to `count`, or fewer where memory ends."""

    @abstractmethod
    def _store_released(self) -> None:
        """Let the programs write to the slots of all records before `_released`."""

    @abstractmethod
    def _forget(self) -> None:
        """Delete the reader's own views of the ring."""


class MappedRing(CpuRing):
    """Reads the array of `fd`, whose slots have `size` bytes in all, a power of two."""

    def __init__(self, cpu: int, fd: int, size: int) -> None:
        memory = mmap.mmap(fd, RING.itemsize + size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._head: npt.NDArray[Any] = np.frombuffer(memory, RING, 1)
        super().__init__(cpu, size // RECORD.itemsize, int(self._head["tail"][0]), memory)
        self._slots: RingRecords = np.frombuffer(memory, COLUMNS, self._capacity, RING.itemsize)

    def _reserved(self) -> int:
        return int(self._head["head"][0])

    def _complete(self, count: int) -> RingRecords:
        start = self.seen % self._capacity
        records = self._slots[start : start + count]
        hooks = records["hook"]
        written = hooks >= WRITTEN
        if not written.all():
            records = records[: int(written.argmin())]
            hooks = hooks[: len(records)]
        hooks ^= WRITTEN
        return records

    def _store_released(self) -> None:
        self._head["tail"] = self._released

    def _forget(self) -> None:
        del self._head, self._slots


class BufferRing(CpuRing):
    """Reads the BPF ring buffer of `fd`, which has `size` bytes of data, a power of two."""

    def __init__(self, cpu: int, fd: int, size: int) -> None:
        ours = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._theirs = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._consumed: npt.NDArray[np.uint64] = np.frombuffer(ours, np.uint64, 1)
        self._produced: npt.NDArray[np.uint64] = np.frombuffer(self._theirs, np.uint64, 1)
        super().__init__(cpu, size // SLOT_BYTES, int(self._consumed[0]) // SLOT_BYTES, ours, self._theirs)
        self._size = size

    def _reserved(self) -> int:
        return int(self._produced[0]) // SLOT_BYTES

    def _complete(self, count: int) -> RingRecords:
        start = mmap.PAGESIZE + self.seen * SLOT_BYTES % self._size
        heads: npt.NDArray[np.uint32] = np.ndarray((count,), np.uint32, self._theirs, start, (SLOT_BYTES,))
        whole = heads == RECORD.itemsize
        ready = count if whole.all() else int(whole.argmin())
        if ready < count and not heads[ready] & _BUSY and heads[ready] != RECORD.itemsize:
            raise SourceError(
                f"bpf: the ring of CPU {self.cpu} holds a slot of {heads[ready]} bytes, expected {RECORD.itemsize}: the"
                " programs belong to another version of MACE; rebuild them: `make -C bpf -B`"
            )
        records: RingRecords = np.ndarray((ready,), COLUMNS, self._theirs, start + _HEAD_BYTES, (SLOT_BYTES,))
        return records

    def _store_released(self) -> None:
        self._consumed[0] = self._released * SLOT_BYTES

    def _forget(self) -> None:
        del self._consumed, self._produced


class Wakes:
    """Empties the BPF ring buffer of `fd`, which the programs use only to wake the reader of mapped arrays."""

    def __init__(self, fd: int) -> None:
        self._ours = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._theirs = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._consumed: npt.NDArray[np.uint64] = np.frombuffer(self._ours, np.uint64, 1)
        self._produced: npt.NDArray[np.uint64] = np.frombuffer(self._theirs, np.uint64, 1)

    def empty(self) -> None:
        """Drop all entries, so that the programs have room for the next."""
        self._consumed[0] = self._produced[0]

    def close(self) -> None:
        """Unmap the buffer."""
        del self._consumed, self._produced
        self._ours.close()
        self._theirs.close()


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
