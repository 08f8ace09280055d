"""What the correlator gives out piece by piece: the rows of a stretch of the stream, and the totals of the run so far.

Each row is given out once, and belongs to whoever takes it. Totals replace the totals before them: who keeps them for
long keeps no row with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from contracts.ledger import Ledger
from contracts.schema import Crossings, Delays, Grades, HookCost
from contracts.topology import Device, Sharer
from contracts.windowtable import WindowTable


@dataclass(frozen=True, slots=True)
class Rows:
    """What one stretch of the stream has completed. All are columns, and any of them may be empty."""

    delays: Delays
    windows: WindowTable
    """Final: no later stretch has more of one of them."""
    devices: tuple[Device, ...]
    """What the `device` columns point to. Only ever appended to during a run."""
    crossings: Crossings = field(default_factory=Crossings.empty)
    """Of the packets whose delays these are, where crossings were asked for."""
    gaps_utc_ns: tuple[tuple[int, int], ...] = ()
    """Stretches of time, (start, end), in which the ring of some CPU lost records: those found in this stretch."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the whole run has come to so far."""

    upto_utc_ns: int
    """All records before this time have been looked at."""
    ledger: Ledger
    packets: int
    """Packets with at least one delay; those of `grades`."""
    cost: tuple[HookCost, ...] = ()
    """What observing has cost, per hook; empty where the source cannot tell."""
    grades: Grades = field(default_factory=Grades)
    settled_utc_ns: int = 0
    """All packets whose first record is before this time have been given out."""
    present: tuple[Device, ...] | None = field(default=None, compare=False)
    """The devices that there are now, as the source last listed them; None if it has not."""
    several_devices: int = field(default=0, compare=False)
    """Of `grades.ambiguous` the packets that several devices fit; the others fit several packets of one content."""
    on_host_network: tuple[Sharer, ...] = field(default=(), compare=False)
    """Containers that are on the host's network now, as the source last listed them."""

    def ambiguous_by_cause(self) -> dict[str, int]:
        """Packets that were given up: `several_devices` or `several_packets` fit."""
        copies = self.grades.ambiguous - self.several_devices
        return {"several_devices": self.several_devices, "several_packets": copies}


@dataclass(frozen=True, slots=True)
class Results:
    """What the correlator hands over at one time: the rows of a stretch, and the totals with these rows counted."""

    rows: Rows
    totals: Totals
