"""Devices, namespaces and containers: what a device in a record is.

The kernel's own net tracepoints name a device by name only, and `eth0` is in every container. So a record
carries a *sighting* (what its source could see: a name, or namespace and ifindex), and the topology says which
devices that can be. Which of several it is, the correlator finds from the path (see `correlator.identity`).

A topology is a whole snapshot with the time from which it holds; it travels in the stream like records do, so
that a replay resolves exactly as the live run did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Final

from mace.errors import WireError
from mace.names import text


class Role(StrEnum):
    """What a device is to the containers of the host."""

    INNER = "inner"
    """The container's own device."""
    OUTER = "outer"
    """The host's device towards the network."""
    HOST = "host"
    """Any other device of the host's namespace: a bridge, the host's end of a veth."""
    REMOTE = "remote"
    """Beyond the outer device, but in this kernel: the lab's far end."""
    LOOPBACK = "loopback"
    OTHER = "other"


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """One network device in one network namespace. Identity is (`netns`, `ifindex`)."""

    netns: int
    """Inode of the network namespace."""
    ifindex: int
    name: str
    kind: str
    """rtnetlink's link kind (`veth`, `bridge`, `macvlan`, ...); `""` for hardware, `loopback` for lo."""
    peer_netns: int = 0
    """veth: the peer's namespace inode. macvlan, ipvlan, vlan, vxlan: the namespace of the lower device."""
    peer_ifindex: int = 0
    """veth: the peer. macvlan, ipvlan, vlan, vxlan: the lower device. 0 where there is none."""
    master_ifindex: int = 0
    """The bridge or bond, in the same namespace, that this device is a port of; 0 where there is none."""
    default_route: bool = False
    """Whether a default route of its namespace leaves through it."""
    netns_name: str = ""
    """As in /run/netns, else a made-up one; `host` for the host's."""
    container: str = ""
    """Name of the container that the namespace belongs to; `""` for the host's and for the lab's far end."""
    role: Role = Role.OTHER
    netns_cookie: int = 0
    """Cookie of the network namespace (SO_NETNS_COOKIE): unlike the inode never given out again. 0: not known."""
    container_id: str = ""
    """The container's whole id, as its runtime gave it: stays while the container lives, whatever it is called. `""`
    where the runtime gives none (LXC, bare namespaces)."""

    def __post_init__(self) -> None:
        # Wherever the names come from, whatever takes them can store them.
        for field in ("name", "kind", "netns_name", "container", "container_id"):
            given = getattr(self, field)
            if (name := text(given)) is not given:
                object.__setattr__(self, field, name)

    @property
    def key(self) -> tuple[int, int]:
        return self.netns, self.ifindex


@dataclass(frozen=True, slots=True)
class Sighting:
    """A device as a source's records show it. ftrace: the name alone. Kernel module: namespace and ifindex.

    Records of the module name a namespace by its cookie where the kernel has one (Linux 5.14), else by its inode.
    """

    name: str
    netns: int = 0
    """Inode of the namespace; 0 where records name it by cookie and nobody has listed it yet."""
    ifindex: int = 0
    netns_cookie: int = 0
    """Cookie of the namespace; 0 where records name it by inode."""

    def is_of(self, device: Device) -> bool:
        """Whether it is a sighting of this device. A cookie decides alone: inodes are given out again."""
        if self.netns_cookie:
            return (self.netns_cookie, self.ifindex) == (device.netns_cookie, device.ifindex)
        return (self.netns, self.ifindex) == device.key if self.ifindex else self.name == device.name

    def __post_init__(self) -> None:
        # As a device's, or it would not be found among them.
        object.__setattr__(self, "name", text(self.name))


@dataclass(frozen=True, slots=True, order=True)
class Sharer:
    """A container on the host's network: it has no device of its own, and no topology lists any."""

    container: str
    """Its name, as in `Device`."""
    container_id: str = ""
    """As in `Device`."""

    def __post_init__(self) -> None:
        for field in ("container", "container_id"):
            object.__setattr__(self, field, text(getattr(self, field)))

    @property
    def key(self) -> str:
        """What stays when its name changes, where anything does."""
        return self.container_id or self.container


def containers_of(devices: Iterable[Device], sharers: Iterable[Sharer]) -> frozenset[tuple[str, str, str]]:
    """(name, id, name of the network namespace) of every container with an id, the host's namespace for sharers."""
    found = {(d.container, d.container_id, d.netns_name) for d in devices if d.container_id}
    return frozenset(found | {(s.container, s.container_id, "host") for s in sharers if s.container_id})


