"""`mace experiment`: ping on the host, in a container and corrected, side by side."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mace.commands.choices import PACES
from mace.commands.console import Console
from mace.commands.options import JSON, CaptureOptions, with_capture, with_config, with_format, with_runtime

if TYPE_CHECKING:
    from mace.trials.experiment import ExperimentPlan, Figures


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    runtime: str
    flood: int
    rounds: int
    count: int
    flood_count: int
    paces: str
    cpu: int | None
    seed: int
    keep: Path | None
    again: Path | None
    png: Path | None
    capture: CaptureOptions
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    with_runtime(parser)
    parser.add_argument("--flood", type=int, default=2, metavar="N", help="beside 0 to N flooding containers (2)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of everything, in random order (20)")
    parser.add_argument("--count", type=int, default=30, metavar="N", help="pings of a round at 10 ms (30)")
    parser.add_argument("--flood-count", type=int, default=300, metavar="N", help="and as fast as replies come (300)")
    parser.add_argument(
        "--paces", default=",".join(PACES), metavar="LIST", help=f"of {', '.join(PACES)} (all unless told)"
    )
    parser.add_argument("--cpu", type=int, metavar="N", help="pin what is measured to it, and floods to the others")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the order (1)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the capture and what the tools said in there")
    parser.add_argument("--again", type=Path, metavar="DIR", help="measure nothing: the figures of what was kept")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures")
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure, or compute once more what was kept, and print the figures."""
    from mace.trials import experiment

    plan = experiment.ExperimentPlan(
        paces=options.paces,
        flood=options.flood,
        rounds=options.rounds,
        count=options.count,
        flood_count=options.flood_count,
        cpu=options.cpu,
        seed=options.seed,
        keep=options.keep,
    )
    experiment.check(plan)
    found = _figures(options, plan, console)
    if options.png:
        experiment.draw(found, options.png)
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        found.tables(console.out())
    return 0


def _figures(options: Options, plan: ExperimentPlan, console: Console) -> Figures:
    from mace import lab
    from mace.commands import settings
    from mace.trials import experiment

    capture = replace(options.capture, ring_mib=options.capture.ring_mib or experiment.RING_MIB)
    if options.again:
        configured = settings.configured(options.config, capture=capture)
        return experiment.again(options.again, settings.session(configured, options.format, console))
    with lab.running(experiment.spec(plan, lab.Runtime(options.runtime))) as place:
        configured = settings.configured(options.config, capture=capture, place=place)
        return experiment.measure(plan, place, settings.session(configured, options.format, console))
