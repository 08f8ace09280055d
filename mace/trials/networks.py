"""Compares networks of a lab on the same traffic: round trips, small packets a second, and delays device by device.

A *network* is a layout, Docker's, one that CNI plugins make, or that of a running lab. Each round has all networks in a
random order, and makes each anew, unless it is a running lab's:

    round 1:  flannel | bridge    each: lab up ─► round trips ─► small packets ─► round trips, read ─► lab down
    round 2:  bridge | flannel
    ...

Round trips and small packets are measured while nothing reads the kernel's events; delays come from the round trips
that are read. Devices of different networks are compared by their part in the path, because their names differ.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from contracts.arrays import Ints
from contracts.errors import UsageError, nearest
from contracts.figures import DevicePlace, Distribution, Summary
from contracts.schema import Direction, Segment
from contracts.topology import PAIRS, Role
from correlator import intervals
from mace import lab as labs
from mace.lab import Lab, Layout, Runtime, Spec
from mace.live.session import Session
from mace.shown import tables
from mace.shown.terminal import PlainTable
from mace.trials.compare import (
    ComparePlan,
    cells_of,
    figures_of,
    median_of,
    merged,
    overhead_ns,
    plain,
    rounded,
    trips,
)
from mace.trials.rounds import interval_text, machine, machine_text, median_us

LAB: Final = "compare"
_RUNTIMES: Final = (Runtime.DOCKER.value, Runtime.PODMAN.value, Runtime.CONTAINERD.value)
"""Runtimes that make a network of their own."""
_SMALL_COUNT: Final = 10_000
_SMALL_BYTES: Final = 18
"""With its headers the smallest Ethernet frame (64 bytes with the checksum)."""
_DIRECTIONS: Final = (Direction.EGRESS, Direction.INGRESS)


@dataclass(frozen=True, slots=True)
class Network:
    """A network to compare."""

    name: str
    """As the user gave it; of a file, its name without folder and suffix if that is nobody else's name."""
    place: Callable[[], AbstractContextManager[Lab]]
    """Returns the lab that has it, for a `with` block."""


@dataclass(frozen=True, slots=True)
class NetworkRound:
    """The measurement of one network in one round."""

    trips_ns: Ints
    """Round trips of the requests with a reply, while nothing was read."""
    container: str
    """Name of the container in `summary`."""
    unanswered: int
    small_pps: float
    """Small datagrams that the far end received, a second."""
    summary: Summary
    """Figures of the round trips that were read."""


