"""The whole pipeline on live traffic: flood, soak, and the time until a reader can see a packet's row."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mace.lab import Flow, Lab, Spec, UdpResult, running
from storage.query import Filter, StoreReader
from tests.benchmark.figures import MACE, cpu_s, figure, flood, folder, peak_mib, resident_mib
from tests.places import ROOT
from tests.servers import Influx

FLOOD_S, FLOOD_ROUNDS = 10, 3
FLOODED = ("ftrace", "bpf")
SOAK_S = float(os.environ.get("MACE_BENCH_SOAK_S", "600"))
DEAD_S = 60.0
PROBES = 40
WINDOWS_ROUNDS, WINDOWS_S = 3, 4.0


@contextmanager
def _measured(lab: str, store: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run `mace run` for the duration of the block; kill it if the block has not ended it."""
    argv = [*MACE, "run", "--lab", lab, "--store", str(store), "--json", *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as started:
        try:
            while not (store / "runs").is_dir() and started.poll() is None:
                time.sleep(0.05)
            time.sleep(0.5)
            yield started
        finally:
            started.kill()


def _end(run: subprocess.Popen[str]) -> dict[str, Any]:
    run.terminate()
    out, _ = run.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


def _paced(lab: Lab, seconds: float) -> list[Flow[UdpResult]]:
    """Send paced UDP from each container: at nine events a datagram somewhat more than 100,000 events/s from two."""
    return [
        lab.start_udp(name, count=100_000_000, rate_pps=5_600.0, duration_s=seconds, size=18) for name in lab.containers
    ]


def under_flood() -> list[dict[str, Any]]:
    """Flood in turns with ftrace and with BPF, rings of 8 MiB per CPU.

    Targets: no loss, under one core, under 300 MiB; with BPF at most two thirds of the CPU time per event with ftrace.
    """
    floods: dict[str, list[_Flooded]] = {source: [] for source in FLOODED}
    for _ in range(FLOOD_ROUNDS):
        for source, done in floods.items():
            done.append(_flooded(source))
    ftrace_ns = [each.cpu_s / each.records * 1e9 for each in floods["ftrace"]]
    bpf_ns = [each.cpu_s / each.records * 1e9 for each in floods["bpf"]]
    return [
        *_flood_figures("live_flood", floods["ftrace"]),
        *_flood_figures("live_flood_bpf", floods["bpf"]),
        figure("live_flood_bpf_event", "ns/event", bpf_ns, "ftrace", statistics.median(ftrace_ns)),
    ]


@dataclass(frozen=True, slots=True)
class _Flooded:
    """What `mace run` did during one flood of FLOOD_S seconds."""

    records: int
    lost: int
    cpu_s: float
    peak_mib: float


def _flooded(source: str) -> _Flooded:
    with (
        folder() as place,
        running(Spec(name="flood", containers=2)) as lab,
        _measured("flood", place / "store", "--ring-mib", "8", "--source", source) as run,
    ):
        before = cpu_s(run.pid)
        flood(lab, FLOOD_S)
        used, peak = cpu_s(run.pid) - before, peak_mib(run.pid)
        ledger = _end(run)["ledger"]
    return _Flooded(ledger["records"], ledger["lost"] + ledger["discarded"], used, peak)


def _flood_figures(name: str, floods: list[_Flooded]) -> list[dict[str, Any]]:
    return [
        figure(name, "events/s", [each.records / FLOOD_S for each in floods]),
        figure(f"{name}_lost", "events", [each.lost for each in floods]),
        figure(f"{name}_cpu", "cores", [each.cpu_s / FLOOD_S for each in floods]),
        figure(f"{name}_rss", "MiB", [each.peak_mib for each in floods]),
    ]


def windows_memory() -> list[dict[str, Any]]:
    """Peak memory of a run that keeps windows only and has no store; target: 60 MiB on a quiet host."""
    quiet, paced = [], []
    for _ in range(WINDOWS_ROUNDS):
        with running(Spec(name="windows", containers=2)) as lab:
            argv = [*MACE, "run", "--lab", lab.name, "--no-store", "--no-rows", "--source", "ftrace", "--json"]
            with subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=ROOT) as run:
                time.sleep(WINDOWS_S)
                quiet.append(peak_mib(run.pid))
                for flow in _paced(lab, WINDOWS_S):
                    flow.wait()
                paced.append(peak_mib(run.pid))
                run.terminate()
    return [figure("windows_memory", "MiB", quiet), figure("windows_memory_paced", "MiB", paced)]


