"""A containerd of the tests' own, which runs pods without a kubelet: the tests call its CRI socket as a kubelet does.

The CNI plugin gives a pod's namespace no device: names need none.

Debian 12's containerd 1.6 has no stream of events. That of Debian 13, which runs on Debian 12 too, is unpacked into the
cache; nothing is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collector.machine.cri import fields
from collector.machine.grpc_calls import call
from mace.lab import image
from mace.lab.containerd import config_text, message
from tests.kernel import kernels
from tests.measuring import wait_for

PROGRAMS: Final = ("containerd", "containerd-shim-runc-v2", "ctr", "runc", "busybox")
IMAGE: Final = "mace.test/pause:1"
_PLUGIN: Final = """#!/bin/sh
test "$CNI_COMMAND" = DEL || cat <<END
{"cniVersion": "0.4.0", "interfaces": [{"name": "$CNI_IFNAME", "sandbox": "$CNI_NETNS"}],
 "ips": [{"version": "4", "address": "203.0.113.5/24", "interface": 0}]}
END
"""
_NETWORK: Final = """{"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "none"}]}"""
_WITH_EVENTS: Final = ("containerd", ("trixie",))
_NODE: Final = 2
"""NamespaceMode NODE: the host's network."""


def missing() -> str | None:
    """Return which program is missing, or None if none is."""
    return next((f"no program {name}" for name in PROGRAMS if not shutil.which(name)), None)


def missing_events() -> str | None:
    """Return why there is no containerd with a stream of events, or None if there is one."""
    try:
        kernels.unpacked(*_WITH_EVENTS)
    except kernels.KernelUnavailable as error:
        return str(error)
    return None


@dataclass
class Containerd:
    path: Path
    """Its CRI socket."""

    def ask(self, method: str, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))
            (answer,) = call(sock, [(f"/runtime.v1.RuntimeService/{method}", request)], 60)
        return answer

    def _made(self, method: str, request: bytes) -> str:
        """Call a method that makes something, and return its id."""
        return next(value.decode() for number, value in fields(self.ask(method, request)) if number == 1)  # type: ignore[union-attr]

    @contextlib.contextmanager
    def pod(self, name: str, *containers: str, host_network: bool = False, uid: str = "") -> Iterator[str]:
        """Run a pod NAMESPACE/POD with containers that sleep, in a control group as the kubelet's; yields its UID."""
        uid, root = uid or str(uuid.uuid4()), f"mace-test-{uuid.uuid4()}"
        context = message(f1=message(f1=_NODE if host_network else 0))
        namespace, pod = name.split("/")
        linux = message(f1=f"/{root}/kubepods/burstable/pod{uid}", f2=context)
        # A list of five pods is larger than HTTP/2's window of 64 KiB, and a request is no larger than a frame.
        annotation = message(f1="mace.test/long", f2="x" * 14_000)
        config = message(f1=message(f1=pod, f2=uid, f3=namespace), f7=annotation, f8=linux)
        sandbox = self._made("RunPodSandbox", message(f1=config))
        try:
            for container in containers:
                command = ["/bin/busybox", "sleep", "1000"]
                wanted = message(f1=message(f1=container), f2=message(f1=IMAGE), f3=command)
                made = self._made("CreateContainer", message(f1=sandbox, f2=wanted, f3=config))
                self.ask("StartContainer", message(f1=made))
            yield uid
        finally:
            self._remove(sandbox, root)

    @contextlib.contextmanager
    def agent(self, image: str, args: list[str | Path], linux: bytes, mounts: dict[Path, Path]) -> Iterator[int]:
        """Run a pod of one container in the host's network and with its process ids; yields the container's process.

        `linux` is its `LinuxContainerSecurityContext`, `mounts` are folders of this machine by their path inside. The
        container has ended when the block has.
        """
        uid, root = str(uuid.uuid4()), f"mace-test-{uuid.uuid4()}"
        shared = message(f1=_NODE, f2=_NODE)
        pod = message(f1=f"/{root}/kubepods/burstable/pod{uid}", f2=message(f1=shared))
        config = message(f1=message(f1="agent", f2=uid, f3="mace"), f8=pod)
        sandbox = self._made("RunPodSandbox", message(f1=config))
        try:
            wanted = message(
                f1=message(f1="agent"),
                f2=message(f1=image),
                f4=[str(word) for word in args],
                f7=[message(f1=str(inside), f2=str(outside)) for inside, outside in mounts.items()],
                f15=message(f2=linux + message(f3=shared)),
            )
            made = self._made("CreateContainer", message(f1=sandbox, f2=wanted, f3=config))
            self.ask("StartContainer", message(f1=made))
            told = self.ask("ContainerStatus", message(f1=made, f2=1))
            yield json.loads(re.search(rb'\{"sandboxID".*\}', told)[0])["pid"]  # type: ignore[index]
            self.ask("StopContainer", message(f1=made, f2=30))
        finally:
            self._remove(sandbox, root)

    def _remove(self, sandbox: str, root: str) -> None:
        """Stop and remove a pod, and its control groups."""
        self.ask("StopPodSandbox", message(f1=sandbox))
        self.ask("RemovePodSandbox", message(f1=sandbox))
        groups = [*Path("/sys/fs/cgroup").glob(root), *Path("/sys/fs/cgroup").glob(f"*/{root}")]
        for group in sorted((each for top in groups for each in (top, *top.rglob("*/"))), reverse=True):
            group.rmdir()

    def load(self, image: Path) -> None:
        """Import an image that `docker save` has written."""
        argv = ["ctr", "--address", str(self.path), "--namespace", "k8s.io", "images", "import"]
        subprocess.run([*argv, "--snapshotter", "native", str(image)], stdout=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def running(place: Path, netns: str | Path, *, events: bool = False) -> Iterator[Containerd]:
    """Run containerd in a network namespace (a name or a path), which is its pods' host network, with a busybox image.

    Every file of it is in `place`, which is short: a unix socket's path has at most 107 bytes. With `events` it is
    containerd 1.7, which has a stream of events.
    """
    programs = kernels.unpacked(*_WITH_EVENTS) / "usr/bin" if events else Path()
    path = f"{programs}:{os.environ['PATH']}" if events else os.environ["PATH"]
    (place / "cni").mkdir(parents=True)
    for plugin in ("none", "loopback"):
        (place / "cni" / plugin).write_text(_PLUGIN, encoding="utf-8")
        (place / "cni" / plugin).chmod(0o755)
    (place / "cni/none.conflist").write_text(_NETWORK, encoding="utf-8")
    (place / "config.toml").write_text(config_text(place, IMAGE, place / "cni", str(place / "cni")), encoding="utf-8")
    (place / "image.tar").write_bytes(image.saved(IMAGE))
    log = (place / "containerd.log").open("wb")
    argv = ["nsenter", f"--net={Path('/run/netns') / netns}", "containerd", "--config", str(place / "config.toml")]
    with log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, "PATH": path})
    daemon = Containerd(place / "containerd.sock")

    def ready() -> bool:
        assert process.poll() is None, (place / "containerd.log").read_text(encoding="utf-8")[-2000:]
        return daemon.path.exists()

    try:
        wait_for(ready, what="containerd's socket")
        daemon.load(place / "image.tar")
        yield daemon
    finally:
        process.terminate()
        process.wait()
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
        for mount in sorted((m for m in mounts if m.startswith(f"{place}/")), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=False)
