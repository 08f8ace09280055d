"""Rates from a capture of a real flood to windows, and to rows in the store, on one core."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from collector.capture.source import Capture
from collector.memory import keep_freed_memory
from contracts.records import Batch
from correlator.configured import REPLAY_SLICE_NS
from correlator.engine import Engine, EngineConfig
from storage.embedded import EmbeddedStore
from tests.benchmark.figures import figure, folder, one_core, recorded_flood, rounds

ROUNDS = 7
SECONDS = 6


def capture_to_windows() -> list[dict[str, Any]]:
    """records/s, file in the page cache -> windows; target: 5 million."""
    with folder() as place, one_core():
        recorded_flood(place / "flood.mace", SECONDS)
        keep_freed_memory()
        values = rounds(lambda: _windows(place / "flood.mace"), ROUNDS)
        size = (place / "flood.mace").stat().st_size
        with Capture(place / "flood.mace") as capture:
            records = sum(len(item) for item in capture if isinstance(item, Batch))
    return [
        figure("capture_to_windows", "records/s", values),
        figure("capture_bytes_per_record", "bytes", [size / records]),
    ]


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


def capture_to_rows() -> list[dict[str, Any]]:
    """rows/s, file in the page cache -> rows in Parquet segments, synced; target: 2 million."""
    pa.set_cpu_count(1)
    with folder() as place, one_core():
        recorded_flood(place / "flood.mace", SECONDS)
        keep_freed_memory()
        turn = iter(range(100))
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
                rows += len(results.rows.delays)
                await sink.write(results)
        last = engine.finish()
        await sink.write(last)
        await sink.aclose()
    return (rows + len(last.rows.delays)) / (time.perf_counter() - begin)
