"""Networks laid out as well-known CNI implementations lay them out, built with `ip` and without their agents.

    overlay   eth0 ─ veth ─ bridge ─ VXLAN over out0     the same on a second host, to the far end's eth0, 192.0.2.2
    flannel   eth0 ─ veth ─ bridge ─ VXLAN over out0     the far end is a pod of the other node, 192.0.2.2
    calico    eth0 ─ veth ─ out0                         no bridge: a route to each pod, proxy ARP at its veth
    ptp       eth0 ─ veth ─ out0                         the gateway's address at each veth, and policy routes
    ipip      eth0 ─ veth ─ IP in IP over out0           as calico, to a pod of the other node, 192.0.2.2
    cilium    eth0 ─ veth ─ out0                         as calico, and tc programs forward IPv4 past the host's stack
    netkit_l2, netkit_l3
              eth0 ─ netkit ─ out0                       as calico; no neighbours, and so no proxy ARP, in mode L3

The addresses are those of `plan`; the other node of overlay, flannel and ipip has addresses of its own. Between pods
and the far end no layout translates addresses: the remote has routes back.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path
from typing import Final

from contracts.errors import LabError, Unavailable
from mace.lab import netkit, netns, network
from mace.lab.plan import (
    FAR_POD,
    HOST,
    HOST2,
    INNER_DEVICE,
    NETKIT,
    REMOTE,
    TUNNELED,
    Layout,
    Placement,
    Spec,
    bridge_networks,
    bridges,
    device_tag,
    far_host,
    ipip_device,
    netns_name,
    outer_device,
    remote_device,
    vxlan_device,
    wire,
)

_NODE: Final = ("02:42:c0:00:02:01", "02:42:c0:00:02:02")
"""MAC addresses of the two VXLAN devices, the lab's host first: flannel's daemon writes each into the other node's
tables."""
_VXLAN_PORT: Final = 8472
"""The kernel's default port, which flannel uses."""
_VXLAN_BYTES: Final = 50
"""What VXLAN adds to an IP packet over IPv4: Ethernet 14, VXLAN 8, UDP 8, IP 20."""
_IPIP_BYTES: Final = 20
"""What IP in IP adds to an IP packet."""
_OTHER_NODE: Final = (IPv4Interface("192.0.2.0/24"), IPv6Interface("2001:db8:2::/64"))
"""Pods' networks of the other node; the network's own address is the VXLAN device's, as with flannel."""

_ROUTER_MAC: Final = "ee:ee:ee:ee:ee:ee"
_ROUTER4: Final = IPv4Address("192.0.2.1")
_ROUTER6: Final = IPv6Address("fe80::ecee:eeff:feee:eeee")
"""Gateway of every pod under calico: no device has the IPv4 address (Calico's is 169.254.1.1), and proxy ARP answers;
the IPv6 address follows from the MAC, which every host's end of a pair has."""

_POLICY_TABLE: Final = 100
_POLICY_TO, _POLICY_FROM = 512, 1536
"""Priorities of the AWS VPC CNI's rules towards and from a pod."""
_REDIRECTING: Final = Path(__file__).with_name("redirecting.py")


def programs(layout: Layout) -> tuple[str, ...]:
    """Return the programs that the layout needs besides those of every lab."""
    return {
        Layout.OVERLAY: ("bridge",),
        Layout.FLANNEL: ("bridge",),
        Layout.CILIUM: ("tc", "unshare", "mount"),
    }.get(layout, ())


def problems(layout: Layout, env: Mapping[str, str]) -> list[Unavailable]:
    """Return which devices of the layout the kernel refuses. To be run in a namespace that is then removed."""
    kind = "netkit" if layout in NETKIT else "ipip" if layout is Layout.IPIP else ""
    try:
        if layout in NETKIT:
            netkit.add("try-netkit", netkit.Mode.L3, Path("/proc/thread-self/ns/net"), "try-peer")
        elif layout is Layout.IPIP:
            netns.run(["ip", "link", "add", "name", "try-ipip", "type", "ipip", "local", "127.0.0.1"], env=env)
    except (OSError, LabError) as error:
        option = "Linux 6.7 or later with CONFIG_NETKIT" if kind == "netkit" else "a kernel with CONFIG_NET_IPIP"
        remedy = f"modprobe {kind}, or boot {option}"
        why = f"the kernel makes no {kind} device ({str(error).splitlines()[-1]})"
        return [Unavailable(f"lab --layout {layout}", why, remedy)]
    return []


