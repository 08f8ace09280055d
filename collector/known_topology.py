"""Devices for files that only name them: taken from a capture of the same host, if there is one.

A trace of somebody else's tool has device names and nothing more. `eth0` is in every container, and what is plugged
into what is not in the file. A capture (`mace record`, for a second, on the same host) tells it, and as long as both
carry CLOCK_MONOTONIC of one boot, also when it changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from collector.capture_source import Capture
from collector.ftrace_pages import Sightings
from mace.clock import ClockPair
from mace.interfaces import StreamHeader
from mace.records import Batch
from mace.topology import Device, Topology

NAMES_ONLY: Final = (
    "it only names devices, so whose they are and what is plugged into what is not known: give a capture of the same "
    "host as --topology (`mace record --duration 1 -o host.mace`)"
)
"""What to tell where none is given."""


NO_DATE: Final = (
    "it does not tell the time of day, so its first record is dated by when the file was last written (`trace-cmd "
    "record --date` would tell; so does a capture given as --topology, if both have CLOCK_MONOTONIC)"
)
_DAY_NS: Final = 86_400 * 10**9


def dated_by_file(path: Path, first_ns: int) -> ClockPair:
    """A guess where a file does not tell: its first record is from when it was last written. Say so (`NO_DATE`)."""
    return ClockPair(first_ns, path.stat().st_mtime_ns, _DAY_NS)


@dataclass(frozen=True, slots=True)
class Known:
    """What a capture knows of devices."""

    header: StreamHeader
    host_netns: int
    changes: tuple[tuple[int, tuple[Device, ...]], ...]
    """All devices, from a time on, ns."""


def read(path: Path | None) -> Known | None:
    """The topologies of a capture; None without one. Raises `Unavailable` or `CaptureError`."""
    if path is None:
        return None
    with Capture(path) as capture:
        changes: list[tuple[int, tuple[Device, ...]]] = []
        host_netns = 0
        for item in capture:
            if isinstance(item, Topology) and (not changes or changes[-1][1] != item.devices):
                changes.append((item.from_ns, item.devices))
                host_netns = item.host_netns
        return Known(capture.header, host_netns, tuple(changes))


class TopologyTeller:
    """Puts topologies into a stream of records whose devices are sightings by name."""

    def __init__(self, known: Known | None, sightings: Sightings, *, same_clock: bool) -> None:
        self._host_netns: Final = known.host_netns if known else 0
        self._sightings = sightings
        changes = known.changes if known and known.changes else ((0, ()),)
        # Without a common clock nobody can say when what was there: then it is what was known of most devices.
        self._coming = list(changes) if same_clock else [max(changes, key=lambda one: len(one[1]))]
        self._devices: tuple[Device, ...] = self._coming[0][1]
        self._told = 0

    @property
    def begun(self) -> bool:
        """Whether a topology has been given out."""
        return self._told > 0

    def stream(self, batches: Iterable[Batch]) -> Iterator[Topology | Batch]:
        """The batches in pieces of a bounded size, and before each the topology that it needs and has not had."""
        for batch in batches:
            for item in self.around(batch):
                if isinstance(item, Batch):
                    yield from item.pieces()
                else:
                    yield item

    def around(self, batch: Batch) -> Iterator[Topology | Batch]:
        """The batch, cut where devices change, each part after the topology that it needs."""
        while len(batch):
            first_ns, last_ns = int(batch.ts_ns[0]), int(batch.ts_ns[-1])
            changed = not self._told
            while self._coming and (self._coming[0][0] <= first_ns or not self._told):
                changed = changed or self._coming[0][1] != self._devices
                self._devices = self._coming.pop(0)[1]
                self._told = self._told or 1
            if changed or len(self._sightings) > self._told:
                yield self.topology(first_ns)
            cut = len(batch)
            if self._coming and self._coming[0][0] <= last_ns:
                cut = int(np.searchsorted(batch.ts_ns, self._coming[0][0]))
            yield batch[:cut]
            batch = batch[cut:]

    def topology(self, from_ns: int) -> Topology:
        """What holds now."""
        names = self._sightings.snapshot()
        self._told = len(names)
        return Topology(from_ns, self._host_netns, self._devices, names)
