"""Names of Kubernetes pods, from the folder in which the kubelet keeps their logs. No socket, no API server.

    /proc/PID/cgroup                       the pod's UID
    /var/log/pods/NAMESPACE_POD_UID/       namespace and pod of that UID
        CONTAINER/                         a folder for each container that has started, init containers too

The kubelet makes the pod's folder before the pod's sandbox (`createPodSandbox`, `MkdirAll(LogDirectory)`), so that a
pod has its name as soon as its first process is found. The contents of logs are not read.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from contracts.pods import in_log_folder, is_container_name, shown_name

LOG_FOLDER: Final = "/var/log/pods"
_LOOK_S: Final = 1.0
"""Interval at which known pods are looked at for new containers, s: 2 µs for each pod."""
_SETTLED_NS: Final = 1_000_000_000
"""Age from which a folder's time of change tells that it has not changed since: the kernel's times have a granularity
of some milliseconds, that of other file systems is up to 1 s."""
_MOST_CONTAINERS: Final = 64
"""Largest number of containers named of one pod, so that a folder of any size gives a short text."""
_UID: Final = "[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD: Final = re.compile(rf"[/-]pod({_UID})(?=\.slice|[/:]|$)(?P<below>[^\n]*)", re.MULTILINE)
"""A pod's group, and what is below it: `/kubepods/burstable/podUID/ID` by cgroupfs,
`/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_I_D.slice/cri-containerd-ID.scope` by systemd,
`/.../kubepods-burstable-podU_I_D.slice:cri-containerd:ID` if containerd does not know that the kubelet uses systemd.
MACE in a pod sees its neighbours' groups from its own: `/../../podUID/ID`."""
_CONTAINER_ID: Final = re.compile("[0-9a-f]{64}")


def pod_uid_in_cgroup(text: str) -> str:
    """Return the UID of the pod in the text of /proc/PID/cgroup; "" if the process is no pod's.

    A container that runs inside a pod's container (Docker in a pod) is not the pod.
    """
    for found in _POD.finditer(text):
        if len(_CONTAINER_ID.findall(found["below"])) <= 1:
            return found[1].replace("_", "-")
    return ""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as the log folder has it."""

    name: str
    """`NAMESPACE/POD`."""
    containers: str = ""
    """Names of the containers that have started, sorted and separated by commas."""


def containers_text(names: Iterable[str]) -> str:
    """Return the names of a pod's containers as in `Pod.containers`, at most 64 of them."""
    return ",".join(sorted(names)[:_MOST_CONTAINERS])


class PodLogs:
    """Finds the names of pods by UID in the kubelet's log folder.

    A folder that cannot be read gives no names. A pod whose folder has been removed keeps its name while it is wanted.
    """

    def __init__(self, folder: str) -> None:
        """`folder` is /var/log/pods or where it is mounted; "" gives no names."""
        self._folder = folder
        self._wanted: frozenset[str] = frozenset()
        self._look_at_s = 0.0
        self._entries: dict[str, str] = {}
        """UID → name of the pod's folder."""
        self._changed_ns: dict[str, int] = {}
        """Path → time of change of the folder when it was last listed; missing if it may have changed since."""
        self.pods: Mapping[str, Pod] = {}
        """UID → pod, of the wanted ones. Replaced when a pod is found or changes, never modified."""

    def look(self, uids: frozenset[str]) -> None:
        """Update `pods` to the pods with these UIDs: at once if there are new ones, else at most once a second."""
        now_s = time.monotonic()
        if not self._folder or (uids <= self._wanted and now_s < self._look_at_s):
            return
        if not uids <= self._wanted:
            self._changed_ns.pop(self._folder, None)  # the last listing was not searched for these
        self._wanted, self._look_at_s = uids, now_s + _LOOK_S
        if uids - self._entries.keys():
            self._find(uids)
        pods = {uid: pod for uid in uids if (pod := self._pod(uid)) is not None}
        if pods != self.pods:
            self.pods = pods
        self._entries = {uid: entry for uid, entry in self._entries.items() if uid in uids}
        paths = {self._folder, *map(self._path, self._entries.values())}
        self._changed_ns = {path: changed_ns for path, changed_ns in self._changed_ns.items() if path in paths}

    def _find(self, uids: frozenset[str]) -> None:
        """Find the folders of pods."""
        for entry in self._listed(self._folder) or ():
            named = in_log_folder(entry)
            if named is not None and named[2] in uids:
                self._entries[named[2]] = entry

    def _pod(self, uid: str) -> Pod | None:
        entry = self._entries.get(uid)
        named = in_log_folder(entry) if entry is not None else None
        if entry is None or named is None:
            return None
        before = self.pods.get(uid)
        containers = self._listed(self._path(entry))
        if containers is None:
            return before or Pod(shown_name(*named[:2]))
        return Pod(shown_name(*named[:2]), containers_text(filter(is_container_name, containers)))

    def _path(self, entry: str) -> str:
        return f"{self._folder}/{entry}"

    def _listed(self, path: str) -> list[str] | None:
        """Return the names in a folder; None if it has not changed since the last call, or cannot be read."""
        try:
            changed_ns = os.stat(path).st_mtime_ns  # noqa: PTH116 - fast: a thousand a second
            if self._changed_ns.get(path) == changed_ns:
                return None
            names = os.listdir(path)  # noqa: PTH208
        except OSError:
            self._changed_ns.pop(path, None)
            return None
        if abs(time.time_ns() - changed_ns) > _SETTLED_NS:
            self._changed_ns[path] = changed_ns
        else:
            self._changed_ns.pop(path, None)
        return names
