"""Follows the receive softirq (NET_RX) of each CPU, from a trace instance of its own.

    softirq_raise ┈┈ wait ┈┈ softirq_entry ── run ── softirq_exit

A raise marks the softirq as pending on its CPU; the CPU runs it when an interrupt ends, or in its task ksoftirqd if
softirqs take too long. The wait is from the first raise after the entry before, which is the oldest work that waits.
The wait of an entry whose raise was not seen (lost, or before the tracer was on) is not known.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from collector.ftrace import tracefs
from collector.ftrace.own_instance import OwnInstance
from collector.pages.decoding import PageDecoder, Stretch
from collector.pages.formats import parse_format
from contracts import histogram
from contracts.arrays import Bytes, Ints
from contracts.cpus import SoftirqCounts

_EVENTS: Final = ("irq:softirq_raise", "irq:softirq_entry", "irq:softirq_exit")
_RAISE, _ENTRY, _EXIT = range(3)
_NET_RX: Final = 3
"""Number of the receive softirq (include/linux/interrupt.h)."""
_RING_KIB: Final = 4096
"""Memory of each CPU's ring, KiB: 200,000 events of 20 bytes, a second of 70,000 softirqs."""


@dataclass(slots=True)
class SoftirqEvents:
    """Events of one CPU in order of time, as arrays of equal length."""

    ts_ns: Ints
    kind: Bytes
    """0 raise, 1 entry, 2 exit."""
    pid: Ints
    """Task that was interrupted, or ksoftirqd."""

    def __len__(self) -> int:
        return len(self.ts_ns)

    def __getitem__(self, index: Ints) -> SoftirqEvents:
        return SoftirqEvents(self.ts_ns[index], self.kind[index], self.pid[index])

    def __add__(self, later: SoftirqEvents) -> SoftirqEvents:
        return SoftirqEvents(
            np.concatenate([self.ts_ns, later.ts_ns]),
            np.concatenate([self.kind, later.kind]),
            np.concatenate([self.pid, later.pid]),
        )


def _none() -> SoftirqEvents:
    return SoftirqEvents(np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.int64))


@dataclass(slots=True)
class SoftirqCounter:
    """Counts the softirqs of one CPU."""

    cpu: int
    count: int = 0
    by_ksoftirqd: int = 0
    run_ns: int = 0
    lost: int = 0
    _open: SoftirqEvents = field(default_factory=_none)
    """Events that the softirq of a later exit may need."""
    _waits: list[Ints] = field(default_factory=list)

    def add(self, events: SoftirqEvents, ksoftirqd: Ints) -> None:
        """Count the softirqs that the next events complete. `ksoftirqd` are the numbers of these tasks."""
        events = self._open + events
        entries, exits = (np.flatnonzero(events.kind == kind) for kind in (_ENTRY, _EXIT))
        ended = np.searchsorted(exits, entries)
        complete = ended < len(exits)
        # An entry whose exit is that of a later entry has lost its own.
        complete[:-1] &= ended[:-1] < np.searchsorted(exits, entries[1:])
        last = entries[complete][-1] if complete.any() else -1
        raises = np.flatnonzero(events.kind == _RAISE)
        before = np.append(-1, entries[:-1])
        first = np.searchsorted(raises, before, "right")
        raised = np.append(raises, len(events))[first]
        known = complete & (raised < entries)
        ts = events.ts_ns
        self.count += int(complete.sum())
        self.by_ksoftirqd += int(np.isin(events.pid[entries[complete]], ksoftirqd).sum())
        self.run_ns += int((ts[exits[ended[complete]]] - ts[entries[complete]]).sum())
        self._waits.append(ts[entries[known]] - ts[raised[known]])
        rest = np.arange(last + 1, len(events))
        kind = events.kind[rest]
        # Of raises in a row the first counts; an exit without its entry has no use.
        again = np.append(False, (kind[1:] == _RAISE) & (kind[:-1] == _RAISE))
        self._open = events[rest[~again & ((kind != _EXIT) | (np.cumsum(kind == _ENTRY) > 0))]]

    def gap(self, lost: int) -> None:
        """Forget what is open, because the ring lost events."""
        self.lost += lost
        self._open = _none()

    def taken(self, utc_ns: int) -> SoftirqCounts:
        """Return the counts since the last call."""
        waits = np.concatenate([np.zeros(0, np.int64), *self._waits])
        bins, counts = np.unique(histogram.bins_of(waits), return_counts=True)
        found = SoftirqCounts(
            utc_ns,
            self.cpu,
            self.count,
            self.by_ksoftirqd,
            self.run_ns,
            int(waits.sum()),
            int(waits.max(initial=0)),
            self.lost,
            bins.astype(np.int64),
            counts.astype(np.int64),
        )
        self.count = self.by_ksoftirqd = self.run_ns = self.lost = 0
        self._waits = []
        return found


