"""The network of a lab's containers as CNI plugins make it.

The lab does what a container runtime does by the Container Network Interface specification 1.0.0, sections 2 and 3:

    ADD   bridge ──result──► portmap ──result──► bandwidth     each plugin gets the result of the one before it
    DEL   bridge ◄────────── portmap ◄────────── bandwidth     each gets the result of the whole ADD

A plugin is an executable: parameters are in its environment, the configuration is on its standard input, and its result
or its error is JSON on its standard output. All plugins run in the lab's host namespace. Their files are in the lab's
own directory; an address that leads nowhere keeps the plugin firewall from the machine's firewalld, which it would
otherwise call over D-Bus.

    /run/mace/labs/NAME.d/cni/networks/                    addresses in use, by the plugin host-local
    /run/mace/labs/NAME.d/cni/results/NETWORK-ID-eth0      the result of each ADD, in the format of libcni's cache
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
from collections.abc import Mapping
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, Final

from contracts.errors import LabError, Unavailable
from mace.lab import cni_list, netns
from mace.lab.cni_list import NetworkList
from mace.lab.plan import HOST, INNER_DEVICE
from mace.lab.state import Member, State

DIRECTORIES: Final = "/usr/lib/cni:/opt/cni/bin"
"""Where plugins are without `CNI_PATH`: Debian's place, and the place of the plugins' own releases."""
_NOWHERE: Final = "unix:path=/nonexistent"
_LOG: Final = logging.getLogger(__name__)


def plugin_path() -> str:
    """Return the directories of plugins, with colons between them: the variable CNI_PATH, or the usual places."""
    return os.environ.get("CNI_PATH") or DIRECTORIES


def plugin_directory(path: str, network: NetworkList) -> str:
    """Return the first directory of `path` that has all programs of the network, for a runtime that takes only one."""
    for place in path.split(":"):
        if all(shutil.which(program, path=place) for program in network.programs):
            return place
    raise LabError(f"CNI network {network.name}: no directory of {path} has all of {', '.join(network.programs)}")


def problems(text: str) -> list[Unavailable]:
    """Return a reason for each plugin of a configuration list that is not installed."""
    path = plugin_path()
    return [
        Unavailable(
            "lab --cni",
            f"the CNI plugin {program!r} is not in {path}",
            "apt-get install containernetworking-plugins, or set CNI_PATH",
        )
        for program in cni_list.parse(text).programs
        if shutil.which(program, path=path) is None
    ]


def directory(record: State) -> Path:
    """Return the directory of the plugins' files and results."""
    return record.directory / "cni"


def add(record: State, name: str) -> None:
    """Add a container, whose namespace exists, to the network, and note its addresses in `record`.

    Raises `LabError` with the plugin's own code and message. What the plugins before it made stays until `delete`.
    """
    network, member = cni_list.parse(record.spec.cni), record.members[name]
    directory(record).mkdir(mode=0o700, parents=True, exist_ok=True)
    member.cni_id = f"{record.id[:12]}-{name}"
    record.save()  # first, so that a clean-up knows what a killed run has begun
    result: dict[str, Any] | None = None
    for position in range(len(network.plugins)):
        result = _call(record, name, "ADD", network, position, result)
        if result is None:
            raise LabError(f"CNI plugin {network.types[position]}, ADD of {name}: no result")
    assert result is not None
    _keep(record, member, network, result)
    member.ipv4, member.ipv6 = _addresses(result, member.path)
    if not member.ipv4 and not member.ipv6:
        raise LabError(f"CNI network {network.name}: no plugin gives {name} an address")


def delete(record: State, name: str) -> None:
    """Remove a container from the network, plugin by plugin in reverse order; does nothing if it was never added.

    A plugin that fails is named in a warning, and the others run all the same: the container is removed in any case.
    """
    member = record.members[name]
    host = record.members.get(HOST)
    # Where the host namespace is gone, everything that the plugins had made there is gone too.
    if member.cni_id and host is not None and host.inode and netns.inode(Path(host.path)) == host.inode:
        network = cni_list.parse(record.spec.cni)
        result = _kept(record, member, network)
        for position in reversed(range(len(network.plugins))):
            try:
                _call(record, name, "DEL", network, position, result)
            except LabError as error:
                _LOG.warning("lab %r: %s", record.spec.name, error)
        _result_file(record, member, network).unlink(missing_ok=True)
    member.cni_id = ""


