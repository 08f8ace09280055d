"""The records of the module, of the BPF programs and of ftrace are equal, of the same packets at the same time."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.machine import devices
from contracts import abi
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Topology
from mace.lab import Lab
from tests.kernel.guest import programs
from tests.kernel.guest.conftest import load, unload
from tests.kernel.guest.reader import Session

pytestmark = programs.LOADING

QUIET_S = 0.6
"""Before the traffic and after it: somewhere in it is a moment when no packet is between two hooks."""
APART_NS = 50_000
"""Between the two probes of an event, of 95 in a hundred: they run one after the other. The rest is when the emulator
ran the other CPU, or nothing, in between, for as long as its host liked."""


EQUAL = 4242
"""Identifier and port of both containers."""


class Both:
    """Records of a stretch of time, from all sources: `bpf` has the dtype of `module`."""

    def __init__(
        self, ftrace: Batch, names: tuple[str, ...], module: npt.NDArray[Any], bpf: npt.NDArray[Any], skipped: int
    ) -> None:
        self.ftrace = ftrace
        self.names = names
        self.module = module
        self.bpf = bpf
        self.skipped = skipped
        """Calls of BPF programs that the kernel skipped, as the programs were running on that CPU."""


async def capture(lab: Lab, seconds: list[float]) -> Both:
    source = FtraceSource(FtraceConfig(ring_kib_per_cpu=32768, hold_back_ms=5000))
    batches: list[Batch] = []
    names: tuple[str, ...] = ()
    parts: list[npt.NDArray[Any]] = []
    of_bpf: list[npt.NDArray[Any]] = []
    loaded = programs.unfiltered()
    with Session() as session:
        session.setup(subbufs=512, watermark=64).start()
        await source.open()

        async def read() -> None:
            nonlocal names
            async for item in source.items():
                if isinstance(item, Batch):
                    batches.append(item)
                elif isinstance(item, Topology):
                    names = tuple(sighting.name for sighting in item.sightings)

        async def read_rings() -> None:
            while True:
                parts.append(session.read())
                of_bpf.append(programs_read.read())
                await asyncio.sleep(0.2)

        before = skipped_of(loaded)
        # Last, so that ftrace's probe and the module's run next to each other.
        with programs.recording(loaded) as programs_read:
            reading = asyncio.create_task(read())
            reading_rings = asyncio.create_task(read_rings())
            try:
                await asyncio.to_thread(traffic, lab, seconds)
            finally:
                reading_rings.cancel()
                source.request_stop()
                await reading
                await source.aclose()
            session.stop()
            loaded.stop()
            parts.append(session.read())
            of_bpf.append(programs_read.read())
            assert programs_read.lost == 0
        stats = session.stats()
        assert stats["lost"].sum() == 0
        assert not session.gaps
        assert stats["written"].sum() == sum(map(len, parts))
    batch = Batch.concatenate(batches)
    assert batch.lost == 0
    assert source.discarded == 0  # a machine that is held up may bring records later than others wait for them
    return Both(batch, names, np.concatenate(parts), np.concatenate(of_bpf), skipped_of(loaded) - before)


def skipped_of(loaded: programs.Loaded) -> int:
    return sum(runs.missed for runs in loaded.runs().values())


def traffic(lab: Lab, seconds: list[float]) -> None:
    """Everything that the two must agree about; `seconds` gets when it began and ended."""
    time.sleep(QUIET_S)
    seconds.append(time.monotonic())
    lab.ping("c1", count=50, flood=True)
    lab.ping("c1", count=20, flood=True, size=4000)  # fragments
    lab.ping("c2", count=50, flood=True, family=6)
    both = [lab.start_ping(name, count=30, interval_s=0.01) for name in lab.containers]
    for flow in both:
        flow.wait()
    ping_by_socket(lab)
    with_equal_numbers(lab)
    lab.udp("c1", count=300, echo=True)
    lab.udp("c2", count=300, family=6, echo=True)
    lab.udp("c1", count=20, size=3000)  # fragments
    lab.tcp("c1", size=2_000_000)
    lab.tcp("c2", size=500_000, family=6, reverse=True)
    seconds.append(time.monotonic())
    time.sleep(QUIET_S)


def ping_by_socket(lab: Lab) -> None:
    """As ping without privileges does: an ICMP socket, whose identifier the kernel chooses."""
    script = (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)\n"
        "s.settimeout(5)\n"
        f"s.connect(({lab.address('remote')!r}, 1))\n"
        "for n in range(20):\n"
        "    s.send(bytes([8, 0, 0, 0, 0, 0, 0, n]) + bytes(56))\n"
        "    s.recv(100)\n"
    )
    assert lab.exec("c1", ["sysctl", "-qw", "net.ipv4.ping_group_range=0 0"]) == 0
    assert lab.exec("c1", ["python3", "-c", script]) == 0


def with_equal_numbers(lab: Lab) -> None:
    """Both containers at once with one ICMP identifier and one UDP port: NAT has to change one of each."""
    script = (
        "import socket, time\n"
        "ping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)\n"
        "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for s in (ping, udp):\n"
        f"    s.bind(('0.0.0.0', {EQUAL}))\n"
        "ping.settimeout(5)\n"
        f"ping.connect(({lab.address('remote')!r}, 1))\n"
        "for n in range(10):\n"
        "    ping.send(bytes([8, 0, 0, 0, 0, 0, 0, n]) + bytes(56))\n"
        "    ping.recv(100)\n"
        f"    udp.sendto(b'equal', ({lab.address('remote')!r}, 9))\n"
        "    if n == 0:\n"
        "        print('begun', flush=True)\n"
        "    time.sleep(0.01)\n"
    )
    for container in lab.containers:
        assert lab.exec(container, ["sysctl", "-qw", "net.ipv4.ping_group_range=0 0"]) == 0
    both = []
    for container in lab.containers:
        one = lab.popen(container, ["python3", "-c", script])
        both.append(one)
        # Two first packets at once may be given one number by NAT, which then drops one of them.
        assert one.stdout is not None
        assert one.stdout.readline() == "begun\n"
    assert [one.wait() for one in both] == [0, 0]


@pytest.fixture(scope="module")
def both(lab: Lab) -> Any:
    load()
    try:
        seconds: list[float] = []
        both = asyncio.run(capture(lab, seconds))
    finally:
        unload()
    begin, end = (int(second * 1e9) for second in seconds)
    first, last = (
        quiet_moment(both, begin - int(QUIET_S * 1e9), begin),
        quiet_moment(both, end, end + int(QUIET_S * 1e9)),
    )
    kept = (both.ftrace.ts_ns > first) & (both.ftrace.ts_ns < last)
    module, bpf = (side[(side["ts_ns"] > first) & (side["ts_ns"] < last)] for side in (both.module, both.bpf))
    return Both(both.ftrace[kept], both.names, module, bpf, both.skipped)


def quiet_moment(both: Both, begin: int, end: int) -> int:
    """The middle of the longest time in which nothing happened."""
    times = np.concatenate([both.ftrace.ts_ns, *(side["ts_ns"].astype(np.int64) for side in (both.module, both.bpf))])
    times = np.sort(times[(times > begin) & (times < end)])
    times = np.concatenate([[begin], times, [end]])
    longest = int(np.argmax(np.diff(times)))
    return int(times[longest] + times[longest + 1]) // 2


def tuples(both: Both) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """(CPU, hook, device by name, time, position) of the records of each source, as sorted structures."""
    by_index = device_names(both)
    sides = []
    ftrace_names = np.array([code_of(name) for name in both.names], np.int64)
    for cpu, hook, name, ts in (
        (both.ftrace.cpu, both.ftrace.hook, ftrace_names[both.ftrace.dev], both.ftrace.ts_ns),
        *(
            (
                records["cpu"],
                records["hook"],
                np.array([code_of(by_index.get(key, "")) for key in records[["netns", "ifindex"]].tolist()]),
                records["ts_ns"],
            )
            for records in (both.module, both.bpf)
        ),
    ):
        side = np.zeros(len(cpu), [("cpu", "i8"), ("hook", "i8"), ("name", "i8"), ("ts", "i8"), ("at", "i8")])
        placeless = np.isin(hook, (Hook.SKB_COPY_DATAGRAM_IOVEC, Hook.CONSUME_SKB, Hook.KFREE_SKB))
        side["cpu"], side["hook"], side["ts"], side["at"] = cpu, hook, ts, np.arange(len(cpu))
        side["name"] = np.where(placeless, 0, name)
        sides.append(np.sort(side, order=["cpu", "hook", "name", "ts", "at"]))
    return sides[0], sides[1], sides[2]


_codes: dict[str, int] = {}


def code_of(name: str) -> int:
    return _codes.setdefault(name, len(_codes) + 1)


def device_names(both: Both) -> dict[tuple[int, int], str]:
    """(namespace, index) -> name, from the kernel."""
    return {device.key: device.name for device in devices.snapshot(docker_sockets=()).devices}


def test_no_record_is_missing_and_none_is_more(both: Both) -> None:
    ftrace, module, _ = tuples(both)
    counted = []
    for side in (ftrace, module):
        keys, counts = np.unique(side[["cpu", "hook", "name"]], return_counts=True)
        counted.append({tuple(key): int(count) for key, count in zip(keys.tolist(), counts, strict=True)})
    names = {code: name for name, code in _codes.items()}
    differences = {
        (cpu, Hook(hook).name, names.get(name)): (counted[0].get((cpu, hook, name)), counted[1].get((cpu, hook, name)))
        for cpu, hook, name in counted[0].keys() | counted[1].keys()
        if counted[0].get((cpu, hook, name)) != counted[1].get((cpu, hook, name))
    }
    assert differences == {}
    assert len(module) > 10_000
    assert {Hook(hook) for hook in np.unique(module["hook"])} == {
        Hook.NET_DEV_QUEUE,
        Hook.NET_DEV_START_XMIT,
        Hook.NETIF_RX,
        Hook.NETIF_RECEIVE_SKB,
        Hook.SKB_COPY_DATAGRAM_IOVEC,
        Hook.CONSUME_SKB,
        Hook.KFREE_SKB,
    } | ({Hook.NAPI_GRO_RECEIVE_ENTRY} & {Hook(hook) for hook in np.unique(module["hook"])})


def test_same_times_lengths_and_buffers(both: Both) -> None:
    ftrace, module, _ = tuples(both)
    apart = module["ts"] - ftrace["ts"]
    print(
        f"module less ftrace: median {np.median(apart):,.0f} ns, 5 to 95 %"
        f" {np.percentile(apart, 5):,.0f} to {np.percentile(apart, 95):,.0f} ns, {len(apart):,} records"
    )
    assert np.percentile(np.abs(apart), 95) < APART_NS
    told_apart = is_told_apart(ftrace["ts"], module["ts"])
    assert told_apart.mean() > 0.99
    a, b = both.ftrace[ftrace["at"][told_apart]], both.module[module["at"][told_apart]]
    # One to one: the same buffer here is the same buffer there.
    pairs = np.unique(np.stack([a.skb_id, b["skb_id"]], axis=1), axis=0)
    assert len(pairs) == len(np.unique(a.skb_id)) == len(np.unique(b["skb_id"]))
    told = (a.l3_len > 0) & (b["l3_len"] > 0)
    assert told.sum() > len(a) // 3
    assert np.array_equal(a.l3_len[told], b["l3_len"][told])
    reasons = a.hook == Hook.KFREE_SKB
    assert np.array_equal(a.drop_reason[reasons], b["drop_reason"][reasons])


def is_told_apart(ftrace: npt.NDArray[Any], module: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Which events have both their records after those of the event before and before those of the one after.

    An interrupt between the two probes of an event brings the records of its own events: the one source has them
    before the event's, the other after it, so that they do not come in one order.
    """
    first, last = np.minimum(ftrace, module), np.maximum(ftrace, module)
    apart = first[1:] > last[:-1]
    # Where the CPU, the hook or the device changes, time begins anew.
    apart |= first[1:] < first[:-1]
    return np.append(True, apart) & np.append(apart, True)


