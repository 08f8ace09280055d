"""Follows the devices of all network namespaces with few rights: CAP_BPF and CAP_PERFMON.

    thread "mace-devices"
      every 25 ms: the program walk_devices     ─┐
      every second: the namespaces of processes ─┼→ snapshot ─→ poll()
      mounts changed (a named netns)            ─┤
    thread "mace-container-names"               ─┘

The program (`collector.bpf.walk`) lists all devices, and the namespace of each by cookie, by inode, and by the inode
that the directory /proc/PID/net/stat has for each process in the namespace. Any user may query the latter, so it leads
from a process to its namespace, where /proc/PID/ns/net needs the right to trace the process.

A process of the host's namespace shows the host's default routes, in /proc/PID/net too.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np

from collector.bpf.layout import NETDEV
from collector.bpf.walk import NetDevice, NetDevices, Walk
from collector.machine.containers import API_SOCKETS, NOBODY, Called
from collector.machine.cri import CRI_SOCKETS
from collector.machine.follower import Follower, Snapshot, WakeFile
from collector.machine.namespace_names import Named, NamespaceNames
from collector.machine.netns import Found, Namespaces
from collector.machine.pods import LOG_FOLDER
from collector.machine.processes import in_initial_pid_namespace
from contracts.errors import MaceError, Unavailable
from contracts.interfaces import Status
from contracts.names import text_of
from contracts.topology import Device, assign_roles

WALK_INTERVAL_S: Final = 0.025
"""Interval of the walks. Half a hold-back of the source, so that a new device is known before its packets are passed
on."""
_WALK_REST: Final = 50
"""Pause after a walk, in multiples of its duration: walks take a fiftieth of a core at most."""
_BUILD_REST: Final = 5
"""Pause after a snapshot, in multiples of the time that it took to make: a sixth of a core at most, as with netlink."""
_FIRST_NAMES_S: Final = 0.5
"""How long the first snapshot waits for container names, as with netlink."""
_ARPHRD_LOOPBACK: Final = 772
_WITH_PEER: Final = frozenset({b"veth", b"netkit"})
_WITH_LOWER: Final = frozenset({b"macvlan", b"macvtap", b"ipvlan", b"ipvtap", b"vlan", b"vxlan", b"macsec"})
"""Kinds whose lower device netlink gives as IFLA_LINK. Below a bridge or a bond are its ports."""
_ROUTES_BYTES: Final = 1 << 20
"""Part of a table of routes that is read: some 7,000 routes, of which the default IPv4 route is the first."""
_UP: Final = 0x1
_REJECT: Final = 0x200


@dataclass(slots=True, eq=False)
class _Namespace:
    """State of a namespace."""

    inode: int
    cookie: int
    serial: int
    """Unique over the run; the kernel reuses the inode."""
    since_s: float
    found: Found
    by_process: Called = NOBODY
    """Container of the namespace's first process."""


