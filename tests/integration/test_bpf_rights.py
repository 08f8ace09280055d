"""`mace run --source bpf` of an ordinary user with CAP_BPF and CAP_PERFMON alone, compared with root's."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from collector.capture.source import read
from contracts.topology import Topology
from mace.lab import Spec, running
from tests.measuring import PATHS, balanced, measured, start
from tests.nobody import AS_NOBODY, NOBODY

pytestmark = [pytest.mark.needs("root", "bpf", "netns", "nobody"), pytest.mark.timeout(180), pytest.mark.slow]

OPTIONS = ("--source", "bpf", "--ring-mib", "64")
"""The rings have room for floods of others, because both measurements see the whole machine."""
COUNT = 300
SIZE = 1213
"""Payload of the pings, bytes: their length distinguishes them from all other traffic."""


def start_as_nobody(*argv, **options):
    """Start a command as user nobody with two capabilities, which the caller has to end."""
    command = [*AS_NOBODY, sys.executable, "-m", "mace", *map(str, argv)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options})


@pytest.fixture
def folder():
    """Provide a directory of nobody's, on a path that nobody may enter."""
    made = Path(tempfile.mkdtemp(prefix="mace-nobody-", dir="/tmp"))
    os.chown(made, NOBODY, NOBODY)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def devices_of(measurement, lab):
    """Return the lab's devices in the measurement's last topology."""
    topology = [item for item in read(measurement.capture) if isinstance(item, Topology)][-1]
    own = {lab.netns_inode(member) for member in ("host", "remote", *lab.containers)}
    return [device for device in topology.devices if device.netns in own]


def paths_of(measurement):
    """Count the pings by container, direction and devices in path order."""
    rows = measurement.query(
        f"SELECT container, direction, devices, count(*) FROM ({PATHS}) WHERE l3_len = {SIZE + 28} GROUP BY ALL"
    )
    return {(container, direction, tuple(devices)): count for container, direction, devices, count in rows}


def test_it_measures_what_root_measures(folder, tmp_path):
    with running(Spec(name="rights", containers=2)) as lab:
        for container in lab.containers:
            lab.ping(container, count=2)
        with (
            measured(lab, folder, *OPTIONS, start=start_as_nobody) as theirs,
            measured(lab, tmp_path / "root", *OPTIONS, start=start) as roots,
        ):
            status = Path(f"/proc/{theirs.process.pid}/status").read_text()
            assert re.search(r"^Uid:\t65534\t65534", status, re.MULTILINE)
            assert re.search(r"^CapEff:\t000000c000000000$", status, re.MULTILINE)
            for container in lab.containers:
                assert lab.ping(container, count=COUNT, size=SIZE, interval_s=0.005).received == COUNT
        found, expected = devices_of(theirs, lab), devices_of(roots, lab)
        tag = lab.outer_device[3:]
    assert found == expected
    assert {device.name for device in found} >= {"eth0", f"br{tag}", f"out{tag}", f"rem{tag}", f"veth{tag}-c1"}
    paths = paths_of(theirs)
    assert paths == paths_of(roots)
    for container in ("c1", "c2"):
        way = ("eth0", f"veth{tag}-{container}", f"br{tag}", f"out{tag}", f"rem{tag}")
        assert paths[container, "egress", way] == paths[container, "ingress", way[::-1]] == COUNT
    assert len(paths) == 4
    balanced(theirs.found)


def test_own_cost_needs_statistics_that_only_root_can_switch_on(folder):
    """An administrator can leave them on; the test writes no sysctl of the machine's, but a file in its place."""
    code = (
        "import sys; from pathlib import Path; from collector.bpf import session; from collector.bpf.source import *\n"
        "session.STATS = Path(sys.argv[1]); print(BpfSource.check().detail)"
    )
    said = {}
    for value in ("0", "1"):
        (folder / value).write_text(f"{value}\n")
        (folder / value).chmod(0o644)
        done = subprocess.run(
            [*AS_NOBODY, sys.executable, "-c", code, str(folder / value)],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        said[value] = done.stdout
    assert "bpf_stats_enabled" in said["0"]
    assert "bpf_stats_enabled" not in said["1"]


def test_a_process_alone_names_its_container(folder):
    """Nobody may read which namespace another user's process is in; the process names the container all the same."""
    code = (
        "import asyncio, sys\n"
        "from collector.bpf.devices import BpfDeviceFollower\n"
        "async def run():\n"
        "    follower = BpfDeviceFollower(docker_sockets=())\n"
        "    await follower.open()\n"
        "    for device in follower.poll():\n"
        "        print(device.netns, device.name, device.kind, device.container, sep='|')\n"
        "    await follower.aclose()\n"
        "asyncio.run(run())\n"
    )
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE) as held:
        try:
            assert held.stdout.readline() == b"\n"
            inode = Path(f"/proc/{held.pid}/ns/net").stat().st_ino
            hidden = subprocess.run(
                [*AS_NOBODY, "readlink", f"/proc/{held.pid}/ns/net"], capture_output=True, check=False
            )
            assert hidden.returncode != 0
            done = subprocess.run(
                [*AS_NOBODY, sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
            )
        finally:
            held.kill()
    assert done.returncode == 0, done.stderr
    found = [line.split("|") for line in done.stdout.splitlines() if line.startswith(f"{inode}|")]
    assert [(name, kind) for _, name, kind, _ in found] == [("lo", "loopback")]
    assert found[0][3] in {f"sleep[{held.pid}]", f"sh[{held.pid}]"} or re.fullmatch(r"[0-9a-f]{12}", found[0][3])
