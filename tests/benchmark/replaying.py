"""Replays of long captures into a store: in bounded memory, stopped and resumed, by several jobs, on Dask workers.

    MACE_BENCH_REPLAY_MB=10000 ./dev bench replay_10gb      size of the capture; the default takes some seconds
    MACE_BENCH_FOLDER=/where/there/is/room                  folder, three times the size; default: temporary folder

The traffic is made up in the shape of a flood recorded by the kernel module, with content: 4.9 bytes a record.
"""

import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from contracts import wire
from contracts.config import Config, StoreConfig
from contracts.errors import UsageError
from correlator import configured
from mace.replaying.into_store import files_at, into_store
from mace.replaying.remaining import Remaining
from tests.benchmark.figures import figure
from tests.made_capture import HEADER, TOPOLOGY, batches, traffic
from tests.places import ROOT

REPLAY_MB = int(os.environ.get("MACE_BENCH_REPLAY_MB", "200"))
SCALING_MB = int(os.environ.get("MACE_BENCH_SCALING_MB", "160"))
JOBS_MB = int(os.environ.get("MACE_BENCH_JOBS_MB", "48"))
ROUNDS = int(os.environ.get("MACE_BENCH_ROUNDS", "3"))
_CHUNK_RECORDS = 2_000_000
_NOTE_S = 0.5