def test_same_hops_in_the_same_order(both: Both) -> None:
    """Of each kernel buffer the two tell the same sequence of hooks and devices."""
    ftrace, module, _ = tuples(both)
    assert sequences(ftrace, both.ftrace.skb_id) == sequences(module, both.module["skb_id"])


def test_no_address_of_the_kernel_leaves_it(both: Both) -> None:
    # Kernel addresses of x86-64 and arm64 have their upper 16 bits set (or 0xff..): hashes rarely.
    high = both.module["skb_id"] >> np.uint64(48)
    assert (high == 0xFFFF).mean() < 0.01
    assert not np.isin(both.module["skb_id"], both.ftrace.skb_id).any()
    # Buffers are 64 bytes apart at least and lie in one GiB, the guest's memory: of an address that was shifted, or
    # mixed with a constant by addition or exclusive or, 24 bits differ, or 25. Of five hashes some 60 do.
    ids = np.unique(both.module["skb_id"])
    assert len(ids) >= 5
    assert int(np.bitwise_or.reduce(ids ^ ids[0])).bit_count() > 40
    assert not (both.module["pad"] != 0).any()


def test_one_key_for_a_packet_on_its_whole_way(both: Both) -> None:
    """Through NAT and all devices, echo requests of both containers keep the key that they began with."""
    echo = both.module[
        (both.module["ip_version"] == 4)
        & (both.module["l4_proto"] == 1)
        & (both.module["l4_bits"] == 8)
        & (both.module["flags"] & abi.Flag.FRAGMENT == 0)
        & np.isin(both.module["hook"], (Hook.NET_DEV_QUEUE, Hook.NETIF_RECEIVE_SKB))
    ]
    _, counts = np.unique(echo["packet_key"], return_counts=True)
    # Q eth0, R veth, R br, Q out, R rem
    assert set(counts.tolist()) == {5}
    # A flood sends one more when a reply takes more than 10 ms.
    assert len(counts) >= 50 + 2 * 30 + 20 + 2 * 10


