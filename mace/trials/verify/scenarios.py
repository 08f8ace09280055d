"""The scenarios of `mace verify`, one row each: the lab, its traffic, and what is done to the records."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from contracts.errors import LabError
from mace.lab import HOST, REMOTE, Lab, Layout, Spec
from mace.lab.plan import device_tag
from mace.trials.verify.truth import Sight

LAB: Final = "verify"
_OBSERVER: Final = Path(__file__).with_name("observer.py")
_TALKER: Final = Path(__file__).with_name("talker.py")
_CHURN: Final = 3
"""Number of containers that are added and removed in the scenario churn."""
_WAIT_S: Final = 90


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario. `play` sends its traffic while observers run, and returns at its end."""

    name: str
    meaning: str
    play: Callable[[Stage], None]
    prepare: Callable[[Lab], None] = lambda _: None
    spec: Spec = field(default_factory=lambda: Spec(name=LAB))
    loss: float = 0.0
    """Share of the records that is removed before the engine gets them."""
    sample_shift: int = 0
    """The kernel module records one packet in 2**`sample_shift`; other sources cannot sample."""
    partial: bool = False
    """Whether a source may be unable to match some packets; the bound on the recall then follows from its records."""
    unseen: str = ""
    """What a source may not see of the scenario's packets, as a reason for a bound below 1."""
    bystanders: tuple[str, ...] = ()
    """Kinds of the host's devices (`bystander_device`) that also have a packet socket."""


class Stage:
    """A lab with observers, in which a scenario is played."""

    def __init__(self, lab: Lab, packets: int, leaving: ExitStack) -> None:
        self.lab, self.packets = lab, packets
        self.inner: dict[str, list[Sight]] = {}
        self.outer: list[Sight] = []
        self._leaving = leaving
        self._flows = 0

    @contextmanager
    def observed(self, member: str, device: str) -> Iterator[list[Sight]]:
        """Observe a device with a packet socket during the block; the yielded list has the packets afterwards."""
        seen: list[Sight] = []
        process = self._start(member, str(_OBSERVER), device)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise LabError(f"no packet socket on {device} of {member}: {process.communicate()[1].strip()}")
        yield seen
        found = json.loads(process.communicate(timeout=_WAIT_S)[0])
        if found["dropped"]:
            raise LabError(f"the observer on {device} of {member} missed {found['dropped']} packets")
        seen += (tuple(each) for each in found["seen"])

    def talk(self, *flows: tuple[str, str, int, int], to: str = "", family: int = 4, server: str = "echo") -> None:
        """Send flows in parallel, each (role of `talker.py`, container, bytes per packet, packets per second)."""
        clients = []
        for role, container, size, rate in flows:
            listening = self._start(REMOTE, str(_TALKER), server, str(family))
            assert listening.stdout is not None
            port = listening.stdout.readline().strip()
            host = to or self.lab.address(REMOTE, 6 if family == 6 else 4)
            self._flows += 1
            words = [role, family, host, port, self._flows, self.packets, size, rate]
            clients.append(self._start(container, str(_TALKER), *map(str, words)))
        for client in clients:
            assert client.stdout is not None
            if client.stdout.readline() != "done\n":  # it ends by itself after a minute
                raise LabError(f"sending failed: {client.communicate()[1].strip()}")

    def _start(self, member: str, *argv: str) -> subprocess.Popen[str]:
        process = self.lab.popen(member, [sys.executable, "-I", "-S", *argv])
        self._leaving.callback(process.communicate)
        self._leaving.callback(process.kill)
        return process


def run_in(lab: Lab, member: str, *commands: str) -> None:
    """Run commands in a member's namespace. Raises `LabError` with the message of the first one that fails."""
    for command in commands:
        process = lab.popen(member, command.split())
        _, error = process.communicate(timeout=_WAIT_S)
        if process.returncode:
            raise LabError(f"{command}: {error.strip()}")


# Preparation ----------------------------------------------------------------------------------------------


def _route_back(lab: Lab) -> None:
    run_in(lab, HOST, "nft flush chain inet mace_lab nat")
    run_in(
        lab,
        REMOTE,
        "ip route add 198.51.100.0/24 via 203.0.113.1",
        "ip route add 2001:db8:1::/48 via 2001:db8:ffff::1",
    )


def _cut_in_software(lab: Lab) -> None:
    run_in(lab, HOST, f"ethtool -K {lab.outer_device} tso off gso off")


def _tunnel(lab: Lab) -> None:
    device = f"vx{device_tag(lab.name)}"
    for member, here, there in ((HOST, 1, 2), (REMOTE, 2, 1)):
        under = f"local 203.0.113.{here} remote 203.0.113.{there}"
        run_in(
            lab,
            member,
            f"ip link add name {device} type vxlan id 7 dstport 4789 {under}",
            f"ip addr add 192.0.2.{here}/24 dev {device}",
            f"ip link set dev {device} up",
        )
    run_in(lab, REMOTE, f"ip route add 198.51.100.0/24 via 192.0.2.1 dev {device}")
    run_in(lab, HOST, "ping -c 2 -i 0.05 192.0.2.2")


