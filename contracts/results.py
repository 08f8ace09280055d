"""The correlator's results: rows of a stretch of the stream, and totals of the run so far.

The correlator returns each row once. Totals replace the totals before them; they hold no reference to rows, so that
keeping them takes little memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from contracts.cpus import StagePlace
from contracts.ledger import Ledger
from contracts.schema import Crossings, Delays, Grades, HookCost
from contracts.topology import Device, Sharer
from contracts.windowtable import WindowTable


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that one stretch of the stream has completed, as columns; each of them may be empty."""

    delays: Delays
    windows: WindowTable
    """Final windows: no later stretch adds to them."""
    devices: tuple[Device, ...]
    """Devices to which the `device` columns refer by index; a run only appends to them."""
    crossings: Crossings = field(default_factory=Crossings.empty)
    """Crossings of the packets in `delays`, if the engine's configuration asks for them."""
    gaps_utc_ns: tuple[tuple[int, int], ...] = ()
    """Times (start, end) between which the ring of a CPU lost records, as far as this stretch shows."""
    stages: WindowTable = field(default_factory=WindowTable.empty)
    """Counts of stages, if the engine's configuration asks for them: `device` is an index into `places`, `segment` a
    `contracts.cpus.Measure`. Counts of equal time and place add up; a later stretch may add to them."""
    places: tuple[StagePlace, ...] = ()
    """Places to which `stages` refers by index; a run only appends to them."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of the run so far."""

    upto_utc_ns: int
    """Time before which all records have been processed."""
    ledger: Ledger
    packets: int
    """Packets with at least one delay, equal to `grades.packets`."""
    cost: tuple[HookCost, ...] = ()
    """Cost of observing, per hook; empty if the source cannot measure it."""
    grades: Grades = field(default_factory=Grades)
    settled_utc_ns: int = 0
    """Time before which the results of all packets that began have been returned."""
    present: tuple[Device, ...] | None = field(default=None, compare=False)
    """Present devices by the source's newest topology; None without a topology."""
    several_devices: int = field(default=0, compare=False)
    """Packets of `grades.ambiguous` that several devices fit; the others fit several packets of equal content."""
    on_host_network: tuple[Sharer, ...] = field(default=(), compare=False)
    """Containers on the host's network by the source's newest topology."""

    def ambiguous_by_cause(self) -> dict[str, int]:
        """Return the number of ambiguous packets by cause: `several_devices` or `several_packets` fit."""
        copies = self.grades.ambiguous - self.several_devices
        return {"several_devices": self.several_devices, "several_packets": copies}


@dataclass(frozen=True, slots=True)
class Results:
    """Rows of a stretch, and the totals that include these rows."""

    rows: Rows
    totals: Totals
