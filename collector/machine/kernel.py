"""Facts about the running kernel: the id of this boot, and the CPUs online."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def boot_id() -> str:
    """Return the id of this boot; no process and no namespace outlives the boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def online_cpus() -> tuple[int, ...]:
    """Return the numbers of the CPUs online. Cheap: sources call it at every tick."""
    return cpu_list(Path("/sys/devices/system/cpu/online").read_bytes())


def highest_possible_cpu() -> int:
    """Return the highest number that a CPU of this machine can have, whether or not it is online."""
    return cpu_list(Path("/sys/devices/system/cpu/possible").read_bytes())[-1]


@cache
def cpu_list(text: bytes) -> tuple[int, ...]:
    """Return the CPU numbers of a list like `0-3,6` (Documentation/admin-guide/cputopology.rst)."""
    cpus: list[int] = []
    for part in text.decode("ascii").strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)
