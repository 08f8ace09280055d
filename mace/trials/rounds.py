"""What experiments in rounds have in common: the machine that they were made on, medians, intervals."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_GOLDEN: Final = (5**0.5 - 1) / 2


def machine() -> dict[str, Any]:
    """cpu, cores, kernel, virtual, load (of the last minute): what a figure has to be read with."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "virtual": any(line.startswith("flags") and " hypervisor" in line for line in lines),
        "load": round(os.getloadavg()[0], 2),
    }


def machine_text(found: Mapping[str, Any]) -> str:
    """The same in a line for people."""
    kind = "a virtual machine" if found["virtual"] else "a machine"
    return f"{kind} of {found['cores']} cores, {found['cpu']}, Linux {found['kernel']}, load {found['load']:g}"


def dithered(values: npt.NDArray[np.int64], unit_ns: float = 1000.0) -> npt.NDArray[np.float64]:
    """Values that were cut to whole units, each moved by less than half a unit, evenly: ns, in the same order.

    ping's round trips are differences of two stamps in whole microseconds: right on average, but a median of them is a
    whole number too, and jumps by one where the middle moves by a little. So it is of what is computed from them (12 or
    13 µs less an overhead of 7.3 is 4.7 or 5.7, and never the 5.1 that it is). The moves are multiples of the golden
    ratio, modulo one: no chance, and of any stretch of them as many up as down.
    """
    moves = (np.arange(1, len(values) + 1) * _GOLDEN) % 1.0 - 0.5
    found: npt.NDArray[np.float64] = values + moves * unit_ns
    return found


def median_us(parts: Iterable[npt.NDArray[Any]]) -> float:
    """Of all values, ns, together; nan if there are none."""
    values = np.concatenate(list(parts))
    return float(np.median(values)) / 1000 if len(values) else float("nan")


def interval_text(found: list[float] | None) -> str:
    """For people, with signs: of differences."""
    return "-" if found is None else f"{found[0]:+.1f} … {found[1]:+.1f}"
