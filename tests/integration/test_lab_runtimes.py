"""Labs whose containers Podman, containerd and Apptainer make: their names, and that nothing of them is left."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest

from collector.machine.devices import DeviceFollower, snapshot
from contracts.topology import Role, Sharer
from mace.lab import HOST, Lab, Runtime, Spec, check, down, running
from tests.lab_leftovers import leftovers, own_lab
from tests.measuring import mace, wait_for
from tests.places import ROOT

pytestmark = [pytest.mark.needs("root", "netns"), pytest.mark.slow, pytest.mark.timeout(120)]

PTP = json.dumps(
    {
        "cniVersion": "1.0.0",
        "name": "mace-ptp",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": True,
                "ipam": {
                    "type": "host-local",
                    "subnet": "198.51.100.0/24",
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
)
KINDS = {
    "podman": (Runtime.PODMAN, ""),
    "containerd": (Runtime.CONTAINERD, ""),
    "apptainer": (Runtime.APPTAINER, ""),
    "apptainer_ptp": (Runtime.APPTAINER, PTP),
}
START = """
import sys
sys.path.insert(0, {root!r})
from mace.lab import Runtime, Spec, up
print("starting", flush=True)
up(Spec({name!r}, runtime=Runtime({runtime!r}), cni={cni!r}), detached=False)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def name(request):
    with own_lab(request.node.name) as chosen:
        yield chosen


def prepare(kind, needs, monkeypatch):
    """Skip or fail the test if the runtime is missing, and put it into PATH."""
    needs(kind.partition("_")[0])
    if kind.startswith("apptainer"):
        from tests import apptainer

        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{apptainer.directory()}")
    return KINDS[kind]


def pinged(lab: Lab, container: str) -> str:
    """Return what the image's ping prints in all of the container's namespaces."""
    argv = lab.inside(container, ["ping", "-q", "-c", "2", "-i", "0.01", lab.address("remote")])
    done = subprocess.run(argv, capture_output=True, text=True, env=lab.environment(container), check=False)
    return done.stdout + done.stderr


def test_podman_containers_reach_the_remote_and_leave_nothing(name, needs, monkeypatch):
    runtime, _ = prepare("podman", needs, monkeypatch)
    assert check(Spec(runtime=runtime)) == []
    with running(Spec(name, containers=2, runtime=runtime)) as lab:
        assert [lab.ping(c, count=2, family=f).received for c in ("c1", "c2") for f in (4, 6)] == [2] * 4
        assert lab.udp("c2", count=2000, rate_pps=10_000).received == 2000
        assert "2 received" in pinged(lab, "c1")
        lab.remove_container("c1")
        lab.add_container("c1")
        assert lab.ping("c1", count=2).received == 2
        assert not lab.shares_host("c1")
    assert leftovers(name) == []


def test_pods_of_containerd(name, needs, monkeypatch):
    """Pods have their names by the lab's own socket, in a comparison of networks too."""
    runtime, _ = prepare("containerd", needs, monkeypatch)
    with running(Spec(name, containers=2, runtime=runtime)) as lab:
        assert [lab.ping(c, count=2).received for c in lab.containers] == [2, 2]
        assert "2 received" in pinged(lab, "c2")
        sockets = [str(lab.cri_socket)]
        found = snapshot(host_netns=lab.netns_inode(HOST), docker_sockets=(), pod_logs="", cri_sockets=sockets)
        inner = {d.netns: (d.container, d.pod_containers) for d in found.devices if d.role is Role.INNER}
        assert inner == {lab.netns_inode(c): (f"lab/{c}", "app") for c in lab.containers}
        lab.remove_container("c2")
        lab.add_container("c2")
        assert lab.ping("c2", count=2).received == 2
        argv = ("compare", "--networks", "bridge", name, "--rounds", "1", "--count", "20", "--json")
        networks = json.loads(mace(*argv).stdout)["networks"]
        assert set(networks) == {"bridge", name}
        assert all(each["overhead_egress"] for each in networks.values())
    assert leftovers(name) == []


