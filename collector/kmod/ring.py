"""One CPU's ring as the module maps it: returns the records of sub-buffers as views, without copying.

    ┌────────────┬────────────┬─────
    │head records│head records│ ...      `subbufs` times `subbuf_bytes`, written and handed over round and round
    └────────────┴────────────┴─────

A sub-buffer that TAKE has handed over does not change until it is released. The reader releases a sub-buffer, in order,
once all of its records were passed on. A reader that has to wait for long can copy the records and release the ring's
memory.
"""

from __future__ import annotations

from collections import deque
from mmap import mmap
from typing import Final, Protocol

import numpy as np

from collector.kmod.device import TakenSubBuffers
from collector.live.stretch import RingRecords, Stretch
from contracts.abi import COLUMNS, RECORD, SUBBUF
from contracts.errors import SourceError


class Take(Protocol):
    """`MaceDevice.take` bound to one CPU."""

    def __call__(self, *, release: int, flush: bool) -> TakenSubBuffers: ...


class Subbuf(Stretch):
    """The records of one sub-buffer that were not passed on yet."""

    __slots__ = ("lost", "lost_from_ns")

    def __init__(self, records: RingRecords, lost: int = 0, lost_from_ns: int = 0) -> None:
        super().__init__(records)
        self.lost = lost
        """Records of this CPU that were lost right before the first record."""
        self.lost_from_ns = lost_from_ns
        """Time of the first lost record; 0 if none was lost."""


class CpuRing:
    """Reads one CPU's ring. `memory` has at least `subbufs` times `subbuf_bytes` and is never written."""

    def __init__(
        self, cpu: int, memory: mmap | bytearray | memoryview, subbuf_bytes: int, subbufs: int, take: Take
    ) -> None:
        self.cpu: Final = cpu
        self._subbufs = subbufs
        self._capacity = (subbuf_bytes - SUBBUF.itemsize) // RECORD.itemsize
        self._take = take
        self._heads: RingRecords = np.ndarray((subbufs,), SUBBUF, memory, 0, (subbuf_bytes,))
        self._records: list[RingRecords] = []
        for i in range(subbufs):
            one: RingRecords = np.ndarray((self._capacity,), COLUMNS, memory, i * subbuf_bytes + SUBBUF.itemsize)
            one.flags.writeable = False
            self._records.append(one)
        self._unreleased: deque[Subbuf] = deque()
        self._released = 0
        """Sub-buffers released so far, which is the number of the oldest unreleased one."""
        self.seen = 0
        """Records handed over so far."""
        self.was_full = False
        """Whether the ring was full at the last TAKE: then records may have been lost behind its last sub-buffer."""

    @property
    def fill(self) -> float:
        """The share of the ring that the reader holds, 0 to 1."""
        return sum(subbuf.held for subbuf in self._unreleased) / self._subbufs

    @property
    def releasable(self) -> float:
        """The share of the ring that the next `take` releases, 0 to 1."""
        return self._done() / self._subbufs

    def take(self, *, flush: bool) -> tuple[list[Subbuf], int]:
        """Release sub-buffers that were passed on; return new ones in order, and the time of the call (`now_ns`).

        With `flush` all records from before that time have been returned. Raises `SourceError` for an impossible ring,
        no part of which can be trusted.
        """
        release = self._done()
        taken = self._take(release=release, flush=flush)
        self.was_full = taken.ready + release == self._subbufs
        for _ in range(release):
            self._unreleased.popleft()
        self._released += release
        known = len(self._unreleased)
        if not known <= taken.ready <= self._subbufs or taken.first != self._released % self._subbufs:
            raise self._absurd(
                f"{taken.ready} sub-buffers are ready from {taken.first} on, expected {known} to {self._subbufs} from"
                f" {self._released % self._subbufs} on"
            )
        fresh = [self._open(self._released + n) for n in range(known, taken.ready)]
        self._unreleased.extend(fresh)
        return fresh, taken.now_ns

    def copy_out(self) -> None:
        """Copy all records that wait in the ring; the next `take` releases its sub-buffers."""
        for subbuf in self._unreleased:
            subbuf.copy_out()

    def _done(self) -> int:
        done = 0
        for subbuf in self._unreleased:
            if subbuf.held:
                break
            done += 1
        return done

    def _open(self, sequence: int) -> Subbuf:
        at = sequence % self._subbufs
        head = self._heads[at]
        found, cpu, records = int(head["sequence"]), int(head["cpu"]), int(head["records"])
        if found != sequence:
            raise self._absurd(f"sub-buffer {at} holds filling {found}, expected {sequence}")
        if cpu != self.cpu:
            raise self._absurd(f"sub-buffer {at} says that it is of CPU {cpu}")
        if records > self._capacity:
            raise self._absurd(f"sub-buffer {at} holds {records} records, and has room for {self._capacity}")
        self.seen += records
        return Subbuf(self._records[at][:records], int(head["lost"]), int(head["lost_from_ns"]))

    def _absurd(self, what: str) -> SourceError:
        return SourceError(f"the module's ring of CPU {self.cpu}: {what}: a defect of the module, please report")
