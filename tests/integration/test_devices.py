"""The follower of devices on the real kernel; devices and routes are in namespaces that the tests make and remove."""

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest
from pyroute2 import NetNS

from collector.bpf.devices import BpfDeviceFollower
from collector.machine import devices as under_test
from collector.machine.devices import DeviceFollower, check, snapshot
from collector.machine.netns import inode_of, leave_for_new_netns
from collector.machine.rtnetlink import LinkEvents
from contracts.errors import SourceError, Unavailable
from contracts.names import text
from contracts.topology import Device, Role, Sharer
from mace.lab import Lab, Runtime, Spec, running
from tests.measuring import wait_for
from tests.nasty_names import NASTY, kernel_takes

pytestmark = pytest.mark.needs("root", "netns")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mace-")]


Follows = type[DeviceFollower] | type[BpfDeviceFollower]


class Machine:
    """Namespaces with unique names, all removed at the end; and the follower under test."""

    def __init__(self, follower: Follows = DeviceFollower) -> None:
        self.follower = follower
        self.prefix = f"t{uuid.uuid4().hex[:8]}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def name(self, short: str) -> str:
        return f"{self.prefix}-{short}"

    def add(self, *shorts: str) -> None:
        for short in shorts:
            ip("netns", "add", self.name(short))

    def delete(self, *shorts: str) -> None:
        for short in shorts:
            ip("netns", "del", self.name(short))

    def inode(self, short: str) -> int:
        return Path(f"/run/netns/{self.name(short)}").stat().st_ino

    def ip(self, short: str, words: str) -> None:
        """Run `ip -n NAME WORDS`, with `@x` for the full name of namespace x."""
        ip("-n", self.name(short), *(self.name(w[1:]) if w.startswith("@") else w for w in words.split()))

    def veth(self, a: str, a_name: str, b: str, b_name: str) -> None:
        self.ip(a, f"link add {a_name} type veth peer name {b_name} netns @{b}")

    def process(self) -> subprocess.Popen[bytes]:
        """Start a process in a new namespace that no mount keeps."""
        process = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
        self.processes.append(process)
        wait_for(lambda: inode_of(f"/proc/{process.pid}/ns/net") != inode_of("/proc/self/ns/net"), 5)
        return process

    def snapshot(self, **arguments: object) -> tuple[Device, ...]:
        """Return the devices that the follower sees first."""

        async def look() -> tuple[Device, ...]:
            follower = self.follower(docker_sockets=(), **arguments)  # type: ignore[arg-type]
            try:
                await follower.open()
                return follower.poll() or ()
            finally:
                await follower.aclose()

        # A thread of its own: the caller's may run an event loop.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(look())).result()

    @property
    def sees_routes(self) -> bool:
        """Whether the follower sees the routes of every namespace; else those of the host's, if a process is there."""
        return self.follower is DeviceFollower

    def inhabit(self, short: str) -> None:
        """Start a process in one of the test's namespaces."""
        process = subprocess.Popen(["nsenter", f"--net=/run/netns/{self.name(short)}", "sleep", "1000"])
        self.processes.append(process)
        wait_for(lambda: inode_of(f"/proc/{process.pid}/ns/net") == self.inode(short), 5)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for place in Path("/run/netns").glob(f"{self.prefix}*"):
            subprocess.run(["ip", "netns", "del", place.name], check=False)


