"""Why the kernel refuses programs, maps or rings, and what to do about it.

The kernel answers with an errno only. The same errno has several causes, which are found out one after another: the
kernel's lockdown, the capabilities and limits of this process, the kernel's age, and the verifier's log.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
from pathlib import Path
from typing import Final

from contracts.errors import Unavailable

_WHAT: Final = "bpf"
RIGHTS: Final = "run as root, or with CAP_BPF and CAP_PERFMON"
_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
_STATUS: Final = Path("/proc/self/status")
_OTHERS: Final = "`--source ftrace`"
_NEEDED: Final = {"CAP_PERFMON": 38, "CAP_BPF": 39}
"""Capabilities that loading and attaching need, by number (include/uapi/linux/capability.h)."""
_SYS_ADMIN: Final = 21
"""CAP_SYS_ADMIN includes both."""
_SYS_RESOURCE: Final = 24
"""CAP_SYS_RESOURCE, with which libbpf raises the limit of locked memory."""
_OLDEST: Final = (5, 10)
_UNLIMITED_SINCE: Final = (5, 11)
"""Linux charges maps and programs to the memory cgroup, before to RLIMIT_MEMLOCK: commit 3ac1f01b43b6 ("bpf: Eliminate
rlimit-based memory accounting for bpf progs") and its series."""


def of_programs(error: OSError, log: str) -> Unavailable:
    """Return why the kernel refuses the programs; `log` is the verifier's log, "" if the verifier was not reached."""
    if (found := _locked_down() or _without_memory(error) or _without_rights(error) or _too_old()) is not None:
        return found
    if verdict := _verdict(log):
        return Unavailable(
            _WHAT,
            f"the verifier of Linux {platform.release()} refuses a program: {verdict}",
            f"{_OTHERS}; please report",
        )
    return Unavailable(
        _WHAT, f"Linux {platform.release()} refuses the programs: {os.strerror(error.errno or 0)}", _OTHERS
    )


def of_attaching(program: str, error: OSError) -> Unavailable:
    """Return why the kernel does not attach a program."""
    if (found := _locked_down() or _without_memory(error) or _without_rights(error)) is not None:
        return found
    return Unavailable(_WHAT, f"{program} cannot be attached: {os.strerror(error.errno or 0)}", _OTHERS)


def of_ring(error: OSError, size: int) -> Unavailable:
    """Return why the kernel does not create a ring of `size` bytes."""
    if error.errno == errno.ENOMEM:
        return Unavailable(
            _WHAT,
            f"no memory for a ring of {size / 2**20:g} MiB",
            "a smaller [capture] ring_mib, or a higher memory limit of the cgroup",
        )
    if (found := _without_rights(error)) is not None:
        return found
    return Unavailable(
        _WHAT,
        f"the kernel refuses a ring of {size:,} bytes: {os.strerror(error.errno or 0)}",
        "another [capture] ring_mib",
    )


def _locked_down() -> Unavailable | None:
    """In confidentiality mode the kernel hides the functions that read its memory from programs, with any errno."""
    try:
        told = _LOCKDOWN.read_text(encoding="utf-8")
    except OSError:
        return None
    if "[confidentiality]" not in told:
        return None
    return Unavailable(
        _WHAT, "the kernel is locked down (confidentiality)", "boot the kernel with lockdown=integrity, or without"
    )


def _without_rights(error: OSError) -> Unavailable | None:
    """Without a capability the errno varies: EPERM, or E2BIG for more instructions than an ordinary user may load."""
    held = _capabilities()
    missing = [name for name, number in _NEEDED.items() if not held >> number & 1]
    if missing and not held >> _SYS_ADMIN & 1:
        return Unavailable(
            _WHAT, f"the kernel does not let this user load BPF programs: {' and '.join(missing)} missing", RIGHTS
        )
    if error.errno != errno.EPERM:
        return None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if _version() < _UNLIMITED_SINCE and limit != resource.RLIM_INFINITY and not held >> _SYS_RESOURCE & 1:
        return Unavailable(
            _WHAT,
            f"BPF maps need more locked memory than the limit of {limit // 1024:,} KiB",
            "`ulimit -l unlimited` as root, LimitMEMLOCK=infinity in a unit, or CAP_SYS_RESOURCE",
        )
    return Unavailable(
        _WHAT,
        "the kernel does not allow bpf(2) although the capabilities are there (EPERM)",
        "allow bpf(2) in the container's seccomp profile, and run in the initial user namespace",
    )


def _without_memory(error: OSError) -> Unavailable | None:
    if error.errno != errno.ENOMEM:
        return None
    return Unavailable(_WHAT, "no memory to load the programs", "a higher memory limit of the cgroup")


def _too_old() -> Unavailable | None:
    if _version() >= _OLDEST:
        return None
    return Unavailable(
        _WHAT, f"Linux {platform.release()} is too old and refuses the programs", f"Linux 5.10 or later, or {_OTHERS}"
    )


def _verdict(log: str) -> str:
    """Return the verifier's verdict: the last line of its log that is no statistics."""
    lines = [line.strip() for line in log.splitlines()]
    told = [line for line in lines if line and not re.match(r"processed \d+ insns|verification time|stack depth", line)]
    return told[-1][:200] if told else ""


def _capabilities() -> int:
    """Return the effective capabilities of this process as bits; 0 if they cannot be read."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _STATUS.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else _OLDEST
