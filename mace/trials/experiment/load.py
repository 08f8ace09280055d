"""Contention beside a measurement: for CPUs, for the disk, or by a CPU quota of the container's processes.

    cpu     a busy loop pinned to each CPU, as many as there are CPUs
    io      one process that writes a temporary file and waits for the disk
    quota   a control group with a CFS quota of 20 ms in each 100 ms, in which a busy loop and the container's tool run

Every load is limited in number, time and bytes. Its processes carry the lab's mark, so that they end with the lab.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collector.machine.cgroups import CpuGroups, CpuWant, cpu_want
from contracts.errors import Unavailable
from mace.lab.netns import find_program

NO_LOAD: Final = "none"
LOADS: Final = (NO_LOAD, "cpu", "io", "quota")
_LOADER: Final = Path(__file__).with_name("loader.py")
_MOST_LOOPS: Final = 64
_FILE_BYTES: Final = 64 << 20
_DISK: Final = Path("/var/tmp")  # noqa: S108 - a directory that is on a disk, unlike /tmp on many machines
_PERIOD_US: Final = 100_000
_QUOTA_US: Final = 20_000
_REMOVAL_S: Final = 10.0
_CGROUPS: Final = Path("/sys/fs/cgroup")
_NAME: Final = re.compile(r"mace-experiment-(\d+)")
_SOME: Final = re.compile(r"^some .*\btotal=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Load:
    """A running load."""

    kind: str
    group: Path | None = None
    """Directory of the control group with the quota."""
    programs: Path | None = None
    """Directory with a `ping` that enters the control group and becomes ping."""

    def host(self, argv: list[str]) -> list[str]:
        """Return the command line of a host process that the load does not starve: it has a real-time priority."""
        return argv if self.kind == NO_LOAD else ["chrt", "--fifo", "1", *argv]

    def environment(self, of: Mapping[str, str]) -> dict[str, str]:
        """Return the environment in which `ping` is the container's: with a quota, it runs in the control group."""
        return {**of, "PATH": f"{self.programs}:{of['PATH']}"} if self.programs else dict(of)

    def wants(self) -> dict[str, int | None]:
        """Return the kernel's counts so far; None where it does not count.

        The keys are throttled (periods), throttled_ns of the control group, cpu_pressure_ns and io_pressure_ns of the
        machine (PSI: time in which at least one task waited).
        """
        want = CpuWant(None, None, None)
        if self.group is not None:
            want = cpu_want(CpuGroups((self.group,), 1))
        return {
            "throttled": want.throttled,
            "throttled_ns": want.throttled_ns,
            "cpu_pressure_ns": _pressure_ns("cpu"),
            "io_pressure_ns": _pressure_ns("io"),
        }


def since(now: Mapping[str, int | None], before: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return what was added to the counts of `Load.wants`."""
    return {
        name: None if value is None or (earlier := before[name]) is None else value - earlier
        for name, value in now.items()
    }


def check(kind: str) -> None:
    """Raise `Unavailable` if this machine cannot make the load."""
    if kind != NO_LOAD and find_program("chrt") is None:
        raise Unavailable(f"--load {kind}", "the program 'chrt' is missing", "apt-get install util-linux")
    if kind == "quota":
        _cpu_hierarchy()


@contextmanager
def applied(kind: str, env: Mapping[str, str], limit_s: float) -> Iterator[Load]:
    """Yield the load, which ends with the block and in any case after `limit_s`.

    `env` marks the load's processes. Raises `Unavailable` if the load cannot be made.
    """
    with ExitStack() as stack:
        limit = str(int(limit_s) + 1)
        if kind == "cpu":
            for cpu in sorted(os.sched_getaffinity(0))[:_MOST_LOOPS]:
                stack.enter_context(_loader(["cpu", str(cpu), limit], env))
        elif kind == "io":
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="mace-experiment-", dir=_DISK))
            stack.enter_context(_loader(["io", f"{place}/written", limit, str(_FILE_BYTES)], env))
        elif kind == "quota":
            group = stack.enter_context(_group())
            cpu = min(os.sched_getaffinity(0))
            stack.enter_context(_loader(["cpu", str(cpu), limit], env, group))
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="mace-experiment-"))
            _write_ping(Path(place), group)
            yield Load(kind, group, Path(place))
            return
        yield Load(kind)


def _write_ping(place: Path, group: Path) -> None:
    real = find_program("ping")
    if real is None:
        raise Unavailable("--load quota", "the program 'ping' is missing", "apt-get install iputils-ping")
    script = place / "ping"
    script.write_text(f'#!/bin/sh\n{_enter(group)} && exec {shlex.quote(real)} "$@"\n')
    script.chmod(0o755)


def _enter(group: Path) -> str:
    """Return the shell command that moves the shell into the control group."""
    return f"echo $$ >{shlex.quote(str(group / 'cgroup.procs'))}"


@contextmanager
def _loader(words: list[str], env: Mapping[str, str], group: Path | None = None) -> Iterator[None]:
    argv = [sys.executable, "-I", "-S", str(_LOADER), *words]
    if group is not None:
        argv = ["sh", "-c", f'{_enter(group)} && exec "$@"', "sh", *argv]
    process = subprocess.Popen(
        argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _group() -> Iterator[Path]:
    """Make a control group with the quota, and remove it afterwards. Raises `Unavailable`."""
    top, version = _cpu_hierarchy()
    _remove_leftovers(top)
    group = top / f"mace-experiment-{os.getpid()}"
    try:
        _limit(top, group, version)
        yield group
    finally:
        _remove(group)


def _limit(top: Path, group: Path, version: int) -> None:
    """Make the control group with its quota. Raises `Unavailable`."""
    try:
        if version == 2:
            (top / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir()
        if version == 2:
            (group / "cpu.max").write_text(f"{_QUOTA_US} {_PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(_QUOTA_US))
    except OSError as error:
        why = f"a control group with a CPU quota cannot be made: {error}"
        raise Unavailable("--load quota", why, "run it as root, outside of a container") from error


def _cpu_hierarchy() -> tuple[Path, int]:
    """Return the top of the hierarchy that has the CPU controller, and the version of control groups."""
    if (_CGROUPS / "cgroup.controllers").is_file():
        if "cpu" in (_CGROUPS / "cgroup.controllers").read_text().split():
            return _CGROUPS, 2
    elif (_CGROUPS / "cpu" / "cgroup.procs").is_file():
        return _CGROUPS / "cpu", 1
    why = f"{_CGROUPS} has no control groups with the CPU controller"
    raise Unavailable("--load quota", why, "mount them, as systemd does")


def _remove_leftovers(top: Path) -> None:
    """Remove the groups of experiments that were killed; one that still has a process stays."""
    for group in top.glob("mace-experiment-*"):
        found = _NAME.fullmatch(group.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with suppress(OSError):
                group.rmdir()


def _remove(group: Path) -> None:
    """End the processes of a group and remove it; a group that cannot be removed is left to the next run."""
    deadline = time.monotonic() + _REMOVAL_S
    while group.is_dir() and time.monotonic() < deadline:
        with suppress(OSError):
            for pid in (group / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.01)


def _pressure_ns(of: str) -> int | None:
    with suppress(OSError):
        if found := _SOME.search(Path(f"/proc/pressure/{of}").read_text()):
            return int(found[1]) * 1000
    return None
