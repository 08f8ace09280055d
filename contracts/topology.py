"""Devices, namespaces and containers: the topology maps the device in a record to the machine's devices.

The kernel's own net tracepoints give a device's name only, and every container has an `eth0`. A record therefore
carries a *sighting* (whatever its source could see: a name, or namespace and ifindex), and the topology lists the
devices that the sighting can be. Among several candidates the correlator decides by the packet's path (see
`correlator.identity`).

A topology is a whole snapshot with the time from which it holds. It travels in the stream like records do, so that a
replay resolves devices exactly as the live run did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Final, NamedTuple

from contracts.errors import WireError
from contracts.names import text
from contracts.pods import pod_name


class Role(StrEnum):
    """A device's part in the path between the containers and the network."""

    INNER = "inner"
    """The container's own device."""
    OUTER = "outer"
    """The host's device towards the network."""
    HOST = "host"
    """Any other device of the host's namespace: a bridge, the host's end of a veth."""
    REMOTE = "remote"
    """A device beyond the outer device but in this kernel: the lab's far end."""
    LOOPBACK = "loopback"
    OTHER = "other"


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """One network device in one network namespace, identified by (`netns`, `ifindex`)."""

    netns: int
    """Inode of the network namespace."""
    ifindex: int
    name: str
    kind: str
    """rtnetlink's link kind (`veth`, `bridge`, `macvlan`, ...); `""` for hardware, `loopback` for lo."""
    peer_netns: int = 0
    """veth, netkit: the peer's namespace inode. macvlan, ipvlan, vlan, vxlan: the namespace of the lower device.
    A VXLAN device that was moved to another namespace: the namespace from which it sends."""
    peer_ifindex: int = 0
    """veth, netkit: the peer. macvlan, ipvlan, vlan, vxlan: the lower device. 0 where there is none."""
    master_ifindex: int = 0
    """The bridge or bond, in the same namespace, that this device is a port of; 0 where there is none."""
    default_route: bool = False
    """Whether a default route of the namespace leaves through this device; the source bpf knows only the host's."""
    netns_name: str = ""
    """Name of the namespace in /run/netns, or one that MACE made up; `host` for the host's namespace."""
    container: str = ""
    """Name of the container that the namespace belongs to; `""` in the host's namespace and at the lab's far end."""
    role: Role = Role.OTHER
    netns_cookie: int = 0
    """Cookie of the network namespace (SO_NETNS_COOKIE): unlike the inode the kernel never reuses it. 0: not known."""
    container_id: str = ""
    """The container's full id, as its runtime gave it: constant while the container lives, even if it is renamed. `""`
    if the runtime gives none (LXC, bare namespaces). Of a Kubernetes pod its UID."""
    pod_containers: str = ""
    """If the container is a Kubernetes pod (`contracts.pods`): names of the containers that have started in it, init
    containers too, sorted and separated by commas; they share the pod's devices."""

    def __post_init__(self) -> None:
        # Names from any origin (kernel, runtime, file, broker) become text that every sink can store.
        for field in ("name", "kind", "netns_name", "container", "container_id", "pod_containers"):
            given = getattr(self, field)
            if (name := text(given)) is not given:
                object.__setattr__(self, field, name)

    @property
    def key(self) -> tuple[int, int]:
        return self.netns, self.ifindex


@dataclass(frozen=True, slots=True)
class Sighting:
    """A device as a source's records identify it. ftrace: the name alone. Kernel module: namespace and ifindex.

    Records of the module identify a namespace by its cookie (since Linux 5.14), on older kernels by its inode.
    """

    name: str
    netns: int = 0
    """Inode of the namespace; 0 if records identify it by cookie and no listing has included it yet."""
    ifindex: int = 0
    netns_cookie: int = 0
    """Cookie of the namespace; 0 if records identify it by inode."""

    def is_of(self, device: Device) -> bool:
        """Return whether this sighting can be the device. A cookie decides alone, because the kernel reuses inodes."""
        if self.netns_cookie:
            return (self.netns_cookie, self.ifindex) == (device.netns_cookie, device.ifindex)
        return (self.netns, self.ifindex) == device.key if self.ifindex else self.name == device.name

    def __post_init__(self) -> None:
        # The same conversion as in `Device`: `is_of` compares the two names.
        object.__setattr__(self, "name", text(self.name))