def build_host(spec: Spec, env: Mapping[str, str]) -> None:
    """Make what the layout has in the host's and the remote's namespaces before there are containers."""
    if spec.layout in TUNNELED:
        network.build_bridges(spec, env)
        nodes = (HOST, far_host(spec.layout))
        for number, member in enumerate(nodes):
            other = nodes[1 - number]
            device = vxlan_device(spec.name, second=number == 1)
            network.batch(spec.name, member, _tunnel(spec, member, device), env)
            entry = [_NODE[1 - number], "dev", device, "dst", str(wire(other)[0].ip), "self", "permanent"]
            network.run(spec.name, member, ["bridge", "fdb", "add", *entry], env)
        if spec.layout is Layout.OVERLAY:
            _second_bridge(spec, env)
        return
    (host4, host6), far = wire(HOST), remote_device(spec.name)
    net4, net6 = bridge_networks()
    if spec.layout is Layout.IPIP:
        for member in (HOST, REMOTE):
            network.batch(spec.name, member, _ip_in_ip(spec, member), env)
        return
    back = [f"route add {net4} via {host4.ip} dev {far}", f"route add {net6} via {host6.ip} dev {far}"]
    network.batch(spec.name, REMOTE, back, env)
    if spec.layout is Layout.PTP:
        outer, (far4, far6) = outer_device(spec.name), wire(REMOTE)
        table = [f"route add default via {a.ip} dev {outer} table {_POLICY_TABLE}" for a in (far4, far6)]
        network.batch(spec.name, HOST, table, env)
    if spec.layout is Layout.CILIUM:
        network.run(spec.name, HOST, ["tc", "qdisc", "add", "dev", outer_device(spec.name), "clsact"], env)


def build_container(spec: Spec, place: Placement, env: Mapping[str, str]) -> None:
    """Make the pair of one container, whose namespace exists, and its addresses and routes on both sides."""
    if spec.layout in TUNNELED:
        network.build_container(spec, place, env)
        mtu = 1500 - _VXLAN_BYTES
        network.batch(spec.name, HOST, [f"link set dev {place.veth} mtu {mtu}"], env)
        network.batch(spec.name, place.name, [f"link set dev {INNER_DEVICE} mtu {mtu}"], env)
        return
    network.prepare_container(spec.name, place.name, env)
    _pair(spec, place, env)
    routes = {Layout.PTP: _policy_routed, Layout.NETKIT_L3: _without_neighbours}.get(spec.layout, _proxied)
    host, container = routes(place)
    network.batch(spec.name, HOST, [f"link set dev {place.veth} up"], env)
    if routes is _proxied:
        # Without the second, the kernel waits up to 0.8 s before it answers for another address; Calico sets both.
        answering = {f"ipv4/conf/{place.veth}/proxy_arp": 1, f"ipv4/neigh/{place.veth}/proxy_delay": 0}
        netns.write_sysctls(netns.NETNS_DIR / netns_name(spec.name, HOST), answering)
    up = [f"link set dev {INNER_DEVICE} up"]
    network.batch(spec.name, place.name, up + container, env)
    for family, commands in host.items():
        network.batch(spec.name, HOST, commands, env, family)
    if spec.layout is Layout.CILIUM:
        _redirect(spec, place, "add", env)


def _pair(spec: Spec, place: Placement, env: Mapping[str, str]) -> None:
    """Make the pair between the host and one container's namespace."""
    inner = netns_name(spec.name, place.name)
    if spec.layout in NETKIT:
        l2 = spec.layout is Layout.NETKIT_L2
        mode, macs = (netkit.Mode.L2, (_ROUTER_MAC, place.mac)) if l2 else (netkit.Mode.L3, None)
        path = netns.NETNS_DIR / inner
        try:
            host = netns.NETNS_DIR / netns_name(spec.name, HOST)
            netns.enter(host, lambda: netkit.add(place.veth, mode, path, INNER_DEVICE, macs))
        except OSError as error:
            raise LabError(str(error)) from error
        return
    mac = "" if spec.layout is Layout.PTP else f"address {_ROUTER_MAC}"
    mtu = f"mtu {1500 - _IPIP_BYTES}" if spec.layout is Layout.IPIP else ""
    peer = f"type veth peer name {INNER_DEVICE} address {place.mac} {mtu} netns {inner}"
    network.batch(spec.name, HOST, [f"link add name {place.veth} {mac} {mtu} {peer}"], env)


