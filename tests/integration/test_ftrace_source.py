"""The ftrace source on the running kernel.

Other tracers and other traffic may be active. Tests that count every event therefore filter, in the kernel, for devices
that they made in a network namespace of their own, which ends with its process.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import numpy as np
import pytest

from collector.ftrace import tracefs
from collector.ftrace.source import FtraceConfig, FtraceSource
from contracts.hooks import BY_HOOK, Hook
from contracts.records import Batch
from contracts.topology import Topology
from tests.filtered_ftrace import FilteredSource, Sender, cpu_choice, only
from tests.measuring import UNMOUNT_TRACEFS
from tests.places import ROOT

pytestmark = pytest.mark.needs("root", "tracefs", "netns")

STEP = 1400
"""Datagram n carries n modulo this many bytes, so that its length identifies it."""
ETH, IP_UDP = 14, 28
DEVICES = ("net:net_dev_queue", "net:net_dev_start_xmit", "net:netif_rx", "net:netif_receive_skb")


async def capture(source, traffic):
    """Capture while `traffic` runs; returns all records, the last topology, and the kernel's counts at the end."""
    await source.open()
    try:
        work = asyncio.create_task(traffic)
        work.add_done_callback(lambda _: source.request_stop())
        batches, topology = [], None
        async for item in source.items():
            if isinstance(item, Batch):
                batches.append(item)
            elif isinstance(item, Topology):
                topology = item
        await work
        stats = {cpu: source._instance.stats(cpu) for cpu in source._cpus}
    finally:
        await source.aclose()
    return Batch.concatenate(batches), topology, stats


def config(**given):
    return FtraceConfig(**({"tracepoints": DEVICES} | given))


READERS = ("read", "mmap")


@pytest.fixture(params=READERS)
def reader(request):
    if request.param == "mmap" and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 10):
        pytest.skip("trace rings can be mapped since Linux 6.10")
    return request.param


@pytest.mark.parametrize("subbuf_kib", [None, 16, 64])
def test_every_event_is_read_once(reader, subbuf_kib):
    if subbuf_kib and not (tracefs.find() / "buffer_subbuf_size_kb").exists():
        pytest.skip("sub-buffers have one size before Linux 6.8")
    count = 20_000
    before = time.monotonic_ns()
    with Sender("mfta", count, cpu_choice()) as sender:
        source = FilteredSource(config(reader=reader, subbuf_kib=subbuf_kib), "mfta")
        batch, topology, stats = asyncio.run(capture(source, sender.send()))
    after = time.monotonic_ns()
    assert batch.lost == 0
    assert len(batch) == sum(s.read for s in stats.values())
    assert sum(s.entries for s in stats.values()) == 0
    assert (np.diff(batch.ts_ns) >= 0).all()
    assert before < batch.ts_ns[0] <= batch.ts_ns[-1] < after
    names = [s.name for s in topology.sightings]
    queued = batch[(batch.hook == Hook.NET_DEV_QUEUE) & (batch.dev == names.index("mftaa"))]
    assert queued.l3_len.tolist() == [IP_UDP + n % STEP for n in range(count)]
    # The later hooks have one record of each packet, with equal buffer and length.
    for hook, device in (
        (Hook.NET_DEV_START_XMIT, "mftaa"),
        (Hook.NETIF_RX, "mftab"),
        (Hook.NETIF_RECEIVE_SKB, "mftab"),
    ):
        there = batch[(batch.hook == hook) & (batch.dev == names.index(device))]
        assert there.l3_len.tolist() == queued.l3_len.tolist(), hook
        assert there.skb_id.tolist() == queued.skb_id.tolist(), hook


LINE = re.compile(
    r"\[(\d+)\].*?: (net_dev_queue|net_dev_start_xmit|netif_rx|netif_receive_skb): dev=(\S+) .*?\blen=(\d+)"
)