class _Watch:
    """A `collector.machine.follower.Watch` by the program `walk_devices`."""

    def __init__(
        self,
        host_netns: str | int | None,
        outer: Sequence[str],
        remote_netns: Sequence[str],
        docker_sockets: Sequence[str],
        rescan_interval_s: float,
        pod_logs: str = LOG_FOLDER,
        cri_sockets: Sequence[str] = CRI_SOCKETS,
    ) -> None:
        self._asked_host = host_netns
        self._outer = tuple(outer)
        self._remote_netns = tuple(remote_netns)
        self._rescan_interval_s = rescan_interval_s
        self.host_netns = 0
        self._resources = ExitStack()
        self._wake_file = WakeFile()
        self._names = NamespaceNames(
            docker_sockets, self.wake, self._netns_of, pod_logs=pod_logs, cri_sockets=cri_sockets
        )
        self._walk: Walk
        self._mounts: Namespaces
        self._poll = select.poll()
        self._netdevs: NetDevices = np.empty(0, NETDEV)
        self._by_inode: dict[int, _Namespace] = {}
        self._by_proc_stat: Mapping[int, int] = {}
        """Inode of /proc/PID/net/stat → inode of the namespace. Replaced, never modified: another thread reads it."""
        self._serials = count(1)
        self._host_routes: frozenset[str] = frozenset()
        """Names of the devices through which the host's default routes leave."""
        self._walk_at_s = 0.0
        self._scan_at_s = 0.0
        self._build_at_s = 0.0
        self._changed = False
        self._built: dict[tuple[NetDevice, Named, bool], Device] = {}
        """The values from which devices were last made → the device without its role."""
        self._taken = Snapshot()

    def open(self) -> Snapshot:
        """Return the first snapshot; raises `Unavailable`, or `SourceError` for another version's object file."""
        self._wake_file.open()
        self._resources.callback(self._wake_file.close)
        self._walk = Walk()
        self._resources.callback(self._walk.close)
        self._resources.callback(self._names.close)
        self._mounts = Namespaces(self._netns_of)
        self._resources.callback(self._mounts.close)
        self._poll.register(self._wake_file.fileno(), select.POLLIN)
        self._poll.register(self._mounts.fileno(), select.POLLPRI)
        self._list()
        self._scan()
        self._names.init_netns = self._initial_netns()
        self.host_netns = self._names.find_host(self._asked_host, self._by_inode.values())
        self._names.host_netns = self.host_netns
        self._look_at_host()
        self._names.ask(self._by_inode.values())
        self._names.wait(_FIRST_NAMES_S)
        self._taken = self._snapshot()
        return self._taken

    def close(self) -> None:
        """Release all resources."""
        self._resources.close()

    def wake(self) -> None:
        """Make `step` return; callable from any thread at any time."""
        self._wake_file.wake()

    def step(self) -> Snapshot | None:
        """Wait for the next walk or a name; return a new snapshot if anything changed, else None."""
        next_s = min(self._walk_at_s, self._scan_at_s, self._build_at_s if self._outdated() else math.inf)
        self._wait(max(next_s - time.monotonic(), 0))
        if time.monotonic() >= self._walk_at_s:
            self._list()
        if time.monotonic() >= self._scan_at_s:
            self._scan()
            self._look_at_host()
            self._names.ask(self._by_inode.values())
        began_s = time.monotonic()
        if not self._outdated() or began_s < self._build_at_s:
            return None
        taken = self._snapshot()
        ended_s = time.monotonic()
        self._build_at_s = ended_s + _BUILD_REST * (ended_s - began_s)
        if taken == self._taken:
            return None
        self._taken = taken
        return taken

    def _outdated(self) -> bool:
        return self._changed or self._names.outdated

    def _wait(self, timeout_s: float) -> None:
        ready = {fd for fd, _ in self._poll.poll(timeout_s * 1000)}
        if self._wake_file.fileno() in ready:
            self._wake_file.rest()
        if self._mounts.fileno() in ready:
            self._mounts.mounts_changed()
            self._scan_at_s = 0.0

    # --- current state ------------------------------------------------------------------------------

    def _list(self) -> None:
        """Walk the devices, and note new and removed namespaces."""
        now_s, began_s = time.monotonic(), time.thread_time()
        netdevs = self._walk.devices()
        # The thread's own time: on a busy machine a walk takes longer, and costs no more.
        self._walk_at_s = now_s + max(WALK_INTERVAL_S, _WALK_REST * (time.thread_time() - began_s))
        if netdevs is not self._netdevs:
            self._netdevs = netdevs
            self._sort_into_namespaces(now_s)

    def _sort_into_namespaces(self, now_s: float) -> None:
        self._changed = True
        netdevs = self._netdevs
        _, first = np.unique(netdevs["netns"], return_index=True)
        before = self._by_inode
        self._by_inode = {}
        for inode, cookie in netdevs[["netns", "netns_cookie"]][first].tolist():
            known = before.get(inode)
            if known is None or known.cookie != cookie:
                known = _Namespace(inode, cookie, next(self._serials), now_s, Found(inode))
                self._scan_at_s = 0.0  # at once, for its name
            self._by_inode[inode] = known
        self._by_proc_stat = dict(netdevs[["proc_stat", "netns"]][first].tolist())

    def _scan(self) -> None:
        """Find the processes and the mounts of the namespaces."""
        found = self._mounts.scan()
        for namespace in self._by_inode.values():
            # A namespace that the scan did not find keeps its name: an open file keeps it, or it is about to vanish
            # and its last packets are still to be passed on.
            if (place := found.get(namespace.inode)) is not None:
                self._changed |= self._names.renew(namespace, place)
        pause_s = self._names.pause_s(self._by_inode.values(), self._rescan_interval_s)
        self._scan_at_s = time.monotonic() + pause_s

    def _look_at_host(self) -> None:
        """Find the host's default routes, and the containers on its network."""
        pids = self._mounts.occupied.get(self.host_netns, [])
        self._changed |= self._names.look_for_sharers(pids)
        host = self._by_inode.get(self.host_netns)
        routes = default_route_devices(host.found.pid) if host is not None and host.found.pid else frozenset()
        self._changed |= routes != self._host_routes
        self._host_routes = routes

    def _netns_of(self, pid: int) -> int | None:
        """Return the inode of a process's namespace; None if /proc does not show the process."""
        try:
            return self._by_proc_stat.get(os.stat(f"/proc/{pid}/net/stat").st_ino)  # noqa: PTH116 - fast
        except OSError:
            return None

    def _initial_netns(self) -> int:
        """Return the namespace of process 1, or the one that the kernel started with if MACE sees another process 1."""
        first = self._netdevs[self._netdevs["initial"] == 1]
        initial = int(first["netns"][0]) if len(first) else 0
        return (self._netns_of(1) if in_initial_pid_namespace() else None) or initial

    # --- snapshot -----------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        self._changed = False
        self._names.use()
        named = {inode: self._names.of(namespace) for inode, namespace in self._by_inode.items()}
        built = {}
        for row in self._netdevs.tolist():
            netdev = NetDevice(*row)
            by_default = netdev.netns == self.host_netns and text_of(netdev.name) in self._host_routes
            made_from = netdev, named[netdev.netns], by_default
            built[made_from] = self._built.get(made_from) or _device(*made_from)
        self._built = built
        assigned = assign_roles(built.values(), self.host_netns, self._outer, self._remote_netns)
        return Snapshot(assigned, self._names.on_host_network())


