"""The ftrace source over a kernel made of lists: losses, late news of devices, and errors."""

import asyncio
import os
import threading
from collections import deque
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from collector.ftrace import source as ftrace_source
from collector.ftrace import tracefs
from collector.ftrace.rings import TakenPages
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.gaps import settle
from collector.machine.kernel import cpu_list
from contracts.errors import SourceError, Unavailable
from contracts.hooks import TRACEPOINTS, Hook
from contracts.interfaces import Progress
from contracts.records import Batch
from contracts.topology import Device, Topology
from tests.durations import MS
from tests.made_devices import MadeFollower
from tests.ring_pages import EVENTS, FORMS, Page, format_text, layout, payload
from tests.streams import check_stream, records

HEADER_PAGE = (
    "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
    "\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;\n"
)


def page(*events, missed=None):
    """Return a page of events, given as (time, device)."""
    made = Page(layout(), events[0][0] if events else 0, missed=missed)
    before = made.ts_ns
    for ts, name in events:
        made.event(payload(FORMS["net:netif_rx"], name=name.encode(), skbaddr=64, len=84), ts - before)
        before = ts
    return made


class FakeKernel:
    """Replaces tracefs, the clock and the rings for the source."""

    def __init__(self, monkeypatch):
        self.now_ns = 1000 * MS
        self.cpus = [0, 1]
        self.rings = {cpu: deque() for cpu in range(8)}
        """Per CPU, the pages that each reading finds."""
        self.filled = True
        """Whether poll(2) reports the rings as readable, so that the source reads them at each tick."""
        self.taken = []
        """CPU and time of each reading."""
        self.lost = dict.fromkeys(range(8), 0)
        self.absent = set()
        self.refuse = ""
        self.log = []
        self.instances = count()
        kernel = self

        class Instance:
            path = Path("/nowhere")

            @classmethod
            def create(cls, root):
                kernel.log.append("create")
                return cls()

            def set_clock(self, clock):
                assert clock == "mono"
                if kernel.refuse == "clock":
                    raise SourceError("the trace clock is 'local', expected 'mono'")

            def set_option(self, name, *, on):
                if name == "overwrite":
                    assert on

            def set_ring_size(self, per_cpu_kib, subbuf_kib):
                pass

            def set_readable_at(self, percent):
                assert 0 < percent < 50

            def header_page(self):
                return HEADER_PAGE

            def has_event(self, event):
                return event not in kernel.absent

            def event_format(self, event):
                return format_text(event, *EVENTS[event])

            def enable(self, event):
                kernel.log.append(event)

            def record(self, *, on):
                kernel.log.append("on" if on else "off")

            def cpu(self, cpu):
                return Path(str(cpu))

            def stats(self, cpu):
                return tracefs.RingStats(0, 0, kernel.lost[cpu])

            def remove(self):
                kernel.log.append("remove")

        class Ring:
            def __init__(self, path, where):
                self.cpu = int(path.parent.name)
                self.fd = os.eventfd(kernel.filled)

            def take(self, into, start=0):
                kernel.taken.append((self.cpu, kernel.now_ns))
                found = kernel.rings[self.cpu].popleft() if kernel.rings[self.cpu] else []
                for i, one in enumerate(found):
                    into.matrix[start + i] = np.frombuffer(one.bytes(), np.uint8)
                return TakenPages(len(found), empty=True)

            def fileno(self):
                return self.fd

            def close(self):
                os.close(self.fd)
                kernel.log.append(f"close {self.cpu}")

        monkeypatch.setattr(tracefs, "Instance", Instance)
        monkeypatch.setattr(tracefs, "find", lambda: Path("/nowhere"))
        monkeypatch.setattr(tracefs, "remove_leftovers", lambda root: [])
        monkeypatch.setattr(ftrace_source, "ReadRing", Ring)
        monkeypatch.setattr(ftrace_source, "online_cpus", lambda: list(self.cpus))
        monkeypatch.setattr(ftrace_source.time, "monotonic_ns", lambda: self.now_ns)


@pytest.fixture
def kernel(monkeypatch):
    return FakeKernel(monkeypatch)


def run(source, kernel, ticks):
    """Run the source for so many ticks, 50 ms apart; returns the header and all items."""

    async def main():
        header = await source.open()
        got = []

        async def pause(duration_s, readable):
            nonlocal ticks
            ticks -= 1
            kernel.now_ns += 50 * MS
            if ticks <= 0:
                source.request_stop()
            await asyncio.sleep(0)

        source._pause = pause
        try:
            got.extend([item async for item in source.items()])
        finally:
            await source.aclose()
        return header, got

    return asyncio.run(main())


