"""The records of a scenario: read from a live source into memory, thinned as by a full ring, and correlated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from contracts.config import Config
from contracts.hooks import Hook
from contracts.interfaces import StreamHeader, StreamItem
from contracts.ledger import Ledger
from contracts.records import Batch
from contracts.schema import Delays, Grades
from contracts.topology import Device, Topology
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from mace.live import pipeline
from mace.live.first import FirstThatOpens
from mace.live.pipeline import Stop

BLOCK_RECORDS = 32
"""Length of a removed stretch: a full ring loses stretches, not single records. At this length a stretch takes some of
the records of some packets, and none of others'."""


@dataclass(slots=True)
class CollectedStream:
    """A whole stream in memory; a `StreamSink`."""

    offset_ns: int = 0
    """Offset from the stream's times to UTC, ns."""
    items: list[Topology | Batch] = field(default_factory=list)

    async def open(self, header: StreamHeader) -> None:
        """Read the clock offset from the header."""
        self.offset_ns = header.clock.offset_ns

    async def write(self, item: StreamItem) -> None:
        """Keep the item, if it is a topology or a batch."""
        if isinstance(item, Topology | Batch):
            self.items.append(item)

    async def aclose(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, slots=True)
class Worked:
    """The engine's results for a stream."""

    delays: Delays
    devices: tuple[Device, ...]
    ledger: Ledger
    grades: Grades


def taken(config: Config, work: Callable[[], None]) -> CollectedStream:
    """Capture the configured source while `work` runs; returns the records from before its start to after its end."""
    stream, stop = CollectedStream(), Stop()
    source = FirstThatOpens(config.capture)

    async def measure() -> None:
        begun = asyncio.Event()

        async def working() -> None:
            await begun.wait()
            try:
                await asyncio.to_thread(work)
                await asyncio.sleep(0.2)
            finally:
                stop.request()

        task = asyncio.create_task(working())
        try:
            # The first item is the topology, which an open source yields.
            await pipeline.capture(source, stream, stop=stop, on_item=lambda _: begun.set())
            await task
        finally:
            task.cancel()

    asyncio.run(measure())
    return stream


def worked(stream: CollectedStream, config: EngineConfig) -> Worked:
    """Run the engine over a stream and return its results."""
    results = list(Feeder(Engine(stream.offset_ns, config)).run(stream.items))
    last = results[-1]
    delays = Delays.concatenate([each.rows.delays for each in results])
    return Worked(delays, last.rows.devices, last.totals.ledger, last.totals.grades)


def thinned(stream: CollectedStream, share: float, seed: int = 1) -> tuple[CollectedStream, npt.NDArray[np.bool_]]:
    """Remove some blocks of each CPU's records, as if its ring had been full; returns the stream and a mask.

    Of every 1 / `share` blocks of a CPU one is removed, chosen by the seed. The mask is true for removed records, over
    all records of the stream in its order.
    """
    period = round(1 / share) if share else 0
    taken_away: list[npt.NDArray[np.bool_]] = []
    counts: dict[int, int] = {}
    last_ns: dict[int, int] = {}
    result = CollectedStream(stream.offset_ns)
    open_gaps: dict[int, list[int]] = {}
    markers: list[tuple[int, int, int, int]] = []
    batches = [item for item in stream.items if isinstance(item, Batch)]
    for batch in batches:
        gone = np.zeros(len(batch), np.bool_)
        for i, (ts, cpu) in enumerate(zip(batch.ts_ns.tolist(), batch.cpu.tolist(), strict=True)):
            number = counts.get(cpu, 0)
            counts[cpu] = number + 1
            if period and _is_drawn(number // BLOCK_RECORDS, period, seed, cpu):
                gone[i] = True
                open_gaps.setdefault(cpu, [last_ns.get(cpu, ts - 1), 0])[1] += 1
                continue
            if cpu in open_gaps:
                start, lost = open_gaps.pop(cpu)
                markers.append((start, ts, cpu, lost))
            last_ns[cpu] = ts
        taken_away.append(gone)
    end = int(batches[-1].ts_ns[-1]) + 1 if batches else 0
    markers += [(start, end, cpu, lost) for cpu, (start, lost) in open_gaps.items()]
    markers.sort()
    turn = 0
    for item in stream.items:
        if not isinstance(item, Batch):
            result.items.append(item)
            continue
        kept = item[~taken_away[turn]]
        turn += 1
        upto = int(item.ts_ns[-1])
        here = [m for m in markers if m[0] <= upto]
        markers = markers[len(here) :]
        result.items.append(_with_markers(kept, here, int(item.ts_ns[0])))
    return result, np.concatenate(taken_away) if taken_away else np.zeros(0, np.bool_)


def _with_markers(batch: Batch, markers: list[tuple[int, int, int, int]], first_ns: int) -> Batch:
    if not markers:
        return batch
    start, end, cpu, lost = (np.array(column) for column in zip(*markers, strict=True))
    # The marker of a gap that began in the batch before gets this batch's first time: a stream's times never decrease.
    content = None if batch.content is None else batch.content[:0]
    told = Batch.of(
        len(markers),
        None if content is None else type(content).of(len(markers)),
        ts_ns=np.maximum(start, first_ns),
        skb_id=end,
        cpu=cpu,
        l3_len=lost,
        hook=np.full(len(markers), Hook.LOST),
    )
    both = Batch.concatenate([told, batch])
    # A stable sort, so that at equal times the marker is first.
    return both[np.argsort(both.ts_ns, kind="stable")]


def _is_drawn(block: int, period: int, seed: int, cpu: int) -> bool:
    """Return whether this block is the removed one of its `period` blocks, by a hash (splitmix64) of the arguments."""
    x = (seed * 0x9E3779B97F4A7C15 + cpu * 0xBF58476D1CE4E5B9 + block // period * 0x94D049BB133111EB) & ((1 << 64) - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return block % period == (x ^ (x >> 31)) % period
