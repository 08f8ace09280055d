"""A session of one namespace gets the records of that namespace and no others, whatever other sessions exist.

The expected records are known from the test's own sockets: every datagram carries a number, every flow has a
destination port of its own, and the numbers received show where each buffer was last. All flows carry the same numbers,
so that packets of different namespaces have equal content and, over IPv6, equal keys. All are sent in turn from one
CPU, so that the buffers of one namespace reuse memory that another namespace has just freed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collector.live.filter import SessionFilter
from collector.live.places import NETNS_MASK, Places
from collector.machine.netns import cookie_here
from contracts import abi
from contracts.hooks import Hook
from mace.lab import Lab
from tests.kernel.guest import programs
from tests.kernel.guest.conftest import lab_ifindex, load, unload
from tests.kernel.guest.reader import Session, call, netns_fd, opened_in, within
from tests.kernel.guest.test_sessions import in_child, loopback_traffic, namespace
from tests.measuring import on_one_cpu

pytestmark = pytest.mark.usefixtures("module")

PACKETS = 25
QUEUE, XMIT, RECEIVE = Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT, Hook.NETIF_RECEIVE_SKB
COPY, CONSUME, DROP = Hook.SKB_COPY_DATAGRAM_IOVEC, Hook.CONSUME_SKB, Hook.KFREE_SKB
SENT = {QUEUE: PACKETS, XMIT: PACKETS}
ARRIVED = {RECEIVE: PACKETS}
DELIVERED = ARRIVED | {CONSUME: PACKETS}
DROPPED = ARRIVED | {DROP: PACKETS}
COUNTED = (QUEUE, XMIT, RECEIVE, CONSUME, DROP)
NESTED, NESTED_ADDRESS = "mace-nested", "198.51.100.222"
"""A namespace inside of c1: a macvlan device on c1's own."""
OVERLAY, OVERLAY_ADDRESS = "vx-c1", "192.0.2.1"
"""c1's VXLAN device, whose outer packets are the host's."""
VXLAN_PORT = 4789
DEVICES_ONLY = (Hook.NETIF_RX, Hook.NETIF_RECEIVE_SKB, Hook.NAPI_GRO_RECEIVE_ENTRY)


@dataclass(frozen=True, eq=False)
class Flow:
    """Numbered datagrams from one member to another, and what of them happens in c1."""

    port: int
    sender: str
    to: str
    in_c1: dict[Hook, int]
    arrives: bool = True
    dropped: str = ""
    """Where, if it does not arrive."""

    @property
    def last(self) -> str:
        """The member at whose device the buffer was last."""
        return self.dropped or self.to


FLOWS = (
    Flow(7001, "c1", "remote", SENT),
    Flow(7002, "c2", "remote", {}),
    Flow(7003, "host", "remote", {}),
    Flow(7004, "remote", "c1", DELIVERED),
    Flow(7005, "remote", "c2", {}),
    Flow(7006, "c1", "c2", SENT),
    Flow(7007, "c2", "c1", DELIVERED),
    Flow(7008, "host", "c1", DELIVERED),
    Flow(7011, "c1", "remote", SENT, False, "host"),  # forward
    Flow(7012, "c1", "remote", SENT, False, "host"),  # postrouting
    Flow(7013, "host", "remote", {}, False, "host"),  # output
    Flow(7014, "c2", "remote", {}, False, "host"),  # forward
    Flow(7015, "remote", "c1", DROPPED, False, "c1"),  # input
    Flow(7016, "remote", "c2", {}, False, "c2"),  # input
    Flow(7017, "c1", "remote", SENT, False, "remote"),  # input
)
NESTED_FLOWS = (
    Flow(7021, "remote", "nested", ARRIVED),
    Flow(7022, "remote", "nested", ARRIVED, False, "nested"),  # input
)
UNSEEN = 7013
"""Dropped before any device has seen it."""
RULES = {
    "host": "forward { type filter hook forward priority 0; udp dport { 7011, 7014 } drop; };"
    " chain post { type filter hook postrouting priority 0; udp dport 7012 drop; };"
    " chain out { type filter hook output priority 0; udp dport { 7013, 4789 } drop; };",
    "c1": "in { type filter hook input priority 0; udp dport 7015 drop; };",
    "c2": "in { type filter hook input priority 0; udp dport 7016 drop; };",
    "remote": "in { type filter hook input priority 0; udp dport 7017 drop; };",
    "nested": "in { type filter hook input priority 0; udp dport 7022 drop; };",
}


