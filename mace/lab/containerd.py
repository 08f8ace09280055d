"""The runtime containerd: Kubernetes pods without a kubelet, made through containerd's CRI socket.

A pod has one container besides its sandbox. containerd calls the CNI plugins of the pod's network: those of the lab's
configuration list, or the plugin bridge with the lab's IPv4 addresses behind masquerade. The pods' control groups are
named as the kubelet names them, so that MACE recognises pods, and containerd's socket has their names (`lab/c1`).

Messages of the CRI (k8s.io/cri-api, runtime.v1) are written and read field by field: a handful of fields does not
justify generated code.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from pathlib import Path
from typing import Final

from collector.machine.cri import fields
from contracts.errors import LabError
from mace.lab import cni, cni_list, holder, image, netns
from mace.lab.plan import Placement, Spec, bridges, device_tag
from mace.lab.state import Member, State

PROGRAMS: Final = ("containerd", "containerd-shim-runc-v2", "ctr", "runc", "iptables", "unshare", "mount")
COVERED: Final = ("/run/containerd", "/run/netns", "/var/lib/cni", "/etc/cni")
"""Sockets of shims, pods' network namespaces, and results of CNI's library."""
NAMESPACE: Final = "lab"
"""Kubernetes namespace of the pods."""
_IMAGE: Final = "mace.lab/pod:1"
_SCRIPT: Final = 'exec containerd --config "$0/containerd.toml" >"$0/containerd.log" 2>&1'
_READY_LIMIT_S: Final = 30.0
_CALL_LIMIT_S: Final = 60.0
_CONFIG: Final = """\
version = 2
root = "{directory}/containerd"
state = "{directory}/containerd-run"
[grpc]
address = "{directory}/containerd.sock"
[ttrpc]
address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
# Otherwise no pod starts where root may not lower a process's score.
restrict_oom_score_adj = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{networks}"
bin_dir = "{plugins}"
"""


def config_text(directory: Path, image_name: str, networks: Path, plugins: str) -> str:
    """Return the configuration of a containerd whose files are all in `directory`.

    `networks` is the folder of CNI configurations, `plugins` the folder of CNI plugins.
    """
    return _CONFIG.format(directory=directory, image=image_name, networks=networks, plugins=plugins)


def network_text(spec: Spec) -> str:
    """Return the CNI configuration list of the pods' network."""
    if spec.cni:
        return spec.cni
    bridge = bridges(spec)[0]
    plugin = {
        "type": "bridge",
        "bridge": f"cni{device_tag(spec.name)}",
        "isGateway": True,
        "ipMasq": True,
        "ipam": {"type": "host-local", "subnet": str(bridge.ipv4.network), "routes": [{"dst": "0.0.0.0/0"}]},
    }
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [plugin]})


def socket_of(record: State) -> Path:
    """Return the path of the CRI socket."""
    return record.directory / "containerd.sock"


def start(record: State) -> None:
    """Start containerd and import the image. Raises `LabError`."""
    directory, network = record.directory, cni_list.parse(network_text(record.spec))
    networks = directory / "networks"
    networks.mkdir(mode=0o700, parents=True, exist_ok=True)
    (networks / "pods.conflist").write_text(network.whole(cni.directory(record)))
    plugins = cni.plugin_directory(cni.plugin_path(), network)
    (directory / "containerd.toml").write_text(config_text(directory, _IMAGE, networks, plugins))
    (directory / "image.tar").write_bytes(image.saved(_IMAGE))
    daemon = holder.hold(record, COVERED, _SCRIPT)
    deadline = time.monotonic() + _READY_LIMIT_S
    while not socket_of(record).exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"containerd: did not start; {_complaint(record)}")
        time.sleep(0.02)
    argv = _ctr(record, ["images", "import", "--snapshotter", "native", str(directory / "image.tar")])
    netns.run(holder.in_mounts(record, argv), env=record.environment())


