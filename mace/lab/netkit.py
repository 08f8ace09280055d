"""Makes a netkit pair by rtnetlink, because iproute2 can only since 6.8, and Debian 12 has 6.1.

One end is in the caller's network namespace, the other one in the namespace at a path.
"""

from __future__ import annotations

import os
import socket
import struct
from enum import IntEnum
from pathlib import Path
from typing import Final

_RTM_NEWLINK: Final = 16
_NEW: Final = 0x605
"""NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL and NLM_F_CREATE."""
_ADDRESS, _IFNAME, _LINKINFO, _NET_NS_FD = 1, 3, 18, 28
"""IFLA_ADDRESS and so on (include/uapi/linux/if_link.h)."""
_INFO_KIND, _INFO_DATA = 1, 2
_PEER_INFO, _POLICY, _PEER_POLICY, _MODE = 1, 3, 4, 5
"""IFLA_NETKIT_PEER_INFO and so on."""
_PASS: Final = 0
"""NETKIT_PASS: what an end does with packets if no BPF program is attached to it."""
_ANSWER_BYTES: Final = 4096


class Mode(IntEnum):
    """Mode of a pair (enum netkit_mode)."""

    L2 = 0
    """Ethernet, with MAC addresses and neighbours, as with veth."""
    L3 = 1
    """IP packets: no MAC addresses and no neighbours."""


def add(name: str, mode: Mode, netns: Path, peer: str, macs: tuple[str, str] | None = None) -> None:
    """Make the device `name` here, and its peer in the namespace at `netns`. Raises `OSError`.

    `macs` are the MAC addresses of both ends, for which the kernel accepts none but in mode L2. A kernel without netkit
    answers EOPNOTSUPP.
    """
    here, there = macs if macs else ("", "")
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        other = _link(peer, there) + _attribute(_NET_NS_FD, struct.pack("i", fd))
        numbers = ((_MODE, int(mode)), (_POLICY, _PASS), (_PEER_POLICY, _PASS))
        data = _attribute(_PEER_INFO, other) + b"".join(_attribute(k, struct.pack("I", n)) for k, n in numbers)
        body = _link(name, here) + _attribute(
            _LINKINFO, _attribute(_INFO_KIND, b"netkit\0") + _attribute(_INFO_DATA, data)
        )
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asked:
            asked.send(struct.pack("IHHII", 16 + len(body), _RTM_NEWLINK, _NEW, 1, 0) + body)
            (told,) = struct.unpack_from("i", asked.recv(_ANSWER_BYTES), 16)  # struct nlmsgerr, behind nlmsghdr
    finally:
        os.close(fd)
    if told:
        raise OSError(-told, f"netkit device {name}: {os.strerror(-told)}")


def _link(name: str, mac: str) -> bytes:
    """Return a struct ifinfomsg, the device's name, and its MAC address if there is one."""
    address = _attribute(_ADDRESS, bytes.fromhex(mac.replace(":", ""))) if mac else b""
    return struct.pack("BxHiII", 0, 0, 0, 0, 0) + _attribute(_IFNAME, name.encode() + b"\0") + address


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
