"""Conversion from CLOCK_MONOTONIC to UTC by one measured pair of readings, with its uncertainty.

Records carry CLOCK_MONOTONIC (it never steps); stored rows carry UTC. Linux disciplines both clocks with the
same frequency. Within one boot, and unless the wall clock steps, one pair therefore converts a whole run.

Two errors are apart: how well the two readings belong together (`ClockPair.uncertainty_ns`, tens of nanoseconds), and
how far the host's UTC is from true UTC, which only the program that disciplines the clock can estimate. That program
tells the kernel, and adjtimex(2) returns what it told (`KernelClock`).
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class KernelClock:
    """The kernel's own state of CLOCK_REALTIME, from adjtimex(2)."""

    state: str
    """`synchronised`, also beside a leap second, or `unsynchronised`: the kernel's TIME_ERROR or STA_UNSYNC. Nobody
    vouches for the two errors of an unsynchronised clock."""
    max_error_ns: int
    """The kernel's `maxerror`: set by the disciplining program, and growing by 500 ppm of the time since."""
    est_error_ns: int
    """The kernel's `esterror`: set by the disciplining program."""

    def __str__(self) -> str:
        most, estimate = f"{self.max_error_ns / 1e6:,.3f} ms", f"{self.est_error_ns / 1e6:,.3f} ms"
        if self.state == "synchronised":
            return f"the kernel calls its UTC synchronised, off by at most {most}, by its estimate {estimate}"
        return f"the kernel calls its UTC {self.state}: nothing bounds its error (maxerror {most}, esterror {estimate})"


@dataclass(frozen=True, slots=True)
class ClockPair:
    """One instant read on both clocks, ns; the pairing is known to ± `uncertainty_ns`."""

    monotonic_ns: int
    utc_ns: int
    uncertainty_ns: int
    kernel: KernelClock | None = None
    """How far UTC itself may be off; None where nothing recorded it: older captures, files of other tools."""

    @property
    def offset_ns(self) -> int:
        """Nanoseconds to add to a monotonic time to get UTC."""
        return self.utc_ns - self.monotonic_ns

    def __str__(self) -> str:
        told = str(self.kernel) if self.kernel else "how far UTC itself was off is not recorded"
        return f"UTC - CLOCK_MONOTONIC = {self.offset_ns:,} ± {self.uncertainty_ns:,} ns; {told}"


def measure(attempts: int = 16) -> ClockPair:
    """Read both clocks `attempts` times and return the pair with the smallest uncertainty, with the kernel's state.

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
    return replace(best, kernel=kernel_clock())


class _Timex(ctypes.Structure):
    """The C type `struct timex` of <sys/timex.h>, up to its last field; the rest of it is padding."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("constant", "precision", "tolerance", "sec", "usec", "tick")),
        *((name, ctypes.c_long) for name in ("ppsfreq", "jitter")),
        ("shift", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("stabil", "jitcnt", "calcnt", "errcnt", "stbcnt")),
        ("tai", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    )


_TIME_ERROR: Final = 5
_STA_UNSYNC: Final = 0x0040


def kernel_clock() -> KernelClock | None:
    """Return the kernel's state of CLOCK_REALTIME; None without adjtimex(2). Reading needs no privilege."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (AttributeError, OSError):
        return None
    timex = _Timex()  # modes = 0: only read
    state = adjtimex(ctypes.byref(timex))
    if state < 0:  # a sandbox may refuse the system call
        return None
    unsynchronised = state == _TIME_ERROR or timex.status & _STA_UNSYNC
    # Both errors are in microseconds, also with STA_NANO (adjtimex(2)).
    return KernelClock(
        "unsynchronised" if unsynchronised else "synchronised", timex.maxerror * 1_000, timex.esterror * 1_000
    )
