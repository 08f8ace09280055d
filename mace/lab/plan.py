"""The plan of a lab: names and addresses, computed without touching the machine.

Every lab uses the same addresses; labs are in separate namespaces and never meet. All addresses are from the ranges
reserved for documentation (RFC 5737, RFC 3849), so that a stray packet is routed nowhere.

    198.51.100.0/24, 2001:db8:1::/48     the bridges: divided evenly, or all of it on each (same addresses)
    203.0.113.0/24,  2001:db8:ffff::/64  the wire between the host's outer device (.1) and the remote's (.2)

Devices outside the containers have different names in every lab: the kernel's tracepoints identify a device by its
name alone, so packets of two labs with equal names could not be distinguished.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_interface
from typing import Final, Literal
from zlib import crc32

from contracts.errors import UsageError, nearest
from mace.lab import cni_list

Family = Literal[4, 6]
"""IP version."""

HOST: Final = "host"
HOST2: Final = "host2"
"""The second host of the layout overlay."""
REMOTE: Final = "remote"
NO_CONTAINERS: Final = (HOST, HOST2, REMOTE)
"""Members of labs that are no containers to measure."""
INNER_DEVICE: Final = "eth0"
"""Name of each container's own device, which every container runtime uses."""

_BRIDGE_NET4: Final = IPv4Network("198.51.100.0/24")
_BRIDGE_NET6: Final = IPv6Network("2001:db8:1::/48")
_WIRE: Final[dict[str, tuple[IPv4Interface, IPv6Interface]]] = {
    HOST: (IPv4Interface("203.0.113.1/24"), IPv6Interface("2001:db8:ffff::1/64")),
    REMOTE: (IPv4Interface("203.0.113.2/24"), IPv6Interface("2001:db8:ffff::2/64")),
}

MAX_BRIDGES: Final = 8
"""A /24 divided by 8 leaves room for 29 containers on each bridge."""
MAX_CONTAINERS: Final = 250
_LAB_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,22}[a-z0-9])?")
_MEMBER_NAME: Final = re.compile(r"[a-z][a-z0-9]{0,6}")
"""No dash, so that the last part of a namespace's name is always the member. Up to 7 characters, so that with `veth`,
the lab's tag and a dash in front a device name has at most 15."""
_CPUS: Final = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
_TAGS: Final = {"lab": "0", "demo": "1"}
_TAG_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz234567"


class Runtime(StrEnum):
    """The runtime that makes a lab's containers."""

    NETNS = "netns"
    """Bare network namespaces: everything that affects packets, made in a few milliseconds."""
    DOCKER = "docker"
    """Real containers of a Docker daemon that runs inside the lab's host namespace."""
    PODMAN = "podman"
    """The same with Podman's service."""
    CONTAINERD = "containerd"
    """Kubernetes pods without a kubelet, by containerd's CRI socket; `cni` is their network."""
    APPTAINER = "apptainer"
    """Instances of Apptainer: on the host's network, or with `cni` in namespaces of their own (`apptainer --net`)."""


class Layout(StrEnum):
    """How a lab's containers are connected to the outer device (`mace.lab.layouts`)."""

    BRIDGE = "bridge"
    """Bridges, and masquerade behind them, as Docker has it."""
    OVERLAY = "overlay"
    """Two hosts, a bridge and containers on each, and VXLAN between them; the far end is a container of the second."""
    FLANNEL = "flannel"
    """A bridge, and VXLAN to the far end's node."""
    CALICO = "calico"
    """Routes to each container's pair, at which proxy ARP answers."""
    PTP = "ptp"
    """A gateway address at each container's pair, and policy routes, as the AWS VPC CNI has them."""
    IPIP = "ipip"
    """As calico, and IP in IP to the far end's node."""
    CILIUM = "cilium"
    """As calico, with tc programs that forward IPv4 past the host's stack."""
    NETKIT_L2 = "netkit_l2"
    """As calico, with netkit pairs in place of veth pairs."""
    NETKIT_L3 = "netkit_l3"
    """The same in the mode without MAC addresses and neighbours."""


