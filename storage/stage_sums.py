"""Counters of which CPU works on packets, for databases: sums of stages that only grow while a stream lasts.

The store keeps histograms by both CPUs. A database gets two numbers for each container, device, direction, measure and
CPU, and whether the packets came from another CPU: a series for each pair of CPUs would be too many.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from contracts.cpus import Measure, StagePlace
from contracts.results import Rows
from contracts.schema import Direction
from contracts.topology import Device

_OF_STAGES: Final = (Measure.RUN, Measure.WAIT, Measure.LAST_WAIT)


class StageKey(NamedTuple):
    """What a pair of counters is of. The order is that of tags and labels."""

    container: str
    netns: str
    device: str
    kind: str
    direction: str
    measure: str
    """Lower-case name of a `contracts.cpus.Measure`."""
    cpu: str
    """CPU that worked; empty where the measure is of whole packets, or the CPU is not known."""
    moved: str
    """`yes` if another CPU had passed the packets on, else `no`; empty where the measure is of whole packets."""


class StageSum:
    """Stages or packets, and the sum of their durations."""

    __slots__ = ("count", "device", "gone_s", "sum_ns")

    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device
        """`Device.key` of the newest device with this key."""
        self.gone_s: float | None = None
        """Time at which its device or container was first missing; None while both are present."""
        self.count = self.sum_ns = 0


def add_stages(sums: dict[StageKey, StageSum], rows: Rows, most: int) -> tuple[set[StageKey], int]:
    """Add the stages in these rows to the sums, of which there may be `most`.

    Returns the keys whose sums have grown, and the number of stages and packets of keys beyond `most`.
    """
    grown: set[StageKey] = set()
    beyond = 0
    table = rows.stages
    columns = (table.column(name).tolist() for name in ("device", "direction", "segment", "count", "sum_ns"))
    for place, direction, measure, count, sum_ns in zip(*columns, strict=True):
        at = rows.places[place]
        device = rows.devices[at.device]
        key = _key(at, device, rows.devices[at.owner], Direction(direction), Measure(measure))
        found = sums.get(key)
        if found is None:
            if len(sums) >= most:
                beyond += count
                continue
            found = sums[key] = StageSum(device.key)
        found.device = device.key
        found.count += count
        found.sum_ns += sum_ns
        grown.add(key)
    return grown, beyond


def _key(at: StagePlace, device: Device, owner: Device, direction: Direction, measure: Measure) -> StageKey:
    cpu = moved = ""
    if measure in _OF_STAGES and at.cpu >= 0:
        cpu, moved = str(at.cpu), "no" if at.cpu == at.cpu_queued else "yes"
    return StageKey(
        owner.container or device.container,
        device.netns_name,
        device.name,
        device.kind,
        direction.name.lower(),
        measure.name.lower(),
        cpu,
        moved,
    )