def equal(number: int) -> bytes:
    """The payload of every flow's packet of this number."""
    return b"number %04d of equals" % number


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)


class Network:
    """The lab, the namespace inside of c1, the firewalls, and c1's overlay."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.names = {member: lab.netns_path(member).name for member in lab.members} | {"nested": NESTED}
        self.reads_are_seen = True
        """Whether the end of a small datagram that was read is at a hook; in Linux 7 it is at none."""

    def address(self, member: str, family: int) -> str:
        return NESTED_ADDRESS if member == "nested" else self.lab.address(member, 4 if family == socket.AF_INET else 6)

    def datagram(self, member: str, family: int = socket.AF_INET) -> socket.socket:
        return within(self.names[member], lambda: socket.socket(family, socket.SOCK_DGRAM))

    def tap(self, member: str) -> socket.socket:
        """A packet socket on all devices of a namespace: a second buffer for every packet."""
        made = within(self.names[member], lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)))
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        return made

    def set_up(self) -> None:
        c1, host = self.names["c1"], self.names["host"]
        run("ip", "netns", "add", NESTED)
        # With the index of c1's own device, as CNI makes it, in its namespace. Here it is moved there, and gives way to
        # another one of its index: to the next one that is free.
        run("ip", "-n", c1, "link", "add", "nest0", "link", "eth0", "type", "macvlan", "mode", "bridge")
        index = within(c1, lambda: socket.if_nametoindex("nest0"))
        run("ip", "-n", NESTED, "link", "add", "busy", "index", str(index), "type", "bridge")
        run("ip", "-n", c1, "link", "set", "nest0", "netns", NESTED, "name", "eth0")
        assert within(NESTED, lambda: socket.if_nametoindex("eth0")) == lab_ifindex(self.lab, "c1")
        run("ip", "-n", NESTED, "addr", "add", f"{NESTED_ADDRESS}/24", "dev", "eth0")
        run("ip", "-n", NESTED, "link", "set", "eth0", "up")
        run("ip", "-n", NESTED, "route", "add", "default", "via", self.lab.address("host", 4), "onlink", "dev", "eth0")
        of_remote = self.lab.address("remote", 4)
        run(
            "ip", "-n", host, "link", "add", OVERLAY, "type", "vxlan", "id", "7", "dstport", str(VXLAN_PORT),
            "remote", of_remote, "dev", self.lab.outer_device,
        )  # fmt: skip
        run("ip", "-n", host, "link", "set", OVERLAY, "netns", c1)
        run("ip", "-n", c1, "addr", "add", f"{OVERLAY_ADDRESS}/24", "dev", OVERLAY)
        run("ip", "-n", c1, "link", "set", OVERLAY, "up")
        run("ip", "-n", c1, "neigh", "add", "192.0.2.2", "lladdr", "02:00:00:00:00:02", "dev", OVERLAY)
        for member, rules in RULES.items():
            run("ip", "netns", "exec", self.names[member], "nft", f"add table inet iso {{ chain {rules} }}")
        # The lab hides its containers behind the host's address; here the remote also speaks first.
        for family, prefix in ((4, "198.51.100.0/24"), (6, "2001:db8:1::/48")):
            run("ip", "-n", self.names["remote"], "route", "add", prefix, "via", self.lab.address("host", family))
        # Its neighbours are known, so that nothing waits.
        with self.datagram("remote") as here, self.datagram("nested") as there:
            there.bind(("0.0.0.0", 0))
            there.settimeout(5)
            here.sendto(b"hello", (NESTED_ADDRESS, there.getsockname()[1]))
            assert there.recv(100) == b"hello"

    def tear_down(self) -> None:
        for member in RULES:
            subprocess.run(
                ["ip", "netns", "exec", self.names[member], "nft", "delete table inet iso"], check=False
            )  # fmt: skip
        for prefix in ("198.51.100.0/24", "2001:db8:1::/48"):
            subprocess.run(["ip", "-n", self.names["remote"], "route", "del", prefix], check=False)
        subprocess.run(["ip", "-n", self.names["c1"], "link", "del", OVERLAY], check=False)
        subprocess.run(["ip", "netns", "del", NESTED], check=False)


@pytest.fixture(scope="module")
def network(lab: Lab) -> Iterator[Network]:
    made = Network(lab)
    try:
        made.set_up()
        load()
        made.reads_are_seen = reads_are_seen(made)
        unload()
        yield made
    finally:
        made.tear_down()


def sent(network: Network, flows: Sequence[Flow], family: int) -> None:
    """Send them in turn and read what arrives: all of each flow that is to arrive, nothing of another."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_one_cpu())
        senders, receivers = {}, {}
        for flow in flows:
            receivers[flow] = stack.enter_context(network.datagram(flow.to, family))
            receivers[flow].bind(("::" if family == socket.AF_INET6 else "0.0.0.0", flow.port))
            receivers[flow].settimeout(10)
            senders[flow] = stack.enter_context(network.datagram(flow.sender, family))
        for number in range(PACKETS):
            for flow in flows:
                # A local rule that drops is an error of the call.
                with contextlib.suppress(PermissionError):
                    senders[flow].sendto(
                        b"number %04d of equals" % number, (network.address(flow.to, family), flow.port)
                    )
            for flow in flows:
                if flow.arrives:
                    assert receivers[flow].recv(100) == equal(number)
        for flow in flows:
            receivers[flow].setblocking(False)
            with pytest.raises(BlockingIOError):
                receivers[flow].recv(100)


