"""`mace experiment`: compares ping on the host, ping in a container, and the container's ping corrected."""

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
    """Options and arguments of `mace experiment`."""

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
    """Add the options of `mace experiment` to the parser."""
    with_runtime(parser)
    parser.add_argument(
        "--flood", type=int, default=2, metavar="N", help="measure beside 0 to N flooding containers (default 2)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        metavar="N",
        help="rounds; each has all combinations in random order (default 20)",
    )
    parser.add_argument("--count", type=int, default=30, metavar="N", help="pings per round at 10 ms (default 30)")
    parser.add_argument(
        "--flood-count",
        type=int,
        default=300,
        metavar="N",
        help="pings per round at the flood pace, each sent when a reply arrives (default 300)",
    )
    parser.add_argument(
        "--paces",
        default=",".join(PACES),
        metavar="LIST",
        help=f"paces to measure, of {', '.join(PACES)} (default all)",
    )
    parser.add_argument(
        "--cpu", type=int, metavar="N", help="pin the measured processes to this CPU, and floods to the others"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the random order (default 1)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the capture and the tools' output in this directory"
    )
    parser.add_argument(
        "--again", type=Path, metavar="DIR", help="measure nothing; compute the figures of a kept experiment"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures to this file")
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure, or read a kept experiment, and print the figures."""
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
