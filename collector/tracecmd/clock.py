"""The trace clocks of trace.dat files, and the suitability of each for delays.

Delays need a clock that runs evenly and is the same on all CPUs. Comparing with other recordings of the same boot needs
CLOCK_MONOTONIC. Dates need an offset to UTC (Documentation/trace/ftrace.rst, "trace_clock").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.tracecmd.file import BufferInfo, FileFrame, Tsc
from contracts.errors import CaptureError, nearest

MONO: Final = "mono"

CLOCKS: Final[Mapping[str, str]] = {
    MONO: "",
    "mono_raw": "is not slewed as CLOCK_MONOTONIC is: delays differ by the slew, up to 500 ppm",
    "boot": "is CLOCK_MONOTONIC and the time asleep",
    "tai": "is set with the wall clock: a step of it is in the delays",
    "global": "is the scheduler's clock, made to agree between CPUs",
    "perf": "is the scheduler's clock: where the TSC is not stable, CPUs differ",
    "local": "is each CPU's own: where the TSC is not stable, delays between CPUs are off by as much as they differ",
}
"""Clocks in nanoseconds, each with its limitation; "" if it has none."""

_CYCLES: Final = ("x86-tsc", "tsc2nsec")
_REFUSED: Final[Mapping[str, str]] = {
    "counter": "it counts events and tells no time",
    "uptime": "it counts jiffies, which are longer than what is to be measured",
    "ppc-tb": "its ticks are of a length that the file does not tell",
    "s390-tod": "its ticks are of a length that the file does not tell",
    "x86-tsc": "it counts cycles and the file does not tell how long one is; newer versions of trace-cmd store that",
}


@dataclass(frozen=True, slots=True)
class FileClock:
    """Converts the times of one buffer to ns."""

    name: str
    tsc: Tsc | None
    offset_ns: int
    warning: str
    """Warning for the user; "" if there is none."""

    @property
    def is_monotonic(self) -> bool:
        """Whether the times are those of CLOCK_MONOTONIC."""
        return self.name == MONO and not self.offset_ns

    def ns(self, ts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Convert times in the file to ns; int64 of the same shape."""
        if self.tsc is not None:
            # As mul_u64_u32_shr of the kernel (include/linux/math64.h): a product of 96 bits, computed in two halves.
            cycles, mult, shift = ts.astype(np.uint64), np.uint64(self.tsc.mult), np.uint64(self.tsc.shift)
            low = (cycles & np.uint64(0xFFFFFFFF)) * mult >> shift
            high = (cycles >> np.uint64(32)) * mult
            up = np.uint64(32)
            ts = (low + (high << (up - shift) if shift <= up else high >> (shift - up))).astype(np.int64)
        return ts + self.offset_ns if self.offset_ns else ts


def clock_of(path: Path, frame: FileFrame, info: BufferInfo, asked: str = "") -> FileClock:
    """Return the clock of a buffer; raises `CaptureError` for a clock that cannot measure delays.

    `asked` is the clock that the user names for a file without one.
    """
    named = {one for one in (info.clock, frame.clock) if one}
    # trace-cmd 3.1 stores `local` for every instance, whatever its clock: there the user's choice prevails.
    if named and asked and asked not in named and not info.name:
        raise CaptureError(path, 0, f"recorded with the clock {info.clock!r}, not {asked!r} as asked for")
    said = asked or (named.pop() if len(named) == 1 else "")
    if said in _CYCLES and frame.tsc is not None:
        if not 0 <= frame.tsc.shift <= 63:
            raise CaptureError(path, 0, f"cycles to ns by a shift of {frame.tsc.shift}; expected up to 63")
        return FileClock(said, frame.tsc, frame.offset_ns, "")
    if said in _REFUSED:
        raise CaptureError(path, 0, f"recorded with the clock {said!r}: {_REFUSED[said]} (`trace-cmd record -C mono`)")
    if said and said not in CLOCKS:
        raise CaptureError(path, 0, f"recorded with the clock {said!r}{nearest(said, CLOCKS)}, which is not known here")
    if not said:
        says = f"says both {' and '.join(sorted(named))} for the clock" if named else "does not say which clock it has"
        warning = f"the file {says} (if it was mono, say --clock mono)"
        return FileClock("", None, frame.offset_ns, warning)
    warning = CLOCKS[said] and f"its clock {said} {CLOCKS[said]}"
    if said == "local" and info.name and not asked:
        warning += " (trace-cmd 3.1 says local of every instance: if it was mono, say --clock mono)"
    return FileClock(said, None, frame.offset_ns, warning)
