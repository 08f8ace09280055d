"""The follower of devices by BPF over made-up walks, processes and tables of routes; no kernel is asked."""

import time
from collections import deque

import numpy as np
import pytest

from collector.bpf import devices, walk
from collector.bpf.devices import check, default_route_devices
from collector.bpf.layout import NETDEV, Walked
from collector.bpf.walk import NetDevice, Walk
from contracts.errors import SourceError, Unavailable
from contracts.topology import Role

HOST, C1, C2 = 4026531840, 4026532001, 4026532002
STAT = {HOST: 11, C1: 12, C2: 13}
ETHER, LOOPBACK = 1, 772


def netdev(netns, ifindex, name, kind=b"", **more):
    fields = {
        "netns_cookie": netns - HOST + 1, "netns": netns, "proc_stat": STAT[netns], "ifindex": ifindex,
        "type": ETHER, "initial": netns == HOST, "name": name, "kind": kind,
    }  # fmt: skip
    return np.array([tuple((fields | more).get(field, 0) for field in NETDEV.names)], NETDEV)


LO = netdev(HOST, 1, b"lo", type=LOOPBACK)
ETH0 = netdev(HOST, 2, b"eth0")
VETH = netdev(HOST, 3, b"veth1", b"veth", peer_netns=C1, peer_ifindex=2, master_ifindex=4)
BRIDGE = netdev(HOST, 4, b"br0", b"bridge", lower_netns=HOST, lower_ifindex=3)
INNER = netdev(C1, 2, b"eth0", b"veth", peer_netns=HOST, peer_ifindex=3)
MACVLAN = netdev(C2, 2, b"eth0", b"macvlan", lower_netns=HOST, lower_ifindex=2)
ALL = np.concatenate([LO, ETH0, VETH, BRIDGE, INNER, MACVLAN])


class MadeWalk:
    """A `Walk` that returns the next of some lists of devices, and the last one for ever."""

    def __init__(self, lists):
        self.lists = deque(lists)
        self.closed = False

    def devices(self):
        return self.lists.popleft() if len(self.lists) > 1 else self.lists[0]

    def close(self):
        self.closed = True