def test_the_kernels_text_has_the_same_events():
    root = tracefs.find()
    witness = tracefs.Instance.create(root)
    try:
        witness.set_clock("mono")
        witness.set_ring_size(16384)
        only(witness, DEVICES, "mftb")
        for tracepoint in DEVICES:
            witness.enable(tracepoint)
        witness.record(on=True)
        with Sender("mftb", 3000, cpu_choice()) as sender:
            batch, topology, _ = asyncio.run(capture(FilteredSource(config(), "mftb"), sender.send()))
        witness.record(on=False)
        text = tracefs.read(witness.path / "trace")
    finally:
        witness.remove()
    expected = {}
    for cpu, event, device, length in LINE.findall(text):
        taken = ETH if event in ("net_dev_queue", "net_dev_start_xmit") else 0
        expected.setdefault(int(cpu), []).append((event, device, int(length) - taken))
    # The witness may begin earlier and end later than the source, but not than the sender: the events per CPU are
    # equal.
    names = [s.name for s in topology.sightings]
    seen = {}
    for cpu, hook, dev, length in zip(batch.cpu, batch.hook, batch.dev, batch.l3_len, strict=True):
        seen.setdefault(int(cpu), []).append((BY_HOOK[Hook(hook)].name, names[dev], int(length)))
    assert sum(map(len, seen.values())) >= 12_000
    assert seen == expected


@pytest.mark.slow
def test_gaps_are_exact_in_place_and_number(reader):
    count = 20 * STEP
    # A ring of a few pages, some 800 events, that is read far too rarely, however slowly the sender sends.
    tiny = config(
        reader=reader,
        ring_kib_per_cpu=32,
        poll_interval_s=2,
        gather_interval_s=2,
        tracepoints=("net:net_dev_queue",),
    )
    source = FilteredSource(tiny, "mftc")

    async def twice(sender):
        await sender.send()
        # Once the ring has been read, the second half makes another gap.
        while sum(source._instance.stats(cpu).entries for cpu in source._cpus):  # noqa: ASYNC110 (the kernel tells)
            await asyncio.sleep(0.01)
        await sender.send()

    with Sender("mftc", count, cpu_choice()) as sender:
        batch, _, stats = asyncio.run(capture(source, twice(sender)))
    assert batch.lost == sum(s.lost for s in stats.values()) > 0
    assert len(batch) - (batch.hook == Hook.LOST).sum() == sum(s.read for s in stats.values())
    assert len(set(batch.cpu.tolist())) == 1
    at, previous_ns = -1, 0
    pending = 0
    for i in range(len(batch)):
        if batch.hook[i] == Hook.LOST:
            pending += int(batch.l3_len[i])
            assert previous_ns <= batch.ts_ns[i] <= batch.skb_id[i] == batch.ts_ns[i + 1]
            continue
        at += 1 + pending
        pending = 0
        previous_ns = batch.ts_ns[i]
        assert batch.l3_len[i] == IP_UDP + at % STEP
    # The last event is never lost, because a full ring overwrites the oldest.
    assert at == 2 * count - 1
    assert (batch.hook == Hook.LOST).sum() >= 2


def test_a_ring_that_fills_is_read_before_its_time(reader):
    slow = config(reader=reader, ring_kib_per_cpu=1024, gather_interval_s=10, hold_back_ms=0)

    async def records_before_the_next_tick(sender):
        source = FilteredSource(slow, "mftg")
        await source.open()
        try:
            work = asyncio.create_task(sender.send())
            # The first tick is before the traffic, the next would be 10 s later.
            async with asyncio.timeout(8):
                async for item in source.items():
                    if isinstance(item, Batch):
                        return len(item)
        finally:
            await source.aclose()
            await work

    # 5,000 datagrams are 20,000 events, nine tenths of a megabyte.
    with Sender("mftg", 5000, cpu_choice()) as sender:
        assert asyncio.run(records_before_the_next_tick(sender)) > 0


@pytest.mark.slow
def test_a_flood_of_all_hooks_accounts_for_every_event(reader):
    """Without a filter, all other events of this machine are counted too."""
    with Sender("mftd", 40_000, 0) as one, Sender("mfte", 40_000, cpu_choice()) as two:

        async def both():
            await asyncio.gather(one.send(), two.send())

        tiny = FtraceConfig(reader=reader, ring_kib_per_cpu=64)
        source = FtraceSource(tiny)
        batch, _, stats = asyncio.run(capture(source, both()))
    markers = batch.hook == Hook.LOST
    told = Counter()
    for cpu, lost in zip(batch.cpu[markers], batch.l3_len[markers], strict=True):
        told[int(cpu)] += int(lost)
    assert {cpu: told[cpu] for cpu in stats} == {cpu: s.lost for cpu, s in stats.items()}
    assert (~markers).sum() + source.discarded + source.skipped == sum(s.read for s in stats.values())
    assert sum(told.values()) > 0


