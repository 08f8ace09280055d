"""CLOCK_MONOTONIC and UTC: one measured pair of them, and its uncertainty.

Records carry CLOCK_MONOTONIC (it never steps); stored rows carry UTC. Linux disciplines both clocks with the
same frequency, so within one boot and without a step of the wall clock one pair converts a whole run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClockPair:
    """The same instant on both clocks, ns, known to ± `uncertainty_ns`."""

    monotonic_ns: int
    utc_ns: int
    uncertainty_ns: int

    @property
    def offset_ns(self) -> int:
        """What to add to a monotonic time to get UTC."""
        return self.utc_ns - self.monotonic_ns


def measure(attempts: int = 16) -> ClockPair:
    """The pair with the narrowest bracket of `attempts`: monotonic, UTC, monotonic, read back to back."""
    best: ClockPair | None = None
    for _ in range(attempts):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        utc = time.clock_gettime_ns(time.CLOCK_REALTIME)
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        half = (after - before + 1) // 2
        if best is None or half < best.uncertainty_ns:
            best = ClockPair(before + half, utc, half)
    assert best is not None
    return best