def remove_container(spec: Spec, place: Placement, env: Mapping[str, str]) -> None:
    """Remove what a container has in the host namespace besides its pair, whose routes go with it."""
    if spec.layout is Layout.PTP:
        for family, commands in _rules(place, "del").items():
            for command in commands:
                with suppress(LabError):  # a set-up that failed has not made all of them
                    network.batch(spec.name, HOST, [command], env, family)
    elif spec.layout is Layout.CILIUM:
        with suppress(LabError):
            _redirect(spec, place, "del", env)


def _tunnel(spec: Spec, member: str, device: str) -> list[str]:
    """Return the commands for one end of the tunnel, with the tables that flannel's daemon writes on each node."""
    under, number = wire(member)[0], 0 if member == HOST else 1
    bridge = bridges(spec)[0]
    here = (bridge.ipv4.network, bridge.ipv6.network)
    there = tuple(each.network for each in _OTHER_NODE)
    own, far = (here, there) if member == HOST else (there, here)
    tunnel = f"type vxlan id 1 local {under.ip} dstport {_VXLAN_PORT} nolearning"
    # With flannel the other node's device stands for a pod of it, and answers under the pod's address.
    pod = FAR_POD if member == REMOTE else ()
    source4, source6 = (f"src {address}" for address in pod) if pod else ("", "")
    return [
        f"link add name {device} address {_NODE[number]} {tunnel}",
        f"link set dev {device} addrgenmode none up",
        *(f"addr add {address}/{address.max_prefixlen} dev {device} nodad" for address in pod),
        f"addr add {own[0].network_address}/32 dev {device}",
        f"addr add {own[1].network_address}/128 dev {device} nodad",
        f"neigh add {far[0].network_address} lladdr {_NODE[1 - number]} dev {device} nud permanent",
        f"neigh add {far[1].network_address} lladdr {_NODE[1 - number]} dev {device} nud permanent",
        f"route add {far[0]} via {far[0].network_address} dev {device} onlink {source4}",
        f"route add {far[1]} via {far[1].network_address} dev {device} onlink {source6}",
    ]


def _ip_in_ip(spec: Spec, member: str) -> list[str]:
    """Return the commands for one end of the tunnel, through which Calico's agent routes the other node's pods.

    IPv6 has no tunnel, as with Calico: its packets are routed as they are.
    """
    device, other = ipip_device(spec.name), wire(REMOTE if member == HOST else HOST)
    here, there = bridge_networks(), tuple(each.network for each in _OTHER_NODE)
    tunnel = [
        f"link add name {device} mtu {1500 - _IPIP_BYTES} type ipip local {wire(member)[0].ip}",
        f"link set dev {device} addrgenmode none up",
    ]
    if member == HOST:
        return [
            *tunnel,
            f"addr add {here[0].network_address}/32 dev {device}",
            f"route add {there[0]} via {other[0].ip} dev {device} onlink",
            f"route add {there[1]} via {other[1].ip} dev {outer_device(spec.name)}",
        ]
    far = remote_device(spec.name)
    return [
        *tunnel,
        f"addr add {FAR_POD[0]}/32 dev {device}",
        f"addr add {FAR_POD[1]}/128 dev {far} nodad",
        f"route add {here[0]} via {other[0].ip} dev {device} onlink src {FAR_POD[0]}",
        f"route add {here[1]} via {other[1].ip} dev {far} src {FAR_POD[1]}",
    ]


def _second_bridge(spec: Spec, env: Mapping[str, str]) -> None:
    """Make the second host's bridge, and the far end's pair on it."""
    bridge, veth = f"br{device_tag(spec.name)}-2", f"veth{device_tag(spec.name)}-far"
    mtu = 1500 - _VXLAN_BYTES
    gateways = tuple(each.ip + 1 for each in _OTHER_NODE)
    lengths = tuple(each.network.prefixlen for each in _OTHER_NODE)
    inner = netns_name(spec.name, REMOTE)
    network.make_router(spec.name, HOST2)
    network.batch(
        spec.name,
        HOST2,
        [
            f"link add name {bridge} type bridge stp_state 0 forward_delay 0",
            f"link set dev {bridge} up",
            *(f"addr add {a}/{n} dev {bridge} nodad" for a, n in zip(gateways, lengths, strict=True)),
            f"link add name {veth} mtu {mtu} type veth peer name {INNER_DEVICE} mtu {mtu} netns {inner}",
            f"link set dev {veth} master {bridge} addrgenmode none up",
        ],
        env,
    )
    network.prepare_container(spec.name, REMOTE, env)
    network.batch(
        spec.name,
        REMOTE,
        [
            f"link set dev {INNER_DEVICE} up",
            *(f"addr add {a}/{n} dev {INNER_DEVICE} nodad" for a, n in zip(FAR_POD, lengths, strict=True)),
            *(f"route add default via {gateway} dev {INNER_DEVICE}" for gateway in gateways),
        ],
        env,
    )


