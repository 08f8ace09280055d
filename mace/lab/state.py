"""What labs there are: one file each, written before anything is created, so that nothing is ever left unknown.

    /run/mace/labs/NAME.json   what the lab is or was to be (an intent log: names stand in it before they exist)
    /run/mace/labs/NAME.lock   flock: held while a lab is made, changed or removed
    /run/mace/labs/NAME.d/     files of the lab: the Docker daemon's data, namespace handles

Which processes belong to a lab is not in the file: every process the lab starts carries `MACE_LAB_ID=<id>` in its
environment, and so do their children. That also finds a process whose parent was killed before it could
write down the number, and a recycled number never matches. Only the owner, whose environment is not ours to
change, is known by number and start time.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from collector.machine.kernel import boot_id
from collector.machine.processes import start_ticks, stat_fields
from contracts.errors import LabError, MaceError
from mace.lab.netns import search_path
from mace.lab.plan import Runtime, Spec

STATE_DIR: Final = Path("/run/mace/labs")
VERSION: Final = 1
ID_VARIABLE: Final = "MACE_LAB_ID"
MEMBER_VARIABLE: Final = "MACE_LAB_MEMBER"
LOCK_LIMIT_S: Final = 60.0
"""Longer than any set-up (a Docker daemon's start is given 20 s)."""
_PF_KTHREAD: Final = 0x0020_0000
"""Bit of field 9 of /proc/PID/stat (include/linux/sched.h)."""
_LOOKS: Final = 10

STARTING: Final = "starting"
UP: Final = "up"
STOPPING: Final = "stopping"


@dataclass(frozen=True, slots=True)
class Process:
    """A process for certain: a number alone may come to mean another one."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks since boot."""

    def alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks


@dataclass(slots=True)
class Member:
    """A network namespace of the lab: the host, the remote or a container."""

    path: str
    """Where the namespace is (to be) mounted."""
    inode: int = 0
    """0: not made yet."""
    slot: int = -1
    """Containers: the place that its addresses follow from."""
    ipv4: str = ""
    ipv6: str = ""
    docker_id: str = ""


@dataclass(slots=True)
class State:
    """What the state file holds."""

    spec: Spec
    id: str = field(default_factory=lambda: uuid4().hex)
    boot_id: str = field(default_factory=boot_id)
    phase: str = STARTING
    owner: Process | None = None
    """The process without which the lab is a leftover; None for a lab that stays until it is taken down."""
    members: dict[str, Member] = field(default_factory=dict)
    docker_socket: str = ""
    daemon: Process | None = None
    """The Docker daemon, without which the lab is broken."""
    made_directories: list[str] = field(default_factory=list)
    """Outside `directory`; removed if empty."""

    @property
    def directory(self) -> Path:
        return STATE_DIR / f"{self.spec.name}.d"

    def environment(self, member: str = "") -> dict[str, str]:
        """Environment for the processes of the lab. `LC_ALL=C` because output is read; PATH with sbin.

        The member counts where a container is removed, and not the namespace that a process is in: one that has just
        been started is not in it yet.
        """
        return {
            **os.environ,
            "PATH": search_path(),
            "LC_ALL": "C",
            ID_VARIABLE: self.id,
            MEMBER_VARIABLE: member,
        }

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
    """The state of a lab; None if there is none. Raises `LabError` for a file that says nothing sensible."""
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
        spec = Spec(**{**raw["spec"], "runtime": Runtime(raw["spec"]["runtime"])})
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
            made_directories=raw["made_directories"],
        )
    except MaceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(f"{path}: not the state of a lab ({error!r})") from error


def names() -> list[str]:
    """Labs that have a state file or a directory."""
    if not STATE_DIR.is_dir():
        return []
    return sorted({p.stem for p in STATE_DIR.iterdir() if p.suffix in (".json", ".d")})


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of lab `name`, made and changed by one process at a time. Raises `LabError` after a minute."""
    STATE_DIR.mkdir(parents=True, exist_ok=True)
    path = STATE_DIR / f"{name}.lock"
    deadline = time.monotonic() + LOCK_LIMIT_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have removed the file: then ours is a lock that nobody else sees.
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
    """Remove the lock file of a lab that is none: its maker was killed before the first word."""
    if (STATE_DIR / f"{name}.lock").exists():
        with locked(name):  # removes it at the end
            pass


def this_process() -> Process:
    """Ourselves, for others to look at."""
    return Process(os.getpid(), start_ticks(os.getpid()))


def processes(lab_id: str, member: str = "") -> list[int]:
    """Processes that carry the lab's id (and the member's name) in their environment.

    Never ourselves nor those we descend from.
    """
    marks = _marks(lab_id, member)
    spared = _ancestry()
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    environments = {pid: _environment(pid) for pid in numbers if pid not in spared}
    # Amid execve a process has no environment to show for some 100 us, and that is just when Popen returns. Those that
    # have none for good (`env -i`) are few.
    for _ in range(_LOOKS):
        blank = [pid for pid, found in environments.items() if not found and _in_user_space(pid)]
        if not blank:
            break
        time.sleep(0.001)
        environments |= {pid: _environment(pid) for pid in blank}
    return [pid for pid, found in environments.items() if marks <= found]


def is_locked(name: str) -> bool:
    """Whether a process is changing the lab right now."""
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
    """End all processes of a lab, or only a member's, and wait until they are gone. Raises `LabError`.

    SIGKILL: what they leave behind is removed from outside anyway, and must be, for a run that was itself killed.
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
                # Looked at again, now that the number cannot come to mean another process.
                if marks <= _environment(pid):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    select.select([fd], [], [], 1.0)
            except ProcessLookupError:
                pass
            finally:
                os.close(fd)
        if time.monotonic() > deadline:
            raise LabError(f"processes {found} do not end")


def _marks(lab_id: str, member: str) -> set[bytes]:
    values = {ID_VARIABLE: lab_id} | ({MEMBER_VARIABLE: member} if member else {})
    return {f"{key}={value}".encode() for key, value in values.items()}


def _environment(pid: int) -> set[bytes]:
    """`KEY=value` of a process; empty for one that has ended or belongs to the kernel."""
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