def test_records_come_merged_with_their_sightings_before_them(kernel):
    t = kernel.now_ns
    kernel.rings[0].extend([[], [page((t + 10, "eth0"), (t + 30, "vethc0"))]])
    kernel.rings[1].extend([[], [page((t + 20, "br0"))]])
    source = FtraceSource()
    header, items = run(source, kernel, 5)
    check_stream(items)
    assert isinstance(items[0], Topology)
    assert items[0].sightings == items[0].sightings[:1]
    batch = records(items)
    assert batch.ts_ns.tolist() == [t + 10, t + 20, t + 30]
    last = [i for i in items if isinstance(i, Topology)][-1]
    assert [last.sightings[c].name for c in batch.dev] == ["eth0", "br0", "vethc0"]
    assert header.hooks == tuple(h.tracepoint for h in TRACEPOINTS)
    assert (header.source, header.cpus) == ("ftrace", 2)
    assert kernel.log[-1] == "remove"
    assert kernel.log.index("off") < kernel.log.index("close 0") < kernel.log.index("remove")
    assert source.discarded == source.skipped == 0


def test_rings_that_do_not_fill_are_not_read(kernel):
    kernel.filled, t = False, kernel.now_ns
    run(FtraceSource(FtraceConfig(gather_interval_s=10)), kernel, 6)
    # Once at the beginning, and the rest at the end.
    assert kernel.taken == [(0, t), (1, t), (0, t + 300 * MS), (1, t + 300 * MS)]


def test_a_changed_device_makes_the_source_read_at_once(kernel):
    kernel.filled, t = False, kernel.now_ns
    old, new = Device(1, 2, "eth0", "veth"), Device(7, 2, "eth0", "veth")
    kernel.rings[0].extend([[], [page((t + 20 * MS, "eth0"), (t + 80 * MS, "eth0"), (t + 90 * MS, "eth0"))]])
    follower = MadeFollower((old,), None, None, (new,))
    _, items = run(FtraceSource(FtraceConfig(gather_interval_s=10), devices=follower), kernel, 6)
    check_stream(items)
    assert [now_ns - t for cpu, now_ns in kernel.taken if cpu == 0] == [0, 100 * MS, 300 * MS]
    order = [i.devices if isinstance(i, Topology) else i.ts_ns.tolist() for i in items if not isinstance(i, Progress)]
    assert order[-2:] == [(new,), [t + 80 * MS, t + 90 * MS]]
    assert [t + 20 * MS] in order


def rests(kernel, count, **config):
    """Return the first rests of a source: their longest duration, and whether a filling ring would end them."""
    source, found = FtraceSource(FtraceConfig(poll_interval_s=5, gather_interval_s=10, **config)), []

    async def pause(duration_s, readable):
        found.append((round(duration_s), readable is not None))
        kernel.now_ns += round(duration_s * 1000) * MS
        if len(found) == count:
            source.request_stop()

    async def main():
        await source.open()
        source._pause = pause
        try:
            return [item async for item in source.items()]
        finally:
            await source.aclose()

    asyncio.run(main())
    return found


def test_a_ring_that_fills_during_a_reading_is_read_after_the_poll_interval(kernel):
    assert rests(kernel, 2) == [(5, False)] * 2


def test_a_quiet_ring_can_end_a_long_pause(kernel):
    kernel.filled = False
    assert rests(kernel, 2) == [(10, True)] * 2


def test_a_ring_that_fills_quickly_is_read_after_the_poll_interval(kernel):
    kernel.filled, t = False, kernel.now_ns
    # Two of four pages, and one: half of the ring between two readings, and a quarter.
    kernel.rings[0].extend([[], [page((t + i, "eth0")) for i in (1, 2, 3)], [page((t + 4, "eth0"))]])
    assert rests(kernel, 3, ring_kib_per_cpu=16) == [(10, True), (5, True), (10, True)]


def test_released_records_need_no_further_tick(kernel):
    t = kernel.now_ns
    kernel.filled = False
    kernel.rings[0].extend([[], [page((t + 1, "eth0"))]])
    _, items = run(FtraceSource(FtraceConfig(gather_interval_s=0.05)), kernel, 4)
    check_stream(items)
    at = next(i for i, item in enumerate(items) if isinstance(item, Batch))
    assert isinstance(items[at + 1], Progress)
    assert items[at + 1].upto_ns > t + 1


def woken(kernel, do):
    """Return whether a source that rests for ten seconds reads records at once after `do` in another thread."""
    kernel.filled = False
    follower = MadeFollower(())
    source = FtraceSource(FtraceConfig(poll_interval_s=0.001, gather_interval_s=10), devices=follower)

    async def main():
        await source.open()
        stream = source.items()
        try:
            await anext(stream)
            await anext(stream)
            taken = len(kernel.taken)
            threading.Timer(0.05, do, (source, follower)).start()
            async with asyncio.timeout(5):
                await anext(stream)
            return len(kernel.taken) - taken
        finally:
            await stream.aclose()
            await source.aclose()

    return asyncio.run(main())


