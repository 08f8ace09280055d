"""Apptainer on a machine whose Debian has no package of it: that of Debian's unstable release, in a Debian 13 root.

    directory()   the folder of a program `apptainer`, for PATH

The program enters a mount namespace of its own, in which an overlay of three folders of the cache is the root: the
package, iptables for CNI plugins, and the Debian 13 in which the newest kernel's module is built. /proc, /sys, /dev,
/run, /tmp and the machine's CNI plugins are those of the machine. Nothing is installed, and none of the folders is
modified: what Apptainer writes elsewhere is in memory, and ends with its processes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from tests.kernel import build, kernels

_IPTABLES: Final = (
    "libip4tc2",
    "libip6tc2",
    "libmnl0",
    "libnetfilter-conntrack3",
    "libnfnetlink0",
    "libnftnl11",
    "libxtables12",
)
_PROGRAM: Final = """#!/bin/sh
exec unshare --mount --propagation slave sh -c '
place=$1
shift
mount -t tmpfs tmpfs "$place" && mkdir -p "$place/upper/usr/sbin" "$place/work" "$place/root" || exit 1
for name in iptables ip6tables; do ln -s xtables-nft-multi "$place/upper/usr/sbin/$name"; done
lower={lower}
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$place/upper,workdir=$place/work" "$place/root" || exit 1
cd "$place/root" && mkdir -p usr/lib/cni || exit 1
for path in proc sys dev run tmp; do mount --rbind "/$path" "$path" || exit 1; done
mount --bind /usr/lib/cni usr/lib/cni && cp /etc/hosts /etc/resolv.conf etc/ || exit 1
pivot_root . mnt && umount -l /mnt && cd / && exec /usr/bin/apptainer "$@"
' sh {place} "$@"
"""


@functools.cache
def directory() -> Path:
    """Return the folder of the program; what it needs is fetched on first use. Raises `KernelUnavailable`."""
    package = kernels.unpacked("apptainer", ("sid",))
    iptables = kernels.unpacked("iptables", ("trixie",), *_IPTABLES)
    debian = build.chroot("trixie")
    place = kernels.cache_dir() / "apptainer"
    with kernels.locked("apptainer-program"):
        (place / "mnt").mkdir(parents=True, exist_ok=True)
        (place / "bin").mkdir(exist_ok=True)
        text = _PROGRAM.format(lower=f"{package}:{iptables}:{debian}", place=place / "mnt")
        draft = place / "bin/.apptainer"
        draft.write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        draft.rename(place / "bin/apptainer")
    return place / "bin"


def missing() -> str | None:
    """Return why Apptainer cannot run here, or None if it can."""
    try:
        directory()
    except kernels.KernelUnavailable as error:
        return str(error)
    return None