@dataclass(frozen=True, slots=True)
class NetworkComparison:
    """The result: the measurements of each network, by round. The first network is the one that others differ from."""

    parts: dict[str, list[NetworkRound]]
    container: str
    source: str
    machine: dict[str, Any]
    whole: dict[str, Summary] = field(default_factory=dict)
    """The sums over all rounds, by network."""

    def __post_init__(self) -> None:
        self.whole.update({name: merged(part.summary for part in parts) for name, parts in self.parts.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON.

        The keys are `networks` (objects of `_network`), `devices` (`_devices`), `source`, `rounds`, `machine`.
        """
        return {
            "networks": {name: self._network(name) for name in self.parts},
            "devices": self._devices(),
            "source": self.source,
            "rounds": self._rounds(),
            "machine": self.machine,
        }

    def _rounds(self) -> int:
        return min(map(len, self.parts.values()))

    def _network(self, name: str) -> dict[str, Any]:
        """Return the figures of one network.

        The keys are rtt_p50_us with rtt_ci95_us; difference_us (of medians, to the first network) and its interval;
        small_pps (median of the rounds) and its interval; overhead by direction (p50_us, ci95_us; None without
        packets); trips, unanswered, packets, lost, ledger, grades, unseen (sentences).
        """
        parts, first = self.parts[name], next(iter(self.parts.values()))

        def trip_us(drawn: Ints) -> float:
            return median_us(parts[n].trips_ns for n in drawn)

        def difference_us(drawn: Ints) -> float:
            return trip_us(drawn) - median_us(first[n].trips_ns for n in drawn)

        def small_pps(drawn: Ints) -> float:
            return float(np.median([parts[n].small_pps for n in drawn]))

        every, rounds, summary = np.arange(self._rounds()), self._rounds(), self.whole[name]
        pps = intervals.bounds(intervals.of_rounds(small_pps, rounds))
        found: dict[str, Any] = {
            "rtt_p50_us": round(trip_us(every), 2),
            "rtt_ci95_us": rounded(intervals.of_rounds(trip_us, rounds)),
            "difference_us": round(difference_us(every), 2),
            "difference_ci95_us": rounded(intervals.of_rounds(difference_us, rounds)),
            "small_pps": round(small_pps(every)),
            "small_pps_ci95": None if pps is None else [round(end) for end in pps],
        }
        for direction in _DIRECTIONS:
            values = [overhead_ns(part.summary, direction, part.container) for part in parts]
            found[f"overhead_{direction.name.lower()}"] = median_of(values, every) if any(map(len, values)) else None
        return found | {
            "trips": sum(len(part.trips_ns) for part in parts),
            "unanswered": sum(part.unanswered for part in parts),
            "packets": summary.packets,
            "lost": summary.ledger.lost,
            "ledger": summary.ledger.as_dict(),
            "grades": summary.grades.as_dict(),
            "unseen": self._unseen(name),
        }

    def _unseen(self, name: str) -> list[str]:
        """Return what one round says of unseen ingress; all rounds of a network say the same of other devices."""
        return next((told for part in self.parts[name] if (told := part.summary.unseen())), [])

    def _devices(self) -> list[dict[str, Any]]:
        """Return one object per part of the path, in path order.

        The keys are part, direction, segment, and by network devices (names), count, p50_us, p99_us.
        """
        found: dict[tuple[int, bool, int, str, str], dict[str, tuple[set[str], Distribution]]] = {}
        for name, summary in self.whole.items():
            for (place, direction, segment), distribution in summary.rows(
                Segment.DEVICE, Segment.OUTSIDE, Segment.DELIVERY
            ):
                if place.container != self.parts[name][0].container or direction not in _DIRECTIONS:
                    continue
                rank = place.rank if direction is Direction.EGRESS else -place.rank
                row = (int(direction), segment is Segment.DELIVERY, rank, _part(place), segment.name.lower())
                names, whole = found.setdefault(row, {}).setdefault(name, (set(), Distribution()))
                names.add(place.device)
                whole += distribution
        told = []
        for row in sorted(found):
            way, _, _, part, segment_name = row
            entry: dict[str, Any] = {
                "part": part, "direction": Direction(way).name.lower(), "segment": segment_name
            }  # fmt: skip
            for name, (devices, distribution) in found[row].items():
                entry[name] = {"devices": sorted(devices), **figures_of(distribution)}
            told.append(entry)
        return told

    def tables(self, console: Console) -> None:
        """Print the result as tables for people."""
        console.print(self._network_table())
        console.print(self._device_table())
        for name, summary in self.whole.items():
            console.print(f"{name}: {tables.ledger_line(summary)}")
            for told in self._unseen(name):
                console.print(f"{name}: {told}")
        console.print(f"source {self.source}; {machine_text(self.machine)}")

    def _network_table(self) -> PlainTable:
        first = next(iter(self.parts))
        table = PlainTable(f"Round trips and delays by network, {self._rounds()} rounds, µs")
        for name in (
            "network", "RTT", "95 %", f"to {first}", "95 %", "small packets/s", "egress", "95 %", "ingress", "95 %",
        ):  # fmt: skip
            table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
        for name in self.parts:
            row = self._network(name)
            cells = [f"{row['rtt_p50_us']:.1f}", plain(row["rtt_ci95_us"])]
            if name == first:
                cells += ["", ""]
            else:
                cells += [f"{row['difference_us']:+.1f}", interval_text(row["difference_ci95_us"])]
            cells.append(f"{row['small_pps']:,}")
            for direction in _DIRECTIONS:
                overhead = row[f"overhead_{direction.name.lower()}"]
                cells += [f"{overhead['p50_us']:.1f}", plain(overhead["ci95_us"])] if overhead else ["-", "-"]
            table.add_row(name, *cells)
        return table

    def _device_table(self) -> PlainTable:
        table = PlainTable("Device by device, µs")
        table.add_column("device", no_wrap=True)
        table.add_column("counts as", no_wrap=True)
        for name in self.parts:
            for what in ("packets", "p50", "p99"):
                table.add_column(f"{name} {what}", justify="right")
        for direction, rows in groupby(self._devices(), key=lambda row: row["direction"]):
            table.add_row(direction, style="bold")
            for row in rows:
                cells: list[str] = []
                for name in self.parts:
                    cells += cells_of(row.get(name))
                segment = "overhead" if row["segment"] == "device" else row["segment"]
                table.add_row(row["part"], segment, *cells)
        return table


def chosen(words: Sequence[str], text: Callable[[Path], str]) -> list[Network]:
    """Return the networks to compare, two or more.

    Each word names one: a layout, `docker`, the file of a CNI configuration, or a running lab. `text` reads a file.
    Raises `UsageError` for an impossible network, `LabError` for a broken lab, `Unavailable` if a network cannot be
    made here.
    """
    if len(words) < 2:
        raise UsageError("--networks: name at least two")
    twice = [word for word in words if words.count(word) > 1]
    if twice:
        raise UsageError(f"--networks: {twice[0]} is there twice")
    shown = [Path(word).stem if _is_file(word) else word for word in words]
    names = [word if shown.count(name) > 1 else name for word, name in zip(words, shown, strict=True)]
    return [Network(name, _place(word, text)) for word, name in zip(words, names, strict=True)]


def _is_file(word: str) -> bool:
    return "/" in word or word.endswith(".conflist")


def _place(word: str, text: Callable[[Path], str]) -> Callable[[], AbstractContextManager[Lab]]:
    known = [info.name for info in labs.list_labs()]
    if word in {each.value for each in Layout}:
        spec = Spec(LAB, layout=Layout(word))
    elif word in _RUNTIMES:
        spec = Spec(LAB, runtime=Runtime(word))
    elif _is_file(word):
        spec = Spec(LAB, cni=text(Path(word)))
    elif word in known:
        place = labs.attach(word)
        return lambda: nullcontext(place)
    else:
        kinds = [*(each.value for each in Layout), *_RUNTIMES]
        raise UsageError(
            f"--networks: no {word!r}{nearest(word, [*kinds, *known])}; there are {', '.join(kinds)}, files that end in"
            " .conflist, and labs that are up"
        )
    if found := labs.check(spec):
        raise found[0]
    return lambda: labs.running(spec)


def measure(
    plan: ComparePlan, networks: Sequence[Network], source: str, sessions: Callable[[Lab], Session]
) -> NetworkComparison:
    """Measure all rounds. `sessions` returns the session of `source` in a lab."""
    order = random.Random(plan.seed)
    parts: dict[str, list[NetworkRound]] = {each.name: [] for each in networks}
    for number in range(plan.rounds):
        for each in order.sample(list(networks), len(networks)):
            with each.place() as lab:
                session = sessions(lab)
                session.say(f"round {number + 1} of {plan.rounds}: {each.name}")
                parts[each.name].append(_round(plan, lab, session))
    return NetworkComparison(parts, plan.container, source, machine())


def _round(plan: ComparePlan, lab: Lab, session: Session) -> NetworkRound:
    lab.ping(plan.container, count=3)
    trips(plan, lab, min(plan.count, 200))
    bare = trips(plan, lab, plan.count)
    small = lab.udp(plan.container, count=_SMALL_COUNT, size=_SMALL_BYTES)
    done: list[Ints] = []

    async def traffic() -> None:
        done.append(await asyncio.to_thread(trips, plan, lab, plan.count))

    summary = session.measure(traffic, store=None, tee=None)
    if not done:
        raise UsageError("interrupted")
    answered = bare >= 0
    shown = lab.shown_name(plan.container)
    return NetworkRound(bare[answered], shown, int((~answered).sum()), small.received / small.duration_s, summary)


def _part(place: DevicePlace) -> str:
    """Return a device's part in the path, which devices of different networks share."""
    if place.role == Role.INNER:
        return f"container's {place.kind}"
    if place.role == Role.OUTER:
        return "outer device"
    if place.role == Role.REMOTE:
        return f"far end's {place.kind}"
    return "pair's host end" if place.kind in PAIRS else place.kind or "other device"