def soak() -> list[dict[str, Any]]:
    """Run at 100,000 events/s for ten minutes; target: constant memory. The slope is that of the last nine tenths."""
    with (
        folder() as place,
        running(Spec(name="soak", containers=2)) as lab,
        _measured("soak", place / "store", "--source", "ftrace") as run,
    ):
        flows = _paced(lab, SOAK_S)
        begin, samples = time.monotonic(), []
        while any(flow.running for flow in flows):
            samples.append((time.monotonic() - begin, resident_mib(run.pid)))
            time.sleep(min(1, SOAK_S / 20))
        for flow in flows:
            flow.close()
        ledger = _end(run)["ledger"]
    late = [sample for sample in samples if sample[0] > SOAK_S / 10]
    slope, _ = statistics.linear_regression(*zip(*late, strict=True))
    return [
        figure("live_soak", "events/s", [ledger["records"] / SOAK_S]),
        figure("live_soak_lost", "events", [ledger["lost"] + ledger["discarded"]]),
        figure("live_soak_rss", "MiB", [rss for _, rss in late]),
        figure("live_soak_rss_slope", "MiB/min", [slope * 60]),
    ]


def dead_database() -> list[dict[str, Any]]:
    """Run at 100,000 events/s for a minute, most of it without InfluxDB.

    Targets: the ring loses nothing, and every row that waited is in the database exactly once afterwards.
    """
    with folder() as place, running(Spec(name="dead", containers=2)) as lab:
        server = Influx(place / "influx").start()
        try:
            config = place / "mace.toml"
            config.write_text(f'[sinks.influxdb]\nspool = "{place}/spool"\nspool_mib = 4096\nclose_s = 120\n')
            options = ("--source", "ftrace", "--influxdb", server.url, "--config", str(config))
            with _measured("dead", place / "store", *options) as run:
                flows = _paced(lab, DEAD_S)
                time.sleep(DEAD_S / 12)
                server.kill()
                time.sleep(DEAD_S * 10 / 12)
                spooled = sum(path.stat().st_size for path in (place / "spool").rglob("*") if path.is_file())
                server.start()
                for flow in flows:
                    flow.wait()
                found = _end(run)
                account, ledger = found["sinks"]["influxdb"], found["ledger"]
            rows = sum(server.rows().values())
        finally:
            server.stop()
    assert account["stored"] == account["taken"] == rows, (account, rows)
    return [
        figure("live_dead_database", "events/s", [ledger["records"] / DEAD_S]),
        figure("live_dead_database_lost", "events", [ledger["lost"] + ledger["discarded"]]),
        figure("live_dead_database_spooled", "MiB", [spooled / 2**20]),
        figure("live_dead_database_rows", "rows in the database, each once", [rows]),
    ]


def visibility() -> list[dict[str, Any]]:
    """Measure the time from a packet until a reader can see its row, one ping at a time; target: at most 2 s."""
    waits = []
    with (
        folder() as place,
        running(Spec(name="seen")) as lab,
        _measured("seen", place / "store", "--source", "ftrace") as run,
    ):
        store = StoreReader(place / "store")
        for probe in range(PROBES):
            size = 200 + probe
            sent = time.monotonic()
            lab.ping("c1", count=1, size=size)
            while not _seen(store, size + 28):
                time.sleep(0.02)
            waits.append(time.monotonic() - sent)
        _end(run)
    return [figure("visibility", "s", waits), figure("visibility_max", "s", [max(waits)])]


def _seen(store: StoreReader, length: int) -> bool:
    rows = store.delays(Filter(container="c1"), columns=["l3_len"])
    return length in set(rows["l3_len"].to_pylist())
