"""The embedded store under kill -9, a second process and a full disk."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contracts.errors import StoreError
from storage import segments
from storage.embedded import EmbeddedStore
from storage.query import StoreReader
from tests.made_results import header, make_delays, make_results, make_windows
from tests.places import ROOT
from tests.unit.storage.stored import fill

# Writes until it is killed, and prints the number of acknowledged rows after each flush of one packet's rows.
WRITER = """
import asyncio, sys
from storage.embedded import EmbeddedStore
from tests.made_results import header, make_delays, make_results, make_windows

async def main(path, run):
    sink = EmbeddedStore(path, flush_interval_s=0.02, flush_rows=500)
    await sink.open(header(run))
    print("open", flush=True)
    n = 0
    while True:
        delays = make_delays(100, seed=n, first_packet=100 * n)
        await sink.write(make_results(delays, windows=make_windows(delays)))
        n += 1
        if n % 20 == 0:
            await asyncio.to_thread(sink.merge)
        print(sink.rows_stored, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@contextmanager
def writer(path, run):
    """Start a process that writes to the store; yields its Popen when it is writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), run], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_what_was_acknowledged_survives_kill_9(tmp_path):
    """After kills at random moments, also during merging, every row is stored once and no segment is incomplete."""
    chance = random.Random(1)
    acknowledged = 0
    for n in range(6):
        with writer(tmp_path, f"run-{n}") as process:
            time.sleep(chance.uniform(0.1, 1.2))
            process.send_signal(signal.SIGKILL)
            told = process.stdout.read().split("\n")[:-1]
        acknowledged += int(told[-1]) if told else 0

        store = StoreReader(tmp_path)
        live = store.segments("delays")
        assert all(pq.read_metadata(s.path).num_rows == s.rows for s in live)
        rows = store.delays(columns=["run", "packet", "position", "direction"])
        assert rows.num_rows == sum(s.rows for s in live) >= acknowledged
        # Each run numbers its packets from 1: no packet is stored twice, and none is missing in between.
        key = rows.group_by(["run", "packet", "position", "direction"]).aggregate([([], "count_all")])
        assert key.column("count_all").to_pylist() == [1] * rows.num_rows
        assert store.summary().ledger.imbalance == 0
        acknowledged = rows.num_rows
    assert not any(r.closed for r in StoreReader(tmp_path).runs())

    fill(tmp_path, [], "last")
    assert not list(tmp_path.rglob("*.tmp"))
    for table in segments.TABLES:
        assert segments.listing(tmp_path, table, covered=True) == []
    assert StoreReader(tmp_path).delays().num_rows == acknowledged


@pytest.mark.slow
def test_one_writer_at_a_time_and_any_number_of_readers(tmp_path):
    with writer(tmp_path, "first") as process:
        with pytest.raises(StoreError, match=rf"process {process.pid} on .* \(run first\)"):
            fill(tmp_path, [], "second")
        # Readers and the writer do not block each other.
        assert StoreReader(tmp_path).summary().packets >= 0
    # The kernel releases the lock when the process ends.
    fill(tmp_path, [], "second")
    assert [r.run for r in StoreReader(tmp_path).runs()] == ["first", "second"]


@pytest.mark.slow
def test_a_reader_sees_rows_while_they_are_written(tmp_path):
    with writer(tmp_path, "run"):
        seen = []
        while len(seen) < 5:
            rows = StoreReader(tmp_path).delays(columns=["packet"]).num_rows
            if rows and (not seen or rows > seen[-1]):
                seen.append(rows)
    assert seen == sorted(seen)


@contextmanager
def small_disk(path, size):
    """Mount a file system of `size` bytes at `path`."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.needs("root")
def test_a_full_disk_is_reported_and_keeps_stored_rows(tmp_path):
    with small_disk(tmp_path / "disk", 2_000_000) as disk:
        path = disk / "store"

        async def write():
            sink = EmbeddedStore(path, flush_interval_s=60.0, flush_rows=20_000)
            await sink.open(header())
            with pytest.raises(StoreError) as told:
                await write_much(sink)
            return sink, sink.rows_stored, str(told.value)

        sink, before, told = asyncio.run(run_and_close(write))
        assert "No space left on device" in told
        assert str(path) in told
        assert " rows not stored so far" in told
        assert sink.rows_not_stored > 0
        store = StoreReader(path)
        assert store.delays().num_rows == before > 0
        assert not list(path.rglob("*.tmp"))
        assert store.summary().ledger.imbalance == 0


async def write_much(sink):
    n = 0
    while True:
        delays = make_delays(2000, seed=n, first_packet=2000 * n)
        await sink.write(make_results(delays, windows=make_windows(delays[:100])))
        n += 1


async def run_and_close(write):
    sink, before, told = await write()
    try:
        await sink.aclose()
    except StoreError as e:
        # The disk is still full: closing must report it again.
        assert "No space" in str(e)  # noqa: PT017
    return sink, before, told


@pytest.mark.needs("root")
def test_a_full_disk_at_the_start(tmp_path):
    with small_disk(tmp_path / "disk", 16_384) as disk:
        (disk / "ballast").write_bytes(b"\0" * 4096)
        room = os.statvfs(disk)
        (disk / "more").write_bytes(b"\0" * room.f_bavail * room.f_bsize)
        with pytest.raises(StoreError, match="No space left on device"):
            fill(disk / "store", [])


def test_a_directory_without_write_permission(tmp_path):
    """The path is below a file of /proc, so no user can write there, not even root."""
    with pytest.raises(StoreError, match="cannot open the store"):
        fill(Path("/proc/self/no-store"), [])


def test_the_files_have_the_documented_layout(tmp_path):
    delays = make_delays(50)
    fill(tmp_path, [make_results(delays, windows=make_windows(delays))])
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert names == [
        "delays/day=2025-06-15/hour=15/000000000002-000000000002.325.parquet",
        "ledger/day=2025-06-15/hour=15/000000000002-000000000002.1.parquet",
        "lock",
        "runs/000000000001-000000000001.1.parquet",
        "store.json",
        "windows/day=2025-06-15/hour=15/000000000002-000000000002.13.parquet",
    ]
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": "mace-store", "schema": 2}
