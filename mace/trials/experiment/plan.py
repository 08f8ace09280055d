"""The plan of an experiment: its cells, how many pings a block has, and how long a repetition takes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from contracts.errors import UsageError, nearest
from correlator.intervals import FEWEST
from mace.lab import FarEnd, Runtime, Spec
from mace.lab.plan import bridge_networks
from mace.trials.experiment.load import LOADS, NO_LOAD

PACES: Final = {"flood": 0.0, "10ms": 0.01, "50ms": 0.05, "200ms": 0.2, "1s": 1.0}
"""Seconds between ping's requests; 0 sends the next when the reply has arrived, as fast as `ping -f`."""
COUNTS: Final = {"flood": 300, "10ms": 40, "50ms": 30, "200ms": 20, "1s": 10}
"""Pings per block. A block of seconds, because the machine changes by 20 µs within longer ones; 10 are the fewest
whose median has an interval."""
CORRECTED: Final = {"flood": 30_000, "10ms": 100, "50ms": 60, "200ms": 36, "1s": 34}
"""Pings of `mace ping` per block: the fewest beside which it sends three probes from either side (one for five pings,
ten a second), without which it prints no host RTT by probes."""
REPETITIONS: Final = 20
FLOODS: Final = 2
QUICK_REPETITIONS: Final = 4
QUICK_S: Final = 585.0
"""Time of a quick run, seconds, so that the command ends within ten minutes."""
_PTP: Final = json.dumps(
    {
        "cniVersion": "1.0.0",
        "name": "ptp",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": True,
                "ipam": {
                    "type": "host-local",
                    "subnet": str(bridge_networks()[0]),
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "firewall"},
            {"type": "portmap", "snat": True},
        ],
    }
)
"""The network `ptp` of Apptainer's package (10_ptp.conflist), with the lab's addresses."""
RUNTIMES: Final = {
    **{word.value: (word, "") for word in Runtime},
    "apptainer-ptp": (Runtime.APPTAINER, _PTP),
}
"""Name -> the runtime and its CNI configuration. Without one, Apptainer's containers are on the host's network."""
_MOST_FLOODS: Final = 16
_OTHER_BLOCKS: Final = 4
"""Blocks of pings beside those of `mace ping` that every load has: two of the host's around it, and two others."""
_FLOOD_S: Final = 0.0001
"""About how long a round trip of a flood takes."""
_STARTS_S: Final = 6.0
"""Time to start what a repetition runs, seconds: `mace ping`, and the source twice."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One combination of conditions."""

    runtime: str
    source: str
    far_end: str
    load: str
    pace: str
    flood_containers: int

    @property
    def interval_s(self) -> float:
        return PACES[self.pace]

    def key(self) -> tuple[object, ...]:
        """Return the order in which cells are shown: paces from flood on, and the runtimes of a pace side by side."""
        place = (self.source, self.far_end, self.load, list(PACES).index(self.pace), self.flood_containers)
        return (*place, list(RUNTIMES).index(self.runtime))


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one run. Raises `UsageError` for an impossible one."""

    paces: tuple[str, ...]
    flood: int
    """Largest number of flooding containers; all numbers from 0 are measured."""
    repetitions: int
    count: int | None
    """Pings per block; None is the pace's own (`COUNTS`, `CORRECTED`)."""
    runtimes: tuple[str, ...]
    """Of `RUNTIMES`; each has a lab of its own."""
    source: str
    far_end: str
    guest_kernel: str
    """Kernel of a far end in a guest; "" is one that is found."""
    load: str
    seed: int
    """Seed of the random order."""

    def __post_init__(self) -> None:
        for word in self.paces:
            if word not in PACES:
                raise UsageError(f"--paces: no {word!r}; there are {', '.join(PACES)}")
        if not self.paces or self.repetitions < 1:
            raise UsageError("--paces and --repetitions: expected at least 1")
        if not 0 <= self.flood <= _MOST_FLOODS:
            raise UsageError(f"--flood {self.flood}: expected 0 to {_MOST_FLOODS}")
        if self.count is not None and self.count < FEWEST:
            raise UsageError(f"--count {self.count}: expected at least {FEWEST}, the fewest that have an interval")
        if self.load not in LOADS:
            raise UsageError(f"--load: no {self.load!r}; there are {', '.join(LOADS)}")
        for word in self.runtimes:
            if word not in RUNTIMES:
                raise UsageError(f"--runtimes: no {word!r}{nearest(word, RUNTIMES)}; there are {', '.join(RUNTIMES)}")
        if not self.runtimes or len(set(self.runtimes)) < len(self.runtimes):
            raise UsageError("--runtimes: expected at least one, and none twice")
        self.specs()  # refuses a lab that cannot be

    def cells(self) -> list[Cell]:
        """Return all cells."""
        return [
            Cell(runtime, self.source, self.far_end, self.load, pace, flood)
            for runtime in self.runtimes
            for pace in self.paces
            for flood in range(self.flood + 1)
        ]

    def order(self) -> Iterator[tuple[int, Cell]]:
        """Yield (number from 0, cell) of each repetition, in the order of measurement, which depends on the seed."""
        for number in range(self.repetitions):
            cells = self.cells()
            random.Random(f"{self.seed} {number}").shuffle(cells)
            yield from ((number, cell) for cell in cells)

    def count_of(self, cell: Cell, *, corrected: bool = False) -> int:
        """Return the number of pings per block, of `mace ping` or of the others."""
        return self.count or (CORRECTED if corrected else COUNTS)[cell.pace]

    def seconds(self, cell: Cell) -> float:
        """Return about how long a repetition takes, in seconds, on a machine that is not busy."""
        blocks = _OTHER_BLOCKS + (self.load != NO_LOAD)
        pings = blocks * self.count_of(cell) + self.count_of(cell, corrected=True)
        return pings * (cell.interval_s or _FLOOD_S) + _STARTS_S

    def specs(self) -> dict[str, Spec]:
        """Return the specification of each runtime's lab: the measured container, and those that flood."""
        return {
            word: Spec(
                name=f"experiment-{word}",
                containers=1 + self.flood,
                runtime=Runtime(RUNTIMES[word][0]),
                far_end=FarEnd(self.far_end),
                guest_kernel=self.guest_kernel,
                cni=RUNTIMES[word][1],
            )
            for word in self.runtimes
        }

    def settings(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """Return what must be equal in all parts of a run that was interrupted."""
        return {"count": self.count, **{name: machine[name] for name in ("cpu", "cores", "kernel")}}


def cell_of(values: Mapping[str, Any]) -> Cell:
    """Return the cell of a line of a results file. Raises `TypeError`, `ValueError` for anything else."""
    cell = Cell(**values)
    if cell.pace not in PACES:
        raise ValueError(f"no pace {cell.pace!r}")
    if cell.runtime not in RUNTIMES:
        raise ValueError(f"no runtime {cell.runtime!r}")
    return cell


def as_values(cell: Cell) -> dict[str, Any]:
    """Return the cell for a line of a results file."""
    return asdict(cell)