def reads_are_seen(network: Network) -> bool:
    flow = Flow(7061, "c2", "remote", {})
    with Session() as session:
        session.setup(subbufs=64, hooks=[CONSUME]).start()
        sent(network, [flow], socket.AF_INET6)
        session.stop()
        seen = counted(session.read(), flow).get(CONSUME, 0)
    assert seen in (0, PACKETS)
    assert seen or int(os.uname().release.partition(".")[0]) >= 7
    return seen > 0


def of_c1(network: Network, flows: Sequence[Flow], hooks: Sequence[Hook] = COUNTED) -> dict[int, dict[Hook, int]]:
    """By port, what of each flow happens in c1 at these hooks."""
    shown = [hook for hook in hooks if hook is not CONSUME or network.reads_are_seen]
    return {flow.port: {hook: count for hook, count in flow.in_c1.items() if hook in shown} for flow in flows}


def counted(records: npt.NDArray[Any], flow: Flow) -> dict[Hook, int]:
    """How often a flow was at each hook."""
    of_flow = records["hook"][(records["l4_proto"] == socket.IPPROTO_UDP) & (records["l4_dst"] == flow.port)]
    return {hook: int((of_flow == hook).sum()) for hook in COUNTED if (of_flow == hook).any()}


def assert_same(found: dict[str, dict[int, dict[Hook, int]]], wanted: dict[int, dict[Hook, int]]) -> None:
    """What each session has counted, by port, is what happened."""
    wrong = {
        (name, port): (flows[port], wanted[port])
        for name, flows in found.items()
        for port in wanted
        if flows[port] != wanted[port]
    }
    assert not wrong, wrong


@contextlib.contextmanager
def sessions_of_c1(network: Network, **setup: Any) -> Iterator[dict[str, Session]]:
    """c1's own session, and four of the host that want the same."""
    name = network.names["c1"]
    fd = netns_fd(name)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        own = stack.enter_context(opened_in(name)).setup(subbufs=64, **setup)
        assert not own.hello()["flags"] & abi.HelloFlag.ALL
        namespace = stack.enter_context(Session()).setup(subbufs=64, netns_fds=[fd], **setup)
        place = (fd, lab_ifindex(network.lab, "c1"))
        device = stack.enter_context(Session()).setup(subbufs=64, devices=[place], **setup)
        inode = network.lab.netns_inode("c1")
        listed = stack.enter_context(Session()).setup(subbufs=64, **setup).places([inode])
        at = (inode, lab_ifindex(network.lab, "c1"))
        device_listed = stack.enter_context(Session()).setup(subbufs=64, **setup).places(devices=[at])
        found = {
            "c1's own": own,
            "of its namespace": namespace,
            "of its device": device,
            "of its namespace, listed": listed,
            "of its device, listed": device_listed,
        }
        for session in found.values():
            session.start()
        yield found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a session that sees all"])
