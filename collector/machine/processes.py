"""What /proc says of other processes (proc(5)). A process id alone does not tell one: it is given out again."""

from __future__ import annotations

from pathlib import Path


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from its third field (the state) on; empty if there is no such process."""
    try:
        # The command name, in parentheses, may itself hold blanks, parentheses and any bytes: count from its end.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def start_ticks(pid: int) -> int:
    """When process `pid` started, in clock ticks since boot; -1 if there is none, or only its exit status is left."""
    fields = stat_fields(pid)
    return -1 if not fields or fields[0] in "ZX" else int(fields[19])
