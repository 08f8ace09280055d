"""What a lab could leave on this machine, and labs of a test's own that must leave nothing."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from mace.lab import down, netns, state

PREFIX = f"t{os.getpid()}"
"""A prefix of this process, because other tests may run on the same machine."""


def output(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def machine():
    """Return everything in the machine's own network namespace that a lab could change."""
    sysctls = [
        "ipv4/ip_forward",
        "ipv6/conf/all/forwarding",
        "ipv4/conf/all/rp_filter",
        "bridge/bridge-nf-call-iptables",
    ]
    return {
        "links": output("ip", "-o", "link"),
        "addresses": output("ip", "-o", "-4", "address"),
        "routes": output("ip", "route", "show", "table", "all"),
        "rules": output("ip", "rule") + output("ip", "-6", "rule"),
        "nft": output("nft", "list", "ruleset"),
        "sysctls": [p.read_text() for s in sysctls if (p := Path("/proc/sys/net", s)).exists()],
    }


def leftovers(name):
    """Return everything that is left of a lab on this machine."""
    found = [str(p) for p in netns.NETNS_DIR.glob(f"mace-{name}-*")]
    found += [str(p) for p in state.STATE_DIR.glob(f"{name}.*")]
    found += [
        line
        for line in Path("/proc/mounts").read_text().splitlines()
        if f"mace-{name}-" in line or f"/{name}.d" in line
    ]
    found += [str(p) for p in Path("/sys/fs/cgroup").glob(f"*/mace-lab-{name}*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"/{name}.d/".encode() in words or f"mace-{name}-".encode() in words:
                found.append(f"process {entry.name}: {words[:200]!r}")
    return found


@contextmanager
def own_lab(test):
    """Provide a lab name of one test alone; the block must leave nothing behind, whether it passed or failed."""
    before = machine()
    chosen = f"{PREFIX}-{crc32(test.encode()) % 10_000}"
    yield chosen
    left = leftovers(chosen)
    down(chosen, force=True)
    assert left == []
    assert leftovers(chosen) == []
    assert machine() == before
