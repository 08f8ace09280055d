"""Whether containers can get names here: from the control groups of processes, and from a runtime's API.

Both are optional. A namespace without a name is shown by its number (`net:[4026532000]`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from collector.machine.containers import ApiError, ContainerApi
from collector.machine.cri import CriError, CriSocket, is_installed
from collector.machine.processes import in_initial_pid_namespace
from contracts.interfaces import Status
from contracts.pods import in_log_folder


def check_processes(proc: Path = Path("/proc")) -> Status:
    """Return whether the processes of containers can be seen, whose control groups have the containers' ids."""
    if not in_initial_pid_namespace(proc):
        return Status(
            False,
            "MACE sees only the processes of its own process id namespace, so other containers have numbers for names",
            "`pid: host` in Compose, `hostPID: true` in Kubernetes",
        )
    try:
        (proc / "1/cgroup").read_bytes()
        (proc / "1/net/stat").stat()
    except OSError as error:
        return Status(
            False,
            f"other users' processes are hidden ({error.strerror}: {error.filename}), so containers have numbers for"
            " names",
            "mount /proc without hidepid=, or add MACE's user to the group of its option gid=",
        )
    return Status(True, "short ids, from the control groups of the containers' processes")


def check_pods(folder: str) -> Status:
    """Return whether the kubelet's log folder gives Kubernetes pods their names."""
    if not folder:
        return Status(False, "[capture] pod_logs is empty, so pods are called by their UIDs", "set [capture] pod_logs")
    try:
        found = sum(in_log_folder(entry) is not None for entry in os.listdir(folder))  # noqa: PTH208
    except FileNotFoundError:
        return Status(
            False,
            f"{folder} does not exist, so pods, if there are any, are called by their UIDs",
            "on a Kubernetes node: mount the host's /var/log/pods read-only, and name it in [capture] pod_logs",
        )
    except OSError as error:
        return Status(
            False,
            f"{folder} cannot be listed ({error.strerror}), so pods are called by their UIDs",
            "give MACE's user the right to list it",
        )
    return Status(True, f"{found} pods in {folder}: namespace, pod and containers, without a socket")


def check_cri(sockets: Sequence[str]) -> Status:
    """Return whether a runtime's CRI socket at one of `sockets` names the pods that the log folder does not have."""
    paths = dict.fromkeys(os.path.realpath(path) for path in sockets)
    there = [path for path in paths if os.path.exists(path)]  # noqa: PTH110 - Path.exists raises without rights
    if not there:
        return Status(False, f"none of {', '.join(sockets)} exists", "only for pods that are not in the log folder")
    if not is_installed():
        return Status(False, "h2 is not installed, which speaks to the sockets", "pip install mace[cri]")
    told, failures = [], []
    for path in there:
        try:
            told.append(f"{len(CriSocket(path).pods())} pods at {path}")
        except CriError as error:
            failures.append(str(error))
    if not told:
        return Status(False, "; ".join(failures), "has MACE's user the right, and does the runtime serve the CRI?")
    return Status(True, ", ".join(told))


def check_runtimes(sockets: Sequence[str]) -> Status:
    """Return whether a container runtime's API at one of `sockets` gives containers their own names."""
    paths = dict.fromkeys(os.path.realpath(path) for path in sockets)
    there = [path for path in paths if os.path.exists(path)]  # noqa: PTH110 - Path.exists raises without rights
    if not there:
        return Status(
            False,
            f"none of {', '.join(sockets)} exists, so containers are called by their ids",
            "if a runtime's socket is elsewhere, name it in [capture] container_sockets",
        )
    closed = [path for path in there if not os.access(path, os.R_OK | os.W_OK)]
    if closed == there:
        return Status(
            False,
            f"{', '.join(closed)} cannot be opened by this user, so containers are called by their ids",
            "add the user to the socket's group, which has the rights of root (docs/deploy.md)",
        )
    try:
        counts = {path: len(ContainerApi(path).running()) for path in there if path not in closed}
    except ApiError as error:
        return Status(False, str(error), "is the runtime running?")
    return Status(True, ", ".join(f"{count} containers at {path}" for path, count in counts.items()))
