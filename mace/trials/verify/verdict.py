"""Plays a scenario in a lab and counts how often the matching was right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from contracts.config import Config
from contracts.records import Batch
from correlator import configured
from correlator.engine import EngineConfig
from mace import lab as labs
from mace.lab import HOST, Lab
from mace.shown.terminal import PlainTable
from mace.trials.verify import scenarios, stream, truth
from mace.trials.verify.bound import allowed, kept
from mace.trials.verify.scenarios import Scenario, Stage

PACKETS: Final = 2000
_WIDTH: Final = 130


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one scenario; `--json` prints its fields."""

    scenario: str
    packets: int
    """Number of numbered packets that the observers saw at the inner and the outer device."""
    precision: float
    recall: float
    delay_error_p50_ns: int
    delay_error_p99_ns: int
    round_trips: int
    """Number of requests whose row and whose echo's row are right."""
    round_trip_error_p50_ns: int
    """Median error of the overhead of a request and its echo together."""
    recall_bound: float
    """Largest recall that the existing records allow (`mace.trials.verify.bound`)."""
    wrong: int
    """Number of rows whose two ends belong to different packets."""
    records: int
    lost: int
    grades: dict[str, int]
    ledger: dict[str, int]
    source: str
    why_bound: str | None
    """Why the recall cannot be 1, and, where another source allows more, which; None if it can."""


def limits(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """Yield a line for people about each verdict whose records allow no recall of 1."""
    for v in verdicts:
        if v.why_bound:
            yield f"{v.scenario}: the recall can be at most {v.recall_bound:.3f}: {v.why_bound}"


def table(verdicts: list[Verdict]) -> PlainTable:
    """Return a table of the results for people."""
    made = PlainTable()
    made.add_column("scenario")
    for heading in (
        "packets",
        "precision",
        "recall",
        "of at most",
        "error p50",
        "p99",
        "both ways p50, µs",
        "records",
        "lost",
        "grades",
    ):
        made.add_column(heading, justify="left" if heading == "grades" else "right")
    for v in verdicts:
        made.add_row(
            v.scenario,
            f"{v.packets:,}",
            f"{v.precision:.3f}",
            f"{v.recall:.3f}",
            f"{v.recall_bound:.3f}",
            f"{v.delay_error_p50_ns / 1000:.1f}",
            f"{v.delay_error_p99_ns / 1000:.1f}",
            f"{v.round_trip_error_p50_ns / 1000:.1f}" if v.round_trips else "–",
            f"{v.records:,}",
            f"{v.lost:,}",
            ", ".join(f"{name} {count:,}" for name, count in v.grades.items() if count and name != "told_apart"),
        )
    return made


def verdict(scenario: Scenario, config: Config, packets: int) -> Verdict:
    """Play one scenario in a lab of its own and return its result."""
    with labs.running(scenario.spec) as lab, ExitStack() as leaving:
        scenario.prepare(lab)
        for name in lab.containers:
            for family in lab.families(name):
                lab.ping(name, count=2, family=family)
        stage = Stage(lab, packets, leaving)
        capture = replace(labs.capture_of(config.capture, lab), sample_shift=scenario.sample_shift)
        whole = stream.taken(replace(config, capture=capture), lambda: _played(scenario, stage))
    engine = configured.live(config.correlate)
    return judged(scenario, stage, whole, engine, capture.source)


def _played(scenario: Scenario, stage: Stage) -> None:
    lab: Lab = stage.lab
    with ExitStack() as observing:
        outer = observing.enter_context(stage.observed(HOST, lab.outer_device))
        inner = {name: observing.enter_context(stage.observed(name, "eth0")) for name in lab.containers}
        for kind in scenario.bystanders:
            observing.enter_context(stage.observed(HOST, scenarios.bystander_device(lab, kind)))
        scenario.play(stage)
    stage.outer += outer
    stage.inner |= inner


def judged(
    scenario: Scenario, stage: Stage, whole: stream.CollectedStream, engine: EngineConfig, source: str
) -> Verdict:
    """Score the engine's results for the stream, or for the part of the stream that a scenario's loss leaves."""
    worked = stream.worked(whole, engine)
    rows = truth.rows(worked.delays, worked.devices)
    score = truth.score(rows, stage.inner, stage.outer)
    if scenario.loss:
        thinned, gone = stream.thinned(whole, scenario.loss)
        possible = allowed(whole, gone, score.matched, rows) / max(score.packets, 1)
        worked = stream.worked(thinned, engine)
        score = truth.score(truth.rows(worked.delays, worked.devices), stage.inner, stage.outer)
    elif not scenario.partial:
        possible = 1.0
    else:
        # `kept` leaves out packets whose stamps do not say which record is theirs; MACE may have matched these rightly.
        possible = max(score.right, kept(whole, worked.devices, stage.inner, stage.outer)) / max(score.packets, 1)
    bound = round(possible, 6)
    keyed = any(isinstance(item, Batch) and item.content is not None for item in whole.items)
    return Verdict(
        scenario=scenario.name,
        packets=score.packets,
        precision=round(score.precision, 6),
        recall=round(score.recall, 6),
        delay_error_p50_ns=score.error_ns(0.5),
        delay_error_p99_ns=score.error_ns(0.99),
        round_trips=len(score.trip_errors_ns),
        round_trip_error_p50_ns=score.trip_error_ns(0.5),
        recall_bound=bound,
        wrong=score.wrong,
        records=worked.ledger.records,
        lost=worked.ledger.lost,
        grades=worked.grades.as_dict(),
        ledger=worked.ledger.as_dict(),
        source=source,
        why_bound=None if bound >= 1 else _why_bound(scenario, source, keyed=keyed),
    )


def _why_bound(scenario: Scenario, source: str, *, keyed: bool) -> str:
    if scenario.loss:
        return f"{scenario.loss:.0%} of the records were removed on purpose"
    if scenario.sample_shift:
        return f"the source was to record one packet in {1 << scenario.sample_shift}"
    if scenario.unseen:
        return scenario.unseen
    if not keyed:
        return (
            f"packets change their buffer on the way, and source {source} records buffers alone; kmod and bpf record "
            "the packets' content, too (--source)"
        )
    return "some packets have neither one content key nor one buffer and length in their records of both ends"
