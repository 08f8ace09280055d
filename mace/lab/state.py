"""The state files of labs: one for each lab, written before anything is created, so that a clean-up finds everything.

    /run/mace/labs/NAME.json   what the lab has or was going to have (an intent log: names are written first)
    /run/mace/labs/NAME.lock   flock: held while a lab is made, changed or removed
    /run/mace/labs/NAME.d/     files of the lab: the Docker daemon's data, namespace handles, CNI results

The file does not list the lab's processes: every process that a lab starts has `MACE_LAB_ID=<id>` in its environment,
and its children inherit it. A clean-up therefore finds a process whose parent was killed before it could write the
pid, and never matches a reused pid. Only the owner, whose environment the lab cannot change, is identified by pid and
start time.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from collector.machine.kernel import boot_id
from collector.machine.processes import start_ticks, stat_fields
from contracts.errors import LabError, MaceError
from mace.lab.netns import search_path
from mace.lab.plan import FarEnd, Layout, Runtime, Spec

STATE_DIR: Final = Path("/run/mace/labs")
VERSION: Final = 1
ID_VARIABLE: Final = "MACE_LAB_ID"
MEMBER_VARIABLE: Final = "MACE_LAB_MEMBER"
LOCK_LIMIT_S: Final = 60.0
"""Longer than any set-up: a Docker daemon has 30 s to start (`mace.lab.docker.READY_LIMIT_S`)."""
_PF_KTHREAD: Final = 0x0020_0000
"""Bit of field 9 of /proc/PID/stat (include/linux/sched.h)."""
_LOOKS: Final = 10

STARTING: Final = "starting"
UP: Final = "up"
STOPPING: Final = "stopping"


@dataclass(frozen=True, slots=True)
class Process:
    """A process, identified by pid and start time, because a pid can be reused."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks since boot."""

    def alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """The virtual machine of a lab's far end."""

    process: Process
    accelerator: str
    """`kvm`, or `tcg` for an emulated CPU."""
    release: str
    """Of its kernel."""


@dataclass(slots=True)
class Member:
    """A network namespace of the lab: the host, the remote or a container."""

    path: str
    """Path at which the namespace is or will be mounted."""
    inode: int = 0
    """Inode of the namespace; 0 before it is made."""
    slot: int = -1
    """A container's slot, from which its addresses follow; -1 for the host and the remote."""
    ipv4: str = ""
    ipv6: str = ""
    docker_id: str = ""
    sandbox_id: str = ""
    """Id of a pod's sandbox in containerd; `docker_id` is then that of its container."""
    cni_id: str = ""
    """Id under which the container is in the lab's CNI network; "" if it is in none."""


@dataclass(slots=True)
class State:
    """The content of a lab's state file."""

    spec: Spec
    id: str = field(default_factory=lambda: uuid4().hex)
    boot_id: str = field(default_factory=boot_id)
    phase: str = STARTING
    owner: Process | None = None
    """The process whose end makes the lab a leftover; None for a lab that stays until `down`."""
    members: dict[str, Member] = field(default_factory=dict)
    docker_socket: str = ""
    daemon: Process | None = None
    """The Docker daemon; its end makes the lab broken."""
    guest: GuestProcess | None = None
    """The far end's virtual machine; its end makes the lab broken."""
    cni_path: str = ""
    """Directories of the CNI plugins, with colons between them."""
    made_directories: list[str] = field(default_factory=list)
    """Directories outside `directory` that a lab has made, and that the last lab removes if they are empty."""

    @property
    def directory(self) -> Path:
        return STATE_DIR / f"{self.spec.name}.d"

    def environment(self, member: str = "") -> dict[str, str]:
        """Return the environment for a process of the lab, or of one member. `LC_ALL=C`, because output is parsed.

        The removal of a container ends the processes with the member's name in their environment. Their namespaces
        would not do: a process that has just been started has not entered the container's namespace yet.
        """
        return {
            **os.environ,
            "PATH": search_path(),
            "LC_ALL": "C",
            **self.marks(member),
        }

    def marks(self, member: str) -> dict[str, str]:
        """Return the variables by which a clean-up recognises a process of the lab, or of one member."""
        return {ID_VARIABLE: self.id, MEMBER_VARIABLE: member}

    def save(self) -> None:
        path = _file(self.spec.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".json.new")
        draft.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        draft.rename(path)

    def forget(self) -> None:
        _file(self.spec.name).unlink(missing_ok=True)
        _file(self.spec.name).with_suffix(".json.new").unlink(missing_ok=True)


