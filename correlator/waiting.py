"""How long a tool was ready but not running, sample by sample, and how much of that is in its round trip time.

    tool     ── S ──┐                                  ┌─ woken ─── runs ── R (user clock) ──
             ready? └─ Q inner ─ ... ─ arrived ────────┘    ready, not running

A task waits for a CPU from the moment at which it is woken, or preempted, until it runs (`contracts.scheduling`). Q is
`net_dev_queue` of the request, *arrived* the response at the inner device as the tool's clock sees it
(`correlator.stamps`). Three durations follow for each sample:

- **sending**: the waits since the task last slept, up to Q. The wait before it read the clock makes it send late; only
  a wait between S and Q is in the round trip time.
- **receiving**: from the arrival, or from the wake-up after it, until the task runs. With the kernel's clock this is
  behind R.
- **temporal error**: the waits in the round trip time, S to R. S and R are known by their difference alone: the round
  trip time less the time from Q to the arrival is what remains for S to Q and, with the user's clock, for the arrival
  to R. With the kernel's clock this rest is all before Q, and S is known to the tool's resolution. With the user's
  clock the wait that follows the arrival is in it as a whole, and beside it only preemptions count: from S to Q the
  tool does not sleep. A wait counts only if it fits whole into the rest, so that the temporal error is never longer.
  If more waits are near than fit, the largest sum that was found to fit is taken.

**Which task?** The one that ran at Q, because a packet is queued in its sender's context. If none ran (the packet
waited for address resolution) or several did, the sample's task is known only if no other was there. The same
task is taken for the receiver.

A sample is unknown (-1) if it is not paired, if its task is not known, or if events were lost between the task's last
change before and its first after the sample. Lost are also the events that a task's own changes lack: a CPU that leaves
a task has turned to it before. A kernel may record no switch from its idle task on some CPU, and counts no loss then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints, Mask
from contracts.scheduling import TaskChange, TaskChanges
from contracts.schema import Columns
from correlator.correction import Corrections, Reason
from correlator.samples import Samples
from correlator.stamps import ReceiveClock, StampModel

UNKNOWN: Final = -1
_EVER: Final = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Waited(Columns):
    """One row per sample, in the order of the samples; all columns are `UNKNOWN` together."""

    send_ns: npt.NDArray[np.int64]
    receive_ns: npt.NDArray[np.int64]
    temporal_error_ns: npt.NDArray[np.int64]

    _DTYPES: ClassVar[dict[str, str]] = {"send_ns": "<i8", "receive_ns": "<i8", "temporal_error_ns": "<i8"}

    @classmethod
    def unknown(cls, count: int) -> Waited:
        """Return `count` unknown rows."""
        return cls(**{name: np.full(count, UNKNOWN, np.int64) for name in cls._DTYPES})

    @property
    def known(self) -> Mask:
        """Which rows are known."""
        known: Mask = self.temporal_error_ns != UNKNOWN
        return known


def waited_of(changes: TaskChanges, pid: Ints, begin: Ints, end: Ints, gaps_ns: Sequence[tuple[int, int]]) -> Ints:
    """Return how much of each stretch from `begin` to `end` the task `pid` waited, ns; `UNKNOWN` if that is not known.

    The task runs at `end`. All times are CLOCK_MONOTONIC; `gaps_ns` are stretches in which changes were lost.
    """
    found = np.full(len(pid), UNKNOWN, np.int64)
    for number, task in _tasks(changes[np.isin(changes.pid, pid)]).items():
        rows = np.flatnonzero((pid == number) & task.runs(end))
        found[rows] = task.overlap(begin[rows], end[rows], gaps_ns)
    return found


def waited(
    samples: Samples,
    corrections: Corrections,
    stamps: StampModel,
    changes: TaskChanges,
    gaps_ns: Sequence[tuple[int, int]],
    offset_ns: int,
) -> Waited:
    """Return how long the tool waited for a CPU, for each sample.

    `changes`: those of the tool's tasks. `gaps_ns`: stretches of CLOCK_MONOTONIC in which changes were lost.
    `offset_ns` is added to a time of `changes` to get the UTC of `corrections`.
    """
    found = Waited.unknown(len(samples))
    rows = np.flatnonzero(corrections.reason == Reason.PAIRED)
    rows = rows[np.argsort(corrections.sent_utc_ns[rows], kind="stable")]
    exchanges = _Exchanges.of(samples, corrections, rows, offset_ns)
    user = stamps.receive_clock is ReceiveClock.USER
    tasks = list(_tasks(changes).values())
    for task, mine in zip(tasks, _senders(tasks, exchanges), strict=True):
        values = task.waited(exchanges[mine], gaps_ns, user_clock=user)
        for name in Waited._DTYPES:
            getattr(found, name)[rows[mine]] = getattr(values, name)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Exchanges(Columns):
    """Paired samples in the order of sending. Times are CLOCK_MONOTONIC, ns."""

    sent: Ints
    """Q."""
    arrived: Ints
    rest: Ints
    """Round trip time without the time from Q to the arrival."""

    _DTYPES: ClassVar[dict[str, str]] = {"sent": "<i8", "arrived": "<i8", "rest": "<i8"}

    @classmethod
    def of(cls, samples: Samples, corrections: Corrections, rows: Ints, offset_ns: int) -> _Exchanges:
        sent = corrections.sent_utc_ns[rows] - offset_ns
        arrived = corrections.arrived_utc_ns[rows] - offset_ns
        rest = corrections.tool_rtt_ns[rows] + samples.resolution_ns[rows] - (arrived - sent)
        return cls(sent, arrived, np.maximum(rest, 0))


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Changes of one task, at least one, and its waits: one ends at each `RUNS`. Times in ns, ascending."""

    at: Ints
    """Times of all changes."""
    off_at: Ints
    """Times at which a CPU left the task or turned to it."""
    on: Mask
    """Whether the task runs from that time on."""
    start: Ints
    end: Ints
    woken: Mask
    """Whether the task had slept before the wait."""
    gaps: list[tuple[int, int]]
    """Stretches in which a CPU turned to the task, or left it, without a change that says so."""
    until: int
    """When the task ended; `_EVER` if it did not."""

    @classmethod
    def of(cls, changes: TaskChanges) -> _Task:
        at, change = changes.ts_ns, changes.change
        switched = np.flatnonzero(change != TaskChange.WOKEN)
        runs = np.flatnonzero(change == TaskChange.RUNS)
        # The change before each RUNS that took the CPU away; the first RUNS has none: it may have been woken.
        place = np.searchsorted(switched, runs) - 1
        left = switched[np.maximum(place, 0)]
        preempted = (place >= 0) & (change[left] == TaskChange.PREEMPTED)
        # Woken before its CPU had left it: the next change is RUNS at once, and the wait began when the CPU left.
        following = np.minimum(left + 1, runs)
        woken_at = np.where(change[following] == TaskChange.WOKEN, at[following], at[left])
        start = np.where(place < 0, at[:1], np.where(preempted, at[left], woken_at))
        ended = at[change == TaskChange.ENDED]
        off_at, on = at[switched], change[switched] == TaskChange.RUNS
        return cls(
            at, off_at, on, start, at[runs], ~preempted, _unsaid(off_at, on), int(ended[-1]) if len(ended) else _EVER
        )

    def runs(self, times: Ints) -> Mask:
        """Return whether the task runs at these times."""
        on = np.append(False, self.on)
        found: Mask = on[np.searchsorted(self.off_at, times, side="right")]
        return found

    def there(self, times: Ints) -> Mask:
        """Return whether the task had begun and not ended at these times."""
        found: Mask = (times >= self.at[0]) & (times < self.until)
        return found

    def waited(self, exchanges: _Exchanges, gaps_ns: Sequence[tuple[int, int]], *, user_clock: bool) -> Waited:
        """Return the waits of the exchanges, which are all this task's."""
        if not len(self.end):
            return Waited.unknown(len(exchanges))
        sent, arrived, rest = exchanges.sent, exchanges.arrived, exchanges.rest
        before = np.searchsorted(self.end, sent, side="right")  # number of waits before Q
        numbers = np.arange(len(self.end))
        last_woken = np.append(-1, np.maximum.accumulate(np.where(self.woken, numbers, -1)))[before]
        # Without a change that begins the wait, one may be lost between the change before and `RUNS`.
        slept = np.where(last_woken < 0, -_EVER, (self.start - (self.start == self.end))[last_woken])
        last_woken = np.maximum(last_woken, 0)

        next_run = np.searchsorted(self.end, arrived, side="right")
        idle = ~self.runs(arrived) & (next_run < len(self.end))
        following = np.minimum(next_run, len(self.end) - 1)
        runs_again = np.where(idle, self.end[following], arrived)
        receive = np.where(idle, runs_again - np.maximum(self.start[following], arrived), 0)

        if user_clock:
            behind = np.minimum(receive, rest)
            error = behind + self._awake(sent, before, last_woken, runs_again, rest - behind)
        else:
            error = self._total(np.searchsorted(self.start, sent - rest), before)
        gaps = [*gaps_ns, *self.gaps]
        end = np.maximum(runs_again, arrived + rest)
        torn = self._torn(sent - rest, end, gaps)

        # Waits that belong to the sample before are not this one's; when it ran again, a torn one does not say.
        earlier, certain = (
            np.append(-_EVER, np.maximum.accumulate(times)[:-1])[: len(sent)]
            for times in (np.maximum(sent, runs_again), np.where(torn, sent, np.maximum(sent, runs_again)))
        )
        send, otherwise = (
            self._total(np.maximum(last_woken, np.searchsorted(self.end, times, side="right")), before)
            for times in (earlier, certain)
        )
        begin = np.minimum(sent - rest, np.maximum(certain, slept))
        unknown = self._torn(begin, end, gaps) | (send != otherwise)
        columns = {"send_ns": send, "receive_ns": receive, "temporal_error_ns": error}
        return Waited(**{name: np.where(unknown, UNKNOWN, values) for name, values in columns.items()})

    def overlap(self, begin: Ints, end: Ints, gaps_ns: Sequence[tuple[int, int]]) -> Ints:
        """Return how much of each stretch from `begin` to `end` the task waited; `UNKNOWN` where changes were lost."""
        before = self._until(end) - self._until(begin)
        # A first `RUNS` without a change before it may have ended a wait of any length.
        unseen = [(-_EVER, int(self.end[0]) - 1)] if len(self.end) and self.start[0] == self.end[0] else []
        found: Ints = np.where(self._torn(begin, end, [*gaps_ns, *self.gaps, *unseen]), UNKNOWN, before)
        return found

    def _until(self, times: Ints) -> Ints:
        """Return the sum of the waits up to these times, of a wait that lasts beyond it the part before."""
        ended = np.searchsorted(self.end, times, side="right")
        begun = np.append(self.start, _EVER)[ended]
        whole: Ints = self._total(np.zeros(len(times), np.int64), ended) + np.maximum(times - begun, 0)
        return whole

    def _awake(self, sent: Ints, before: Ints, last_woken: Ints, runs_again: Ints, rest: Ints) -> Ints:
        """Return the preemptions from S to Q and from `runs_again` to R, as long in sum as fits into `rest`.

        The tool does not sleep in either stretch. Where S and R are within `rest` is not known: what fits on one side
        may leave no room for the other, so that both orders are tried.
        """
        woken = np.append(np.flatnonzero(self.woken), len(self.woken))
        after = np.searchsorted(self.start, runs_again)
        next_woken = woken[np.searchsorted(woken, after)]

        def ahead(room: Ints) -> Ints:
            return self._total(np.maximum(last_woken + 1, np.searchsorted(self.start, sent - room)), before)

        def behind(room: Ints) -> Ints:
            last = np.searchsorted(self.end, runs_again + room, side="right")
            return self._total(after, np.minimum(last, next_woken))

        first, second = ahead(rest), behind(rest)
        longest: Ints = np.maximum(first + behind(rest - first), second + ahead(rest - second))
        return longest

    def _total(self, first: Ints, last: Ints) -> Ints:
        """Return the sum of the waits numbered `first` to `last` - 1, ns; 0 if there is none."""
        sums = np.append(0, np.cumsum(self.end - self.start))
        total: Ints = sums[np.maximum(first, last)] - sums[first]
        return total

    def _torn(self, begin: Ints, end: Ints, gaps_ns: Sequence[tuple[int, int]]) -> Mask:
        """Return where changes were lost between the last change before `begin` and the first after `end`."""
        edges = np.concatenate([[-_EVER], self.at, [_EVER]])
        since = edges[np.searchsorted(self.at, begin, side="right")]
        until = edges[np.searchsorted(self.at, end, side="left") + 1]
        if not gaps_ns:
            return np.zeros(len(begin), np.bool_)
        first, last = np.array(sorted(gaps_ns)).T
        place = np.searchsorted(first, until, side="right") - 1
        torn: Mask = (place >= 0) & (np.maximum.accumulate(last)[np.maximum(place, 0)] >= since)
        return torn


