"""Attaches the tc programs of the layout cilium to a pod's path, in the network namespace that it is started in.

    redirecting.py add|del OUTER VETH ADDRESS NETWORK HOST NUMBER

At ingress of OUTER, IPv4 packets to ADDRESS go to the pod's own device, the peer of VETH (bpf_redirect_peer). At
ingress of VETH, IPv4 packets to addresses outside of NETWORK, other than the address HOST, go to OUTER and the
neighbour there (bpf_redirect_neigh). Other packets go their ordinary way. NUMBER is the filter's preference at OUTER;
each pod has its own.

Started with `-I -S`, in a mount namespace of its own: tc takes a program from a BPF file system, which is mounted here
and ends with that namespace. The programs are written as instructions, so that the lab needs no compiler.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network

PROG_LOAD, OBJ_PIN = 5, 6
SCHED_CLS = 3
REDIRECT_NEIGH, REDIRECT_PEER = 152, 155
"""Numbers of commands, program types and helper functions (include/uapi/linux/bpf.h)."""
BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}
MOUNTPOINT = "/sys/fs/bpf"
PROTOCOL_AT, DESTINATION_AT = 12, 30
"""Offsets of the protocol and of the IPv4 destination in a packet behind an Ethernet header."""
IPV4 = 0x0800
FURTHER = -1
"""TC_ACT_UNSPEC: the next filter decides."""

_libc = ctypes.CDLL(None, use_errno=True)


def one(code: int, dst: int = 0, src: int = 0, offset: int = 0, number: int = 0) -> bytes:
    """Return one instruction (struct bpf_insn)."""
    return struct.pack("<BBhi", code, src << 4 | dst, offset, number)


def signed(number: int) -> int:
    """Return the signed 32-bit number with the same bits."""
    return number - (number >> 31 << 32)


def to_peer(ifindex: int, address: IPv4Address) -> bytes:
    """Return a program: IPv4 packets to the address go to the peer of the device."""
    return b"".join(
        [
            one(0xBF, 6, 1),  # r6 = context, for loads from the packet
            one(0x28, number=PROTOCOL_AT),  # w0 = half a word of the packet
            one(0x56, 0, offset=6, number=IPV4),  # if w0 != IPV4 goto end
            one(0x20, number=DESTINATION_AT),  # w0 = a word of the packet
            one(0x56, 0, offset=4, number=signed(int(address))),  # if w0 != address goto end
            one(0xB7, 1, number=ifindex),
            one(0xB7, 2),
            one(0x85, number=REDIRECT_PEER),
            one(0x95),
            one(0xB7, 0, number=FURTHER),  # end
            one(0x95),
        ]
    )


def to_neighbour(ifindex: int, network: IPv4Network, host: IPv4Address) -> bytes:
    """Return a program: IPv4 packets to addresses outside of the network, and not to the host, leave by the device."""
    return b"".join(
        [
            one(0xBF, 6, 1),
            one(0x28, number=PROTOCOL_AT),
            one(0x56, 0, offset=10, number=IPV4),
            one(0x20, number=DESTINATION_AT),
            one(0x16, 0, offset=8, number=signed(int(host))),  # if w0 == host goto end
            one(0x54, 0, number=signed(int(network.netmask))),  # w0 &= mask
            one(0x16, 0, offset=6, number=signed(int(network.network_address))),  # if w0 == network goto end
            one(0xB7, 1, number=ifindex),
            one(0xB7, 2),
            one(0xB7, 3),
            one(0xB7, 4),
            one(0x85, number=REDIRECT_NEIGH),
            one(0x95),
            one(0xB7, 0, number=FURTHER),
            one(0x95),
        ]
    )


def bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2). Raises `OSError`."""
    machine = os.uname().machine
    if machine not in BPF_SYSCALL:
        raise OSError(errno.ENOSYS, f"the number of bpf(2) is not known for {machine}")
    found: int = _libc.syscall(BPF_SYSCALL[machine], command, ctypes.c_char_p(attributes), len(attributes))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"bpf({command})")
    return found


def pinned(instructions: bytes, path: str) -> None:
    """Load a program for tc and give it a name in a mounted BPF file system."""
    code, licence, log = (ctypes.create_string_buffer(raw) for raw in (instructions, b"Apache-2.0", bytes(65536)))
    fields = struct.pack(
        "<IIQQIIQI", SCHED_CLS, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence),
        1, len(log), ctypes.addressof(log), 0,
    )  # fmt: skip
    fd = bpf(PROG_LOAD, fields.ljust(128, b"\0"))
    name = ctypes.create_string_buffer(os.fsencode(path))
    bpf(OBJ_PIN, struct.pack("<QI", ctypes.addressof(name), fd).ljust(64, b"\0"))
    os.close(fd)


def run(*words: str) -> None:
    """Run a command; ends this program with the command's complaint if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}")


def main(verb: str, outer: str, veth: str, address: str, network: str, host: str, number: str) -> None:
    """Attach or detach the programs of one pod."""
    at_outer = ("dev", outer, "ingress", "prio", number, "protocol", "all")
    if verb == "del":  # the pod's pair goes, and with it the other program
        run("tc", "filter", "del", *at_outer)
        return
    run("mount", "-t", "bpf", "bpf", MOUNTPOINT)
    pinned(to_peer(socket.if_nametoindex(veth), IPv4Address(address)), f"{MOUNTPOINT}/peer")
    leaving = to_neighbour(socket.if_nametoindex(outer), IPv4Network(network), IPv4Address(host))
    pinned(leaving, f"{MOUNTPOINT}/neighbour")
    run("tc", "qdisc", "add", "dev", veth, "clsact")
    program = ("bpf", "direct-action", "object-pinned")
    run("tc", "filter", "add", "dev", veth, "ingress", "protocol", "all", *program, f"{MOUNTPOINT}/neighbour")
    run("tc", "filter", "add", *at_outer, *program, f"{MOUNTPOINT}/peer")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:  # the kernel refuses a program, or a device is gone
        sys.exit(str(error))
