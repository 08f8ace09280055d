"""Follows the tasks in containers' network namespaces, and records when they copy packets.

    /proc, once a second: tasks of the namespaces ──► set_event_pid ──► sched_waking, sched_switch
                                                                        skb_copy_datagram_iovec: who reads

As in `collector.ftrace.scheduling`, the kernel selects the events by `set_event_pid`, and follows children by itself. A
task that enters a namespace from elsewhere, as those of `docker exec`, is found within `LOOK_S`; what it reads until
then has no known reader.
"""

from __future__ import annotations

import os
import time
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

import numpy as np

from collector.ftrace import tracefs
from collector.ftrace.scheduling import TaskTrace, number_of
from collector.machine.netns import occupied
from collector.pages.decoding import Located
from contracts.scheduling import Copies, TaskChanges, TaskReading

LOOK_S: Final = 1.0
"""Interval at which tasks are searched for."""
_COPY: Final = "skb:skb_copy_datagram_iovec"
_PIDS_A_WRITE: Final = 256


class ReaderTrace(TaskTrace):
    """`open` and `close` are a pair. All errors are `Unavailable` and `SourceError`."""

    EVENTS = (*TaskTrace.EVENTS, _COPY)

    def __init__(self) -> None:
        super().__init__()
        self._netns: dict[int, int] = {}
        """Inode of the network namespace of each followed task."""
        self._before: dict[int, int] = {}
        """The same at the search before: a task that has ended may still be in the rings."""
        self._looked_s = 0.0
        self._asked: AbstractSet[int] = frozenset()
        """The namespaces of the last search."""
        self._early = Copies.empty()
        """Copies that an earlier one, on a CPU that was read sooner, may still precede."""
        self._copied: list[Copies] = []

    def reading(self, netns: AbstractSet[int]) -> TaskReading:
        """Return what became of the tasks in these namespaces since the last call; needed a few times a second."""
        self.read()
        if time.monotonic() - self._looked_s >= LOOK_S or not netns <= self._asked:
            self._look(netns)
        found = Copies.concatenate([self._early, *self._copied])
        found = found[np.argsort(found.ts_ns, kind="stable")]
        ready = int(np.searchsorted(found.ts_ns, self.complete_ns))
        self._early, self._copied = found[ready:], []
        reading = TaskReading(TaskChanges.concatenate(self.changes), found[:ready], tuple(self.gaps))
        self.changes, self.gaps = [], []
        return reading

    def _look(self, netns: AbstractSet[int]) -> None:
        self._looked_s, self._asked = time.monotonic(), netns
        processes = occupied() if netns else {}
        found = {pid: inode for inode in netns for process in processes.get(inode, []) for pid in _tasks(process)}
        known = self._before | self._netns
        new = [str(pid) for pid in found if pid not in known]
        assert self._own.instance is not None
        for first in range(0, len(new), _PIDS_A_WRITE):
            tracefs.append(self._own.instance.path / "set_event_pid", " ".join(new[first : first + _PIDS_A_WRITE]))
        self._before, self._netns = self._netns, found
        self._family = {*self._before, *found}

    def _add_children(self) -> None:
        known = -1
        while len(self._family) > known:  # rings are read in no order of time
            known = len(self._family)
            for parent, child in self._forks:
                inode = self._netns.get(parent, self._before.get(parent))
                if inode is not None:
                    self._netns[child] = inode
                    self._family.add(child)
        self._forks = []

    def _take(self, found: Located) -> None:
        pid = number_of(found, self._forms[_COPY], "common_pid").astype(np.int32)
        known = self._before | self._netns
        netns = np.array([known.get(each, 0) for each in pid.tolist()], np.uint64)
        self._copied.append(Copies(found.ts, pid, netns))


def _tasks(process: int) -> list[int]:
    """Return the tasks of a process; none if it has ended."""
    try:
        return [int(name) for name in os.listdir(Path(f"/proc/{process}/task"))]  # noqa: PTH208 - names alone
    except OSError:
        return []
