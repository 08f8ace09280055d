"""A memory cgroup with a limit, of version 1 or 2, in which this process runs for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def _root() -> Path | None:
    if (_V1 / "memory.limit_in_bytes").exists() and os.access(_V1, os.W_OK):
        return _V1
    controllers = _V2 / "cgroup.subtree_control"
    with contextlib.suppress(OSError):
        if os.access(controllers, os.W_OK) and "memory" in controllers.read_text().split():
            return _V2
    return None


def missing() -> str | None:
    """Return why no memory cgroup can be made here, or None if one can."""
    return None if _root() else f"neither {_V1} nor {_V2} has memory cgroups that this user can make"


@contextlib.contextmanager
def limited(mib: int) -> Iterator[None]:
    """Run the block with this process in a cgroup whose memory is limited; what it used before does not count."""
    root = _root()
    assert root is not None, missing()
    group = root / f"mace-limit-{os.getpid()}"
    mine = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if _is_of(root, line))
    before = root / mine.split(":", 2)[2].lstrip("/") / "cgroup.procs"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if root == _V1 else "memory.max")).write_text(str(mib << 20))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            before.write_text(str(os.getpid()))
    finally:
        group.rmdir()


def _is_of(root: Path, line: str) -> bool:
    controllers = line.split(":", 2)[1]
    return "memory" in controllers.split(",") if root == _V1 else controllers == ""