def test_what_happens_in_a_namespace_and_nothing_else(network: Network, family: int, beside: bool) -> None:
    flows = FLOWS + (NESTED_FLOWS if family == socket.AF_INET else ())
    with contextlib.ExitStack() as stack:
        if beside:
            stack.enter_context(Session()).setup(subbufs=256).start()
        sessions = stack.enter_context(sessions_of_c1(network))
        sent(network, flows, family)
        for session in sessions.values():
            session.stop()
        found = {
            name: {flow.port: counted(records, flow) for flow in flows}
            for name, session in sessions.items()
            for records in [session.read()]
        }
    assert_same(found, of_c1(network, flows))


@pytest.mark.parametrize("hooks", [(QUEUE, DROP), (COPY, CONSUME, DROP), (*DEVICES_ONLY, COPY, CONSUME)], ids=str)
def test_the_same_with_few_hooks(network: Network, hooks: tuple[Hook, ...]) -> None:
    """A buffer's way is followed at the hooks that nobody has asked for, too."""
    with sessions_of_c1(network, hooks=hooks) as sessions:
        sent(network, FLOWS, socket.AF_INET6)
        for session in sessions.values():
            session.stop()
        found = {
            name: {flow.port: counted(records, flow) for flow in FLOWS}
            for name, session in sessions.items()
            for records in [session.read()]
        }
    assert_same(found, of_c1(network, FLOWS, hooks))


def test_copies_that_others_keep_are_theirs(network: Network) -> None:
    """Packet sockets of the host, of another container and inside of c1 read second buffers with the same content."""
    with contextlib.ExitStack() as stack:
        taps = {member: stack.enter_context(network.tap(member)) for member in ("host", "c2", "remote", "nested")}
        sessions = stack.enter_context(sessions_of_c1(network))
        sent(network, FLOWS, socket.AF_INET6)
        for tap in taps.values():
            seen = 0
            with contextlib.suppress(BlockingIOError):
                while tap.recv(2000):
                    seen += 1
            assert seen > PACKETS or tap is taps["nested"]
        for session in sessions.values():
            session.stop()
        found = {
            name: {flow.port: counted(records, flow) for flow in FLOWS}
            for name, session in sessions.items()
            for records in [session.read()]
        }
    assert_same(found, of_c1(network, FLOWS))


def test_a_record_without_a_device_says_where_its_buffer_was_last(network: Network) -> None:
    """And that it says so; of a packet that no device has seen it says nothing."""
    with Session() as session:
        session.setup(subbufs=256).start()
        sent(network, FLOWS, socket.AF_INET6)
        session.stop()
        records = session.read()
    ended = records[np.isin(records["hook"], (CONSUME, DROP)) & (records["l4_proto"] == socket.IPPROTO_UDP)]
    for flow in FLOWS:
        mine = ended[ended["l4_dst"] == flow.port]
        assert len(mine) == (PACKETS if network.reads_are_seen or not flow.arrives else 0), flow
        if not len(mine):
            continue
        place = int(within(network.names[flow.last], lambda: Path("/proc/thread-self/ns/net").stat().st_ino))
        if flow.port == UNSEEN:
            place = 0
        assert set(mine["netns"].tolist()) == {place}, flow
        assert ((mine["flags"] & abi.Flag.RECALLED > 0) == (place > 0)).all(), flow
        assert ((mine["ifindex"] > 0) == (place > 0)).all(), flow


