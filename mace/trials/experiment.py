"""Measures how close corrected round trips are to those of a host process: the paper's evaluation, in a lab.

Each round has, in random order, 0 to N other containers that flood, and for each of these every pace. At each pace ping
on the host, ping in the container, and the probes of `mace.tools.host_path` from host and container run one after the
other. One capture covers all rounds, so that tracing costs the same for all; nothing is computed before the last packet
is sent.

    lab ──► flood ──► [host ping | container ping | host probes | container probes], shuffled ──► next pace, next flood
                                     │ one capture
                                     ▼
              pairs, corrections, host path term ──► medians by pace and flood, intervals over rounds
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from collector.capture.source import Capture
from collector.files import recording
from contracts.arrays import Floats, Ints
from contracts.errors import LabError, Unavailable, UsageError
from contracts.hooks import Hook
from contracts.interfaces import Progress
from contracts.ledger import Ledger
from contracts.results import Results
from contracts.schema import NOT_TOLD
from contracts.topology import Role
from correlator import intervals
from correlator.correction import Reason, correct
from correlator.samples import Samples
from mace.lab import HOST, REMOTE, Lab, Runtime, Spec
from mace.live.session import Session
from mace.shown.terminal import PlainTable
from mace.tools import host_path as hostpath
from mace.tools.corrected import Observed
from mace.tools.host_path import STRETCHES, ProbeCollector, ProbeRecords, Stretches
from mace.tools.output import read
from mace.tools.ping_output import PingOutput
from mace.trials.rounds import dithered, interval_text, machine, machine_text, median_us
from storage.capture import CaptureSink

PACES: Final = {"flood": 0.0, "10ms": 0.01}
"""Seconds between ping's requests; 0 sends the next when the reply has arrived, as fast as `ping -f`."""
MEASURED: Final = "c1"
_PING_LEN: Final = 84
"""Bytes of a request with 56 bytes of payload, ping's default."""
_FLOOD_PAYLOAD: Final = 24
"""Payload of a flood's packets, whose length distinguishes them from the measured packets."""
_MOST_FLOOD: Final = 2_000_000
RING_MIB: Final = 64
"""Default size of the ring per CPU: two floods and the measured ping together write 60 MB a second."""
_SETTLE_S: Final = 0.2
"""Wait between the start of a flood and the first measurement beside it."""
_CAPTURE, _BLOCKS = "run.mace", "blocks.json"
"""Files of a kept experiment."""
_KINDS: Final = ("bare", "container", "host probes", "container probes")


@dataclass(frozen=True, slots=True)
class Block:
    """One run of one tool."""

    round: int
    pace: str
    flood_containers: int
    kind: str
    begin_ns: int
    """Start of the run, CLOCK_MONOTONIC."""
    end_ns: int
    said: str
    """The tool's standard output."""


@dataclass(slots=True)
class Cell:
    """The measurements at one pace beside one number of flooding containers; lists are by round, times in ns."""

    bare: list[Floats] = field(default_factory=list)
    """Round trips of ping on the host; `bare`, `container` and `plain` are dithered (`mace.trials.rounds`)."""
    container: list[Floats] = field(default_factory=list)
    """Tool RTT of the container's paired samples."""
    plain: list[Floats] = field(default_factory=list)
    """Host RTT of the container's paired samples, without the host path term."""
    host_pings: list[Stretches] = field(default_factory=list)
    """Stretches of the host pings' own packets, from their first record on, for comparison with the probes'."""
    container_pings: list[Stretches] = field(default_factory=list)
    host_probes: list[Stretches] = field(default_factory=list)
    container_probes: list[Stretches] = field(default_factory=list)
    unpaired: dict[str, int] = field(default_factory=dict)
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """The result of an experiment."""

    cells: dict[tuple[str, int], Cell]
    """Measurements by (pace, number of flooding containers)."""
    ledger: Ledger
    machine: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each cell for JSON; docs/evaluation.md explains the keys."""
        return [_row(pace, flood, cell) for (pace, flood), cell in sorted(self.cells.items())]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON: `rows`, `machine`, `ledger`."""
        return {"rows": self.rows(), "machine": self.machine, "ledger": self.ledger.as_dict()}

    def tables(self, console: Console) -> None:
        """Print the result as tables for people."""
        rows = self.rows()
        console.print(_main_table(rows))
        console.print(_term_table(rows))
        console.print(_stretch_table(rows))
        for row in rows:
            if row["unpaired"]:
                told = ", ".join(f"{count:,} {reason}" for reason, count in row["unpaired"].items())
                console.print(f"unpaired at {row['pace']}, {row['flood_containers']} flooding: {told}")
        console.print(self.ledger.line())


