"""Names of the containers of network namespaces, and the containers without a namespace of their own.

The name is from the first of these origins that has one:

0. the lab, whose namespaces are called mace-LAB-NAME in /run/netns and whose containers NAME;
1. the Docker or Podman API, over its unix socket: the container's own name;
2. the namespace's name in /run/netns, unless a program generated it at random;
3. the control group of the namespace's first process: the first 12 digits of the container's id, as runtimes print it;
4. the title of the process by which Apptainer waits for its container's end, a parent of that first process: USER/NAME
   for an instance, `IMAGE[pid]` for any other container;
5. the name of that first process: `comm[pid]`.

A Kubernetes pod precedes 1 to 5 as NAMESPACE/POD, if its namespace has no name or a random one, its first process's
control group has the pod's UID, and the kubelet's log folder (`collector.machine.pods`) or a runtime's CRI socket
(`collector.machine.cri`) the pod's name. All containers of a pod are one container here, whose id is the pod's UID.

A thread of its own queries the API when a namespace without a name appears, and every few seconds while the API names
any container, because containers can be renamed. A daemon that hangs delays names, but never a measurement.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from collector.machine.asking import AskingThread
from collector.machine.netns import NetnsOf, netns_of
from collector.machine.pods import pod_uid_in_cgroup
from collector.machine.processes import parent
from collector.machine.unix_http import UnixConnection
from contracts.names import text_of

PROC: Final = Path("/proc")
API_SOCKETS: Final = ("/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock")
YOUNG_S: Final = 2.0
"""Age of a process up to which it may be a runtime's child that is still about to become the container's process, s."""
_API_TIMEOUT_S: Final = 2.0
_API_ANSWER_BYTES: Final = 64 << 20
"""Largest answer that is read. An inspected container takes about 10 kB, a list entry 1 kB: an answer of 64 MiB is no
list of containers."""
_ASK_AGAIN_S: Final = (0.05, 0.05, 0.1, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Pauses between queries for missing names: a sandbox exists before its container has a process, and so a name. After
some 6 s the namespace is considered to belong to no container."""
_RENAMED_S: Final = 3.0
"""Interval of queries for renamed containers: one list, which takes the daemon some milliseconds even for hundreds of
containers. The daemon's event stream would report a rename at once, but it differs between daemons, and its end can
only be detected by a query."""

