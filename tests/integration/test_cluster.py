"""Replays on Dask workers give the same store, also if a worker is killed; figures of many hosts equal known ones."""

import json
import os
import signal
import subprocess
import sys

import duckdb
import numpy as np
import pytest

from contracts import histogram
from tests.durations import S
from tests.made_fleet import HOSTS, make_fleet
from tests.made_replay import EngineConfig, count_rows, differences, one_engine, write_capture
from tests.measuring import ROOT, mace, start, wait_for

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow
LIKE_THE_COMMAND_LINE = EngineConfig(slice_ns=S)
PART_MIB = "0.06"


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    return write_capture(tmp_path_factory.mktemp("long") / "long.mace", slower=50)


@pytest.fixture(scope="module")
def reference(capture, tmp_path_factory):
    store = tmp_path_factory.mktemp("reference") / "store"
    one_engine([capture], store, LIKE_THE_COMMAND_LINE)
    return store


def test_two_local_workers(capture, reference, tmp_path):
    """SIGINT, which a terminal sends to all processes, stops a replay, and it is resumed."""
    argv = ("replay", capture, "--part-mib", PART_MIB, "--json")
    on_cluster = (*argv, "--store", tmp_path / "store", "--cluster", "local:2")
    first = start(*on_cluster, start_new_session=True)
    wait_for((tmp_path / "store" / "replay" / "00000.json").exists, 120)
    os.killpg(first.pid, signal.SIGINT)
    _, told = first.communicate(timeout=120)
    assert first.returncode == 1
    assert told.startswith("mace: stopped after")
    assert len(told.splitlines()) == 1

    done = mace(*on_cluster, "--resume")
    assert differences(reference, tmp_path / "store") == {}
    assert count_rows(tmp_path / "store", "ledger") > 5, "not cut into parts"
    assert done.stdout == mace(*argv, "--store", tmp_path / "alone").stdout
    assert done.stderr == ""


@pytest.fixture
def scheduler(tmp_path):
    """Start a Dask scheduler and two workers as an operator would; yields the address and the workers' processes."""
    about = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    dask = (sys.executable, "-m", "distributed.cli")
    local = ("--host", "127.0.0.1", "--no-dashboard")
    started = [
        subprocess.Popen(
            [*dask[:2], "distributed.cli.dask_scheduler", *local, "--port", "0", "--scheduler-file", str(about)],
            **quiet,
        )
    ]
    try:
        wait_for(lambda: about.exists() and about.read_text().endswith("}"), 120)
        for _ in range(2):
            argv = ["--scheduler-file", str(about), "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path)]
            started.append(subprocess.Popen([*dask[:2], "distributed.cli.dask_worker", *local, *argv], **quiet))
        yield json.loads(about.read_text())["address"], started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_worker_that_is_killed_changes_nothing(capture, reference, tmp_path, scheduler):
    address, workers = scheduler
    store = tmp_path / "store"
    replay = start("replay", capture, "--store", store, "--part-mib", PART_MIB, "--json", "--cluster", address)
    try:
        # A part is in progress: its files are staged and not committed.
        wait_for(lambda: replay.poll() is not None or any((store / "replay").glob("staged/*/*")), 120)
        assert replay.poll() is None, replay.communicate()
        os.kill(workers[0].pid, signal.SIGKILL)
        out, err = replay.communicate(timeout=120)
    finally:
        replay.kill()
    assert replay.returncode == 0, err
    assert json.loads(out)["packets"] > 0
    assert differences(reference, store) == {}
    assert not (store / "replay").exists()


def test_a_fleet_of_known_truth(tmp_path):
    """Counts, sums, extremes and quantiles of a hundred hosts equal the made-up values to the nanosecond."""
    captures, fleet = make_fleet(tmp_path)
    store = tmp_path / "store"
    mace("replay", *captures, "--store", store, "--cluster", "local:2", "--json")

    asked = "SELECT host, container, device, direction, segment, count(*), sum(delay_ns), min(delay_ns), max(delay_ns)"
    rows = json.loads(mace("query", "--store", store, f"{asked} FROM delays GROUP BY ALL", "--json").stdout)["rows"]
    found = {tuple(row[:5]): tuple(row[5:]) for row in rows}
    assert found == {key: (len(v), sum(v), min(v), max(v)) for key, v in fleet.delays.items()}

    report = json.loads(mace("report", "--store", store, "--json").stdout)
    wanted = {key: v for key, v in fleet.delays.items() if key[4] == "overhead"}
    assert len(report["overhead"]) == len(wanted) == 4 * HOSTS
    for entry in report["overhead"]:
        delays = np.array(wanted[entry["host"], entry["container"], "eth0", entry["direction"], "overhead"])
        bins, counts = np.unique(histogram.bins_of(delays), return_counts=True)
        p50, p99 = histogram.quantiles(bins, counts, (0.5, 0.99)).clip(delays.min(), delays.max())
        assert (entry["count"], entry["p50_ns"], entry["p99_ns"]) == (len(delays), p50, p99)

    with duckdb.connect() as connection:
        windows = connection.execute(
            "SELECT host, container, device, direction, segment, sum(count)::BIGINT, sum(sum_ns)::BIGINT, min(min_ns),"
            f" max(max_ns) FROM read_parquet('{store}/windows/**/*.parquet') WHERE width_s = 10 GROUP BY ALL"
        ).fetchall()
        ledgers = connection.execute(
            "SELECT host, records, matched, dropped, lost, unmatched + ambiguous + expired + in_flight + discarded"
            f" FROM read_parquet('{store}/ledger/**/*.parquet') WHERE closed"
        ).fetchall()
    assert {row[:5]: row[5:] for row in windows} == found
    assert {host: tuple(counts) for host, *counts, other in ledgers if not other} == fleet.ledgers


def test_polars_reads_the_same(tmp_path):
    polars = pytest.importorskip("polars")
    captures, fleet = make_fleet(tmp_path, hosts=2)
    mace("replay", *captures, "--store", tmp_path / "store", "--json")
    frame = polars.scan_parquet(str(tmp_path / "store" / "delays" / "**" / "*.parquet"), hive_partitioning=False)
    keys = ("host", "container", "device", "direction", "segment")
    summed = frame.group_by(keys).agg(polars.len(), polars.col("delay_ns").sum()).collect()
    found = {tuple(map(str, row[:5])): row[5:] for row in summed.iter_rows()}
    assert found == {key: (len(v), sum(v)) for key, v in fleet.delays.items()}


def test_faults_are_reported_in_one_line(tmp_path, capture):
    for address, told in (("local:none", "expected local:N"), ("tcp://127.0.0.1:1", "no Dask scheduler answers there")):
        done = mace("replay", capture, "--store", tmp_path / "store", "--cluster", address, check=False)
        assert done.returncode in {1, 2}
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1
    data = bytearray(capture.read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad.mace").write_bytes(data)
    done = mace(
        *("replay", tmp_path / "bad.mace", "--store", tmp_path / "bad", "--part-mib", PART_MIB, "--cluster", "local:1"),
        check=False,
    )
    assert done.returncode == 1
    assert "bad.mace: at byte" in done.stderr