def _proxied(place: Placement) -> tuple[dict[str, list[str]], list[str]]:
    """Return the commands of the host by family, and of the container, for a pod behind proxy ARP."""
    ip4, ip6 = place.ipv4.ip, place.ipv6.ip
    host = {
        "-4": [f"route add {ip4} dev {place.veth} scope link"],
        "-6": [f"route add {ip6} dev {place.veth}"],
    }
    container = [
        f"addr add {ip4}/32 dev {INNER_DEVICE}",
        f"addr add {ip6}/128 dev {INNER_DEVICE} nodad",
        f"route add {_ROUTER4} dev {INNER_DEVICE} scope link",
        f"route add default via {_ROUTER4} dev {INNER_DEVICE}",
        f"route add default via {_ROUTER6} dev {INNER_DEVICE}",
    ]
    return host, container


def _without_neighbours(place: Placement) -> tuple[dict[str, list[str]], list[str]]:
    """Return the commands of the host by family, and of the container, for a pair without link-layer addresses."""
    ip4, ip6 = place.ipv4.ip, place.ipv6.ip
    host = {"-4": [f"route add {ip4} dev {place.veth} scope link"], "-6": [f"route add {ip6} dev {place.veth}"]}
    container = [
        f"addr add {ip4}/32 dev {INNER_DEVICE}",
        f"addr add {ip6}/128 dev {INNER_DEVICE} nodad",
        f"route add 0.0.0.0/0 dev {INNER_DEVICE} scope link",
        f"route add ::/0 dev {INNER_DEVICE}",
    ]
    return host, container


def _policy_routed(place: Placement) -> tuple[dict[str, list[str]], list[str]]:
    """Return the commands of the host by family, and of the container, for a pair as the CNI plugin ptp makes it."""
    gateways = {"-4": place.bridge.ipv4.ip, "-6": place.bridge.ipv6.ip}
    rules = _rules(place, "add")
    host, container = {}, []
    for family, address in (("-4", place.ipv4), ("-6", place.ipv6)):
        gateway, whole = gateways[family], address.ip.max_prefixlen
        nodad = "nodad" if family == "-6" else ""
        host[family] = [
            f"addr add {gateway}/{whole} dev {place.veth} {nodad}",
            f"route add {address.ip} dev {place.veth}",
            *rules[family],
        ]
        container += [
            f"addr add {address.ip}/{whole} dev {INNER_DEVICE} {nodad}",
            f"route add {gateway} dev {INNER_DEVICE}",
            f"route add default via {gateway} dev {INNER_DEVICE}",
        ]
    return host, container


def _rules(place: Placement, verb: str) -> dict[str, list[str]]:
    return {
        family: [
            f"rule {verb} to {ip} lookup main priority {_POLICY_TO}",
            f"rule {verb} from {ip} lookup {_POLICY_TABLE} priority {_POLICY_FROM}",
        ]
        for family, ip in (("-4", place.ipv4.ip), ("-6", place.ipv6.ip))
    }


def _redirect(spec: Spec, place: Placement, verb: str, env: Mapping[str, str]) -> None:
    """Attach or detach the programs that forward a pod's IPv4 packets, at the outer device and the pod's pair."""
    addresses = [str(place.ipv4.ip), str(bridge_networks()[0]), str(wire(HOST)[0].ip)]
    words = [verb, outer_device(spec.name), place.veth, *addresses, str(place.slot + 1)]
    # A mount namespace of its own, whose end unmounts the BPF file system that tc needs to find a program.
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-I", "-S", str(_REDIRECTING), *words]
    network.run(spec.name, HOST, argv, env)
