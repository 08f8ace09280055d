"""`mace calibrate`: measures what host RTTs need: the tracer's own cost, and the host path term for recordings."""

from __future__ import annotations

import argparse
import sys
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
        help="rounds, of 10 seconds each; more make the interval narrower (default 10)",
    )
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure cost and term in a test network, keep them, and print them."""
    from mace.commands import settings
    from mace.live.first import name_of
    from mace.tools import calibration

    configured = settings.configured(options.config, capture=options.capture)
    source = name_of(configured.capture)
    # Each round opens the source anew; one line each would say nothing.
    session = settings.session(configured, JSON, console)
    said = settings.session(configured, options.format, console)
    ping = [sys.executable, "-m", "mace", "ping", "--source", source]
    if options.capture.ring_mib:
        ping += ["--ring-mib", str(options.capture.ring_mib)]
    if options.config:
        ping += ["--config", str(options.config)]
    found = calibration.measured(source, session, calibration.PACES, options.rounds, ping, said.say)
    calibration.keep(found)
    if options.format == JSON:
        console.json(found.as_dict() | {"kept": str(calibration.place())})
    else:
        for table in calibration.tables(found):
            console.out().print(table)
        console.line(f"kept in {calibration.place()}, for Linux {found.kernel} on {found.cpu}")
    return 0
