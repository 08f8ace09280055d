"""A replay in parts stores what one engine would store, however it is divided, stopped, killed or distributed."""

import asyncio
import json
import shutil
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import duckdb
import pyarrow.parquet as pq
import pytest

from collector.files import FileOptions
from collector.reading.opening import filesystem
from contracts.config import StoreConfig
from contracts.errors import CaptureError, Stopped, StoreError, Unavailable
from contracts.schema import SCHEMA_VERSION
from correlator.engine import EngineConfig
from mace.replaying.assembly import Assembly
from mace.replaying.into_store import files_at, into_store
from mace.replaying.part import run_part
from storage import segments, sql, tables
from storage.embedded import EmbeddedStore
from storage.places import LocalPlace
from storage.query import StoreReader
from tests.durations import S
from tests.made_capture import HEADER, capture_bytes
from tests.made_replay import ENGINE, count_rows, differences, hard_stream, one_engine, write_capture
from tests.measuring import mace, start, wait_for

CONFIG = StoreConfig(sync=False)
PART = 40_000
"""Bytes of a part: the capture is cut into a dozen parts or more."""


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    return write_capture(tmp_path_factory.mktemp("capture") / "hard.mace")


@pytest.fixture(scope="module")
def reference(capture, tmp_path_factory):
    """Return (store, summary) of a replay by one engine."""
    store = tmp_path_factory.mktemp("reference") / "store"
    return store, one_engine([capture], store)


def files(*paths, salvage=False):
    return files_at(paths, FileOptions(salvage=salvage))


def replayed(capture, store, **how):
    return into_store(files(capture), str(store), ENGINE, CONFIG, **{"part_bytes": PART} | how)[0]


@pytest.mark.slow
def test_parts_in_turn(capture, reference, tmp_path):
    summary = replayed(capture, tmp_path / "store")
    assert count_rows(tmp_path / "store", "delays") > 50_000
    assert differences(reference[0], tmp_path / "store") == {}
    assert summary.as_dict() == reference[1].as_dict()
    assert summary.ledger.imbalance == 0
    assert summary.ledger.lost == 15
    assert not (tmp_path / "store" / "replay").exists()


