"""Pods have their names in every output: by control groups and the kubelet's log folder, and by containerd's socket."""

import asyncio
import json
import subprocess
import threading
import uuid
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from collector.machine import cri
from collector.machine.devices import DeviceFollower
from collector.machine.name_checks import check_cri
from collector.machine.pods import Pod
from mace.lab import Spec, running
from storage.query import StoreReader
from tests import containerd, pods
from tests.measuring import mace, measured, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns", "cgroup"), pytest.mark.slow]

NAME = "default/web-6d4cf56db6-8xk2p"


def test_a_pod_its_restart_and_its_sidecar_and_one_on_the_host_s_network(tmp_path):
    """One series by the pod through all of it; the pod that starts late has its name within two seconds."""
    logs = tmp_path / "pods"
    (tmp_path / "c.toml").write_text(f'[capture]\npod_logs = "{logs}"\n[store]\nflush_interval_s = 0.3\n')
    with (
        running(Spec(name="pods", containers=1)) as lab,
        measured(lab, tmp_path, "--config", tmp_path / "c.toml") as measurement,
        pods.made(logs, "web-6d4cf56db6-8xk2p") as pod,
        pods.made(logs, "agent-x7k2p", namespace="kube-system") as agent,
    ):
        tag = lab.outer_device[3:]
        with pods.with_network(pod, lab.netns_path("host"), f"br{tag}", pods.GATEWAY):
            ping = ("ping", "-q", "-i", "0.02", "-s", "118", lab.address("remote"))
            pod.start("setup", "sleep", "1000")
            agent.start("agent", "sleep", "1000", netns=str(lab.netns_path("host")))
            first = pod.start("app", *ping)

            def stored():
                known = StoreReader(measurement.store).containers()
                return {(one.container, part) for one in known for part in one.pod_containers.split(",")}

            wait_for(lambda: (NAME, "app") in stored(), what="the pod's name")
            first.kill()
            first.wait()
            pod.start("app", *ping)
            pod.start("sidecar", "sleep", "1000")
            wait_for(lambda: (NAME, "sidecar") in stored(), what="the sidecar")
    own = {row["container"]: row for row in measurement.found["overhead"] if row["direction"] == "egress"}
    # Packets may precede the pod's name.
    assert own.keys() - {pod.netns} == {NAME}
    assert own[NAME]["container_id"] == pod.uid
    assert [own[NAME][part] for part in ("namespace", "pod", "workload")] == ["default", NAME[8:], "web"]
    assert own[NAME]["pod_containers"] == ["app", "setup", "sidecar"]
    assert measurement.found["on_host_network"] == ["kube-system/agent-x7k2p"]
    replayed = json.loads(mace("replay", measurement.capture, "--json").stdout)
    reported = json.loads(mace("report", "--store", measurement.store, "--container", NAME, "--json").stdout)
    for found in (replayed, reported):
        again = {row["container"]: row for row in found["overhead"] if row["direction"] == "egress"}
        assert again[NAME] | own[NAME] == again[NAME]


@pytest.fixture
def host():
    """A network namespace for containerd, by name."""
    netns = f"mace-test-{uuid.uuid4()}"
    subprocess.run(["ip", "netns", "add", netns], check=True)
    yield netns
    subprocess.run(["ip", "netns", "del", netns], check=True)


@pytest.mark.needs("containerd", "containerd_events")
def test_events_of_containerd_name_pods_that_no_list_has(host, monkeypatch):
    """A process is seen before its sandbox is ready, and a container starts later: containerd 1.7 tells at once."""
    monkeypatch.setattr(cri, "_NEW_CONTAINERS_S", 0.0)
    uid, changed, lists = str(uuid.uuid4()), threading.Event(), []
    with TemporaryDirectory(prefix="mace-cri-") as place, containerd.running(Path(place) / "c", host, events=True) as d:
        # Whatever the lists would tell: they are empty.
        monkeypatch.setattr(cri.CriSocket, "pods", lambda *_: lists.append(1) or {})
        pods = cri.RuntimePods([str(d.path)], changed.set)
        try:
            pods.want(frozenset({uid}))
            wait_for(lambda: lists and pods._followed(), what="the stream of events")
            assert not pods.pods
            with d.pod("default/web-6d4cf56db6-8xk2p", "app", "istio-proxy", uid=uid) as made:
                assert made == uid
                wait_for(lambda: pods.pods == {uid: Pod(NAME, "app,istio-proxy")}, what="the pod and its containers")
                assert changed.is_set()
                (sandbox,) = (value for number, value in cri.fields(d.ask("ListPodSandbox", b"")) if number == 1)
                status = cri.CriSocket(str(d.path)).status(cri._bytes(sandbox, 1))
                assert cri._named(status) == (uid, NAME)
        finally:
            pods.close()
        assert not any(events.alive for events in pods._events.values())


@pytest.mark.needs("containerd")
def test_real_pods_of_containerd_are_named_by_its_socket(host, monkeypatch):
    """Without a log folder: a pod in a namespace of its own with two containers, and one on the host's network.

    Debian 12's containerd 1.6 has no events, so that the lists are fetched again and again.
    """
    monkeypatch.setattr(cri, "_NEW_CONTAINERS_S", 0.1)

    async def watched(daemon):
        follower = DeviceFollower(host_netns=host, docker_sockets=(), pod_logs="", cri_sockets=(str(daemon.path),))
        await follower.open()

        async def seen(wanted):
            while True:
                found = {(d.container, d.container_id, d.pod_containers) for d in follower.poll() or ()}
                if wanted <= found | {(s.container, s.container_id, "") for s in follower.on_host_network}:
                    return
                await asyncio.sleep(0.02)

        try:
            async with asyncio.timeout(60):
                with daemon.pod("default/web-6d4cf56db6-8xk2p", "app", "istio-proxy") as web:
                    await seen({(NAME, web, "app,istio-proxy")})
                    with daemon.pod("kube-system/agent-x7k2p", "agent", host_network=True) as agent:
                        await seen({("kube-system/agent-x7k2p", agent, "")})
        finally:
            await follower.aclose()

    with TemporaryDirectory(prefix="mace-cri-") as place, containerd.running(Path(place) / "c", host) as daemon:
        asyncio.run(watched(daemon))
        with ExitStack() as several:
            names = {f"default/db-{number}" for number in range(5)}
            made = {several.enter_context(daemon.pod(name, host_network=True)): name for name in names}
            found = cri.CriSocket(str(daemon.path)).pods()
            assert {uid: pod.name for uid, pod in found.items()} == made
        assert cri.CriSocket(str(daemon.path)).pods() == {}
        with pytest.raises(ValueError, match="NoSuchMethod: gRPC status 12 "):
            daemon.ask("NoSuchMethod", b"")
        status = check_cri([str(daemon.path)])
        assert (status.ok, status.detail) == (True, f"0 pods at {daemon.path}")
        with pytest.raises(cri.NoEvents, match="gRPC status 12 "):
            next(cri.CriSocket(str(daemon.path)).events())