@dataclass(frozen=True, slots=True, order=True)
class Sharer:
    """A container on the host's network, which has no device of its own."""

    container: str
    """The container's name, as in `Device`."""
    container_id: str = ""
    """As in `Device`."""

    def __post_init__(self) -> None:
        for field in ("container", "container_id"):
            object.__setattr__(self, field, text(getattr(self, field)))

    @property
    def key(self) -> str:
        """The container's id, which survives a rename, or its name if it has no id."""
        return self.container_id or self.container


class ContainerInfo(NamedTuple):
    """What outputs say once of a container, and not in every row or series."""

    container: str
    container_id: str
    netns: str
    """Name of the network namespace."""
    namespace: str = ""
    """Of a Kubernetes pod its namespace, name and workload (`contracts.pods`); else ""."""
    pod: str = ""
    workload: str = ""
    pod_containers: str = ""
    """As in `Device`."""


def containers_of(devices: Iterable[Device], sharers: Iterable[Sharer]) -> frozenset[ContainerInfo]:
    """Return what is known of each container with an id; a sharer's network namespace is `host`."""
    found = {(d.container, d.container_id, d.netns_name, d.pod_containers) for d in devices if d.container_id}
    found |= {(s.container, s.container_id, "host", "") for s in sharers if s.container_id}
    return frozenset(
        ContainerInfo(name, container_id, netns, *pod_name(name), pod_containers)
        for name, container_id, netns, pod_containers in found
    )


def newest_names(sharers: Iterable[Sharer]) -> tuple[Sharer, ...]:
    """Return each container once, under the last name given for it; sorted, at most `_MOST_SHARERS`."""
    return tuple(sorted({sharer.key: sharer for sharer in sharers}.values())[:_MOST_SHARERS])


NO_DEVICE: Final = Sighting("")
"""Sighting 0 of every stream: the hook names no device."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The devices known for records from `from_ns` on, until the next topology of the stream.

    In the stream a topology precedes every record with `ts_ns >= from_ns` and the first record that uses one of its
    new sightings. Each topology keeps all earlier sightings and appends new ones.
    """

    from_ns: int
    """CLOCK_MONOTONIC, ns."""
    host_netns: int
    devices: tuple[Device, ...] = ()
    sightings: tuple[Sighting, ...] = (NO_DEVICE,)
    on_host_network: tuple[Sharer, ...] = ()
    """Containers that share the host's network namespace; empty if the source does not look for them."""

    def candidates(self, sighting: Sighting) -> tuple[Device, ...]:
        """Return the devices that a sighting can be; none for `NO_DEVICE` and for a device missing in the topology."""
        return tuple(d for d in self.devices if sighting.is_of(d))


_MOST_SHARERS: Final = 10_000
"""Largest number of sharers kept, ten times as many as the largest hosts run: bounds what each flush stores."""
_KEY: Final = attrgetter("netns", "ifindex")
PAIRS: Final = frozenset({"veth", "netkit"})
"""Kinds of devices that come in pairs: one end receives what the other (`peer_netns`, `peer_ifindex`) transmits."""
_STACKED: Final = frozenset({"macvlan", "ipvlan", "vlan", "macvtap", "ipvtap"})


