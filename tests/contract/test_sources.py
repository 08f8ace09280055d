"""Every source, live or file, keeps the contract of `contracts.interfaces.Source`.

To add a file format, add a recording to `tests.places.GOLDEN_FILES`. To add a live source, add a maker to LIVE, of a
source with small rings and of the functions that cause records.
"""

import asyncio
import gc
import os
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from collector import SOURCES
from collector.bpf import session
from collector.bpf.source import BpfConfig, BpfSource
from collector.files import BY_NAME, recording_of
from collector.ftrace import tracefs
from collector.ftrace.source import FtraceConfig
from collector.kmod.source import KmodConfig, KmodSource
from collector.live.filter import SessionFilter
from collector.machine.kernel import online_cpus
from contracts.errors import SourceError, Unavailable
from contracts.hooks import BY_TRACEPOINT, Hook
from contracts.interfaces import Progress, Source
from contracts.records import Batch
from contracts.topology import Device, Topology
from tests.filtered_ftrace import FilteredSource, Sender, cpu_choice
from tests.made_capture import same_stream
from tests.made_devices import HOST_NETNS, MadeFollower
from tests.made_rings import MadeDevice
from tests.places import GOLDEN_FILES
from tests.streams import check_stream, records

OLD, NEW = Device(HOST_NETNS, 2, "eth0", "veth"), Device(HOST_NETNS, 3, "eth1", "veth")
STEP = 500
"""Records that are caused at once: each ring has room for them, and none for ten times as many."""


@dataclass
class Made:
    """A source under test, and the world that it observes."""

    make: Callable[[], Source]
    cannot_open: Callable[[], None]
    """Makes `open` fail from now on, as late as possible."""
    happens: Callable[[], Awaitable[None]] | None = None
    """Causes `STEP` records. None: the source has all its records and ends by itself."""
    news: Callable[[], None] = lambda: None
    """Adds a device."""
    held: Callable[[], int] = lambda: 0
    """Number of objects handed out to sources and not released."""


class Followers:
    """Makes followers of devices for the sources, and keeps them."""

    def __init__(self):
        self.made = []
        self.broken = False

    def __call__(self):
        made = MadeFollower((OLD,))
        if self.broken:
            made.open = self._refuse
        self.made.append(made)
        return made

    async def _refuse(self):
        raise SourceError("no netlink today")

    def break_(self):
        self.broken = True

    def news(self):
        self.made[-1].polls.append((OLD, NEW))
        self.made[-1].on_news()

    def held(self):
        return sum(one.state == "open" for one in self.made)


class Module(MadeDevice):
    """A made-up module with a running clock, and with a file descriptor for asyncio."""

    def __init__(self):
        super().__init__(cpus=max(online_cpus()) + 1)
        self.fd = os.eventfd(0)

    def take(self, cpu, **how):
        self.now_ns = time.monotonic_ns()
        return super().take(cpu, **how)

    def fileno(self):
        return self.fd

    def close(self):
        os.close(self.fd)
        super().close()


@contextmanager
def kmod(_):
    followers, modules = Followers(), []

    def open_module():
        modules.append(Module())
        return modules[-1]

    async def happens():
        for n in range(STEP):
            modules[-1].write(n % 2, time.monotonic_ns(), Hook.NETIF_RX, HOST_NETNS, 2)

    def make():
        # 16 sub-buffers of 63 records for each CPU.
        return KmodSource(
            KmodConfig(ring_kib_per_cpu=64, poll_interval_s=0.01, gather_interval_s=0.01), followers(), open_module
        )

    def held():
        return followers.held() + sum(module.log[-1:] != ["close"] for module in modules)

    yield Made(make, followers.break_, happens, followers.news, held)


@contextmanager
def ftrace(_):
    followers = Followers()
    # Some 1,500 events for each CPU.
    config = FtraceConfig(
        ring_kib_per_cpu=64, poll_interval_s=0.01, gather_interval_s=0.01, tracepoints=("net:net_dev_queue",)
    )

    def held():
        own = f"-{os.getpid()}-"
        return followers.held() + sum(own in path.name for path in (tracefs.find() / "instances").iterdir())

    with Sender("mcts", STEP, cpu_choice()) as sender:
        yield Made(
            lambda: FilteredSource(config, "mcts", followers()), followers.break_, sender.send, followers.news, held
        )


