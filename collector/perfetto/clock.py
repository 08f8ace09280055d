"""Converts the clocks of a Perfetto trace to CLOCK_MONOTONIC and UTC.

traced lets ftrace stamp with the boot clock: the monotonic clock plus the time that the machine was suspended. The
trace's snapshots contain all clocks at nearly the same instant, read one after the other. The difference of two clocks
is the median over all snapshots of a stretch without a suspend, and constant in that stretch: delays stay exact to the
nanosecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import median_low
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.clock import ClockPair

REALTIME, MONOTONIC, MONOTONIC_RAW, BOOTTIME = 1, 3, 5, 6
"""BuiltinClock."""
_SUSPENDED_NS: Final = 1_000_000
"""Change of a clock difference from which on it counts as a suspend: reading two clocks in a row takes less."""
UNKNOWN_UNCERTAINTY_NS: Final = 86_400 * 10**9


class FtraceClock(IntEnum):
    """FtraceEventBundle.ftrace_clock."""

    BOOT = 0
    UNKNOWN = 1
    GLOBAL = 2
    LOCAL = 3
    MONO_RAW = 4


@dataclass(frozen=True, slots=True)
class Clocks:
    """Clock differences from the snapshots of a trace."""

    boot_ns: Ints
    """Boot times at which the stretches between suspends begin, ascending."""
    to_monotonic_ns: Ints
    """For each stretch, nanoseconds to add to a boot time to get CLOCK_MONOTONIC."""
    raw: tuple[tuple[int, int], ...]
    """Pairs of CLOCK_MONOTONIC_RAW and CLOCK_MONOTONIC, ascending."""
    pair: ClockPair | None
    """Pair of CLOCK_MONOTONIC and UTC; None if no snapshot has UTC."""

    @classmethod
    def of(cls, snapshots: Sequence[dict[int, int]]) -> Clocks:
        """Compute the differences from snapshots, each a dict of clock number -> ns."""
        raw = {one[MONOTONIC_RAW]: one[MONOTONIC] for one in snapshots if {MONOTONIC_RAW, MONOTONIC} <= set(one)}
        boot = [
            (one[BOOTTIME], one[MONOTONIC] - one[BOOTTIME]) for one in snapshots if {BOOTTIME, MONOTONIC} <= set(one)
        ]
        stretches: list[list[tuple[int, int]]] = []
        for at, offset in sorted(boot):
            if not stretches or abs(offset - stretches[-1][0][1]) > _SUSPENDED_NS:
                stretches.append([])
            stretches[-1].append((at, offset))
        starts = [part[0][0] for part in stretches] or [0]
        offsets = [median_low([offset for _, offset in part]) for part in stretches] or [0]
        clocks = cls(
            np.array(starts, np.int64),
            np.array(offsets, np.int64),
            tuple(sorted(raw.items())),
            None,
        )
        utc = []
        for one in snapshots:
            if REALTIME in one and MONOTONIC in one:
                utc.append((one[MONOTONIC], one[REALTIME]))
            elif REALTIME in one and BOOTTIME in one:
                utc.append((int(clocks.monotonic(np.array([one[BOOTTIME]]))[0]), one[REALTIME]))
        if not utc:
            return clocks
        differences = sorted(real - mono for mono, real in utc)
        middle = median_low(differences)
        mono = utc[0][0]
        unsure = max(differences[-1] - middle, middle - differences[0], 1_000)
        return cls(clocks.boot_ns, clocks.to_monotonic_ns, clocks.raw, ClockPair(mono, mono + middle, unsure))

    def monotonic(self, boot_ns: Ints) -> Ints:
        """Convert times on the boot clock to CLOCK_MONOTONIC, ns."""
        stretch = np.maximum(np.searchsorted(self.boot_ns, boot_ns, side="right") - 1, 0)
        return boot_ns + self.to_monotonic_ns[stretch]

    def from_raw(self, raw_ns: Ints) -> Ints:
        """Convert times on CLOCK_MONOTONIC_RAW, which runs at a slightly different rate, to CLOCK_MONOTONIC, ns.

        The conversion interpolates between snapshots, and extrapolates beyond them, at the rate of the nearest two.
        """
        raw = np.array([one for one, _ in self.raw], np.int64)
        ahead = np.array([mono - one for one, mono in self.raw], np.float64)
        if len(raw) < 2:
            return raw_ns + (int(ahead[0]) if len(raw) else 0)
        after = np.clip(np.searchsorted(raw, raw_ns), 1, len(raw) - 1)
        before = after - 1
        share = (raw_ns - raw[before]) / (raw[after] - raw[before])
        return raw_ns + np.rint(ahead[before] + share * (ahead[after] - ahead[before])).astype(np.int64)