@pytest.fixture(
    params=[
        pytest.param(DeviceFollower, id="netlink"),
        pytest.param(BpfDeviceFollower, id="bpf", marks=pytest.mark.needs("bpf")),
    ]
)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Provide a machine for each follower."""
    machine = Machine(request.param)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture
def with_netlink() -> Iterator[Machine]:
    """Provide a machine for the follower by netlink, for tests of its events."""
    machine = Machine()
    try:
        yield machine
    finally:
        machine.close()


@contextlib.asynccontextmanager
async def following(machine: Machine, **arguments: object) -> AsyncIterator["Watcher"]:
    follower = machine.follower(docker_sockets=(), **arguments)  # type: ignore[arg-type]
    try:
        await follower.open()
        yield Watcher(machine, follower)
    finally:
        await follower.aclose()


class Watcher:
    """Keeps the newest snapshot of the test's own namespaces."""

    def __init__(self, machine: Machine, follower: DeviceFollower | BpfDeviceFollower) -> None:
        self.machine = machine
        self.follower = follower
        self.all: tuple[Device, ...] = ()
        self.sharers: tuple[Sharer, ...] = ()
        self.poll()

    def poll(self) -> bool:
        new = self.follower.poll()
        if new is not None:
            sharers = self.follower.on_host_network
            assert (new, sharers) != (self.all, self.sharers), "a snapshot without a change"
            self.sharers = sharers
            assert list(new) == sorted(new, key=lambda d: d.key)
            assert len({d.key for d in new}) == len(new)
            self.all = new
        return new is not None

    def get(self, short: str, name: str) -> Device | None:
        inode = None
        with contextlib.suppress(OSError):
            inode = self.machine.inode(short)
        return next((d for d in self.all if d.netns == inode and d.name == name), None)

    async def until(self, condition: Callable[[], object], limit_s: float = 5) -> float:
        """Wait until the condition holds; returns the seconds."""
        started_s = time.monotonic()
        while True:
            self.poll()
            if condition():
                return time.monotonic() - started_s
            if time.monotonic() - started_s > limit_s:
                pytest.fail(f"it did not happen; there are {[d for d in self.all if d.netns in self._own()]}")
            await asyncio.sleep(0.002)

    def _own(self) -> set[int]:
        return {d.netns for d in self.all if self.machine.prefix in d.netns_name}


def test_check() -> None:
    status = check()
    assert status.ok
    assert "network namespaces" in status.detail


@pytest.mark.slow
def test_the_lab_s_topology(machine: Machine) -> None:
    machine.add("host", "c1", "c2", "far")
    machine.ip("host", "link add br0 type bridge")
    for container in ("c1", "c2"):
        machine.veth("host", f"veth-{container}", container, "eth0")
        machine.ip("host", f"link set veth-{container} master br0 up")
    machine.veth("host", "out0", "far", "rem0")
    machine.ip("host", "addr add 203.0.113.1/24 dev out0")
    machine.ip("host", "link set out0 up")
    machine.ip("host", "route add default via 203.0.113.2")
    machine.ip("c1", "addr add 2001:db8:1::2/64 dev eth0")
    machine.ip("c1", "link set eth0 up")
    machine.ip("c1", "route add default via 2001:db8:1::1")
    if not machine.sees_routes:
        machine.inhabit("host")

    found = machine.snapshot(host_netns=machine.name("host"))
    by_name = {(d.netns, d.name): d for d in found}
    host, c1, c2, far = (machine.inode(short) for short in ("host", "c1", "c2", "far"))
    br0, out0, rem0 = by_name[host, "br0"], by_name[host, "out0"], by_name[far, "rem0"]
    eth0_1, eth0_2 = by_name[c1, "eth0"], by_name[c2, "eth0"]
    veth_1, veth_2 = by_name[host, "veth-c1"], by_name[host, "veth-c2"]

    # Peers, in both directions, and across equal names.
    for a, b in ((eth0_1, veth_1), (eth0_2, veth_2), (out0, rem0)):
        assert (a.peer_netns, a.peer_ifindex) == b.key
        assert (b.peer_netns, b.peer_ifindex) == a.key
        assert a.kind == b.kind == "veth"
    assert veth_1.master_ifindex == veth_2.master_ifindex == br0.ifindex
    assert br0.kind == "bridge"
    assert by_name[c1, "lo"].kind == "loopback"
    assert [d.default_route for d in (out0, eth0_1, eth0_2, veth_1)] == [True, machine.sees_routes, False, False]

    assert [d.role for d in (eth0_1, eth0_2)] == [Role.INNER] * 2
    assert [d.role for d in (veth_1, veth_2, br0)] == [Role.HOST] * 3
    assert (out0.role, rem0.role, by_name[c1, "lo"].role) == (Role.OUTER, Role.REMOTE, Role.LOOPBACK)
    assert (out0.netns_name, eth0_1.netns_name, rem0.netns_name) == ("host", machine.name("c1"), machine.name("far"))
    assert (out0.container, eth0_1.container, rem0.container) == ("", machine.name("c1"), "")


@pytest.mark.slow
def test_the_host_can_be_named_in_several_ways(machine: Machine) -> None:
    machine.add("host")
    inode = machine.inode("host")
    for asked in (machine.name("host"), f"/run/netns/{machine.name('host')}", inode, str(inode)):
        host = [d for d in machine.snapshot(host_netns=asked) if d.netns_name == "host"]
        assert {d.netns for d in host} == {inode}
    with pytest.raises(Unavailable, match=rf"did you mean '{machine.name('host')}'"):
        machine.snapshot(host_netns=machine.name("hots"))
    with pytest.raises(Unavailable, match="inode 12"):
        machine.snapshot(host_netns=12)


