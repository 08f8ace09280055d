"""A scenario through a lab, and how often the matching was right."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from contracts.config import Config
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
    """What `--json` has of a scenario."""

    scenario: str
    packets: int
    """Numbered packets that were seen at the inner and the outer device."""
    precision: float
    recall: float
    delay_error_p50_ns: int
    delay_error_p99_ns: int
    round_trips: int
    """Requests and their echoes, both with a right row."""
    round_trip_error_p50_ns: int
    """The same error of a request's and its echo's overhead together."""
    recall_bound: float
    """What the records that there are allow: `mace.trials.verify.bound`."""
    wrong: int
    """Rows whose two ends are different packets'."""
    records: int
    lost: int
    grades: dict[str, int]
    ledger: dict[str, int]
    source: str


def table(verdicts: list[Verdict]) -> PlainTable:
    """For people."""
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
    """Play one scenario in a lab of its own."""
    with labs.running(scenario.spec) as lab, ExitStack() as leaving:
        scenario.prepare(lab)
        for name in lab.containers:
            for family in (4, 6):
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
    """The score of what the engine makes of the stream, or of what a scenario's loss leaves of it."""
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
        possible = kept(whole, worked.devices, stage.inner, stage.outer) / max(score.packets, 1)
    return Verdict(
        scenario=scenario.name,
        packets=score.packets,
        precision=round(score.precision, 6),
        recall=round(score.recall, 6),
        delay_error_p50_ns=score.error_ns(0.5),
        delay_error_p99_ns=score.error_ns(0.99),
        round_trips=len(score.trip_errors_ns),
        round_trip_error_p50_ns=score.trip_error_ns(0.5),
        recall_bound=round(possible, 6),
        wrong=score.wrong,
        records=worked.ledger.records,
        lost=worked.ledger.lost,
        grades=worked.grades.as_dict(),
        ledger=worked.ledger.as_dict(),
        source=source,
    )