def test_equal_numbers_of_two_containers_are_told_apart(both: Both, lab: Lab) -> None:
    """By namespace; and NAT has made them different on the outer device."""
    queued = both.module[both.module["hook"] == Hook.NET_DEV_QUEUE]
    for proto, kind in ((1, 8), (17, 0)):
        mine = queued[(queued["l4_proto"] == proto) & (queued["l4_bits"] == kind) & (queued["ip_version"] == 4)]
        inner = mine[(mine["l4_src"] == EQUAL) & np.isin(mine["netns"], [lab.netns_inode(c) for c in lab.containers])]
        assert {
            int(netns): int(n) for netns, n in zip(*np.unique(inner["netns"], return_counts=True), strict=True)
        } == {lab.netns_inode(container): 10 for container in lab.containers}
        outer = mine[(mine["netns"] == lab.netns_inode("host")) & np.isin(mine["packet_key"], inner["packet_key"])]
        assert len(np.unique(outer["l4_src"])) == 2


# --- BPF ----------------------------------------------------------------------------------------------


def test_bpf_has_the_modules_records_but_for_skipped_calls(both: Both) -> None:
    """The kernel counts the calls that it skipped; on Linux 5.10 it skips none."""
    _, module, bpf = tuples(both)
    (counted, of_bpf) = (Counter(side[["cpu", "hook", "name"]].tolist()) for side in (module, bpf))
    assert not of_bpf - counted
    assert (counted - of_bpf).total() <= both.skipped
    assert both.skipped < len(module) // 1000


