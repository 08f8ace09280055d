"""Names of Kubernetes pods: a pod's network namespace is shown as the container `NAMESPACE/POD`.

Every output that has a container's name thereby has the pod's, and a row, a recording or a series needs no further
field: no other container's name contains a single slash between two Kubernetes names. Docker, Podman, LXC and
/run/netns allow no slash, and a name that is a process's ends in `[pid]`.

The *workload* is what Kubernetes made the pod for (a Deployment, a StatefulSet, ...). MACE derives it from the pod's
name, as the API server is not asked:

| pod | made by | workload |
|---|---|---|
| `web-6d4cf56db6-8xk2p` | Deployment: hash of the template, five random characters | `web` |
| `agent-x7k2p` | DaemonSet, Job, ReplicaSet: five random characters | `agent` |
| `backup-28791360-x7k2p` | CronJob: minutes since 1970, five random characters | `backup` |
| `db-0` | StatefulSet: ordinal | `db` |
| `etcd-node1`, `shell` | static pod, bare pod | the pod's name |

Kubernetes shortens a name before it appends the random characters, if both together have more than 63. The workload of
such a pod may keep a part of the hash.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

_LABEL: Final = "[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
"""Name of a namespace or a container: an RFC 1123 label."""
_SUBDOMAIN: Final = "[a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?"
"""Name of a pod: an RFC 1123 subdomain."""
UID: Final = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}"
"""A pod's UID: a UUID, or of a static pod the MD5 sum of its manifest."""
_RANDOM: Final = "[bcdfghjklmnpqrstvwxz2456789]"
"""Characters of generated names: `alphanums` in Kubernetes' apimachinery/pkg/util/rand."""

SHOWN: Final = f"^({_LABEL})/({_SUBDOMAIN})$"
"""Regular expression of a pod's shown name: namespace, pod."""
_SHOWN: Final = re.compile(SHOWN)
_LOGS: Final = re.compile(f"({_LABEL})_({_SUBDOMAIN})_({UID})")
_CONTAINER: Final = re.compile(_LABEL)
WORKLOAD: Final = rf"^(.+?)(?:-(?:{_RANDOM}{{6,10}}|[0-9]{{8}}))?-{_RANDOM}{{5}}$|^(.+)-(?:0|[1-9][0-9]*)$"
"""Regular expression of a generated pod name. The hash is a 32-bit number's decimal digits, each as a character of
`_RANDOM`: with 6 to 10 digits are 99.998 % of all numbers."""
_WORKLOAD: Final = re.compile(WORKLOAD)


class PodName(NamedTuple):
    """The parts of a pod's name; all are "" for a container that is no pod."""

    namespace: str = ""
    pod: str = ""
    workload: str = ""


NO_POD: Final = PodName()


@lru_cache(maxsize=1 << 14)
def pod_name(container: str) -> PodName:
    """Return the parts of a container's shown name; `NO_POD` if the container is no pod."""
    found = _SHOWN.fullmatch(container)
    return PodName(found[1], found[2], workload(found[2])) if found else NO_POD


def shown_name(namespace: str, pod: str) -> str:
    """Return the name under which a pod appears as a container; `pod_name` is the inverse."""
    return f"{namespace}/{pod}"


def workload(pod: str) -> str:
    """Return the name of a pod without what Kubernetes generated: the name of its workload."""
    found = _WORKLOAD.match(pod)
    return (found[1] or found[2]) if found else pod


def in_log_folder(entry: str) -> tuple[str, str, str] | None:
    """Return (namespace, pod, UID) of a name in /var/log/pods; None if it is no pod's."""
    found = _LOGS.fullmatch(entry)
    return (found[1], found[2], found[3]) if found else None


def is_container_name(entry: str) -> bool:
    """Return whether a name in a pod's log folder can be the name of one of its containers."""
    return _CONTAINER.fullmatch(entry) is not None
