"""What the container of a network namespace is called, and which containers have none of their own.

From the best source that knows it:

0. the lab, whose namespaces are called mace-LAB-NAME in /run/netns and whose containers NAME;
1. the Docker or Podman API, over its unix socket: the container's own name;
2. the namespace's name in /run/netns, unless a program has drawn it;
3. the control group of the namespace's first process: the first 12 digits of the container's id, as runtimes print it;
4. that process: `comm[pid]`.

The API is asked in a thread of its own, when a namespace without a name has come and, since containers can be renamed,
every few seconds while it names any: a daemon that hangs delays names, never a measurement.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from collector.machine.netns import inode_of
from collector.machine.unix_http import UnixConnection
from contracts.names import text_of

API_SOCKETS: Final = ("/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock")
YOUNG_S: Final = 2.0
"""For so long a process may still be a runtime's that is about to become something else."""
_API_TIMEOUT_S: Final = 2.0
_API_ANSWER_BYTES: Final = 64 << 20
"""An inspected container is about 10 kB, a list entry 1 kB: 64 MiB is no container host, but somebody's mistake."""
_ASK_AGAIN_S: Final = (0.05, 0.05, 0.1, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""A sandbox exists before its container has a process and so a name; after 6 s it is nobody's."""
_RENAMED_S: Final = 3.0
"""A daemon is asked so often whether the containers that it has named are still called so: a list, which takes it some
milliseconds even for hundreds of them. The stream of its events would tell at once, but is not the same everywhere, and
its end has to be found out by asking."""

_IN_CGROUP: Final = re.compile(
    r"(?:/|docker-|libpod-|crio-|cri-containerd-|containerd-|:)([0-9a-f]{64})(?:\.scope)?(?:/|$)", re.MULTILINE
)
_LXC_IN_CGROUP: Final = re.compile(r"/lxc(?:\.payload\.|/)([^/\n]+)")
_MACHINE_IN_CGROUP: Final = re.compile(
    r"/machine\.slice/(?:machine-|systemd-nspawn@)([^/\n]+?)(?:\.scope|\.service)?(?:/|$)", re.MULTILINE
)
SHORT_ID: Final = 12
"""Digits of an id that runtimes print."""
_APPTAINER: Final = re.compile(rb"(?:Apptainer|Singularity) runtime parent: ([^\0]+)")
"""How the process is called that waits for a container's end; the container itself is in nobody's control group."""
_SYSTEMD_ESCAPE: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")
"""unit_name_escape in systemd's unit-name.c. It spells `/` as `-` besides, but no machine's name has one."""
_MADE_UP: Final = re.compile(r"(?:cni|netns|cnitest)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Names in /run/netns that a program has drawn: Podman's and the CNI plugins'. Anything else names them better."""

_LABS: Final = Path("/run/mace/labs")
"""Where the lab keeps its state, LAB.json: without such a file `mace-x-y` is just somebody's name."""
_LAB_NETNS: Final = re.compile(r"mace-([a-z0-9-]+)-([a-z0-9]+)")


def name_in_lab(netns_name: str) -> str:
    """The container's name if a lab made the namespace, else ""."""
    made = _LAB_NETNS.fullmatch(netns_name)
    return made[2] if made and (_LABS / f"{made[1]}.json").exists() else ""


def is_made_up(netns_name: str) -> bool:
    """Whether a name in /run/netns was drawn by a runtime and says nothing."""
    return _MADE_UP.fullmatch(netns_name) is not None


class Called(NamedTuple):
    """What a container is called."""

    name: str
    container_id: str = ""
    """Its whole id, where its runtime gives one."""


NOBODY: Final = Called("")


def called_by_process(pid: int) -> Called:
    """The container's short id if the process's control group tells, else `comm[pid]`; `NOBODY` if it has ended."""
    try:
        cgroup = _cgroup_of(pid)
        named = name_in_cgroup(cgroup) or f"{text_of(Path(f'/proc/{pid}/comm').read_bytes().strip())}[{pid}]"
    except OSError:
        return NOBODY
    return Called(named, id_in_cgroup(cgroup))


def _cgroup_of(pid: int) -> str:
    return os.fsdecode(Path(f"/proc/{pid}/cgroup").read_bytes())


def name_in_cgroup(text: str) -> str:
    """The short id, or the name that LXC or systemd-machined (nspawn, libvirt) knows, "" if none, in the text of
    /proc/PID/cgroup as `os.fsdecode` makes it.
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
    """The whole id of the container, "" if there is none, in the text of /proc/PID/cgroup."""
    ids = _IN_CGROUP.findall(text)
    # The innermost: a container may run in a container.
    return str(ids[-1]) if ids else ""


class ApiError(Exception):
    """A container daemon did not answer, or not in a way that we understand."""


class ContainerApi:
    """The two questions that Docker and Podman answer alike (Docker Engine API v1.24 and later, unversioned paths)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._known: dict[str, tuple[int, int]] = {}
        self._connection: UnixConnection | None = None

    def running(self) -> list[tuple[int, Called]]:
        """Every container that runs, with the inode of the network namespace that it names. Raises `ApiError`.

        Only containers that are new, or whose process is no longer the one we know, are inspected. Those that share
        another's namespace (`--network container:...`, Podman's pods) leave it to its owner: theirs is 0.
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
                if not pid or inode_of(f"/proc/{pid}/ns/net") != inode:
                    inspected = self._get(connection, f"/containers/{quote(identity, safe='')}/json", deadline)
                    pid, inode = _namespace(inspected)
                    if _shares(inspected):
                        inode = 0
                if pid:
                    found.append((inode, Called(name or identity[:SHORT_ID], identity)))
                    known[identity] = (pid, inode)
            self._known = known
        except (OSError, http.client.HTTPException, ValueError, RecursionError, AttributeError) as failure:
            # AttributeError: interrupt() has taken the socket from under http.client.
            raise ApiError(f"{self._path}: {str(failure) or type(failure).__name__}") from failure
        else:
            return found
        finally:
            self._connection = None
            connection.close()

    def interrupt(self) -> None:
        """Make a `names` that is waiting in another thread fail."""
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
        response.close()  # read1 leaves that to us, and the connection is good for the next question only then
        if response.status == http.client.NOT_FOUND and path != "/containers/json":
            return {}  # gone since it was listed
        if response.status != http.client.OK:
            raise ApiError(f"{self._path}: {path}: HTTP {response.status} {response.reason}")
        return json.loads(body)


def _identity(entry: object) -> tuple[str, str]:
    """(id, name) of an entry of the list; raises `ApiError`."""
    if isinstance(entry, dict):
        identity, names = entry.get("Id"), entry.get("Names")
        if isinstance(identity, str) and identity:
            # "/web" is its own name; "/other/alias" is a link's.
            own = [n for n in names if isinstance(n, str) and n.count("/") <= 1] if isinstance(names, list) else []
            return identity, own[0].lstrip("/") if own else ""
    raise ApiError(f"expected a container with an Id, found {str(entry)[:80]}")


def _namespace(inspected: object) -> tuple[int, int]:
    """(pid, inode) of an inspected container, zeros while it has no process."""
    state = inspected.get("State") if isinstance(inspected, dict) else None
    pid = state.get("Pid") if isinstance(state, dict) else None
    if not isinstance(pid, int) or pid <= 0:
        return 0, 0
    return pid, inode_of(f"/proc/{pid}/ns/net") or 0


def _shares(inspected: object) -> bool:
    config = inspected.get("HostConfig") if isinstance(inspected, dict) else None
    mode = config.get("NetworkMode") if isinstance(config, dict) else None
    return isinstance(mode, str) and mode.startswith("container:")


class Sharing:
    """Which containers have processes in a network namespace that is not their own: the host's.

    With `--network host`, or as Apptainer does by default, a container has no device of its own. Each process is asked
    once, 20 µs, and again while it is young: a runtime's child becomes the container's process only then.
    """

    def __init__(self) -> None:
        self._own: Final = _container_of(os.getpid())
        self._asked: dict[int, tuple[float, Called]] = {}
        """Process → when it was first met, and the container that it is in."""

    def among(self, pids: Iterable[int], now_s: float) -> frozenset[Called]:
        """The containers of these processes, by what the processes tell; our own left out."""
        asked: dict[int, tuple[float, Called]] = {}
        for pid in pids:
            since_s, called = self._asked.get(pid, (now_s, NOBODY))
            if now_s - since_s < YOUNG_S:
                called = _container_of(pid)
            asked[pid] = since_s, called
        self._asked = asked
        return frozenset(called for _, called in asked.values()) - {NOBODY, self._own}


def _container_of(pid: int) -> Called:
    """The container that a process is in; `NOBODY` if it is in none, or has ended."""
    try:
        cgroup = _cgroup_of(pid)
        if named := name_in_cgroup(cgroup):
            return Called(named, id_in_cgroup(cgroup))
        apptainer = _APPTAINER.match(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return NOBODY
    return Called(f"{text_of(apptainer[1])}[{pid}]") if apptainer else NOBODY


class NameService:
    """Asks every API there is, in a thread, for as long as names are missing; then whether names changed.

    `want` says whose; `called` and `of_ids` are what is known (replaced, never changed); `on_change` is called in the
    thread when one of them is replaced.
    """

    def __init__(self, sockets: Sequence[str], on_change: Callable[[], None]) -> None:
        self._sockets = sockets
        self._on_change = on_change
        self._apis: dict[str, ContainerApi] = {}
        self._condition = threading.Condition()
        self._wanted: Mapping[int, int] = {}
        self._wanted_ids: frozenset[str] = frozenset()
        self._asked = threading.Event()
        self._fresh = False
        self._has_named = False
        """An API has given a name that was wanted: it knows containers, which can be renamed."""
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.called: Mapping[int, Called] = {}
        """By the inode of the container's network namespace."""
        self.of_ids: Mapping[str, str] = {}
        """By the container's id."""
        self.errors: Mapping[str, str] = {}
        """API socket → what is wrong with it, as of the last attempt."""

    @property
    def names(self) -> dict[int, str]:
        """By the inode of the container's network namespace, names alone."""
        return {inode: called.name for inode, called in self.called.items()}

    def want(self, wanted: Mapping[int, int], ids: frozenset[str] = frozenset()) -> None:
        """Namespaces to find names for, inode → a serial that tells namespaces with the same inode apart; and the ids
        of containers without a namespace of their own.

        A new one among them starts a new round of questions.
        """
        with self._condition:
            new, new_ids = wanted.items() - self._wanted.items(), ids - self._wanted_ids
            self._wanted, self._wanted_ids = wanted, ids
            if not new and not new_ids:
                return
            self.called = {inode: name for inode, name in self.called.items() if (inode, wanted.get(inode)) not in new}
            if self._live_sockets():
                self._asked.clear()
                if self._thread is None and not self._stopping:
                    self._thread = threading.Thread(target=self._run, name="mace-container-names", daemon=True)
                    self._thread.start()
                self._fresh = True
                self._condition.notify()

    def wait(self, timeout_s: float) -> None:
        """Until the APIs have been asked once since the last `want`, at most `timeout_s`; at once if there is none."""
        if self._thread is not None:
            self._asked.wait(timeout_s)

    def close(self) -> None:
        """Ends the thread, also one that waits for a daemon."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            # It may be about to connect just now: ask until it has heard.
            while self._thread.is_alive():
                for api in list(self._apis.values()):
                    api.interrupt()
                self._thread.join(0.05)

    def _live_sockets(self) -> list[str]:
        """Those that exist, each once: /var/run is /run nearly everywhere."""
        return list(dict.fromkeys(os.path.realpath(path) for path in self._sockets if os.path.exists(path)))  # noqa: PTH110

    def _run(self) -> None:
        attempt = 0
        while True:
            with self._condition:
                if not self._fresh and not self._stopping:
                    self._condition.wait(self._pause_s(attempt))
                if self._stopping:
                    return
                attempt = 0 if self._fresh else attempt + 1
                self._fresh = False
            self._ask()

    def _pause_s(self, attempt: int) -> float | None:
        """How long to wait before asking again without being told to; None: not at all."""
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
                running = self._apis.setdefault(path, ContainerApi(path)).running()
            except ApiError as failure:
                errors[path] = str(failure)
                # What it said before still holds for the containers that live.
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
