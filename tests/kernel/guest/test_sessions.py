"""Sessions: filters, several readers at once, and the limits of an opener in a container."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collector.machine.netns import cookie_here
from contracts import abi
from contracts.hooks import Hook
from mace.lab import Lab
from tests.kernel.guest.conftest import lab_ifindex
from tests.kernel.guest.reader import DEVICE, Session, enter_netns, netns_fd, refused, within

pytestmark = pytest.mark.usefixtures("module")

DEVICE_HOOKS = (
    Hook.NET_DEV_QUEUE,
    Hook.NET_DEV_START_XMIT,
    Hook.NETIF_RX,
    Hook.NETIF_RECEIVE_SKB,
    Hook.NAPI_GRO_RECEIVE_ENTRY,
)
NOBODY = 65534


@contextlib.contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace with nothing but loopback."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def in_child(work: Callable[[], None], *, netns: int | None = None, before: Callable[[], None] = lambda: None) -> None:
    """Run `work` in a child, in another network namespace and after giving up what `before` gives up."""
    child = os.fork()
    if child == 0:
        try:
            if netns is not None:
                enter_netns(netns)
            before()
            work()
        except BaseException:  # noqa: BLE001 - printed; the status tells the parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def loopback_traffic(count: int = 20) -> None:
    """UDP to a socket of our own, in whatever namespace we are."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to,
    ):
        to.bind(("127.0.0.1", 0))
        for number in range(count):
            here.sendto(b"mace %03d" % number, to.getsockname())
            to.recv(100)


def some_traffic(lab: Lab) -> None:
    lab.ping("c1", count=30, flood=True)
    lab.ping("c2", count=30, flood=True, family=6)
    udp_echo(lab, "c1", count=60)
    tcp_stream(lab, "c2", size=100_000)