@contextmanager
def bpf(_):
    followers, sessions = Followers(), []

    def open_session(*args, **options):
        sessions.append(session.Session(*args, **options))
        return sessions[-1]

    def held():
        return followers.held() + sum(one.attached for one in sessions)

    with Sender("mcts", STEP, cpu_choice()) as sender:
        wanted = SessionFilter(
            netns=(f"/proc/{sender.process.pid}/ns/net",), l4_protocols=(17,), hooks=(Hook.NET_DEV_QUEUE,)
        )
        # 910 records for each CPU.
        config = BpfConfig(ring_kib_per_cpu=64, poll_interval_s=0.01, gather_interval_s=0.01, wanted=wanted)
        yield Made(
            lambda: BpfSource(config, followers(), open_session),
            followers.break_,
            sender.send,
            followers.news,
            held,
        )


def file(name):
    @contextmanager
    def made(place):
        paths = [place / path.name for path in GOLDEN_FILES[name]]
        for path, golden in zip(paths, GOLDEN_FILES[name], strict=True):
            shutil.copy(golden, path)
        yield Made(recording_of(BY_NAME[name], paths).source, paths[-1].unlink)

    return made


LIVE = {
    "kmod": kmod,
    "bpf": pytest.param(bpf, marks=pytest.mark.needs("root", "bpf", "netns")),
    "ftrace": pytest.param(ftrace, marks=pytest.mark.needs("root", "tracefs", "netns")),
}
FILES = {name: file(name) for name in GOLDEN_FILES}
ALL = LIVE | FILES


def of(makers):
    return pytest.mark.parametrize("maker", makers.values(), ids=makers)


def test_every_source_has_its_maker():
    assert LIVE.keys() == SOURCES.keys()
    assert FILES.keys() == BY_NAME.keys() - {"pcap"}, "one alone tells nothing"
    promised = {name for name in vars(Source) if not name.startswith("_")}
    assert promised == {"open", "items", "request_stop", "aclose", "discarded", "cost"}


# --- what is looked at ----------------------------------------------------------------------------


def mine(made):
    """Return the resources of a source: open files, tasks, scheduling class, and objects handed out to it."""
    fds = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # descriptor of the listing itself
            fds[str(fd.readlink()).partition(":")[0]] += 1
    return fds, asyncio.all_tasks(), os.sched_getscheduler(0), made.held()


@asynccontextmanager
async def nothing_left(made):
    before = mine(made)
    yield
    # The event loop ends abandoned streams in later iterations.
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0)
    assert mine(made) == before


def without_markers(items):
    """Return the records without markers, and the number of lost records that markers report."""
    batch = records(items)
    return batch[batch.hook != Hook.LOST], batch.lost


def check_header(header, items, *, live):
    batch, _ = without_markers(items)
    assert all((header.source, header.host, header.run, header.mace_version))
    assert header.cpus > 0
    assert set(header.hooks) <= BY_TRACEPOINT.keys()
    if live:
        assert all((header.kernel, header.boot_id, header.command, header.hooks))
        assert {BY_TRACEPOINT[name].hook for name in header.hooks} >= set(batch.hook.tolist())
        assert batch.cpu.max() < header.cpus
        assert header.clock.monotonic_ns <= batch.ts_ns[0]


# --- the promises ---------------------------------------------------------------------------------


