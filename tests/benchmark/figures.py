"""Formats the figures of benchmarks, and makes the flood that several benchmarks measure."""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mace.lab import Lab, Spec, running
from tests.measuring import MACE
from tests.places import ROOT


def figure(
    name: str, unit: str, values: Sequence[float], peer: str = "", peer_value: float | None = None
) -> dict[str, Any]:
    """Return a figure: the median of several rounds; `spread` is the smallest and the largest of them."""
    value = statistics.median(values)
    return {
        "name": name,
        "value": _short(value),
        "unit": unit,
        "peer": peer,
        "peer_value": None if peer_value is None else _short(peer_value),
        "ratio": None if not peer_value else _short(value / peer_value),
        "n": len(values),
        "spread": [_short(min(values)), _short(max(values))],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@contextmanager
def one_core() -> Iterator[None]:
    """Bind this process, and processes that it starts, to one core, the last one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mace-bench-") as name:
        yield Path(name)


def cpu_s(pid: int) -> float:
    """Return the CPU time of a running process so far: all threads, user space and kernel."""
    # clock_getcpuclockid(3), which Python has for threads only: ~pid and CPUCLOCK_SCHED (posix-cpu-timers.c).
    return time.clock_gettime(~pid << 3 | 2)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a running process."""
    return _of_memory(pid, "VmRSS")


def peak_mib(pid: int) -> float:
    """Return the peak of a running process's resident memory."""
    return _of_memory(pid, "VmHWM")


def _of_memory(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def flood(lab: Lab, seconds: float) -> int:
    """Send UDP with 18 bytes of payload from two containers as fast as they can; return the number of datagrams."""
    flows = [lab.start_udp(name, count=100_000_000, size=18, duration_s=seconds) for name in lab.containers]
    return sum(flow.wait().sent for flow in flows)


def recorded_flood(target: Path, seconds: float) -> None:
    """Return a capture of such a flood, mixed with pings and TCP."""
    with running(Spec(name="bench", containers=2)) as lab:
        argv = [*MACE, "record", "--source", "ftrace", "--lab", "bench", "-o", str(target), "--ring-mib", "64"]
        record = subprocess.Popen([*argv, "--json", "--duration", str(seconds + 2)], stdout=subprocess.PIPE, cwd=ROOT)
        pings = lab.start_ping("c1", count=int(seconds * 100))
        flood(lab, seconds)
        lab.tcp("c2", size=50_000_000)
        pings.close()
        record.communicate()


def rounds(work: Callable[[], float], count: int) -> list[float]:
    work()
    return [work() for _ in range(count)]
