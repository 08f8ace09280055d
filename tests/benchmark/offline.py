"""From a capture of a real flood to windows, and to rows in the store, on one core."""

import asyncio
import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture_source import Capture
from collector.ftrace_source import keep_freed_memory
from correlator.engine import Engine, EngineConfig
from mace.hooks import Hook
from mace.records import Batch
from mace.session import REPLAY_SLICE_NS
from storage.embedded import EmbeddedStore
from tests.benchmark.figures import figure, folder, one_core, recorded_flood, rounds

ROUNDS = 7
SECONDS = 6


def capture_to_windows() -> list[dict[str, Any]]:
    """records/s, file in the page cache -> windows; target: 5 million.

    The peer is DuckDB on one thread with a Parquet file of the four columns it needs: each record with the one before
    it of the same buffer, and count, sum, extremes and the four quantiles of the delays per second and pair of devices.
    It tells no life of a buffer from the next, no container from another, no loss, and adds up no path.
    """
    with folder() as place:
        recorded_flood(place / "flood.mace", SECONDS)
        whole = _columns(place / "flood.mace", place / "flood.parquet")
        size = (place / "flood.mace").stat().st_size
        with one_core():
            keep_freed_memory()
            values = rounds(lambda: _windows(place / "flood.mace"), ROUNDS)
            peer = rounds(lambda: whole / _duckdb_s(place / "flood.parquet"), 3)
    return [
        figure("capture_to_windows", "records/s", values, "DuckDB, pairs of records only", sorted(peer)[1]),
        figure("capture_bytes_per_record", "bytes", [size / whole]),
    ]


def _columns(capture: Path, target: Path) -> int:
    """Write the columns of a capture as Parquet; how many records there are."""
    with Capture(capture) as source:
        whole = Batch.concatenate([item for item in source if isinstance(item, Batch)])
    table = pa.table({"ts": whole.ts_ns, "skb": whole.skb_id, "dev": whole.dev, "hook": whole.hook})
    pq.write_table(table, target, compression="zstd", compression_level=1)
    return len(whole)


def _windows(path: Path) -> float:
    begin = time.perf_counter()
    records = 0
    with Capture(path) as capture:
        config = EngineConfig(rows=False, slice_ns=REPLAY_SLICE_NS)
        engine = Engine(capture.header.clock.offset_ns, config)
        for item in capture:
            if isinstance(item, Batch):
                records += len(item)
            engine.feed(item)
        engine.finish()
    return records / (time.perf_counter() - begin)


def _duckdb_s(parquet: Path) -> float:
    hooks = (Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT, Hook.NETIF_RECEIVE_SKB)
    begin = time.perf_counter()
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        connection.execute(
            f"""SELECT second, came, dev, count(*), sum(delay), min(delay), max(delay),
                       quantile_disc(delay, [0.5, 0.9, 0.99, 0.999])
                FROM (SELECT ts // 1000000000 AS second, lag(dev) OVER life AS came, dev, ts - lag(ts) OVER life AS delay
                      FROM '{parquet}' WHERE hook IN {tuple(map(int, hooks))}
                      WINDOW life AS (PARTITION BY skb ORDER BY ts))
                WHERE came <> dev GROUP BY ALL"""
        ).fetchall()
    return time.perf_counter() - begin


def capture_to_rows() -> list[dict[str, Any]]:
    """rows/s, file in the page cache -> rows in Parquet segments, synced; target: 2 million."""
    pa.set_cpu_count(1)
    with folder() as place:
        recorded_flood(place / "flood.mace", SECONDS)
        turn = iter(range(100))
        with one_core():
            keep_freed_memory()
            values = rounds(lambda: asyncio.run(_rows(place / "flood.mace", place / f"store{next(turn)}")), ROUNDS)
    return [figure("capture_to_rows", "rows/s", values)]


async def _rows(path: Path, store: Path) -> float:
    begin = time.perf_counter()
    rows = 0
    with Capture(path) as capture:
        engine = Engine(capture.header.clock.offset_ns, EngineConfig(slice_ns=REPLAY_SLICE_NS))
        sink = EmbeddedStore(store)
        await sink.open(capture.header)
        for item in capture:
            for results in engine.feed(item):
                rows += len(results.delays)
                await sink.write(results)
        last = engine.finish()
        await sink.write(last)
        await sink.aclose()
    return (rows + len(last.delays)) / (time.perf_counter() - begin)