def newest_names(sharers: Iterable[Sharer]) -> tuple[Sharer, ...]:
    """Each container once, by the last of its names; sorted. Of absurdly many the first `_MOST_SHARERS`."""
    return tuple(sorted({sharer.key: sharer for sharer in sharers}.values())[:_MOST_SHARERS])


NO_DEVICE: Final = Sighting("")
"""Sighting 0 of every stream: the hook names no device."""


@dataclass(frozen=True, slots=True)
class Topology:
    """What is known of devices for records from `from_ns` on, until the next topology of the stream.

    In the stream it stands before every record with `ts_ns >= from_ns` and before the first record that uses
    one of its new sightings. Sightings are only ever appended.
    """

    from_ns: int
    """CLOCK_MONOTONIC, ns."""
    host_netns: int
    devices: tuple[Device, ...] = ()
    sightings: tuple[Sighting, ...] = (NO_DEVICE,)
    on_host_network: tuple[Sharer, ...] = ()
    """Containers that share the host's network namespace, as far as the source looks for them."""

    def candidates(self, sighting: Sighting) -> tuple[Device, ...]:
        """The devices that a sighting can be. Empty for `NO_DEVICE` and for a device that nobody has listed."""
        return tuple(d for d in self.devices if sighting.is_of(d))


_MOST_SHARERS: Final = 10_000
"""Ten times what the largest hosts run: so much of them is stored with each flush, whatever a stream says."""
_KEY: Final = attrgetter("netns", "ifindex")
_STACKED: Final = frozenset({"macvlan", "ipvlan", "vlan", "macvtap", "ipvtap"})


def assign_roles(
    devices: Iterable[Device], host_netns: int, outer: Iterable[str] = (), remote_netns: Iterable[str] = ()
) -> tuple[Device, ...]:
    """Give each device its role (and take the container name from those beyond the outer device); sorted.

    `outer` names the host's devices towards the network. Without it they are those of the host's namespace that a
    default route uses, and if there is none, its hardware. A bridge among them gives way to its hardware ports: they
    are what bridged containers and routed ones have in common. A device of another namespace that is paired with, or
    stacked on, a device of the host is a container's inner device, except beyond an outer device (a veth peer of
    it) or in a namespace named in `remote_netns`: that is the far end of a test network.
    """
    given = sorted(devices, key=_KEY)
    host = [d for d in given if d.netns == host_netns and d.kind != "loopback"]
    chosen = set(outer)
    outer_keys = {d.key for d in host if d.name in chosen} if chosen else _towards_network(host)
    host_keys = {d.key for d in host}
    far = set(remote_netns)

    remote = {d.netns for d in given if d.netns_name in far and d.netns != host_netns} | {
        d.netns
        for d in given
        if d.netns != host_netns and d.kind == "veth" and (d.peer_netns, d.peer_ifindex) in outer_keys
    }

    def role(d: Device) -> Role:
        if d.kind == "loopback":
            return Role.LOOPBACK
        if d.key in outer_keys:
            return Role.OUTER
        if d.netns == host_netns:
            return Role.HOST
        if d.netns in remote:
            return Role.REMOTE
        if (d.peer_netns, d.peer_ifindex) in host_keys and (d.kind == "veth" or d.kind in _STACKED):
            return Role.INNER
        return Role.OTHER

    def assigned(d: Device) -> Device:
        its_role = role(d)
        nobodys = d.netns in remote or d.netns == host_netns
        container, container_id = ("", "") if nobodys else (d.container, d.container_id)
        if its_role is d.role and (container, container_id) == (d.container, d.container_id):
            return d
        # Not by dataclasses.replace: that takes three times as long, and a host can have thousands of devices.
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
        )

    return tuple(map(assigned, given))


def _towards_network(host: Sequence[Device]) -> set[tuple[int, int]]:
    """Keys of the host's outer devices where nobody has named them."""
    hardware = {d.key for d in host if not d.kind}
    keys = set()
    for d in host:
        if d.default_route:
            ports = {p.key for p in host if p.master_ifindex == d.ifindex} & hardware if d.kind == "bridge" else set()
            keys |= ports or {d.key}
    return keys or hardware


def check(topology: Topology) -> Topology:
    """The topology, if it can be one; raises `WireError` (a file or a peer may say anything)."""
    if not topology.sightings or topology.sightings[0] != NO_DEVICE:
        raise WireError("topology: sighting 0 must be 'no device'")
    if len({d.key for d in topology.devices}) != len(topology.devices):
        raise WireError("topology: a device is listed twice")
    return topology
