"""The program that lists devices, when devices disappear in the middle of a list."""

import os
import subprocess
import threading
import uuid

import pytest

from collector.bpf import libbpf
from collector.bpf.layout import WALK_DEVICES, Walked
from collector.bpf.walk import Walk
from collector.machine.netns import leave_for_new_netns

pytestmark = pytest.mark.needs("root", "bpf", "netns")


def ip(*commands):
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands) + "\n", check=True, capture_output=True, text=True)


def in_new_netns(work):
    """Run `work` in a thread in a new namespace, at which the thread's walks begin; `work` gets the inode."""
    failures = []

    def run():
        try:
            fd = leave_for_new_netns()
            try:
                work(os.fstat(fd).st_ino)
            finally:
                os.close(fd)
        except BaseException as failure:  # noqa: BLE001 - raised by the caller
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def names(walk, inode):
    return {netdev["name"] for netdev in walk.devices() if netdev["netns"] == inode}


def test_a_list_of_several_runs():
    def work(inode):
        count = 3 * WALK_DEVICES
        ip(*(f"link add br{number} type bridge" for number in range(count)))
        walk = Walk()
        try:
            assert libbpf.run(walk._program_fd, 1) == libbpf.run(walk._program_fd, 0) == Walked.MORE
            assert names(walk, inode) == {b"lo", *(f"br{number}".encode() for number in range(count))}
        finally:
            walk.close()

    in_new_netns(work)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["delete", "move"])
def test_the_place_to_continue_at_is_gone(verb):
    """A run that finds its place removed, or in another namespace, must not follow it."""
    elsewhere = f"t{uuid.uuid4().hex[:8]}"

    def work(inode):
        count = 2 * WALK_DEVICES
        # The kernel moves no bridges between namespaces.
        made = [f"pair{number}" for number in range(count)]
        ip(*(f"link add {name} type veth peer name x{name}" for name in made))
        walk = Walk()
        try:
            assert libbpf.run(walk._program_fd, 1) == Walked.MORE
            each = made if verb == "delete" else [*made, *(f"x{name}" for name in made)]
            ip(*(f"link del {name}" if verb == "delete" else f"link set {name} netns {elsewhere}" for name in each))
            assert libbpf.run(walk._program_fd, 0) == Walked.LOST
            assert names(walk, inode) == {b"lo"}
        finally:
            walk.close()

    subprocess.run(["ip", "netns", "add", elsewhere], check=True)
    try:
        in_new_netns(work)
    finally:
        subprocess.run(["ip", "netns", "del", elsewhere], check=True)
