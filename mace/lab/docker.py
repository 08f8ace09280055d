"""The runtimes docker and podman: a daemon of the lab's own, inside the lab's host namespace.

Podman's service answers Docker's API, so that both are used alike; what differs is a row of `DAEMONS`. Docker's daemon
and its containerd, or Podman's service, are the lab's holder (`mace.lab.holder`), with their own sockets, data and
cgroup parent.

The daemon starts under `nsenter`, because `ip netns exec` mounts a new /sys, in which the daemon finds no cgroups.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from collector.machine.unix_http import UnixConnection
from contracts.errors import LabError
from mace.lab import holder, image, netns
from mace.lab.plan import Placement, Runtime, Spec, bridges
from mace.lab.state import ID_VARIABLE, MEMBER_VARIABLE, Member, State

IMAGE: Final = "mace-lab"
READY_LIMIT_S: Final = 30.0
"""Time for the daemon to start, seconds. It usually answers within half a second; a slow disk delays it."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """What one runtime needs to run its daemon."""

    programs: tuple[str, ...]
    covered: tuple[str, ...]
    """Paths fixed in its code, which the lab's daemon must not share with the machine's."""
    script: str
    """Starts it; `$0` is the lab's directory."""
    configure: Callable[[State], dict[str, str]]
    """Returns the text of each configuration file by its name in the lab's directory."""
    logs: tuple[str, ...]


def start(record: State) -> None:
    """Start the daemon and load the image; `record` already has the paths of the socket and the directory.

    Raises `LabError` if the daemon does not start.
    """
    kind, directory = DAEMONS[record.spec.runtime], record.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in kind.configure(record).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    daemon = holder.hold(record, kind.covered, kind.script)
    deadline = time.monotonic() + READY_LIMIT_S
    while not _answers(record):
        if daemon.poll() is not None or time.monotonic() > deadline:
            what = f"exit status {daemon.returncode}" if daemon.returncode is not None else "no answer"
            raise LabError(f"{record.spec.runtime}: {what}; {_complaint(record)}")
        time.sleep(0.02)
    _request(record, "POST", f"/images/create?fromSrc=-&repo={IMAGE}&tag=latest", image.archive(), "application/x-tar")


def create(record: State, place: Placement) -> Member:
    """Make and start one container; returns its namespace and addresses. Raises `LabError`."""
    body = {
        "Image": IMAGE,
        "Cmd": ["/bin/sleep", "2147483647"],
        "Hostname": place.name,
        # The clean-up recognises the lab's processes by these variables, including those of `docker exec`.
        "Env": [f"{ID_VARIABLE}={record.id}", f"{MEMBER_VARIABLE}={place.name}", "PATH=/bin"],
        "HostConfig": {"NetworkMode": "bridge", "CgroupParent": f"/{holder.cgroup_parent(record.spec.name)}"},
    }
    number = _request(record, "POST", f"/containers/create?name={place.name}", json.dumps(body).encode())["Id"]
    _request(record, "POST", f"/containers/{number}/start")
    found = _request(record, "GET", f"/containers/{number}/json")
    network = found["NetworkSettings"]
    path = holder.handle(record, place.name)
    pid = int(found["State"]["Pid"])
    if pid <= 0:
        raise LabError(f"container {place.name}: ended at once; {_complaint(record)}")
    # The lab keeps its own handle: the pid may later belong to a process in another namespace.
    netns.keep(Path(f"/proc/{pid}/ns/net"), path)
    return Member(
        str(path),
        slot=place.slot,
        ipv4=network["IPAddress"],
        ipv6=network["GlobalIPv6Address"],
        docker_id=number,
    )


def command(record: State, member: Member, argv: list[str]) -> list[str]:
    """Return the command line that runs `argv` in all of a container's namespaces."""
    url = f"unix://{record.docker_socket}"
    if record.spec.runtime is Runtime.DOCKER:
        return ["docker", "-H", url, "exec", member.docker_id, *argv]
    # Podman's client makes directories of its own, which the holder's mounts cover.
    return holder.in_mounts(record, ["podman", "--url", url, "exec", member.docker_id, *argv])


def remove(record: State, member: Member) -> None:
    """Remove one container by force. Raises `LabError`."""
    netns.remove(Path(member.path))
    if member.docker_id:
        _request(record, "DELETE", f"/containers/{member.docker_id}?force=1", allow=(404,))


def _docker_files(record: State) -> dict[str, str]:
    directory, spec = record.directory, record.spec
    bridge = bridges(Spec(name=spec.name))[0]
    config: dict[str, Any] = {
        "hosts": [f"unix://{record.docker_socket}"],
        "containerd": f"{directory}/containerd.sock",
        "data-root": f"{directory}/data",
        "exec-root": f"{directory}/run",
        "pidfile": f"{directory}/docker.pid",
        "storage-driver": "overlay2",
        "bip": str(bridge.ipv4),
        "ipv6": True,
        "fixed-cidr-v6": str(bridge.ipv6.network),
        "cgroup-parent": f"/{holder.cgroup_parent(spec.name)}",
        # The systemd driver would leave the lab's cgroups to the machine's init.
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
    }
    return {
        "containerd.toml": _CONTAINERD_CONFIG.format(directory=directory),
        "daemon.json": json.dumps(config, indent=1),
    }