def test_names_that_the_kernel_takes_are_names(machine: Machine) -> None:
    """Devices named by markup, terminal commands and bytes that are not UTF-8 stay distinct."""
    machine.add("odd")
    names = [name for name in NASTY if kernel_takes(name)] + ["\udcff", "\udcfe"]
    assert len(names) > 35
    for name in names:
        argv = ["ip", "-n", machine.name("odd"), "link", "add", "name", os.fsencode(name), "type", "bridge"]
        done = subprocess.run(argv, capture_output=True, check=False)
        assert not done.returncode, (name, done.stderr)
    inode = machine.inode("odd")
    found = [d.name for d in machine.snapshot() if d.netns == inode and d.kind == "bridge"]
    assert sorted(found) == sorted(text(name) for name in names)


@pytest.mark.slow
def test_lower_devices(machine: Machine) -> None:
    machine.add("host", "c")
    machine.ip("host", "link add br0 type bridge")
    machine.ip("host", "link add link br0 mac0 type macvlan mode bridge")
    machine.ip("host", "link set mac0 netns @c name eth0")
    machine.ip("host", "link add vx0 type vxlan id 7 dstport 4789 dev br0")
    machine.ip("host", "link add vx1 type vxlan id 8 dstport 4789 remote 192.0.2.1")
    found = {(d.netns, d.name): d for d in machine.snapshot(host_netns=machine.name("host"))}
    host, c = machine.inode("host"), machine.inode("c")
    br0, mac0, vx0 = found[host, "br0"], found[c, "eth0"], found[host, "vx0"]
    assert mac0.kind == "macvlan"
    assert (mac0.peer_netns, mac0.peer_ifindex) == br0.key
    assert mac0.role is Role.INNER
    assert vx0.kind == "vxlan"
    assert (vx0.peer_netns, vx0.peer_ifindex) == br0.key
    assert (found[host, "vx1"].peer_netns, found[host, "vx1"].peer_ifindex) == (0, 0)


@pytest.mark.slow
@pytest.mark.needs("bpf")
def test_both_followers_see_the_same() -> None:
    """Devices of every kind that this kernel has, in two namespaces, with all that netlink says of them."""
    machine = Machine()
    try:
        machine.add("a", "b")
        machine.veth("a", "v0", "b", "eth0")
        machine.ip("a", "link add br0 type bridge")
        machine.ip("a", "link set v0 master br0")
        machine.veth("a", "v1", "b", "eth1")
        kinds = ["macvlan", "macvtap", "ipvlan", "vlan id 7", "vxlan id 7 dstport 4789 dev v1", "macsec"]
        made = [f"link add link v1 name low{n} type {kind}" for n, kind in enumerate(kinds)]
        kinds = [
            "dummy",
            "ifb",
            "bond",
            "vrf table 7",
            "team",
            "gretap remote 192.0.2.1 local 192.0.2.2",
            "geneve id 7",
        ]
        made += [f"link add own{n} type {kind}" for n, kind in enumerate(kinds)]
        made += ["tuntap add tap0 mode tap", "link add nk0 type netkit peer name nk1"]
        for words in made:
            with contextlib.suppress(subprocess.CalledProcessError):  # a kind that this kernel or ip does not have
                machine.ip("a", words)
        for name in ("low0", "tap0"):
            machine.ip("a", f"link set {name} netns @b")
        own = {machine.inode("a"), machine.inode("b")}
        seen = []
        for machine.follower in (DeviceFollower, BpfDeviceFollower):
            found = machine.snapshot(host_netns=machine.name("a"), outer=("low0",))
            seen.append([device for device in found if device.netns in own])
    finally:
        machine.close()
    by_netlink, by_bpf = seen
    assert len(by_netlink) >= 8
    assert by_bpf == by_netlink


