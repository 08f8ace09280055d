"""What a process's control groups and the kernel say about the want of CPU time: CFS quotas and pressure (PSI).

A quota (`cpu.max`, or `cpu.cfs_quota_us` in version 1) may be set on any ancestor of a group, so that all of them are
read. Documentation/admin-guide/cgroup-v2.rst ("CPU Interface Files"), Documentation/scheduler/sched-bwc.rst and
Documentation/accounting/psi.rst describe the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MICROSECOND: Final = 1_000
_SOME: Final = re.compile(r"^some .*\btotal=(\d+)$", re.MULTILINE)
_ROOT: Final = Path("/")


@dataclass(frozen=True, slots=True)
class CpuGroups:
    """A process's CPU control group and its ancestors, nearest first. `version` is 1 or 2; no directories: unknown."""

    directories: tuple[Path, ...]
    version: int

    @classmethod
    def of(cls, pid: int, root: Path = _ROOT) -> CpuGroups:
        """Return the groups of process `pid`; `root` is the directory that has /proc and the mounts."""
        try:
            lines = (root / f"proc/{pid}/cgroup").read_text(errors="surrogateescape").splitlines()
            mounts = (root / "proc/self/mounts").read_text(errors="surrogateescape").splitlines()
        except OSError:
            return cls((), 2)
        paths = {tuple(controllers.split(",")): path for _, controllers, path in (line.split(":", 2) for line in lines)}
        version = 1 if any("cpu" in controllers for controllers in paths) else 2
        path = next((p for c, p in paths.items() if "cpu" in c or (version == 2 and c == ("",))), None)
        mount = next((m for m in map(str.split, mounts) if _has_cpu(m, version)), None)
        if path is None or mount is None:
            return cls((), version)
        top = root / mount[1].lstrip("/")
        group = top / path.lstrip("/")
        above = [group, *(p for p in group.parents if p.is_relative_to(top))]
        return cls(tuple(d for d in above if (d / "cpu.stat").is_file()), version)


@dataclass(frozen=True, slots=True)
class CpuWant:
    """Totals since the groups were made, or their difference; None where the kernel does not say."""

    throttled: int | None
    """Periods in which a quota of the groups was used up."""
    throttled_ns: int | None
    pressure_ns: int | None
    """Time in which at least one task waited for a CPU."""

    def since(self, earlier: CpuWant) -> CpuWant:
        """Return what was added since `earlier`."""
        return CpuWant(
            _less(self.throttled, earlier.throttled),
            _less(self.throttled_ns, earlier.throttled_ns),
            _less(self.pressure_ns, earlier.pressure_ns),
        )


def cpu_want(groups: CpuGroups, root: Path = _ROOT) -> CpuWant:
    """Read the totals; pressure is that of the nearest group that has it (version 2), otherwise of the machine."""
    throttled = throttled_ns = None
    for directory in groups.directories:
        stat = dict(line.split(maxsplit=1) for line in _text(directory / "cpu.stat").splitlines() if " " in line)
        throttled = (throttled or 0) + int(stat.get("nr_throttled", 0))
        time_ns = int(stat.get("throttled_time", 0)) or int(stat.get("throttled_usec", 0)) * _MICROSECOND
        throttled_ns = (throttled_ns or 0) + time_ns
    pressures = [d / "cpu.pressure" for d in groups.directories] if groups.version == 2 else []
    found = (_SOME.search(_text(path)) for path in (*pressures, root / "proc/pressure/cpu"))
    match = next((m for m in found if m), None)
    return CpuWant(throttled, throttled_ns, int(match[1]) * _MICROSECOND if match else None)


def _has_cpu(mount: list[str], version: int) -> bool:
    """Return whether a line of /proc/mounts mounts the hierarchy that has the CPU controller."""
    if version == 2:
        return mount[2] == "cgroup2"
    return mount[2] == "cgroup" and "cpu" in mount[3].split(",")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _less(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before
