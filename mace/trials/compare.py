"""Compares the figures and costs of sources on the same traffic, and with no source.

Each round runs all sources in a random order. A container sends echo requests, each when the reply to the one before
has arrived, while one source is read and correlated as by `mace run`, or while nothing observes. The client measures
the round trips, in ns; the increase with a source is the source's *perturbation*. The baseline is `none`, which is
always one of the sources.

    round 1:  ftrace | none | kmod      each: source on ─► N round trips ─► source off
    round 2:  kmod | ftrace | none
    ...
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from collector import SOURCES
from contracts.arrays import Ints
from contracts.errors import LabError, Unavailable, UsageError, nearest
from contracts.figures import Distribution, FigureKey, Summary, labels_of, path_order
from contracts.histogram import middles
from contracts.schema import Direction, Segment
from correlator import intervals
from mace.lab import REMOTE, Lab, Runtime, Spec, probing
from mace.live.session import Session
from mace.shown import tables
from mace.shown.terminal import PlainTable
from mace.trials.rounds import interval_text, machine, machine_text, median_us

NONE: Final = "none"
KNOWN: Final = (*SOURCES, NONE)
_PAYLOAD_BYTES: Final = 56
_DIRECTIONS: Final = (Direction.EGRESS, Direction.INGRESS)


@dataclass(frozen=True, slots=True)
class SourceRound:
    """The measurement of one source in one round."""

    trips_ns: Ints
    """Round trips of the requests with a reply."""
    unanswered: int
    summary: Summary
    """Figures of the source; empty for `none`."""
    cpu_s: float
    """CPU time of this process for reading, correlating, and starting and stopping the source."""
    wall_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison: the measurements of each source, by round."""

    parts: dict[str, list[SourceRound]]
    machine: dict[str, Any]
    whole: dict[str, Summary] = field(default_factory=dict)
    """The sums over all rounds, by source."""

    def __post_init__(self) -> None:
        self.whole.update({name: merged(part.summary for part in parts) for name, parts in self.parts.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON: `sources` (objects of `_source`), `devices` (`_devices`), `rounds`, `machine`."""
        return {
            "sources": {name: self._source(name) for name in self.parts},
            "devices": self._devices(),
            "rounds": self._rounds(),
            "machine": self.machine,
        }

    def _rounds(self) -> int:
        return min(map(len, self.parts.values()))

    def _source(self, name: str) -> dict[str, Any]:
        """Return the figures of one source.

        The keys are rtt_p50_us with rtt_ci95_us; perturbation_us (of medians, relative to `none`) and its interval;
        overhead by direction (p50_us, ci95_us); cpu_us_per_trip, cpu_share of one core, packets, unanswered, own cost
        and ledger.
        """
        parts, bare = self.parts[name], self.parts[NONE]

        def trip_us(drawn: Ints) -> float:
            return median_us(parts[n].trips_ns for n in drawn)

        def perturbation_us(drawn: Ints) -> float:
            return trip_us(drawn) - median_us(bare[n].trips_ns for n in drawn)

        every, rounds = np.arange(self._rounds()), self._rounds()
        trips = sum(len(part.trips_ns) for part in parts)
        found: dict[str, Any] = {
            "rtt_p50_us": round(trip_us(every), 2),
            "rtt_ci95_us": rounded(intervals.of_rounds(trip_us, rounds)),
            "perturbation_us": round(perturbation_us(every), 2),
            "perturbation_ci95_us": rounded(intervals.of_rounds(perturbation_us, rounds)),
            "trips": trips,
            "unanswered": sum(part.unanswered for part in parts),
        }
        if name == NONE:
            return found
        summary = self.whole[name]
        for direction in _DIRECTIONS:
            values = [overhead_ns(part.summary, direction) for part in parts]
            found[f"overhead_{direction.name.lower()}"] = median_of(values, every)
        cpu_s, wall_s = sum(p.cpu_s for p in parts), sum(p.wall_s for p in parts)
        found |= {
            "cpu_us_per_trip": round(cpu_s / max(trips, 1) * 1e6, 2),
            "cpu_share": round(cpu_s / wall_s, 3),
            "packets": summary.packets,
            "lost": summary.ledger.lost,
            "ledger": summary.ledger.as_dict(),
            "grades": summary.grades.as_dict(),
        }
        if summary.cost:
            found["own_cost"] = [cost.as_dict() for cost in summary.cost]
        return found

    def _devices(self) -> list[dict[str, Any]]:
        """Return one object per device, in path order.

        The keys are device, of, direction, segment, and by source count, p50_us, p99_us.
        """
        found = []
        for (device, owner, direction, segment), of in self._by_device().items():
            row: dict[str, Any] = {"device": device, "of": owner, "direction": direction, "segment": segment}
            for name, distribution in of.items():
                row[name] = figures_of(distribution)
            found.append(row)
        return found

    def _by_device(self) -> dict[tuple[str, str, str, str], dict[str, Distribution]]:
        """Return the distributions by device and source.

        Devices are matched by their labels for people, because sources identify devices differently.
        """
        rows: list[tuple[FigureKey, str, Distribution]] = [
            (key, name, distribution)
            for name, summary in self.whole.items()
            for key, distribution in summary.rows(Segment.DEVICE, Segment.OUTSIDE, Segment.DELIVERY)
        ]
        rows.sort(key=lambda row: path_order(row[0]))
        labels = labels_of([key[0] for key, _, _ in rows])
        found: dict[tuple[str, str, str, str], dict[str, Distribution]] = {}
        for (place, direction, segment), name, distribution in rows:
            told = (labels[place], place.container or place.netns, direction.name.lower(), segment.name.lower())
            found.setdefault(told, {})[name] = distribution
        return found

    def tables(self, console: Console) -> None:
        """Print the result as tables for people."""
        console.print(self._source_table())
        console.print(self._device_table())
        for name, summary in self.whole.items():
            if name != NONE:
                console.print(f"{name}: {tables.ledger_line(summary)}")
        console.print(machine_text(self.machine))

    def _source_table(self) -> PlainTable:
        table = PlainTable(f"Round trips of a container and what observing adds, {self._rounds()} rounds, µs")
        for name in ("source", "RTT", "95 %", "added", "95 %", "egress", "95 %", "ingress", "95 %", "CPU/trip", "lost"):
            table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
        for name in self.parts:
            row = self._source(name)
            cells = [f"{row['rtt_p50_us']:.1f}", plain(row["rtt_ci95_us"])]
            if name == NONE:
                table.add_row(name, *cells)
                continue
            cells += [f"{row['perturbation_us']:+.1f}", interval_text(row["perturbation_ci95_us"])]
            for direction in _DIRECTIONS:
                overhead = row[f"overhead_{direction.name.lower()}"]
                cells += [f"{overhead['p50_us']:.1f}", plain(overhead["ci95_us"])]
            table.add_row(name, *cells, f"{row['cpu_us_per_trip']:.1f}", f"{row['lost']:,}")
        return table

    def _device_table(self) -> PlainTable:
        table = PlainTable("Device by device, µs")
        for name in ("device", "of", "counts as"):
            table.add_column(name)
        names = [name for name in self.parts if name != NONE]
        for name in names:
            for what in ("packets", "p50", "p99"):
                table.add_column(f"{name} {what}", justify="right")
        for direction, rows in groupby(self._devices(), key=lambda row: row["direction"]):
            table.add_row(direction, style="bold")
            for row in rows:
                cells: list[str] = []
                for name in names:
                    cells += cells_of(row.get(name))
                table.add_row(row["device"], row["of"], row["segment"], *cells)
        return table


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """The sources to compare, and the traffic."""

    sources: str | None
    """Names with commas between them; None is all sources that can run here."""
    container: str
    """The container that sends the packets."""
    rounds: int
    count: int
    """Round trips per source and round."""
    interval_s: float
    """Time between requests; 0 sends the next when the reply has arrived."""
    seed: int
    """Seed of the random order."""


def check(plan: ComparePlan) -> None:
    """Raise `UsageError` for an impossible number of rounds or round trips, or an impossible interval."""
    if plan.rounds < 1 or plan.count < 1 or plan.interval_s < 0:
        raise UsageError("--rounds and --count: expected at least 1; --interval: expected at least 0")


def chosen(plan: ComparePlan) -> list[str]:
    """Return the sources to compare, `none` last. Raises `UsageError`, and `Unavailable` if one cannot run here."""
    check(plan)
    if plan.sources is None:
        return [*(name for name, source in SOURCES.items() if source.check().ok), NONE]
    names = list(dict.fromkeys(word for word in plan.sources.split(",") if word))
    for name in names:
        if name not in KNOWN:
            raise UsageError(f"--sources: no {name!r}{nearest(name, KNOWN)}; there are {', '.join(KNOWN)}")
        if name != NONE and not (status := SOURCES[name].check()).ok:
            raise Unavailable(name, status.detail, status.remedy)
    found = [name for name in names if name != NONE]
    if not found:
        raise UsageError("--sources: name at least one source besides none")
    return [*found, NONE]


def spec(runtime: Runtime) -> Spec:
    """Return the specification of the lab for a comparison."""
    return Spec(name="compare", runtime=runtime)


def measure(plan: ComparePlan, lab: Lab, sessions: Callable[[str], Session]) -> Comparison:
    """Measure all rounds. `sessions` returns the session for a source's name."""
    if lab.shares_host(plan.container):
        raise UsageError(f"{plan.container} shares the host's network, which adds nothing that sources could show")
    names = chosen(plan)
    ready = {name: sessions(name) for name in names if name != NONE}
    order = random.Random(plan.seed)
    lab.ping(plan.container, count=3)
    trips(plan, lab, min(plan.count, 200))
    parts: dict[str, list[SourceRound]] = {name: [] for name in names}
    for number in range(plan.rounds):
        for name in order.sample(names, len(names)):
            next(iter(ready.values())).say(f"round {number + 1} of {plan.rounds}: {name}")
            parts[name].append(_part(plan, lab, ready.get(name)))
    return Comparison(parts, machine())


def _part(plan: ComparePlan, lab: Lab, session: Session | None) -> SourceRound:
    found: list[Ints] = []

    async def traffic() -> None:
        found.append(await asyncio.to_thread(trips, plan, lab, plan.count))

    cpu_s, wall_s = time.process_time(), time.monotonic()
    if session is None:
        found.append(trips(plan, lab, plan.count))
        summary = Summary()
    else:
        summary = session.measure(traffic, store=None, tee=None)
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
    if not found:
        raise UsageError("interrupted")
    answered = found[0] >= 0
    return SourceRound(found[0][answered], int((~answered).sum()), summary, cpu_s, wall_s)


def trips(plan: ComparePlan, lab: Lab, count: int) -> Ints:
    """Send `count` echo requests from the container; returns their round trips, ns, -1 without a reply; int64."""
    argv = probing.command(lab.address(REMOTE), count, int(plan.interval_s * 1e9), _PAYLOAD_BYTES)
    process = lab.popen(plan.container, argv)
    said, complaints = process.communicate()
    if process.returncode:
        raise LabError(f"round trips from {plan.container}: {complaints.strip() or process.returncode}")
    return np.array(json.loads(said), np.int64)


def draw(found: Comparison, path: Path) -> None:
    """Draw round trips, overheads and perturbations to a PNG file. Raises `MissingExtra` without matplotlib."""
    # matplotlib is an extra, and its import takes longer than most commands run.
    from mace.shown.plots import write_png  # noqa: PLC0415
    from mace.shown.round_plots import Bar, Curve, Panel, drawn  # noqa: PLC0415

    every = {name: np.concatenate([part.trips_ns for part in parts]) / 1000 for name, parts in found.parts.items()}
    panels = [Panel("Round trips", [Curve(name, values) for name, values in every.items()])]
    told = {name: found.as_dict()["sources"][name] for name in found.parts if name != NONE}
    for direction in _DIRECTIONS:
        curves = [
            Curve(name, np.concatenate([overhead_ns(part.summary, direction) for part in found.parts[name]]) / 1000)
            for name in told
        ]
        panels.append(Panel(f"Overhead, {direction.name.lower()}", curves))
    bars = []
    for name, row in told.items():
        low, high = row["perturbation_ci95_us"] or [row["perturbation_us"]] * 2
        bars.append(Bar(name, row["perturbation_us"], low, high, name))
    picture = drawn(
        panels,
        bars,
        title="The same traffic, observed by each source and by none",
        what="µs",
        bars_title="Increase of the median round trip with each source, with 95 % intervals",
        note="\n".join([machine_text(found.machine), *(f"{name}: {found.whole[name].ledger.line()}" for name in told)]),
    )
    write_png(picture, path)


def overhead_ns(summary: Summary, direction: Direction, container: str | None = None) -> Ints:
    """Return the overhead of each packet, or of one container's, ns, to the resolution of the histogram; int64."""
    parts = [
        _values(distribution)
        for (place, way, _), distribution in summary.overhead()
        if way is direction and container in (None, place.container)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _values(distribution: Distribution) -> Ints:
    bins, counts = distribution.histogram()
    found: Ints = np.repeat(middles(bins), counts)
    return found


def merged(summaries: Iterable[Summary]) -> Summary:
    """Return the sum of the summaries of all rounds."""
    whole = Summary()
    for summary in summaries:
        whole.merge(summary)
    return whole


def median_of(values: Sequence[Ints], every: Ints) -> dict[str, Any]:
    """Return p50_us and ci95_us of values, in ns, by round; `every` are the numbers of all rounds."""

    def middle_us(drawn: Ints) -> float:
        return median_us(values[n] for n in drawn)

    return {"p50_us": round(middle_us(every), 2), "ci95_us": rounded(intervals.of_rounds(middle_us, len(every)))}


def figures_of(delays: Distribution) -> dict[str, Any]:
    """Return count, p50_us and p99_us of delays."""
    p50, p99 = delays.quantiles((0.5, 0.99))
    return {"count": delays.count, "p50_us": p50 / 1000, "p99_us": p99 / 1000}


def cells_of(found: Mapping[str, Any] | None) -> list[str]:
    """Format the result of `figures_of` for a table; `-` for None."""
    return ["-"] * 3 if found is None else [
        f"{found['count']:,}", f"{found['p50_us']:.1f}", f"{found['p99_us']:.1f}"
    ]  # fmt: skip


def rounded(found: intervals.Interval | None) -> list[float] | None:
    """Return the ends of an interval, to hundredths; None for None."""
    ends = intervals.bounds(found)
    return None if ends is None else [round(end, 2) for end in ends]


def plain(ends: list[float] | None) -> str:
    """Format an interval for people, without signs; `-` for None."""
    return "-" if ends is None else f"{ends[0]:.1f} … {ends[1]:.1f}"