@pytest.mark.slow
def test_pyroute2_sees_the_same(machine: Machine) -> None:
    machine.add("a", "b")
    machine.ip("a", "link add br0 type bridge")
    machine.veth("a", "v0", "b", "eth0")
    machine.veth("a", "v1", "a", "v2")
    machine.ip("a", "link set v0 master br0")
    machine.ip("a", "link add vx0 type vxlan id 7 dstport 4789 dev br0")
    found = [d for d in machine.snapshot() if d.netns == machine.inode("a")]
    with NetNS(machine.name("a")) as witness:
        expected = sorted(
            (
                link["index"],
                link.get("ifname"),
                link.get(("linkinfo", "kind"), "loopback" if link.get("ifname") == "lo" else ""),
                link.get("master") or 0,
            )
            for link in witness.get_links()
        )
    assert [(d.ifindex, d.name, d.kind, d.master_ifindex) for d in found] == expected


async def _changes(machine: Machine) -> None:
    machine.add("a", "b")
    async with following(machine) as seen:
        assert seen.get("a", "lo")
        machine.veth("a", "v0", "b", "eth0")
        await seen.until(lambda: seen.get("b", "eth0"))
        v0, eth0 = seen.get("a", "v0"), seen.get("b", "eth0")
        assert v0
        assert eth0
        assert (v0.peer_netns, v0.peer_ifindex) == eth0.key
        assert (eth0.peer_netns, eth0.peer_ifindex) == v0.key

        machine.ip("b", "link set eth0 name wan0")
        await seen.until(lambda: seen.get("b", "wan0"))
        assert seen.get("b", "eth0") is None

        machine.ip("a", "link add br0 type bridge")
        machine.ip("a", "link set v0 master br0")
        await seen.until(lambda: (d := seen.get("a", "v0")) and d.master_ifindex)
        machine.ip("a", "link set v0 nomaster")
        await seen.until(lambda: (d := seen.get("a", "v0")) and not d.master_ifindex)

        machine.add("c")
        machine.ip("b", "link set wan0 netns @c")
        await seen.until(lambda: seen.get("c", "wan0") and not seen.get("b", "wan0"))
        v0, wan0 = seen.get("a", "v0"), seen.get("c", "wan0")
        assert v0
        assert wan0
        await seen.until(lambda: (d := seen.get("a", "v0")) and (d.peer_netns, d.peer_ifindex) == wan0.key)

        machine.ip("c", "link del wan0")
        await seen.until(lambda: not seen.get("a", "v0") and not seen.get("c", "wan0"))
        # Nothing changes, so that no topology follows.
        await asyncio.sleep(0.1)
        seen.poll()
        for _ in range(30):
            await asyncio.sleep(0.05)
            if new := seen.follower.poll():  # caused by other processes of a shared machine
                assert {d for d in new if machine.prefix in d.netns_name} == {
                    d for d in seen.all if machine.prefix in d.netns_name
                }


@pytest.mark.slow
def test_devices_come_change_move_and_go(machine: Machine) -> None:
    asyncio.run(_changes(machine))


async def _routes(machine: Machine) -> None:
    machine.add("host", "b")
    machine.veth("host", "v0", "b", "eth0")
    machine.inhabit("host")
    async with following(machine, host_netns=machine.name("host"), rescan_interval_s=0.05) as seen:
        machine.ip("host", "addr add 192.0.2.1/24 dev v0")
        machine.ip("host", "addr add 2001:db8::1/64 dev v0 nodad")
        machine.ip("host", "link set v0 up")
        machine.ip("b", "link set eth0 up")
        machine.ip("host", "route add unreachable default metric 7")
        for gateway in ("192.0.2.2", "2001:db8::2"):
            machine.ip("host", f"route add default via {gateway}")
            await seen.until(lambda: (d := seen.get("host", "v0")) and d.default_route)
            machine.ip("host", f"route del default via {gateway}")
            await seen.until(lambda: (d := seen.get("host", "v0")) and not d.default_route)
        machine.ip("host", "route add default via 192.0.2.2")
        await seen.until(lambda: (d := seen.get("host", "v0")) and d.default_route and d.role is Role.OUTER)
        machine.ip("host", "link set v0 down")  # takes the route along without a word
        await seen.until(lambda: (d := seen.get("host", "v0")) and not d.default_route)


@pytest.mark.slow
def test_default_routes_of_the_host(machine: Machine) -> None:
    asyncio.run(_routes(machine))


