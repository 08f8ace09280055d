"""A lab whose far end is a virtual machine: another kernel answers, and MACE measures at the tap device."""

import json
import os
import signal
from pathlib import Path

import pytest

from contracts.errors import LabError, UsageError
from mace.lab import attach, down, list_labs
from tests.kernel import kernels
from tests.measuring import balanced, mace, wait_for

pytestmark = [
    pytest.mark.needs("root", "tracefs", "netns", "qemu"),
    pytest.mark.slow,
    pytest.mark.timeout(600),  # an emulator on a busy machine, and perhaps a kernel to fetch
]


@pytest.fixture(scope="module")
def kernel():
    return kernels.fetch("6.1")


def qemus(lab):
    """Return the pids of the virtual machines at the lab's tap device."""
    found = []
    for place in os.scandir("/proc"):
        if place.name.isdigit():
            try:
                words = Path(place.path, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"qemu" in words[0] and any(f"ifname={lab.outer_device},".encode() in word for word in words):
                found.append(int(place.name))
    return found


def info(name):
    return next((each for each in list_labs() if each.name == name), None)


@pytest.fixture(scope="module")
def lab(kernel):
    """A lab that `mace lab up` has left behind; its machine boots once for all tests."""
    try:
        said = mace("lab", "up", "distant", "--far-end", "guest", "--guest-kernel", kernel.vmlinuz, timeout=400).stdout
        assert f"Linux {kernel.release}" in said
        yield attach("distant")
    finally:
        down("distant", force=True)


def test_a_far_end_in_another_kernel(kernel, lab):
    assert kernel.release in lab.far_end
    assert lab.members == ("host", "c1")
    for family in (4, 6):
        assert lab.ping("c1", count=3, family=family).received == 3
    with pytest.raises(UsageError, match="only answers ping"):
        lab.udp("c1", count=1)
    argv = ("--lab", lab.name, "--container", "c1", "--source", "ftrace", "--json", "-c", "20", "-i", "0.05")
    found = json.loads(mace("ping", *argv, lab.address("remote")).stdout)
    balanced(found)
    paired = [row for row in found["samples"] if row["reason"] == "paired"]
    assert len(paired) > 10
    for row in paired:
        # At the tap device the request leaves and the reply arrives: no clock of the guest's is read.
        assert 0 < row["nic_rtt_ns"] < row["tool_rtt_ns"]
    assert len(qemus(lab)) == 1


def test_a_far_end_that_dies_breaks_the_lab(lab):
    """`mace lab down` removes the machine, alive or not. It runs last: the lab is gone then."""
    [pid] = qemus(lab)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: info(lab.name).status == "broken", 60)
    assert "its far end, a virtual machine, has ended" in info(lab.name).detail
    with pytest.raises(LabError, match="broken"):
        attach(lab.name)
    assert mace("lab", "down", lab.name).stdout
    assert info(lab.name) is None
    assert qemus(lab) == []


def test_a_kernel_that_is_none(tmp_path):
    image = tmp_path / "vmlinuz-1"
    image.write_bytes(b"no kernel")
    done = mace("lab", "up", "nowhere", "--far-end", "guest", "--guest-kernel", image, check=False)
    assert done.returncode == 1
    assert f"{image}: no kernel, or no modules of it" in done.stderr
    assert info("nowhere") is None
