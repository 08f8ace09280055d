"""The devices of this machine in all its network namespaces, followed as they appear, change and disappear.

    thread "mace-devices", in an empty network namespace of its own
      link, route and namespace events ─┐
      mounts changed (a named netns)   ─┼→ mark as dirty → query again → snapshot ─→ poll()
      every second: /proc/*/ns/net     ─┤
    thread "mace-container-names"      ─┘

The thread's namespace has a number for every other namespace. The number suffices to list the other namespace's links
and to receive its events, and does not keep it alive (see `collector.machine.rtnetlink`). Only for default routes does
the thread enter the other namespaces, for a fraction of a millisecond. Events only mark *that* something changed; the
current state is queried, so that lost or reordered events cannot leave a wrong picture.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from collector.machine.containers import (
    API_SOCKETS,
    NOBODY,
    Called,
)
from collector.machine.cri import CRI_SOCKETS
from collector.machine.follower import Follower, Snapshot, WakeFile
from collector.machine.namespace_names import NamespaceNames
from collector.machine.netns import (
    Found,
    Namespaces,
    cookie_here,
    hidden,
    inode_of,
    inside,
    leave_for_new_netns,
    open_netns,
)
from collector.machine.pods import LOG_FOLDER
from collector.machine.rtnetlink import (
    RTM_DELNSID,
    RTM_DELROUTE,
    RTM_NEWNSID,
    RTM_NEWROUTE,
    Event,
    Link,
    LinkEvents,
    LinkQueries,
    NamespaceGone,
    RouteQueries,
)
from contracts.errors import Unavailable
from contracts.interfaces import Status
from contracts.topology import PAIRS, Device, assign_roles

_QUIET_S: Final = 0.002
"""Pause without events that ends a burst: the start of a container causes some forty events, queried together."""
_BURST_S: Final = 0.05
"""Longest wait for the end of a burst, so that a machine in constant change is still followed."""
_REST: Final = 5
"""Pause after a snapshot, in multiples of the time that it took to make. On a host of a thousand containers a snapshot
takes 15 ms: following then costs at most a sixth of a core, and a change is reported up to 75 ms late."""
_ROUNDS: Final = 8
_SEARCHES: Final = 3
_SEARCH_S: Final = 0.5
"""Age, s, at which a namespace that the ordinary scan has not found is searched for, at most `_SEARCHES` times (60 ms
of CPU time for 1000 processes with 30 files)."""
_ONE_BY_ONE: Final = 64
"""Largest number of changed links in one namespace that are queried one by one; more are listed all at once."""
_FIRST_NAMES_S: Final = 0.5
"""How long the first snapshot waits for container names. A healthy daemon needs some 10 ms."""
_REMEDY: Final = (
    "run as root (to see other network namespaces it needs CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_NET_ADMIN and"
    " CAP_NET_BROADCAST)"
)


@dataclass(slots=True, eq=False)
class _Namespace:
    """State of a namespace for which the thread's namespace has a number."""

    nsid: int
    serial: int
    """Unique over the run; the kernel reuses the number and the inode."""
    found: Found
    since_s: float
    cookie: int = 0
    links: dict[int, Link] = field(default_factory=dict)
    default_routes: frozenset[int] = frozenset()
    by_process: Called = NOBODY
    """Container of the namespace's first process."""
    searches: int = 0

    @property
    def inode(self) -> int:
        """The namespace's inode or, while it is unknown, a number below any inode.

        nsfs has its inodes from 0xF0000000 on (PROC_DYNAMIC_FIRST in fs/proc/generic.c; the first ones just below).
        """
        return self.found.inode or self.nsid + 1