# Traffic --------------------------------------------------------------------------------------------------


def _echoes(stage: Stage) -> None:
    stage.talk(*(("udp", name, 96, 2000) for name in stage.lab.containers))


def _churning(stage: Stage) -> None:
    for number in range(_CHURN):
        name = f"n{number}"
        stage.lab.add_container(name)
        with stage.observed(name, "eth0") as seen:
            stage.talk(("udp", "c1", 96, 2000), ("udp", name, 96, 2000))
        stage.inner[name] = seen
        stage.lab.remove_container(name)


def _laid(layout: Layout) -> Spec:
    return Spec(name=LAB, containers=2, layout=layout)


_TWO: Final = Spec(name=LAB, containers=2)
_TWINS: Final = Spec(name=LAB, containers=2, bridges=2, same_addresses=True)

SCENARIOS: Final = (
    Scenario("plain", "UDP and its echo, routed without NAT", _echoes, _route_back),
    Scenario("nat", "UDP and its echo, from two containers behind NAT", _echoes, spec=_TWO),
    Scenario(
        "equal_ids",
        "two containers with equal addresses, ports and IP identifications, at once",
        lambda stage: stage.talk(("twin", "c1", 96, 1000), ("twin", "c2", 96, 1000)),
        spec=_TWINS,
    ),
    Scenario("ipv6", "UDP and its echo over IPv6", lambda stage: stage.talk(("udp", "c1", 96, 2000), family=6)),
    Scenario(
        "udp",
        "two containers send as fast as the observers can follow",
        lambda stage: stage.talk(("udp", "c1", 96, 10_000), ("udp", "c2", 96, 10_000)),
        spec=_TWO,
    ),
    Scenario(
        "tcp_bulk",
        "TCP streams of two containers",
        lambda stage: stage.talk(("tcp", "c1", 4096, 1500), ("tcp", "c2", 8192, 1500), server="sink"),
        spec=_TWO,
    ),
    Scenario(
        "gso_on",
        "TCP in buffers of up to 64 KiB that stay whole",
        lambda stage: stage.talk(("tcp", "c1", 61_440, 500), server="sink"),
    ),
    Scenario(
        "gso_off",
        "TCP in large buffers that the kernel segments in software at the outer device",
        lambda stage: stage.talk(("tcp", "c1", 16_384, 500), server="sink"),
        _cut_in_software,
    ),
    Scenario(
        "fragments",
        "datagrams of three fragments, reassembled and cut again by connection tracking",
        lambda stage: stage.talk(("udp", "c1", 3504, 500)),
        partial=True,
    ),
    Scenario(
        "clones", "packet sockets also on the bridge and the container's port", _echoes, bystanders=("br", "veth")
    ),
    Scenario(
        "vxlan",
        "through a VXLAN tunnel over the outer device",
        lambda stage: stage.talk(("udp", "c1", 96, 2000), to="192.0.2.2"),
        _tunnel,
    ),
    Scenario(
        "overlay",
        "containers on a bridge, to one on another host's bridge, VXLAN between",
        _echoes,
        spec=_laid(Layout.OVERLAY),
    ),
    Scenario(
        "flannel", "pods on a bridge, to a pod of another node through VXLAN", _echoes, spec=_laid(Layout.FLANNEL)
    ),
    Scenario("calico", "pods with routed pairs and proxy ARP", _echoes, spec=_laid(Layout.CALICO)),
    Scenario("ptp", "pods with routed pairs and policy routes", _echoes, spec=_laid(Layout.PTP)),
    Scenario("ipip", "pods with routed pairs, to a pod of another node by IP in IP", _echoes, spec=_laid(Layout.IPIP)),
    Scenario(
        "cilium",
        "pods whose packets tc programs forward: bpf_redirect_neigh out, bpf_redirect_peer in",
        _echoes,
        spec=_laid(Layout.CILIUM),
        partial=True,
        unseen="what bpf_redirect_peer moves to a container passes no tracepoint of its device",
    ),
    Scenario("netkit_l2", "pods with netkit pairs in mode L2", _echoes, spec=_laid(Layout.NETKIT_L2)),
    Scenario("netkit_l3", "pods with netkit pairs in mode L3", _echoes, spec=_laid(Layout.NETKIT_L3)),
    Scenario("loss_1", "1 % of the records removed in blocks", _echoes, spec=_TWO, loss=0.01),
    Scenario("loss_20", "20 % of the records removed in blocks", _echoes, spec=_TWO, loss=0.2),
    Scenario("sampling_8", "one packet in eight recorded", _echoes, sample_shift=3, partial=True),
    Scenario("churn", "containers that are added and removed, and reuse addresses", _churning),
)
BY_NAME: Final = {scenario.name: scenario for scenario in SCENARIOS}


def bystander_device(lab: Lab, kind: str) -> str:
    """Return the name of the bridge (`br`) or of the first container's port (`veth`)."""
    tag = device_tag(lab.name)
    return f"br{tag}" if kind == "br" else f"veth{tag}-c1"
