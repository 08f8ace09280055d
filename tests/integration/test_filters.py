"""Only the chosen packets are recorded, while a neighbour floods, and also of a container that starts later.

The n-th datagram of a sender has n bytes of payload, so that its records are known from the socket alone.
"""

import asyncio
import logging
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import replace

import pytest

from collector.bpf.source import BpfConfig, BpfSource
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.live.filter import SessionFilter
from collector.machine.devices import DeviceFollower
from contracts.config import CaptureConfig, Config
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Topology
from mace.lab import Spec, capture_of, running
from mace.live import runs
from mace.live.pipeline import Stop
from tests.measuring import PATHS, balanced, query

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "bpf", "netns"),
    pytest.mark.timeout(180),
]

COUNT = 300
SIZE = 99
UDP = 17
SENDER = """
    import socket, sys
    address = (sys.argv[1], 9)
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    body = bytes(1400)
    print("ready", flush=True)
    for line in sys.stdin:
        for n in range(int(line)):
            made.sendto(body[: n % 1400], address)
        print("sent", flush=True)
"""


class Sender:
    """A process in a member of a lab, which sends numbered datagrams to the far end."""

    def __init__(self, lab, member):
        argv = [sys.executable, "-c", textwrap.dedent(SENDER), lab.address("remote")]
        self.process = lab.popen(member, argv)
        self.expect("ready")
        # The neighbours are known then, so that no datagram waits, or is left out of a queue that is full.
        lab.ping(member, count=2)

    def expect(self, word):
        assert self.process.stdout.readline() == f"{word}\n"

    def begin(self, count=COUNT):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()

    async def send(self):
        self.begin()
        await asyncio.to_thread(self.expect, "sent")


@contextmanager
def flooding(sender):
    """Let the sender send datagrams until the end of the block, and at least one."""
    sender.begin(1)
    sender.expect("sent")
    sender.begin(1 << 30)
    try:
        yield
    finally:
        sender.process.kill()


class Recording:
    """The items of a source, read in a task while the test acts."""

    def __init__(self, source):
        self.source = source
        self.items = []

    async def __aenter__(self):
        await self.source.open()

        async def read():
            self.items += [item async for item in self.source.items()]

        self.reading = asyncio.create_task(read())
        return self

    async def __aexit__(self, *_):
        self.source.request_stop()
        await self.reading
        await self.source.aclose()

    def hops(self, hook):
        """Return (inode of the namespace, name of the device, payload) of each record at a hook, in time order."""
        batch = Batch.concatenate([item for item in self.items if isinstance(item, Batch)])
        assert batch.lost == 0
        here = batch[batch.hook == hook]
        places = {code: self.place(code) for code in set(here.dev.tolist())}
        return [
            (*places[code], length - 28) for code, length in zip(here.dev.tolist(), here.l3_len.tolist(), strict=True)
        ]

    def place(self, code):
        """Return namespace and name of a device, from the last topology that has it."""
        told = [item for item in self.items if isinstance(item, Topology)]
        sighting = told[-1].sightings[code]
        device = next(device for one in reversed(told) for device in one.candidates(sighting))
        return sighting.netns, device.name


def recording_of(lab, **wanted):
    return BpfSource(
        BpfConfig(ring_kib_per_cpu=1024, wanted=SessionFilter(l4_protocols=(UDP,), **wanted)),
        DeviceFollower(host_netns=str(lab.netns_path("host")), docker_sockets=()),
    )


async def said(caplog, text):
    """Wait until a log record has the text."""
    while text not in caplog.text:  # noqa: ASYNC110 (pytest's log has no event)
        await asyncio.sleep(0.01)


def numbered(netns, device):
    return [(netns, device, n) for n in range(COUNT)]


def test_one_container_while_its_neighbour_floods():
    with running(Spec(name="flta", containers=2)) as lab:
        mine, neighbour = Sender(lab, "c1"), Sender(lab, "c2")

        async def run():
            async with Recording(recording_of(lab, containers=("c1",))) as recording:
                with flooding(neighbour):
                    await mine.send()
            return recording

        recording = asyncio.run(run())
        c1, host = lab.netns_inode("c1"), lab.netns_inode("host")
        peer = next(
            device.name
            for device in [item for item in recording.items if isinstance(item, Topology)][-1].devices
            if device.netns == host and device.peer_netns == c1
        )
    assert recording.hops(Hook.NET_DEV_QUEUE) == numbered(c1, "eth0")
    assert recording.hops(Hook.NET_DEV_START_XMIT) == numbered(c1, "eth0")
    assert recording.hops(Hook.NETIF_RX) == numbered(host, peer)
    assert recording.hops(Hook.NETIF_RECEIVE_SKB) == numbered(host, peer)