class _Watch:
    """Synchronous core of `DeviceFollower`; it runs in one thread, which it moves to a network namespace of its own."""

    def __init__(
        self,
        host_netns: str | int | None = None,
        outer: Sequence[str] = (),
        remote_netns: Sequence[str] = (),
        docker_sockets: Sequence[str] = API_SOCKETS,
        rescan_interval_s: float = 1.0,
        pod_logs: str = LOG_FOLDER,
        cri_sockets: Sequence[str] = CRI_SOCKETS,
    ) -> None:
        self._asked_host = host_netns
        self._outer = tuple(outer)
        self._remote_netns = tuple(remote_netns)
        self._docker_sockets = tuple(docker_sockets)
        self._pod_logs, self._cri_sockets = pod_logs, tuple(cri_sockets)
        self._rescan_interval_s = rescan_interval_s
        self.host_netns = 0
        self._resources = ExitStack()
        self._wake_file = WakeFile()
        self._home_fd = -1
        self._events: LinkEvents
        self._queries: LinkQueries
        self._namespaces: Namespaces
        self._names: NamespaceNames
        self._poll = select.poll()
        self._by_nsid: dict[int, _Namespace] = {}
        self._serials = count(1)
        self._dirty: dict[int, set[int]] = {}
        """nsid → ifindexes to query; 0 stands for all links."""
        self._dirty_routes: set[int] = set()
        self._scan_at_s = 0.0
        self._changed = False
        """Whether a new snapshot could differ from the last."""
        self._built: dict[int, tuple[tuple[object, ...], list[Device]]] = {}
        """Serial of a namespace → (the values from which its devices were last made, the devices)."""
        self._build_at_s = 0.0
        self._taken = Snapshot()

    def open(self) -> Snapshot:
        """Return the first snapshot; raises `Unavailable`. Called once; call `close` even after a failure."""
        self._wake_file.open()
        self._resources.callback(self._wake_file.close)
        try:
            self._home_fd = leave_for_new_netns()
            self._resources.callback(os.close, self._home_fd)
            self._events = LinkEvents()
            self._resources.callback(self._events.close)
            self._queries = LinkQueries()
            self._resources.callback(self._queries.close)
            self._namespaces = Namespaces()
            self._resources.callback(self._namespaces.close)
        except PermissionError as failure:
            raise Unavailable("devices", f"network namespaces cannot be listed: {failure}", _REMEDY) from failure
        except OSError as failure:
            if failure.errno != errno.ENOSPC:
                raise Unavailable("devices", f"network namespaces cannot be listed: {failure}") from failure
            raise Unavailable(
                "devices", "no room for one more network namespace", "raise sysctl user.max_net_namespaces"
            ) from failure
        self._names = NamespaceNames(
            self._docker_sockets, self.wake, pod_logs=self._pod_logs, cri_sockets=self._cri_sockets
        )
        self._resources.callback(self._names.close)
        for fd, what in (
            (self._events.fileno(), select.POLLIN),
            (self._wake_file.fileno(), select.POLLIN),
            (self._namespaces.fileno(), select.POLLPRI),
        ):
            self._poll.register(fd, what)
        # Process 1 may be hidden even from root (by a security module, or in a PID namespace of its own). A process
        # that sees other namespaces at all is then most likely in the host's.
        self._names.init_netns = inode_of("/proc/1/ns/net") or inode_of("/proc/self/ns/net") or 0
        self._catch_up()
        self.host_netns = self._names.find_host(self._asked_host, self._by_nsid.values())
        self._names.host_netns = self.host_netns
        self._look_for_sharers()
        self._names.ask(self._by_nsid.values())
        self._names.wait(_FIRST_NAMES_S)
        self._taken = self._devices()
        return self._taken

    def close(self) -> None:
        """Release all resources."""
        self._resources.close()

    def wake(self) -> None:
        """Make `step` return; callable from any thread at any time."""
        self._wake_file.wake()

    def step(self) -> Snapshot | None:
        """Wait for an event or the next scan; return a new snapshot if anything changed, else None."""
        next_s = min(self._scan_at_s, self._build_at_s) if self._outdated() else self._scan_at_s
        self._wait(max(next_s - time.monotonic(), 0))
        self._catch_up()
        self._names.ask(self._by_nsid.values())
        started_s = time.monotonic()
        if not self._outdated() or started_s < self._build_at_s:
            return None
        taken = self._devices()
        ended_s = time.monotonic()
        self._build_at_s = ended_s + _REST * (ended_s - started_s)
        if taken == self._taken:
            return None
        self._taken = taken
        return taken

    def _outdated(self) -> bool:
        return self._changed or self._names.outdated

    def _wait(self, timeout_s: float) -> None:
        burst_ends_s = 0.0
        while True:
            ready = {fd for fd, _ in self._poll.poll(timeout_s * 1000)}
            now_s = time.monotonic()
            if self._namespaces.fileno() in ready:
                self._namespaces.mounts_changed()
                self._scan_at_s = now_s
            if self._wake_file.fileno() in ready:
                self._wake_file.rest()
                return
            if self._events.fileno() in ready:
                self._read_events()
            elif self._namespaces.fileno() not in ready:
                return  # quiet
            burst_ends_s = burst_ends_s or now_s + _BURST_S
            if now_s >= burst_ends_s:
                return
            timeout_s = _QUIET_S

    def _catch_up(self) -> None:
        # Listing a veth can number its peer's namespace, which causes an event and so another scan. A few rounds
        # suffice; on a machine in constant change the next step continues.
        for _ in range(_ROUNDS):
            self._read_events()
            if time.monotonic() >= self._scan_at_s:
                self._scan()
            if not self._dirty and not self._dirty_routes:
                return
            self._ask_links()
            self._ask_routes()

    # --- events ------------------------------------------------------------------------------------

    def _read_events(self) -> None:
        events, lost = self._events.read()
        for event in events:
            self._note(event)
        if lost:
            self._start_over()

    def _note(self, event: Event) -> None:
        namespace = self._by_nsid.get(event.nsid)
        if event.type == RTM_DELNSID:
            # The namespace has died. The kernel reuses numbers and inodes: scan for a successor at once.
            self._forget(event.nsid)
        elif event.type == RTM_NEWNSID:
            if namespace is None:
                # The kernel numbered it as a peer's namespace, before a scan found it. Known by its number for now.
                self._add(event.nsid, Found(0))
        elif namespace is None:
            pass  # an event from before the number was removed
        elif event.type in (RTM_NEWROUTE, RTM_DELROUTE):
            self._dirty_routes.add(event.nsid)
        else:
            self._dirty.setdefault(event.nsid, set()).add(event.ifindex)
            if event.ifindex in namespace.default_routes:
                # A device that goes down removes its IPv4 routes without an event (fib_sync_down_dev).
                self._dirty_routes.add(event.nsid)

    def _start_over(self) -> None:
        """List everything again after events were lost, because any number may now be of another namespace."""
        self._by_nsid.clear()
        self._dirty.clear()
        self._dirty_routes.clear()
        for nsid in self._queries.numbers():
            self._add(nsid, Found(0))

    def _cookie(self, netns_fd: int) -> int:
        """Return the namespace's cookie; 0 if it cannot be read."""
        try:
            with inside(netns_fd, self._home_fd):
                return cookie_here()
        except PermissionError:
            return 0

    def _add(self, nsid: int, found: Found, cookie: int = 0) -> None:
        self._by_nsid[nsid] = _Namespace(nsid, next(self._serials), found, time.monotonic(), cookie)
        self._dirty[nsid] = {0}
        self._dirty_routes.add(nsid)
        if not found.inode:
            self._scan_at_s = time.monotonic()

    def _forget(self, nsid: int) -> None:
        self._changed = True
        self._by_nsid.pop(nsid, None)
        self._dirty.pop(nsid, None)
        self._dirty_routes.discard(nsid)
        self._scan_at_s = time.monotonic()

    # --- current state -----------------------------------------------------------------------------

    def _scan(self) -> None:
        found = self._namespaces.scan()
        known = {namespace.found.inode: namespace for namespace in self._by_nsid.values()}
        now_s = time.monotonic()
        for inode, place in found.items():
            namespace = known.get(inode)
            if namespace is None:
                self._number(place)
                continue
            self._changed |= self._names.renew(namespace, place)
        # A known namespace that the scan did not find is kept by an open file, or its RTM_DELNSID is about to arrive.
        for namespace in list(self._by_nsid.values()):
            if not namespace.found.inode and namespace.searches < _SEARCHES and now_s > namespace.since_s + _SEARCH_S:
                self._search()
                break
        self._look_for_sharers()
        self._scan_at_s = now_s + self._names.pause_s(self._by_nsid.values(), self._rescan_interval_s)

    def _look_for_sharers(self) -> None:
        """Find the containers on the host's network among the processes of the last scan.

        At the first scan the host's namespace is not known yet, so that none is found.
        """
        self._changed |= self._names.look_for_sharers(self._namespaces.occupied.get(self.host_netns, ()))

    def _search(self) -> None:
        """Search open files and other mount namespaces for namespaces of which only the number is known."""
        nameless = {nsid for nsid, namespace in self._by_nsid.items() if not namespace.found.inode}
        for nsid in nameless:
            self._by_nsid[nsid].searches += 1
        known = {namespace.found.inode for namespace in self._by_nsid.values()}
        for inode, place in hidden().items():
            fd = open_netns(place) if inode not in known else None
            if fd is None:
                continue
            try:
                # None for a namespace without a number: this thread's own, or another observer's.
                nsid_or_none = self._queries.number_if_any(fd)
                cookie = self._cookie(fd)
            except OSError:
                continue
            finally:
                os.close(fd)
            if nsid_or_none is not None and nsid_or_none in nameless:
                self._add(nsid_or_none, place, cookie)

    def _number(self, place: Found) -> None:
        fd = open_netns(place)
        if fd is None:
            return  # the namespace has just died
        try:
            nsid = self._queries.number(fd)
            cookie = self._cookie(fd)
        except (OSError, NamespaceGone):
            return
        finally:
            os.close(fd)
        self._add(nsid, place, cookie)
        self._by_nsid[nsid].by_process = self._names.called_by_process(place.pid)

    def _ask_links(self) -> None:
        while self._dirty:
            self._changed = True
            nsid, ifindexes = self._dirty.popitem()
            namespace = self._by_nsid[nsid]
            before = set(namespace.links)
            try:
                if 0 in ifindexes or len(ifindexes) > _ONE_BY_ONE:
                    namespace.links = self._queries.links(nsid)
                else:
                    for ifindex in ifindexes:
                        link = self._queries.link(nsid, ifindex)
                        if link is None:
                            namespace.links.pop(ifindex, None)
                        else:
                            namespace.links[ifindex] = link
            except NamespaceGone:
                self._forget(nsid)
                continue
            # When a link moves to another namespace, its veth peer and the links stacked on it get no event.
            for ifindex in namespace.links.keys() - before:
                self._ask_peer(namespace, namespace.links[ifindex])
            gone = before - namespace.links.keys()
            if gone:
                self._ask_those_who_point_at(nsid, gone)

    def _ask_peer(self, namespace: _Namespace, link: Link) -> None:
        """Mark the veth peer of a new link as dirty, unless the peer is unknown or already points to the link."""
        peer_nsid = namespace.nsid if link.link_nsid is None else link.link_nsid
        other = self._by_nsid.get(peer_nsid)
        peer = other.links.get(link.link) if other and link.kind in PAIRS else None
        if peer is None:
            return
        if (peer_nsid if peer.link_nsid is None else peer.link_nsid, peer.link) != (namespace.nsid, link.ifindex):
            self._dirty.setdefault(peer_nsid, set()).add(peer.ifindex)

    def _ask_those_who_point_at(self, nsid: int, ifindexes: set[int]) -> None:
        for other in self._by_nsid.values():
            for link in other.links.values():
                if link.link in ifindexes and nsid == (other.nsid if link.link_nsid is None else link.link_nsid):
                    self._dirty.setdefault(other.nsid, set()).add(link.ifindex)

    def _ask_routes(self) -> None:
        while self._dirty_routes:
            self._changed = True
            namespace = self._by_nsid[self._dirty_routes.pop()]
            fd = open_netns(namespace.found) if namespace.found.inode else None
            if fd is None:
                continue
            try:
                with inside(fd, self._home_fd), RouteQueries() as routes:
                    namespace.default_routes = routes.default_routes()
            except PermissionError:
                pass  # a rootless container in another user namespace; no role depends on its routes
            finally:
                os.close(fd)

    # --- snapshot ----------------------------------------------------------------------------------

    def _devices(self) -> Snapshot:
        self._changed = False
        self._names.use()
        devices: list[Device] = []
        inodes = {namespace.nsid: namespace.inode for namespace in self._by_nsid.values()}
        built = {}
        for namespace in self._by_nsid.values():
            made_from: tuple[object, ...] = (namespace.inode, namespace.cookie, *self._names.of(namespace))
            made_from += (namespace.default_routes, *namespace.links.values())
            others = {link.link_nsid for link in namespace.links.values()}
            made_from += tuple(inodes.get(nsid, 0) for nsid in others if nsid is not None)
            last = self._built.get(namespace.serial)
            made = last[1] if last and last[0] == made_from else self._made(namespace, inodes)
            built[namespace.serial] = made_from, made
            devices += made
        self._built = built
        assigned = assign_roles(devices, self.host_netns, self._outer, self._remote_netns)
        return Snapshot(assigned, self._names.on_host_network())

    def _made(self, namespace: _Namespace, inodes: Mapping[int, int]) -> list[Device]:
        netns = namespace.inode
        named = self._names.of(namespace)
        devices = []
        for link in namespace.links.values():
            peer_netns = netns if link.link_nsid is None else inodes.get(link.link_nsid, 0)
            # A VXLAN device that was moved has no device below it, for which the kernel writes its own ifindex.
            moved = link.kind == "vxlan" and link.link_nsid is not None
            peer_ifindex = 0 if moved and link.link == link.ifindex else link.link
            peered = bool((peer_ifindex or moved) and peer_netns)
            devices.append(
                Device(
                    netns,
                    link.ifindex,
                    link.name,
                    link.kind,
                    peer_netns if peered else 0,
                    peer_ifindex if peered else 0,
                    link.master,
                    link.ifindex in namespace.default_routes,
                    named.netns_name,
                    named.container,
                    netns_cookie=namespace.cookie,
                    container_id=named.container_id,
                    pod_containers=named.pod_containers,
                )
            )
        return devices


