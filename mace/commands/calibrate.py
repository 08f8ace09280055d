"""`mace calibrate`: measures the tracer's own cost, which `mace ping` and `mace wrap` subtract from the host RTT."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import JSON, CaptureOptions, whole_at_least, with_capture, with_config, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `mace calibrate`."""

    rounds: int
    capture: CaptureOptions
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace calibrate` to the parser."""
    parser.add_argument(
        "--rounds",
        type=whole_at_least(3),
        default=10,
        metavar="N",
        help="rounds, of 6 seconds each; more make the interval narrower (default 10)",
    )
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure the cost in a test network, keep it, and print it."""
    from mace.commands import settings
    from mace.live.first import name_of
    from mace.tools import tracer_cost

    configured = settings.configured(options.config, capture=options.capture)
    source = name_of(configured.capture)
    # Each round opens the source anew; one line each would say nothing.
    session = settings.session(configured, JSON, console)
    said = settings.session(configured, options.format, console)
    found = tracer_cost.measured(source, session, tracer_cost.PACES, options.rounds, said.say)
    tracer_cost.keep(found)
    if options.format == JSON:
        console.json(found.as_dict() | {"kept": str(tracer_cost.place())})
    else:
        console.out().print(tracer_cost.table(found))
        console.line(f"kept in {tracer_cost.place()}, for Linux {found.kernel} on {found.cpu}")
    return 0
