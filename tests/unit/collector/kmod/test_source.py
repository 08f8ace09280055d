"""The source over a made-up module: losses, late notifications of devices, full rings, and counts that disagree."""

import asyncio
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collector.kmod import source as kmod_source
from collector.kmod.source import KmodConfig, KmodSource
from collector.live.filter import SessionFilter
from collector.live.places import Places
from contracts.abi import ABI_MAJOR, ABI_MINOR, HOOK_SLOTS
from contracts.errors import SourceError, Unavailable
from contracts.hooks import HOOKS, Hook
from contracts.interfaces import Progress
from contracts.records import Batch, Flag
from contracts.topology import Device, Role, Topology
from tests.durations import MS
from tests.made_devices import HOST_NETNS, MadeFollower
from tests.made_rings import MadeDevice
from tests.streams import check_stream, records

BEGAN = 1000 * MS
CONFIG = KmodConfig(ring_kib_per_cpu=64, hold_back_ms=50)


class Kernel:
    """The module, its clock and its CPUs; `script` has the events before each tick."""

    def __init__(self, monkeypatch):
        self.module = MadeDevice()
        self.online = [0, 1]
        self.now_ns = BEGAN
        self.pauses = []
        monkeypatch.setattr(kmod_source.time, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(kmod_source, "online_cpus", lambda: self.online)

    def run(self, *script, follower=None, config=CONFIG, last=lambda _: None):
        """Run the source with a tick every 50 ms; returns all items."""
        source = KmodSource(config, follower, lambda: self.module)
        steps = deque(script)
        seen = []

        def step():
            self.module.now_ns = self.now_ns
            if steps:
                steps.popleft()(self.module)

        async def pause(duration_s, readable):
            self.pauses.append(round(duration_s, 9))
            self.now_ns += 50 * MS
            if steps:
                step()
            else:
                last(self.module)
                source.request_stop()
            self.module.now_ns = self.now_ns
            await asyncio.sleep(0)

        async def main():
            header = await source.open()
            source._pause = pause
            step()
            try:
                async for item in source.items():
                    seen.append(item)
            finally:
                await source.aclose()
            return header

        self.source, self.seen = source, seen
        self.header = asyncio.run(main())
        return seen


@pytest.fixture
def kernel(monkeypatch):
    return Kernel(monkeypatch)


def nothing(module):
    pass


def test_records_come_merged_with_their_sightings_before_them(kernel):
    def traffic(module):
        module.write(0, BEGAN + 10, Hook.NET_DEV_QUEUE, HOST_NETNS + 1, 2, skb_id=7, l3_len=84, gso_segs=2)
        module.write(1, BEGAN + 20, Hook.NETIF_RX, HOST_NETNS, 5)
        module.write(0, BEGAN + 30, Hook.KFREE_SKB, HOST_NETNS, 5, drop_reason=77, flags=Flag.RECALLED | Flag.KEY)
        module.write(0, BEGAN + 40, Hook.CONSUME_SKB, HOST_NETNS, 0)

    items = kernel.run(traffic, nothing, follower=MadeFollower((Device(HOST_NETNS, 5, "br0", "bridge"),)))
    check_stream(items)
    batch = records(items)
    assert batch.ts_ns.tolist() == [BEGAN + 10, BEGAN + 20, BEGAN + 30, BEGAN + 40]
    assert batch.cpu.tolist() == [0, 1, 0, 0]
    assert batch.content.flags.tolist() == [0, 0, Flag.RECALLED | Flag.KEY, 0]
    assert (batch.skb_id[0], batch.l3_len[0], batch.gso_segs[0], batch.drop_reason[2]) == (7, 84, 2, 77)
    last = [i for i in items if isinstance(i, Topology)][-1]
    seen = [last.sightings[c] for c in batch.dev]
    # The last device of the dropped packet. A record with only a socket's namespace has no device.
    br0 = ("br0", HOST_NETNS, 5)
    assert [(s.name, s.netns, s.ifindex) for s in seen] == [("", HOST_NETNS + 1, 2), br0, br0, ("", 0, 0)]
    header = kernel.header
    assert (header.source, header.cpus) == ("kmod", 2)
    assert header.hooks == tuple(h.tracepoint for h in HOOKS)
    assert kernel.module.log == ["setup", "start", "stop", "stop", "close"]
    assert kernel.source.discarded == 0


def test_hooks_that_the_module_lacks_are_left_out(kernel):
    kernel.module.hello = replace(kernel.module.hello, hooks=(Hook.NETIF_RX, Hook.KFREE_SKB))
    kernel.run(
        nothing, config=replace(CONFIG, wanted=SessionFilter(hooks=(Hook.NETIF_RX, Hook.CONSUME_SKB), sample_shift=3))
    )
    assert kernel.module.wanted == SessionFilter(hooks=(Hook.NETIF_RX,), sample_shift=3)
    assert kernel.header.hooks == ("net:netif_rx",)
    kernel.module.hello = replace(kernel.module.hello, hooks=())
    with pytest.raises(Unavailable, match="none of the hooks"):
        kernel.run(nothing)
    assert kernel.module.log[-1] == "close"


def test_places_follow_the_devices(kernel):
    def web(netns):
        return Device(netns, 5, "eth0", "macvlan", role=Role.INNER, container="web")

    follower = MadeFollower((), None, (web(77),), (web(78),))
    seen = []
    kernel.run(
        *[lambda module: seen.append(module.places)] * 5,
        follower=follower,
        config=replace(CONFIG, wanted=SessionFilter(containers=("web",))),
    )
    assert seen == [Places(), Places(), Places((77,)), Places((78,)), Places((78,))]


def test_a_session_of_one_namespace_is_not_given_others(kernel):
    kernel.module = MadeDevice(sees_all=False)
    mine = Path("/proc/self/ns/net").stat().st_ino
    config = replace(CONFIG, wanted=SessionFilter(netns=(None,)))
    with pytest.raises(Unavailable, match="sees only its own network namespace"):
        kernel.run(nothing, config=config)
    kernel.module.hello = replace(kernel.module.hello, netns=mine)
    kernel.run(nothing, config=config)
    assert kernel.module.places == Places((mine,))


def test_records_wait_for_the_hold_back(kernel):
    items = kernel.run(
        lambda m: m.write(0, BEGAN - 1 + 1), nothing, nothing, nothing, config=replace(CONFIG, hold_back_ms=120)
    )
    when = next(i for i, item in enumerate(items) if isinstance(item, Batch))
    before = [item.upto_ns for item in items[:when] if isinstance(item, Progress)]
    assert before == [BEGAN - 120 * MS, BEGAN - 70 * MS, BEGAN - 20 * MS]


def test_a_batch_is_cut_where_a_device_change_applies(kernel):
    new = Device(HOST_NETNS, 2, "eth0", "veth")
    follower = MadeFollower((), None, None, (new,))  # the third tick, at 100 ms; the change applies from 50 ms on

    def traffic(module):
        module.write(0, BEGAN + 40 * MS, Hook.NETIF_RX, HOST_NETNS, 2)
        module.write(0, BEGAN + 60 * MS, Hook.NETIF_RX, HOST_NETNS, 2)

    items = kernel.run(nothing, nothing, traffic, nothing, nothing, follower=follower)
    check_stream(items)
    order = [i.devices if isinstance(i, Topology) else i.ts_ns.tolist() for i in items if not isinstance(i, Progress)]
    assert order == [(), (), [BEGAN + 40 * MS], (new,), [BEGAN + 60 * MS]]
    assert follower.state == "closed"


def test_losses_of_a_full_ring_are_reported(kernel):
    room = 16 * 63

    def flood(module):
        for i in range(room + 5):
            assert module.write(0, BEGAN + i, l3_len=i) == (i < room)

    items = kernel.run(nothing, flood, nothing, nothing, nothing)
    check_stream(items)
    batch = records(items)
    assert len(batch) == room + 1
    (at,) = np.flatnonzero(batch.hook == Hook.LOST)
    marker = batch[at : at + 1]
    assert at == room  # reported by the tick that found the ring full, because no record followed
    assert (marker.ts_ns[0], marker.l3_len[0], marker.cpu[0]) == (BEGAN + room - 1, 5, 0)
    assert marker.skb_id[0] == BEGAN + 50 * MS
    assert batch.l3_len[:room].tolist() == list(range(room))
    assert batch.lost == 5


def test_a_loss_between_records_is_reported_once(kernel):
    """TAKE finds room in the ring; then records are lost and others stored, and the next head reports the loss."""

    def direct(module):
        ring = module.rings[1]
        ring.pending, ring.pending_from_ns = 4, BEGAN + 61 * MS
        ring.lost[Hook.NETIF_RX] += 4
        module.write(1, BEGAN + 70 * MS)

    items = kernel.run(lambda m: m.write(1, BEGAN + 1), nothing, direct, nothing, nothing)
    check_stream(items)
    batch = records(items)
    assert batch.hook.tolist() == [Hook.NETIF_RX, Hook.LOST, Hook.NETIF_RX]
    assert (batch.l3_len[1], batch.cpu[1], batch.skb_id[1]) == (4, 1, BEGAN + 70 * MS)
    assert BEGAN + 1 <= batch.ts_ns[1] <= BEGAN + 61 * MS


def test_a_loss_after_the_last_record_is_reported_at_the_end(kernel):
    def lose(module):
        module.rings[0].pending = 9
        module.rings[0].lost[Hook.KFREE_SKB] += 9

    items = kernel.run(lambda m: m.write(0, BEGAN + 1), nothing, last=lose)
    batch = records(items)
    assert (batch.lost, batch.hook.tolist()) == (9, [Hook.NETIF_RX, Hook.LOST])


def test_a_cpu_that_comes_online_has_its_own_ring(kernel):
    def comes(module):
        kernel.online = [0, 1, 2]
        module.comes_online(2)
        assert module.write(2, kernel.now_ns - 1)

    def more(module):
        assert module.write(2, kernel.now_ns - 1)

    items = kernel.run(nothing, comes, more, nothing)
    check_stream(items)
    batch = records(items)
    assert batch.cpu.tolist() == [2, 2]
    assert batch.hook.tolist() == [Hook.NETIF_RX] * 2
    assert kernel.source.discarded == 0


def test_cookies_identify_namespaces_if_kernel_and_follower_have_them(kernel):
    """A reused inode belongs to another namespace, which its cookie distinguishes."""
    host = Device(HOST_NETNS, 2, "out0", "", netns_cookie=1)
    first, second = (
        Device(HOST_NETNS + 1, 2, name, "veth", netns_cookie=cookie) for name, cookie in (("a", 7), ("b", 8))
    )
    kernel.module.hello = replace(kernel.module.hello, cookies=True)

    def traffic(cookie):
        return lambda module: module.write(0, kernel.now_ns - MS, Hook.NETIF_RX, cookie, 2)

    follower = MadeFollower((host, first), None, (host, second))
    items = kernel.run(traffic(7), traffic(8), traffic(9), follower=follower)
    check_stream(items)
    assert kernel.module.cookies
    last = [item for item in items if isinstance(item, Topology)][-1]
    seen = [last.sightings[code] for code in records(items).dev]
    assert [(s.netns_cookie, s.ifindex) for s in seen] == [(7, 2), (8, 2), (9, 2)]
    assert last.candidates(seen[0]) == ()
    assert last.candidates(seen[1]) == (second,)
    assert last.candidates(seen[2]) == ()
    assert (seen[0].name, seen[0].netns, seen[2].netns) == ("a", HOST_NETNS + 1, 0)


@pytest.mark.parametrize(
    ("kernel_has", "devices"),
    [
        (False, (Device(HOST_NETNS, 2, "out0", "", netns_cookie=1),)),
        (True, (Device(HOST_NETNS, 2, "out0", ""),)),
        (True, ()),
    ],
)
def test_inodes_identify_namespaces_without_cookies(kernel, kernel_has, devices):
    kernel.module.hello = replace(kernel.module.hello, cookies=kernel_has)
    items = kernel.run(lambda module: module.write(0, BEGAN + 1), follower=MadeFollower(devices))
    assert not kernel.module.cookies
    last = [item for item in items if isinstance(item, Topology)][-1]
    sighting = last.sightings[records(items).dev[0]]
    assert (sighting.netns, sighting.netns_cookie) == (HOST_NETNS, 0)


def test_losses_of_a_cpu_without_a_ring_are_reported(kernel):
    def comes(module):
        kernel.online = [0, 1, 2]
        module.lost_elsewhere = 3

    def more(module):
        module.lost_elsewhere = 5

    items = kernel.run(nothing, comes, more, nothing)
    check_stream(items)
    batch = records(items)
    assert batch.hook.tolist() == [Hook.LOST, Hook.LOST]
    assert (batch.l3_len.tolist(), batch.cpu.tolist()) == ([3, 2], [2, 2])
    assert batch.skb_id.tolist() == [BEGAN + 50 * MS, BEGAN + 100 * MS]


def test_rings_that_fill_slowly_are_read_at_the_gather_interval(kernel):
    def few(module):
        assert module.write(0, kernel.now_ns - 20 * MS)

    kernel.run(nothing, *[few] * 3)
    assert kernel.pauses == [0.5] * 4


def test_a_ring_that_would_be_half_full_by_then_is_read_at_the_poll_interval(kernel):
    def traffic(records):
        def write(module):
            assert all(module.write(1, kernel.now_ns - 20 * MS + i) for i in range(records))

        return write

    # A ring of 64 KiB has 16 sub-buffers of 63 records: one of them in 50 ms is over half of the ring in 500 ms.
    kernel.run(nothing, nothing, traffic(63), traffic(5), nothing)
    assert kernel.pauses == [0.5, 0.5, 0.05, 0.5, 0.5]


def test_the_hold_back_never_costs_records(kernel):
    """Each tick brings three quarters of a ring, held back for ten ticks: copies free the ring before the second."""
    count = 12 * 63

    def traffic(module):
        assert all(module.write(0, kernel.now_ns - 40 * MS + i, l3_len=i) for i in range(count))

    items = kernel.run(*[traffic] * 8, config=replace(CONFIG, hold_back_ms=500))
    check_stream(items)
    batch = records(items)
    assert batch.lost == 0
    assert batch.l3_len.tolist() == [*range(count)] * 8


def test_inconsistent_counts_end_the_run_with_an_error(kernel):
    def forge(module):
        module.write(0, BEGAN + 1)
        module.rings[0].written[Hook.NETIF_RX] += 1

    with pytest.raises(SourceError, match="has written 2 records and lost 0, but MACE has read 1"):
        kernel.run(forge, nothing)
    assert kernel.module.log[-2:] == ["stop", "close"]


def test_descending_times_in_a_ring_are_an_error(kernel):
    def forge(module):
        module.write(0, BEGAN + 10)
        module.write(0, BEGAN + 9)

    with pytest.raises(SourceError, match="time goes back"):
        kernel.run(forge, nothing, nothing)


def test_a_record_of_a_disabled_hook_is_an_error(kernel):
    with pytest.raises(SourceError, match="a record of hook 15"):
        kernel.run(lambda m: m.write(0, BEGAN + 10, HOOK_SLOTS - 1), nothing, nothing)


def test_late_records_are_counted(kernel):
    def late(module):
        module.write(1, BEGAN + 5)

    items = kernel.run(nothing, nothing, nothing, nothing, late, nothing)
    assert len(records(items)) == 0
    assert kernel.source.discarded == 1


def test_the_end_of_the_own_namespace_ends_the_stream(kernel):
    kernel.module.hello = replace(kernel.module.hello, sees_all=False)

    def dies(module):
        module.write(0, BEGAN + 1)
        module.greet = lambda: replace(module.hello, netns_gone=True)

    items = kernel.run(dies, nothing, nothing, nothing, nothing, nothing)
    assert len(records(items)) == 1
    assert kernel.now_ns == BEGAN


def test_cost_is_of_this_run(kernel):
    kernel.module.calls = 5000
    kernel.run(nothing)
    assert kernel.source.cost == ()  # the session was never queried while it was open
    source = KmodSource(CONFIG, None, lambda: kernel.module)

    async def main():
        await source.open()
        first = source.cost
        await source.aclose()
        return first

    (cost,) = asyncio.run(main())
    assert (cost.hook, cost.calls, cost.timed_ns) == (Hook.NETIF_RX, 100, 1000)
    assert source.cost == (cost,)


def test_the_readable_device_ends_a_pause(kernel, monkeypatch):
    """A pipe stands for the device: asyncio polls a real file descriptor."""
    import os

    read, write = os.pipe()
    kernel.module.fileno = lambda: read
    source = KmodSource(CONFIG, None, lambda: kernel.module)

    async def main():
        await source.open()
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, os.write, write, b"x")
        async with asyncio.timeout(5):
            await source._pause(60, read)
            os.read(read, 1)
            loop.call_later(0.01, source.request_stop)
            await source._pause(60, read)
        await source.aclose()

    asyncio.run(main())
    os.close(read)
    os.close(write)