def _call(
    record: State, name: str, command: str, network: NetworkList, position: int, previous: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Run one plugin; returns its result, None if it prints none (DEL). Raises `LabError`."""
    member, plugin = record.members[name], network.types[position]
    what = f"CNI plugin {plugin}, {command} of {name}"
    program = shutil.which(plugin, path=record.cni_path)
    if program is None:
        raise LabError(f"{what}: not found in {record.cni_path}")
    done = netns.completed(
        netns.enter_command(Path(record.members[HOST].path), [program]),
        stdin=json.dumps(network.request(position, previous, directory(record))),
        env={
            **record.environment(name),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": member.cni_id,
            "CNI_NETNS": member.path if netns.inode(Path(member.path)) else "",  # section 2: DEL without a namespace
            "CNI_IFNAME": INNER_DEVICE,
            "CNI_PATH": record.cni_path,
            "DBUS_SYSTEM_BUS_ADDRESS": _NOWHERE,
        },
    )
    try:
        said = json.loads(done.stdout) if done.stdout.strip() else None
    except ValueError:
        said = done.stdout
    if done.returncode:
        raise LabError(f"{what}: {_complaint(said, done.stderr, done.returncode)}")
    if said is not None and not isinstance(said, dict):
        raise LabError(f"{what}: expected a result in JSON, found {str(said)[:60]!r}")
    return said


def _complaint(said: object, stderr: str, status: int) -> str:
    """Return a plugin's error in one line: its own code, message and details (section 5, "Error")."""
    if isinstance(said, dict) and "msg" in said:
        told = [f"code {said.get('code')}: {said['msg']}", said.get("details")]
        text = "; ".join(str(part) for part in told if part)
    else:
        text = stderr.strip() or str(said or "").strip() or f"exit status {status}, no message"
    return " ".join(text.split())


def _addresses(result: Mapping[str, Any], path: str) -> tuple[str, str]:
    """Return the first IPv4 and IPv6 address that a result gives the container; "" where there is none.

    An address that names an interface counts if the interface is in the container's namespace.
    """
    found = {4: "", 6: ""}
    try:
        interfaces = result.get("interfaces") or []
        for entry in result.get("ips") or []:
            place = entry.get("interface")
            if place is not None and interfaces[place].get("sandbox", "") != path:
                continue
            address = ip_interface(entry["address"]).ip
            found[address.version] = found[address.version] or str(address)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise LabError(f"CNI result: {error!r} in {json.dumps(result)[:200]}") from None
    return found[4], found[6]


def _result_file(record: State, member: Member, network: NetworkList) -> Path:
    return directory(record) / "results" / f"{network.name}-{member.cni_id}-{INNER_DEVICE}"


def _keep(record: State, member: Member, network: NetworkList, result: Mapping[str, Any]) -> None:
    """Write the result as libcni's cache has it (containernetworking/cni, libcni/api.go, cachedInfo)."""
    path = _result_file(record, member, network)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(
        json.dumps(
            {
                "kind": "cniCacheV1",
                "containerId": member.cni_id,
                "config": base64.b64encode(record.spec.cni.encode()).decode(),
                "ifName": INNER_DEVICE,
                "networkName": network.name,
                "netns": member.path,
                "result": result,
            }
        )
    )
    draft.rename(path)


def _kept(record: State, member: Member, network: NetworkList) -> dict[str, Any] | None:
    """Return the result of the container's ADD; None if the ADD did not end, and before 0.4.0, where DEL has none."""
    if network.version.startswith("0.3."):
        return None
    try:
        found = json.loads(_result_file(record, member, network).read_text())["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None
