"""A capture that is hard to cut, the store that one engine makes of it, and a comparison of stores."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np

from collector.capture.source import CaptureReader
from collector.reading.streaming import FileSource
from contracts.figures import Summary
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Sharer
from correlator.engine import EngineConfig
from mace.live import pipeline
from storage.embedded import EmbeddedStore
from storage.query import StoreReader
from tests.durations import S
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic

ENGINE = EngineConfig(timeout_ns=50_000_000, slice_ns=S // 4, stages=True)
"""Cuts are at multiples of a quarter of a second."""
SLOWER = 12


def hard_stream(count=240_000, seed=3, *, content=True, slower=SLOWER, header=HEADER):
    """Return a stream over several seconds and across a full hour that is hard to cut.

    It has losses, a container that disappears and returns, a container that is renamed, a container on the host's
    network, and packets that are under way for long.
    """
    made = traffic(count, seed, content=content)
    start = TOPOLOGY.from_ns
    # 3 s before the hour, by the header's clock.
    hour = 3600 * S
    start += -(start + header.clock.offset_ns) % hour - 3 * S
    ts = start + (made.ts_ns - TOPOLOGY.from_ns) * slower
    made = replace(made, ts_ns=ts)
    rng = np.random.default_rng(seed)
    at = np.sort(rng.integers(ts[0], ts[-1], 5))
    gaps = Batch.of(
        5,
        ts_ns=at,
        skb_id=(at + 2_000_000).astype("u8"),
        cpu=np.arange(5) % 2,
        l3_len=[3, 0, 9, 1, 2],
        hook=[Hook.LOST] * 5,
    )
    # A packet is queued at the container while the driver is busy again and again, across the cuts, and then continues.
    slow = ts[0] + np.arange(1, 800) * 10_000_000
    slow = slow[slow < ts[-1]]
    queued = np.full(len(slow), 2)
    queued[0] = 1
    late = Batch.of(
        len(slow),
        ts_ns=slow,
        skb_id=np.full(len(slow), 99, "u8"),
        dev=np.full(len(slow), 1),
        l3_len=np.full(len(slow), 84),
        hook=queued,
    )
    whole = Batch.concatenate([made, gaps, late])
    # A marker stands before every record of its gap.
    whole = whole[np.lexsort((whole.hook != Hook.LOST, whole.ts_ns))]
    third = ts[0] + (ts[-1] - ts[0]) // 3
    present = [replace(d, container_id=d.container and f"{d.netns:064x}") for d in TOPOLOGY.devices]
    gone = [d for d in present if d.container != "naïve-1" and d.name != "veth1"]
    renamed = [replace(d, container="renamed") if d.container == "naïve-2" else d for d in present]
    # A pod, in which one more container starts.
    present = [replace(d, pod_containers="app") if d.container == "naïve-3" else d for d in present]
    renamed = [replace(d, pod_containers="app,sidecar") if d.container == "naïve-3" else d for d in renamed]
    topologies = [
        replace(TOPOLOGY, from_ns=int(ts[0]) - 1, devices=tuple(present), on_host_network=(Sharer("tmp", "f" * 64),)),
        replace(TOPOLOGY, from_ns=int(third), devices=tuple(gone)),
        replace(
            TOPOLOGY,
            from_ns=int(third) + 2 * S,
            devices=tuple(renamed),
            on_host_network=(Sharer("agent", "f" * 64), Sharer("image.sif[7]")),
        ),
    ]
    items = []
    edges = [int(whole.ts_ns.searchsorted(t.from_ns)) for t in topologies] + [len(whole)]
    for topology, begin, end in zip(topologies, edges[:-1], edges[1:], strict=True):
        items += [topology, *batches(whole[begin:end], 2_000)]
    return items


def write_capture(path, header=HEADER, **shape):
    path.write_bytes(capture_bytes(hard_stream(header=header, **shape), header))
    return path


def one_engine(captures, store, engine=ENGINE):
    """Write captures into a store with the pipeline of a live run, as the reference."""
    whole = Summary()
    for capture in captures:
        summary = Summary()
        source = FileSource(CaptureReader(capture))
        sinks = [EmbeddedStore(store, rows=engine.rows, fsync=False)]
        asyncio.run(pipeline.run(source, sinks, engine=engine, stop=pipeline.Stop(), on_results=summary.add))
        whole.merge(summary)
    return whole


def rows_of(store, table):
    return f"read_parquet('{store}/{table}/**/*.parquet', hive_partitioning=false)"


def differences(one, other):
    """Return, by table, the rows (all columns) that only one of two stores has, and the ledgers' last rows."""
    found = {}
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")

        def ask(sql):
            return connection.execute(sql).fetchall()

        for table in ("delays", "windows"):
            a, b = (f"(SELECT * FROM {rows_of(store, table)})" for store in (one, other))
            found[table] = ask(f"{a} EXCEPT ALL {b} LIMIT 3") + ask(f"{b} EXCEPT ALL {a} LIMIT 3")
        found["stages"] = _different_stages(connection, one, other)
        last = [
            ask(
                # The containers seen since the previous row depend on when that row was written.
                f"SELECT * EXCLUDE (flush, time, on_host_network), epoch_ns(time) FROM {rows_of(store, 'ledger')}"
                " QUALIFY row_number() OVER (PARTITION BY host, run ORDER BY flush DESC) = 1 ORDER BY host, run"
            )
            for store in (one, other)
        ]
        found["ledger"] = [] if last[0] == last[1] else last
        runs = [
            ask(f"SELECT host, run, source, cpus FROM {rows_of(store, 'runs')} ORDER BY ALL") for store in (one, other)
        ]
        sharers = [StoreReader(store).sharers() for store in (one, other)]
        found["sharers"] = [] if sharers[0] == sharers[1] else sharers
        found["runs"] = [] if runs[0] == runs[1] else runs
    return {table: rows for table, rows in found.items() if rows}


def _different_stages(connection, *stores):
    """Return the counts of stages that differ, summed over rows of equal time and place; none without that table."""
    found = []
    for store in stores:
        if not (Path(store) / "stages").exists():
            found.append([])
            continue
        key = "time, host, run, container, device_id, direction, measure, cpu_queued, cpu"
        found.append(
            connection.execute(
                f"WITH u AS (SELECT {key}, unnest(bins) AS bin, unnest(counts) AS n FROM {rows_of(store, 'stages')})"
                f" SELECT {key}, bin, sum(n) FROM u GROUP BY ALL ORDER BY ALL"
            ).fetchall()
            + connection.execute(
                f"SELECT {key}, sum(count), sum(sum_ns), min(min_ns), max(max_ns) FROM {rows_of(store, 'stages')}"
                " GROUP BY ALL ORDER BY ALL"
            ).fetchall()
        )
    one, other = map(Counter, found)
    return [*(one - other), *(other - one)][:6]


def count_rows(store, table):
    with duckdb.connect() as connection:
        [(count,)] = connection.execute(f"SELECT count(*) FROM {rows_of(store, table)}").fetchall()
    return count