def udp_echo(lab: Lab, member: str, count: int) -> None:
    """Datagrams to the remote and back; from here, since a process of the lab's takes an emulator seconds to start."""
    with (
        within(lab.netns_path("remote").name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as remote,
        within(lab.netns_path(member).name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as here,
    ):
        remote.bind((lab.address("remote"), 0))
        for each in (remote, here):
            each.settimeout(10)
        for number in range(count):
            here.sendto(b"%064d" % number, remote.getsockname())
            data, sender = remote.recvfrom(100)
            remote.sendto(data, sender)
            assert here.recv(100) == data


def tcp_stream(lab: Lab, member: str, size: int, chunk: int = 10_000) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(within(lab.netns_path("remote").name, socket.socket))
        listener.bind((lab.address("remote"), 0))
        listener.listen(1)
        client = stack.enter_context(within(lab.netns_path(member).name, socket.socket))
        client.connect(listener.getsockname())
        server = stack.enter_context(listener.accept()[0])
        for _ in range(size // chunk):
            client.sendall(bytes(chunk))
            assert len(server.recv(chunk, socket.MSG_WAITALL)) == chunk


def recorded(session: Session, traffic: Callable[[], None]) -> npt.NDArray[Any]:
    session.start()
    traffic()
    session.stop()
    return session.read()


# --- filters --------------------------------------------------------------------------------------


def test_hello_says_who_it_is(module: None) -> None:
    with Session() as session:
        hello = session.hello()
    assert (hello["abi_major"], hello["abi_minor"]) == (abi.ABI_MAJOR, abi.ABI_MINOR)
    assert hello["record_bytes"] == abi.RECORD.itemsize
    cookies = tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 14)
    assert hello["flags"] == abi.HelloFlag.ALL | (abi.HelloFlag.COOKIES if cookies else 0)
    assert hello["netns"] == Path("/proc/self/ns/net").stat().st_ino
    assert hello["hooks"] == sum(1 << hook for hook in Hook if Hook.INVALID < hook < Hook.LOST)
    assert hello["load_id"] != 0


def cookie_of(name: str) -> int:
    """SO_NETNS_COOKIE of a namespace of /run/netns; 0 where the kernel has none."""
    found = []

    def work() -> None:
        enter_netns(netns_fd(name))
        found.append(cookie_here())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_records_name_namespaces_by_cookie_for_whoever_asks(lab: Lab) -> None:
    cookies = {lab.netns_inode(member): cookie_of(lab.netns_path(member).name) for member in lab.members}
    with Session() as by_cookie, Session() as by_inode:
        if not by_cookie.hello()["flags"] & abi.HelloFlag.COOKIES:
            assert set(cookies.values()) == {0}
            refused(errno.EOPNOTSUPP, by_cookie.setup, flags=abi.SetupFlag.COOKIES)
            return
        assert len(set(cookies.values())) == len(cookies)
        by_cookie.setup(flags=abi.SetupFlag.COOKIES, hooks=DEVICE_HOOKS).start()
        by_inode.setup(hooks=DEVICE_HOOKS).start()
        some_traffic(lab)
        by_inode.stop()
        by_cookie.stop()
        inodes, named = by_inode.read(), by_cookie.read()
    named = named[np.isin(named["ts_ns"], inodes["ts_ns"])]
    inodes = inodes[np.isin(inodes["ts_ns"], named["ts_ns"])]
    assert len(named) > 1000
    assert {cookies[inode] for inode in set(inodes["netns"].tolist()) & cookies.keys()} <= set(named["netns"].tolist())
    inodes, named = (np.sort(part, order=["ts_ns", "cpu", "hook"]) for part in (inodes, named))
    for of_inode, of_cookie in zip(inodes, named, strict=True):
        assert cookies.get(int(of_inode["netns"]), int(of_cookie["netns"])) == of_cookie["netns"]


def test_only_the_namespaces_asked_for(lab: Lab) -> None:
    fd = netns_fd(lab.netns_path("c1").name)
    with Session() as session:
        records = recorded(session.setup(netns_fds=[fd]), lambda: some_traffic(lab))
    os.close(fd)
    assert len(records) > 300
    assert set(records["netns"].tolist()) == {lab.netns_inode("c1")}


def test_only_the_devices_asked_for(lab: Lab) -> None:
    fd = netns_fd(lab.netns_path("c2").name)
    index = lab_ifindex(lab, "c2")
    with Session() as session:
        records = recorded(session.setup(devices=[(fd, index)]), lambda: some_traffic(lab))
    os.close(fd)
    assert len(records) > 100
    assert set(records[["netns", "ifindex"]].tolist()) == {(lab.netns_inode("c2"), index)}


def test_only_the_protocols_and_hooks_asked_for(lab: Lab) -> None:
    with Session() as session:
        session.setup(l4_protos=[socket.IPPROTO_UDP, socket.IPPROTO_ICMPV6], hooks=[Hook.NETIF_RECEIVE_SKB])
        records = recorded(session, lambda: some_traffic(lab))
    assert set(records["l4_proto"].tolist()) == {socket.IPPROTO_UDP, socket.IPPROTO_ICMPV6}
    assert set(records["hook"].tolist()) == {Hook.NETIF_RECEIVE_SKB}


def test_a_sample_is_of_the_same_packets_at_every_hook(lab: Lab) -> None:
    with Session() as whole, Session() as sample, Session() as other:
        whole.setup().start()
        sample.setup(sample_shift=2).start()
        other.setup(sample_shift=2, hooks=[Hook.NETIF_RECEIVE_SKB]).start()
        lab.udp("c1", count=800)
        lab.ping("c2", count=100, flood=True)
        for session in (whole, sample, other):
            session.stop()
        everything, sampled, received = whole.read(), sample.read(), other.read()
    keyed = everything[(everything["packet_key"] & 3 == 0) & (everything["packet_key"] != 0)]
    # Exactly those records, and the same ones in every session that samples so.
    assert np.array_equal(np.sort(keyed, order=["ts_ns", "cpu"]), np.sort(sampled, order=["ts_ns", "cpu"]))
    assert np.array_equal(
        np.sort(sampled[sampled["hook"] == Hook.NETIF_RECEIVE_SKB]["packet_key"]), np.sort(received["packet_key"])
    )
    udp = everything[(everything["l4_proto"] == socket.IPPROTO_UDP) & (everything["hook"] == Hook.NET_DEV_QUEUE)]
    keys = np.unique(udp["packet_key"])
    assert len(keys) >= 800
    assert 0.15 < (keys & np.uint64(3) == 0).mean() < 0.35  # a quarter; 0.1 are 6 standard deviations


def test_several_readers_at_once_see_the_same(lab: Lab) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session()).setup(hooks=DEVICE_HOOKS).start() for _ in range(4)]
        some_traffic(lab)
        # Not stopped at one moment: what ends the comparison is the last packet of the traffic.
        read = [session.read() for session in sessions]
        for session in sessions:
            session.stop()
    end = min(part["ts_ns"].max() for part in read)
    first, *others = [np.sort(part[part["ts_ns"] <= end], order=["ts_ns", "cpu", "hook"]) for part in read]
    begin = max(part["ts_ns"].min() for part in read)
    for other in others:
        assert np.array_equal(first[first["ts_ns"] >= begin], other[other["ts_ns"] >= begin])
    assert len(first) > 1000


# --- rights ---------------------------------------------------------------------------------------


