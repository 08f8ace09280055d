"""The runtime apptainer: instances of Apptainer (Singularity's successor), started in the lab's host namespace.

As Apptainer's users find it, an instance shares the host's network. With a CNI configuration an instance has a network
namespace of its own, for which Apptainer itself calls the plugins (`--net --network NAME`).

Apptainer has no daemon. The lab's holder sleeps, and covers the results that Apptainer's CNI library caches; its
processes are in the lab's control group, because they clear their environment. The configuration and the instances'
records are files of the lab, those of the machine's Apptainer are not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from contracts.errors import LabError
from mace.lab import cni, cni_list, holder, image, netns
from mace.lab.plan import INNER_DEVICE, Placement
from mace.lab.state import Member, State

COVERED: Final = ("/var/lib/cni",)
_HOLD: Final = "exec sleep 2147483647"
PROGRAMS: Final = ("apptainer", "unshare", "mount")
_CONFIG: Final = """\
# By default root's containers have all capabilities, and do not start where the machine's root lacks one.
root default capabilities = no
mount home = no
cni configuration path = {networks}
cni plugin path = {plugins}
"""
_CAPABILITY: Final = "CAP_NET_RAW"
"""For ping, as Docker and Podman give it."""
_START: Final = "#!/bin/sh\nexec /bin/sleep 2147483647\n"
"""What an instance runs."""


def start(record: State) -> None:
    """Write the image and the configuration, and start the holder."""
    root, networks = record.directory / "image", record.directory / "networks"
    networks.mkdir(mode=0o700, parents=True, exist_ok=True)
    image.write(root)
    for name, text in {"etc/passwd": "", "etc/group": "", ".singularity.d/actions/start": _START}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    (root / "var/tmp").mkdir(parents=True)
    plugins = ""
    if record.spec.cni:
        network = cni_list.parse(record.spec.cni)
        (networks / f"{network.name}.conflist").write_text(network.whole(cni.directory(record)))
        plugins = cni.plugin_directory(record.cni_path, network)
    _config(record).write_text(_CONFIG.format(networks=networks, plugins=plugins))
    holder.make_cgroup(record.spec.name)
    holder.hold(record, COVERED, _HOLD)


def create(record: State, place: Placement) -> Member:
    """Start one instance; returns its namespace and addresses. Raises `LabError`."""
    network = ["--net", "--network", cni_list.parse(record.spec.cni).name] if record.spec.cni else []
    options = ["--add-caps", _CAPABILITY, *network]
    _run(record, place.name, ["instance", "start", *options, str(record.directory / "image"), place.name])
    instances: list[dict[str, Any]] = json.loads(_run(record, "", ["instance", "list", "--json"]))["instances"]
    pid = next((int(each["pid"]) for each in instances if each["instance"] == place.name), 0)
    if not pid:
        raise LabError(f"apptainer: instance {place.name} ended at once")
    path = holder.handle(record, place.name)
    netns.keep(Path(f"/proc/{pid}/ns/net"), path)
    member = Member(str(path), slot=place.slot)
    member.ipv4, member.ipv6 = _addresses(record, path) if record.spec.cni else ("", "")
    return member


def command(record: State, member: Member, argv: list[str]) -> list[str]:
    """Return the command line that runs `argv` in all of an instance's namespaces."""
    name = Path(member.path).name.removeprefix("netns-")
    options = ["--add-caps", _CAPABILITY]
    return _command(record, ["exec", *options, f"instance://{name}", *argv])


def remove(record: State, member: Member) -> None:
    """Stop one instance; Apptainer calls its network's plugins. Raises `LabError`."""
    name = Path(member.path).name.removeprefix("netns-")
    netns.remove(Path(member.path))
    listed = json.loads(_run(record, "", ["instance", "list", "--json", name]))["instances"]
    if listed:
        _run(record, "", ["instance", "stop", "--signal", "KILL", name])


def _config(record: State) -> Path:
    return record.directory / "apptainer.conf"


def _command(record: State, argv: list[str]) -> list[str]:
    group = holder.make_cgroup(record.spec.name)
    apptainer = ["env", f"APPTAINER_CONFIGDIR={record.directory}/apptainer"]
    apptainer += ["apptainer", "--silent", "--config", str(_config(record))]
    return holder.in_mounts(record, holder.in_cgroup(group, [*apptainer, *argv]))


def _run(record: State, member: str, argv: list[str]) -> str:
    """Run Apptainer; returns its output. Raises `LabError` with the last line that it prints."""
    done = netns.completed(_command(record, argv), env=record.environment(member))
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        said = next((line for line in lines if line.startswith("FATAL")), lines[-1] if lines else "")
        raise LabError(f"apptainer {' '.join(argv[:2])}: {said or f'exit status {done.returncode}'}")
    return done.stdout


def _addresses(record: State, path: Path) -> tuple[str, str]:
    """Return the first global IPv4 and IPv6 address of an instance's device; "" where there is none."""
    argv = ["ip", "-json", "address", "show", "dev", INNER_DEVICE, "scope", "global"]
    found = {"inet": "", "inet6": ""}
    for device in json.loads(netns.run(netns.enter_command(path, argv), env=record.environment())):
        for each in device.get("addr_info", ()):  # some versions of ip leave an empty object for what is filtered out
            if each and not found[each["family"]]:
                found[each["family"]] = each["local"]
    return found["inet"], found["inet6"]
