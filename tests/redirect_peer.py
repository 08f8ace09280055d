"""Puts a pod behind bpf_redirect_peer, as Cilium's host routing does: a program of tc, without a compiler."""

import ctypes
import json
import os
import struct
import subprocess
from contextlib import contextmanager

_BPF_PROG_LOAD, _BPF_OBJ_PIN, _SCHED_CLS, _REDIRECT_PEER = 5, 6, 3, 155
_NR_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]


@contextmanager
def bpffs(folder):
    """Provide a mounted BPF file system at a new folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def redirect(host, outer, outer_end, address, path):
    """Put IPv4 packets to `address` that arrive at `outer` on the inner end of the pair of `outer_end`.

    Both devices are in the namespace `host`, and `path` is a new file in a mounted BPF file system.
    """
    shown = subprocess.run(["ip", "-n", host, "-j", "link", "show", outer_end], check=True, capture_output=True)
    pinned(program(json.loads(shown.stdout)[0]["ifindex"], address), path)
    # Not ip netns exec, which hides the mount.
    for words in (f"qdisc add dev {outer} clsact", f"filter add dev {outer} ingress bpf da object-pinned {path}"):
        subprocess.run(["nsenter", f"--net=/run/netns/{host}", "tc", *words.split()], check=True, capture_output=True)


def program(ifindex, address):
    """IPv4 packets to `address` go to the peer of the device; others their way. Instructions as in linux/bpf.h."""

    def one(code, dst=0, src=0, offset=0, number=0):
        return struct.pack("<BBhi", code, src << 4 | dst, offset, number)

    wanted = int.from_bytes(bytes(map(int, address.split("."))), "big", signed=False)
    wanted -= (wanted >> 31) << 32
    return b"".join(
        [
            one(0xBF, 6, 1),  # r6 = ctx
            one(0x20, number=30),  # r0 = word of the packet at 30: destination behind an Ethernet header
            one(0x56, 0, offset=4, number=wanted),  # if w0 != wanted goto pass
            one(0xB7, 1, number=ifindex),
            one(0xB7, 2),
            one(0x85, number=_REDIRECT_PEER),
            one(0x95),
            one(0xB7, 0),  # pass: TC_ACT_OK
            one(0x95),
        ]
    )


def bpf(command, attributes):
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(_NR_BPF, command, ctypes.c_char_p(attributes), len(attributes))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"bpf({command})")
    return found


def pinned(instructions, path):
    """Load a program for tc and pin it."""
    code, licence, log = (ctypes.create_string_buffer(raw) for raw in (instructions, b"GPL", bytes(65536)))
    fields = struct.pack(
        "<IIQQIIQI", _SCHED_CLS, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence),
        1, len(log), ctypes.addressof(log), 0,
    )  # fmt: skip
    fd = bpf(_BPF_PROG_LOAD, fields.ljust(128, b"\0"))
    name = ctypes.create_string_buffer(os.fsencode(path))
    bpf(_BPF_OBJ_PIN, struct.pack("<QI", ctypes.addressof(name), fd).ljust(64, b"\0"))
    os.close(fd)
