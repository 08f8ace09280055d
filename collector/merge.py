"""Merges the streams of several CPUs into one stream in time order.

The records of each CPU arrive in the order of its ring. A record may be passed on when no CPU can still deliver an
earlier one: the reader declares each CPU *complete* up to a time, and the watermark is the earliest of these times,
minus a hold-back.

The hold-back has two uses. A topology that is read a moment after the records it applies to still precedes them. And
the merge waits for a CPU that was interrupted between taking a record's time and storing the record (a virtual CPU can
lose its core for milliseconds there). Records that arrive even later are `late`: counted, but not passed on.

The order is time, then CPU, then place in the ring. It depends on the records alone, not on their division into batches
or on the order in which the CPUs were read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final

import numpy as np

from collector.watermark import Watermark
from contracts.hooks import Hook
from contracts.records import Batch

HOLD_BACK_NS: Final = 50_000_000
"""Hold-back for files, as in live capture: an event can be out of order by as long as its writer was delayed."""


class Merger(Watermark):
    """Merges batches of several CPUs; holds records of about the hold-back plus the reading interval in memory."""

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
        """Add records of one CPU, which follow in its ring those pushed before."""
        if not len(batch):
            return
        batch = self._without_late(_sorted(batch))
        if not len(batch):
            return
        waiting = self._waiting[cpu]
        # The ring's order is nearly that of time: a record can be earlier than its predecessor.
        while waiting and waiting[-1].ts_ns[-1] > batch.ts_ns[0]:
            batch = _sorted(Batch.concatenate([waiting.pop(), batch]))
        waiting.append(batch)

    def _without_late(self, batch: Batch) -> Batch:
        if self.given_ns is None or batch.ts_ns[0] >= self.given_ns:
            return batch
        # A marker means "after this time" and stays true when its time moves up to `given_ns`.
        marker = batch.hook == Hook.LOST
        moved = replace(batch, ts_ns=np.where(marker, np.maximum(batch.ts_ns, self.given_ns), batch.ts_ns))
        keep = moved.ts_ns >= self.given_ns
        self.late += int(len(keep) - keep.sum())
        return _sorted(moved[keep])

    def take(self, until_ns: int) -> Batch:
        """Remove and return all records before `until_ns`, in order.

        `until_ns` is at most the watermark, except at the end of the stream.
        """
        chosen = []
        for cpu in sorted(self._waiting):
            waiting = self._waiting[cpu]
            while waiting and waiting[0].ts_ns[0] < until_ns:
                batch = waiting.popleft()
                if batch.ts_ns[-1] < until_ns:
                    chosen.append((cpu, batch))
                    continue
                cut = int(np.searchsorted(batch.ts_ns, until_ns))
                chosen.append((cpu, batch[:cut]))
                waiting.appendleft(batch[cut:])
                break
        self.given_ns = until_ns if self.given_ns is None else max(self.given_ns, until_ns)
        merged = Batch.concatenate([batch for _, batch in chosen])
        if len({cpu for cpu, _ in chosen}) > 1:
            merged = _sorted(merged)
        return merged

    def flush(self) -> Batch:
        """Remove and return all remaining records, at the end of the stream."""
        last = max((int(w[-1].ts_ns[-1]) for w in self._waiting.values() if w), default=None)
        return Batch.empty() if last is None else self.take(last + 1)


def _sorted(batch: Batch) -> Batch:
    """Return the batch in order of time; records of equal time keep their order.

    numpy's stable sort is a timsort: for a few sorted runs it costs about as much as merging them.
    """
    if (batch.ts_ns[1:] >= batch.ts_ns[:-1]).all():
        return batch
    return batch[np.argsort(batch.ts_ns, kind="stable")]