@of(ALL)
def test_a_run(maker, tmp_path):
    async def work(made):
        async with nothing_left(made):
            source = made.make()
            header = await source.open()
            if made.happens is not None:
                happening = asyncio.create_task(made.happens())
                happening.add_done_callback(lambda _: source.request_stop())
            items = [item async for item in source.items()]
            await source.aclose()
            await source.aclose()
        check_stream(items)
        check_header(header, items, live=made.happens is not None)
        batch, lost = without_markers(items)
        assert len(batch) > 0
        assert source.discarded == 0
        if made.happens is not None:
            await happening
            assert (len(batch), lost) == (STEP, 0)

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(LIVE)
def test_device_changes_are_topologies_in_their_place(maker, tmp_path):
    async def work(made):
        source, items, step = made.make(), [], 0
        await source.open()
        await made.happens()
        try:
            async for item in source.items():
                items.append(item)
                if isinstance(item, Batch) and step == 0:
                    step = 1
                    made.news()
                elif isinstance(item, Topology) and NEW in item.devices and step == 1:
                    step = 2
                    await made.happens()
                    source.request_stop()
        finally:
            await source.aclose()
        check_stream(items)
        devices = [item.devices for item in items if isinstance(item, Topology)]
        assert (devices[0], devices[-1]) == ((OLD,), (OLD, NEW))
        assert len(without_markers(items)[0]) == 2 * STEP

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(LIVE)
def test_a_quiet_source_yields_progress(maker, tmp_path):
    async def work(made):
        source, upto_ns = made.make(), []
        await source.open()
        try:
            async for item in source.items():
                if isinstance(item, Progress):
                    assert item.upto_ns <= time.monotonic_ns()
                    upto_ns.append(item.upto_ns)
                    if len(upto_ns) == 5:
                        source.request_stop()
        finally:
            await source.aclose()
        assert upto_ns == sorted(upto_ns)
        assert upto_ns[4] > upto_ns[0]

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(LIVE)
def test_a_stopped_source_yields_all_recorded_items(maker, tmp_path):
    async def work(made):
        async with nothing_left(made):
            source = made.make()
            await source.open()
            await made.happens()
            source.request_stop()
            items = [item async for item in source.items()]
            await source.aclose()
        check_stream(items)
        assert len(without_markers(items)[0]) == STEP

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(FILES)
def test_a_stopped_source_ends_after_the_current_item(maker, tmp_path):
    async def work(made):
        async with nothing_left(made):
            source, items = made.make(), []
            await source.open()
            async for item in source.items():
                items.append(item)
                source.request_stop()
            await source.aclose()
        assert len(items) == 1

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(ALL)
def test_a_failed_open_leaves_nothing(maker, tmp_path):
    async def work(made):
        made.cannot_open()
        async with nothing_left(made):
            source = made.make()
            with pytest.raises((Unavailable, SourceError)):
                await source.open()
            await source.aclose()
            await made.make().aclose()

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@pytest.mark.slow
@of(ALL)
@pytest.mark.parametrize("how", ["cancelled", "failed", "left"])
def test_an_abandoned_source_leaves_nothing(maker, tmp_path, how):
    async def work(made):
        source, begun = made.make(), asyncio.Event()

        async def read():
            await source.open()
            try:
                async for _ in source.items():
                    begun.set()
                    if how == "failed":
                        raise ZeroDivisionError
                    if how == "left":
                        return
            finally:
                await source.aclose()

        async with nothing_left(made):
            reading = asyncio.create_task(read())
            await begun.wait()
            if how == "cancelled":
                reading.cancel()
            with suppress(ZeroDivisionError, asyncio.CancelledError):
                await reading
            assert reading.cancelled() == (how == "cancelled")
            del reading

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(FILES)
def test_a_clogged_file_source_waits(maker, tmp_path):
    """Without a consumer a file source reads nothing ahead, and loses nothing."""

    async def work(made):
        source = made.make()
        await source.open()
        whole = [item async for item in source.items()]
        await source.aclose()
        source = made.make()
        drawn, original = 0, source.reader.items

        def counted():
            nonlocal drawn
            for item in original():
                drawn += 1
                yield item

        source.reader.items = counted
        await source.open()
        stream, items = source.items(), []
        while (item := await anext(stream, None)) is not None:
            items.append(item)
            at = source.bytes_read
            for _ in range(10):
                await asyncio.sleep(0)
            assert (drawn, source.bytes_read) == (len(items), at)
        await source.aclose()
        assert same_stream(items, whole)

    with maker(tmp_path) as made:
        asyncio.run(work(made))


@of(LIVE)
def test_a_clogged_live_source_counts_its_losses(maker, tmp_path):
    """Without a consumer the rings overflow; every record is delivered or counted by a marker."""

    async def work(made):
        source = made.make()
        await source.open()
        stream = source.items()
        items = [await anext(stream)]
        for _ in range(10):
            await made.happens()
        source.request_stop()
        items += [item async for item in stream]
        await source.aclose()
        check_stream(items)
        batch, lost = without_markers(items)
        assert len(batch) > 0
        assert lost > 0
        assert len(batch) + lost + source.discarded == 10 * STEP

    with maker(tmp_path) as made:
        asyncio.run(work(made))
