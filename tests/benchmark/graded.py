"""Rate and memory of the correlator with grading, on one core, including lossy streams and lives that never end.

Records are made up and in memory; no file is read. Rates are records per CPU second, because the machine may be shared.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from collector.memory import keep_freed_memory
from contracts.hooks import Hook
from contracts.records import Batch, Content, Flag
from correlator.configured import REPLAY_SLICE_NS
from correlator.engine import Engine, EngineConfig
from mace.trials.verify.stream import CollectedStream, thinned
from tests.benchmark.figures import figure, one_core, resident_mib
from tests.made_capture import HEADER, TOPOLOGY, traffic

RECORDS = 1_000_000
BATCH = 50_000
ROUNDS = 9
LOSS = 0.2
LOSSY_ROUNDS = 20
FLOOD_PPS = 100_000
FLOOD_S = 600
TICK_NS = 50_000_000


def run() -> list[dict[str, Any]]:
    """records/s, batches with content -> windows, target: 4 million; growth of memory in MiB, target: none."""
    keep_freed_memory()
    with one_core():
        graded, plain = [], []
        batches = {read: traffic(RECORDS, content=read) for read in (True, False)}
        for turn in range(ROUNDS + 1):
            # In turns, so that other load slows both; the first turn is a warm-up.
            rates = {read: _rate(batches[read]) for read in (True, False)}
            if turn:
                graded.append(rates[True])
                plain.append(rates[False])
        return [
            figure("graded_correlation", "records/s", graded, "ungraded", float(np.median(plain))),
            *_lossy(batches[True]),
            *_flood(),
        ]


def _rate(batch: Batch) -> float:
    begin = time.process_time()
    engine = _engine()
    for start in range(0, len(batch), BATCH):
        engine.feed(batch[start : start + BATCH])
    ledger = engine.finish().totals.ledger
    assert (ledger.records, ledger.imbalance) == (len(batch), 0)
    return len(batch) / (time.process_time() - begin)


def _lossy(batch: Batch) -> list[dict[str, Any]]:
    """Yield the same traffic over and over, with a fifth of the records lost."""
    whole = CollectedStream(HEADER.clock.offset_ns, [batch[i : i + BATCH] for i in range(0, len(batch), BATCH)])
    stream, gone = thinned(whole, LOSS)
    span = int(batch.ts_ns[-1] - batch.ts_ns[0]) + 1_000_000
    engine, rates, sizes = _engine(), [], []
    kept = len(batch) - int(gone.sum())
    for turn in range(LOSSY_ROUNDS):
        begin = time.process_time()
        for item in stream.items:
            if isinstance(item, Batch):
                engine.feed(_later(item, turn * span))
        rates.append(kept / (time.process_time() - begin))
        sizes.append(resident_mib(os.getpid()))
    ledger = engine.finish().totals.ledger
    assert (ledger.records, ledger.lost, ledger.imbalance) == (kept * LOSSY_ROUNDS, gone.sum() * LOSSY_ROUNDS, 0)
    half = len(sizes) // 2
    return [
        figure("graded_correlation_lossy", "records/s", rates[1:]),
        figure("graded_correlation_lossy_growth", "MiB", [max(sizes[half:]) - max(sizes[:half])]),
    ]


def _flood() -> list[dict[str, Any]]:
    """Process ten minutes of packets that are seen at two hooks and never again."""
    engine, rates, sizes, seconds = _engine(), [], [], 0
    begin, since = time.process_time(), 0
    for batch in _never_completing():
        engine.feed(batch)
        since += len(batch)
        if int(batch.ts_ns[-1] - TOPOLOGY.from_ns) // 10**9 >= seconds + 30:
            seconds += 30
            now = time.process_time()
            rates.append(since / (now - begin))
            begin, since = now, 0
            sizes.append(resident_mib(os.getpid()))
    ledger = engine.finish().totals.ledger
    assert (ledger.records, ledger.imbalance) == (2 * FLOOD_PPS * FLOOD_S, 0)
    return [
        figure("never_completing_flood", "records/s", rates),
        figure("never_completing_flood_growth", "MiB", [max(sizes[1:]) - sizes[0]]),
        figure("never_completing_flood_open_records", "records", [engine.open_peak]),
    ]


def _never_completing() -> Iterator[Batch]:
    """Yield a batch for each tick. Half of the packets are seen leaving a container, half received by the host."""
    packets = FLOOD_PPS * TICK_NS // 10**9
    place = np.arange(2 * packets)
    container = place // 2 % 2 == 0
    hook = np.where(container, place % 2 + Hook.NET_DEV_QUEUE, place % 2 + Hook.NETIF_RX)
    dev = np.where(container, 1, 3)
    for tick in range(FLOOD_S * 10**9 // TICK_NS):
        number = tick * packets + place // 2 + 1
        key = number.astype("u8") * np.uint64(0x9E3779B97F4A7C15)
        flags = np.full(len(place), Flag.KEY)
        ts_ns = TOPOLOGY.from_ns + tick * TICK_NS + place * (TICK_NS // len(place))
        content = Content.of(len(place), packet_key=key, flags=flags)
        length = np.full(len(place), 84)
        yield Batch.of(len(place), content, ts_ns=ts_ns, skb_id=key, hook=hook, dev=dev, l3_len=length)


def _engine() -> Engine:
    engine = Engine(HEADER.clock.offset_ns, EngineConfig(rows=False, slice_ns=REPLAY_SLICE_NS))
    engine.feed(TOPOLOGY)
    return engine


def _later(batch: Batch, ns: int) -> Batch:
    lost = batch.hook == Hook.LOST
    columns = dict(batch.columns())
    columns["skb_id"] = np.where(lost, batch.skb_id + np.uint64(ns), batch.skb_id)
    columns["ts_ns"] = batch.ts_ns + ns
    return Batch(**columns, content=batch.content)
