"""The docker runtime: a Docker daemon of the lab's own, inside the lab's host namespace.

Nothing of a Docker that the machine runs is used or touched: the daemon and its containerd are separate processes with
their own sockets, data and cgroup parent. They run in a mount namespace of their own, in which the few paths that are
fixed in their code are covered. So all their mounts end with their processes, and clean-up after a kill is: end the
processes, remove the cgroups, remove the directory. A process of a container that is still being made (`runc init`) has
an environment of runc's, without the lab's mark: it is found in the lab's cgroups.

`nsenter`, not `ip netns exec`: the latter mounts a new /sys, where the daemon finds no cgroups.

No image is pulled: one is put together from the machine's busybox and ping with their libraries.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from collector.machine.processes import start_ticks
from collector.machine.unix_http import UnixConnection
from contracts.errors import LabError, Unavailable
from mace.lab import netns, state
from mace.lab.plan import HOST, Placement, Spec, bridges
from mace.lab.state import ID_VARIABLE, MEMBER_VARIABLE, Member, Process, State

PROGRAMS: Final = ("dockerd", "containerd", "runc", "iptables", "unshare", "mount", "busybox", "ldd")
IMAGE: Final = "mace-lab"
READY_LIMIT_S: Final = 30.0
"""The daemon takes half a second to answer; this is for a slow disk."""
_CGROUPS: Final = Path("/sys/fs/cgroup")

_COVERED: Final = ("/etc/docker", "/run/docker", "/run/containerd")
"""Where dockerd writes its key (20.10), its plugins and containerd's shims keep their sockets: fixed in their code."""

_LAUNCH: Final = """
for path in {covered}; do mount -t tmpfs -o mode=700 tmpfs "$path" || exit 1; done
containerd --config "$0/containerd.toml" >"$0/containerd.log" 2>&1 &
exec dockerd --config-file "$0/daemon.json" --ip6tables --experimental >"$0/dockerd.log" 2>&1
"""

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

_started: Final[dict[int, subprocess.Popen[bytes]]] = {}
"""Daemons that are children of this process, which has to take their exit status."""


def problems() -> list[Unavailable]:
    """Why the docker runtime cannot run here; empty if it can."""
    missing = [program for program in PROGRAMS if netns.find_program(program) is None]
    return [
        Unavailable("lab --runtime docker", f"the program {program!r} is missing", netns.remedy_for(program))
        for program in missing
    ]


def cgroup_parent(lab: str) -> str:
    """Name of the cgroup above the lab's containers, at the top of every hierarchy."""
    return f"mace-lab-{lab}"


def directories_to_make(lab: str) -> list[str]:
    """Directories that are missing, because only a Docker of the machine makes them, or that another lab has made.

    Something is mounted on them in the daemons' mount namespaces, and they are to be removed after the last lab.
    """
    made = {path for other in _others(lab) for path in other.made_directories}
    return [path for path in _COVERED if path in made or not Path(path).is_dir()]


def _others(lab: str) -> list[State]:
    """The other labs that have a Docker daemon."""
    found = []
    for name in state.names():
        with suppress(LabError):  # a damaged file says nothing of it
            other = state.load(name)
            if name != lab and other is not None and other.docker_socket:
                found.append(other)
    return found