@dataclass(frozen=True, slots=True)
class ExperimentPlan:
    """The plan of an experiment."""

    paces: str
    """Names in `PACES`, with commas between them."""
    flood: int
    """Largest number of flooding containers; all numbers from 0 are measured."""
    rounds: int
    count: int
    """Pings per round at 10 ms."""
    flood_count: int
    """Pings per round at the flood pace."""
    cpu: int | None
    """CPU that the measured processes are pinned to; floods are pinned to the others."""
    seed: int
    """Seed of the random order."""
    keep: Path | None
    """Directory for the capture and the tools' output."""


def check(plan: ExperimentPlan) -> list[str]:
    """Return the paces of the plan. Raises `UsageError` for an impossible plan."""
    paces = [word for word in plan.paces.split(",") if word]
    for word in paces:
        if word not in PACES:
            raise UsageError(f"--paces: no {word!r}; there are {', '.join(PACES)}")
    if not paces or plan.rounds < 1 or plan.count < 1 or plan.flood_count < 1 or not 0 <= plan.flood <= 16:
        raise UsageError("--paces, --rounds, --count and --flood-count: expected at least 1; --flood: expected 0 to 16")
    if plan.cpu is not None and plan.cpu not in os.sched_getaffinity(0):
        raise UsageError(f"--cpu: no {plan.cpu} here; there are {', '.join(map(str, sorted(os.sched_getaffinity(0))))}")
    return paces


def spec(plan: ExperimentPlan, runtime: Runtime) -> Spec:
    """Return the specification of the lab: the measured container, and those that flood."""
    return Spec(name="experiment", containers=1 + plan.flood, runtime=runtime)


def measure(plan: ExperimentPlan, lab: Lab, session: Session) -> Figures:
    """Run all blocks in the lab, then compute the figures. Raises `UsageError` if interrupted."""
    paces = check(plan)
    with tempfile.TemporaryDirectory(prefix="mace-experiment-") as temporary:
        place = plan.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        blocks: list[Block] = []
        schedule = _Schedule(plan, lab, session, Path(temporary))
        session.record(lambda: schedule.run(paces, blocks), CaptureSink(place / _CAPTURE))
        wanted = plan.rounds * len(paces) * (plan.flood + 1) * len(_KINDS)
        if len(blocks) < wanted:
            raise UsageError(f"interrupted after {len(blocks)} of {wanted} blocks, too few for figures")
        told = {
            "outer": lab.outer_device,
            "netns": lab.netns_inode(MEASURED),
            "machine": machine(),
            "blocks": [asdict(block) for block in blocks],
        }
        (place / _BLOCKS).write_text(json.dumps(told))
        return again(place, session)