def load(name: str) -> State | None:
    """Return the state of a lab; None without a state file. Raises `LabError` if the file is damaged."""
    path = _file(name)
    try:
        raw: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LabError(f"{path}: {error}") from error
    try:
        if raw["version"] != VERSION:
            raise LabError(f"{path}: version {raw['version']}, expected {VERSION}; use the MACE that made it")
        told = raw["spec"]
        # Older files have neither.
        far_end, layout = FarEnd(told.get("far_end", FarEnd.NAMESPACE)), Layout(told.get("layout", Layout.BRIDGE))
        rps = tuple(told.get("rps", ()))
        spec = Spec(**{**told, "rps": rps, "runtime": Runtime(told["runtime"]), "far_end": far_end, "layout": layout})
        if spec.name != name or not re.fullmatch(r"[0-9a-f]{32}", raw["id"]):
            raise LabError(f"{path}: expected the state of lab {name!r}")
        return State(
            spec=spec,
            id=raw["id"],
            boot_id=raw["boot_id"],
            phase=raw["phase"],
            owner=Process(**raw["owner"]) if raw["owner"] else None,
            members={member: Member(**values) for member, values in raw["members"].items()},
            docker_socket=raw["docker_socket"],
            daemon=Process(**raw["daemon"]) if raw["daemon"] else None,
            guest=_guest(raw["guest"]) if raw.get("guest") else None,
            cni_path=raw.get("cni_path", ""),  # older files have none
            made_directories=raw["made_directories"],
        )
    except MaceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(f"{path}: not the state of a lab ({error!r})") from error


def _guest(raw: Mapping[str, Any]) -> GuestProcess:
    return GuestProcess(Process(**raw["process"]), raw["accelerator"], raw["release"])


def names() -> list[str]:
    """Return the names of labs that have a state file or a directory."""
    if not STATE_DIR.is_dir():
        return []
    return sorted({p.stem for p in STATE_DIR.iterdir() if p.suffix in (".json", ".d")})


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of lab `name`, so that one process at a time changes it. Raises `LabError` after `LOCK_LIMIT_S`."""
    STATE_DIR.mkdir(parents=True, exist_ok=True)
    path = STATE_DIR / f"{name}.lock"
    deadline = time.monotonic() + LOCK_LIMIT_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file; our lock on the removed file excludes nobody.
            if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
                break
        except OSError:
            pass
        os.close(fd)
        if time.monotonic() > deadline:
            raise LabError(f"lab {name!r}: another process has been changing it for {LOCK_LIMIT_S:.0f} s ({path})")
        time.sleep(0.01)
    try:
        yield
    finally:
        if not _file(name).exists():
            path.unlink(missing_ok=True)
        os.close(fd)


def tidy(name: str) -> None:
    """Remove the lock file of a lab whose maker was killed before it wrote a state file."""
    if (STATE_DIR / f"{name}.lock").exists():
        with locked(name):  # removes it at the end
            pass


def this_process() -> Process:
    """Return this process, identified by pid and start time."""
    return Process(os.getpid(), start_ticks(os.getpid()))


def processes(lab_id: str, member: str = "") -> list[int]:
    """Return the pids of processes that have the lab's id (and the member's name) in their environment.

    This process and its ancestors are never among them.
    """
    marks = _marks(lab_id, member)
    spared = _ancestry()
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    environments = {pid: _environment(pid) for pid in numbers if pid not in spared}
    # During execve, which is when Popen returns, a process shows no environment for some 100 us. Look at those without
    # one again; few processes never have any (`env -i`).
    for _ in range(_LOOKS):
        blank = [pid for pid, found in environments.items() if not found and _in_user_space(pid)]
        if not blank:
            break
        time.sleep(0.001)
        environments |= {pid: _environment(pid) for pid in blank}
    return [pid for pid, found in environments.items() if marks <= found]


def is_locked(name: str) -> bool:
    """Return whether a process is changing the lab now."""
    try:
        fd = os.open(STATE_DIR / f"{name}.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def kill(lab_id: str, member: str = "", limit_s: float = 10.0) -> None:
    """End all processes of a lab, or of one member, with SIGKILL, and wait until they are gone. Raises `LabError`.

    SIGTERM would gain nothing: the clean-up has to remove what they leave behind anyway, for runs that were killed.
    """
    marks = _marks(lab_id, member)
    deadline = time.monotonic() + limit_s
    while found := processes(lab_id, member):
        for pid in found:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                # Check again: with the pidfd open, the pid cannot be reused.
                if marks <= _environment(pid):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    select.select([fd], [], [], 1.0)
            except ProcessLookupError:
                pass
            finally:
                os.close(fd)
        if time.monotonic() > deadline:
            raise LabError(f"processes {found} did not end within {limit_s:g} s after SIGKILL")


def _marks(lab_id: str, member: str) -> set[bytes]:
    values = {ID_VARIABLE: lab_id} | ({MEMBER_VARIABLE: member} if member else {})
    return {f"{key}={value}".encode() for key, value in values.items()}


def _environment(pid: int) -> set[bytes]:
    """Return the `KEY=value` entries of a process's environment; empty for an ended process or a kernel thread."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")) - {b""}
    except OSError:
        return set()


def _in_user_space(pid: int) -> bool:
    fields = stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX" and not int(fields[6]) & _PF_KTHREAD


def _ancestry() -> set[int]:
    chain = {0}
    pid = os.getpid()
    while pid not in chain:
        chain.add(pid)
        fields = stat_fields(pid)
        pid = int(fields[1]) if fields else 0
    return chain


def _file(name: str) -> Path:
    return STATE_DIR / f"{name}.json"