FAR_POD: Final = (IPv4Address("192.0.2.2"), IPv6Address("2001:db8:2::2"))
"""Addresses of the far end in layouts with a tunnel. IPv6 does not go through the tunnel of ipip."""


class FarEnd(StrEnum):
    """Where a lab's far end is."""

    NAMESPACE = "namespace"
    """A network namespace, on this kernel."""
    GUEST = "guest"
    """A virtual machine with a kernel and caches of its own, behind a tap device."""


TUNNELED: Final = (Layout.OVERLAY, Layout.FLANNEL)
"""Layouts with a VXLAN device."""
NETKIT: Final = (Layout.NETKIT_L2, Layout.NETKIT_L3)
"""Layouts with netkit pairs."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The specification of a lab. Raises `UsageError` for an impossible one."""

    name: str = "lab"
    containers: int = 1
    bridges: int = 1
    """Number of bridges. Containers are attached in turn: of two bridges, c1, c3, ... to the first, c2, c4, ... to the
    second."""
    same_addresses: bool = False
    """Give every bridge the same subnet, so that containers on different bridges have equal addresses."""
    runtime: Runtime = Runtime.NETNS
    far_end: FarEnd = FarEnd.NAMESPACE
    guest_kernel: str = ""
    """Path of the kernel that a far end in a virtual machine boots; "" is one that is found (`mace.lab.guest`)."""
    cni: str = ""
    """Text of the CNI network configuration list whose plugins make the containers' network; "" is the lab's own
    network of bridges."""
    layout: Layout = Layout.BRIDGE
    rps: tuple[str, ...] = ()
    """CPUs that run the receive softirqs of a kind of the host's devices, each `DEVICE=CPUS` (`rps_masks`)."""

    def __post_init__(self) -> None:
        if not _LAB_NAME.fullmatch(self.name):
            raise UsageError(f"lab name {self.name!r}: expected 1 to 24 lower-case letters, digits and inner dashes")
        if not 1 <= self.bridges <= MAX_BRIDGES:
            raise UsageError(f"bridges: {self.bridges}, expected 1 to {MAX_BRIDGES}")
        if not 1 <= self.containers <= capacity(self):
            raise UsageError(f"containers: {self.containers}, expected 1 to {capacity(self)}")
        if self.same_addresses and self.bridges < 2:
            raise UsageError("same addresses need two bridges or more (two containers of one bridge must differ)")
        if self.runtime is not Runtime.NETNS and self.bridges > 1:
            raise UsageError(f"the {self.runtime} runtime has one bridge at most; more need the netns runtime")
        if self.guest_kernel and self.far_end is not FarEnd.GUEST:
            raise UsageError("a guest's kernel is for a far end in a guest (--far-end guest)")
        if self.cni:
            cni_list.parse(self.cni)
        what = "a CNI network" if self.cni else f"the layout {self.layout}" if self.layout is not Layout.BRIDGE else ""
        runtimes = (Runtime.NETNS, Runtime.CONTAINERD, Runtime.APPTAINER) if self.cni else (Runtime.NETNS,)
        plain = self.bridges == 1 and self.runtime in runtimes and self.far_end is FarEnd.NAMESPACE
        if what and not plain:
            named = " or ".join(runtimes)
            raise UsageError(f"{what} has one bridge at most, the {named} runtime, and a far end in a namespace")
        rps_masks(self)
        if self.cni and self.layout is not Layout.BRIDGE:
            raise UsageError(f"a CNI network has the layout that its plugins make, not {self.layout}")


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge of the host namespace. `mark` is its conntrack zone and packet mark, 100 + `mark` its routing table."""

    name: str
    ipv4: IPv4Interface
    ipv6: IPv6Interface
    mac: str
    mark: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of a container: its slot, and the bridge, addresses and names that follow from the slot."""

    name: str
    slot: int
    bridge: Bridge
    ipv4: IPv4Interface
    ipv6: IPv6Interface
    mac: str
    veth: str
    """The host's end of the container's veth pair."""


