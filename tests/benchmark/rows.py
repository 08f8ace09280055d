"""The store alone: writing made-up rows to segments, and summarising segments for a report.

store_write         rows/s into synced segments, on one core; the peer is Parquet as pyarrow writes it by default
store_row_size      bytes a row in the store; the same peer
store_merge         rows/s of merging segments with 65,536 rows each, a second of a host with 130,000 events/s; the peer
                    decodes and encodes the rows
store_summary       s for the figures of all devices from 10 million rows
"""

import asyncio
import time
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from storage import segments
from storage.embedded import EmbeddedStore
from storage.query import StoreReader
from storage.tables import ROW_GROUP_ROWS, delays_table
from tests.benchmark.figures import figure, folder, one_core, rounds
from tests.made_results import HEADER, make_delays, make_results, topology

ROUNDS = 7
CONTAINERS = 4
ROWS = 2_000_000
BATCH_ROWS = 65_536
SUMMARY_ROWS = 10_000_000


def run() -> list[dict[str, Any]]:
    delays = make_delays(ROWS * 2 // 13, containers=CONTAINERS)  # 6 rows on egress, 7 on ingress
    batches = [delays[at : at + BATCH_ROWS] for at in range(0, len(delays), BATCH_ROWS)]
    with folder() as place:
        turn = count()

        def ours() -> float:
            return len(delays) / asyncio.run(_store(place / f"store{next(turn)}", batches))

        def default() -> float:
            begin = time.perf_counter()
            for at, each in enumerate(batches):
                with (place / f"plain{at}.parquet").open("wb") as file:
                    pq.write_table(delays_table(HEADER, each, topology(CONTAINERS)), file)
            return len(delays) / (time.perf_counter() - begin)

        with one_core():
            stored, plain = rounds(ours, ROUNDS), rounds(default, ROUNDS)
        size = sum(s.path.stat().st_size for s in segments.listing(place / "store0", "delays"))
        plain_size = sum(p.stat().st_size for p in place.glob("plain*.parquet"))
        with one_core():
            merged = rounds(lambda: _merge(batches, segments.MOVED_ROWS), ROUNDS)
            encoded = rounds(lambda: _merge(batches, len(delays)), ROUNDS)
        large = place / "large"
        asyncio.run(_store(large, batches * (SUMMARY_ROWS // len(delays))))
        took = rounds(lambda: _summarize(large), ROUNDS)
    peer = "pyarrow's defaults"
    return [
        figure("store_write", "rows/s", stored, peer, sorted(plain)[ROUNDS // 2]),
        figure("store_row_size", "bytes", [size / len(delays)], peer, plain_size / len(delays)),
        figure("store_merge", "rows/s", merged, "decoded and encoded", sorted(encoded)[ROUNDS // 2]),
        figure("store_summary", "s", took),
    ]


def _merge(batches: list[Any], moved_rows: int) -> float:
    """Return the rows/s of merging with another `segments.MOVED_ROWS`."""
    before, segments.MOVED_ROWS = segments.MOVED_ROWS, moved_rows  # type: ignore[misc]
    try:
        with folder() as path:
            asyncio.run(_store(path / "store", batches, BATCH_ROWS))
            sink = EmbeddedStore(path / "store")
            begin = time.perf_counter()
            sink.merge()
            seconds = time.perf_counter() - begin
            return sum(s.rows for s in segments.listing(path / "store", "delays") if s.last > s.first) / seconds
    finally:
        segments.MOVED_ROWS = before  # type: ignore[misc]


async def _store(path: Path, batches: list[Any], flush_rows: int = ROW_GROUP_ROWS) -> float:
    results = [make_results(each, containers=CONTAINERS, packets=1) for each in batches]
    begin = time.perf_counter()
    sink = EmbeddedStore(path, flush_rows=flush_rows)
    await sink.open(HEADER)
    for each in results:
        await sink.write(each)
    await sink.aclose()
    return time.perf_counter() - begin


def _summarize(path: Path) -> float:
    begin = time.perf_counter()
    StoreReader(path).summary(source="rows")
    return time.perf_counter() - begin