_IN_CGROUP: Final = re.compile(
    r"(?:/|docker-|libpod-|crio-|cri-containerd-|containerd-|:)([0-9a-f]{64})(?:\.scope)?(?:/|$)", re.MULTILINE
)
_LXC_IN_CGROUP: Final = re.compile(r"/lxc(?:\.payload\.|/)([^/\n]+)")
_MACHINE_IN_CGROUP: Final = re.compile(
    r"/machine\.slice/(?:machine-|systemd-nspawn@)([^/\n]+?)(?:\.scope|\.service)?(?:/|$)", re.MULTILINE
)
SHORT_ID: Final = 12
"""Digits of a container's id that runtimes print."""
_APPTAINER: Final = re.compile(
    rb"(?:Apptainer|Singularity) (?:runtime parent: (?P<image>[^\0]+)|instance: (?P<user>[^\0]*) \[(?P<name>[^\0]+)\])"
)
"""Title of the process that waits, outside of an Apptainer container, for the container's end; Apptainer makes no
control group. A process that joins an instance has `runtime parent:` without an image."""
_MOST_PARENTS: Final = 64
"""Largest number of generations between a container's first process and Apptainer's that are looked at."""
_SYSTEMD_ESCAPE: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")
"""unit_name_escape in systemd's unit-name.c. It also spells `/` as `-`, but a machine's name contains no `/`."""
_MADE_UP: Final = re.compile(r"(?:(?:cni|netns|cnitest)-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Names in /run/netns that Podman, the CNI plugins and CRI-O generate at random. Any other name says more."""

_LABS: Final = Path("/run/mace/labs")
"""Directory of the lab's state, LAB.json. Without that file a namespace `mace-LAB-NAME` is not the lab's."""
_LAB_NETNS: Final = re.compile(r"mace-([a-z0-9-]+)-([a-z0-9]+)")


def name_in_lab(netns_name: str) -> str:
    """Return the container's name if a lab made the namespace, else ""."""
    made = _LAB_NETNS.fullmatch(netns_name)
    return made[2] if made and (_LABS / f"{made[1]}.json").exists() else ""


def is_made_up(netns_name: str) -> bool:
    """Return whether a runtime generated this name in /run/netns at random, so that it identifies nothing."""
    return _MADE_UP.fullmatch(netns_name) is not None


class Called(NamedTuple):
    """Name and id of a container."""

    name: str
    container_id: str = ""
    """The container's full id; "" if its runtime gives none."""
    is_pod: bool = False
    """Whether it is a Kubernetes pod, whose id is its UID."""


NOBODY: Final = Called("")


def called_by_process(pid: int, proc: Path = PROC) -> Called:
    """Name the container of a process: its short id if the control group has one, Apptainer's name, else `comm[pid]`.

    Returns `NOBODY` if the process has ended.
    """
    try:
        called = called_in_cgroup(_cgroup_of(pid, proc)) or _called_by_apptainer(pid, proc, _MOST_PARENTS)
        return called or Called(f"{text_of((proc / f'{pid}/comm').read_bytes().strip())}[{pid}]")
    except OSError:
        return NOBODY


def _cgroup_of(pid: int, proc: Path) -> str:
    return os.fsdecode((proc / f"{pid}/cgroup").read_bytes())


def called_in_cgroup(text: str) -> Called | None:
    """Return the pod or the container in the text of /proc/PID/cgroup; None if there is none."""
    if uid := pod_uid_in_cgroup(text):
        return Called(uid[:SHORT_ID], uid, is_pod=True)
    named = name_in_cgroup(text)
    return Called(named, id_in_cgroup(text)) if named else None


def name_in_cgroup(text: str) -> str:
    """Return the container's name in the text of /proc/PID/cgroup (decoded by `os.fsdecode`), "" if there is none.

    The name is the short id, or the name that LXC or systemd-machined (nspawn, libvirt) gave the container.
    """
    if identity := id_in_cgroup(text):
        return identity[:SHORT_ID]
    lxc = _LXC_IN_CGROUP.search(text)
    machine = _MACHINE_IN_CGROUP.search(text)
    if lxc:
        return text_of(os.fsencode(lxc[1]))
    if machine:
        return text_of(_SYSTEMD_ESCAPE.sub(lambda spelt: bytes([int(spelt[1], 16)]), os.fsencode(machine[1])))
    return ""


def id_in_cgroup(text: str) -> str:
    """Return the container's full id in the text of /proc/PID/cgroup, "" if there is none."""
    ids = _IN_CGROUP.findall(text)
    # The last id is that of the innermost container, if containers are nested.
    return str(ids[-1]) if ids else ""


class ApiError(Exception):
    """A container daemon did not answer, or its answer is not understood."""


class ContainerApi:
    """The two queries that Docker and Podman answer alike (Docker Engine API v1.24 and later, unversioned paths)."""

    def __init__(self, path: str, of_process: NetnsOf = netns_of) -> None:
        self._path = path
        self._of_process = of_process
        self._known: dict[str, tuple[int, int]] = {}
        self._connection: UnixConnection | None = None

    def running(self) -> list[tuple[int, Called]]:
        """Return (inode of its network namespace, name and id) of every running container; raises `ApiError`.

        Only new containers, and those whose process has changed, are inspected. The inode is 0 for a container that
        shares another container's namespace (`--network container:...`, Podman's pods): the namespace has the owner's
        name.
        """
        deadline = time.monotonic() + _API_TIMEOUT_S
        connection = self._connection = UnixConnection(self._path, _API_TIMEOUT_S)
        try:
            listed = self._get(connection, "/containers/json", deadline)
            if not isinstance(listed, list):
                raise ApiError(f"{self._path}: expected a list of containers, found {type(listed).__name__}")
            found: list[tuple[int, Called]] = []
            known: dict[str, tuple[int, int]] = {}
            for entry in listed:
                identity, name = _identity(entry)
                pid, inode = self._known.get(identity, (0, 0))
                if not pid or self._of_process(pid) != inode:
                    inspected = self._get(connection, f"/containers/{quote(identity, safe='')}/json", deadline)
                    pid = _pid(inspected)
                    inode = (self._of_process(pid) if pid else None) or 0
                    if _shares(inspected):
                        inode = 0
                if pid:
                    found.append((inode, Called(name or identity[:SHORT_ID], identity)))
                    known[identity] = (pid, inode)
            self._known = known
        except (OSError, http.client.HTTPException, ValueError, RecursionError, AttributeError) as failure:
            # AttributeError: interrupt() has shut down the socket while http.client was using it.
            raise ApiError(f"{self._path}: {str(failure) or type(failure).__name__}") from failure
        else:
            return found
        finally:
            self._connection = None
            connection.close()

    def interrupt(self) -> None:
        """Make `running` fail if it is waiting in another thread."""
        connection = self._connection
        sock = connection.sock if connection else None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected yet, or no longer

    def _get(self, connection: UnixConnection, path: str, deadline: float) -> Any:
        if time.monotonic() > deadline:
            raise ApiError(f"{self._path}: no complete answer within {_API_TIMEOUT_S:g} s")
        connection.request("GET", path)
        response = connection.getresponse()
        body = bytearray()
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > _API_ANSWER_BYTES or time.monotonic() > deadline:
                raise ApiError(f"{self._path}: {path}: no end of the answer after {len(body)} bytes")
        response.close()  # read1 does not close it, and only then can the connection be reused
        if response.status == http.client.NOT_FOUND and path != "/containers/json":
            return {}  # the container has ended since it was listed
        if response.status != http.client.OK:
            raise ApiError(f"{self._path}: {path}: HTTP {response.status} {response.reason}")
        return json.loads(body)


def _identity(entry: object) -> tuple[str, str]:
    """Return (id, name) of an entry in the list of containers; raises `ApiError`."""
    if isinstance(entry, dict):
        identity, names = entry.get("Id"), entry.get("Names")
        if isinstance(identity, str) and identity:
            # "/web" is the container's own name; "/other/alias" is the name of a link.
            own = [n for n in names if isinstance(n, str) and n.count("/") <= 1] if isinstance(names, list) else []
            return identity, own[0].lstrip("/") if own else ""
    raise ApiError(f"expected a container with an Id, found {str(entry)[:80]}")


def _pid(inspected: object) -> int:
    """Return the process of an inspected container, 0 while it has none."""
    state = inspected.get("State") if isinstance(inspected, dict) else None
    pid = state.get("Pid") if isinstance(state, dict) else None
    return pid if isinstance(pid, int) and pid > 0 else 0


def _shares(inspected: object) -> bool:
    config = inspected.get("HostConfig") if isinstance(inspected, dict) else None
    mode = config.get("NetworkMode") if isinstance(config, dict) else None
    return isinstance(mode, str) and mode.startswith("container:")


class Sharing:
    """Finds the containers whose processes are in the host's network namespace.

    With `--network host`, or by default in Apptainer, a container has no device of its own. Each process is examined
    once (20 µs), and again while it is young, because a runtime's child becomes the container's process only then.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc: Final = proc
        self._own: Final = _container_of(os.getpid(), proc)
        self._asked: dict[int, tuple[float, Called]] = {}
        """Process id → (time when the process was first seen, its container)."""

    def among(self, pids: Iterable[int], now_s: float) -> frozenset[Called]:
        """Return the containers of these processes, without the container in which MACE runs."""
        asked: dict[int, tuple[float, Called]] = {}
        for pid in pids:
            since_s, called = self._asked.get(pid, (now_s, NOBODY))
            if now_s - since_s < YOUNG_S:
                called = _container_of(pid, self._proc)
            asked[pid] = since_s, called
        self._asked = asked
        return frozenset(called for _, called in asked.values()) - {NOBODY, self._own}


def _container_of(pid: int, proc: Path) -> Called:
    """Return the container of a process; `NOBODY` if it is in none, or has ended."""
    try:
        # Apptainer's own process stays on the host's network. Its child is where the container is.
        return called_in_cgroup(_cgroup_of(pid, proc)) or _called_by_apptainer(pid, proc, 1) or NOBODY
    except OSError:
        return NOBODY


def _called_by_apptainer(pid: int, proc: Path, generations: int) -> Called | None:
    """Return the Apptainer container that one of the nearest parents of a process waits for; None if there is none."""
    for _ in range(generations):
        pid = parent(pid, proc)
        if pid <= 1:
            return None
        try:
            found = _APPTAINER.match((proc / f"{pid}/cmdline").read_bytes())
        except OSError:
            return None
        if found and found["image"]:
            return Called(f"{text_of(found['image'])}[{pid}]")
        if found:
            return Called(f"{text_of(found['user'])}/{text_of(found['name'])}")
    return None


class NameService(AskingThread):
    """Queries all container APIs: while names are missing, and then for renamed containers.

    `want` sets the namespaces and containers to name. `called` and `of_ids` hold the names found; both are replaced,
    never modified. `on_change` is called in the thread when one of them is replaced.
    """

    def __init__(self, sockets: Sequence[str], on_change: Callable[[], None], of_process: NetnsOf = netns_of) -> None:
        super().__init__("mace-container-names", on_change)
        self._sockets = sockets
        self._of_process = of_process
        self._apis: dict[str, ContainerApi] = {}
        self._wanted: Mapping[int, int] = {}
        self._wanted_ids: frozenset[str] = frozenset()
        self._has_named = False
        """Whether an API has named a container: then renames are possible."""
        self.called: Mapping[int, Called] = {}
        """Inode of a network namespace → name and id of its container."""
        self.of_ids: Mapping[str, str] = {}
        """Container id → name."""
        self.errors: Mapping[str, str] = {}
        """API socket → error of the last query."""

    @property
    def names(self) -> dict[int, str]:
        """Inode of a network namespace → name of its container."""
        return {inode: called.name for inode, called in self.called.items()}

    def want(self, wanted: Mapping[int, int], ids: frozenset[str] = frozenset()) -> None:
        """Set the namespaces and containers to name; new ones start a new round of queries.

        `wanted`: inode → a serial, which distinguishes successive namespaces with the same inode. `ids`: ids of
        containers without a namespace of their own.
        """
        with self._condition:
            new, new_ids = wanted.items() - self._wanted.items(), ids - self._wanted_ids
            self._wanted, self._wanted_ids = wanted, ids
            if not new and not new_ids:
                return
            self.called = {inode: name for inode, name in self.called.items() if (inode, wanted.get(inode)) not in new}
            if self._live_sockets():
                self._ask_for_new()

    def _interrupt(self) -> None:
        for api in list(self._apis.values()):
            api.interrupt()

    def _live_sockets(self) -> list[str]:
        """Return the sockets that exist, each once: /var/run is a link to /run nearly everywhere."""
        return list(dict.fromkeys(os.path.realpath(path) for path in self._sockets if os.path.exists(path)))  # noqa: PTH110

    def _pause_s(self, attempt: int) -> float | None:
        pauses = []
        if self._missing() and attempt < len(_ASK_AGAIN_S):
            pauses.append(_ASK_AGAIN_S[attempt])
        if self._has_named and (self._wanted or self._wanted_ids):
            pauses.append(_RENAMED_S)
        return min(pauses, default=None)

    def _missing(self) -> bool:
        return bool(self._wanted.keys() - self.called.keys() or self._wanted_ids - self.of_ids.keys())

    def _ask(self) -> None:
        names: dict[int, Called] = {}
        of_ids: dict[str, str] = {}
        errors: dict[str, str] = {}
        for path in self._live_sockets():
            try:
                running = self._apis.setdefault(path, ContainerApi(path, self._of_process)).running()
            except ApiError as failure:
                errors[path] = str(failure)
                # The daemon's previous answers still hold for living containers.
                names |= {inode: called for inode, called in self.called.items() if inode in self._wanted}
                of_ids |= self.of_ids
            else:
                names |= {inode: called for inode, called in running if inode}
                of_ids |= {called.container_id: called.name for _, called in running}
            if self._stopping:
                return
        of_ids = {identity: name for identity, name in of_ids.items() if identity in self._wanted_ids}
        changed = (names, of_ids) != (self.called, self.of_ids)
        self._has_named |= bool(names.keys() & self._wanted.keys() or of_ids)
        self.called, self.of_ids, self.errors = names, of_ids, errors
        self._asked.set()
        if changed:
            self._on_change()
