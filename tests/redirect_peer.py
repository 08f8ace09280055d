"""Puts a pod behind bpf_redirect_peer, as Cilium's host routing does: a program of tc, without a compiler."""

import json
import subprocess
from contextlib import contextmanager
from ipaddress import IPv4Address

from mace.lab.redirecting import pinned, to_peer


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
    pinned(to_peer(json.loads(shown.stdout)[0]["ifindex"], IPv4Address(address)), str(path))
    # Not ip netns exec, which hides the mount.
    for words in (f"qdisc add dev {outer} clsact", f"filter add dev {outer} ingress bpf da object-pinned {path}"):
        subprocess.run(["nsenter", f"--net=/run/netns/{host}", "tc", *words.split()], check=True, capture_output=True)