async def _same_name(machine: Machine) -> None:
    machine.add("host", "c")
    machine.veth("host", "v0", "c", "eth0")
    async with following(machine, host_netns=machine.name("host")) as seen:
        old = seen.get("c", "eth0")
        assert old
        assert old.role is Role.INNER
        machine.delete("c")
        machine.add("c")
        # Another name: the kernel's worker removes the dead namespace's v0 later.
        machine.veth("host", "v1", "c", "eth0")
        await seen.until(lambda: (d := seen.get("c", "eth0")) and d.peer_ifindex)
        new = seen.get("c", "eth0")
        assert new
        await seen.until(lambda: not any(d.key == old.key for d in seen.all) or new.netns == old.netns)
        assert new.role is Role.INNER
        assert new.container == old.container == machine.name("c")
        v1 = seen.get("host", "v1")
        assert v1
        assert (new.peer_netns, new.peer_ifindex) == v1.key != (old.peer_netns, old.peer_ifindex)
        assert len([d for d in seen.all if d.netns_name == machine.name("c") and d.name == "eth0"]) == 1


def test_a_container_that_takes_a_dead_one_s_name(machine: Machine) -> None:
    asyncio.run(_same_name(machine))


async def _process_only(machine: Machine) -> None:
    machine.add("host")
    async with following(machine, host_netns=machine.name("host")) as seen:
        process = machine.process()
        inode = inode_of(f"/proc/{process.pid}/ns/net")
        # No device has it as a peer: the scan finds it.
        await seen.until(lambda: any(d.netns == inode for d in seen.all))
    async with following(machine, host_netns=machine.name("host"), rescan_interval_s=3600) as seen:
        # A veth has its peer there: the follower finds it without a scan, completely.
        second = machine.process()
        machine.ip("host", f"link add v0 type veth peer name eth0 netns {second.pid}")
        inode = inode_of(f"/proc/{second.pid}/ns/net")
        await seen.until(lambda: any(d.netns == inode and d.name == "eth0" for d in seen.all))
        eth0 = next(d for d in seen.all if d.netns == inode and d.name == "eth0")
        assert eth0.role is Role.INNER
        assert eth0.netns_name == f"net:[{inode}]"
        assert eth0.container.endswith(f"[{second.pid}]") or len(eth0.container) == 12
        for ended in (process, second):
            ended.kill()
            ended.wait()
        await seen.until(lambda: not any(d.netns == inode for d in seen.all) and not seen.get("host", "v0"), 2)


@pytest.mark.slow
def test_a_namespace_of_a_process_alone(machine: Machine) -> None:
    asyncio.run(_process_only(machine))


