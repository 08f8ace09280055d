"""Shared parts of experiments in rounds: the description of the machine, dithering, medians, intervals."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mace.tools.host_rtt import spread_evenly


def machine() -> dict[str, Any]:
    """Return the machine's facts that figures depend on: cpu, cores, kernel, virtual, load (of the last minute)."""
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
    """Return the facts of `machine` as one line for people."""
    kind = "a virtual machine" if found["virtual"] else "a machine"
    return f"{kind} of {found['cores']} cores, {found['cpu']}, Linux {found['kernel']}, load {found['load']:g}"


def dithered(values: npt.NDArray[np.int64], unit_ns: float = 1000.0) -> npt.NDArray[np.float64]:
    """Move each truncated value by less than half a unit, evenly distributed; returns ns, in the same order.

    ping's round trips are differences of two stamps in whole microseconds. They are right on average, but their median
    is a whole number too and jumps by one when the middle moves a little. So does what is computed from it: 12 or 13 µs
    less an overhead of 7.3 is 4.7 or 5.7, and never the true 5.1.
    """
    found: npt.NDArray[np.float64] = values + spread_evenly(np.full(len(values), unit_ns))
    return found


def median_us(parts: Iterable[npt.NDArray[Any]]) -> float:
    """Return the median in µs of all values, in ns, of all parts together; nan without values."""
    values = np.concatenate(list(parts))
    return float(np.median(values)) / 1000 if len(values) else float("nan")


def interval_text(found: list[float] | None) -> str:
    """Format the interval of a difference for people, with signs; `-` for None."""
    return "-" if found is None else f"{found[0]:+.1f} … {found[1]:+.1f}"
