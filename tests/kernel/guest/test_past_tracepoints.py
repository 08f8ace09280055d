"""Packets that reach a pod's device past every tracepoint have their whole path all the same, by the hook `ip_rcv`."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from collector.files import recording
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Topology
from tests.kernel.guest.commands import start
from tests.kernel.guest.conftest import load, unload
from tests.kernel.guest.reader import within
from tests.measuring import wait_for
from tests.redirect_peer import bpffs, redirect

pytestmark = pytest.mark.timeout(900)  # the kernel verifies the BPF programs, in an emulator for minutes

COUNT = 40
SIZE = 101
LENGTH = SIZE + 28
HOST, FAR = "past-host", "past-far"
STACKED = {
    "macvlan": "type macvlan mode bridge",
    "ipvlan": "type ipvlan mode l2",
    "vlan": "type vlan id 5",
}
"""Devices on top of an outer device, which are moved into the pod."""
PAIRED = ("peer", "list")
"""Pods behind bpf_redirect_peer; those of `list` from a device that hands over its packets in lists."""
ROUTED = {"netkit2": 0, "netkit3": 1}
"""Pods behind netkit, and its mode (enum netkit_mode): they need the hook no more than those behind veth do."""


def run(words: str) -> None:
    subprocess.run(words.split(), check=True, capture_output=True)


class Way:
    """One outer device with its far end, and one pod."""

    def __init__(self, number: int, name: str) -> None:
        self.name, self.pod, self.outer = name, f"past-{name}", f"out{number}"
        base, inner = f"198.51.100.{number * 16}", f"203.0.113.{number * 16}"
        self.host_address, self.far_address = (f"{base.rsplit('.', 1)[0]}.{number * 16 + n}" for n in (1, 2))
        stacked = name in STACKED
        first = "198.51.100" if stacked else "203.0.113"
        self.pod_address = f"{first}.{number * 16 + (3 if stacked else 2)}"
        self.router = self.far_address if stacked else f"203.0.113.{number * 16 + 1}"
        self.inside = f"{inner}/28"
        self.far = f"far{number}"
        self.lxc = f"lxc{number}"

    def make(self, folder: Path) -> None:
        run(f"ip netns add {self.pod}")
        run(f"ip -n {HOST} link add {self.outer} type veth peer name {self.far} netns {FAR}")
        run(f"ip -n {HOST} addr add {self.host_address}/28 dev {self.outer}")
        run(f"ip -n {HOST} link set {self.outer} up")
        run(f"ip -n {FAR} link set {self.far} up")
        far = self.far
        if self.name == "vlan":
            far = f"{self.far}.5"
            run(f"ip -n {FAR} link add {far} link {self.far} type vlan id 5")
            run(f"ip -n {FAR} link set {far} up")
        run(f"ip -n {FAR} addr add {self.far_address}/28 dev {far}")
        if self.name in STACKED:
            run(f"ip -n {HOST} link add up{self.outer} link {self.outer} {STACKED[self.name]}")
            run(f"ip -n {HOST} link set up{self.outer} netns {self.pod} name eth0")
        elif self.name in ROUTED:
            made = within(HOST, lambda: new_netkit(self.lxc, self.pod, ROUTED[self.name]))
            assert made == 0, os.strerror(-made)
        else:
            run(f"ip -n {HOST} link add {self.lxc} type veth peer name eth0 netns {self.pod}")
        run(f"ip -n {self.pod} addr add {self.pod_address}/28 dev eth0")
        run(f"ip -n {self.pod} link set eth0 up")
        if self.name in STACKED:
            return
        run(f"ip -n {HOST} addr add {self.router}/28 dev {self.lxc}")
        run(f"ip -n {HOST} link set {self.lxc} up")
        run(f"ip -n {self.pod} route add default via {self.router}")
        run(f"ip -n {FAR} route add {self.inside} via {self.host_address}")
        if self.name == "list":
            # Since Linux 5.13 this is NAPI, for packets of a device that does not send several segments at once.
            run(f"ip netns exec {HOST} ethtool -K {self.outer} gro on")
            run(f"ip netns exec {FAR} ethtool -K {self.far} tso off")
        if self.name in PAIRED:
            redirect(HOST, self.outer, self.lxc, self.pod_address, folder / self.name)

    def ping(self, count: int, *more: str) -> None:
        run(f"ip netns exec {self.pod} ping -q -n -i 0.01 -c {count} -s {SIZE} {' '.join(more)} {self.far_address}")


def new_netkit(name: str, pod: str, mode: int) -> int:
    """Make a pair in this namespace whose other end is eth0 in the pod; Debian 12's iproute2 cannot. Return -errno."""

    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    # struct ifinfomsg; IFLA_IFNAME 3, IFLA_LINKINFO 18 (KIND 1, DATA 2), IFLA_NET_NS_FD 28; IFLA_NETKIT_PEER_INFO 1,
    # POLICY 3, PEER_POLICY 4, MODE 5.
    info = struct.pack("BxHiII", 0, 0, 0, 0, 0)
    fd = os.open(f"/run/netns/{pod}", os.O_RDONLY)
    peer = info + attribute(3, b"eth0\0") + attribute(28, struct.pack("i", fd))
    data = attribute(1, peer) + b"".join(attribute(k, struct.pack("I", v)) for k, v in ((5, mode), (3, 0), (4, 0)))
    body = info + attribute(3, name.encode() + b"\0") + attribute(18, attribute(1, b"netkit\0") + attribute(2, data))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as asked:
        # RTM_NEWLINK 16; NLM_F_REQUEST, ACK, EXCL, CREATE.
        asked.send(struct.pack("IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        told: int = struct.unpack_from("i", asked.recv(4096), 16)[0]
    os.close(fd)
    return told


def has_netkit() -> bool:
    return subprocess.run(["modprobe", "netkit"], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Way]]:
    """The pods, by name; their neighbours are resolved."""
    names = (*STACKED, *PAIRED, *(ROUTED if has_netkit() else ()))
    made = {name: Way(number, name) for number, name in enumerate(names)}
    with ExitStack() as leaving:
        for name in (HOST, FAR):
            run(f"ip netns add {name}")
            leaving.callback(run, f"ip netns del {name}")
        run(f"ip netns exec {HOST} sysctl -qw net.ipv4.ip_forward=1")
        folder = leaving.enter_context(bpffs(tmp_path_factory.mktemp("mount") / "bpf"))
        for way in made.values():
            leaving.callback(run, f"ip netns del {way.pod}")
            way.make(folder)
        for way in made.values():
            way.ping(2)
        yield made


class Found:
    """What a run with one source has come to."""

    def __init__(self, told: dict[str, Any], capture: Path) -> None:
        self.told = told
        with recording(capture).reader() as reader:
            self.hooks = reader.header.hooks
            items = list(reader.items())
        topology = [item for item in items if isinstance(item, Topology)][-1]
        places = [next(iter(topology.candidates(each)), None) for each in topology.sightings]
        batch = Batch.concatenate([item for item in items if isinstance(item, Batch)])
        self.at_ip, self.in_lists = (
            Counter(
                (place.netns_name, place.name)
                for dev in batch.dev[(batch.hook == hook) & (batch.l3_len == LENGTH)].tolist()
                if (place := places[dev]) is not None
            )
            for hook in (Hook.IP_RCV, Hook.NAPI_GRO_RECEIVE_ENTRY)
        )
        """Records of echo requests and replies at a hook, by namespace (the host's is `host`) and device."""

    def counts(self, part: str, *names: str) -> dict[tuple[Any, ...], int]:
        """Return the packets of the rows of a part of the run's JSON, by these columns."""
        return {tuple(row[name] for name in names): row["count"] for row in self.told[part]}


@pytest.fixture(scope="module", params=["kmod", "bpf"])
def found(request: pytest.FixtureRequest, ways: dict[str, Way], tmp_path_factory: pytest.TempPathFactory) -> Any:
    source, folder = request.param, tmp_path_factory.mktemp(request.param)
    outer = json.dumps([way.outer for way in ways.values()])
    (folder / "mace.toml").write_text(f'[capture]\nsource = "{source}"\nhost_netns = "{HOST}"\nouter = {outer}\n')
    if source == "kmod":
        load()
    capture = folder / "run.mace"
    words = ("run", "--json", "--no-store", "--record", capture, "--config", folder / "mace.toml")
    measuring = start(*words)
    try:
        wait_for(lambda: (capture.exists() and capture.stat().st_size) or measuring.poll() is not None, limit_s=600)
        for way in ways.values():
            way.ping(COUNT)
        measuring.send_signal(signal.SIGINT)
        out, err = measuring.communicate(timeout=120)
    finally:
        measuring.kill()
        if source == "kmod":
            unload()
    assert measuring.returncode == 0, err
    return Found(json.loads(out), capture)


def test_every_reply_has_its_whole_path(found: Found, ways: dict[str, Way]) -> None:
    whole = found.counts("overhead", "netns", "direction")
    for direction in ("egress", "ingress"):
        # ARP and router solicitations have a path too.
        assert {name: whole.get((way.pod, direction), 0) >= COUNT for name, way in ways.items()} == dict.fromkeys(
            ways, True
        )
    assert found.told["ledger"]["ambiguous"] == found.told["ledger"]["lost"] == 0


def test_nothing_is_said_to_be_unseen(found: Found) -> None:
    assert "function:ip_rcv" in found.hooks
    assert "unseen" not in found.told


def test_only_packets_without_a_reception_are_recorded(found: Found, ways: dict[str, Way]) -> None:
    """One record a packet, at the pod's device; none of packets that were received there, or at the host.

    The far end has a VLAN device, which receives the requests.
    """
    past = [way for name, way in ways.items() if name not in ROUTED]
    assert found.at_ip == {(way.pod, "eth0"): COUNT for way in past} | {(FAR, f"{ways['vlan'].far}.5"): COUNT}


def test_packets_in_lists_are_recorded_too(found: Found, ways: dict[str, Way]) -> None:
    way = ways["list"]
    if ("host", way.outer) not in found.in_lists:
        pytest.skip("this kernel's veth has no NAPI")
    assert found.in_lists["host", way.outer] == found.at_ip[way.pod, "eth0"] == COUNT


def test_netkit_is_measured_device_by_device(found: Found, ways: dict[str, Way]) -> None:
    routed = [way for name, way in ways.items() if name in ROUTED]
    if not routed:
        pytest.skip("this kernel has no netkit")
    counts = found.counts("devices", "container", "device", "kind", "direction")
    for way in routed:
        for device, kind in (("eth0", "netkit"), (way.lxc, "netkit"), (way.outer, "veth"), (way.far, "veth")):
            for direction in ("egress", "ingress"):
                assert counts[way.pod, device, kind, direction] >= COUNT
