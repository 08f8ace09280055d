"""Builds the lab's devices, addresses, routes and NAT with `ip -batch` and `nft`.

The containers' side is built here only for the netns runtime; Docker makes its own bridge, pairs and NAT. The outer
device and the remote are the same for both.

Two bridges with equal addresses need three things in the host namespace, for IPv4 and IPv6 alike:
  - a conntrack zone per bridge for the original direction only (Linux kernel commit deedb59039f1 ("netfilter:
    nf_conntrack: add direction support for zones"), in v4.3). The reply direction stays in the shared default zone,
    so that masquerade picks a free port or ICMP id when two containers use the same one;
  - a connection mark that names the bridge, which is copied to each reply before the reply is routed;
  - a routing table for each mark, with a route to that bridge only.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from contracts.errors import LabError, Unavailable
from mace.lab import netns
from mace.lab.plan import (
    HOST,
    INNER_DEVICE,
    REMOTE,
    FarEnd,
    Placement,
    Spec,
    bridge_networks,
    bridges,
    far_host,
    netns_name,
    outer_device,
    remote_device,
    rps_masks,
    wire,
)

_MEMBER_SYSCTLS: Final[dict[str, int | str]] = {
    # A new namespace copies the machine's IPv4 values; a distribution's rp_filter must not drop packets of the lab.
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    # Addresses are ready at once, and only the requested traffic, ARP and ND are on the wire.
    "ipv6/conf/all/disable_ipv6": 0,
    "ipv6/conf/default/disable_ipv6": 0,
    "ipv6/conf/all/accept_dad": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/dad_transmits": 0,
    "ipv6/conf/default/accept_ra": 0,
    "ipv6/conf/default/router_solicitations": 0,
}
_HOST_SYSCTLS: Final[dict[str, int | str]] = {
    **_MEMBER_SYSCTLS,
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv6/conf/default/forwarding": 1,
}
_BRIDGE_NETFILTER: Final[dict[str, int | str]] = {
    # Bridged frames also pass the IP hooks, as on every host that runs Docker, which loads br_netfilter and needs it.
    # This is part of what a container adds, so the lab switches it on whatever the machine's setting. The files exist
    # only where br_netfilter is built in or loaded; the lab loads no module for it.
    "bridge/bridge-nf-call-iptables": 1,
    "bridge/bridge-nf-call-ip6tables": 1,
}

_DOOMED: Final = 77
"""Number of the device group that `remove_devices` makes; any number will do in a namespace that is the lab's own."""


def problems(env: Mapping[str, str]) -> list[Unavailable]:
    """Return what a lab needs and the kernel refuses. To be run in a namespace that is then removed."""
    found = []
    if not Path("/proc/sys/net/ipv6").is_dir():
        found.append(Unavailable("lab", "the kernel has no IPv6", "boot without ipv6.disable=1"))
    for kind in ("veth", "bridge"):
        try:
            netns.run(["ip", "link", "add", "name", f"try-{kind}", "type", kind], env=env)
        except LabError as error:
            remedy = f"modprobe {kind}, or boot a kernel with it"
            found.append(Unavailable("lab", f"the kernel makes no {kind} device ({_last_line(error)})", remedy))
    try:
        masquerade = "table inet try { chain c { type nat hook postrouting priority 100; masquerade; }; }"
        netns.run(["nft", "-f", "-"], stdin=masquerade + "\n", env=env)
    except LabError as error:
        found.append(
            Unavailable(
                "lab", f"nft cannot masquerade ({_last_line(error)})", "modprobe nft_masq, or boot a kernel with it"
            )
        )
    return found


def build_wire(spec: Spec, env: Mapping[str, str]) -> None:
    """Make the host's outer device, its default route: one end of a veth pair to the far host, or a tap device.

    The namespaces exist; a guest opens the tap device.
    """
    lab, far_member = spec.name, far_host(spec.layout)
    outer, far = outer_device(lab), remote_device(lab)
    make_router(lab, HOST)
    guest = spec.far_end is FarEnd.GUEST
    pair = f"link add name {outer} type veth peer name {far} netns {netns_name(lab, far_member)}"
    (host4, host6), (remote4, remote6) = wire(HOST), wire(REMOTE)
    batch(
        lab,
        HOST,
        [
            "link set lo up",
            f"tuntap add dev {outer} mode tap" if guest else pair,
            f"link set dev {outer} up",
            f"addr add {host4} dev {outer}",
            f"addr add {host6} dev {outer} nodad",
            f"route add default via {remote4.ip} dev {outer}",
            f"route add default via {remote6.ip} dev {outer}",
        ],
        env,
    )
    if guest:
        return
    netns.write_sysctls(_path(lab, far_member), _MEMBER_SYSCTLS)
    batch(
        lab,
        far_member,
        [
            "link set lo up",
            f"link set dev {far} up",
            f"addr add {remote4} dev {far}",
            f"addr add {remote6} dev {far} nodad",
        ],
        env,
    )