def test_an_overlays_outer_packets_are_the_hosts(network: Network) -> None:
    """c1's VXLAN device hands buffers to the host, whose output chain drops them before any device of the host's."""
    with sessions_of_c1(network) as sessions, network.datagram("c1") as sender:
        for number in range(PACKETS):
            with contextlib.suppress(OSError):
                sender.sendto(equal(number), ("192.0.2.2", 7031))
        for session in sessions.values():
            session.stop()
        found = {name: session.read() for name, session in sessions.items()}
    index = int(within(network.names["c1"], lambda: socket.if_nametoindex(OVERLAY)))
    for name in ("c1's own", "of its namespace", "of its namespace, listed"):
        records = found[name]
        assert (
            (records["hook"] == QUEUE) & (records["ifindex"] == index) & (records["l4_dst"] == 7031)
        ).sum() == PACKETS
        assert not (records["hook"] == DROP).any(), name
    assert not (found["of its device"]["l4_dst"] == 7031).any()


def test_connections_of_others_are_not_seen(network: Network) -> None:
    """TCP frees its buffers where no tracepoint is; those of c2 and c1 carry the same bytes, at the same time."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_one_cpu())
        sessions = stack.enter_context(sessions_of_c1(network))
        ends: dict[int, tuple[socket.socket, socket.socket]] = {}
        for port, member in ((7041, "c1"), (7042, "c2"), (7043, "host")):
            listener = stack.enter_context(
                within(network.names["remote"], lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
            )
            listener.bind(("::", port))
            listener.listen(1)
            client = stack.enter_context(
                within(network.names[member], lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
            )
            client.connect((network.lab.address("remote", 6), port))
            ends[port] = client, stack.enter_context(listener.accept()[0])
        for number in range(2 * PACKETS):
            for client, server in ends.values():
                client.sendall(b"number %04d" % number * 100)
                assert server.recv(1100, socket.MSG_WAITALL) == b"number %04d" % number * 100
                server.sendall(b"read %04d" % number)
                assert client.recv(9, socket.MSG_WAITALL) == b"read %04d" % number
        for session in sessions.values():
            session.stop()
        for session in sessions.values():
            records = session.read()
            ports = {
                port: int(((records["l4_dst"] == port) | (records["l4_src"] == port)).sum()) for port in ends
            }  # fmt: skip
            assert ports[7041] >= 4 * PACKETS
            assert ports[7042] == ports[7043] == 0, ports


def test_places_change_while_the_session_runs(network: Network) -> None:
    """A place that stays misses no packet, one that comes or goes is recorded from then on or no more."""
    flow, other = (flow for flow in FLOWS if flow.port in (7001, 7002))
    c1, c2 = (network.lab.netns_inode(name) for name in ("c1", "c2"))
    done = threading.Event()

    def change(session: Session) -> None:
        while not done.is_set():
            for count in range(abi.MAX_NETNS):
                session.places([*range(1, count + 1), c1], [(number, 1) for number in range(1, count + 1)])

    with Session() as session:
        session.setup(subbufs=256, hooks=[QUEUE, XMIT]).places().start()
        sent(network, [flow, other], socket.AF_INET)
        assert not len(session.read())
        session.places([c1])
        thread = threading.Thread(target=change, args=(session,))
        thread.start()
        try:
            for _ in range(8):
                sent(network, [flow, other], socket.AF_INET)
        finally:
            done.set()
            thread.join()
        records = session.read()
        assert counted(records, flow) == {QUEUE: 8 * PACKETS, XMIT: 8 * PACKETS}
        assert counted(records, other) == {}
        session.places([c2])
        sent(network, [flow, other], socket.AF_INET)
        records = session.read()
        assert (counted(records, flow), counted(records, other)) == ({}, SENT)
        session.stop()


def test_places_that_cannot_be(network: Network) -> None:
    with Session() as session:
        with pytest.raises(OSError, match="Invalid argument"):  # before SETUP
            session.places([1])
        session.setup()
        for wrong in ({"netns": [0]}, {"devices": [(0, 1)]}, {"devices": [(1, 0)]}):
            with pytest.raises(OSError, match="Invalid argument"):
                session.places(**wrong)  # type: ignore[arg-type]
        for count in ("netns_count", "device_count"):
            asked = np.ones((), abi.PLACES)
            asked[count] = abi.MAX_NETNS + 1
            with pytest.raises(OSError, match="Invalid argument"):
                call(session.fd, abi.Ioctl.PLACES, asked)


def test_a_session_of_a_namespace_lists_no_other(network: Network) -> None:
    c2 = network.lab.netns_inode("c2")
    with opened_in(network.names["c1"]).setup(subbufs=64).places([c2]) as session:
        session.start()
        sent(network, FLOWS, socket.AF_INET)
        session.stop()
        assert not len(session.read())


def test_a_session_that_begins_does_not_know_what_was_before(network: Network) -> None:
    """A queued datagram that was followed by an earlier session is nobody's for a later one."""
    flow = Flow(7051, "remote", "c1", {})
    with network.datagram("c1", socket.AF_INET6) as receiver, network.datagram("remote", socket.AF_INET6) as sender:
        receiver.bind(("::", flow.port))
        receiver.settimeout(10)
        with opened_in(network.names["c1"]).setup(subbufs=8) as first:
            first.start()
            for number in range(PACKETS):
                sender.sendto(b"number %04d" % number, (network.address("c1", socket.AF_INET6), flow.port))
            first.stop()
            assert counted(first.read(), flow)[RECEIVE] == PACKETS
        with opened_in(network.names["c1"]).setup(subbufs=8) as second:
            second.start()
            for number in range(PACKETS):
                assert receiver.recv(100) == b"number %04d" % number
            second.stop()
            assert counted(second.read(), flow) == {}


