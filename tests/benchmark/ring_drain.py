"""The module's rings -> merged batches: how fast, on one core.

    ring_drain              records/s; the peer is concatenating the records, sorting them by time, and picking columns
    ring_drain_apart        the same, where the CPUs' records hardly interleave
    ring_seconds            how long rings of 16 MiB hold 200,000 records/s per CPU (arithmetic)

Two CPUs' rings in memory of ours, laid out and checked as the module's are; each pass takes 32 MiB of sub-buffers out
of them, again and again. The records are those of a flood: bursts of eight hooks of a packet some 100 ns apart,
packets of both CPUs in between one another. What comes out has content. Time is this thread's on the CPU, as others may
have it meanwhile.
"""

import time
from typing import Any

import numpy as np

from collector.kmod.device import TakenSubBuffers
from collector.kmod.ring import CpuRing
from collector.kmod.source import KmodConfig
from collector.live.record_merge import RingMerger, SeenPlaces
from collector.memory import keep_freed_memory
from contracts import abi
from contracts.hooks import Hook
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Content, Flag
from tests.benchmark.figures import figure, one_core

CPUS = 2
RING_KIB = 16 * 1024
CONFIG = KmodConfig(ring_kib_per_cpu=RING_KIB)
ROUNDS = 64
"""Passes of 32 MiB each: 2 GiB."""
PEER_ROUNDS = 8
TICK_RECORDS = 10_000
"""Records of each CPU in a tick of 50 ms: 200,000 records/s."""

_HOOKS = np.array(
    [
        Hook.NET_DEV_QUEUE,
        Hook.NET_DEV_START_XMIT,
        Hook.NETIF_RX,
        Hook.NETIF_RECEIVE_SKB,
        Hook.NET_DEV_QUEUE,
        Hook.NET_DEV_START_XMIT,
        Hook.SKB_COPY_DATAGRAM_IOVEC,
        Hook.CONSUME_SKB,
    ],
    np.uint8,
)
_IFINDEX = np.array([2, 2, 7, 7, 3, 3, 0, 0], np.uint32)


class _Ring:
    """A full ring, all of which TAKE hands over."""

    def __init__(self, cpu: int, *, apart: bool) -> None:
        size, count = CONFIG.subbuf_bytes, CONFIG.subbufs
        self.cpu, self.memory = cpu, bytearray(size * count)
        capacity = size // abi.RECORD.itemsize - 1
        rng = np.random.default_rng(cpu)
        total = capacity * count
        step = np.arange(total) % len(_HOOKS)
        records = np.zeros(total, abi.RECORD)
        pause = np.where(step == 0, rng.integers(2_000, 6_000, total), rng.integers(80, 600, total))
        records["ts_ns"] = 10**12 + np.cumsum(pause)
        if apart:
            # Each sub-buffer of one CPU ends before the other CPU's begins.
            records["ts_ns"] += (np.arange(total) // capacity * CPUS + cpu).astype(np.uint64) * np.uint64(10**9)
        ids = rng.integers(0, 1 << 64, total // len(_HOOKS) + 1, dtype=np.uint64)
        records["skb_id"] = ids[np.arange(total) // len(_HOOKS)]
        records["hook"], records["ifindex"], records["cpu"] = _HOOKS[step], _IFINDEX[step], cpu
        records["netns"] = np.where(step < 2, 4026532000 + cpu, 4026531840)
        records["l3_len"] = 46
        records["packet_key"], records["flags"] = ids[np.arange(total) // len(_HOOKS)] + 1, Flag.KEY | Flag.FLOW
        records["ip_version"], records["l4_proto"], records["l4_src"] = 4, 17, 40_000 + cpu
        records["ip_id"] = np.arange(total) // len(_HOOKS)
        for n in range(count):
            head = np.ndarray((), abi.SUBBUF, self.memory, n * size)
            head["sequence"], head["records"], head["cpu"] = n, capacity, cpu
            into = np.ndarray((capacity,), abi.RECORD, self.memory, n * size + abi.SUBBUF.itemsize)
            into[:] = records[n * capacity : (n + 1) * capacity]

    def reader(self) -> CpuRing:
        return CpuRing(self.cpu, self.memory, CONFIG.subbuf_bytes, CONFIG.subbufs, self.take)

    @staticmethod
    def take(*, release: int, flush: bool) -> TakenSubBuffers:
        del release, flush
        return TakenSubBuffers(0, CONFIG.subbufs, 0)


def _drained(rings: list[_Ring], places: SeenPlaces) -> tuple[int, float]:
    """Return records and seconds of one pass."""
    readers = [ring.reader() for ring in rings]
    began = time.thread_time()
    merger = RingMerger(0, places)
    for reader in readers:
        merger.add_cpu(reader.cpu, 0)
        for subbuf in reader.take(flush=True)[0]:
            merger.push(reader.cpu, subbuf)
    # As in the source, all batches of a tick exist at once, and the columns of the tick before are freed.
    records, tick = 0, []
    for batch in merger.flush():
        records += len(batch)
        tick.append(batch)
        if sum(map(len, tick)) > CPUS * TICK_RECORDS:
            tick.clear()
    return records, time.thread_time() - began


def _naive(rings: list[_Ring]) -> tuple[int, float]:
    """Merge naively, a tick at a time: concatenate the records, argsort them by time, pick each column by name. It
    leaves out the codes of devices, which makes the comparison favour the peer.

    It leaves out the codes of devices, which is less work than ours.
    """
    everything = [
        np.concatenate([subbuf.records for subbuf in ring.reader().take(flush=True)[0]]).view(abi.RECORD)
        for ring in rings
    ]
    spent, count = 0.0, 0
    for start in range(0, len(everything[0]), TICK_RECORDS):
        parts = [records[start : start + TICK_RECORDS] for records in everything]
        began = time.thread_time()
        records = np.concatenate(parts)
        records = records[np.argsort(records["ts_ns"], kind="stable")]
        columns = {name: records[name].astype(dtype) for name, dtype in DTYPES.items() if name != "dev"}
        content = Content(*(records[name].astype(dtype) for name, dtype in CONTENT_DTYPES.items()))
        count += len(Batch.of(len(records), content, **columns))
        spent += time.thread_time() - began
    return count, spent


def _rates(work: Any, rounds: int) -> list[float]:
    work()
    return [records / seconds for records, seconds in (work() for _ in range(rounds))]


def run() -> list[dict[str, Any]]:
    keep_freed_memory()  # like the source
    places = SeenPlaces()
    with one_core():
        rings = [_Ring(cpu, apart=False) for cpu in range(CPUS)]
        naive = _rates(lambda: _naive(rings), PEER_ROUNDS)
        together = _rates(lambda: _drained(rings, places), ROUNDS)
        rings = [_Ring(cpu, apart=True) for cpu in range(CPUS)]
        apart = _rates(lambda: _drained(rings, places), ROUNDS)
    capacity = CONFIG.subbuf_bytes // abi.RECORD.itemsize - 1
    held = CONFIG.subbufs * capacity / 200_000
    peer = "numpy: concatenate, argsort, index"
    return [
        figure("ring_drain", "records/s", together, peer, float(np.median(naive))),
        figure("ring_drain_apart", "records/s", apart),
        figure("ring_seconds", "s", [held]),
    ]