def rps_masks(spec: Spec) -> dict[str, int]:
    """Return the mask of CPUs by the kind of device of `spec.rps`. Raises `UsageError`.

    `outer=1`, `veth=0-1`, `vxlan=0,2`: the kinds are `outer`, `vxlan` (of the layouts overlay and flannel) and `veth`,
    the host's end of each container's pair.
    """
    kinds = ("outer", *(("vxlan",) if spec.layout in TUNNELED else ()), "veth")
    masks: dict[str, int] = {}
    for word in spec.rps:
        kind, _, cpus = word.partition("=")
        if kind not in kinds:
            raise UsageError(f"rps: no device {kind!r}{nearest(kind, kinds)} in this lab; there are {', '.join(kinds)}")
        if not _CPUS.fullmatch(cpus):
            raise UsageError(f"rps {word!r}: expected DEVICE=CPUS, with CPUS such as 1, 0-1 or 0,2")
        for part in cpus.split(","):
            first, _, last = part.partition("-")
            if int(last or first) < int(first):
                raise UsageError(f"rps {word!r}: the range {part} is empty")
            for cpu in range(int(first), int(last or first) + 1):
                masks[kind] = masks.get(kind, 0) | 1 << cpu
    if masks and (spec.runtime is not Runtime.NETNS or spec.cni):
        raise UsageError("rps needs the netns runtime and a network of the lab's own, whose devices the lab knows")
    return masks


def capacity(spec: Spec) -> int:
    """Return how many containers a lab can have."""
    usable = _subnet4(spec, 0).num_addresses - 3  # network, gateway, broadcast
    return min(MAX_CONTAINERS, usable * spec.bridges)


def netns_name(lab: str, member: str) -> str:
    """Return the name of a member's namespace in /run/netns."""
    return f"mace-{lab}-{member}"


def device_tag(lab: str) -> str:
    """Return the part of a lab's device names that distinguishes labs: a digit for the usual labs, else three letters.

    The letters are a hash of the lab's name, one of 26 * 32**2, so that no list of labs is needed.
    """
    if lab in _TAGS:
        return _TAGS[lab]
    number = crc32(lab.encode())
    return "abcdefghijklmnopqrstuvwxyz"[number % 26] + "".join(_TAG_LETTERS[number >> shift & 31] for shift in (8, 16))


def outer_device(lab: str) -> str:
    """Return the name of the host's device towards the remote."""
    return f"out{device_tag(lab)}"


def remote_device(lab: str) -> str:
    """Return the name of the remote's device."""
    return f"rem{device_tag(lab)}"


def vxlan_device(lab: str, *, second: bool = False) -> str:
    """Return the name of the host's VXLAN device, or of the second host's."""
    return f"vx{device_tag(lab)}{'-2' if second else ''}"


def ipip_device(lab: str) -> str:
    """Return the name of the IP-in-IP device on either side."""
    return f"ipip{device_tag(lab)}"


def parse_netns_name(name: str) -> tuple[str, str] | None:
    """Return (lab, member) for the name of a lab's namespace; None for any other name."""
    prefix, _, rest = name.partition("-")
    lab, _, member = rest.rpartition("-")
    if prefix != "mace" or not _LAB_NAME.fullmatch(lab) or not _MEMBER_NAME.fullmatch(member):
        return None
    return lab, member


def container_names(spec: Spec) -> tuple[str, ...]:
    """Return the names of the containers that the lab starts with."""
    return tuple(f"c{n}" for n in range(1, spec.containers + 1))