def make_router(lab: str, member: str) -> None:
    """Let a member forward packets, and show bridged frames to the IP hooks as a host that runs Docker does."""
    sysctls, path = dict(_HOST_SYSCTLS), _path(lab, member)
    if netns.enter(path, lambda: Path("/proc/sys/net/bridge").is_dir()):
        sysctls |= _BRIDGE_NETFILTER
    netns.write_sysctls(path, sysctls)


def rps_problems(spec: Spec) -> list[Unavailable]:
    """Return why receive softirqs cannot be spread here as the lab's specification says; empty if they can."""
    wanted, cpus = functools.reduce(operator.or_, rps_masks(spec).values(), 0), os.cpu_count() or 1
    if wanted and not Path("/proc/sys/net/core/rps_sock_flow_entries").exists():
        return [Unavailable("lab --rps", "this kernel has no CONFIG_RPS", "use a kernel that has it, as Debian's")]
    if wanted >> cpus:
        return [Unavailable("lab --rps", f"CPU {wanted.bit_length() - 1} does not exist", f"name CPUs 0 to {cpus - 1}")]
    return []


def spread_softirqs(lab: str, device: str, cpus: int, env: Mapping[str, str]) -> None:
    """Let the CPUs of a mask run the receive softirq of a device of the host (RPS). Raises `LabError`.

    The device's files are in a /sys of its namespace, which is mounted for this alone.
    """
    script = (
        'mount -t sysfs none /sys && for queue in /sys/class/net/"$0"/queues/rx-*; do'
        ' echo "$1" >"$queue/rps_cpus" || exit 1; done'
    )
    words = f"{cpus:x}"
    groups = [words[max(0, at - 8) : at] for at in range(len(words), 0, -8)]  # 32 bits each, separated by commas
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, device, ",".join(reversed(groups))]
    run(lab, HOST, argv, env)


def build_bridges(spec: Spec, env: Mapping[str, str]) -> None:
    """Make the bridges, and masquerade from them to the outer device, for both IP versions as Docker with ip6tables."""
    commands: list[str] = []
    for bridge in bridges(spec):
        # With equal addresses only the first bridge may own the main table's route, so the kernel must not add routes.
        prefix_route = "noprefixroute" if spec.same_addresses else ""
        commands += [
            f"link add name {bridge.name} address {bridge.mac} type bridge stp_state 0 forward_delay 0",
            f"link set dev {bridge.name} up",
            f"addr add {bridge.ipv4} dev {bridge.name} {prefix_route}",
            f"addr add {bridge.ipv6} dev {bridge.name} nodad {prefix_route}",
        ]
    batch(spec.name, HOST, commands, env)
    if spec.same_addresses:
        for family in ("-4", "-6"):
            batch(spec.name, HOST, _routes_by_mark(spec, family), env, family)
    netns.run(netns.enter_command(_path(spec.name, HOST), ["nft", "-f", "-"]), stdin="\n".join(_ruleset(spec)), env=env)


def route_back(lab: str, env: Mapping[str, str]) -> None:
    """Give the remote a default route by the host, for containers' addresses that the host does not masquerade."""
    batch(lab, REMOTE, [f"route add default via {address.ip}" for address in wire(HOST)], env)


def prepare_container(lab: str, name: str, env: Mapping[str, str]) -> None:
    """Set a container's sysctls and its loopback device up, before CNI plugins make its network."""
    netns.write_sysctls(_path(lab, name), _MEMBER_SYSCTLS)
    batch(lab, name, ["link set lo up"], env)


