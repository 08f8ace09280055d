"""Opens a container's network namespace, named by the container, by the namespace or by a process in it."""

from __future__ import annotations

import errno
from pathlib import Path

from collector.machine import devices
from collector.machine.containers import API_SOCKETS
from collector.machine.cri import CRI_SOCKETS
from collector.machine.netns import Namespaces, open_netns, open_nsfs, path_of
from contracts.config import CaptureConfig
from contracts.errors import Unavailable, UsageError, nearest
from contracts.topology import Role
from mace import lab


def open_namespace(
    capture: CaptureConfig,
    *,
    container: str | None = None,
    netns: str | None = None,
    pid: int | None = None,
    lab_name: str | None = None,
) -> int:
    """Return a file descriptor of one network namespace, which the caller has to close.

    `container` is a container's name, in the lab `lab_name` if that is given, otherwise on this machine. Raises
    `UsageError` or `Unavailable`.
    """
    if pid is not None:
        return _opened(Path(f"/proc/{pid}/ns/net"), f"process {pid}")
    if netns is not None:
        return _opened(Path(path_of(netns)), f"network namespace {netns!r}")
    if container is None:
        raise UsageError("name a container, a network namespace or a process")
    if lab_name is None:
        return _of_container(container, capture)
    place = lab.attach(lab_name)
    if place.shares_host(container):
        raise UsageError(_shares_host(container))
    return _opened(place.netns_path(container), f"container {container!r}")


def _shares_host(name: str) -> str:
    return (
        f"container {name!r} shares the host's network, which adds nothing to its packets: there is nothing to correct"
    )


def _opened(path: Path, what: str) -> int:
    try:
        return open_nsfs(str(path))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UsageError(f"{path} is no network namespace") from error
        raise Unavailable(
            what, f"{path}: {error.strerror}", "`ip netns list` and `lsns -t net` list the namespaces"
        ) from error


def _of_container(name: str, capture: CaptureConfig) -> int:
    found = devices.snapshot(
        host_netns=capture.host_netns or None,
        outer=capture.outer,
        remote_netns=capture.remote_netns,
        docker_sockets=(*API_SOCKETS, *capture.container_sockets),
        pod_logs=capture.pod_logs,
        cri_sockets=(*CRI_SOCKETS, *capture.cri_sockets),
    )
    named = {d.netns: d.container for d in found.devices if d.role is Role.INNER and d.container}
    chosen = [netns for netns, container in named.items() if container == name]
    if not chosen and name in {sharer.container for sharer in found.on_host_network}:
        raise UsageError(_shares_host(name))
    if len(chosen) != 1:
        known = ", ".join(sorted(set(named.values()))) or "none"
        many = f"{len(chosen)} containers are called {name!r}; choose one with --pid or --netns"
        none = f"no container {name!r}{nearest(name, named.values())}; known: {known}"
        raise UsageError(many if chosen else none)
    namespaces = Namespaces()
    try:
        place = namespaces.scan().get(chosen[0])
    finally:
        namespaces.close()
    fd = open_netns(place) if place else None
    if fd is None:
        raise Unavailable(
            f"container {name!r}",
            "its network namespace cannot be opened",
            "name a process of the container with --pid",
        )
    return fd