class SoftirqTrace:
    """The receive softirqs of all CPUs. `open` and `close` are a pair. All errors are `Unavailable` and `SourceError`.

    `read` must be called a few times a second, because the rings hold the events of a second.
    """

    def __init__(self) -> None:
        self._own = OwnInstance()
        self._counters: dict[int, SoftirqCounter] = {}

    def open(self) -> None:
        """Begin to follow the softirqs."""
        self._own.open(self._prepare)

    def _prepare(self, instance: tracefs.Instance) -> None:
        instance.set_clock("mono")
        instance.set_ring_size(_RING_KIB)
        self._forms = [parse_format(name, instance.event_format(name)) for name in _EVENTS]
        self._decoder = PageDecoder(self._own.buffer.layout, ())
        self._open_cpus()
        for event in _EVENTS:
            instance.set_filter(event, f"vec == {_NET_RX}")
            instance.enable(event)
        instance.record(on=True)

    def read(self) -> None:
        """Read what the rings hold, and count it."""
        if self._own.instance is None:
            return
        self._open_cpus()
        for stretch in self._own.taken():
            self._count(stretch)

    def taken(self) -> list[SoftirqCounts]:
        """Read, and return the counts of each CPU since the last call."""
        self.read()
        utc_ns = time.time_ns()
        return [counter.taken(utc_ns) for counter in self._counters.values()]

    def close(self) -> None:
        """Remove the instance. Safe to call again."""
        self._own.close()

    def _open_cpus(self) -> None:
        if new := self._own.open_cpus():
            self._ksoftirqd = ksoftirqd()
        for cpu in new:
            self._counters.setdefault(cpu, SoftirqCounter(cpu))

    def _count(self, stretch: Stretch) -> None:
        found = self._decoder.locate(self._own.buffer.bytes, [stretch])
        ids = found.ids()
        kind = np.full(len(ids), 255, np.uint8)
        for number, form in enumerate(self._forms):
            kind[ids == form.id] = number
        pid_at = self._forms[0].field("common_pid").offset // 4
        pid = found.words.take(found.at + pid_at, mode="clip").astype(np.int64)
        events = SoftirqEvents(found.ts, kind, pid)
        counter, first, done = self._counters[stretch.cpu], found.first, 0
        for page, lost in sorted(found.missed.items()):
            counter.add(events[np.arange(done, int(first[page]))], self._ksoftirqd)
            counter.gap(lost or 1)
            done = int(first[page])
        counter.add(events[np.arange(done, len(events))], self._ksoftirqd)


def ksoftirqd() -> Ints:
    """Return the numbers of the CPUs' tasks for softirqs, as events have them; int64."""
    found = []
    for each in Path("/proc").glob("[0-9]*/comm"):
        try:
            if each.read_text().startswith("ksoftirqd/"):
                found.append(int(each.parent.name))
        except OSError:
            continue
    return np.array(found, np.int64)