@pytest.fixture
def watching(monkeypatch):
    """Return a function that makes a watch over lists of devices, on a machine without processes of others."""
    made = []
    monkeypatch.setattr(devices, "in_initial_pid_namespace", lambda: False)
    monkeypatch.setattr(devices, "WALK_INTERVAL_S", 0.0)

    def make(*lists, **arguments):
        monkeypatch.setattr(devices, "Walk", lambda: MadeWalk(lists))
        given = {"host_netns": None, "outer": (), "remote_netns": (), "docker_sockets": (), "rescan_interval_s": 3600.0}
        made.append(devices._Watch(**(given | arguments)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def next_of(watch):
    """Return the next snapshot."""
    end_s = time.monotonic() + 30
    while (taken := watch.step()) is None:
        assert time.monotonic() < end_s
    return taken


def test_a_device_is_what_netlink_would_say(watching):
    watch = watching(ALL)
    found = {(d.netns, d.name): d for d in watch.open().devices}
    assert watch.host_netns == HOST, "without a view of process 1 the host's namespace is the initial one"
    lo, eth0, veth, bridge = (found[HOST, name] for name in ("lo", "eth0", "veth1", "br0"))
    inner, macvlan = found[C1, "eth0"], found[C2, "eth0"]
    assert (lo.kind, eth0.kind, veth.kind, bridge.kind) == ("loopback", "", "veth", "bridge")
    assert (veth.peer_netns, veth.peer_ifindex) == inner.key
    assert (inner.peer_netns, inner.peer_ifindex) == veth.key
    assert (macvlan.peer_netns, macvlan.peer_ifindex) == eth0.key
    assert (bridge.peer_netns, bridge.peer_ifindex) == (0, 0), "below a bridge are ports"
    assert veth.master_ifindex == bridge.ifindex
    assert (inner.role, macvlan.role, eth0.role, veth.role) == (Role.INNER, Role.INNER, Role.OUTER, Role.HOST)
    assert {d.netns_cookie for d in found.values()} == {1, C1 - HOST + 1, C2 - HOST + 1}


def test_what_has_no_name_is_a_number(watching):
    watch = watching(ALL)
    found = {d.netns: (d.netns_name, d.container) for d in watch.open().devices}
    assert found == {HOST: ("host", ""), C1: (f"net:[{C1}]", ""), C2: (f"net:[{C2}]", "")}


def test_a_change_makes_a_snapshot_and_no_change_none(watching):
    watch = watching(ALL, ALL, ALL[:-1])
    assert len(watch.open().devices) == 6
    assert len(next_of(watch).devices) == 5
    assert [watch.step() for _ in range(5)] == [None] * 5


def test_a_namespace_with_another_cookie_is_another_one(watching):
    """The kernel reuses inodes: the name of the dead namespace's container must not pass to its successor."""
    successor = netdev(C1, 2, b"eth0", b"veth", netns_cookie=99)
    watch = watching(INNER, np.concatenate([LO, successor]), host_netns=C1)
    watch.open()
    before = watch._by_inode[C1]
    next_of(watch)
    after = watch._by_inode[C1]
    assert (before.serial, before.cookie) != (after.serial, after.cookie)
    assert after.cookie == 99


def test_a_process_leads_to_its_namespace(watching, monkeypatch):
    """Any user may query the inode of /proc/PID/net/stat, and the program says which namespace has it."""
    watch = watching(ALL)
    watch.open()
    inodes = {"/proc/7/net/stat": STAT[C1], "/proc/8/net/stat": 12345}

    class Stat:
        def __init__(self, path):
            if path not in inodes:
                raise FileNotFoundError(path)
            self.st_ino = inodes[path]

    monkeypatch.setattr(devices.os, "stat", Stat)
    assert [watch._netns_of(pid) for pid in (7, 8, 9)] == [C1, None, None]


def test_without_rights(monkeypatch):
    def refused():
        raise Unavailable("bpf", "the kernel does not allow it", "run as root")

    monkeypatch.setattr(devices, "Walk", refused)
    status = check()
    assert (status.ok, status.detail, status.remedy) == (False, "the kernel does not allow it", "run as root")


# --- the walk ---------------------------------------------------------------------------------------------


def test_a_device_has_the_fields_of_the_program_s():
    assert NetDevice._fields == NETDEV.names


class MadeRuns:
    """A `Walk` over the results of made-up runs: what the program returns, and what it has described."""

    def __init__(self, monkeypatch, runs):
        self.begun = []
        self.runs = deque(runs)
        self.made = Walk.__new__(Walk)
        self.made._program_fd, self.made._described = 3, b""
        monkeypatch.setattr(walk.libbpf, "run", self.run)

    def run(self, _program_fd, argument):
        self.begun.append(argument)
        walked, described = self.runs.popleft()
        self.made._memory = described.tobytes()
        return walked


def test_runs_make_one_list_without_gaps_and_repetitions(monkeypatch):
    runs = MadeRuns(monkeypatch, [
        (Walked.MORE, np.concatenate([INNER, netdev(HOST, 0, b"")])),
        (Walked.DONE, np.concatenate([ETH0, INNER, LO])),
    ])  # fmt: skip
    assert runs.made.devices().tolist() == np.concatenate([LO, ETH0, INNER]).tolist()
    assert runs.begun == [1, 0]


def test_the_same_devices_are_the_same_array(monkeypatch):
    runs = MadeRuns(monkeypatch, [(Walked.DONE, LO), (Walked.DONE, LO), (Walked.DONE, ETH0)])
    first = runs.made.devices()
    assert runs.made.devices() is first
    assert runs.made.devices() is not first


def test_a_lost_place_begins_the_walk_again(monkeypatch):
    runs = MadeRuns(monkeypatch, [(Walked.MORE, LO), (Walked.LOST, LO), (Walked.DONE, ETH0)])
    assert runs.made.devices().tolist() == ETH0.tolist()
    assert runs.begun == [1, 0, 1]


def test_lists_that_never_stay_are_an_error(monkeypatch):
    runs = MadeRuns(monkeypatch, [(Walked.LOST, LO)] * 1000)
    with pytest.raises(SourceError, match="change too fast"):
        runs.made.devices()


# --- routes -----------------------------------------------------------------------------------------------

ROUTE = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth1\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
*\t00000000\t00000000\t0201\t0\t0\t7\t00000000\t0\t0\t0
half\t00000000\t010200C0\t0003\t0\t0\t0\t00000080\t0\t0\t0
"""
ZERO = "0" * 32
ROUTE6 = f"""20010db8000000000000000000000000 40 {ZERO} 00 {ZERO} 00000100 00000001 00000000 00000001     eth2
{ZERO} 00 {ZERO} 00 20010db8000000000000000000000001 00000400 00000001 00000000 00000003     eth3
{ZERO} 00 {ZERO} 00 {ZERO} ffffffff 00000001 00000000 00200200       lo
"""


@pytest.mark.parametrize(
    ("route", "route6", "expected"),
    [
        (ROUTE, "", {"eth0"}),
        ("", ROUTE6, {"eth3"}),
        (ROUTE, ROUTE6, {"eth0", "eth3"}),
        ("", "", set()),
        ("x\t00000000\n", "\n\n", set()),
        ("eth0\t00000000\t0\tflags\t0\t0\t0\t00000000\n", "", set()),
    ],
)
def test_default_routes(tmp_path, monkeypatch, route, route6, expected):
    net = tmp_path / "proc/7/net"
    net.mkdir(parents=True)
    (net / "route").write_text(route)
    (net / "ipv6_route").write_text(route6)
    monkeypatch.setattr(devices, "Path", lambda path: tmp_path / path.removeprefix("/"))
    assert default_route_devices(7) == expected


def test_tables_that_cannot_be_read_have_no_routes():
    assert default_route_devices(4194305) == frozenset()
