"""What sealing adds to a recording and to a store, and how fast a seal is verified.

    seal_cost_capture   ns/record, frames of 1,000 records: recording with a seal less recording without, CPU time
    seal_cost_frame     µs/frame, frames of 20 records (a quiet host that is flushed often)
    seal_cost_store     µs/segment of 20 kB, without synchronising the disk
    seal_verify         statements/s, a capture of frames of 1,000 records in the page cache

The peer of the first two is recording without a seal.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contracts.records import Batch
from storage import segments
from storage.capture import CaptureSink
from storage.sealing.check import check
from storage.sealing.keys import SealKey
from storage.sealing.segments import StoreSeal
from tests.benchmark.figures import figure, folder
from tests.made_capture import HEADER, TOPOLOGY, batches, traffic
from tests.sealing import new_key

ROUNDS = 7
RECORDS = 500_000
SMALL_FRAMES = 2_000
SEGMENTS = 500


def _recorded(path: Path, items: Sequence[Batch], seal: SealKey | None) -> float:
    """Record, and return the CPU time of the process, in seconds."""

    async def run() -> None:
        sink = CaptureSink(path, seal=seal, overwrite=True, sync="never")
        await sink.open(HEADER)
        await sink.write(TOPOLOGY)
        for item in items:
            await sink.write(item)
        await sink.aclose()

    start = time.process_time()
    asyncio.run(run())
    return time.process_time() - start


def _added(place: Path, key: SealKey, items: Sequence[Batch], per: float) -> tuple[list[float], float]:
    """Return what a seal adds, in turns, and what recording without costs: seconds times `per`."""
    _recorded(place / "a.mace", items, None)
    added, plain = [], []
    for _ in range(ROUNDS):
        without = _recorded(place / "a.mace", items, None)
        added.append((_recorded(place / "b.mace", items, key) - without) * per)
        plain.append(without * per)
    return added, statistics.median(plain)


def run() -> list[dict[str, Any]]:
    with folder() as place:
        key = new_key(place)
        small = list(batches(traffic(20 * SMALL_FRAMES), 20))
        added, plain = _added(place, key, small, 1e6 / SMALL_FRAMES)
        rows = [figure("seal_cost_frame", "us/frame", added, "without a seal", plain)]
        large = list(batches(traffic(RECORDS), 1_000))
        added, plain = _added(place, key, large, 1e9 / RECORDS)
        rows.insert(0, figure("seal_cost_capture", "ns/record", added, "without a seal", plain))
        rates = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            found = check(place / "b.mace", key=key.public)
            rates.append(found.statements / (time.perf_counter() - start))
            assert found.state == "intact"
        return [
            *rows,
            figure("seal_cost_store", "us/segment", _stated(place / "store", key)),
            figure("seal_verify", "statements/s", rates),
        ]


def _stated(root: Path, key: SealKey) -> list[float]:
    """Return the CPU time of stating a segment of 20 kB, in microseconds, without synchronising the disk."""
    root.mkdir()
    seal = StoreSeal.open(root, key, HEADER, sync=False)
    data = memoryview(os.urandom(20_000))
    took = []
    for first in range(1, ROUNDS * SEGMENTS, SEGMENTS):
        start = time.process_time()
        for flush in range(first, first + SEGMENTS):
            seal.put(segments.segment(root, "delays", 1, flush, flush, 1), data)
        took.append((time.process_time() - start) * 1e6 / SEGMENTS)
    seal.close(None)
    return took
