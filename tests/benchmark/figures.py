"""How a figure is written down, and the flood that several of them are about."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mace.lab import Lab, Spec, running

ROOT = Path(__file__).parents[2]
MACE = (sys.executable, "-m", "mace")


def figure(
    name: str, unit: str, values: Sequence[float], peer: str = "", peer_value: float | None = None
) -> dict[str, Any]:
    """The median of several rounds; `spread` is the smallest and the largest of them."""
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
    """This process and what it starts run on one core, the last one."""
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


def flood(lab: Lab, seconds: float) -> int:
    """UDP as fast as two containers can, with 18 bytes of payload; how many datagrams were sent."""
    flows = [lab.start_udp(name, count=100_000_000, size=18, duration_s=seconds) for name in lab.containers]
    return sum(flow.wait().sent for flow in flows)


def recorded_flood(target: Path, seconds: float) -> None:
    """A capture of such a flood, with pings and TCP among it."""
    with running(Spec(name="bench", containers=2)) as lab:
        argv = [*MACE, "record", "--lab", "bench", "-o", str(target), "--ring-mib", "64", "--json"]
        record = subprocess.Popen([*argv, "--duration", str(seconds + 2)], stdout=subprocess.PIPE, cwd=ROOT)
        pings = lab.start_ping("c1", count=int(seconds * 100))
        flood(lab, seconds)
        lab.tcp("c2", size=50_000_000)
        pings.close()
        record.communicate()


def rounds(work: Callable[[], float], count: int) -> list[float]:
    work()
    return [work() for _ in range(count)]
