"""Names of containers in a store: rows keep the name at their time, readers show the newest name.

An id identifies a container under all of its names. The names are read from `windows`, which has a row per second where
`delays` has millions. Rows without an id keep their name: rows written before the column existed, and rows of
containers without an id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

TABLES: Final = ("delays", "windows", "minutes", "ten_minutes", "hours", "stages", "round_trips")
"""Tables with the names of containers."""


@dataclass(frozen=True, slots=True)
class Named:
    """A container, by its id."""

    host: str
    container_id: str
    container: str
    """The container's newest name."""
    utc_ns: int
    """Time of its last window under that name, UTC."""
    earlier: tuple[str, ...]
    """The container's other names."""
    pod_containers: str = ""
    """If the container is a pod: the containers that had started in it by then, as in `contracts.topology.Device`."""


def named(rows: Iterable[tuple[str, str, str, int, str]]) -> list[Named]:
    """Group rows of (host, id, name, UTC in ns of the name's last row, the pod's containers) by container.

    The newest container is last.
    """
    names: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for host, container_id, container, utc_ns, pod_containers in rows:
        names.setdefault((host, container_id), []).append((utc_ns, container, pod_containers))
    found = []
    for (host, container_id), each in names.items():
        *earlier, (utc_ns, container, pod_containers) = sorted(each)
        others = tuple(name for _, name, _ in earlier)
        found.append(Named(host, container_id, container, utc_ns, others, pod_containers))
    return sorted(found, key=lambda one: (one.utc_ns, one.host, one.container_id))


def newest_of(container: str, found: Sequence[Named]) -> str:
    """Return the newest name of the container that has this name, or else of the one that had it last."""
    if any(one.container == container for one in found):
        return container
    return next((one.container for one in reversed(found) if container in one.earlier), container)


def by_newest_name(relation: str, found: Sequence[Named]) -> str:
    """Return SQL for the rows of a relation, each with its container's newest name."""
    renamed = [one for one in found if one.earlier]
    if not renamed:
        return relation
    values = ", ".join(f"({', '.join(map(_quoted, (one.host, one.container_id, one.container)))})" for one in renamed)
    return (
        "(SELECT stored.* REPLACE (coalesce(renamed.container, stored.container) AS container)"
        f" FROM {relation} AS stored"
        f" LEFT JOIN (VALUES {values}) AS renamed(host, container_id, container)"
        " ON stored.host = renamed.host AND stored.container_id = renamed.container_id)"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