def create(record: State, place: Placement) -> Member:
    """Run one pod with a container; returns its namespace and addresses. Raises `LabError`."""
    uid = str(uuid.uuid4())
    metadata = message(f1=place.name, f2=uid, f3=NAMESPACE)
    group = f"/{holder.cgroup_parent(record.spec.name)}/kubepods/burstable/pod{uid}"
    config = message(f1=metadata, f8=message(f1=group))
    sandbox = _text(_call(record, "RunPodSandbox", message(f1=config)), 1)
    # The clean-up recognises the lab's processes by these variables, including those of `ctr tasks exec`.
    env = [message(f1=name, f2=value) for name, value in record.marks(place.name).items()]
    command = ["/bin/sleep", "2147483647"]
    container = message(f1=message(f1="app"), f2=message(f1=_IMAGE), f3=command, f6=env)
    made = _text(_call(record, "CreateContainer", message(f1=sandbox, f2=container, f3=config)), 1)
    _call(record, "StartContainer", message(f1=made))
    told = _call(record, "PodSandboxStatus", message(f1=sandbox, f2=1))
    found = dict(fields(_bytes(told, 1)))
    info = next(json.loads(_text(entry, 2)) for n, entry in fields(told) if n == 2 and _text(_raw(entry), 1) == "info")
    addresses = [_text(_raw(found[5]), 1)] if 5 in found else []
    addresses += [_text(_raw(entry), 1) for number, entry in fields(_raw(found.get(5, b""))) if number == 2]
    path = holder.handle(record, place.name)
    netns.keep(Path(f"/proc/{int(info['pid'])}/ns/net"), path)
    return Member(
        str(path),
        slot=place.slot,
        ipv4=next((each for each in addresses if "." in each), ""),
        ipv6=next((each for each in addresses if ":" in each), ""),
        docker_id=made,
        sandbox_id=sandbox,
    )


def command(record: State, member: Member, argv: list[str]) -> list[str]:
    """Return the command line that runs `argv` in all of a container's namespaces."""
    exec_id = f"mace-{uuid.uuid4().hex[:12]}"
    return holder.in_mounts(record, _ctr(record, ["tasks", "exec", "--exec-id", exec_id, member.docker_id, *argv]))


def remove(record: State, member: Member) -> None:
    """Stop and remove one pod with its container. Raises `LabError`."""
    netns.remove(Path(member.path))
    if member.sandbox_id:
        for method in ("StopPodSandbox", "RemovePodSandbox"):
            _call(record, method, message(f1=member.sandbox_id))


def message(**values: object) -> bytes:
    """Return a protobuf message: `f3="a"` is field 3. A value is a text, a number, a message, or a list of such."""
    made = b""
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            number = int(name[1:])
            if isinstance(one, int):
                made += _varint(number << 3) + _varint(one)
            else:
                raw = one.encode() if isinstance(one, str) else _raw(one)
                made += _varint(number << 3 | 2) + _varint(len(raw)) + raw
    return made


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def _raw(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise LabError(f"containerd: expected a message, found {value!r}")
    return value


def _bytes(told: bytes, number: int) -> bytes:
    return next((_raw(value) for its, value in fields(told) if its == number), b"")


def _text(told: object, number: int) -> str:
    return _bytes(_raw(told), number).decode(errors="replace")


def _call(record: State, method: str, request: bytes) -> bytes:
    # h2, of the extra `cri`, is imported only where this runtime is used.
    from collector.machine.grpc_calls import call  # noqa: PLC0415

    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(socket_of(record)))
            (answer,) = call(sock, [(f"/runtime.v1.RuntimeService/{method}", request)], _CALL_LIMIT_S)
    except (OSError, ValueError) as error:
        raise LabError(f"containerd: {method}: {error}; {_complaint(record)}") from error
    return answer


def _ctr(record: State, argv: list[str]) -> list[str]:
    return ["ctr", "--address", str(socket_of(record)), "--namespace", "k8s.io", *argv]


def _complaint(record: State) -> str:
    """Return the last error line of containerd's log."""
    log = record.directory / "containerd.log"
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    bad = [line for line in lines if "level=error" in line or "level=fatal" in line]
    return f"{log.name}: {bad[-1]}" if bad else f"no error in {log}"
