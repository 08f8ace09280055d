"""Follows the tasks of one program through the kernel's scheduler, from a trace instance of its own.

The kernel itself selects the events: `set_event_pid` of an instance holds task numbers, and `sched_switch` and
`sched_waking` are recorded if the task that leaves, arrives or is woken is among them. With the option `event-fork` the
kernel adds the children and threads of these tasks (Documentation/trace/events.rst, "Event filtering";
kernel/trace/trace_events.c, `event_filter_pid_sched_switch_probe_pre`). The calling thread is in the list before it
starts the program, so that not even the program's first event is missing. `sched_process_fork` then says which tasks
descend from the program.
"""

from __future__ import annotations

import threading
import time
from typing import ClassVar, Final

import numpy as np

from collector.ftrace import tracefs
from collector.ftrace.own_instance import OwnInstance
from collector.pages.decoding import Located, PageDecoder, Stretch
from collector.pages.formats import EventFormat, parse_format
from contracts.arrays import Ints
from contracts.errors import SourceError
from contracts.scheduling import TaskChange, TaskChanges

_SWITCH: Final = "sched:sched_switch"
_WAKING: Final = "sched:sched_waking"
_FORK: Final = "sched:sched_process_fork"
_RING_KIB: Final = 1024
"""Memory of each CPU's ring, KiB: 15,000 events of 70 bytes. A flood of 10,000 samples a second, with three events
each, fills it in half a second, the longest time between two readings."""
_READY: Final = 0xFF
"""`prev_state` is 0 in these bits if the task is ready; bit 8 says that it was preempted (include/linux/sched.h,
TASK_REPORT_MAX; include/trace/events/sched.h, `__trace_sched_switch_state`)."""
_GONE: Final = 0x30
"""EXIT_DEAD | EXIT_ZOMBIE (include/linux/sched.h)."""
_SETTLE_S: Final = 0.01
"""Pause between switching the tracer off and the last reading, in which probes that are running still commit, s."""
_NEVER: Final = 1 << 62