# --- BPF ----------------------------------------------------------------------------------------------

AT_DEVICES = (QUEUE, XMIT, RECEIVE)


class Filtered:
    """The BPF programs, limited to c1 and to a namespace that is dead by then."""

    def __init__(self, network: Network) -> None:
        with namespace("mace-dies") as name:
            self.dead_inode = Path(f"/run/netns/{name}").stat().st_ino
            self.session = programs.loaded(
                SessionFilter(netns=(f"/run/netns/{network.names['c1']}", f"/run/netns/{name}"))
            )
            self.cookies = cookie_here() > 0
            places = [self.number_of(of) for of in (network.names["c1"], name)]
            self.session.record_at(Places(netns=tuple(places)))
            self.c1 = places[0] & NETNS_MASK

    def number_of(self, name: str) -> int:
        """Return the number by which records identify a namespace of /run/netns."""
        if self.cookies:
            return int(within(name, cookie_here))
        return Path(f"/run/netns/{name}").stat().st_ino


@pytest.fixture(scope="module")
def filtered(network: Network) -> Iterator[Filtered]:
    made = Filtered(network)
    yield made
    made.session.unload()


@programs.LOADING
def test_bpf_programs_of_a_namespace_write_no_other_packet(network: Network, filtered: Filtered) -> None:
    """At devices they see what the module sees; where packets end, only packets of c1's own sockets."""
    for family in (socket.AF_INET, socket.AF_INET6):
        flows = FLOWS + (NESTED_FLOWS if family == socket.AF_INET else ())
        with programs.recording(filtered.session) as made:
            sent(network, flows, family)
            records = made.read()
            assert made.lost == 0
        found = {flow.port: counted(records, flow) for flow in flows}
        at_devices = {port: {hook: n for hook, n in of.items() if hook in AT_DEVICES} for port, of in found.items()}
        assert_same({"bpf": at_devices}, of_c1(network, flows, AT_DEVICES))
        for flow in flows:
            if "c1" not in (flow.sender, flow.to):
                assert not found[flow.port].keys() - set(AT_DEVICES), flow
        assert set(records["netns"].tolist()) == {filtered.c1}


@programs.LOADING
def test_bpf_programs_of_a_dead_namespace_see_no_other_of_its_inode(network: Network, filtered: Filtered) -> None:
    if not filtered.cookies:
        pytest.skip("before Linux 5.14 a namespace has no cookie that MACE can read")
    with programs.recording(filtered.session) as made:
        for number in range(400):
            with namespace(f"mace-new{number}") as name:
                if Path(f"/run/netns/{name}").stat().st_ino != filtered.dead_inode:
                    continue
                fd = netns_fd(name)
                in_child(loopback_traffic, netns=fd)
                os.close(fd)
                break
        else:
            pytest.fail("no new namespace got the inode of the dead one")
        assert set(made.read()["netns"].tolist()) <= {filtered.c1}