def _podman_files(record: State) -> dict[str, str]:
    directory, bridge = record.directory, bridges(Spec(name=record.spec.name))[0]
    # The network that Podman has without a configuration, with the lab's addresses.
    network = {
        "name": "podman",
        "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
        "driver": "bridge",
        "network_interface": "podman0",
        "created": "2000-01-01T00:00:00Z",
        "subnets": [{"subnet": str(each.network), "gateway": str(each.ip)} for each in (bridge.ipv4, bridge.ipv6)],
        "ipv6_enabled": True,
        "internal": False,
        "dns_enabled": False,
        "ipam_options": {"driver": "host-local"},
    }
    return {
        "containers.conf": _CONTAINERS_CONF.format(directory=directory),
        "storage.conf": _STORAGE_CONF.format(directory=directory),
        "networks/podman.json": json.dumps(network, indent=1),
    }


def _complaint(record: State) -> str:
    """Return the last error line of the daemon's logs."""
    logs = DAEMONS[record.spec.runtime].logs
    for name in logs:
        try:
            lines = (record.directory / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        bad = [line for line in lines if re.search(r"level=(error|fatal)|^failed|^unable|^error", line, re.I)]
        if bad:
            return f"{name}: {bad[-1]}"
    return f"no error in {' and '.join(logs)} in {record.directory}"


def _answers(record: State) -> bool:
    try:
        _request(record, "GET", "/_ping", limit_s=5.0)
    except LabError:
        return False
    return True


def _request(
    record: State,
    method: str,
    path: str,
    body: bytes = b"",
    content_type: str = "application/json",
    *,
    allow: tuple[int, ...] = (),
    limit_s: float = 30.0,
) -> Any:
    """Call the Docker Engine API and return the parsed answer. Raises `LabError`.

    The path has no API version, because every release answers a path without one.
    """
    connection = UnixConnection(record.docker_socket, limit_s)
    try:
        connection.request(method, path, body, {"Content-Type": content_type})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"{record.spec.runtime}: {method} {path.partition('?')[0]}: {error}") from error
    finally:
        connection.close()
    if response.status >= 400 and response.status not in allow:
        raise LabError(
            f"{record.spec.runtime}: {method} {path.partition('?')[0]}: {answer.decode(errors='replace').strip()}"
        )
    if response.headers.get_content_type() != "application/json":
        return answer
    lines = answer.splitlines()  # image import answers with a stream of objects
    last = json.loads(lines[-1]) if lines else {}
    if isinstance(last, dict) and "error" in last:
        raise LabError(f"{record.spec.runtime}: {last['error']}")
    return last


_CONTAINERD_CONFIG: Final = """\
version = 2
root = "{directory}/containerd"
state = "{directory}/containerd-run"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{directory}/containerd.sock"
[ttrpc]
address = "{directory}/containerd.sock.ttrpc"
"""
_CONTAINERS_CONF: Final = """\
[containers]
# Podman's own limits are above the machine's where the lab runs in a container.
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{directory}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""
_STORAGE_CONF: Final = """\
[storage]
driver = "overlay"
graphroot = "{directory}/data"
runroot = "{directory}/run"
"""

DAEMONS: Final[dict[Runtime, Daemon]] = {
    Runtime.DOCKER: Daemon(
        programs=("dockerd", "containerd", "runc", "iptables", "unshare", "mount"),
        # dockerd's key (20.10), and the sockets of its plugins and of containerd's shims
        covered=("/etc/docker", "/run/docker", "/run/containerd"),
        script="""
containerd --config "$0/containerd.toml" >"$0/containerd.log" 2>&1 &
exec dockerd --config-file "$0/daemon.json" --ip6tables --experimental >"$0/dockerd.log" 2>&1
""",
        configure=_docker_files,
        logs=("dockerd.log", "containerd.log"),
    ),
    Runtime.PODMAN: Daemon(
        programs=("podman", "conmon", "runc", "iptables", "unshare", "mount"),
        # netavark's addresses, image caches, network namespaces, and locks in shared memory
        covered=("/run/containers", "/var/lib/containers", "/run/netns", "/dev/shm"),  # noqa: S108
        script="""
export CONTAINERS_CONF="$0/containers.conf" CONTAINERS_STORAGE_CONF="$0/storage.conf"
exec podman system service --time 0 "unix://$0/docker.sock" >"$0/podman.log" 2>&1
""",
        configure=_podman_files,
        logs=("podman.log",),
    ),
}
