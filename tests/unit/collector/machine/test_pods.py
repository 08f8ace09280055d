"""Pods by UID: control groups of every driver and version, and the kubelet's log folder, as made trees."""

import os
import time
from pathlib import Path

import pytest

from collector.machine import pods
from collector.machine.containers import NOBODY, Called, called_by_process, called_in_cgroup, is_made_up
from collector.machine.devices import _Namespace
from collector.machine.namespace_names import Named, NamespaceNames
from collector.machine.netns import Found
from collector.machine.pods import Pod, PodLogs, pod_uid_in_cgroup
from contracts.topology import Sharer

UID = "3b1f0c1a-5d3e-4a53-8f0e-1234567890ab"
OTHER = "c0ffee00-5d3e-4a53-8f0e-1234567890ab"
STATIC = "0123456789abcdef0123456789abcdef"
BARS = UID.replace("-", "_")
ID, INNER = "a" * 64, "b" * 64
INODE, SECOND = 4026532000, 4026532001


@pytest.mark.parametrize(
    ("text", "uid"),
    [
        # Version 2, systemd: guaranteed, burstable, best effort; containerd, CRI-O, Docker.
        (f"0::/kubepods.slice/kubepods-pod{BARS}.slice/cri-containerd-{ID}.scope", UID),
        (f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{BARS}.slice/crio-{ID}.scope", UID),
        (f"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{BARS}.slice/docker-{ID}.scope", UID),
        (f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/crio-{ID}.scope", STATIC),
        (f"0::/kubepods.slice/kubepods-pod{BARS}.slice/crio-{ID}.scope/container", UID),
        # Version 2, cgroupfs.
        (f"0::/kubepods/pod{UID}/{ID}", UID),
        (f"0::/kubepods/burstable/pod{UID}/{ID}", UID),
        (f"0::/kubepods/besteffort/pod{STATIC}/{ID}", STATIC),
        (f"0::/kubepods/besteffort/pod{UID}", UID),
        # Version 1 and hybrid: one line for each hierarchy, some without the pod.
        (f"12:pids:/kubepods/burstable/pod{UID}/{ID}\n1:name=systemd:/kubepods/burstable/pod{UID}/{ID}\n0::/\n", UID),
        (f"4:memory:/kubepods.slice/kubepods-pod{BARS}.slice/docker-{ID}.scope\n0::/system.slice\n", UID),
        (f"2:cpu:/\n1:name=systemd:/kubepods.slice/kubepods-pod{BARS}.slice/crio-{ID}.scope\n", UID),
        # The kubelet uses systemd, containerd does not.
        (f"0::/system.slice/containerd.service/kubepods-burstable-pod{BARS}.slice:cri-containerd:{ID}", UID),
        # A node that is itself a container (kind), and a kubelet with a root of its own.
        (f"0::/docker/{INNER}/kubelet/kubepods/besteffort/pod{UID}/{ID}", UID),
        (f"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{BARS}.slice/cri-containerd-{ID}.scope", UID),
        # Seen from a pod with a control group namespace of its own.
        (f"0::/../../pod{UID}/{ID}", UID),
        (f"0::/../../kubepods-besteffort-pod{BARS}.slice/cri-containerd-{ID}.scope", UID),
        # Docker in a pod: the inner container is not the pod.
        (f"0::/kubepods/burstable/pod{UID}/{ID}/docker/{INNER}", ""),
        # No pods of Kubernetes.
        (f"0::/machine.slice/libpod_pod_{ID}.slice/libpod-{INNER}.scope", ""),
        (f"0::/system.slice/docker-{ID}.scope", ""),
        (f"0::/kubepods.slice/pod1.slice/cri-containerd-{ID}.scope", ""),
        (f"0::/kubepods/xpod{UID}/{ID}", ""),
        (f"0::/kubepods/pod{UID}0/{ID}", ""),
        ("0::/", ""),
    ],
)
def test_uid_in_cgroup(text: str, uid: str) -> None:
    assert pod_uid_in_cgroup(text) == uid
    called = called_in_cgroup(text)
    assert (called is not None and called.is_pod) == bool(uid)
    if uid:
        assert called == Called(uid[:12], uid, is_pod=True)


def made(folder: Path, entry: str, *containers: str) -> Path:
    for container in containers:
        (folder / entry / container).mkdir(parents=True, exist_ok=True)
    (folder / entry).mkdir(parents=True, exist_ok=True)
    return folder / entry


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look again at every call."""
    monkeypatch.setattr(pods, "_LOOK_S", 0.0)


def test_names_in_a_log_folder(tmp_path: Path) -> None:
    made(tmp_path, f"default_web-6d4cf56db6-8xk2p_{UID}", "setup", "app", "istio-proxy")
    made(tmp_path, f"kube-system_etcd-node1_{STATIC}", "etcd")
    made(tmp_path, f"default_db-0_{OTHER}")
    (tmp_path / "stray").write_text("")
    logs = PodLogs(str(tmp_path))
    logs.look(frozenset({UID, STATIC}))
    assert logs.pods == {
        UID: Pod("default/web-6d4cf56db6-8xk2p", "app,istio-proxy,setup"),
        STATIC: Pod("kube-system/etcd-node1", "etcd"),
    }
    logs.look(frozenset({OTHER}))
    assert logs.pods == {OTHER: Pod("default/db-0")}


def test_no_folder(tmp_path: Path) -> None:
    for folder in (str(tmp_path / "none"), ""):
        logs = PodLogs(folder)
        logs.look(frozenset({UID}))
        assert logs.pods == {}


@pytest.mark.usefixtures("at_once")
def test_a_pod_that_changes(tmp_path: Path) -> None:
    logs, wanted = PodLogs(str(tmp_path)), frozenset({UID})
    logs.look(wanted)
    assert logs.pods == {}
    place = made(tmp_path, f"default_db-0_{UID}")
    logs.look(wanted)
    assert logs.pods == {UID: Pod("default/db-0")}
    made(tmp_path, place.name, "postgres")
    logs.look(wanted)
    started = logs.pods
    assert started == {UID: Pod("default/db-0", "postgres")}
    (place / "postgres/0.log").write_text("")
    (place / "postgres/1.log").write_text("")  # restarted
    logs.look(wanted)
    assert logs.pods is started
    # Deleted: its last packets are still the pod's.
    for each in (*place.glob("*/*.log"),):
        each.unlink()
    (place / "postgres").rmdir()
    place.rmdir()
    logs.look(wanted)
    assert logs.pods is started
    logs.look(frozenset())
    assert logs.pods == {}


@pytest.mark.usefixtures("at_once")
def test_settled_folders_are_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    listdir = os.listdir

    def counting(path: str) -> list[str]:
        listed.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counting)
    place = made(tmp_path, f"default_db-0_{UID}", "postgres")
    long_ago = time.time() - 60
    for each in (place, tmp_path):
        os.utime(each, (long_ago, long_ago))
    logs, wanted = PodLogs(str(tmp_path)), frozenset({UID})
    for _ in range(3):
        logs.look(wanted)
    assert listed == [str(tmp_path), str(place)]
    # A pod that was there at the last listing, but not wanted.
    made(tmp_path, f"default_web_{OTHER}")
    os.utime(tmp_path, (long_ago, long_ago))
    logs.look(wanted | {OTHER})
    assert logs.pods[OTHER].name == "default/web"


def processes(proc: Path, cgroups: dict[int, str]) -> None:
    for pid, text in cgroups.items():
        (proc / str(pid)).mkdir(parents=True, exist_ok=True)
        (proc / f"{pid}/cgroup").write_text(text)
        (proc / f"{pid}/cmdline").write_bytes(b"pause\0")
        (proc / f"{pid}/comm").write_text("pause\n")


@pytest.mark.usefixtures("at_once")
def test_names_of_namespaces(tmp_path: Path) -> None:
    proc, logs = tmp_path / "proc", tmp_path / "pods"
    pod = f"0::/kubepods/burstable/pod{UID}"
    processes(proc, {10: f"{pod}/{ID}\n", 11: f"{pod}/{INNER}\n", 12: f"0::/kubepods/pod{OTHER}/{ID}\n"})
    place = made(logs, f"default_web-0_{UID}", "app")
    names = NamespaceNames((), lambda: None, pod_logs=str(logs), proc=proc)

    def namespace(name: str = "", pid: int = 10, inode: int = INODE) -> _Namespace:
        return _Namespace(5, 1, Found(inode, name, pid=pid), time.monotonic(), by_process=called_by_process(pid, proc))

    def of(one: _Namespace) -> Named:
        names.ask([one])
        names.use()
        return names.of(one)

    for own in ("", "cni-3b0ee13c-d0a8-e5a0-7b1c-4d7e1c7c3e5f", "3b0ee13c-d0a8-e5a0-7b1c-4d7e1c7c3e5f"):
        assert of(namespace(own)) == (own or f"net:[{INODE}]", "default/web-0", UID, "app")
    # An agent's own namespace.
    assert of(namespace("health")) == ("health", "health", "", "")
    # Not in the log folder.
    assert of(namespace(pid=12)) == (f"net:[{INODE}]", OTHER[:12], OTHER, "")

    # A container restarts, and a sidecar joins: the name and the id stay.
    one = namespace()
    before = of(one)
    (place / "sidecar").mkdir()
    assert not names.renew(one, Found(INODE, pid=11))
    names.ask([one])
    assert names.outdated
    names.use()
    assert not names.outdated
    assert names.of(one) == before._replace(pod_containers="app,sidecar")
    # All its processes have ended; the sandbox remains.
    assert not names.renew(one, Found(INODE))
    assert one.by_process.container_id == UID


@pytest.mark.usefixtures("at_once")
def test_pods_on_the_hosts_network(tmp_path: Path) -> None:
    proc, logs = tmp_path / "proc", tmp_path / "pods"
    pod = f"0::/kubepods/pod{UID}"
    processes(proc, {10: f"{pod}/{ID}\n", 11: f"{pod}/{INNER}\n", 12: f"0::/kubepods/pod{OTHER}/{ID}\n", 13: "0::/\n"})
    processes(proc, {os.getpid(): f"0::/kubepods/pod{OTHER}/{INNER}\n"})
    made(logs, f"kube-system_kube-proxy-x7k2p_{UID}", "kube-proxy")
    made(logs, f"mace_mace-collector-x7k2p_{OTHER}", "collector")
    names = NamespaceNames((), lambda: None, pod_logs=str(logs), proc=proc)
    assert names.look_for_sharers([10, 11, 12, 13])
    names.ask([])
    names.use()
    # One pod, not two containers; and not the pod that MACE runs in.
    assert names.on_host_network() == (Sharer("kube-system/kube-proxy-x7k2p", UID),)


def test_the_first_process_of_a_new_namespace_is_looked_for_soon(tmp_path: Path) -> None:
    names = NamespaceNames((), lambda: None, pod_logs="", cri_sockets=(), proc=tmp_path)
    now_s = time.monotonic()

    def pause_s(age_s: float, name: str = "", pid: int = 0) -> float:
        old = _Namespace(5, 1, Found(INODE), now_s - 3600)
        return names.pause_s([old, _Namespace(6, 2, Found(SECOND, name, pid=pid), now_s - age_s)], 1.0)

    assert pause_s(0) == 0.05
    assert 0.2 <= pause_s(0.2) < 1
    assert pause_s(5) == 1.0
    assert pause_s(0, "blue") == pause_s(0, pid=7) == names.pause_s([], 1.0) == 1.0
    assert pause_s(0, f"cni-{UID}") == 0.05


def test_a_process_that_has_ended(tmp_path: Path) -> None:
    assert called_by_process(10, tmp_path) == NOBODY


def test_names_that_cri_o_draws() -> None:
    assert is_made_up(UID)
    assert not is_made_up("web")
