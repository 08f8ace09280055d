"""Runs the repetitions of an experiment in a lab.

The corrected figures are those of `mace ping` itself, run as a user runs it: its own process, its JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from contracts.errors import LabError
from contracts.ledger import Ledger
from correlator.samples import Samples
from mace.lab import HOST, REMOTE, Lab
from mace.live.session import Session
from mace.tools.output import read
from mace.tools.ping_output import PingOutput
from mace.trials.experiment import load
from mace.trials.experiment.load import NO_LOAD, Load
from mace.trials.experiment.plan import Cell, Plan
from mace.trials.experiment.results import Repetition, Results

MEASURED: Final = "c1"
STRETCHES: Final = ("send", "device", "far_end")
"""Parts of the host path term. `far_end` exists only if the far end is on this machine, and shares its caches."""
_HOST, _BOUND = "host_rtt_ns", "host_rtt_lower_bound_ns"
"""Keys of `mace ping --json`: its host RTT, and the lower bound, which may be all that is known."""
_WITHOUT: Final = ("host_rtt_without_waiting_ns", "host_rtt_lower_bound_without_waiting_ns")
_NOT_CORRECTED: Final[dict[str, Any]] = {
    "statistics": {},
    "samples": [],
    "paired": 0,
    "unpaired": {},
    "ledger": Ledger().as_dict(),
}
"""In place of the JSON of `mace ping`, for a container on the host's network: there is nothing to correct."""
RING_MIB: Final = 64
"""Default size of the ring per CPU: two floods and the measured ping together write 60 MB a second."""
_FLOOD_PAYLOAD: Final = 24
"""Payload of a flood's packets, whose length distinguishes them from the measured packets."""
_MOST_FLOOD: Final = 2_000_000
_SETTLE_S: Final = 0.2
"""Wait between the start of floods and loads and the first measurement beside them."""
_PATIENCE: Final = 10
"""A repetition that takes this many times as long as planned is ended."""
_MARGIN_S: Final = 120.0
_LAST_WORDS_S: Final = 20.0
"""Time for `mace ping` to stop its source when it is interrupted."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where one runtime is measured."""

    lab: Lab
    session: Session
    """Traces the host's traced pings, with the same source and correlator as `mace ping`."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The place of an experiment: a lab for each runtime, and how `mace ping` is called in it."""

    plan: Plan
    sites: Mapping[str, Site]
    """By the name of the runtime."""
    ping_options: tuple[str, ...]
    """Options of `mace ping` other than the container's: `--ring-mib`, `--config`."""

    def warm_up(self) -> None:
        """Resolve all addresses, and use each path once."""
        for site in self.sites.values():
            for member in (HOST, *site.lab.containers):
                site.lab.ping(member, count=3)

    def run(self, results: Results, until_s: float | None) -> bool:
        """Measure all repetitions that are not finished; returns False if it was interrupted.

        `until_s` (CLOCK_MONOTONIC): no repetition is begun that would end later.
        """
        todo = [(number, cell) for number, cell in self.plan.order() if not results.has(number, cell)]
        if not todo:
            return True
        try:
            self.warm_up()
            for at, (number, cell) in enumerate(todo):
                if until_s is not None and time.monotonic() + self.plan.seconds(cell) > until_s:
                    continue
                conditions = f"{cell.runtime}, {cell.pace}, {cell.flood_containers} flooding"
                said = f"{at + 1} of {len(todo)}: {conditions}, repetition {number + 1}"
                self.sites[cell.runtime].session.say(said)
                results.add(self._repetition(number, cell))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return False
        return True

    def _repetition(self, number: int, cell: Cell) -> Repetition:
        limit_s, lab = self.plan.seconds(cell) * _PATIENCE + _MARGIN_S, self.sites[cell.runtime].lab
        with ExitStack() as stack:
            for name in lab.containers[1 : cell.flood_containers + 1]:
                flow = lab.start_ping(name, count=_MOST_FLOOD, size=_FLOOD_PAYLOAD, flood=True)
                stack.enter_context(flow)
            applied = stack.enter_context(load.applied(cell.load, lab.environment(HOST), limit_s))
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mace-experiment-")))
            if cell.flood_containers or cell.load != NO_LOAD:
                time.sleep(_SETTLE_S)
            return _Blocks(self, self.sites[cell.runtime], cell, applied, place, limit_s).measure(number)