def _device(netdev: NetDevice, named: Named, by_default: bool) -> Device:
    peer = (0, 0)
    if netdev.kind in _WITH_PEER:
        peer = netdev.peer_netns, netdev.peer_ifindex
    elif netdev.peer_netns:  # a tunnel that sends from another namespace
        peer = netdev.peer_netns, 0
    elif netdev.kind in _WITH_LOWER:
        peer = netdev.lower_netns, netdev.lower_ifindex
    return Device(
        netdev.netns,
        netdev.ifindex,
        text_of(netdev.name),
        "loopback" if netdev.type == _ARPHRD_LOOPBACK else text_of(netdev.kind),
        *peer,
        netdev.master_ifindex,
        by_default,
        named.netns_name,
        named.container,
        netns_cookie=netdev.netns_cookie,
        container_id=named.container_id,
        pod_containers=named.pod_containers,
    )


class BpfDeviceFollower(Follower):
    """Follows the devices of all network namespaces of this machine, with CAP_BPF and CAP_PERFMON alone.

    The arguments are those of `collector.machine.devices.DeviceFollower`. With `host_netns` None the host's namespace
    is that of process 1, or the one that the kernel started with if MACE runs in a process id namespace of its own. A
    change of devices or namespaces is found within `WALK_INTERVAL_S`; the first process of a namespace, and the host's
    routes, within `rescan_interval_s`. Only devices of the host's namespace have a `default_route`.
    """

    def __init__(
        self,
        *,
        host_netns: str | int | None = None,
        outer: Sequence[str] = (),
        remote_netns: Sequence[str] = (),
        docker_sockets: Sequence[str] = API_SOCKETS,
        rescan_interval_s: float = 1.0,
        pod_logs: str = LOG_FOLDER,
        cri_sockets: Sequence[str] = CRI_SOCKETS,
    ) -> None:
        super().__init__(
            _Watch(host_netns, outer, remote_netns, docker_sockets, rescan_interval_s, pod_logs, cri_sockets)
        )


def check(*, host_netns: str | int | None = None) -> Status:
    """Return whether devices can be followed here with few rights, with the numbers of devices and namespaces found."""
    watch = _Watch(host_netns, (), (), (), 1.0)
    try:
        devices = watch.open().devices
    except Unavailable as failure:
        return Status(False, failure.why, failure.remedy)
    except MaceError as failure:
        return Status(False, str(failure))
    finally:
        watch.close()
    return Status(True, f"{len(devices)} devices in {len({device.netns for device in devices})} network namespaces")


# --- routes ---------------------------------------------------------------------------------------------


def default_route_devices(pid: int) -> frozenset[str]:
    """Return the names of the devices through which default routes leave, in the namespace of a process.

    The routes are those of the main table, IPv4 and IPv6. An unreadable table has none.
    """
    found = set()
    for line in _lines(f"/proc/{pid}/net/route"):
        # Iface, Destination, Gateway, Flags, RefCnt, Use, Metric, Mask, ...; numbers are hexadecimal.
        fields = line.split(b"\t")
        if len(fields) > 7 and fields[1] == fields[7] == b"00000000" and _leads_out(fields[3]):
            found.add(text_of(fields[0].rstrip()))
    for line in _lines(f"/proc/{pid}/net/ipv6_route"):
        # Destination, its length, source, its length, next hop, metric, references, uses, flags, device.
        fields = line.split()
        if len(fields) == 10 and fields[1] == b"00" and not fields[0].strip(b"0") and _leads_out(fields[8]):
            found.add(text_of(fields[9]))
    return frozenset(found)


def _leads_out(flags: bytes) -> bool:
    try:
        return int(flags, 16) & (_UP | _REJECT) == _UP
    except ValueError:
        return False  # the table's head


def _lines(path: str) -> list[bytes]:
    try:
        with Path(path).open("rb") as table:
            return table.read(_ROUTES_BYTES).splitlines()
    except OSError:
        return []
