"""Which CPU worked on the packets of the last minute of a live measurement, for `mace top --cpus`.

The figures are computed by the functions of `mace report --cpus`, from the rows that a store would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pyarrow as pa

from contracts import cpu_figures
from contracts.cpu_figures import CpuGrowth, CpuReport
from contracts.cpus import STAGES_WIDTH_S, CpuCounters
from contracts.errors import UsageError
from contracts.interfaces import StreamHeader
from contracts.recent import SECONDS
from contracts.results import Rows
from storage import tables
from storage.merging import Histograms
from storage.query import STAGE_GROUPS, stage_counts

_S: int = 1_000_000_000
_COUNTED: int = 1 << 32
"""The kernel's counters have 32 bits."""


@dataclass(frozen=True, slots=True)
class ChosenStages:
    """The counts of some seconds. Nothing in it changes afterwards."""

    host: str
    span_ns: int
    """Time measured in these intervals."""
    parts: tuple[pa.Table, ...]
    readings: tuple[Sequence[CpuCounters], ...]

    def report(self) -> CpuReport:
        """Return the figures. Raises `UsageError` if no interval has ended yet."""
        if not self.parts:
            raise UsageError(f"nothing is counted yet: an interval of {STAGES_WIDTH_S} s has to end first")
        merged = Histograms(STAGE_GROUPS)
        for part in self.parts:
            for batch in part.to_batches():
                merged.add(batch)
        return cpu_figures.report(stage_counts(merged), self._growth(), (), {self.host: self.span_ns})

    def _growth(self) -> list[CpuGrowth]:
        of_cpu: dict[int, list[CpuCounters]] = {}
        for reading in self.readings:
            for one in reading:
                of_cpu.setdefault(one.cpu, []).append(one)
        return [_grown(self.host, cpu, found) for cpu, found in sorted(of_cpu.items()) if len(found) > 1]


def _grown(host: str, cpu: int, found: Sequence[CpuCounters]) -> CpuGrowth:
    processed, dropped, squeezed = (
        sum((getattr(b, name) - getattr(a, name)) % _COUNTED for a, b in pairwise(found))
        for name in ("processed", "dropped", "squeezed")
    )
    return CpuGrowth(host, cpu, found[-1].utc_ns - found[0].utc_ns, processed, dropped, squeezed)


@dataclass(slots=True)
class RecentStages:
    """Collects one run's counts of stages, interval by interval. Not thread-safe; what `chosen` returns is."""

    _header: StreamHeader | None = None
    _began_utc_ns: int = 0
    _parts: deque[tuple[int, pa.Table]] = field(default_factory=deque)
    """Start of each interval, and its rows of `stages`."""
    _readings: deque[Sequence[CpuCounters]] = field(default_factory=deque)

    def begin(self, header: StreamHeader, reading: Sequence[CpuCounters]) -> None:
        """Note the run, and the CPUs' counters at its beginning."""
        self._header, self._began_utc_ns = header, header.clock.utc_ns
        self._readings.append(reading)

    def add(self, rows: Rows, reading: Sequence[CpuCounters]) -> None:
        """Add the stages of intervals that have ended, and the CPUs' counters now."""
        assert self._header is not None
        starts = rows.stages.column("start_utc_ns")
        for start in sorted(set(starts.tolist())):
            stages = tables.StageRows(rows.stages[starts == start], rows.places, rows.devices)
            self._parts.append((start, tables.stages_table(self._header, stages)))
        self._readings.append(reading)
        oldest = max(start for start, _ in self._parts) - SECONDS * _S
        while self._parts[0][0] < oldest:
            self._parts.popleft()
        while len(self._readings) > SECONDS // STAGES_WIDTH_S + 1:
            self._readings.popleft()

    def chosen(self, since_utc_ns: int) -> ChosenStages:
        """Return the intervals wholly after a time, and those in which the run began."""
        assert self._header is not None
        since = 0 if since_utc_ns <= self._began_utc_ns + _S else since_utc_ns
        parts = [(start, part) for start, part in self._parts if start >= since]
        begins = {start: max(start, self._began_utc_ns) for start, _ in parts}
        span = sum(start + STAGES_WIDTH_S * _S - begin for start, begin in begins.items())
        return ChosenStages(self._header.host, span, tuple(part for _, part in parts), tuple(self._readings))
