"""A store of schema version 1 is read, continued, merged and verified; new files keep every digit of a time.

Files of version 1 have nanoseconds in `time`, those of version 2 microseconds and a remainder.
"""

import asyncio
import json
import os
import shutil

import dask.dataframe
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import StoreError
from contracts.schema import SCHEMA_VERSION
from storage import embedded, segments, sql, tables
from storage.check import check
from storage.converting import convert
from storage.embedded import EmbeddedStore, lock_store
from storage.query import Filter, StoreReader
from storage.sealing.check import check as check_seal
from tests.made_results import HEADER, START_NS, header, make_delays, make_results, make_windows, with_rows
from tests.places import GOLDEN
from tests.sealing import new_key
from tests.unit.storage.stored import fill

OLD = GOLDEN / "store-1" / "store"
EXPECTED = json.loads((GOLDEN / "store-1" / "expected.json").read_text())
NEWER = {"round_trips": dict.fromkeys(("tracer_cost_ns", "tracer_cost_error_ns"))}
"""Columns that the old files lack, which are null."""


def rows_of(store, table):
    found = sql.table(StoreReader(store), f"SELECT * REPLACE (epoch_ns(time) AS time) FROM {table}").to_pylist()
    return sorted(found, key=repr)


def results(first_packet=0):
    delays = make_delays(40, containers=2, first_packet=first_packet, start_ns=START_NS + 1)
    return with_rows(make_results(delays, containers=2), windows=windows_of(delays))


def windows_of(delays):
    return make_results(delays, containers=2, windows=make_windows(delays)).rows.windows


def old_format(monkeypatch):
    """Write files as version 1 did."""
    monkeypatch.setattr(tables, "to_stored", lambda rows: rows)
    monkeypatch.setattr(embedded, "ABOUT", b'{"format": "mace-store", "schema": 1}')


@pytest.fixture
def store(tmp_path):
    """A copy of the old store without its seal, whose key is not kept."""
    return shutil.copytree(OLD, tmp_path / "store", ignore=shutil.ignore_patterns("seal"))


@pytest.mark.parametrize("table", segments.TABLES)
def test_an_old_store_is_read_as_it_is(table):
    # Wide windows are newer than stores of version 1.
    assert rows_of(OLD, table) == [row | NEWER.get(table, {}) for row in EXPECTED.get(table, [])]


def test_an_old_store_is_checked_and_its_seal_verified():
    assert not any(each.damaged or each.without_checksum for each in check(OLD))
    found = check_seal(OLD)
    assert (found.state, found.findings) == ("intact", [])


@pytest.mark.slow
def test_old_and_new_segments_in_one_query_and_in_one_segment(store, monkeypatch):
    delays = results().rows.delays
    fill(store, [results()], head=header("new"))
    assert json.loads((store / "store.json").read_text())["schema"] == SCHEMA_VERSION

    def whole():
        return {table: rows_of(store, table) for table in segments.TABLES}

    before = whole()
    assert [row for row in before["delays"] if row["run"] == HEADER.run] == EXPECTED["delays"]
    assert sorted(row["time"] for row in before["delays"] if row["run"] == "new") == sorted(delays.utc_ns.tolist())
    at = int(delays.utc_ns[5])
    found = StoreReader(store).delays(Filter(since_ns=at, until_ns=at + 1), ("time", "run"))
    assert found["time"].cast(pa.int64()).unique().to_pylist() == [at]
    assert found["run"].unique().to_pylist() == ["new"]

    monkeypatch.setattr(segments, "FAN_IN", 2)
    assert EmbeddedStore(store, fsync=False).merge() > 0
    [merged] = segments.listing(store, "delays")
    assert pq.read_schema(merged.path).remove_metadata() == pa.schema(tables.STORED_SCHEMAS["delays"])
    assert whole() == before
    assert not any(each.damaged for each in check(store))


def test_an_old_sealed_store_is_sealed_on(tmp_path, monkeypatch):
    key, store = new_key(tmp_path), tmp_path / "store"
    with monkeypatch.context() as then:
        old_format(then)
        fill(store, [results()], head=header("old"), seal=key)
        assert (store / "store.json").read_bytes() == (OLD / "store.json").read_bytes()
        assert b"time_remainder_ns" not in segments.listing(store, "delays")[0].path.read_bytes()
    before = rows_of(store, "delays")
    monkeypatch.setattr(segments, "FAN_IN", 2)

    async def write():
        sink = EmbeddedStore(store, fsync=False, flush_interval_s=60.0, seal=key)
        await sink.open(header("new"))
        await sink.write(results())
        await sink._submit()
        await sink._encoding
        assert sink.merge() > 0
        await sink.aclose()

    asyncio.run(write())
    found = check_seal(store)
    assert (found.state, found.findings) == ("intact", [])
    assert len(segments.listing(store, "delays")) == 1
    assert [row for row in rows_of(store, "delays") if row["run"] == "old"] == before