def again(place: Path, session: Session) -> Figures:
    """Compute the figures of an experiment that `--keep` has kept. Raises `Unavailable`, `CaptureError`."""
    try:
        told = json.loads((place / _BLOCKS).read_text())
        blocks = [Block(**block) for block in told["blocks"]]
        where, facts = (str(told["outer"]), int(told["netns"])), dict(told["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(str(place), f"{_BLOCKS}: {error}", "name a directory that --keep has filled") from error
    return figures(blocks, place / _CAPTURE, session, where, facts)


class _Schedule:
    """Runs the blocks of a plan in their random order."""

    def __init__(self, plan: ExperimentPlan, lab: Lab, session: Session, place: Path) -> None:
        self._plan, self._lab, self._session, self._place = plan, lab, session, place
        self._order = random.Random(plan.seed)
        self._others = os.sched_getaffinity(0) - {plan.cpu} if plan.cpu is not None else set()
        """CPUs for the floods; empty for any CPU."""

    async def run(self, paces: Sequence[str], blocks: list[Block]) -> None:
        for member in (HOST, *self._lab.containers):  # resolves addresses and uses each path once
            await asyncio.to_thread(self._lab.ping, member, count=3)
        for number in range(self._plan.rounds):
            floods = self._order.sample(range(self._plan.flood + 1), self._plan.flood + 1)
            for flood in floods:
                self._session.say(f"round {number + 1} of {self._plan.rounds}, {flood} flooding")
                async with AsyncExitStack() as leaving:
                    for name in self._lab.containers[1 : flood + 1]:
                        flow = self._lab.start_ping(name, count=_MOST_FLOOD, size=_FLOOD_PAYLOAD, flood=True)
                        leaving.callback(flow.close)
                        if self._others:
                            os.sched_setaffinity(flow.pid, self._others)
                    await asyncio.sleep(_SETTLE_S)
                    for pace in self._order.sample(list(paces), len(paces)):
                        for kind in self._order.sample(_KINDS, len(_KINDS)):
                            blocks.append(await self._block(number, pace, flood, kind))

    async def _block(self, number: int, pace: str, flood: int, kind: str) -> Block:
        interval_s, remote = PACES[pace], self._lab.address(REMOTE)
        count = self._plan.count if interval_s else self._plan.flood_count
        if kind.endswith("probes"):
            argv = hostpath.probe_command(remote, count, int(interval_s * 1e9))
        else:
            argv = ["ping", "-D", "-n", "-c", str(count), "-i", f"{interval_s:g}", "-W", "1", remote]
        if self._plan.cpu is not None:
            argv = ["taskset", "-c", str(self._plan.cpu), *argv]
        member = HOST if kind in ("bare", "host probes") else MEASURED
        # Output goes to a file, because each line through a pipe would wake this process during the measurement.
        path = self._place / "said"
        with path.open("w") as said, (self._place / "complaints").open("w+") as complaints:
            begin_ns = time.monotonic_ns()
            process = await asyncio.create_subprocess_exec(
                *self._lab.command(member, argv), env={**self._lab.environment(member), "LC_ALL": "C"},
                stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=complaints, start_new_session=True,
            )  # fmt: skip
            try:
                status = await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            end_ns = time.monotonic_ns()
            complaints.seek(0)
            if status not in (0, 1):
                raise LabError(f"{' '.join(argv)} in {member}: {complaints.read().strip() or f'exit status {status}'}")
        return Block(number, pace, flood, kind, begin_ns, end_ns, path.read_text())


# From blocks to figures -----------------------------------------------------------------------------------


def figures(
    blocks: Sequence[Block], path: Path, session: Session, place: tuple[str, int], facts: dict[str, Any]
) -> Figures:
    """Pair and correct the samples of all blocks with the packets in the capture at `path`.

    `place`: name of the outer device, and inode of the measured container's network namespace.
    """
    observed = Observed()
    outer, netns = place

    def ours(results: Results) -> None:
        """Keep the measured container's crossings only: the flooding containers have many."""
        rows = results.rows
        if len(rows.crossings):
            chosen = np.array([d.netns == netns and d.role is Role.INNER for d in rows.devices], np.bool_)
            rows = replace(rows, crossings=rows.crossings[chosen[rows.crossings.device]])
        observed.add(Results(rows, results.totals))

    session.observed(recording(path), ours)
    if session.stopped:
        raise UsageError(
            "interrupted while computing; --again DIR computes the figures of an experiment kept with --keep"
        )
    offset_ns, pings, probes = _raw(path)
    crossings = observed.crossings()
    crossings = crossings[np.argsort(crossings.inner_utc_ns, kind="stable")]
    inner = next((d.name for d in observed.devices if d.netns == netns and d.role is Role.INNER), "")

    cells: dict[tuple[str, int], Cell] = {}
    for block in sorted(blocks, key=lambda b: b.round):
        cell = cells.setdefault((block.pace, block.flood_containers), Cell())
        if block.kind.endswith("probes"):
            sent = json.loads(block.said)
            first = inner if block.kind.startswith("container") else None
            found = hostpath.stretches(sent, probes.between(block.begin_ns, block.end_ns), first, outer)
            (cell.container_probes if block.kind.startswith("container") else cell.host_probes).append(found)
            continue
        samples, reader = read(block.said.splitlines(), PingOutput())
        seen = pings.between(block.begin_ns, block.end_ns)
        if block.kind == "bare":
            cell.bare.append(dithered(_answered(samples)))
            cell.host_pings.append(_from_first_record(seen, None, outer))
            continue
        a, b = np.searchsorted(crossings.inner_utc_ns, [block.begin_ns + offset_ns, block.end_ns + offset_ns])
        corrections = correct(samples, crossings[a:b], reader.stamps, observed.gaps_utc_ns)
        chosen = np.flatnonzero((corrections.reason == Reason.PAIRED) & ~samples.duplicate)
        cell.sent += len(samples)
        tool_ns = dithered(corrections.tool_rtt_ns[chosen])
        cell.container.append(tool_ns)
        cell.plain.append(tool_ns - corrections.egress_ns[chosen] - corrections.ingress_ns[chosen])
        cell.container_pings.append(_from_first_record(seen, inner, outer))
        for reason in Reason:
            count = int((corrections.reason == reason).sum())
            if count and reason is not Reason.PAIRED:
                name = reason.name.lower()
                cell.unpaired[name] = cell.unpaired.get(name, 0) + count
    return Figures(cells, observed.summary.ledger, facts)


def _raw(path: Path) -> tuple[int, ProbeRecords, ProbeRecords]:
    """Return the offset from CLOCK_MONOTONIC to UTC, ns, and the records of ping's and of the probes' length."""
    pings, probes = ProbeCollector(), ProbeCollector()
    with Capture(path) as capture:
        offset_ns = capture.header.clock.offset_ns
        for item in capture:
            if isinstance(item, Progress):
                continue
            pings.add(item, _PING_LEN)
            probes.add(item, hostpath.PROBE_LEN)
    return offset_ns, pings.whole(), probes.whole()


def _answered(samples: Samples) -> Ints:
    found: Ints = samples.rtt_ns[(samples.rtt_ns != NOT_TOLD) & ~samples.duplicate]
    return found


def _from_first_record(seen: ProbeRecords, inner: str | None, outer: str) -> Stretches:
    """Return the stretches of pings from their first record on; `send` is 0, as no record has the time of sending."""
    first = seen.ts_ns[(seen.device == (inner or outer)) & (seen.hook == Hook.NET_DEV_QUEUE)]
    return hostpath.stretches(first.tolist(), seen, inner, outer)


def _row(pace: str, flood: int, cell: Cell) -> dict[str, Any]:
    rounds = len(cell.bare)
    known: dict[bytes, dict[str, float]] = {}

    def medians(drawn: Ints) -> dict[str, float]:
        """Return the medians over the drawn rounds, µs. They are cached: several intervals draw the same rounds."""
        found = known.get(drawn.tobytes())
        if found is None:

            def of(parts: Sequence[Any]) -> list[Any]:
                return [parts[n] for n in drawn]

            found = {"bare": median_us(of(cell.bare)), "plain": median_us(of(cell.plain))}
            host, container = of(cell.host_probes), of(cell.container_probes)
            for name in STRETCHES:
                found[name] = hostpath.term_ns(host, container, [name]) / 1000
            known[drawn.tobytes()] = found
        return found

    def term_us(drawn: Ints) -> float:
        return sum(medians(drawn)[name] for name in STRETCHES)

    def plain_difference_us(drawn: Ints) -> float:
        return medians(drawn)["plain"] - medians(drawn)["bare"]

    def difference_us(drawn: Ints) -> float:
        return plain_difference_us(drawn) + term_us(drawn)

    def without_answer_us(drawn: Ints) -> float:
        return difference_us(drawn) - medians(drawn)["answer"]

    every = np.arange(rounds)
    plain_us, terms = median_us(cell.plain), {name: medians(every)[name] for name in STRETCHES}
    row: dict[str, Any] = {
        "pace": pace,
        "flood_containers": flood,
        "bare_p50_us": median_us(cell.bare),
        "container_p50_us": median_us(cell.container),
        "corrected_p50_us": plain_us + sum(terms.values()),
        "diff_p50_us": difference_us(every),
        "ci95_us": intervals.bounds(intervals.of_rounds(difference_us, rounds)),
        "plain_p50_us": plain_us,
        "plain_diff_p50_us": plain_difference_us(every),
        "plain_ci95_us": intervals.bounds(intervals.of_rounds(plain_difference_us, rounds)),
        "host_path_us": terms,
        "host_path_ci95_us": intervals.bounds(intervals.of_rounds(term_us, rounds)),
        "without_answer_diff_us": without_answer_us(every),
        "without_answer_ci95_us": intervals.bounds(intervals.of_rounds(without_answer_us, rounds)),
        "host_ping_us": _of_a_ping(median_us(cell.bare), cell.host_pings),
        "container_ping_us": _of_a_ping(plain_us, cell.container_pings),
        "host_probe_us": _medians_us(cell.host_probes),
        "container_probe_us": _medians_us(cell.container_probes),
        "bare_rounds_us": [median_us([values]) for values in cell.bare],
        "plain_rounds_us": [median_us([values]) for values in cell.plain],
    }
    rounded: dict[str, Any] = json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 2))
    counts = {
        "rounds": rounds,
        "bare": sum(map(len, cell.bare)),
        "sent": cell.sent,
        "paired": sum(map(len, cell.plain)),
        "unpaired": cell.unpaired,
        "probes": sum(map(len, cell.host_probes)) + sum(map(len, cell.container_probes)),
    }
    return rounded | counts


