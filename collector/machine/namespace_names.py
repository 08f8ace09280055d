"""Names of network namespaces and of their containers, for the watches of devices.

`collector.machine.containers` says from where a container's name is; this module asks for names when namespaces appear
or get processes, and decides which of several names holds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from collector.machine.containers import (
    NOBODY,
    PROC,
    YOUNG_S,
    Called,
    NameService,
    Sharing,
    called_by_process,
    is_made_up,
    name_in_lab,
)
from collector.machine.cri import CRI_SOCKETS, RuntimePods
from collector.machine.netns import Found, NetnsOf, netns_of
from collector.machine.pods import LOG_FOLDER, Pod, PodLogs
from contracts.errors import Unavailable, nearest
from contracts.topology import Sharer, newest_names

_FIRST_PAUSE_S: Final = 0.05
"""Pause before the first scan for the process of a new namespace, s."""
_OF_PROCESS: Final = re.compile(r"/proc/(\d+)/ns/net")


class Namespace(Protocol):
    """What a watch knows of a network namespace."""

    serial: int
    """Unique over the run; the kernel reuses inodes."""
    found: Found
    since_s: float
    """Time (CLOCK_MONOTONIC) when the watch first saw the namespace, s."""
    by_process: Called
    """Container of the namespace's first process."""

    @property
    def inode(self) -> int: ...


class Named(NamedTuple):
    """The names of a namespace, as in `contracts.topology.Device`."""

    netns_name: str
    container: str = ""
    container_id: str = ""
    pod_containers: str = ""


