"""Conversion from CLOCK_MONOTONIC to UTC by one measured pair of readings, with its uncertainty.

Records carry CLOCK_MONOTONIC (it never steps); stored rows carry UTC. Linux disciplines both clocks with the
same frequency. Within one boot, and unless the wall clock steps, one pair therefore converts a whole run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClockPair:
    """One instant read on both clocks, ns; the pairing is known to ± `uncertainty_ns`."""

    monotonic_ns: int
    utc_ns: int
    uncertainty_ns: int

    @property
    def offset_ns(self) -> int:
        """Nanoseconds to add to a monotonic time to get UTC."""
        return self.utc_ns - self.monotonic_ns


def measure(attempts: int = 16) -> ClockPair:
    """Read both clocks `attempts` times and return the pair with the smallest uncertainty.

    Each attempt reads monotonic, UTC, monotonic back to back; the uncertainty is half of the bracket, rounded up.
    """
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
