"""Follows when a tool's tasks were ready and when they ran, while the tool runs: for `mace ping` and `mace wrap`.

What cannot be known is said and stops nothing: the round trips are measured and corrected all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from collector.ftrace.scheduling import TaskTrace
from collector.machine.cgroups import CpuGroups, CpuWant, cpu_want
from contracts.errors import MaceError
from contracts.scheduling import TaskChanges
from correlator.correction import Corrections
from correlator.samples import Samples
from correlator.stamps import StampModel
from correlator.waiting import Waited, waited

_BEFORE_NS: Final = 1_000_000_000
"""Changes this much older than a sample are not searched for its task's state, if the sample is shown early."""


@dataclass(frozen=True, slots=True)
class Followed:
    """How long a tool waited for a CPU, and what its control groups and the kernel counted meanwhile."""

    waited: Waited
    """One row per sample."""
    why_not: str
    """Why the waits are not known; empty if they are."""
    want: CpuWant | None
    lasted_ns: int

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON.

        The keys are `known` (number of samples), `why_not` (text or None), and, or None where the kernel does not say:
        `throttled` (periods), `throttled_ns`, `pressure_ns` (time in which a task waited for a CPU) and `lasted_ns`.
        """
        want = self.want or CpuWant(None, None, None)
        return {
            "known": int(self.waited.known.sum()),
            "why_not": self.why_not or None,
            "throttled": want.throttled,
            "throttled_ns": want.throttled_ns,
            "pressure_ns": want.pressure_ns,
            "lasted_ns": self.lasted_ns if self.want else None,
        }

    def remarks(self) -> Iterator[str]:
        """Yield what people should know beside the figures."""
        if self.why_not:
            yield f"waiting for a CPU is not known: {self.why_not}"
        if self.want is None:
            return
        if self.want.throttled:
            took = (self.want.throttled_ns or 0) / 1e6
            yield f"the tool's control group used up its CPU quota {self.want.throttled:,} times, for {took:,.1f} ms"
        if self.want.pressure_ns is not None and self.lasted_ns and self.want.pressure_ns > self.lasted_ns // 100:
            share = min(self.want.pressure_ns / self.lasted_ns, 1)
            yield f"pressure (PSI): some task waited for a CPU in {share:.0%} of the time"


class Following:
    """The tasks of one tool. `opened` in the thread that starts the tool, `started` right afterwards."""

    def __init__(self, trace: TaskTrace) -> None:
        self._trace = trace
        self._why_not = ""
        self._groups: CpuGroups | None = None
        self._want: CpuWant | None = None
        self._began_ns = self._lasted_ns = 0

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Following]:
        """Begin to follow what the calling thread starts."""
        found = cls(TaskTrace())
        found._attempt(found._trace.open)
        try:
            yield found
        finally:
            found._trace.close()

    def started(self, pid: int) -> None:
        """Follow process `pid` and its children."""
        self._trace.follow(pid)
        self._groups = CpuGroups.of(pid)
        self._began_ns, self._want = time.monotonic_ns(), cpu_want(self._groups)

    def read(self) -> None:
        """Read what happened so far; needed a few times a second."""
        if not self._why_not:
            self._attempt(self._trace.read)

    def so_far(self, samples: Samples, corrections: Corrections, stamps: StampModel, offset_ns: int) -> Waited:
        """Return the waits of samples whose packets are known; `offset_ns` from CLOCK_MONOTONIC to UTC."""
        sent = corrections.sent_utc_ns[corrections.sent_utc_ns > 0]
        since = int(sent.min()) - offset_ns - _BEFORE_NS if len(sent) else 0
        parts = self._trace.changes
        start = len(parts)
        while start and int(parts[start - 1].ts_ns[-1]) >= since:
            start -= 1
        return self._waited(samples, corrections, stamps, offset_ns, start)

    def finished(self, samples: Samples, corrections: Corrections, stamps: StampModel, offset_ns: int) -> Followed:
        """Stop following, after the tool has ended, and return the waits of all its samples."""
        if self._groups is not None and self._want is not None:
            self._want = cpu_want(self._groups).since(self._want)
            self._lasted_ns = time.monotonic_ns() - self._began_ns
        if not self._why_not:
            self._attempt(self._trace.finish)
        found = self._waited(samples, corrections, stamps, offset_ns, 0)
        return Followed(found, self._why_not, self._want, self._lasted_ns)

    def _waited(
        self, samples: Samples, corrections: Corrections, stamps: StampModel, offset_ns: int, start: int
    ) -> Waited:
        if self._why_not:
            return Waited.unknown(len(samples))
        changes = TaskChanges.concatenate(self._trace.changes[start:])
        return waited(samples, corrections, stamps, changes, self._trace.gaps, offset_ns)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except MaceError as error:
            self._why_not = str(error)
