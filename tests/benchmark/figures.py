"""How a figure is written down, and the flood that several of them are about."""

import ctypes
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mace.errors import LabError
from mace.lab import Lab, Spec, running

ROOT = Path(__file__).parents[2]
MACE = (sys.executable, "-m", "mace")


def figure(
    name: str, unit: str, values: Sequence[float], peer: str = "", peer_value: float | None = None, **more: Any
) -> dict[str, Any]:
    """The median of several rounds; `spread` is the smallest and the largest of them."""
    value = statistics.median(values)
    made = {
        "name": name,
        "value": _short(value),
        "unit": unit,
        "peer": peer,
        "peer_value": None if peer_value is None else _short(peer_value),
        "ratio": None if not peer_value else _short(value / peer_value),
        "n": len(values),
        "spread": [_short(min(values)), _short(max(values))],
        "spread_is": "smallest and largest",
    }
    return made | {name: _short(v) if isinstance(v, float) else v for name, v in more.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@contextmanager
def one_core() -> Iterator[None]:
    """All threads of this process, and what it starts, run on one core, the last one.

    All threads: pools of libraries live on from one benchmark to the next, and the affinity is each thread's own.
    """
    before = os.sched_getaffinity(0)
    _confine({max(before)})
    try:
        yield
    finally:
        _confine(before)


def _confine(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # it has just ended
            pass


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    _libc.prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def beside(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that runs beside the block and ends with it, or with us, whatever happens to us."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "cwd": ROOT, "preexec_fn": _end_with_parent, **options}
    process = subprocess.Popen(argv, **settings)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


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
        with beside(argv):
            wait_for(target)
            pings = lab.start_ping("c1", count=int(seconds * 100))
            flood(lab, seconds)
            lab.tcp("c2", size=50_000_000)
            pings.close()
            time.sleep(0.5)


def wait_for(path: Path, limit_s: float = 30) -> None:
    """Until a process that measures has begun to write, which it does when all else is open, and a moment more."""
    end = time.monotonic() + limit_s
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() > end:
            raise LabError(f"{path}: nothing was measured within {limit_s:g} s")
        time.sleep(0.05)
    time.sleep(0.3)


def rounds(work: Callable[[], float], count: int) -> list[float]:
    """What `work` returns, `count` times; a first time, which touches memory and code, is left out."""
    found = []
    for _ in range(count + 1):
        gc.collect()
        found.append(work())
    return found[1:]


def rates(work: Callable[[], int], count: int) -> tuple[list[float], float]:
    """Of what `work` counts: by the clock, each of `count` rounds, and by CPU time, the median.

    Both, because on a core that others use as well only the second says what the work itself takes.
    """
    by_cpu = []

    def once() -> float:
        begin, cpu = time.perf_counter(), time.process_time()
        done = work()
        by_cpu.append(done / (time.process_time() - cpu))
        return done / (time.perf_counter() - begin)

    by_clock = rounds(once, count)
    return by_clock, statistics.median(by_cpu[1:])
