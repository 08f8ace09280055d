"""Topologies for files that only name devices, read from a capture of the same host.

The traces of other tools contain device names and nothing more. Every container has an `eth0`, and the file does not
say which devices are connected. A capture of the same host (one second of `mace record`) has the devices and their
connections. If both files carry CLOCK_MONOTONIC of one boot, changes of the devices apply at their times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from collector.capture.source import Capture
from collector.pages.decoding import Sightings
from contracts.clock import ClockPair
from contracts.interfaces import StreamHeader
from contracts.records import Batch
from contracts.topology import Device, Topology

NAMES_ONLY: Final = (
    "it only names devices, so which container owns a device, and which devices are connected, is unknown: give a "
    "capture of the same host as --topology (`mace record --duration 1 -o host.mace`)"
)
"""Warning for a file of device names without a `--topology`."""


NO_DATE: Final = (
    "it contains no time of day, so its first record is dated by the file's modification time (record with `trace-cmd "
    "record --date`, or give a capture as --topology if both have CLOCK_MONOTONIC)"
)
"""Warning for a file without UTC time; see `dated_by_file`."""
_DAY_NS: Final = 86_400 * 10**9


def dated_by_file(path: Path, first_ns: int) -> ClockPair:
    """Return a clock pair for a file without UTC time: the first record gets the file's modification time.

    This is a guess, uncertain by a day; warn the user with `NO_DATE`.
    """
    return ClockPair(first_ns, path.stat().st_mtime_ns, _DAY_NS)


@dataclass(frozen=True, slots=True)
class Known:
    """The devices of a capture, and their changes over time."""

    header: StreamHeader
    host_netns: int
    changes: tuple[tuple[int, tuple[Device, ...]], ...]
    """(time in ns, all devices from that time on), in order of time."""


def read(path: Path | None) -> Known | None:
    """Read the topologies of a capture; None for no path. Raises `Unavailable` or `CaptureError`."""
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
    """Inserts topologies into a stream of records whose devices are sightings by name."""

    def __init__(self, known: Known | None, sightings: Sightings, *, same_clock: bool) -> None:
        self._host_netns: Final = known.host_netns if known else 0
        self._sightings = sightings
        changes = known.changes if known and known.changes else ((0, ()),)
        # Without a common clock the times of changes are meaningless: use the snapshot with the most devices.
        self._coming = list(changes) if same_clock else [max(changes, key=lambda one: len(one[1]))]
        self._devices: tuple[Device, ...] = self._coming[0][1]
        self._told = 0

    @property
    def begun(self) -> bool:
        """Whether the stream has had its first topology."""
        return self._told > 0

    def stream(self, batches: Iterable[Batch]) -> Iterator[Topology | Batch]:
        """Yield the batches in pieces of bounded size, each preceded by the topology that it needs if that is new."""
        for batch in batches:
            for item in self.around(batch):
                if isinstance(item, Batch):
                    yield from item.pieces()
                else:
                    yield item

    def around(self, batch: Batch) -> Iterator[Topology | Batch]:
        """Yield the batch, cut where devices change; the topology that a part needs precedes it if that is new."""
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
        """Return the current topology, holding from `from_ns` on, with all sightings so far."""
        names = self._sightings.snapshot()
        self._told = len(names)
        return Topology(from_ns, self._host_netns, self._devices, names)