def _medians_us(parts: Sequence[Stretches]) -> dict[str, float]:
    return {name: median_us([getattr(part, name) for part in parts]) for name in STRETCHES}


def _of_a_ping(rtt_us: float, parts: Sequence[Stretches]) -> dict[str, float]:
    """Return the stretches of a median round trip; `send` is the rest, which no other stretch covers.

    `send` therefore includes the way back from the outer device's first hook; for a container the correction has
    subtracted that way.
    """
    seen = _medians_us(parts)
    return seen | {"send": rtt_us - sum(us for name, us in seen.items() if name != "send")}


def draw(found: Figures, path: Path) -> None:
    """Draw distributions and differences to a PNG file. Raises `MissingExtra` without matplotlib."""
    # matplotlib is an extra, and its import takes longer than most commands run.
    from mace.shown.plots import write_png  # noqa: PLC0415
    from mace.shown.round_plots import Bar, Curve, Panel, drawn  # noqa: PLC0415

    panels, bars = [], []
    for row in found.rows():
        cell = found.cells[row["pace"], row["flood_containers"]]
        term_ns = sum(row["host_path_us"].values()) * 1000
        curves = {
            "ping on the host": np.concatenate(cell.bare),
            "ping in the container": np.concatenate(cell.container),
            "that, corrected": np.concatenate(cell.plain) + term_ns,
        }
        where = f"{row['pace']}, {row['flood_containers']} flooding"
        panels.append(Panel(where, [Curve(name, values / 1000) for name, values in curves.items()]))
        for group, value, interval in (
            ("corrected, without the host path term", "plain_diff_p50_us", "plain_ci95_us"),
            ("with the term, but for the far end's answer", "without_answer_diff_us", "without_answer_ci95_us"),
            ("corrected", "diff_p50_us", "ci95_us"),
        ):
            low, high = row[interval] or (row[value], row[value])
            bars.append(Bar(where, row[value], low, high, group))
    picture = drawn(
        panels,
        bars,
        title="Round trips of a host process, of a container, and of a container corrected",
        what="round trip, µs",
        bars_title="Difference of medians to ping on the host, with 95 % intervals",
        note=f"{machine_text(found.machine)}\n{found.ledger.line()}",
    )
    write_png(picture, path)