def test_a_container_sees_its_own_packets_whatever_it_asks(lab: Lab) -> None:
    own, others = lab.netns_inode("c1"), netns_fd(lab.netns_path("c2").name)
    of_host, of_c1 = netns_fd(lab.netns_path("host").name), netns_fd(lab.netns_path("c1").name)
    first = os.open("/proc/1/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    own_inode, traffic = own, some_traffic

    def inside() -> None:
        with Session() as session:
            hello = session.hello()
            assert not hello["flags"] & abi.HelloFlag.ALL
            assert hello["netns"] == own_inode
            for fd in (others, of_host, first):
                refused(errno.EPERM, session.setup, netns_fds=[fd])
                refused(errno.EPERM, session.setup, netns_fds=[-1, fd])
                refused(errno.EPERM, session.setup, devices=[(fd, 1)])
            refused(errno.EPERM, session.cost)
            # Another namespace's device index, said to be of our own, is a device of our own.
            session.setup(netns_fds=[-1, of_c1], subbufs=512)
            records = recorded(session, lambda: traffic(lab))
            assert len(records) > 300
            assert set(records["netns"].tolist()) == {own_inode}
            refused(errno.EBUSY, session.setup, netns_fds=[others])
            assert session.stats()["written"].sum() == len(records)
        with Session() as session:
            # Nothing asked for is not everything.
            records = recorded(session.setup(subbufs=512), lambda: traffic(lab))
            assert set(records["netns"].tolist()) == {own_inode}
            assert {Hook.CONSUME_SKB, Hook.NET_DEV_QUEUE} <= set(records["hook"].tolist())

    # From the container's namespace, where traffic can be started from by the lab's own means.
    in_child(inside, netns=of_c1)
    for fd in (others, of_host, of_c1, first):
        os.close(fd)


def test_the_same_holds_for_root_with_all_capabilities_in_another_namespace(lab: Lab) -> None:
    """A privileged container is still in its own network namespace."""
    fd = netns_fd(lab.netns_path("c2").name)

    def inside() -> None:
        with Session() as session:
            assert not session.hello()["flags"] & abi.HelloFlag.ALL

    in_child(inside, netns=fd)
    os.close(fd)


def test_without_cap_net_raw_nobody_opens_it() -> None:
    def drop() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    Path(DEVICE).chmod(0o666)
    in_child(lambda: refused(errno.EPERM, Session), before=drop)


def test_only_root_finds_the_device_open_to_it() -> None:
    assert Path(DEVICE).stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_passed_on_keeps_its_rights(lab: Lab) -> None:
    """What a container opened shows its packets to whoever gets it, and what the host opened shows the host's."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = netns_fd(lab.netns_path("c1").name)
    first = os.open("/proc/1/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def inside() -> None:
        with Session() as session:
            socket.send_fds(theirs, [b"x"], [session.fd])

    in_child(inside, netns=fd)
    _, fds, _, _ = socket.recv_fds(mine, 1, 1)
    with Session(fds[0]) as session:
        # We are root on the host, and the namespace could not be asked for; but the file is the container's.
        assert not session.hello()["flags"] & abi.HelloFlag.ALL
        refused(errno.EPERM, session.setup, netns_fds=[-1, first])
        refused(errno.EPERM, session.cost)
        records = recorded(session.setup(subbufs=512), lambda: some_traffic(lab))
    assert set(records["netns"].tolist()) == {lab.netns_inode("c1")}
    for each in (mine, theirs):
        each.close()
    os.close(fd)
    os.close(first)


def test_a_namespace_that_dies_takes_its_session_with_it_and_its_inode_is_nobodys() -> None:
    """A new namespace may get the inode of one that died; a session of the dead one must not see it."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with namespace("mace-dies"):
        inode = Path("/run/netns/mace-dies").stat().st_ino
        fd = netns_fd("mace-dies")

        def inside() -> None:
            with Session() as session:
                session.setup(subbufs=64).start()
                loopback_traffic()
                socket.send_fds(theirs, [b"x"], [session.fd])

        in_child(inside, netns=fd)
        os.close(fd)
        _, fds, _, _ = socket.recv_fds(mine, 1, 1)
        # SETUP needs the descriptor during the call only; left open, it would keep the namespace alive.
        fd = netns_fd("mace-dies")
        named = Session().setup(netns_fds=[fd]).start()
        os.close(fd)
    with Session(fds[0]) as session:
        session.ring_bytes, session.subbuf_bytes = 64 << 16, 1 << 16
        assert len(session.read()) >= 40
        wait_for(lambda: session.hello()["flags"] & abi.HelloFlag.NETNS_GONE)
        reused = False
        for number in range(400):
            with namespace(f"mace-new{number}") as name:
                reused |= Path(f"/run/netns/{name}").stat().st_ino == inode
                if reused:
                    fd = netns_fd(name)
                    in_child(loopback_traffic, netns=fd)
                    os.close(fd)
            if reused:
                break
        assert reused, "no new namespace got the inode of the dead one"
        assert len(session.read()) == 0
        assert len(named.read()) == 0
    named.close()
    for each in (mine, theirs):
        each.close()


def wait_for(condition: Callable[[], Any], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
