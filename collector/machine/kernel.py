"""What the kernel says of itself: which boot this is, and which CPUs are online."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def boot_id() -> str:
    """Changes with every start of the machine, which no process and no namespace survives."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def online_cpus() -> tuple[int, ...]:
    """Numbers of the CPUs that are online; asked at every tick."""
    return cpu_list(Path("/sys/devices/system/cpu/online").read_bytes())


@cache
def cpu_list(text: bytes) -> tuple[int, ...]:
    """CPU numbers of a list like `0-3,6` (Documentation/admin-guide/cputopology.rst)."""
    cpus: list[int] = []
    for part in text.decode("ascii").strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)