class NamespaceNames:
    """Names of the namespaces of one watch, and the containers on the host's network.

    `wake` is called, from another thread, when a container API has named something. `of_process` returns the inode of a
    process's namespace. `pod_logs` is the kubelet's log folder, `cri_sockets` are the runtimes to ask for pods that it
    does not have, `proc` is the directory of processes.
    """

    def __init__(
        self,
        docker_sockets: Sequence[str],
        wake: Callable[[], None],
        of_process: NetnsOf = netns_of,
        *,
        pod_logs: str = LOG_FOLDER,
        cri_sockets: Sequence[str] = CRI_SOCKETS,
        proc: Path = PROC,
    ) -> None:
        self.host_netns = 0
        """Inode of the host's namespace; 0 until the watch knows it."""
        self.init_netns = 0
        """Inode of the namespace that is the host's unless the user names another."""
        self._of_process = of_process
        self._service = NameService(docker_sockets, wake, of_process)
        self._used: tuple[Mapping[int, Called], Mapping[str, str]] = {}, {}
        self._ids_by_api: set[str] = set()
        self._pods = PodLogs(pod_logs)
        self._runtime_pods = RuntimePods(cri_sockets, wake)
        self._pods_found: tuple[Mapping[str, Pod], Mapping[str, Pod]] = {}, {}
        self._pods_used: Mapping[str, Pod] = {}
        self._proc = proc
        self._sharing = Sharing(proc)
        self._sharers: frozenset[Called] = frozenset()
        """Containers on the host's network, found by their processes."""

    def close(self) -> None:
        """Stop asking."""
        self._service.close()
        self._runtime_pods.close()

    # --- asking -------------------------------------------------------------------------------------

    def ask(self, namespaces: Iterable[Namespace]) -> None:
        """Ask the container APIs, and the log folder of pods, for the names that these namespaces lack."""
        here = tuple(namespaces)
        called = [*(namespace.by_process for namespace in here), *self._sharers]
        uids = frozenset(one.container_id for one in called if one.is_pod)
        self._pods.look(uids)
        self._runtime_pods.want(uids - self._pods.pods.keys())
        self._service.want(
            {
                namespace.inode: namespace.serial
                for namespace in here
                if namespace.inode not in (self.host_netns, self.init_netns)
                and (not namespace.found.name or is_made_up(namespace.found.name))
            },
            frozenset(one.container_id for one in self._sharers if one.container_id and not one.is_pod),
        )

    def wait(self, timeout_s: float) -> None:
        """Wait until the APIs have answered the last `ask`, at most `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        self._service.wait(timeout_s)
        self._runtime_pods.wait(max(end_s - time.monotonic(), 0))

    def pause_s(self, namespaces: Iterable[Namespace], interval_s: float) -> float:
        """Return the pause until the next scan for processes: `interval_s`, or less after a namespace has appeared.

        A runtime makes a pod's namespace before the pod's first process, whose name the first packets should have. The
        pause doubles from 50 ms on, so that a namespace costs a few more scans.
        """
        now_s = time.monotonic()
        ages_s = [
            now_s - namespace.since_s
            for namespace in namespaces
            if not namespace.found.pid and (not namespace.found.name or is_made_up(namespace.found.name))
        ]
        return min(interval_s, max(_FIRST_PAUSE_S, min(ages_s, default=interval_s)))

    def renew(self, namespace: Namespace, place: Found) -> bool:
        """Replace what is known of a namespace by a scan's finding; return whether its names may have changed."""
        changed = place.name != namespace.found.name
        if place.pid != namespace.found.pid or time.monotonic() - namespace.since_s < YOUNG_S:
            called = self.called_by_process(place.pid)
            changed |= called not in (NOBODY, namespace.by_process)
            namespace.by_process = namespace.by_process if called is NOBODY else called
        namespace.found = place
        return changed

    def called_by_process(self, pid: int) -> Called:
        """Name the container of a process; `NOBODY` for process 0, and if the process has ended."""
        return called_by_process(pid, self._proc) if pid else NOBODY

    def look_for_sharers(self, pids: Iterable[int]) -> bool:
        """Look for containers among the processes of the host's namespace; return whether they have changed."""
        found = self._sharing.among(pids, time.monotonic())
        changed, self._sharers = found != self._sharers, found
        return changed

    def find_host(self, asked: str | int | None, namespaces: Iterable[Namespace]) -> int:
        """Return the inode of the host's namespace, which a user gives by name, path or inode; raises `Unavailable`."""
        if asked is None:
            if not self.init_netns:
                raise Unavailable(
                    "devices", "neither the network namespace of process 1 nor MACE's own can be read in /proc"
                )
            return self.init_netns
        known = list(namespaces)
        names = {namespace.found.name: namespace.inode for namespace in known if namespace.found.name}
        if isinstance(asked, str):
            if asked in names:
                return names[asked]
            try:
                inode = int(asked) if asked.isdigit() else self._inode_of(asked)
            except OSError as failure:
                raise Unavailable(
                    "devices",
                    f"no network namespace {asked!r}{nearest(asked, names)}",
                    "give a name that `ip netns list` shows, a path or an inode number",
                ) from failure
        else:
            inode = asked
        if inode not in {namespace.inode for namespace in known}:
            raise Unavailable(
                "devices", f"no network namespace has inode {inode} (asked for: {asked!r})", "`lsns -t net` lists them"
            )
        return inode

    def _inode_of(self, path: str) -> int:
        of_process = _OF_PROCESS.fullmatch(path)
        inode = self._of_process(int(of_process[1])) if of_process else None
        return Path(path).stat().st_ino if inode is None else inode

    # --- names --------------------------------------------------------------------------------------

    @property
    def outdated(self) -> bool:
        """Whether the APIs or the log folder have named something since the last `use`."""
        called, of_ids = self._used
        by_api = self._service.called is not called or self._service.of_ids is not of_ids
        logs, runtimes = self._pods_found
        return by_api or self._pods.pods is not logs or self._runtime_pods.pods is not runtimes

    def use(self) -> None:
        """Let `of` and `on_host_network` return the newest names until the next call."""
        self._used = self._service.called, self._service.of_ids
        self._pods_found = self._pods.pods, self._runtime_pods.pods
        self._pods_used = {**self._pods_found[1], **self._pods_found[0]}
        self._ids_by_api = {called.container_id for called in self._used[0].values()}

    def of(self, namespace: Namespace) -> Named:
        """Return the names of a namespace."""
        inode, name = namespace.inode, namespace.found.name
        if inode == self.host_netns:
            return Named("host")
        if inode == self.init_netns:
            return Named(name or "init")
        # A namespace without a name is written in the kernel's own notation.
        netns_name = name or f"net:[{inode}]"
        own_name = name_in_lab(name) or ("" if is_made_up(name) else name)
        # A namespace with a name of its own is none that a runtime made for a pod: network agents make such ones.
        pod = self._pods_used.get(namespace.by_process.container_id) if not own_name else None
        if pod is not None:
            return Named(netns_name, pod.name, namespace.by_process.container_id, pod.containers)
        by_api = self._used[0].get(inode, NOBODY)
        # The runtime's name goes with the runtime's id. A namespace that was made inside a container has processes of
        # that container too, but a rename of the container does not concern it.
        if by_api is not NOBODY and not name_in_lab(name):
            return Named(netns_name, by_api.name, by_api.container_id)
        if own_name:
            return Named(netns_name, own_name)
        named, container_id, _ = namespace.by_process
        return Named(netns_name, named or name, "" if container_id in self._ids_by_api else container_id)

    def on_host_network(self) -> tuple[Sharer, ...]:
        """Return the containers that share the host's network namespace."""
        names = {**self._used[1], **{uid: pod.name for uid, pod in self._pods_used.items()}}
        return newest_names(Sharer(names.get(one.container_id, one.name), one.container_id) for one in self._sharers)
