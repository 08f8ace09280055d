"""Cost of the BPF programs, and the rate at which their rings are emptied.

    bpf_record              ns per run of a program that writes a record with its key
    bpf_filtered            ns per run of a program that discards the packet by its namespace
    bpf_vs_ftrace           ns by which a flood ping's round trip grows, all packets recorded; the peer is ftrace
    bpf_neighbour           the same, while the session records another container only; ftrace records all packets
    bpf_drain               records/s from rings to merged batches, on one core

The first two are differences of the kernel's own statistics: recording less attached and not recording. The kernel's
statistics read the clock twice in each run, which the difference removes. The variants of the first four alternate in
one lab.
"""

import asyncio
import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from collector.bpf.layout import RING, WRITTEN
from collector.bpf.ring import MappedRing
from collector.bpf.session import Session
from collector.bpf.source import BpfConfig, BpfSource
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.live.filter import SessionFilter
from collector.live.places import Places
from collector.live.record_merge import RingMerger, SeenPlaces
from collector.machine.kernel import online_cpus
from collector.memory import keep_freed_memory
from contracts.abi import COLUMNS, RECORD
from contracts.hooks import Hook
from mace.lab import Lab, Spec, running
from tests.benchmark.figures import figure, one_core

PINGS = 2_000
FLOODS = 8
ROUNDS = 6
DRAINED = 1 << 18
DRAIN_ROUNDS = 20


def run() -> list[dict[str, Any]]:
    """Measure and return all five figures."""
    keep_freed_memory()
    with running(Spec(name="bpfb", containers=2)) as lab:
        lab.ping("c1", count=10)
        return [*_cost(lab), *_versus_ftrace(lab), _drain()]


def _ns_a_run(lab: Lab, one: Session, *, recording: bool) -> float:
    before = one.runs()
    if recording:
        one.start()
    lab.ping("c1", count=PINGS, flood=True)
    one.stop()
    after = one.runs()
    runs = sum(after[hook].runs - before[hook].runs for hook in after)
    return sum(after[hook].run_ns - before[hook].run_ns for hook in after) / runs


def _cost(lab: Lab) -> list[dict[str, Any]]:
    wanted = (SessionFilter(), SessionFilter(netns=("/proc/self/ns/net",)))
    sessions = [Session(one, ring_bytes=32 << 20, wake_every=1 << 20, cookies=True) for one in wanted]
    found: tuple[list[float], list[float]] = ([], [])
    # The first namespace of a boot has cookie 1; the lab's packets are in others.
    sessions[1].record_at(Places((1,)))
    try:
        for one, costs in list(zip(sessions, found, strict=True)) * ROUNDS:
            # Each round gets new rings, so that none is full.
            for cpu in online_cpus():
                one.add_ring(cpu)
            one.attach()
            one.time_runs(on=True)
            off = _ns_a_run(lab, one, recording=False)
            costs.append(_ns_a_run(lab, one, recording=True) - off)
            one.time_runs(on=False)
            one.detach()
    finally:
        for one in sessions:
            one.close()
    return [figure("bpf_record", "ns", found[0]), figure("bpf_filtered", "ns", found[1])]


async def _round_trip_ns(lab: Lab, source: BpfSource | FtraceSource | None) -> float:
    """Return the mean round trip of the faster half of several floods, which other work on the machine disturbs least.

    ping prints the mean of one flood in steps of a microsecond.
    """

    def floods() -> float:
        means = sorted(lab.ping("c1", count=PINGS, flood=True).mean_rtt_ns for _ in range(FLOODS))
        return float(np.mean(means[: FLOODS // 2]))

    async def flood() -> float:
        return await asyncio.to_thread(floods)

    if source is None:
        return await flood()
    await source.open()

    async def read() -> None:
        async for _ in source.items():
            pass

    reading = asyncio.create_task(read())
    try:
        return await flood()
    finally:
        source.request_stop()
        await reading
        await source.aclose()


def _versus_ftrace(lab: Lab) -> list[dict[str, Any]]:
    other = SessionFilter(netns=(str(lab.netns_path("c2")),))
    sources: dict[str, Callable[[], BpfSource | FtraceSource | None]] = {
        "none": lambda: None,
        "bpf": lambda: BpfSource(BpfConfig()),
        "neighbour": lambda: BpfSource(BpfConfig(wanted=other)),
        "ftrace": lambda: FtraceSource(FtraceConfig()),
    }
    rtt: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(ROUNDS):
        for name, source in sources.items():
            rtt[name].append(asyncio.run(_round_trip_ns(lab, source())))
    grown = {name: np.subtract(rtt[name], rtt["none"]).tolist() for name in sources}
    ftrace = float(np.median(grown["ftrace"]))
    return [
        figure("bpf_vs_ftrace", "ns", grown["bpf"], "ftrace", ftrace),
        figure("bpf_neighbour", "ns", grown["neighbour"], "ftrace", ftrace),
    ]


def _drain() -> dict[str, Any]:
    """Read and merge records of two CPUs whose times interleave, from full rings in files in memory."""
    made = [_FullRing(cpu) for cpu in range(2)]
    rates = []
    with one_core():
        for _ in range(DRAIN_ROUNDS):
            merger = RingMerger(0, SeenPlaces())
            for one in made:
                merger.add_cpu(one.ring.cpu, 0)
                one.refill()
            began = time.thread_time()
            for one in made:
                for taken in one.ring.take()[0]:
                    merger.push(one.ring.cpu, taken)
            count = sum(len(batch) for batch in merger.flush())
            rates.append(count / (time.thread_time() - began))
            for one in made:
                one.ring.release()
    return figure("bpf_drain", "records/s", rates)


class _FullRing:
    """A ring that the programs have filled up."""

    def __init__(self, cpu: int) -> None:
        size = DRAINED * RECORD.itemsize
        fd = os.memfd_create("ring")
        os.ftruncate(fd, RING.itemsize + size)
        self._memory = mmap.mmap(fd, RING.itemsize + size)
        self.ring = MappedRing(cpu, fd, size)
        os.close(fd)
        records = np.frombuffer(self._memory, COLUMNS, DRAINED, RING.itemsize)
        records["ts_ns"] = 10**12 + np.arange(DRAINED) * 500 + cpu * 4_000
        records["cpu"], records["l3_len"] = cpu, 84
        records["place"] = 4026531840 | 2 << 32
        records["packet_key"] = records["skb_id"] = np.arange(DRAINED) // 8 + 1
        self._hooks = records["hook"]

    def refill(self) -> None:
        """Let the reader find all records as if they were new."""
        self._hooks[:] = Hook.NETIF_RX | WRITTEN
        np.frombuffer(self._memory, RING, 1)["head"] += np.uint64(DRAINED)
