"""Pods have their names in every output of a live run, from control groups and the kubelet's log folder alone."""

import json

import pytest

from mace.lab import Spec, running
from storage.query import StoreReader
from tests import pods
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