def assign_roles(
    devices: Iterable[Device], host_netns: int, outer: Iterable[str] = (), remote_netns: Iterable[str] = ()
) -> tuple[Device, ...]:
    """Return the devices with their roles, sorted by namespace and ifindex.

    `outer` names the host's devices towards the network. Without `outer`, these are the devices of the host's namespace
    that a default route uses, or its hardware if there is no default route. A bridge among them is replaced by its
    hardware ports, which bridged and routed containers have in common. A device of another namespace that is paired
    with, or stacked on, a device of the host is a container's inner device. The namespace in which Docker keeps an
    overlay network's bridge and VXLAN device counts as the host's: the VXLAN device sends from there. Two exceptions
    are the far end of a test network: the namespace of an outer device's peer, and the namespaces named in
    `remote_netns`. Devices of the host and of the far end lose their container's name and id.
    """
    given = sorted(devices, key=_KEY)
    host = [d for d in given if d.netns == host_netns and d.kind != "loopback"]
    chosen = set(outer)
    outer_keys = {d.key for d in host if d.name in chosen} if chosen else _towards_network(host)
    overlays = _overlays(given)
    host_keys = {d.key for d in host} | {d.key for d in given if overlays.get(d.netns) == host_netns}
    far = set(remote_netns)

    remote = {d.netns for d in given if d.netns_name in far and d.netns != host_netns} | {
        d.netns
        for d in given
        if d.netns != host_netns and d.kind in PAIRS and (d.peer_netns, d.peer_ifindex) in outer_keys
    }

    def role(d: Device) -> Role:
        if d.kind == "loopback":
            return Role.LOOPBACK
        if d.key in outer_keys:
            return Role.OUTER
        if d.netns == host_netns or overlays.get(d.netns) == host_netns:
            return Role.HOST
        if d.netns in remote or overlays.get(d.netns) in remote:
            return Role.REMOTE
        if (d.peer_netns, d.peer_ifindex) in host_keys and d.kind in PAIRS | _STACKED:
            return Role.INNER
        return Role.OTHER

    def assigned(d: Device) -> Device:
        its_role = role(d)
        nobodys = its_role in (Role.HOST, Role.OUTER, Role.REMOTE) or d.netns in remote or d.netns == host_netns
        called = ("", "", "") if nobodys else (d.container, d.container_id, d.pod_containers)
        if its_role is d.role and called == (d.container, d.container_id, d.pod_containers):
            return d
        container, container_id, pod_containers = called
        # dataclasses.replace would take three times as long, and a host can have thousands of devices.
        return Device(
            d.netns,
            d.ifindex,
            d.name,
            d.kind,
            d.peer_netns,
            d.peer_ifindex,
            d.master_ifindex,
            d.default_route,
            d.netns_name,
            container,
            its_role,
            d.netns_cookie,
            container_id,
            pod_containers,
        )

    return tuple(map(assigned, given))


def _overlays(devices: Iterable[Device]) -> dict[int, int]:
    """Return namespaces that have bridges of overlay networks, each with the namespace from which its tunnel sends.

    Docker makes a VXLAN device in the host's namespace, moves it into a namespace for the network, and makes it a port
    of a bridge there. The device goes on to send from the host's namespace. No container is in the network's namespace,
    so that nothing has a default route there.
    """
    routed = {d.netns for d in devices if d.default_route}
    return {
        d.netns: d.peer_netns
        for d in devices
        if d.kind == "vxlan" and d.master_ifindex and d.peer_netns not in (0, d.netns) and d.netns not in routed
    }


def _towards_network(host: Sequence[Device]) -> set[tuple[int, int]]:
    """Return the keys of the host's outer devices if the user names none."""
    hardware = {d.key for d in host if not d.kind}
    keys = set()
    for d in host:
        if d.default_route:
            ports = {p.key for p in host if p.master_ifindex == d.ifindex} & hardware if d.kind == "bridge" else set()
            keys |= ports or {d.key}
    return keys or hardware


def check(topology: Topology) -> Topology:
    """Return the topology if it is valid; raises `WireError`, because a file or a peer may send anything."""
    if not topology.sightings or topology.sightings[0] != NO_DEVICE:
        raise WireError("topology: sighting 0 must be 'no device'")
    if len({d.key for d in topology.devices}) != len(topology.devices):
        raise WireError("topology: a device is listed twice")
    return topology