@pytest.mark.slow
def test_the_store_reads_like_any_other(capture, reference, tmp_path):
    replayed(capture, tmp_path / "store")
    one, other = (StoreReader(path) for path in (reference[0], tmp_path / "store"))
    assert one.summary().as_dict() == other.summary().as_dict()
    assert [replace(run, upto_utc_ns=0) for run in one.runs()] == [replace(run, upto_utc_ns=0) for run in other.runs()]
    assert other.runs()[0].closed
    # The newest names apply, also to packets in flight and open windows at the change of name.
    assert {key[0].container for key, _ in other.summary().overhead()} == {"naïve-0", "naïve-1", "renamed", "naïve-3"}
    assert other.summary().on_host_network == ["agent", "image.sif[7]"]
    pod = [row for row in other.summary().as_dict()["overhead"] if row["container"] == "naïve-3"]
    assert [row["pod_containers"] for row in pod] == [["app", "sidecar"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("warm_up_ns", [0, 100_000_000, 10**12])
def test_parts_with_a_supposed_state(capture, reference, tmp_path, warm_up_ns):
    """Without warm-up most parts suppose a wrong state and are done again; after a full warm-up none does."""
    again = Counter()
    with Assembly(
        files(capture), str(tmp_path / "store"), ENGINE, CONFIG, part_bytes=PART, warm_up_ns=warm_up_ns
    ) as assembly:
        assert assembly.parts_total > 6
        done = [run_part(replace(task, state=None)) for task in assembly.tasks()]
        for each in done:
            right = assembly.follows(each)
            again[right] += 1
            assembly.commit(each if right else run_part(assembly.task(each.capture, each.part)))
        assembly.finish()
    assert differences(reference[0], tmp_path / "store") == {}
    if warm_up_ns == 0:
        assert again[False]
    if warm_up_ns == 10**12:
        assert not again[False]


@pytest.mark.slow
def test_no_rows_and_no_store(capture, reference, tmp_path):
    windows_only = replace(ENGINE, rows=False)
    into_store(files(capture), str(tmp_path / "store"), windows_only, CONFIG, part_bytes=PART)
    assert not (tmp_path / "store" / "delays").exists()
    assert count_rows(tmp_path / "store", "windows") == count_rows(reference[0], "windows")
    summary, _ = into_store(files(capture), None, ENGINE, CONFIG, part_bytes=PART)
    assert summary.as_dict() == reference[1].as_dict()


# Stopping, resuming, faults -----------------------------------------------------------------------------------


def stop_after(parts):
    """Return `stop` and `told` for `into_store` that stop after some committed parts, during another part."""
    asked = []

    def told(done, total):
        asked.append(done)

    return {"told": told, "stop": lambda: len(asked) > parts * 40}


@pytest.mark.slow
def test_stopped_and_resumed_again_and_again(capture, reference, tmp_path):
    store, summary = tmp_path / "store", None
    stops = []
    while summary is None:
        try:
            summary = replayed(capture, store, resume=True, **stop_after(1))
        except Stopped as told:
            stops.append(str(told))
            assert len(stops) < 100
    assert len(stops) > 2
    assert all("--resume continues" in told for told in stops)
    assert differences(reference[0], store) == {}
    assert summary.as_dict() == reference[1].as_dict()


@pytest.mark.slow
def test_a_replay_of_an_older_version_is_resumed(capture, reference, tmp_path, monkeypatch):
    """The parts before the stop have files of schema version 1, the parts after it files of today."""
    store = tmp_path / "store"
    with monkeypatch.context() as then:
        then.setattr(tables, "to_stored", lambda rows: rows)
        then.setattr(tables, "STORED_SCHEMAS", tables.SCHEMAS)
        then.setattr(tables, "nothing_encoded", lambda table: tables.encode(tables.SCHEMAS[table].empty_table(), table))
        then.setattr("mace.replaying.assembly.ABOUT", b'{"format": "mace-store", "schema": 1}')
        with pytest.raises(Stopped):
            replayed(capture, store, **stop_after(2))
    assert json.loads((store / "store.json").read_text())["schema"] == 1
    summary = replayed(capture, store, resume=True)
    assert json.loads((store / "store.json").read_text())["schema"] == SCHEMA_VERSION
    kinds = {tables.REMAINDER in pq.read_schema(each.path).names for each in segments.listing(store, "delays")}
    assert kinds == {True, False}
    assert summary.as_dict() == reference[1].as_dict()
    found, expected = (
        sql.table(StoreReader(path), "SELECT * REPLACE (epoch_ns(time) AS time) FROM delays ORDER BY ALL")
        for path in (store, reference[0])
    )
    assert found.equals(expected)


@pytest.mark.slow
def test_killed_between_any_two_steps_of_a_commit(capture, reference, tmp_path, monkeypatch):
    """The file system fails at the n-th change of a commit; a resume completes the commit."""

    class Killed(BaseException):
        pass

    left = [0]

    def counted(name):
        plain = getattr(LocalPlace, name)

        def call(self, *args):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return plain(self, *args)

        return call

    for name in ("write", "move", "remove"):
        monkeypatch.setattr(LocalPlace, name, counted(name))
    store, kills = tmp_path / "store", 0
    while True:
        left[0] = 9 + kills % 7
        try:
            replayed(capture, store, resume=True)
        except Killed:
            kills += 1
            assert kills < 200
        else:
            break
    assert kills > 5
    assert differences(reference[0], store) == {}


def test_an_unfinished_replay_is_not_written_over(capture, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        replayed(capture, store, **stop_after(1))
    with pytest.raises(StoreError, match=r"continue it with --resume"):
        replayed(capture, store)
    with pytest.raises(StoreError, match=r"a different replay.*correlator settings"):
        into_store(files(capture), str(store), EngineConfig(), CONFIG, resume=True)
    other = write_capture(tmp_path / "other.mace", replace(HEADER, run="other"))
    with pytest.raises(StoreError, match=r"a different replay.*files: "):
        into_store(files(other), str(store), ENGINE, CONFIG, resume=True)
    plan = json.loads((store / "replay" / "plan.json").read_text())
    (store / "replay" / "plan.json").write_text(json.dumps(plan | {"mace-replay": 1}))
    with pytest.raises(StoreError, match=r"a different replay.*version of MACE"):
        into_store(files(capture), str(store), ENGINE, CONFIG, resume=True)

    with pytest.raises(StoreError, match="a replay was stopped here"):
        asyncio.run(EmbeddedStore(store).open(HEADER))
    (store / "replay" / "plan.json").write_text("{}")
    with pytest.raises(StoreError, match="damaged"):
        replayed(capture, store, resume=True)


@pytest.mark.slow
def test_a_run_is_stored_once(capture, tmp_path):
    replayed(capture, tmp_path / "store")
    for resume in (False, True):
        with pytest.raises(StoreError, match="already holds run"):
            replayed(capture, tmp_path / "store", resume=resume)
    copy = shutil.copy(capture, tmp_path / "copy.mace")
    with pytest.raises(StoreError, match="several of the files"):
        into_store(files(capture, copy), str(tmp_path / "both"), ENGINE, CONFIG)


def test_a_foreign_directory_is_refused(capture, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not a MACE store"):
        replayed(capture, tmp_path)


@pytest.mark.slow
def test_damage_ends_the_replay_after_the_sound_part(capture, tmp_path):
    data = bytearray(capture.read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad.mace").write_bytes(data)
    with pytest.raises(CaptureError, match="at byte"):
        replayed(tmp_path / "bad.mace", tmp_path / "store")
    assert count_rows(tmp_path / "store", "delays") > 0
    summary, warnings = into_store(
        files(tmp_path / "bad.mace", salvage=True), str(tmp_path / "salvaged"), ENGINE, CONFIG, part_bytes=PART
    )
    assert summary.ledger.discarded > 0
    assert any("skipped" in told for told in warnings)
    assert json.loads((tmp_path / "salvaged" / "store.json").read_text())["schema"] == SCHEMA_VERSION


@pytest.mark.slow
def test_a_capture_without_an_end_is_reported(capture, tmp_path):
    (tmp_path / "cut.mace").write_bytes(capture_bytes(hard_stream(), end=False)[:-10])
    store = tmp_path / "store"
    _, warnings = into_store(files(tmp_path / "cut.mace"), str(store), ENGINE, CONFIG, part_bytes=PART)
    assert any("without END mark" in told for told in warnings)
    reference = tmp_path / "reference"
    one_engine([tmp_path / "cut.mace"], reference)
    assert differences(reference, store) == {}


@pytest.mark.slow
def test_the_command_line_killed_at_any_time(capture, reference, tmp_path):
    """The command is ended by SIGTERM and SIGKILL a few times each, and then runs to its end."""
    long = write_capture(tmp_path / "long.mace", slower=60)
    argv = ("replay", long, "--store", tmp_path / "store", "--part-mib", "0.04", "--json")
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(*argv, "--resume")
        note = tmp_path / "store" / "replay" / "00000.json"
        before = note.read_bytes() if note.exists() else b""
        # A new part is committed, and the command works on the next one.
        wait_for(lambda: process.poll() is not None or (note.exists() and note.read_bytes() != before), 120)  # noqa: B023
        assert process.poll() is None, "done too soon"
        process.send_signal(how)
        _, told = process.communicate(timeout=60)
        assert process.returncode == (-how if how is signal.SIGKILL else 1), told
        if how is not signal.SIGKILL:
            assert "--resume continues" in told
    done = mace(*argv, "--resume")
    one_engine([long], tmp_path / "reference", EngineConfig(slice_ns=S))
    assert differences(tmp_path / "reference", tmp_path / "store") == {}
    assert done.stdout == mace("replay", long, "--json").stdout


# Files and stores elsewhere -----------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """Provide fsspec's in-memory file system, empty before and after."""
    files_there = pytest.importorskip("fsspec").filesystem("memory")
    yield files_there
    files_there.rm("/", recursive=True)


@pytest.mark.slow
def test_from_a_url_into_a_url(capture, reference, tmp_path, memory):
    memory.pipe("/captures/hard.mace", capture.read_bytes())
    files_there = files("memory://captures/hard.mace")
    store = "memory://stores/one"
    with pytest.raises(Stopped):
        into_store(files_there, store, ENGINE, CONFIG, part_bytes=PART, **stop_after(1))
    into_store(files_there, store, ENGINE, CONFIG, part_bytes=PART, resume=True)
    memory.get("/stores/one", str(tmp_path / "here"), recursive=True)
    assert differences(reference[0], tmp_path / "here") == {}
    with pytest.raises(StoreError, match="needs an empty place"):
        into_store(files_there, store, ENGINE, CONFIG)

    with duckdb.connect() as connection:
        connection.register_filesystem(memory)
        rows = "read_parquet('memory://stores/one/delays/**/*.parquet', hive_partitioning=false)"
        [(count, total)] = connection.execute(f"SELECT count(*), sum(delay_ns)::BIGINT FROM {rows}").fetchall()
    polars = pytest.importorskip("polars")
    frames = [
        polars.read_parquet(memory.cat_file(name), columns=["delay_ns"])
        for name in memory.glob("/stores/one/delays/**/*.parquet")
    ]
    assert count == count_rows(reference[0], "delays") == sum(map(len, frames))
    assert total == polars.concat(frames)["delay_ns"].sum()


@contextmanager
def served(folder):
    """Provide the URL of a web server on loopback that serves a folder with ranges, and the list of its requests."""
    web = pytest.importorskip("aiohttp.web")
    loop, asked = asyncio.new_event_loop(), []

    @web.middleware
    async def noting(request, handler):
        asked.append((request.method, request.path, request.headers.get("Range", "")))
        return await handler(request)

    async def start():
        application = web.Application(middlewares=[noting])
        application.router.add_static("/", folder)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.slow
def test_from_a_web_server(capture, reference, tmp_path):
    """A replay reads ranges of a capture from a real web server."""
    pytest.importorskip("fsspec")
    with served(capture.parent) as (url, asked):
        into_store(files(f"{url}/{capture.name}"), str(tmp_path / "store"), ENGINE, CONFIG, part_bytes=PART)
        with pytest.raises(Unavailable, match=r"none\.mace"):
            files(f"{url}/none.mace")
    assert differences(reference[0], tmp_path / "store") == {}
    assert {ranges.split("-")[0] for method, _, ranges in asked if method == "GET" and ranges} >= {"bytes=0"}


@pytest.mark.slow
def test_file_urls_are_local_paths(capture, reference, tmp_path):
    pytest.importorskip("fsspec")
    into_store(files(f"file://{capture}"), f"file://{tmp_path}/store", ENGINE, CONFIG, part_bytes=PART)
    assert differences(reference[0], tmp_path / "store") == {}


def test_an_unknown_scheme_is_refused():
    for url, told in (("nosuch://a/b.mace", "nosuch"), ("memory://nothing/here.mace", "here.mace")):
        with pytest.raises(Unavailable, match=told):
            files(url)


def test_s3_is_an_extra():
    pytest.importorskip("s3fs")
    remote, path = filesystem("s3://bucket/host.mace")
    assert (remote.protocol[0], path) == ("s3", "bucket/host.mace")
