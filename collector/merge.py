"""Streams of several CPUs -> one stream in time order.

Each CPU's records come in the order of its ring. A record may be given out when no CPU can still come with an earlier
one: each CPU is told to be *complete* up to a time, and the watermark is the earliest of these, less a hold-back.

The hold-back has two uses. A topology that was read a moment after the records it applies to still finds its place
before them. And a CPU that was interrupted between taking a record's time and storing it (a virtual CPU can lose its
core for milliseconds there) is waited for; what comes later than even that is `late`: not given out, but counted.

Given the same records the result is the same however they were cut into batches and in whatever order the CPUs were
read: ordered by time, then CPU, then place in the ring.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from collector.watermark import Watermark
from contracts.hooks import Hook
from contracts.records import Batch


class Merger(Watermark):
    """Holds what cannot be given out yet: memory is the rate times hold-back and pace of reading."""

    def __init__(self, hold_back_ns: int) -> None:
        super().__init__(hold_back_ns)
        self._waiting: dict[int, deque[Batch]] = {}

    def __len__(self) -> int:
        return sum(len(batch) for waiting in self._waiting.values() for batch in waiting)

    def add_cpu(self, cpu: int, complete_ns: int) -> None:
        """Wait for this CPU from now on; it has no record before `complete_ns`."""
        super().add_cpu(cpu, complete_ns)
        self._waiting[cpu] = deque()

    def push(self, cpu: int, batch: Batch) -> None:
        """Take records of one CPU, which follow those pushed before in its ring."""
        if not len(batch):
            return
        batch = self._without_late(_sorted(batch))
        if not len(batch):
            return
        waiting = self._waiting[cpu]
        # The ring's order is nearly that of time: a record can carry an earlier time than the one before it.
        while waiting and waiting[-1].ts_ns[-1] > batch.ts_ns[0]:
            batch = _sorted(Batch.concatenate([waiting.pop(), batch]))
        waiting.append(batch)

    def _without_late(self, batch: Batch) -> Batch:
        if self.given_ns is None or batch.ts_ns[0] >= self.given_ns:
            return batch
        # A marker says "after this time": it stays true when the time moves up to what was given out.
        marker = batch.hook == Hook.LOST
        moved = replace(batch, ts_ns=np.where(marker, np.maximum(batch.ts_ns, self.given_ns), batch.ts_ns))
        keep = moved.ts_ns >= self.given_ns
        self.late += int(len(keep) - keep.sum())
        return _sorted(moved[keep])

    def take(self, until_ns: int) -> Batch:
        """All records before `until_ns`, in order. `until_ns` is at most the watermark, except at the end."""
        chosen = []
        for cpu in sorted(self._waiting):
            waiting = self._waiting[cpu]
            while waiting and waiting[0].ts_ns[0] < until_ns:
                batch = waiting.popleft()
                cut = int(np.searchsorted(batch.ts_ns, until_ns))
                chosen.append((cpu, batch[:cut]))
                if cut < len(batch):
                    waiting.appendleft(batch[cut:])
                    break
        self.given_ns = until_ns if self.given_ns is None else max(self.given_ns, until_ns)
        merged = Batch.concatenate([batch for _, batch in chosen])
        if len({cpu for cpu, _ in chosen}) > 1:
            merged = _sorted(merged)
        return merged

    def flush(self) -> Batch:
        """All that is left, at the end of the stream."""
        last = max((int(w[-1].ts_ns[-1]) for w in self._waiting.values() if w), default=None)
        return Batch.empty() if last is None else self.take(last + 1)


def _sorted(batch: Batch) -> Batch:
    """In order of time; records of equal time stay as they are.

    A stable sort of a few runs that are sorted in themselves costs about a merge (numpy's is a timsort).
    """
    if (batch.ts_ns[1:] >= batch.ts_ns[:-1]).all():
        return batch
    return batch[np.argsort(batch.ts_ns, kind="stable")]
