"""`mace report --cpus` on a store with 10 million rows, as a whole process.

report_cpus   s, from the start of the command to its end; an hour of four containers' packets, each container's on
              four of 16 CPUs
"""

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from contracts.cpus import STAGES_WIDTH_S, Measure, StagePlace
from contracts.schema import Delays, Segment
from contracts.windowtable import WindowTable
from correlator.windows import Windows
from storage.embedded import EmbeddedStore
from tests.benchmark.figures import figure, folder, rounds
from tests.made_results import HEADER, START_NS, make_delays, make_results, topology
from tests.places import ROOT

ROUNDS = 7
CONTAINERS = 4
CPUS = 4
"""CPUs of each container's packets."""
ROWS = 10_000_000
HOUR_NS = 3_600_000_000_000
BATCH_ROWS = 65_536
PLACES = tuple(
    StagePlace(device, 0, cpu, cpu) for device in range(len(topology(CONTAINERS))) for cpu in (*range(4 * CPUS), -1)
)


def run() -> list[dict[str, Any]]:
    with folder() as place:
        asyncio.run(_fill(place / "store"))
        return [figure("report_cpus", "s", rounds(lambda: _report(place / "store"), ROUNDS))]


async def _fill(path: Path) -> None:
    packets = ROWS * 2 // 13  # 6 rows on egress, 7 on ingress
    delays = make_delays(packets, containers=CONTAINERS, start_ns=START_NS, gap_ns=HOUR_NS // packets * 4 // 5)
    stages = _stages(delays)
    sink = EmbeddedStore(path, fsync=False)
    await sink.open(HEADER)
    for at in range(0, len(delays), BATCH_ROWS):
        results = make_results(delays[at : at + BATCH_ROWS], containers=CONTAINERS, packets=1)
        await sink.write(results)
    for at in range(0, len(stages), BATCH_ROWS):
        rows = replace(results.rows, delays=Delays.empty(), stages=stages[at : at + BATCH_ROWS], places=PLACES)
        await sink.write(replace(results, rows=rows))
    await sink.aclose()


def _stages(delays: Delays) -> WindowTable:
    """Return stages as an engine counts them: a run, and half as long a wait, for each hop; the work of each packet."""
    windows = Windows()
    owner = np.zeros(int(delays.packet.max() >> np.uint64(20)) + 1, np.int64)
    number = (delays.packet >> np.uint64(20)).astype(np.int64)
    whole = delays.segment == Segment.OVERHEAD
    owner[number[whole]] = delays.device[whole] // 2
    cpu = owner[number] * CPUS + number % CPUS
    hop = (delays.segment == Segment.DEVICE) | (delays.segment == Segment.OUTSIDE)
    at_hop, at_packet = delays.device * (4 * CPUS + 1) + cpu, delays.device * (4 * CPUS + 1) + 4 * CPUS
    for measure, rows, where, ns in (
        (Measure.RUN, hop, at_hop, delays.delay_ns),
        (Measure.WAIT, hop, at_hop, delays.delay_ns // 2),
        (Measure.WORK, whole, at_packet, delays.delay_ns),
        (Measure.SERIAL, whole, at_packet, delays.delay_ns),
    ):
        code = np.full(int(rows.sum()), measure, np.uint8)
        windows.add(delays.utc_ns[rows], where[rows], delays.direction[rows], code, ns[rows])
    counts = windows.close(None)
    return counts[counts.column("width_s") == STAGES_WIDTH_S]


def _report(path: Path) -> float:
    begin = time.perf_counter()
    argv = [sys.executable, "-m", "mace", "report", "--cpus", "--store", str(path)]
    done = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True)
    took = time.perf_counter() - begin
    assert "would allow at most" in done.stdout
    return took
