"""When tasks became ready, ran and stopped: the scheduler's events, as columns.

A *task* is a thread, as in the kernel. Times are CLOCK_MONOTONIC, ns.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from contracts.schema import Columns


class TaskChange(IntEnum):
    """What happened to a task."""

    WOKEN = 1
    """`sched_waking`: another task or an interrupt has made it ready."""
    RUNS = 2
    """`sched_switch` to it: a CPU runs it."""
    PREEMPTED = 3
    """`sched_switch` away from it, though it is ready."""
    SLEEPS = 4
    """`sched_switch` away from it, because it waits for something else than a CPU, or has been stopped."""
    ENDED = 5
    """`sched_switch` away from it for the last time."""


@dataclass(frozen=True, slots=True, eq=False)
class TaskChanges(Columns):
    """One row per change of a task, in order of time."""

    ts_ns: npt.NDArray[np.int64]
    pid: npt.NDArray[np.int32]
    """The kernel's number of the task, as in the initial PID namespace."""
    change: npt.NDArray[np.uint8]

    _DTYPES: ClassVar[dict[str, str]] = {"ts_ns": "<i8", "pid": "<i4", "change": "u1"}


@dataclass(frozen=True, slots=True, eq=False)
class Copies(Columns):
    """One row per packet that a task copied from a socket, in order of time."""

    ts_ns: npt.NDArray[np.int64]
    pid: npt.NDArray[np.int32]
    netns: npt.NDArray[np.uint64]
    """Inode of the task's network namespace."""

    _DTYPES: ClassVar[dict[str, str]] = {"ts_ns": "<i8", "pid": "<i4", "netns": "<u8"}


@dataclass(frozen=True, slots=True)
class TaskReading:
    """What became of the followed tasks since the reading before. Each reading follows the one before in time."""

    changes: TaskChanges
    copies: Copies
    gaps_ns: tuple[tuple[int, int], ...]
    """Stretches of CLOCK_MONOTONIC in which changes or copies were lost."""


ReadTasks = Callable[[AbstractSet[int]], TaskReading]
"""Follows the tasks in the network namespaces of these inodes, and returns what became of them since the last call."""


assert tuple(f.name for f in fields(TaskChanges)) == tuple(TaskChanges._DTYPES)
assert tuple(f.name for f in fields(Copies)) == tuple(Copies._DTYPES)