# For people -----------------------------------------------------------------------------------------------


def _main_table(rows: Sequence[dict[str, Any]]) -> PlainTable:
    table = PlainTable("Round trips, medians, µs: ping on the host, ping in the container, and that corrected")
    for name in ("pace", "flooding"):
        table.add_column(name)
    for name in ("host", "container", "corrected", "difference", "95 %", "paired"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["pace"],
            str(row["flood_containers"]),
            *(f"{row[name]:.1f}" for name in ("bare_p50_us", "container_p50_us", "corrected_p50_us")),
            f"{row['diff_p50_us']:+.1f}",
            interval_text(row["ci95_us"]),
            f"{row['paired']:,} of {row['sent']:,}",
        )
    return table


def _term_table(rows: Sequence[dict[str, Any]]) -> PlainTable:
    table = PlainTable("Steps to it, µs: difference without the host path term, and the term")
    for name in ("pace", "flooding"):
        table.add_column(name)
    for name in ("without", "95 %", *(f"+ {name}" for name in STRETCHES), "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["pace"],
            str(row["flood_containers"]),
            f"{row['plain_diff_p50_us']:+.1f}",
            interval_text(row["plain_ci95_us"]),
            *(f"{row['host_path_us'][name]:+.1f}" for name in STRETCHES),
            interval_text(row["host_path_ci95_us"]),
        )
    return table


def _stretch_table(rows: Sequence[dict[str, Any]]) -> PlainTable:
    title = "Where the time goes, medians, µs: of pings, overhead taken off, and of the probes that stand for them"
    table = PlainTable(title)
    for name in ("pace", "flooding", "stretch"):
        table.add_column(name)
    for name in ("host ping", "container ping", "difference", "host probe", "container probe", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for name in STRETCHES:
            pairs = [(row[f"host_{what}_us"][name], row[f"container_{what}_us"][name]) for what in ("ping", "probe")]
            cells = [text for host, container in pairs
                     for text in (f"{host:.1f}", f"{container:.1f}", f"{host - container:+.1f}")]  # fmt: skip
            table.add_row(row["pace"], str(row["flood_containers"]), name, *cells)
    return table