@dataclass(slots=True)
class _Blocks:
    """The blocks of one repetition."""

    bench: Bench
    site: Site
    cell: Cell
    load: Load
    place: Path
    """Directory for what the tools print."""
    limit_s: float
    bare: dict[str, list[int]] = field(default_factory=lambda: {"untraced": []})
    container: dict[str, list[int]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    """The JSON of `mace ping`."""
    wants: dict[str, int | None] = field(default_factory=dict)

    def measure(self, number: int) -> Repetition:
        """Run all blocks in random order."""
        blocks: list[Callable[[], None]] = [self._corrected, self._container, self._traced_host]
        if self.cell.load != NO_LOAD:
            blocks.append(self._starved_host)
        random.Random(f"{self.bench.plan.seed} {number} {self.cell}").shuffle(blocks)
        for block in blocks:
            block()
        return repetition(number, self.cell, self.found, self.bare, self.container, self.wants)

    def _corrected(self) -> None:
        self._untraced_host()
        lab, before = self.site.lab, self.load.wants()
        if not lab.shares_host(MEASURED):
            self.found = json.loads(asyncio.run(self._corrected_pings(lab)))
        self.wants = load.since(self.load.wants(), before)
        self._untraced_host()

    async def _corrected_pings(self, lab: Lab) -> str:
        argv = [
            *(sys.executable, "-m", "mace", "ping", "--lab", lab.name, "--container", MEASURED, "--json"),
            *("--source", self.cell.source, *self.bench.ping_options),
            *self._ping_arguments(corrected=True),
        ]
        return await self._said(argv, self.load.environment(lab.environment(MEASURED)))

    def _container(self) -> None:
        environment = self.load.environment(self.site.lab.environment(MEASURED))
        # With a quota, ping is a program outside of the container that enters the quota's control group.
        enter = self.site.lab.command if self.load.programs else self.site.lab.inside
        argv = enter(MEASURED, ["ping", *self._ping_arguments()])
        self.container["untraced"] = asyncio.run(self._pings(argv, environment))

    def _untraced_host(self) -> None:
        self.bare["untraced"] += asyncio.run(self._host_pings(self.load.host(["ping"])))

    def _traced_host(self) -> None:
        async def traced() -> None:
            self.bare["traced"] = await self._host_pings(self.load.host(["ping"]))

        self.site.session.observe(traced, lambda _: None, tee=None)
        if "traced" not in self.bare:  # a signal has ended the session before the pings
            raise KeyboardInterrupt

    def _starved_host(self) -> None:
        self.bare["starved"] = asyncio.run(self._host_pings(["ping"]))

    def _ping_arguments(self, *, corrected: bool = False) -> list[str]:
        count = self.bench.plan.count_of(self.cell, corrected=corrected)
        address = self.site.lab.address(REMOTE)
        return ["-n", "-c", str(count), "-i", f"{self.cell.interval_s:g}", "-W", "1", address]

    async def _host_pings(self, ping: list[str]) -> list[int]:
        lab = self.site.lab
        return await self._pings(lab.command(HOST, [*ping, *self._ping_arguments()]), lab.environment(HOST))

    async def _pings(self, argv: list[str], env: Mapping[str, str]) -> list[int]:
        """Run a ping and return its round trips, ns."""
        samples, _ = read((await self._said(argv, env)).splitlines(), PingOutput())
        return _answered(samples)

    async def _said(self, argv: list[str], env: Mapping[str, str]) -> str:
        """Run a command and return its standard output. Raises `LabError` if it fails or takes too long.

        Output goes to a file, because each line through a pipe would wake this process during the measurement.
        """
        path = self.place / "said"
        with path.open("w") as said, (self.place / "complaints").open("w+") as complaints:
            process = await asyncio.create_subprocess_exec(
                *argv, env=dict(env), stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=complaints,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = await asyncio.wait_for(process.wait(), self.limit_s)
            except TimeoutError:
                raise LabError(f"{' '.join(argv)}: did not end within {self.limit_s:.0f} s") from None
            finally:
                await _ended(process)
            complaints.seek(0)
            if status not in (0, 1) or not path.stat().st_size:
                why = complaints.read().strip() or f"exit status {status}"
                raise LabError(f"{' '.join(argv)}: {why}")
        return path.read_text()


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Interrupt a process that still runs, so that it stops its source, and kill it if it does not end."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _LAST_WORDS_S)
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _answered(samples: Samples) -> list[int]:
    found: list[int] = samples.rtt_ns[(samples.rtt_ns > 0) & ~samples.duplicate].tolist()
    return found


def repetition(
    number: int,
    cell: Cell,
    found: Mapping[str, Any],
    bare: dict[str, list[int]],
    container: dict[str, list[int]],
    wants: dict[str, int | None],
) -> Repetition:
    """Return a repetition with the figures of `found`, the JSON of `mace ping`; none of them if it is empty."""
    found = found or _NOT_CORRECTED
    statistics = found["statistics"]
    plain = _estimate(statistics, "median", _BOUND, _HOST)
    median = (statistics.get(_HOST) or statistics.get(_BOUND) or {"median": None})["median"]
    rows = [row for row in found["samples"] if row["reason"] == "paired" and not row["duplicate"]]
    term = found.get("host_path") or {}
    return Repetition(
        number=number,
        cell=cell,
        bare=bare,
        container={**container, "traced": [row["tool_rtt_ns"] for row in rows]},
        corrected=[row.get(_HOST, row.get(_BOUND)) for row in rows],
        median=[median[name] for name in ("estimate", "low", "high")] if median else None,
        plain=plain,
        without_waiting=_estimate(statistics, "median", *_WITHOUT),
        temporal_error=_estimate(statistics, "mean", "temporal_error_ns"),
        stretches={name: term[f"{name}_ns"] for name in STRETCHES} if term else None,
        tracer_cost=term.get("tracer_cost_ns"),
        counts={
            "sent": len(found["samples"]),
            "paired": found["paired"],
            "unpaired": found["unpaired"],
            "waits_known": (statistics.get("temporal_error_ns") or {"count": 0})["count"],
            "probes": sum(term.get("probes", ())),
        },
        ledger=found["ledger"],
        wants=wants,
    )


def _estimate(statistics: Mapping[str, Any], of: str, *names: str) -> float | None:
    """Return the median or mean of the first of these figures that is there; None without a figure or an interval."""
    for name in names:
        if name in statistics:
            interval = statistics[name][of]
            return float(interval["estimate"]) if interval else None
    return None