class DeviceFollower(Follower):
    """Follows the devices of all network namespaces of this machine, by netlink.

    `host_netns` is the namespace that counts as the host: a name in /run/netns, a path, an inode, or None for that of
    process 1 (MACE's own, if process 1 is hidden). `outer` and `remote_netns` are as in
    `contracts.topology.assign_roles`. `docker_sockets` are the API sockets to query for container names; a missing
    socket is looked for again when a namespace appears. `pod_logs` is the kubelet's log folder, which has the names of
    pods, and `cri_sockets` are the runtimes to ask for pods that it does not have. A namespace with neither a
    mount nor a veth into a known namespace is found within `rescan_interval_s`, any other change within milliseconds.
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


def snapshot(
    *,
    host_netns: str | int | None = None,
    outer: Sequence[str] = (),
    remote_netns: Sequence[str] = (),
    docker_sockets: Sequence[str] = API_SOCKETS,
    pod_logs: str = LOG_FOLDER,
    cri_sockets: Sequence[str] = CRI_SOCKETS,
) -> Snapshot:
    """Return the current devices with their roles, sorted, and the containers on the host's network.

    The call blocks for some milliseconds. Raises `Unavailable`.
    """

    def look() -> Snapshot:
        watch = _Watch(host_netns, outer, remote_netns, docker_sockets, pod_logs=pod_logs, cri_sockets=cri_sockets)
        try:
            return watch.open()
        finally:
            watch.close()

    return _in_own_thread(look)


def _in_own_thread(work: Callable[[], Snapshot]) -> Snapshot:
    """Run `work` in a thread that ends afterwards: a thread that left its network namespace must not be reused."""
    done: Future[Snapshot] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as failure:  # noqa: BLE001 - raised by the caller
            done.set_exception(failure)

    thread = threading.Thread(target=run, name="mace-devices-snapshot", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def check(*, host_netns: str | int | None = None) -> Status:
    """Return whether devices can be followed here, with the numbers of devices and namespaces found."""
    try:
        devices = snapshot(host_netns=host_netns, docker_sockets=()).devices
    except Unavailable as failure:
        return Status(False, failure.why, failure.remedy)
    namespaces = {device.netns for device in devices}
    return Status(True, f"{len(devices)} devices in {len(namespaces)} network namespaces")
