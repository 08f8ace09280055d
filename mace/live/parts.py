"""Checks which parts can run on this machine, and says for the others why not and what to do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from collector import SOURCES, LiveSource
from collector.bpf import devices as bpf_devices
from collector.machine import devices
from collector.machine.containers import API_SOCKETS
from collector.machine.cri import CRI_SOCKETS
from collector.machine.name_checks import check_cri, check_pods, check_processes, check_runtimes
from contracts.config import CaptureConfig, Config
from contracts.errors import Unavailable
from contracts.interfaces import Status
from mace import lab
from mace.live import publish
from storage import SINKS


def statuses(config: Config) -> dict[str, Status]:
    """Return the status of each source, sink and helper by name, in the order of the pipeline."""
    return {
        **{f"source {name}": _source(source, config.capture) for name, source in SOURCES.items()},
        "source capture": Status(True, "reads .mace files"),
        "devices for kmod and ftrace": devices.check(host_netns=config.capture.host_netns or None),
        "devices for bpf": bpf_devices.check(host_netns=config.capture.host_netns or None),
        "names by processes": check_processes(),
        "names of pods": check_pods(config.capture.pod_logs),
        "names of pods by CRI": check_cri((*CRI_SOCKETS, *config.capture.cri_sockets)),
        "names by runtimes": check_runtimes((*API_SOCKETS, *config.capture.container_sockets)),
        "sink capture": Status(True, "writes .mace files"),
        "sink store": _store(Path(config.store.path)),
        **{f"sink {name}": kind.check(config) for name, kind in SINKS.items()},
        "broker": publish.check(config),
        "lab netns": _lab(lab.Spec(), "containers are bare network namespaces"),
        "lab docker": _lab(lab.Spec(runtime=lab.Runtime.DOCKER), "containers of the lab's own Docker daemon"),
        "lab podman": _lab(lab.Spec(runtime=lab.Runtime.PODMAN), "containers of the lab's own Podman service"),
        "lab containerd": _lab(lab.Spec(runtime=lab.Runtime.CONTAINERD), "pods of the lab's own containerd"),
        "lab apptainer": _lab(lab.Spec(runtime=lab.Runtime.APPTAINER), "instances of Apptainer"),
        "lab guest": _lab(lab.Spec(far_end=lab.FarEnd.GUEST), "the far end is a virtual machine"),
    }


def _source(source: LiveSource, config: CaptureConfig) -> Status:
    """Return whether the source can run here, and where it would choose the packets that the configuration names."""
    status = source.check()
    if not status.ok:
        return status
    try:
        choice = source.choice(config)
    except Unavailable as error:
        return Status(False, error.why, error.remedy)
    return replace(status, detail=f"{status.detail}; {choice.told}") if choice.told else status


def _lab(spec: lab.Spec, detail: str) -> Status:
    problems = lab.check(spec)
    if not problems:
        return Status(True, detail)
    return Status(False, "; ".join(p.why for p in problems), "; ".join(dict.fromkeys(p.remedy for p in problems)))


def _store(path: Path) -> Status:
    """Return whether the embedded store could be made or written at `path`."""
    place = path.absolute()
    # os.path.exists, because Path.exists() raises if a parent directory may not be entered.
    while not os.path.exists(place):  # noqa: PTH110
        place = place.parent
    if not place.is_dir():
        return Status(False, f"{place} is not a directory", "set [store] path, or --store DIR")
    if not os.access(place, os.W_OK | os.X_OK):
        return Status(False, f"{place} cannot be written", "set [store] path, or --store DIR")
    room = os.statvfs(place)
    return Status(True, f"{path}: {room.f_bavail * room.f_frsize / 2**30:,.1f} GiB free")
