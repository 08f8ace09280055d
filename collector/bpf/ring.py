"""One CPU's BPF ring buffer: slots in, views of their records out, nothing copied.

    consumer page   position of the oldest byte that is not given back: ours to write
    producer page   position behind the newest slot
    data            mapped twice in a row, so that every stretch is in one piece

A slot is a head of eight bytes and a record of 64. A slot is busy from when its place is taken until its record is
written; interrupts take later places meanwhile. What lies behind a busy slot waits for it.

The pages are read without a barrier, which the loads of x86-64 do not need: it keeps them in order.
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
    """Records of a ring in a row."""

    __slots__ = ("end",)

    def __init__(self, records: RingRecords, end: int) -> None:
        super().__init__(records)
        self.end = end
        """Position in the ring behind the last of them."""


class CpuRing:
    """Follows the ring behind `fd`, whose size is `size` bytes. The file descriptor stays the caller's."""

    def __init__(self, cpu: int, fd: int, size: int) -> None:
        self.cpu: Final = cpu
        self._size = size
        self._ours = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._theirs = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._consumed: npt.NDArray[np.uint64] = np.frombuffer(self._ours, np.uint64, 1)
        self._produced: npt.NDArray[np.uint64] = np.frombuffer(self._theirs, np.uint64, 1)
        self._unreleased: deque[Taken] = deque()
        self._next = 0
        """Position of the oldest slot that was not taken."""
        self.seen = 0
        """Records that were taken so far."""

    def close(self) -> None:
        """Unmap the ring. Nothing may look into it any more."""
        self._unreleased.clear()
        del self._consumed, self._produced
        for one in (self._ours, self._theirs):
            try:
                one.close()
            except BufferError:
                pass  # somebody has a view, an error's traceback for instance; the last one unmaps

    @property
    def fill(self) -> float:
        """The share of the ring that holds what was taken and not given out, 0 to 1."""
        return (self._next - self._oldest()) / self._size

    @property
    def waiting(self) -> float:
        """The share of the ring that the programs have filled, 0 to 1."""
        return (int(self._produced[0]) - int(self._consumed[0])) / self._size

    def take(self) -> tuple[Taken | None, bool]:
        """What is new, if anything; and whether that is all that was begun before the call.

        Raises `SourceError` for what no ring can hold.
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
                f"bpf: the ring of CPU {self.cpu}: a slot of {heads[ready]} bytes, expected {RECORD.itemsize}: the"
                " programs are of another MACE"
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
        """Give back what was given out or copied, whole stretches and in order."""
        while self._unreleased and not self._unreleased[0].held:
            self._unreleased.popleft()
        self._consumed[0] = self._oldest()

    def copy_out(self) -> None:
        """Copy all that waits in the ring; the next `release` gives it back."""
        for taken in self._unreleased:
            taken.copy_out()

    def _oldest(self) -> int:
        """Position of the oldest record that is only in the ring."""
        if not self._unreleased:
            return self._next
        first = self._unreleased[0]
        return first.end - len(first.records) * SLOT_BYTES


def lost_before(records: RingRecords, told: int) -> npt.NDArray[np.int64]:
    """How many records of the CPU had been lost when each one was written, less `told`: never less than before.

    The programs tell the lower bits only, in the pad, the upper bytes of a record's last word: what is 2**23 or more
    ahead counts as not ahead.
    """
    words: npt.NDArray[Any] = records.view(WORDS)
    ahead = ((words[:, -1] >> np.uint64(64 - LOST_BITS)).astype(np.int64) - told) % _WRAP
    ahead[ahead >= _WRAP // 2] = 0
    return np.maximum.accumulate(ahead)


def is_sorted(records: RingRecords) -> bool:
    """Whether they are in order of time: an interrupt's records may lie before those of what it interrupted."""
    ts = records["ts_ns"]
    return bool((ts[1:] >= ts[:-1]).all())


def sorted_by_time(pieces: Sequence[RingRecords]) -> RingRecords:
    """Copies of all of these records, in order of time; equal ones stay in their order."""
    words = np.concatenate([piece.view(WORDS) for piece in pieces])
    ts = np.concatenate([piece["ts_ns"] for piece in pieces])
    return words[np.argsort(ts, kind="stable")].view(COLUMNS).reshape(-1)