def test_bpf_has_the_same_keys_buffers_and_times(both: Both) -> None:
    module, bpf, _ = same_events(both)
    apart = bpf["ts_ns"].astype(np.int64) - module["ts_ns"].astype(np.int64)
    print(f"bpf less module: median {np.median(apart):,.0f} ns, {len(apart):,} records")
    assert np.percentile(np.abs(apart), 95) < APART_NS
    for field in ("l3_len", "drop_reason"):
        assert np.array_equal(module[field], bpf[field]), field
    pairs = np.unique(np.stack([module["skb_id"], bpf["skb_id"]], axis=1), axis=0)
    assert len(pairs) == len(np.unique(module["skb_id"])) == len(np.unique(bpf["skb_id"]))
    at_device = bpf[bpf["ifindex"] > 0]
    whole = module[bpf["ifindex"] > 0]
    keyed = at_device["flags"] & abi.Flag.KEY > 0
    tcp = at_device["l4_proto"] == socket.IPPROTO_TCP
    print(f"without a key: {(~keyed).sum():,} of {tcp.sum():,} records of TCP, of {len(tcp):,} of all")
    # Without a key are packets whose payload lies in pages, which this test's TCP sends. How many these are depends on
    # the lengths of its segments.
    assert keyed[~tcp].all()
    assert keyed[tcp].any()
    for field in ("packet_key", "l4_src", "l4_dst", "l4_seq", "ip_id", "ip_version", "l4_proto", "l4_bits", "vlan"):
        assert np.array_equal(whole[field][keyed], at_device[field][keyed]), field


def test_bpf_has_the_same_hops_in_the_same_order(both: Both) -> None:
    if both.skipped:
        pytest.skip(f"the kernel skipped {both.skipped} calls, so that sequences lack a hop")
    _, module, bpf = tuples(both)
    assert sequences(module, both.module["skb_id"]) == sequences(bpf, both.bpf["skb_id"])


def same_events(both: Both) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
    """Return the records of module and BPF whose events are told apart in both, one row for each event."""
    _, module, bpf = tuples(both)
    if both.skipped:
        kept = [np.isin(side[["cpu", "hook", "name"]], common(module, bpf)) for side in (module, bpf)]
        module, bpf = module[kept[0]], bpf[kept[1]]
    told_apart = is_told_apart(bpf["ts"], module["ts"])
    assert told_apart.mean() > 0.99
    return both.module[module["at"][told_apart]], both.bpf[bpf["at"][told_apart]], len(module)


def common(module: npt.NDArray[Any], bpf: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the (CPU, hook, device) of which both have as many records."""
    counted, of_bpf = (Counter(side[["cpu", "hook", "name"]].tolist()) for side in (module, bpf))
    equal = [key for key, count in counted.items() if of_bpf[key] == count]
    return np.array(equal, [("cpu", "i8"), ("hook", "i8"), ("name", "i8")])


def sequences(side: npt.NDArray[Any], skb_ids: npt.NDArray[Any]) -> Counter[tuple[int, ...]]:
    """Return how many buffers had each sequence of hooks and devices."""
    order = np.lexsort((side["at"], side["ts"], skb_ids[side["at"]]))
    one = side[order]
    cuts = np.flatnonzero(np.diff(skb_ids[one["at"]])) + 1
    return Counter(tuple(part.tolist()) for part in np.split(one["hook"] * 1000 + one["name"], cuts))