def test_a_ring_that_fills_wakes_the_source(kernel):
    def fill(source, follower):
        kernel.now_ns += 5 * MS
        os.eventfd_write(source._cpus[0].ring.fileno(), 1)

    assert woken(kernel, fill) == 2


def test_news_of_a_device_wakes_the_source(kernel):
    def tell(source, follower):
        follower.polls.append((Device(1, 2, "eth0", "veth"),))
        follower.on_news()

    assert woken(kernel, tell) == 2


def test_records_wait_for_the_hold_back(kernel):
    t = kernel.now_ns
    kernel.rings[0].extend([[page((t + 1, "eth0"))]])
    _, items = run(FtraceSource(FtraceConfig(hold_back_ms=120)), kernel, 6)
    when = next(i for i, item in enumerate(items) if isinstance(item, Batch))
    before = [item.upto_ns for item in items[:when] if isinstance(item, Progress)]
    assert before == [t - 120 * MS, t - 70 * MS, t - 20 * MS]


def test_a_device_change_applies_to_held_back_records(kernel):
    t = kernel.now_ns
    old, new = Device(1, 2, "eth0", "veth"), Device(7, 2, "eth0", "veth")
    # Before the second tick, at t + 50 ms, the follower reports a change, which applies from t on (50 ms back).
    kernel.rings[0].extend([[], [page((t + 5 * MS, "eth0"), (t + 20 * MS, "eth0"))], [page((t + 60 * MS, "eth0"))]])
    follower = MadeFollower((old,), None, (new,))
    _, items = run(FtraceSource(devices=follower), kernel, 6)
    check_stream(items)
    assert follower.state == "closed"
    devices, where = (), {}
    for item in items:
        if isinstance(item, Topology):
            devices = item.devices
            assert item.host_netns == follower.host_netns
        elif isinstance(item, Batch):
            where.update(dict.fromkeys(item.ts_ns.tolist(), devices))
    assert where == {t + 5 * MS: (new,), t + 20 * MS: (new,), t + 60 * MS: (new,)}
    news = next(i for i in items if isinstance(i, Topology) and i.devices == (new,))
    assert news.from_ns == t


def test_a_device_change_after_the_start_applies_from_the_start(kernel):
    new = Device(7, 2, "eth0", "veth")
    _, items = run(FtraceSource(devices=MadeFollower((), (new,))), kernel, 4)
    check_stream(items)
    assert [(i.from_ns, i.devices) for i in items if isinstance(i, Topology)] == [
        (items[0].from_ns, ()),
        (items[0].from_ns, (new,)),
    ]


def test_a_batch_is_cut_where_a_device_change_applies(kernel):
    t = kernel.now_ns
    new = Device(7, 2, "eth0", "veth")
    kernel.rings[0].extend([[], [], [page((t + 40 * MS, "eth0"), (t + 60 * MS, "eth0"))], [], []])
    follower = MadeFollower((), None, None, None, (new,))  # before the third tick, at t + 100 ms: from t + 50 ms on
    _, items = run(FtraceSource(devices=follower), kernel, 6)
    check_stream(items)
    order = [i.devices if isinstance(i, Topology) else i.ts_ns.tolist() for i in items if not isinstance(i, Progress)]
    assert order == [(), (), [t + 40 * MS], (new,), [t + 60 * MS]]


def test_packets_of_a_device_without_a_link_layer_header_have_their_whole_length(kernel):
    """A length is right if all devices of a name are of such a kind."""
    t, names = kernel.now_ns, ("ipip0", "eth0", "both")
    made = Page(layout(), t)
    for hook, more in (
        ("net:net_dev_queue", {}), ("net:net_dev_start_xmit", {"network_offset": 0}), ("net:netif_rx", {}),
    ):  # fmt: skip
        for name in names:
            made.event(payload(FORMS[hook], name=name.encode(), skbaddr=64, len=84, **more), 0)
    devices = (Device(1, 3, "ipip0", "ipip"), Device(1, 2, "eth0", "veth"), Device(1, 4, "both", "ipip"))
    kernel.rings[0].extend([[], [made]])
    follower = MadeFollower((*devices, Device(9, 5, "both", "veth")))
    _, items = run(FtraceSource(devices=follower), kernel, 5)
    check_stream(items)
    assert records(items).l3_len.tolist() == [84, 70, 70, 84, 70, 70, 84, 84, 84]