def start(record: State) -> None:
    """Start the daemon and load the image. The state knows the socket and the directory already.

    Raises `Unavailable`, `LabError`.
    """
    if found := problems():
        raise found[0]
    directory = record.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in _COVERED:
        Path(path).mkdir(mode=0o711, exist_ok=True)
    (directory / "containerd.toml").write_text(_CONTAINERD_CONFIG.format(directory=directory))
    (directory / "daemon.json").write_text(json.dumps(_daemon_config(record), indent=1))
    daemon = subprocess.Popen(
        netns.enter_command(
            Path(record.members[HOST].path),
            [
                *("unshare", "--mount", "--propagation", "slave"),
                *("sh", "-c", _LAUNCH.format(covered=" ".join(_COVERED)), str(directory)),
            ],
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=record.environment(),
        start_new_session=True,
    )
    _started[daemon.pid] = daemon
    record.daemon = Process(daemon.pid, start_ticks(daemon.pid))
    record.save()
    deadline = time.monotonic() + READY_LIMIT_S
    while not _answers(record):
        if daemon.poll() is not None or time.monotonic() > deadline:
            what = f"exit status {daemon.returncode}" if daemon.returncode is not None else "no answer"
            raise LabError(f"dockerd: {what}; {_complaint(directory)}")
        time.sleep(0.02)
    _request(record, "POST", f"/images/create?fromSrc=-&repo={IMAGE}&tag=latest", _image(), "application/x-tar")


def create(record: State, place: Placement) -> Member:
    """Make and start one container; returns what became of it. Raises `LabError`."""
    body = {
        "Image": IMAGE,
        "Cmd": ["/bin/sleep", "2147483647"],
        "Hostname": place.name,
        # So that its processes are known as the lab's, those of `docker exec` included.
        "Env": [f"{ID_VARIABLE}={record.id}", f"{MEMBER_VARIABLE}={place.name}", "PATH=/bin"],
        "HostConfig": {"NetworkMode": "bridge"},
    }
    number = _request(record, "POST", f"/containers/create?name={place.name}", json.dumps(body).encode())["Id"]
    _request(record, "POST", f"/containers/{number}/start")
    found = _request(record, "GET", f"/containers/{number}/json")
    network = found["NetworkSettings"]
    path = handle(record, place.name)
    pid = int(found["State"]["Pid"])
    if pid <= 0:
        raise LabError(f"container {place.name}: ended at once; {_complaint(record.directory)}")
    # A handle of our own: a process number may come to mean another process, in another namespace.
    netns.keep(Path(f"/proc/{pid}/ns/net"), path)
    return Member(
        str(path),
        slot=place.slot,
        ipv4=network["IPAddress"],
        ipv6=network["GlobalIPv6Address"],
        docker_id=number,
    )


def remove(record: State, member: Member) -> None:
    """Remove one container with force. Raises `LabError`."""
    netns.remove(Path(member.path))
    if member.docker_id:
        _request(record, "DELETE", f"/containers/{member.docker_id}?force=1", allow=(404,))


def handle(record: State, name: str) -> Path:
    """Where a container's network namespace is kept.

    Not in /run/netns: Docker puts no names there either, and who looks for containers must find these as any others.
    """
    return record.directory / f"netns-{name}"


def clean(record: State, limit_s: float = 5.0) -> None:
    """Remove what is left when the processes have ended. Raises `LabError`."""
    if record.daemon is not None and (child := _started.pop(record.daemon.pid, None)) is not None:
        child.wait()
    directory = record.directory
    if directory.is_dir():
        for path in directory.glob("netns-*"):
            netns.remove(path)
    deadline = time.monotonic() + limit_s
    while left := _left(record):
        for path in left:
            if _CGROUPS in path.parents:
                _end_processes(path)
            _remove_tree(path)
        if time.monotonic() > deadline:
            raise LabError(f"cannot remove {', '.join(map(str, left))}")
        time.sleep(0.01)  # the kernel empties cgroups after the end of their processes
    # Removing a directory takes away what is mounted on it in any mount namespace, so not under another lab's daemon.
    if not _others(record.spec.name):
        for made in record.made_directories:
            _try_rmdir(Path(made))


def _left(record: State) -> list[Path]:
    name = cgroup_parent(record.spec.name)
    places = [record.directory, _CGROUPS / name, *_CGROUPS.glob(f"*/{name}")]
    return [path for path in places if path.is_dir()]


def _end_processes(cgroup: Path) -> None:
    """Kill what runs in a cgroup and in those below, also where runc was killed between freezing and thawing."""
    for inside in (cgroup, *cgroup.rglob("*/")):
        for control, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            with suppress(OSError):  # no such control in this hierarchy, or the cgroup has just gone
                (inside / control).write_text(thawed)
        with suppress(OSError):
            for line in (inside / "cgroup.procs").read_text().split():
                # 0 stands for a process of another PID namespace; it must never be given to kill().
                if (pid := int(line)) > 0:
                    os.kill(pid, signal.SIGKILL)


def _remove_tree(path: Path) -> None:
    if _CGROUPS in path.parents:
        # Only directories can be removed there, from below; the files go with them.
        for inner in sorted(path.rglob("*/"), reverse=True):
            _try_rmdir(inner)
        _try_rmdir(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _try_rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:  # not empty or, a cgroup, not yet: that is tried again until the time is over
        return


def _daemon_config(record: State) -> dict[str, Any]:
    directory, spec = record.directory, record.spec
    bridge = bridges(Spec(name=spec.name))[0]
    return {
        "hosts": [f"unix://{record.docker_socket}"],
        "containerd": f"{directory}/containerd.sock",
        "data-root": f"{directory}/data",
        "exec-root": f"{directory}/run",
        "pidfile": f"{directory}/docker.pid",
        "storage-driver": "overlay2",
        "bip": str(bridge.ipv4),
        "ipv6": True,
        "fixed-cidr-v6": str(bridge.ipv6.network),
        "cgroup-parent": f"/{cgroup_parent(spec.name)}",
        # The systemd driver would hand our cgroups to the machine's init.
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
    }


def _complaint(directory: Path) -> str:
    """The last error in the daemons' logs."""
    for name in ("dockerd.log", "containerd.log"):
        try:
            lines = (directory / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        bad = [line for line in lines if re.search(r"level=(error|fatal)|^failed|^unable", line, re.I)]
        if bad:
            return f"{name}: {bad[-1]}"
    return "its log says nothing"


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
    """One call of the Docker Engine API. Without a version in the path, for that every release answers."""
    connection = UnixConnection(record.docker_socket, limit_s)
    try:
        connection.request(method, path, body, {"Content-Type": content_type})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"dockerd: {method} {path.partition('?')[0]}: {error}") from error
    finally:
        connection.close()
    if response.status >= 400 and response.status not in allow:
        raise LabError(f"dockerd: {method} {path.partition('?')[0]}: {answer.decode(errors='replace').strip()}")
    if response.headers.get_content_type() != "application/json":
        return answer
    lines = answer.splitlines()  # image import answers with a stream of objects
    last = json.loads(lines[-1]) if lines else {}
    if isinstance(last, dict) and "error" in last:
        raise LabError(f"dockerd: {last['error']}")
    return last


def _image() -> bytes:
    """A root file system as a tar archive: busybox, ping, and the libraries that they need."""
    files: dict[str, Path] = {}
    for program in ("busybox", "ping"):
        found = netns.find_program(program)
        if found is None:
            raise Unavailable("lab --runtime docker", f"the program {program!r} is missing", netns.remedy_for(program))
        files[f"bin/{program}"] = Path(found)
        for library in _libraries(found):
            files[str(library).lstrip("/")] = library
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for directory in ("proc", "sys", "dev", "etc", "tmp"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, source in files.items():
            content = source.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
        for applet in ("sh", "sleep", "ls", "cat", "ip", "nc", "wget"):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
    return buffer.getvalue()


def _libraries(program: str) -> list[Path]:
    env: Mapping[str, str] = {"PATH": netns.search_path(), "LC_ALL": "C"}
    done = subprocess.run(["ldd", program], capture_output=True, text=True, env=env, check=False, timeout=10)
    # `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, `/lib64/ld-linux-x86-64.so.2 (0x...)`; nothing if static
    return [Path(name) for name in re.findall(r"(/\S+) \(0x", done.stdout)]
