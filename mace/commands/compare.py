"""`mace compare`: sources side by side on the same traffic, and what each of them costs."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mace.commands.choices import COMPARED
from mace.commands.console import Console
from mace.commands.options import JSON, CaptureOptions, with_config, with_format, with_lab, with_runtime

if TYPE_CHECKING:
    from mace.live.session import Session


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    sources: str | None
    lab: str | None
    container: str
    runtime: str
    rounds: int
    count: int
    interval: float
    ring_mib: int | None
    seed: int
    png: Path | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--sources", metavar="LIST", help=f"of {', '.join(COMPARED)} (those that can run here, and none)"
    )
    with_lab(parser, "in this lab, instead of one for the purpose")
    parser.add_argument("--container", default="c1", metavar="NAME", help="whose packets (c1)")
    with_runtime(parser)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of all sources, in random order (10)")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="round trips of each in a round (2000)")
    parser.add_argument("--interval", type=float, default=0.0, metavar="S", help="between requests (0: after a reply)")
    parser.add_argument("--ring-mib", type=int, metavar="N", help="the kernel's ring, MiB per CPU")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the order (1)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures")
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure all rounds and print the comparison."""
    from contracts.config import SinksConfig
    from mace import lab
    from mace.commands import settings
    from mace.trials import compare

    plan = compare.ComparePlan(
        sources=options.sources,
        container=options.container,
        rounds=options.rounds,
        count=options.count,
        interval_s=options.interval,
        seed=options.seed,
    )
    compare.chosen(plan)
    own = compare.spec(lab.Runtime(options.runtime))
    with lab.running(own) if options.lab is None else nullcontext(lab.attach(options.lab)) as place:

        def session(source: str) -> Session:
            capture = CaptureOptions(source, options.ring_mib)
            # Its figures are of this comparison; nobody's database wants them among those of measurements.
            configured = replace(settings.configured(options.config, capture=capture, place=place), sinks=SinksConfig())
            return settings.session(configured, options.format, console)

        found = compare.measure(plan, place, session)
    if options.png:
        compare.draw(found, options.png)
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        found.tables(console.out())
    return 0