def test_both_readers_give_the_same():
    with Sender("mftf", 5000, cpu_choice()) as sender:

        async def both():
            ready = asyncio.Event()
            running = 0

            async def traffic():
                nonlocal running
                running += 1
                if running == 2:
                    await sender.send()
                    ready.set()
                await ready.wait()

            sources = [FilteredSource(config(reader=reader), "mftf") for reader in READERS]
            return await asyncio.gather(*(capture(source, traffic()) for source in sources))

        (first, names, _), (second, other_names, _) = asyncio.run(both())
    assert names.sightings == other_names.sightings
    assert len(first) == len(second) >= 20_000
    for column in ("hook", "dev", "l3_len", "cpu", "gso_segs", "drop_reason"):
        assert (getattr(first, column) == getattr(second, column)).all(), column
    # Each run has its own key for skb_id, so that equal buffers have different ids.
    pairs = set(zip(first.skb_id.tolist(), second.skb_id.tolist(), strict=True))
    assert len(pairs) == len(np.unique(first.skb_id)) == len(np.unique(second.skb_id))


def instances():
    return {p.name for p in (tracefs.find() / "instances").iterdir()}


OPEN = """
    import asyncio, signal, sys
    sys.path.insert(0, {root!r})
    from collector.ftrace.source import FtraceConfig, FtraceSource
    async def main():
        source = FtraceSource(FtraceConfig(reader={reader!r}, ring_kib_per_cpu=256))
        await source.open()
        print(source._instance.path.name, flush=True)
        {then}
    asyncio.run(main())
"""


def start(reader, then):
    script = textwrap.dedent(OPEN).format(root=str(ROOT), reader=reader, then=then)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_the_next_start_removes_the_instance_of_a_killed_run(reader):
    process, name = start(reader, "signal.pause()")
    try:
        assert name in instances()
        # A second start does not remove the instance of a live run.
        asyncio.run(capture(FtraceSource(config()), asyncio.sleep(0)))
        assert name in instances()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert name in instances()
    asyncio.run(capture(FtraceSource(config()), asyncio.sleep(0)))
    assert name not in instances()


@pytest.mark.slow
@pytest.mark.parametrize("then", ["sys.exit(3)", "raise RuntimeError", "return"])
def test_a_program_that_ends_without_closing_leaves_nothing(then):
    process, name = start("read", then)
    process.communicate()
    assert name.startswith("mace-")
    assert name not in instances()


def test_the_settings_of_the_instance():
    async def look():
        source = FtraceSource()
        before_ns = time.time_ns()
        header = await source.open()
        try:
            assert before_ns <= header.clock.utc_ns <= time.time_ns()
            path = source._instance.path
            clock = tracefs.read(path / "trace_clock")
            options = tracefs.read(path / "trace_options").split()
            return header, clock, options, source.check()
        finally:
            await source.aclose()

    header, clock, options, status = asyncio.run(look())
    assert "[mono]" in clock
    assert "overwrite" in options
    assert "norecord-cmd" in options
    assert status.ok
    assert "net:netif_receive_skb" in header.hooks
    assert not [n for n in instances() if n.startswith(f"mace-{os.getpid()}-")]


@pytest.mark.slow
def test_tracefs_is_mounted_if_it_is_not():
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from collector.ftrace import tracefs
        from pathlib import Path
        mounts = Path("/proc/self/mounts").read_text
        assert tracefs.mounted(mounts()) is None
        assert tracefs.find() == tracefs.DEFAULT_MOUNT == tracefs.mounted(mounts())
    """
    subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f'{UNMOUNT_TRACEFS}; exec "$@"', "sh", sys.executable, "-c",
         textwrap.dedent(script)],
        check=True,
    )  # fmt: skip