def test_check_says_what_is_there_or_missing(kernel):
    status = KmodSource.check(lambda: kernel.module)
    assert status.ok
    assert (
        f"ABI {ABI_MAJOR}.{ABI_MINOR}: {len(HOOKS)} of {len(HOOKS)} hooks; sees every network namespace"
        in status.detail
    )
    assert "netif_rx 40 ns" in status.detail
    assert kernel.module.log == ["close"]

    def absent():
        raise Unavailable("kmod", "not loaded", "load it")

    assert (KmodSource.check(absent).ok, KmodSource.check(absent).remedy) == (False, "load it")

    def other():
        raise SourceError("speaks ABI 2.0, this MACE 1.0; build it")

    assert (KmodSource.check(other).detail, KmodSource.check(other).remedy) == (
        "speaks ABI 2.0, this MACE 1.0",
        "build it",
    )


@pytest.mark.parametrize(("kib", "expected"), [(8192, (32, 256)), (1024, (16, 64)), (3072, (24, 128)), (8, (2, 4))])
def test_a_ring_is_cut_into_enough_sub_buffers(kib, expected):
    config = KmodConfig(ring_kib_per_cpu=kib)
    assert (config.subbufs, config.subbuf_bytes // 1024) == expected


@pytest.mark.parametrize("wrong", [{"ring_kib_per_cpu": 1}, {"poll_interval_s": 0}, {"hold_back_ms": -1}])
def test_invalid_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KmodConfig(**wrong)