def test_a_container_that_starts_later_and_ends(caplog):
    caplog.set_level(logging.INFO)
    with running(Spec(name="fltb", containers=1)) as lab:
        neighbour = Sender(lab, "c1")

        async def run():
            async with Recording(recording_of(lab, containers=("late",))) as recording:
                await said(caplog, "no container late yet")
                await asyncio.to_thread(lab.add_container, "late")
                await said(caplog, "container late: recorded")
                late = await asyncio.to_thread(Sender, lab, "late")
                with flooding(neighbour):
                    await late.send()
                netns = lab.netns_inode("late")
                late.process.kill()
                await asyncio.to_thread(lab.remove_container, "late")
                await said(caplog, "container late has ended")
            return recording, netns

        recording, netns = asyncio.run(run())
    sent = [hop for hop in recording.hops(Hook.NET_DEV_QUEUE) if hop[0] == netns]
    assert sent == numbered(netns, "eth0")
    assert recording.hops(Hook.NET_DEV_QUEUE) == sent


def test_a_device_of_the_host_beside_a_container():
    """Both ends of the path: the whole overhead can be computed, of this container's packets."""
    with running(Spec(name="fltc", containers=2)) as lab:
        mine, neighbour = Sender(lab, "c1"), Sender(lab, "c2")
        outer = lab.outer_device

        async def run():
            async with Recording(recording_of(lab, containers=("c1",), devices=(outer,))) as recording:
                await neighbour.send()
                await mine.send()
            return recording

        recording = asyncio.run(run())
        c1, host = lab.netns_inode("c1"), lab.netns_inode("host")
    queued = recording.hops(Hook.NET_DEV_QUEUE)
    assert [hop for hop in queued if hop[0] == c1] == numbered(c1, "eth0")
    assert [hop for hop in queued if hop[0] == host] == 2 * numbered(host, outer)
    assert len(queued) == 3 * COUNT


@pytest.mark.needs("tracefs")
def test_ftrace_chooses_devices_in_the_kernel():
    with running(Spec(name="fltd", containers=1)) as lab:
        sender, outer = Sender(lab, "c1"), lab.outer_device
        follower = DeviceFollower(host_netns=str(lab.netns_path("host")), docker_sockets=())

        async def run():
            async with Recording(FtraceSource(FtraceConfig(devices=(outer, "nosuch0")), follower)) as recording:
                await sender.send()
            return recording

        recording = asyncio.run(run())
    for hook in Hook:
        at = {name for _, name, _ in recording.hops(hook)} if hook else set()
        assert at <= {outer}
    assert [n for _, _, n in recording.hops(Hook.NET_DEV_QUEUE)] == list(range(COUNT))


@pytest.mark.parametrize("source", ["bpf", pytest.param("ftrace", marks=pytest.mark.needs("tracefs"))])
def test_a_run_stores_the_chosen_containers_rows_alone(tmp_path, source):
    """Of the whole path, although only the container is named."""
    with running(Spec(name="flte", containers=2)) as lab:
        capture = CaptureConfig(source=source, containers=("c1",))
        config = replace(Config(), capture=capture_of(capture, lab))

        async def traffic():
            for member in ("c1", "c2"):
                await asyncio.to_thread(lab.ping, member, count=COUNT, interval_s=0.005, size=SIZE)

        async def run():
            return await runs.measure(config, traffic, stop=Stop(), store=tmp_path)

        summary = asyncio.run(run())
    ledger = balanced(summary.as_dict())
    assert ledger.lost == ledger.discarded == 0
    # The host's bridge may send a report of its multicast groups to the container meanwhile.
    pings = f"segment = 'overhead' AND l3_len = {SIZE + 28}"
    asked = f"SELECT container, direction, count(*) FROM delays WHERE {pings} GROUP BY ALL"
    assert sorted(query(tmp_path, asked).fetchall()) == [("c1", "egress", COUNT), ("c1", "ingress", COUNT)]
    for table in ("delays", "windows"):
        assert query(tmp_path, f"SELECT DISTINCT container FROM {table}").fetchall() == [("c1",)]
    # ftrace records the far end, too.
    ends = "direction, devices[:4], devices[-4:], count(*)"
    paths = query(tmp_path, f"SELECT {ends} FROM ({PATHS}) WHERE l3_len = {SIZE + 28} GROUP BY ALL")
    egress, ingress = sorted(paths.fetchall())
    tag = lab.outer_device[3:]
    assert egress[1] == ["eth0", f"veth{tag}-c1", f"br{tag}", f"out{tag}"]
    assert ingress[2] == egress[1][::-1]
    assert egress[3] == ingress[3] == COUNT
