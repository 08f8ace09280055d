"""What the container runtimes of a lab have in common: a process that holds their mounts, control groups, a clean-up.

A runtime that the machine has is neither used nor touched. The lab's own runs in a mount namespace of its own, in which
tmpfs mounts cover the few paths that are fixed in its code; the lab's *holder* is the process that made this namespace:
a daemon, or a process that sleeps. All mounts therefore end with the lab's processes, and the clean-up after a kill
ends the processes, removes the control groups and removes the directory. Processes that carry no mark of the lab in
their environment (`runc init`, Apptainer's) are found in the lab's control groups.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from collector.machine.processes import start_ticks
from contracts.errors import LabError
from mace.lab import netns, state
from mace.lab.plan import HOST, Runtime
from mace.lab.state import Process, State

_CGROUPS: Final = Path("/sys/fs/cgroup")
_COVER: Final = 'for path in {covered}; do mount -t tmpfs -o mode=700 tmpfs "$path" || exit 1; done\n'
_JOIN: Final = 'echo $$ >"$0/cgroup.procs" && exec "$@"'

_started: Final[dict[int, subprocess.Popen[bytes]]] = {}
"""Holders that are children of this process, by pid; this process has to reap them."""


def cgroup_parent(lab: str) -> str:
    """Return the name of the cgroup above the lab's containers, at the top of every hierarchy."""
    return f"mace-lab-{lab}"


def directories_to_make(lab: str, covered: tuple[str, ...]) -> list[str]:
    """Return the covered directories that are missing on this machine, or that another lab has made.

    The runtime would have made them on the machine. The holders' mount namespaces need them as mount points, and the
    last lab removes them.
    """
    made = {path for other in _others(lab) for path in other.made_directories}
    return [path for path in covered if path in made or not Path(path).is_dir()]


def _others(lab: str) -> list[State]:
    """Return the other labs that have a holder."""
    found = []
    for name in state.names():
        with suppress(LabError):  # a damaged state file names no holder
            other = state.load(name)
            if name != lab and other is not None and other.spec.runtime is not Runtime.NETNS:
                found.append(other)
    return found


def hold(
    record: State, covered: tuple[str, ...], script: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start the lab's holder in the lab's host namespace, and note it in `record`.

    The holder is a shell that covers the paths and runs `script`, whose `$0` is the lab's directory.
    """
    for path in covered:
        Path(path).mkdir(mode=0o711, parents=True, exist_ok=True)
    holder = subprocess.Popen(
        netns.enter_command(
            Path(record.members[HOST].path),
            [
                *("unshare", "--mount", "--propagation", "slave"),
                *("sh", "-c", _COVER.format(covered=" ".join(covered)) + script, str(record.directory)),
            ],
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**record.environment(), **(env or {})},
        start_new_session=True,
    )
    _started[holder.pid] = holder
    record.daemon = Process(holder.pid, start_ticks(holder.pid))
    record.save()
    return holder


def make_cgroup(lab: str) -> Path:
    """Make the lab's control group in one hierarchy, if it is not there, and return it. Raises `LabError`."""
    # Version 2, or a hierarchy of version 1 whose groups need no set-up.
    for top in (_CGROUPS, *(_CGROUPS / name for name in ("unified", "pids", "freezer", "systemd"))):
        group = top / cgroup_parent(lab)
        with suppress(OSError):
            if (top / "cgroup.procs").exists():
                group.mkdir(exist_ok=True)
                return group
    raise LabError(f"no control group can be made in {_CGROUPS}")


def in_cgroup(group: Path, argv: list[str]) -> list[str]:
    """Return the command line that runs `argv` in a control group."""
    return ["sh", "-c", _JOIN, str(group), *argv]


def in_mounts(record: State, argv: list[str]) -> list[str]:
    """Return the command line that runs `argv` in the holder's mount namespace and the lab's host namespace."""
    assert record.daemon is not None
    place = f"--mount=/proc/{record.daemon.pid}/ns/mnt"
    return ["nsenter", place, f"--net={record.members[HOST].path}", "--", *argv]


def handle(record: State, name: str) -> Path:
    """Return the path at which a container's network namespace is mounted.

    It is not in /run/netns, because runtimes put no names there that say anything: MACE must find these containers as
    it finds any others.
    """
    return record.directory / f"netns-{name}"


def clean(record: State, limit_s: float = 5.0) -> None:
    """Remove the lab's namespace handles, directory and cgroups after its processes have ended. Raises `LabError`."""
    if record.daemon is not None and (child := _started.pop(record.daemon.pid, None)) is not None:
        child.wait()
    directory = record.directory
    if directory.is_dir():
        for path in directory.glob("netns-*"):
            netns.remove(path)
    deadline = time.monotonic() + limit_s
    while left := _left(record):
        for path in left:
            if _CGROUPS in path.parents:
                _end_processes(path)
            _remove_tree(path)
        if time.monotonic() > deadline:
            raise LabError(f"cannot remove {', '.join(map(str, left))}")
        time.sleep(0.01)  # the kernel empties cgroups after the end of their processes
    # Removing a directory also unmounts it in every mount namespace, so it stays while another lab's daemon runs.
    if not _others(record.spec.name):
        for made in record.made_directories:
            _try_rmdir(Path(made))


def _left(record: State) -> list[Path]:
    name = cgroup_parent(record.spec.name)
    places = [record.directory, _CGROUPS / name, *_CGROUPS.glob(f"*/{name}")]
    return [path for path in places if path.is_dir()]


def _end_processes(cgroup: Path) -> None:
    """Kill the processes of a cgroup and those below, also if runc was killed between freezing and thawing them."""
    for inside in (cgroup, *cgroup.rglob("*/")):
        for control, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            with suppress(OSError):  # no such control in this hierarchy, or the cgroup has just gone
                (inside / control).write_text(thawed)
        with suppress(OSError):
            for line in (inside / "cgroup.procs").read_text().split():
                # 0 stands for a process of another PID namespace; kill(0) would signal our own process group.
                if (pid := int(line)) > 0:
                    os.kill(pid, signal.SIGKILL)


def _remove_tree(path: Path) -> None:
    if _CGROUPS in path.parents:
        # In a cgroup file system only empty directories can be removed, from the bottom up; their files go with them.
        for inner in sorted(path.rglob("*/"), reverse=True):
            _try_rmdir(inner)
        _try_rmdir(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _try_rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:  # not empty, or a cgroup that the kernel still uses: `clean` retries until its time limit
        return
