"""The whole pipeline on live traffic: flood, soak, and how soon a packet can be seen by a reader."""

import json
import os
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mace.errors import MaceError
from mace.lab import Spec, running
from storage.query import Filter, Store
from tests.benchmark.figures import MACE, beside, figure, flood, folder, wait_for

FLOOD_S = 30
SOAK_S = float(os.environ.get("MACE_BENCH_SOAK_S", "600"))
SOAK_PPS = 5_000.0
"""From each of two containers; ten events a datagram: 100,000 events/s."""
PROBES = 40
LOST_S = 30
PAGE_MIB = resource.getpagesize() / 2**20
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@contextmanager
def _measuring(lab: str, store: Path, limit_s: float, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`mace run` beside the block, in a process of its own: its CPU time and memory are nobody else's."""
    argv = [*MACE, "run", "--lab", lab, "--store", str(store), "--duration", str(limit_s + 60), "--json", *options]
    with beside(argv, text=True) as process:
        wait_for(store / "store.json")
        time.sleep(0.5)
        yield process


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB


def _peak_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM"))


def _end(run: subprocess.Popen[str]) -> dict[str, Any]:
    run.terminate()
    out, _ = run.communicate()
    if run.returncode:
        raise MaceError(f"mace run exited with status {run.returncode}")
    found: dict[str, Any] = json.loads(out)
    return found


def under_flood() -> list[dict[str, Any]]:
    """30 s of what the machine gives, 8 MiB per CPU; targets: nothing lost, under one core, under 300 MiB."""
    with (
        folder() as place,
        running(Spec(name="flood", containers=2)) as lab,
        _measuring("flood", place / "store", FLOOD_S, "--ring-mib", "8") as run,
    ):
        cpu, begin = _cpu_s(run.pid), time.monotonic()
        flood(lab, FLOOD_S)
        seconds = time.monotonic() - begin
        used_s, peak = _cpu_s(run.pid) - cpu, _peak_mib(run.pid)
        ledger = _end(run)["ledger"]
    records = ledger["records"]
    return [
        figure("live_flood", "events/s", [records / seconds], events=records),
        figure("live_flood_lost", "events", [_lost(ledger)]),
        figure("live_flood_cpu", "cores", [used_s / seconds], ns_per_event=used_s / records * 1e9),
        figure("live_flood_rss", "MiB", [peak]),
    ]


def soak() -> list[dict[str, Any]]:
    """100,000 events/s for ten minutes; target: memory is flat. The slope is of the last nine tenths.

    MACE_BENCH_SOAK_S makes it shorter, and the slope as much less certain.
    """
    with (
        folder() as place,
        running(Spec(name="soak", containers=2)) as lab,
        _measuring("soak", place / "store", SOAK_S) as run,
    ):
        flows = [
            lab.start_udp(name, count=100_000_000, rate_pps=SOAK_PPS, duration_s=SOAK_S, size=18)
            for name in lab.containers
        ]
        cpu, begin, samples = _cpu_s(run.pid), time.monotonic(), []
        while any(flow.running for flow in flows):
            samples.append((time.monotonic() - begin, _rss_mib(run.pid)))
            time.sleep(min(1, SOAK_S / 60))
        seconds = time.monotonic() - begin
        cores, peak = (_cpu_s(run.pid) - cpu) / seconds, _peak_mib(run.pid)
        for flow in flows:
            flow.wait()
        ledger = _end(run)["ledger"]
    late = [sample for sample in samples if sample[0] > SOAK_S / 10]
    slope, _ = statistics.linear_regression(*zip(*late, strict=True))
    return [
        figure("live_soak", "events/s", [ledger["records"] / seconds], seconds=round(seconds)),
        figure("live_soak_lost", "events", [_lost(ledger)]),
        figure("live_soak_cpu", "cores", [cores]),
        figure("live_soak_rss", "MiB", [rss for _, rss in late], peak=peak),
        figure("live_soak_rss_slope", "MiB/min", [slope * 60]),
    ]


def _lost(ledger: dict[str, int]) -> int:
    return ledger["lost"] + ledger["discarded"]


def visibility() -> list[dict[str, Any]]:
    """From a packet to the end of the first reading that finds its row; target: 2 s at most.

    One ping at a time, at no fixed distance from the store's flushes, each known by its length.
    """
    moment = random.Random(1)
    waits = []
    with (
        folder() as place,
        running(Spec(name="seen")) as lab,
        _measuring("seen", place / "store", PROBES * 5) as run,
    ):
        store = Store(place / "store")
        for probe in range(PROBES):
            time.sleep(moment.uniform(0, 1))
            size = 200 + probe
            sent = time.monotonic()
            lab.ping("c1", count=1, size=size)
            while not _seen(store, size + 28):
                if time.monotonic() - sent > LOST_S:
                    raise MaceError(f"visibility: a packet was not to be seen within {LOST_S} s")
                time.sleep(0.02)
            waits.append(time.monotonic() - sent)
        _end(run)
    return [figure("visibility", "s", waits), figure("visibility_max", "s", [max(waits)])]


def _seen(store: Store, length: int) -> bool:
    rows = store.delays(Filter(container="c1"), columns=["l3_len"])
    return length in set(rows["l3_len"].to_pylist())