@contextmanager
def _room(megabytes: int) -> Iterator[Path]:
    """Make a folder with room for a capture of that size and its store, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="mace-bench-", dir=os.environ.get("MACE_BENCH_FOLDER")) as name:
        free = shutil.disk_usage(name).free
        if free < 3 * megabytes * 1_000_000:
            raise UsageError(f"{name}: {free / 1e9:.1f} GB free, {3 * megabytes / 1e3:.1f} are needed")
        yield Path(name)


def grown(path: Path, size: int) -> int:
    """Write a capture of at least `size` bytes by repeating traffic at later times; return its number of records."""
    once = traffic(_CHUNK_RECORDS, content=True)
    span = int(once.ts_ns[-1] - once.ts_ns[0]) + 10_000
    parts = batches(once, 50_000)
    encoder = wire.Encoder()
    with path.open("wb") as file:
        file.write(wire.FILE_HEAD + encoder.header(HEADER) + encoder.item(TOPOLOGY))
        turn = 0
        while file.tell() < size:
            for part in parts:
                file.write(encoder.item(replace(part, ts_ns=part.ts_ns + turn * span)))
            turn += 1
        file.write(encoder.end())
    return encoder.records


def replay_10gb() -> list[dict[str, Any]]:
    """records/s, peak memory, error of the estimated remaining time, and the cost of a kill."""
    with _room(REPLAY_MB) as place:
        capture = place / "long.mace"
        records = grown(capture, REPLAY_MB * 1_000_000)
        size = capture.stat().st_size
        begin = time.perf_counter()
        peak, points = _child(capture, place / "store")
        seconds = time.perf_counter() - begin
        found = [
            figure("replay_10gb", "records/s", [records / seconds])
            | {"gigabytes": round(size / 1e9, 2), "seconds": round(seconds, 1)},
            figure("replay_10gb_memory", "MiB", [peak]),
        ]
        found += [_estimate(points, share) for share in (0.1, 0.25, 0.5, 0.75)]
        shutil.rmtree(place / "store")
        if REPLAY_MB <= 2_000:  # a second replay takes equally long
            found += _killed(capture, place / "store", seconds)
        return found


def _estimate(points: list[tuple[float, int, int]], share: float) -> dict[str, Any]:
    """Return the estimated and the actual remaining time at some share of the bytes."""
    total, end = points[0][2], points[-1][0]
    left = Remaining(total, points[0][1], points[0][0])
    for now, done, _ in points:
        left.update(done, now)
        if done >= share * total:
            said, was = left.seconds(now), end - now
            told = {"at": share, "said_s": None if said is None else round(said, 1), "was_s": round(was, 1)}
            return figure("replay_estimate", "of the time left", [(said or 0.0) / max(was, 1e-9)]) | told
    raise AssertionError("the replay did not tell of its end")


def _killed(capture: Path, store: Path, alone_s: float) -> list[dict[str, Any]]:
    """Kill a replay with SIGKILL at about half, resume it, and return how much longer both take than one replay."""
    begin = time.perf_counter()
    process = subprocess.Popen(_argv(capture, store), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        _, done, total = json.loads(line)
        if done > total / 2:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _child(capture, store)
    return [figure("replay_killed_and_resumed", "s more", [time.perf_counter() - begin - alone_s])]


def _argv(capture: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "tests.benchmark.replaying", str(capture), str(store)]


def _child(capture: Path, store: Path) -> tuple[float, list[tuple[float, int, int]]]:
    """Replay in a process of its own; return peak memory, MiB, and progress as (time, bytes done, all bytes)."""
    process = subprocess.Popen(_argv(capture, store), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    points = [tuple(json.loads(line)) for line in process.stdout]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(f"the replay ended with status {process.returncode}")
    return usage.ru_maxrss / 1024, points


def replay_jobs() -> list[dict[str, Any]]:
    """Compare two jobs with one on the same capture, in turns; `peer` is one job. Times include the workers' start.

    The capture has 10 million records by default (`MACE_BENCH_JOBS_MB=48`) and is cut in two parts, although by default
    so short a recording stays in one process.
    """
    with _room(JOBS_MB) as place:
        capture = place / "long.mace"
        records = grown(capture, JOBS_MB * 1_000_000)
        rates: dict[int, list[float]] = {1: [], 2: []}
        used: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(ROUNDS):
            for jobs, into in rates.items():
                seconds, cpu = _with_jobs(capture, place / f"{turn}-{jobs}", jobs)
                into.append(records / seconds)
                used[jobs].append(cpu)
        return [
            figure("replay_jobs", "records/s", rates[2], "one job", statistics.median(rates[1])),
            figure("replay_jobs_one", "records/s", rates[1]),
            figure("replay_jobs_cpu", "s", used[2], "one job", statistics.median(used[1])),
        ]


def _with_jobs(capture: Path, store: Path, jobs: int) -> tuple[float, float]:
    """Replay once; return seconds, and CPU seconds of this process and of ended children."""
    begin, before = time.perf_counter(), os.times()
    engine = configured.replayed(Config().correlate)
    part = capture.stat().st_size // jobs
    into_store(files_at([capture]), str(store), engine, StoreConfig(), jobs=jobs, part_bytes=part)
    seconds, after = time.perf_counter() - begin, os.times()
    shutil.rmtree(store)
    cpu = sum(after[:4]) - sum(before[:4])
    print(f"bench: {jobs} jobs: {seconds:.2f} s, {cpu:.2f} s of CPU time", file=sys.stderr)
    return seconds, cpu


def dask_scaling() -> list[dict[str, Any]]:
    """Compare two workers, one worker and a plain process on the same capture, in turns, without start-up time."""
    from distributed import Client, LocalCluster

    with _room(SCALING_MB) as place:
        capture = place / "long.mace"
        records = grown(capture, SCALING_MB * 1_000_000)
        rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
        settings = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": 40}
        for turn in range(ROUNDS):
            for workers, into in rates.items():
                store = place / f"store-{turn}-{workers}"
                if workers:
                    with LocalCluster(n_workers=workers, **settings) as cluster:
                        with Client(cluster) as client:
                            client.wait_for_workers(workers)
                            client.run(importlib.import_module, "mace.replaying.part")
                        seconds = _replay(capture, store, cluster.scheduler_address)
                else:
                    seconds = _replay(capture, store, None)
                shutil.rmtree(store)
                into.append(records / seconds)
                print(f"bench: {workers} workers: {seconds:.1f} s", file=sys.stderr)
    scaling = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return [
        figure("dask_scaling", "times one worker", scaling),
        figure("dask_two_workers", "records/s", rates[2], "one worker", sum(rates[1]) / len(rates[1])),
        figure("dask_one_worker", "records/s", rates[1], "no cluster", sum(rates[0]) / len(rates[0])),
    ]


def _replay(capture: Path, store: Path, cluster: str | None) -> float:
    """Replay once, and return the seconds that it took."""
    begin = time.perf_counter()
    engine = configured.replayed(Config().correlate)
    part = max(SCALING_MB * 1_000_000 // 10, 4 << 20)
    into_store(files_at([capture]), str(store), engine, StoreConfig(), cluster=cluster, part_bytes=part)
    return time.perf_counter() - begin


def main(capture: str, store: str) -> None:
    """Entry point of the child process: replays, and prints its progress."""
    noted = 0.0
    begin = time.perf_counter()

    def told(done: int, total: int) -> None:
        nonlocal noted
        now = time.perf_counter() - begin
        if now - noted > _NOTE_S or done >= total:
            noted = now
            print(json.dumps([now, done, total]), flush=True)

    engine = configured.replayed(Config().correlate)
    into_store(files_at([Path(capture)]), store, engine, StoreConfig(), resume=True, told=told)


if __name__ == "__main__":
    main(*sys.argv[1:])