def check_container_name(name: str) -> str:
    """Return the name if a container may have it; raises `UsageError` otherwise."""
    if name in NO_CONTAINERS or not _MEMBER_NAME.fullmatch(name):
        raise UsageError(
            f"container name {name!r}: expected a letter and up to 6 lower-case letters or digits,"
            f" other than {', '.join(NO_CONTAINERS)}"
        )
    return name


def bridges(spec: Spec) -> tuple[Bridge, ...]:
    """Return the bridges of the host namespace."""
    return tuple(_bridge(spec, number) for number in range(spec.bridges))


def place(spec: Spec, name: str, slot: int) -> Placement:
    """Return the place of the container in `slot` (from 0). Raises `UsageError` if the lab is full."""
    if not 0 <= slot < capacity(spec):
        raise UsageError(f"lab {spec.name!r} is full: {capacity(spec)} containers")
    number, index = slot % spec.bridges, slot // spec.bridges
    bridge = _bridge(spec, number)
    ipv4 = IPv4Interface((bridge.ipv4.ip + 1 + index, bridge.ipv4.network.prefixlen))
    ipv6 = IPv6Interface((bridge.ipv6.ip + 1 + index, bridge.ipv6.network.prefixlen))
    veth = f"veth{device_tag(spec.name)}-{name}"
    return Placement(check_container_name(name), slot, bridge, ipv4, ipv6, _mac(ipv4), veth)


def wire(member: str) -> tuple[IPv4Interface, IPv6Interface]:
    """Return the IPv4 and IPv6 address of `host`, and of `remote` or `host2`, on the wire between them."""
    return _WIRE[HOST if member == HOST else REMOTE]


def far_host(layout: Layout) -> str:
    """Return the member at the far end of the wire."""
    return HOST2 if layout is Layout.OVERLAY else REMOTE


def ends(spec: Spec) -> dict[str, tuple[str, str]]:
    """Return the members besides the containers that are namespaces of this machine, with the addresses of each."""
    members = [HOST, *((HOST2,) if spec.layout is Layout.OVERLAY else ())]
    found = {member: (str(wire(member)[0].ip), str(wire(member)[1].ip)) for member in members}
    if spec.far_end is FarEnd.NAMESPACE:
        pod = FAR_POD if spec.layout in (*TUNNELED, Layout.IPIP) else tuple(each.ip for each in wire(REMOTE))
        found[REMOTE] = (str(pod[0]), str(pod[1]))
    return found


def bridge_networks() -> tuple[IPv4Network, IPv6Network]:
    """Return the IPv4 and IPv6 networks whose packets are masqueraded on their way out."""
    return _BRIDGE_NET4, _BRIDGE_NET6


def _subnet4(spec: Spec, number: int) -> IPv4Network:
    if spec.same_addresses:
        return _BRIDGE_NET4
    cut = (spec.bridges - 1).bit_length()  # 1 bridge: /24, 2: /25, 3 and 4: /26, 5 to 8: /27
    return list(_BRIDGE_NET4.subnets(cut))[number]


@lru_cache
def _bridge(spec: Spec, number: int) -> Bridge:
    subnet4 = _subnet4(spec, number)
    subnet6 = ip_interface(f"2001:db8:1:{0 if spec.same_addresses else number:x}::1/64")
    assert isinstance(subnet6, IPv6Interface)
    ipv4 = IPv4Interface((subnet4.network_address + 1, subnet4.prefixlen))
    name = f"br{device_tag(spec.name)}"
    return Bridge(f"{name}-{number + 1}" if number else name, ipv4, subnet6, _mac(ipv4), number + 1)


def _mac(ipv4: IPv4Interface) -> str:
    """Return a MAC address that is made from the IPv4 address, as Docker does.

    A container that reuses an address then reuses its MAC, and the neighbours' caches stay correct. A bridge has a
    fixed MAC for the same reason: otherwise its MAC changes with its lowest port.
    """
    return "02:42:" + ":".join(f"{byte:02x}" for byte in ipv4.ip.packed)