class TaskTrace:
    """The changes of one program's tasks. `open` and `close` are a pair; `open` in the thread that starts the program.

    `changes` and `gaps` grow by `read`. All errors are `Unavailable` and `SourceError`.
    """

    EVENTS: ClassVar[tuple[str, ...]] = (_SWITCH, _WAKING, _FORK)

    def __init__(self, ring_kib_per_cpu: int = _RING_KIB) -> None:
        self._ring_kib = ring_kib_per_cpu
        self._own = OwnInstance()
        self._last_ns: dict[int, int] = {}
        """CPU -> time of its last event."""
        self._family: set[int] = set()
        self._forks: list[tuple[int, int]] = []
        """Parent and child of forks whose parent is not, or not yet, known as one of the program's tasks."""
        self._waiting = TaskChanges.empty()
        """Changes that an earlier one, on a CPU that was read sooner, may still precede."""
        self.changes: list[TaskChanges] = []
        """The program's changes up to `complete_ns`, in order of time; each part follows the one before."""
        self.gaps: list[tuple[int, int]] = []
        """Stretches of time, CLOCK_MONOTONIC ns, in which a ring lost events."""
        self.complete_ns = 0

    def open(self) -> None:
        """Begin to follow the calling thread and whatever it starts."""
        self._own.open(self._prepare)

    def _prepare(self, instance: tracefs.Instance) -> None:
        instance.set_clock("mono")
        instance.set_option("overwrite", on=True)
        instance.set_option("event-fork", on=True)
        instance.set_ring_size(self._ring_kib)
        self._forms = {name: parse_format(name, instance.event_format(name)) for name in self.EVENTS}
        self._decoder = PageDecoder(self._own.buffer.layout, ())
        self._began_ns = self.complete_ns = time.monotonic_ns()
        self._open_cpus()
        tracefs.write(instance.path / "set_event_pid", str(threading.get_native_id()))
        for event in self._forms:
            instance.enable(event)
        instance.record(on=True)

    def _open_cpus(self) -> None:
        for cpu in self._own.open_cpus():
            self._last_ns[cpu] = self.complete_ns

    def follow(self, pid: int) -> None:
        """Choose the process, started by the thread that called `open`, whose tasks `changes` is about."""
        self._family.add(pid)

    def read(self) -> None:
        """Read what the rings hold. It costs a fraction of a millisecond, and must happen a few times a second."""
        if self._own.instance is None:
            return
        self._open_cpus()
        began_ns = time.monotonic_ns()
        self._read(began_ns)

    def finish(self) -> None:
        """Stop the tracer, read the rest, and account for losses that no page has a count of."""
        if self._own.instance is None:
            return
        self._own.instance.record(on=False)
        time.sleep(_SETTLE_S)
        self._read(_NEVER)
        lost = sum(self._own.instance.stats(cpu).lost for cpu in self._own.cpus)
        if lost and not self.gaps:
            self.gaps.append((self._began_ns, time.monotonic_ns()))

    def close(self) -> None:
        """Remove the instance. Safe to call again."""
        self._own.close()

    # --- reading --------------------------------------------------------------------------------

    def _read(self, complete_ns: int) -> None:
        parts = [self._waiting]
        parts += (self._decode(stretch) for stretch in self._own.taken())
        self._add_children()
        found = TaskChanges.concatenate(parts)
        if not self._family:  # the program has not been started
            self._waiting = found
            return
        found = found[np.argsort(found.ts_ns, kind="stable")]
        ready = int(np.searchsorted(found.ts_ns, complete_ns))
        ours = found[:ready]
        ours = ours[np.isin(ours.pid, list(self._family))]
        if len(ours):
            self.changes.append(ours)
        self._waiting = found[ready:]
        self.complete_ns = complete_ns

    def _decode(self, stretch: Stretch) -> TaskChanges:
        found = self._decoder.locate(self._own.buffer.bytes, [stretch])
        for page in found.missed:
            first = int(found.first[page])
            after = int(found.ts[first]) if first < len(found.ts) else time.monotonic_ns()
            before = int(found.ts[first - 1]) if first else self._last_ns[stretch.cpu]
            self.gaps.append((before, after))
        if len(found.ts):
            self._last_ns[stretch.cpu] = int(found.ts[-1])
        ids = found.ids()
        switch, waking, fork, *more = (found[np.flatnonzero(ids == form.id)] for form in self._forms.values())
        for each in more:
            self._take(each)
        parents, children = (number_of(fork, self._forms[_FORK], name) for name in ("parent_pid", "child_pid"))
        self._forks += zip(parents.tolist(), children.tolist(), strict=True)
        return TaskChanges.concatenate([*self._switches(switch), self._wakings(waking)])

    def _take(self, found: Located) -> None:
        """Note the events that a subclass records beside those of the scheduler, of one of its kinds."""

    def _add_children(self) -> None:
        """Add the tasks that the program's tasks have started; rings are read in no order of time."""
        known = -1
        while len(self._family) > known:
            known = len(self._family)
            self._family.update(child for parent, child in self._forks if parent in self._family)
        self._forks = [(parent, child) for parent, child in self._forks if parent not in self._family]

    def _switches(self, found: Located) -> list[TaskChanges]:
        form = self._forms[_SWITCH]
        state = number_of(found, form, "prev_state")
        left = np.where(state & _READY == 0, TaskChange.PREEMPTED, TaskChange.SLEEPS)
        left = np.where(state & _GONE, TaskChange.ENDED, left)
        return [
            TaskChanges(found.ts, number_of(found, form, "prev_pid").astype(np.int32), left.astype(np.uint8)),
            _all(TaskChange.RUNS, found, number_of(found, form, "next_pid")),
        ]

    def _wakings(self, found: Located) -> TaskChanges:
        return _all(TaskChange.WOKEN, found, number_of(found, self._forms[_WAKING], "pid"))


def _all(change: TaskChange, found: Located, pid: Ints) -> TaskChanges:
    return TaskChanges(found.ts, pid.astype(np.int32), np.full(len(pid), change, np.uint8))


def number_of(found: Located, form: EventFormat, name: str) -> Ints:
    """Return an integer field's lowest four bytes, unsigned."""
    field = form.field(name)
    if field.size not in (4, 8) or field.offset % 4:
        raise SourceError(f"{form.event}: field {name!r} has {field.size} bytes at {field.offset}, expected 4 or 8")
    return found.words.take(found.at + field.offset // 4, mode="clip").astype(np.int64)
