"""One CPU's ring as the module maps it: sub-buffers in, views of their records out, nothing copied.

    ┌────────────┬────────────┬─────
    │head records│head records│ ...      `subbufs` times `subbuf_bytes`, written and handed over round and round
    └────────────┴────────────┴─────

What TAKE has handed over stays as it is until it is released. A sub-buffer is released once all of its records were
given out, whole and in order; a reader that has to wait for long can copy what it holds and let the ring go on.
"""

from __future__ import annotations

from collections import deque
from mmap import mmap
from typing import Final, Protocol

import numpy as np

from collector.kmod.device import Taken
from collector.live.stretch import Records, Stretch
from contracts.abi import COLUMNS, RECORD, SUBBUF
from contracts.errors import SourceError


class Take(Protocol):
    """`MaceDevice.take` of one CPU."""

    def __call__(self, *, release: int, flush: bool) -> Taken: ...


class Subbuf(Stretch):
    """The records of one sub-buffer that are still to be given out."""

    __slots__ = ("lost", "lost_from_ns")

    def __init__(self, records: Records, lost: int = 0, lost_from_ns: int = 0) -> None:
        super().__init__(records)
        self.lost = lost
        """Records of this CPU that were lost right before the first of them."""
        self.lost_from_ns = lost_from_ns
        """Time of the first of those; 0 if none was."""


class CpuRing:
    """Follows one ring. `memory` is at least `subbufs` times `subbuf_bytes`, and only ever read."""

    def __init__(
        self, cpu: int, memory: mmap | bytearray | memoryview, subbuf_bytes: int, subbufs: int, take: Take
    ) -> None:
        self.cpu: Final = cpu
        self._subbufs = subbufs
        self._capacity = (subbuf_bytes - SUBBUF.itemsize) // RECORD.itemsize
        self._take = take
        self._heads: Records = np.ndarray((subbufs,), SUBBUF, memory, 0, (subbuf_bytes,))
        self._records: list[Records] = []
        for i in range(subbufs):
            one: Records = np.ndarray((self._capacity,), COLUMNS, memory, i * subbuf_bytes + SUBBUF.itemsize)
            one.flags.writeable = False
            self._records.append(one)
        self._unreleased: deque[Subbuf] = deque()
        self._released = 0
        """Sub-buffers that were released so far: the number of the oldest that is not."""
        self.seen = 0
        """Records that were handed over so far."""
        self.was_full = False
        """Whether the ring had no room left when TAKE was called last: then records may be missing at its end."""

    @property
    def fill(self) -> float:
        """The share of the ring that the reader holds, 0 to 1."""
        return sum(subbuf.held for subbuf in self._unreleased) / self._subbufs

    @property
    def releasable(self) -> float:
        """The share of the ring that the next `take` releases, 0 to 1."""
        return self._done() / self._subbufs

    def take(self, *, flush: bool) -> tuple[list[Subbuf], int]:
        """Release what was given out, and learn what is new: sub-buffers in order, and until when that is all (ns).

        Raises `SourceError` for what no ring can hold: then nothing that is in it can be believed.
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
        """Copy all that waits in the ring; the next `take` releases it."""
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