def build_container(spec: Spec, place: Placement, env: Mapping[str, str]) -> None:
    """Make the veth pair of one container, whose namespace exists, and its addresses and default routes."""
    inner = netns_name(spec.name, place.name)
    netns.write_sysctls(_path(spec.name, place.name), _MEMBER_SYSCTLS)
    batch(
        spec.name,
        HOST,
        [
            f"link add name {place.veth} type veth peer name {INNER_DEVICE} address {place.mac} netns {inner}",
            f"link set dev {place.veth} master {place.bridge.name} addrgenmode none up",
        ],
        env,
    )
    batch(
        spec.name,
        place.name,
        [
            "link set lo up",
            f"link set dev {INNER_DEVICE} up",
            f"addr add {place.ipv4} dev {INNER_DEVICE}",
            f"addr add {place.ipv6} dev {INNER_DEVICE} nodad",
            f"route add default via {place.bridge.ipv4.ip} dev {INNER_DEVICE}",
            f"route add default via {place.bridge.ipv6.ip} dev {INNER_DEVICE}",
        ],
        env,
    )


def add_namespaces(names: Iterable[str], env: Mapping[str, str]) -> None:
    """Make named namespaces. Raises `LabError` if one exists."""
    netns.run(["ip", "-batch", "-"], stdin="".join(f"netns add {name}\n" for name in names), env=env)


def remove_devices(path: Path, env: Mapping[str, str]) -> None:
    """Delete all devices of the namespace at `path`; deleting one end of a pair deletes the other.

    No device therefore outlives the lab where another process holds the namespace, and all are gone on return, while
    the kernel would empty the namespace later. One group deletes them together, because each deletion waits for an RCU
    grace period.
    """
    with suppress(LabError):  # the user, or the end of a process, may delete a device at the same time
        listed = netns.run(netns.enter_command(path, ["ip", "-o", "link", "show"]), env=env)
        names = [line.split(": ", 2)[1].partition("@")[0] for line in listed.splitlines()]
        commands = [f"link set dev {name} group {_DOOMED}\n" for name in names if name != "lo"]
        if commands:
            argv = netns.enter_command(path, ["ip", "-force", "-batch", "-"])
            netns.run(argv, stdin="".join([*commands, f"link del group {_DOOMED}\n"]), env=env)


def batch(lab: str, member: str, commands: list[str], env: Mapping[str, str], *options: str) -> None:
    """Run commands of `ip`, given without that word, in a member's namespace. Raises `LabError`."""
    argv = netns.enter_command(_path(lab, member), ["ip", *options, "-batch", "-"])
    netns.run(argv, stdin="".join(f"{command}\n" for command in commands), env=env)


def run(lab: str, member: str, argv: list[str], env: Mapping[str, str]) -> None:
    """Run a command in a member's namespace. Raises `LabError`."""
    netns.run(netns.enter_command(_path(lab, member), argv), env=env)


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1]


def _routes_by_mark(spec: Spec, family: str) -> list[str]:
    commands = []
    for bridge in bridges(spec):
        network = bridge.ipv4.network if family == "-4" else bridge.ipv6.network
        table = 100 + bridge.mark
        commands.append(f"rule add fwmark {bridge.mark} lookup {table}")
        commands.append(f"route add {network} dev {bridge.name} table {table}")
        if bridge.mark == 1:  # for packets that the host itself sends to an address that several containers have
            commands.append(f"route add {network} dev {bridge.name}")
    return commands


def _ruleset(spec: Spec) -> list[str]:
    net4, net6 = bridge_networks()
    outer = outer_device(spec.name)
    rules = [
        "table inet mace_lab {",
        "  chain nat { type nat hook postrouting priority 100;",
        f'    oifname "{outer}" ip saddr {net4} masquerade',
        f'    oifname "{outer}" ip6 saddr {net6} masquerade',
        "  }",
    ]
    if spec.same_addresses:
        rules.append("  chain zones { type filter hook prerouting priority -300;")
        rules += [f'    iifname "{b.name}" ct original zone set {b.mark}' for b in bridges(spec)]
        rules += ["  }", "  chain marks { type filter hook prerouting priority -150;"]
        rules += [f'    iifname "{b.name}" ct mark set {b.mark}' for b in bridges(spec)]
        rules += [
            f'    iifname "{outer}" meta mark set ct mark',
            "  }",
            "  chain own { type route hook output priority -150;",  # the host's own replies
            "    ct mark != 0 meta mark set ct mark",
            "  }",
        ]
    return [*rules, "}"]


def _path(lab: str, member: str) -> Path:
    return netns.NETNS_DIR / netns_name(lab, member)