@contextlib.contextmanager
def guest_of_lower_id(host: subprocess.Popen[bytes]) -> Iterator[None]:
    """Start a process in the namespace of `host` whose pid is lower than that of the container's first process."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(host.pid // 2))
    with subprocess.Popen(["nsenter", f"--target={host.pid}", "--net", "sleep", "1000"]) as guest:
        try:
            wait_for(lambda: inode_of(f"/proc/{guest.pid}/ns/net") == inode_of(f"/proc/{host.pid}/ns/net"), 5)
            assert guest.pid < host.pid
            yield
        finally:
            guest.kill()


async def _named_by_the_first(machine: Machine) -> None:
    machine.add("host")
    process = machine.process()
    machine.ip("host", f"link add v0 type veth peer name eth0 netns {process.pid}")
    inode = inode_of(f"/proc/{process.pid}/ns/net")

    def name(devices: tuple[Device, ...]) -> str:
        return next(d.container for d in devices if d.netns == inode and d.name == "eth0")

    def look() -> str:
        return name(machine.snapshot(host_netns=machine.name("host")))

    async with following(machine, host_netns=machine.name("host"), rescan_interval_s=0.05) as seen:
        before = look()
        assert name(seen.all) == before
        with guest_of_lower_id(process):
            await asyncio.sleep(0.2)
            seen.poll()
            assert name(seen.all) == before, "a guest has given the container its name"
            assert look() == before
            process.kill()
            process.wait()
            await seen.until(lambda: name(seen.all) == look() != before)


@pytest.mark.needs("ns_last_pid")
def test_the_first_process_names_a_container(machine: Machine) -> None:
    """A visiting process with a lower pid, such as the measurement itself, does not name the container."""
    asyncio.run(_named_by_the_first(machine))


class Held:
    """A network namespace that only an open socket keeps."""

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._make)
        thread.start()
        thread.join()
        return self

    def _make(self) -> None:
        fd = leave_for_new_netns()
        self.inode = os.fstat(fd).st_ino
        self.fd = fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


async def _held_by_a_file(machine: Machine) -> None:
    machine.add("host")
    async with following(machine, host_netns=machine.name("host"), rescan_interval_s=0.2) as seen:
        with Held() as held:
            machine.ip("host", f"link add v0 type veth peer name eth0 netns /proc/{os.getpid()}/fd/{held.fd}")
            # First under a number, because the ordinary scan does not find the namespace; then under its inode.
            await seen.until(lambda: any(d.netns == held.inode and d.name == "eth0" for d in seen.all))
            v0 = seen.get("host", "v0")
            assert v0
            assert v0.peer_netns == held.inode
        await seen.until(lambda: not seen.get("host", "v0"))


@pytest.mark.slow
def test_a_namespace_that_only_an_open_file_keeps(machine: Machine) -> None:
    asyncio.run(_held_by_a_file(machine))


async def _unmounted(machine: Machine) -> None:
    machine.add("host", "c")
    machine.veth("host", "v0", "c", "eth0")
    inode, name = machine.inode("c"), machine.name("c")
    async with following(machine, host_netns=machine.name("host")) as seen:
        await seen.until(lambda: seen.get("c", "eth0"))
        with Path(f"/run/netns/{name}").open("rb"):  # noqa: ASYNC230 - a file in memory
            machine.delete("c")
            machine.add("later")
            machine.veth("host", "v1", "later", "eth0")
            # The look at the mounts that finds this name has missed the other.
            await seen.until(lambda: (device := seen.get("later", "eth0")) and device.container)
            assert [d.container for d in seen.all if d.netns == inode and d.name == "eth0"] == [name]


@pytest.mark.slow
def test_a_namespace_keeps_its_name_until_it_vanishes(machine: Machine) -> None:
    """Packets may still be under way to its devices, and belong to its container."""
    asyncio.run(_unmounted(machine))


class Witness:
    """Reports whether a veth's other end exists, independently of the follower and its open files."""

    def __init__(self, machine: Machine, host: str, device: str) -> None:
        self._command = ["ip", "-n", machine.name(host), "link", "show", device]

    def alive(self) -> bool:
        return subprocess.run(self._command, check=False, capture_output=True).returncode == 0


async def _nothing_pinned(machine: Machine) -> None:
    machine.add("host", "c")
    machine.veth("host", "v0", "c", "eth0")
    async with following(machine, host_netns=machine.name("host"), rescan_interval_s=3600) as seen:
        process = machine.process()
        machine.ip("host", f"link add v1 type veth peer name eth0 netns {process.pid}")
        await seen.until(lambda: seen.get("host", "v1") and seen.get("c", "eth0"))
        # The follower queries routes inside a namespace: change them until the end.
        machine.ip("c", "addr add 192.0.2.1/24 dev eth0")
        machine.ip("host", "link set v0 up")
        machine.ip("c", "link set eth0 up")
        for _ in range(10):
            machine.ip("c", "route add default via 192.0.2.2")
            machine.ip("c", "route del default")
        # The kernel removes a veth with its namespace: so long as one end lives, the other namespace is pinned.
        machine.delete("c")
        process.kill()
        process.wait()
        for device in ("v0", "v1"):
            witness, started_s = Witness(machine, "host", device), time.monotonic()
            while witness.alive():
                assert time.monotonic() - started_s < 20, f"{device} is still there"
                await asyncio.sleep(0.01)
        await seen.until(lambda: not seen.get("host", "v0") and not seen.get("host", "v1"))


@pytest.mark.slow
def test_no_namespace_lives_longer_because_it_is_followed(machine: Machine) -> None:
    asyncio.run(_nothing_pinned(machine))


async def _churn(machine: Machine, count: int) -> None:
    machine.add("host")
    async with following(machine, host_netns=machine.name("host")) as seen:
        await asyncio.sleep(0.1)
        files = open_files()
        for number in range(count):
            machine.add(f"c{number}")
            machine.veth("host", f"v{number}", f"c{number}", "eth0")
            if number >= 5:
                machine.delete(f"c{number - 5}")
            seen.poll()
            await asyncio.sleep(0)
        alive = range(count - 5, count)

        def settled() -> bool:
            own = {d.name for d in seen.all if d.netns == machine.inode("host")}
            return own >= {f"v{n}" for n in alive} and len(own & {f"v{n}" for n in range(count)}) == 5

        await seen.until(settled, 10)
        for number in alive:
            inner, outer = seen.get(f"c{number}", "eth0"), seen.get("host", f"v{number}")
            assert inner
            assert outer
            assert (inner.peer_netns, inner.peer_ifindex) == outer.key
            assert inner.container == machine.name(f"c{number}")
            machine.delete(f"c{number}")
        await seen.until(lambda: not seen._own() - {machine.inode("host")}, 10)
        assert open_files() <= files