OTHERS = ("in_duckdb", "in_polars", "in_pandas", "in_dask")


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of Dask's own call of pandas
def test_a_converted_store_has_the_same_rows_for_every_reader(store):
    before = {
        each.path: each.path.stat().st_mtime_ns for table in segments.TABLES for each in segments.listing(store, table)
    }
    found = {one.table: one for one in convert(store)}
    assert sum(one.converted for one in found.values()) == len(before)
    assert sum(one.rows for one in found.values()) == sum(map(len, EXPECTED.values()))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "names and times of writing"
    for table in segments.TABLES:
        assert rows_of(store, table) == [row | NEWER.get(table, {}) for row in EXPECTED.get(table, [])]
        for each in segments.listing(store, table):
            assert pq.read_schema(each.path).remove_metadata().equals(pa.schema(tables.STORED_SCHEMAS[table]))
    times = sorted(row["time"] for row in EXPECTED["delays"])
    paths = [str(each.path) for each in segments.listing(store, "delays")]
    for name in OTHERS:
        assert sorted(np.asarray(globals()[name](paths)).tolist()) == times, name
    assert not any(each.damaged or each.without_checksum for each in check(store))
    assert json.loads((store / "store.json").read_text())["schema"] == SCHEMA_VERSION
    assert not any(one.converted or one.damaged for one in convert(store)), "the second time there is nothing to do"


def test_a_damaged_segment_is_left_as_it_is_and_named(store):
    bad = segments.listing(store, "delays")[0].path
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    found = {one.table: one for one in convert(store)}
    assert list(found["delays"].damaged) == [bad]
    assert bad.read_bytes() == data


def test_stores_that_are_not_converted(store, tmp_path):
    with pytest.raises(StoreError, match="the store is sealed"):
        convert(OLD)
    with pytest.raises(StoreError, match="not a MACE store"):
        convert(tmp_path / "none")
    held = lock_store(store, "a test")
    try:
        with pytest.raises(StoreError, match="is writing to this store"):
            convert(store)
    finally:
        os.close(held)
    assert json.loads((store / "store.json").read_text())["schema"] == 1


def test_a_newer_store_is_refused(store):
    (store / "store.json").write_text(json.dumps({"format": "mace-store", "schema": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError, match="upgrade MACE"):
        StoreReader(store)


def in_duckdb(paths):
    found = duckdb.execute(
        "SELECT epoch_us(time) * 1000 + time_remainder_ns FROM read_parquet($paths, hive_partitioning = false)",
        {"paths": list(paths)},
    )
    return found.fetchnumpy().popitem()[1]


def in_polars(paths):
    frame = pl.scan_parquet(paths, hive_partitioning=False)
    return frame.select(pl.col("time").dt.timestamp("us") * 1000 + pl.col("time_remainder_ns")).collect().to_series()


def in_pandas(paths):
    frame = pd.concat([pd.read_parquet(path, partitioning=None) for path in paths])
    return frame["time"].astype("int64") * 1000 + frame["time_remainder_ns"]


def in_dask(paths):
    frame = dask.dataframe.read_parquet(paths)
    return (frame["time"].astype("int64") * 1000 + frame["time_remainder_ns"]).compute(scheduler="synchronous")


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of Dask's own call of pandas
@pytest.mark.parametrize("read", [in_duckdb, in_polars, in_pandas, in_dask])
def test_other_readers_find_every_digit(tmp_path, read):
    delays = results().rows.delays
    fill(tmp_path, [results()])
    paths = [str(each.path) for each in segments.listing(tmp_path, "delays")]
    assert sorted(np.asarray(read(paths)).tolist()) == sorted(delays.utc_ns.tolist())


@pytest.mark.parametrize("ns", [0, 1, 999, 1_000, 65_536_999, 1_750_000_000_123_456_789, -1, -1_000, -1_001])
def test_a_time_is_cut_and_joined(ns):
    rows = pa.Table.from_pylist([{"time": ns}], pa.schema([tables.SCHEMAS["cpus"].field("time")]))
    stored = tables.to_stored(rows)
    assert stored["time"].cast(pa.int64())[0].as_py() * 1_000 + stored[tables.REMAINDER][0].as_py() == ns
    assert 0 <= stored[tables.REMAINDER][0].as_py() < 1_000
    assert tables.from_stored(stored).equals(rows)