def _unsaid(off_at: Ints, on: Mask) -> list[tuple[int, int]]:
    """Return the gaps of a task in whose changes a CPU leaves it, or turns to it, twice in a row."""
    same = np.flatnonzero(on[1:] == on[:-1])
    gaps = list(zip((off_at[same] + 1).tolist(), (off_at[same + 1] - 1).tolist(), strict=True))
    return gaps if on[:1].any() else [(-_EVER, int(off_at[0]) - 1 if len(off_at) else _EVER), *gaps]


def _tasks(changes: TaskChanges) -> dict[int, _Task]:
    """Return the tasks by their number, in its order."""
    by_task = changes[np.argsort(changes.pid, kind="stable")]
    numbers, first = np.unique(by_task.pid, return_index=True)
    edges = pairwise([*first.tolist(), len(by_task)])
    return {n: _Task.of(by_task[begin:end]) for n, (begin, end) in zip(numbers.tolist(), edges, strict=True)}


def _senders(tasks: Sequence[_Task], exchanges: _Exchanges) -> list[Ints]:
    """Return for each task the rows of the exchanges that are its own."""
    sent = exchanges.sent
    running, there = (np.zeros(len(sent), np.int64) for _ in range(2))
    for task in tasks:
        running += task.runs(sent)
        there += task.there(sent)
    return [
        np.flatnonzero(((running == 1) & task.runs(sent)) | ((running == 0) & (there == 1) & task.there(sent)))
        for task in tasks
    ]


assert tuple(f.name for f in fields(Waited)) == tuple(Waited._DTYPES)
assert tuple(f.name for f in fields(_Exchanges)) == tuple(_Exchanges._DTYPES)
