"""How much of a packet's delivery its reader waited for a CPU.

    packet   netif_receive_skb ────────────────────────────► copied to the reader
    reader          sleeps, or runs │ ready, not running │ runs
                                    └────── waiting ─────┘

The kernel copies a packet in the context of the task that reads it, and a tracer of tasks records that task
(`contracts.scheduling.Copies`). Its own time of a copy differs from the packet's record by the cost of two probes. The
reader is the followed task of the device's network namespace that copied a packet then; if several tasks of the
namespace copied one, the reader is not known. Waits are as `correlator.waiting` defines them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.scheduling import Copies, TaskChange, TaskChanges, TaskReading
from contracts.schema import Delays, Segment
from correlator.waiting import UNKNOWN, waited_of

NEAR_NS: Final = 10_000
"""Longest time between the packet's record of a copy and the tracer's: an interrupt may come between the probes."""
_KEPT: Final = 4
"""Last changes of a task that are kept although all packets before them are settled: they say what it does since."""
_MOST_GAPS: Final = 1000
"""Beyond that number the earlier gaps become one, in which nothing is known."""


class Readers:
    """The followed tasks of one stream. `offset_ns` is added to CLOCK_MONOTONIC to get UTC."""

    def __init__(self, offset_ns: int) -> None:
        self._offset_ns = offset_ns
        self._changes = TaskChanges.empty()
        self._copies = Copies.empty()
        self._gaps: list[tuple[int, int]] = []

    def add(self, reading: TaskReading) -> None:
        """Add the next reading of the tracer."""
        self._changes = TaskChanges.concatenate([self._changes, reading.changes])
        self._copies = Copies.concatenate([self._copies, reading.copies])
        self._gaps += reading.gaps_ns

    def waits(self, delays: Delays, netns: Ints) -> Delays:
        """Return a row of segment `WAITING` for each delivery in `delays` whose reader and its waits are known.

        `netns`: inode of the network namespace of each device that the rows refer to.
        """
        rows = delays[np.flatnonzero(delays.segment == Segment.DELIVERY)]
        begin = rows.utc_ns - self._offset_ns
        end = begin + rows.delay_ns
        pid, at_ns = self._readers(end, netns[rows.device])
        # The task ran when it copied, also where the packet's record says a little before or after.
        waited = waited_of(self._changes, pid, begin, np.maximum(at_ns, begin), self._gaps)
        waited = np.where(waited == UNKNOWN, UNKNOWN, np.minimum(waited, rows.delay_ns))
        segment = np.full(len(rows), Segment.WAITING, np.uint8)
        found = replace(rows, delay_ns=waited, segment=segment)
        return found[np.flatnonzero(waited != UNKNOWN)]

    def forget(self, before_utc_ns: int) -> None:
        """Drop what no packet that is not settled by that time can need."""
        before_ns = before_utc_ns - self._offset_ns
        self._copies = self._copies[int(np.searchsorted(self._copies.ts_ns, before_ns - NEAR_NS)) :]
        changes = self._changes[np.argsort(self._changes.pid, kind="stable")]
        if not len(changes):
            return
        edges = np.flatnonzero(np.r_[True, np.diff(changes.pid) != 0, True])
        last = np.repeat(edges[1:], np.diff(edges))
        later = np.append(np.cumsum((changes.ts_ns < before_ns)[::-1])[::-1], 0)
        # How many changes before the time follow in the same task, this one included.
        place = later[:-1] - later[last]
        ended = np.repeat(changes.change[edges[1:] - 1] == TaskChange.ENDED, np.diff(edges))
        kept = (changes.ts_ns >= before_ns) | ((place <= _KEPT) & ~ended)
        changes = changes[np.flatnonzero(kept)]
        self._changes = changes[np.argsort(changes.ts_ns, kind="stable")]
        # A gap matters to a task that has not changed since.
        oldest = int(self._changes.ts_ns[0]) if len(self._changes) else before_ns
        self._gaps = [gap for gap in self._gaps if gap[1] >= min(oldest, before_ns)]
        if len(self._gaps) > _MOST_GAPS:
            early, self._gaps = self._gaps[: -_MOST_GAPS // 2], self._gaps[-_MOST_GAPS // 2 :]
            self._gaps.insert(0, (min(first for first, _ in early), max(end for _, end in early)))

    def _readers(self, end: Ints, netns: Ints) -> tuple[Ints, Ints]:
        """Return the task that copied each packet, -1 if it is not known, and the tracer's time of the copy."""
        copies = self._copies
        pid, at_ns = np.full(len(end), -1, np.int64), end.copy()
        for inode in np.unique(netns).tolist():
            mine = np.flatnonzero(netns == inode)
            there = copies[np.flatnonzero(copies.netns == inode)]
            if not len(there):
                continue
            first = np.searchsorted(there.ts_ns, end[mine] - NEAR_NS)
            last = np.searchsorted(there.ts_ns, end[mine] + NEAR_NS, side="right")
            # All copies in reach are one task's if no other task's is between the first and the last.
            task = np.append(0, np.cumsum(np.diff(there.pid) != 0))
            one = (last > first) & (task[np.minimum(first, len(task) - 1)] == task[np.maximum(last - 1, 0)])
            near = np.maximum(np.minimum(np.searchsorted(there.ts_ns, end[mine]), last - 1), 0)
            before = np.maximum(near - 1, 0)
            closer = np.abs(there.ts_ns[before] - end[mine]) < np.abs(there.ts_ns[near] - end[mine])
            near = np.where(closer, before, near)
            pid[mine] = np.where(one, there.pid[near], -1)
            at_ns[mine] = np.where(one, there.ts_ns[near], end[mine])
        return pid, at_ns
