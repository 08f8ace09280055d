"""State and start time of other processes, from /proc (proc(5)).

The kernel reuses process ids: id and start time together identify a process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_INITIAL_PIDS: Final = 0xEFFFFFFC
"""Inode of the initial process id namespace (PROC_PID_INIT_INO, include/linux/proc_ns.h)."""


def stat_fields(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (the state) on; none if there is no such process."""
    try:
        # The command name, in parentheses, may contain blanks, parentheses and any bytes: count from its end.
        return (proc / f"{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def parent(pid: int, proc: Path = Path("/proc")) -> int:
    """Return the process that a process is a child of; 0 if it has none, or has ended."""
    fields = stat_fields(pid, proc)
    return int(fields[1]) if fields else 0


def start_ticks(pid: int) -> int:
    """Return when process `pid` started, in clock ticks since boot; -1 if it does not exist or is a zombie."""
    fields = stat_fields(pid)
    return -1 if not fields or fields[0] in "ZX" else int(fields[19])


def in_initial_pid_namespace(proc: Path = Path("/proc")) -> bool:
    """Return whether this process sees the processes of the whole machine, and not those of one container."""
    return (proc / "self/ns/pid").stat().st_ino == _INITIAL_PIDS
