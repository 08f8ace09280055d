"""Pods without a kubelet: a control group as the kubelet names it, a network namespace, and a folder of logs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BESIDE = "198.51.100.250"
"""Address on the lab's bridge that none of its few containers has."""
GATEWAY = "198.51.100.1"
"""The bridge's own."""


def missing() -> str | None:
    """Return why no control group can be made here, or None if one can."""
    return None if _hierarchy() else "no hierarchy in /proc/mounts has control groups that this user can make"


def _hierarchy() -> Path | None:
    """Return the mount of a hierarchy of control groups: that of version 2, or one of version 1."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    mounts = sorted((kind != "cgroup2", where) for _, where, kind, *_ in mounts if kind in ("cgroup", "cgroup2"))
    # A cpuset of version 1 takes no process before it has CPUs.
    return next((Path(w) for _, w in mounts if "cpuset" not in w and os.access(w, os.W_OK)), None)


@dataclass
class MadePod:
    """A pod with a sandbox and no container."""

    logs: Path
    """Folder of the pod's logs."""
    group: Path
    """The pod's control group."""
    netns: str = ""
    """Name of its network namespace; "" if it is on the host's network."""
    uid: str = ""
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, container: str, *argv: str, netns: str = "") -> subprocess.Popen[bytes]:
        """Start a process as a container of the pod, in its namespace or the one given by path."""
        (self.logs / container).mkdir(exist_ok=True)
        (self.logs / container / "0.log").touch()
        group = self.group / (uuid.uuid4().hex * 2)
        group.mkdir(parents=True)
        # It joins the group before it enters the namespace, as a runtime's child does.
        enter = f'echo $$ > "$0/cgroup.procs" && exec nsenter --net="{netns or f"/run/netns/{self.netns}"}" "$@"'
        process = subprocess.Popen(["sh", "-c", enter, str(group), *argv], stdout=subprocess.DEVNULL)
        self._running.append(process)
        return process

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        for group in sorted(self.group.glob("*"), reverse=True):
            if group.is_dir():
                group.rmdir()


@contextlib.contextmanager
def made(logs: Path, name: str, *, namespace: str = "default") -> Iterator[MadePod]:
    """Make a pod's control group and its folder in `logs`; both are empty."""
    hierarchy = _hierarchy()
    assert hierarchy is not None, missing()
    uid = str(uuid.uuid4())
    root = hierarchy / f"mace-test-{uid}"
    pod = MadePod(logs / f"{namespace}_{name}_{uid}", root / f"kubepods/burstable/pod{uid}", uid=uid)
    try:
        pod.group.mkdir(parents=True)
        pod.logs.mkdir(parents=True)
        yield pod
    finally:
        pod.close()
        for group in (pod.group, *pod.group.parents):
            if group == hierarchy:
                break
            with contextlib.suppress(FileNotFoundError):
                group.rmdir()


@contextlib.contextmanager
def with_network(pod: MadePod, host: Path, bridge: str, gateway: str) -> Iterator[MadePod]:
    """Give the pod a namespace as containerd's, by a pair of devices on a bridge of the namespace `host`."""
    pod.netns = f"cni-{uuid.uuid4()}"
    outside = f"veth{pod.uid[:8]}"

    def ip(*argv: str) -> None:
        subprocess.run(["ip", *argv], check=True)

    ip("netns", "add", pod.netns)
    try:
        ip("-n", host.name, "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", pod.netns)
        ip("-n", host.name, "link", "set", outside, "master", bridge, "up")
        ip("-n", pod.netns, "address", "add", f"{BESIDE}/24", "dev", "eth0")
        ip("-n", pod.netns, "link", "set", "eth0", "up")
        ip("-n", pod.netns, "route", "add", "default", "via", gateway)
        yield pod
    finally:
        pod.close()
        ip("netns", "del", pod.netns)