def test_a_gap_is_a_marker_in_the_stream(kernel):
    t = kernel.now_ns
    # The ring was empty at the first tick, t. Events were lost after it; the next event is at t + 30 ms.
    kernel.rings[0].extend([[page((t, "eth0"))], [page((t + 30 * MS, "eth0"), missed=41)]])
    kernel.rings[1].extend([[], [page((t + 1 * MS, "eth0"))]])
    kernel.lost[0] = 41
    _, items = run(FtraceSource(), kernel, 5)
    check_stream(items)
    batch = records(items)
    assert batch.hook.tolist() == [Hook.NETIF_RX, Hook.LOST, Hook.NETIF_RX, Hook.NETIF_RX]
    marker = batch[1:2]
    assert (marker.ts_ns[0], marker.skb_id[0], marker.l3_len[0], marker.cpu[0]) == (t, t + 30 * MS, 41, 0)


def test_the_kernels_total_fills_in_a_missing_count(kernel):
    t = kernel.now_ns
    full = page((t + 1, "eth0"), missed=-1)
    kernel.rings[0].extend([[], [full, page((t + 9, "eth0"), missed=5)]])
    kernel.lost[0] = 12
    _, items = run(FtraceSource(), kernel, 4)
    batch = records(items)
    assert batch.l3_len[batch.hook == Hook.LOST].tolist() == [7, 5]


def test_losses_without_a_page_are_reported_at_the_end(kernel):
    t = kernel.now_ns
    kernel.rings[0].extend([[page((t, "eth0"))]])
    kernel.lost[1] = 3
    _, items = run(FtraceSource(), kernel, 3)
    batch = records(items)
    assert batch.lost == 3
    assert batch.cpu[batch.hook == Hook.LOST].tolist() == [1]


@pytest.mark.parametrize(
    ("counts", "outstanding", "expected"),
    [
        ([3, 4], 7, [3, 4]),
        ([None], 7, [7]),
        ([None, 4], 7, [3, 4]),
        ([None, 4, None], 10, [5, 4, 1]),
        ([None, None, None], 2, [1, 1, 0]),
        ([5, 4], 6, [5, 1]),  # pages have reported three too many
        ([5], 0, [0]),
        ([None], 0, [0]),
        ([None, 5], 3, [0, 3]),
        ([], 5, []),
    ],
)
def test_settle(counts, outstanding, expected):
    assert settle(counts, outstanding) == expected


def test_a_cpu_that_comes_online_is_read(kernel):
    t = kernel.now_ns
    kernel.cpus = [0]
    kernel.rings[5].extend([[page((t + 120 * MS, "eth0"))]])
    kernel.rings[0].extend([[], [page((t + 130 * MS, "eth0"))]])
    source = FtraceSource()
    original = source._released

    def released(**kwargs):
        kernel.cpus = [0, 5]
        return original(**kwargs)

    source._released = released
    _, items = run(source, kernel, 5)
    assert records(items).cpu.tolist() == [5, 0]
    assert kernel.log.count("close 5") == 1


def test_tracepoints_that_the_kernel_lacks_are_reported(kernel, caplog):
    kernel.absent = {"skb:skb_copy_datagram_iovec"}
    header, _ = run(FtraceSource(), kernel, 1)
    assert "skb:skb_copy_datagram_iovec" not in header.hooks
    assert "no tracepoint skb:skb_copy_datagram_iovec" in caplog.text


def test_no_tracepoint_at_all(kernel):
    kernel.absent = {h.tracepoint for h in TRACEPOINTS}
    follower = MadeFollower()
    with pytest.raises(Unavailable, match="none of the tracepoints"):
        run(FtraceSource(devices=follower), kernel, 1)
    assert kernel.log == ["create", "remove"]
    assert follower.state == "new"


def test_a_failed_open_leaves_nothing(kernel):
    kernel.refuse = "clock"
    with pytest.raises(SourceError, match="clock"):
        run(FtraceSource(), kernel, 1)
    assert kernel.log == ["create", "remove"]


def test_a_cancelled_stream_leaves_nothing(kernel):
    source = FtraceSource()

    async def main():
        await source.open()
        async with asyncio.timeout(0.2):
            async for _ in source.items():
                pass

    async def closing():
        try:
            await main()
        finally:
            await source.aclose()
            await source.aclose()

    with pytest.raises(TimeoutError):
        asyncio.run(closing())
    assert kernel.log.count("remove") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"ring_kib_per_cpu": 0},
        {"poll_interval_s": 0},
        {"gather_interval_s": 0},
        {"hold_back_ms": -1},
        {"reader": "splice"},
        {"tracepoints": ("net:nothing",)},
        {"subbuf_kib": 1},
    ],
)
def test_invalid_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FtraceConfig(**wrong)


def test_cpu_lists():
    assert cpu_list(b"0\n") == (0,)
    assert cpu_list(b"0-2,5,7-8\n") == (0, 1, 2, 5, 7, 8)