@pytest.mark.slow
def test_a_hundred_namespaces_come_and_go(machine: Machine) -> None:
    asyncio.run(_churn(machine, 100))


async def _lost_events(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("host")
    read = LinkEvents.read

    def forgetful(self: LinkEvents) -> object:
        events, lost = read(self)
        return [], lost or bool(events)  # the kernel returns ENOBUFS; the events are lost

    monkeypatch.setattr(LinkEvents, "read", forgetful)
    async with following(machine, host_netns=machine.name("host")) as seen:
        machine.add("c")
        machine.veth("host", "v0", "c", "eth0")
        await seen.until(lambda: (d := seen.get("c", "eth0")) and d.peer_ifindex and d.container == machine.name("c"))
        machine.ip("c", "link set eth0 name eth1")
        await seen.until(lambda: seen.get("c", "eth1"))
        machine.delete("c")
        await seen.until(lambda: not seen.get("host", "v0"))


def test_lost_events_are_made_up_for(with_netlink: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_lost_events(with_netlink, monkeypatch))


async def _overflow(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> int:
    lost = 0
    read = LinkEvents.read

    def small(self: LinkEvents) -> object:
        nonlocal lost
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        time.sleep(0.2)
        events, gone = read(self)
        lost += gone
        return events, gone

    machine.add("host", "c")
    monkeypatch.setattr(LinkEvents, "read", small)
    async with following(machine, host_netns=machine.name("host")) as seen:
        for number in range(30):
            machine.veth("host", f"v{number}", "c", f"p{number}")
        await seen.until(lambda: all(seen.get("c", f"p{n}") for n in range(30)), 20)
    return lost


@pytest.mark.slow
def test_a_buffer_that_really_overflows(with_netlink: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(_overflow(with_netlink, monkeypatch)) > 0


async def _inode_again(machine: Machine) -> None:
    """nsfs reuses inodes. A reused inode is recognised because the kernel has withdrawn the old namespace's number."""
    machine.add("host")
    async with following(machine, host_netns=machine.name("host")) as seen:
        inodes: set[int] = set()
        cookies: set[int] = set()
        for number in range(30):
            machine.add("c")
            machine.ip("c", f"link add gen{number} type bridge")
            repeated = machine.inode("c") in inodes
            inodes.add(machine.inode("c"))
            await seen.until(lambda number=number: seen.get("c", f"gen{number}"))
            own = [d.name for d in seen.all if d.netns == machine.inode("c") and d.kind == "bridge"]
            assert own == [f"gen{number}"]
            # On kernels that have cookies, the cookie is the new namespace's.
            told = {d.netns_cookie for d in seen.all if d.netns == machine.inode("c")}
            assert len(told) == 1
            assert told == {0} or not told & cookies
            cookies |= told
            machine.delete("c")
            if repeated and number > 5:
                return


def test_an_inode_that_is_used_again(machine: Machine) -> None:
    asyncio.run(_inode_again(machine))


async def _open_close() -> None:
    files = open_files()
    own = inode_of("/proc/thread-self/ns/net")
    for _ in range(20):
        async with following(Machine()) as seen:
            assert seen.all
            assert seen.follower.host_netns
    assert open_files() <= files + 3  # descriptors of asyncio, made once
    # This thread and the pool's threads are in their original namespace.
    assert inode_of("/proc/thread-self/ns/net") == own
    assert await asyncio.to_thread(inode_of, "/proc/thread-self/ns/net") == own


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    asyncio.run(_open_close())
    assert not own_threads()


async def _cancelled() -> None:
    follower = DeviceFollower(docker_sockets=())
    opening = asyncio.ensure_future(follower.open())
    await asyncio.sleep(0)
    opening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await opening
    await follower.aclose()
    assert not own_threads()


def test_a_cancelled_open() -> None:
    asyncio.run(_cancelled())


async def _failure(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    async with following(machine) as seen:

        def broken(_: object) -> object:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(under_test._Watch, "_scan", broken)
        with pytest.raises(SourceError, match="Input/output error"):
            await seen.until(lambda: False)


@pytest.mark.slow
def test_an_end_of_following_is_said(with_netlink: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_failure(with_netlink, monkeypatch))


async def _many(machine: Machine) -> None:
    machine.add("host", "c")
    batch = "".join(f"link add v{n} type veth peer name p{n} netns {machine.name('c')}\n" for n in range(1000))
    async with following(machine, host_netns=machine.name("host")) as seen:
        few_ns = poll_ns(seen)
        await asyncio.to_thread(
            subprocess.run, ["ip", "-n", machine.name("host"), "-batch", "-"], input=batch, text=True, check=True
        )
        await seen.until(lambda: seen.get("c", "p999"), 20)
        await asyncio.sleep(0.2)
        seen.poll()
        assert poll_ns(seen) < 10 * few_ns
        # A hundredth of a core is usual. If other processes make and remove namespaces all the time, each of which is a
        # change to follow, snapshots may take a sixth; the rest of the bound is for queries and the test itself.
        shares = []
        for _ in range(10):
            cpu_s, began_s = time.process_time(), time.monotonic()
            await asyncio.sleep(1)
            shares.append((time.process_time() - cpu_s) / (time.monotonic() - began_s))
            if shares[-1] < 0.3:
                return
        pytest.fail(f"CPU time of each second: {shares}")


def poll_ns(seen: Watcher) -> int:
    """Return the smallest of several costs of a poll without changes, ns."""
    costs_ns = []
    for _ in range(500):
        started_ns = time.perf_counter_ns()
        seen.follower.poll()
        costs_ns.append(time.perf_counter_ns() - started_ns)
    return min(costs_ns)


@pytest.mark.slow
def test_a_thousand_veths_cost_little(machine: Machine) -> None:
    asyncio.run(_many(machine))


@pytest.mark.parametrize(
    "runtime",
    [
        Runtime.NETNS,
        pytest.param(Runtime.DOCKER, marks=[pytest.mark.needs("docker"), pytest.mark.slow]),
        pytest.param(Runtime.PODMAN, marks=[pytest.mark.needs("podman"), pytest.mark.slow]),
    ],
)
def test_the_lab_s_containers_have_their_names(runtime: Runtime) -> None:
    with running(Spec(name=f"t{uuid.uuid4().hex[:8]}", containers=2, runtime=runtime)) as lab:
        sockets = [str(lab.docker_socket)] if lab.docker_socket else []
        found = snapshot(host_netns=lab.netns_inode("host"), docker_sockets=sockets).devices
        inner = {d.netns: d.container for d in found if d.role is Role.INNER}
        assert inner == {lab.netns_inode("c1"): "c1", lab.netns_inode("c2"): "c2"}
        (outer,) = (d for d in found if d.role is Role.OUTER)
        assert outer.netns == lab.netns_inode("host")
        assert outer.peer_netns == lab.netns_inode("remote")
        assert {d.netns for d in found if d.role is Role.REMOTE} == {lab.netns_inode("remote")}


async def _docker_restart(lab: Lab) -> None:
    follower = DeviceFollower(host_netns=lab.netns_inode("host"), docker_sockets=[str(lab.docker_socket)])
    devices: tuple[Device, ...] = ()

    async def until(condition: Callable[[set[tuple[int, str]]], bool]) -> None:
        nonlocal devices
        end_s = time.monotonic() + 10
        while not condition({(d.netns, d.container) for d in devices if d.role is Role.INNER}):
            assert time.monotonic() < end_s, [d for d in devices if d.role is Role.INNER]
            await asyncio.sleep(0.01)
            devices = follower.poll() or devices

    try:
        await follower.open()
        old = lab.netns_inode("c1")
        await until(lambda inner: inner == {(old, "c1")})
        await asyncio.to_thread(lab.remove_container, "c1")
        await until(lambda inner: not inner)
        await asyncio.to_thread(lab.add_container, "c1")
        await until(lambda inner: inner == {(lab.netns_inode("c1"), "c1")})
    finally:
        await follower.aclose()


@pytest.mark.slow
@pytest.mark.needs("docker")
def test_a_docker_container_that_takes_a_dead_one_s_name() -> None:
    with running(Spec(name=f"t{uuid.uuid4().hex[:8]}", containers=1, runtime=Runtime.DOCKER)) as lab:
        asyncio.run(_docker_restart(lab))
