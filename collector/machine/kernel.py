"""Facts about the running kernel: the id of this boot, and the CPUs online."""

from __future__ import annotations

import mmap
import os
import re
from functools import cache
from pathlib import Path


def boot_id() -> str:
    """Return the id of this boot; no process and no namespace outlives the boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def kernel_version() -> tuple[int, int]:
    """Return the first two numbers of the running kernel's version."""
    # For instance 6.18.44-fc or 7.0-rc3.
    major, minor, *_ = re.findall(r"\d+", os.uname().release)
    return int(major), int(minor)


def online_cpus() -> tuple[int, ...]:
    """Return the numbers of the CPUs online. Cheap: sources call it at every tick."""
    fd = os.open("/sys/devices/system/cpu/online", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return cpu_list(os.read(fd, mmap.PAGESIZE))  # sysfs gives a page at most
    finally:
        os.close(fd)


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