def test_apptainer_with_a_network_of_its_own(name, needs, monkeypatch):
    """Instances have the names USER/INSTANCE, by Apptainer's process outside of them, which shares nothing itself."""
    runtime, cni = prepare("apptainer_ptp", needs, monkeypatch)
    with running(Spec(name, containers=2, runtime=runtime, cni=cni)) as lab:
        assert [lab.ping(c, count=2).received for c in lab.containers] == [2, 2]
        assert "2 received" in pinged(lab, "c2")
        found = snapshot(host_netns=lab.netns_inode(HOST), docker_sockets=())
        inner = {d.netns: d.container for d in found.devices if d.role is Role.INNER}
        assert inner == {lab.netns_inode(c): f"root/{c}" for c in lab.containers}
        assert found.on_host_network == ()
    assert leftovers(name) == []


async def follow_sharers(lab: Lab) -> None:
    follower = DeviceFollower(host_netns=lab.netns_inode(HOST), docker_sockets=(), rescan_interval_s=0.05)
    await follower.open()
    try:
        for expected, change in (
            ({Sharer("root/c1"), Sharer("root/c2")}, None),
            ({Sharer("root/c2")}, lambda: lab.remove_container("c1")),
            ({Sharer("root/c2"), Sharer("root/c3")}, lambda: lab.add_container("c3")),
        ):
            if change:
                await asyncio.to_thread(change)
            async with asyncio.timeout(30):
                while set(follower.on_host_network) != expected:
                    follower.poll()
                    await asyncio.sleep(0.02)
    finally:
        await follower.aclose()


def test_apptainer_on_the_host_s_network(name, needs, monkeypatch):
    runtime, _ = prepare("apptainer", needs, monkeypatch)
    with running(Spec(name, containers=2, runtime=runtime)) as lab:
        assert lab.network == "c1, c2 share the host's network, which adds nothing to their packets"
        assert all(lab.shares_host(c) for c in lab.containers)
        assert not lab.shares_host(HOST)
        assert lab.address("c1") == lab.address(HOST)
        assert "2 received" in pinged(lab, "c1")
        asyncio.run(follow_sharers(lab))
        argv = [sys.executable, "-m", "mace", "ping", "--lab", name, "--container", "c2", "-c1", lab.address("remote")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "container 'c2' shares the host's network, which adds nothing to its packets" in done.stderr
        # A program that a user runs in the container without an instance is named by its image.
        monkeypatch.setenv("APPTAINER_CONFIGDIR", f"/run/mace/labs/{name}.d/apptainer")
        image = f"/run/mace/labs/{name}.d/image"
        argv = ["apptainer", "--silent", "--config", f"/run/mace/labs/{name}.d/apptainer.conf", "exec", image]
        # The container's process inherits the lab's marks, by which it ends with the lab.
        with lab.popen(HOST, [*argv, "/bin/sleep", "1000"], stderr=None) as process:

            def sharers():
                return [one.container for one in snapshot(host_netns=lab.netns_inode(HOST)).on_host_network]

            wait_for(lambda: any(one.startswith("image[") for one in sharers()), what="the program's name")
            process.kill()
    assert leftovers(name) == []


@pytest.mark.parametrize(("kind", "moment_s"), [("podman", 0.4), ("containerd", 0.8), ("apptainer_ptp", None)])
def test_the_next_start_cleans_up_after_a_killed_runtime(name, kind, moment_s, needs, monkeypatch):
    runtime, cni = prepare(kind, needs, monkeypatch)
    script = START.format(root=str(ROOT), name=name, runtime=runtime.value, cni=cni)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as run:
        assert run.stdout.readline() == "starting\n"
        if moment_s is None:
            assert run.stdout.readline() == "up\n"
        else:
            time.sleep(moment_s)
        run.kill()
    assert down(name)
    assert leftovers(name) == []
