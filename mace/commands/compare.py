"""`mace compare`: measures the same traffic with several sources, or in several networks, and compares the figures."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mace.commands.choices import COMPARED, LAYOUTS, RUNTIMES
from mace.commands.console import Console
from mace.commands.options import JSON, CaptureOptions, with_config, with_format, with_lab, with_runtime

if TYPE_CHECKING:
    from mace.lab import Lab
    from mace.live.session import Session
    from mace.trials.compare import ComparePlan

_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace compare`."""

    sources: str | None
    networks: tuple[str, ...]
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
    """Add the options of `mace compare` to the parser."""
    parser.add_argument(
        "--sources",
        metavar="LIST",
        help=f"sources to compare, of {', '.join(COMPARED)} (default: those that can run here, and none)",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        default=[],
        metavar="NETWORK",
        help="compare two networks or more instead of sources, each a layout (" + ", ".join(LAYOUTS) + "), docker,"
        " the file of a CNI configuration, or the name of a running lab",
    )
    with_lab(parser, "compare in this lab instead of a new one")
    parser.add_argument(
        "--container", default="c1", metavar="NAME", help="the container that sends the packets (default c1)"
    )
    with_runtime(parser)
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="rounds; each has all sources in random order (default 10)"
    )
    parser.add_argument(
        "--count", type=int, default=2000, metavar="N", help="round trips per source and round (default 2000)"
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds between requests (default 0: send each when the reply to the one before has arrived)",
    )
    parser.add_argument("--ring-mib", type=int, metavar="N", help="size of the kernel's ring, MiB per CPU")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the random order (default 1)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures to this file")
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure all rounds and print the comparison."""
    from mace import lab
    from mace.trials import compare

    plan = compare.ComparePlan(
        sources=options.sources,
        container=options.container,
        rounds=options.rounds,
        count=options.count,
        interval_s=options.interval,
        seed=options.seed,
    )
    if options.networks:
        return _networks(options, plan, console)
    compare.chosen(plan)
    own = compare.spec(lab.Runtime(options.runtime))
    with lab.running(own) if options.lab is None else nullcontext(lab.attach(options.lab)) as place:

        def session(source: str) -> Session:
            return _session(options, console, source, place)

        found = compare.measure(plan, place, session)
    if options.png:
        compare.draw(found, options.png)
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        found.tables(console.out())
    return 0


def _networks(options: Options, plan: ComparePlan, console: Console) -> int:
    """Measure all rounds of the networks and print their comparison."""
    from contracts.errors import UsageError
    from mace.commands import settings
    from mace.live import first
    from mace.trials import compare, networks

    for given, name in (
        (options.lab, "--lab"),
        (options.png, "--png"),
        (options.runtime != RUNTIMES[0], "--runtime"),
    ):
        if given:
            raise UsageError(f"--networks: not with {name}")
    compare.check(plan)
    if options.sources:
        source, *others = compare.chosen(plan)[:-1]
        if others:
            raise UsageError("--networks: one source at a time (--sources NAME)")
    else:
        source = first.name_of(settings.configured(options.config).capture)
    chosen = networks.chosen(options.networks, settings.network_text)
    found = networks.measure(plan, chosen, source, lambda place: _session(options, console, source, place))
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        found.tables(console.out(_WIDTH))
    return 0


def _session(options: Options, console: Console, source: str, place: Lab) -> Session:
    """Return the session of a source in a lab."""
    from contracts.config import SinksConfig
    from mace.commands import settings

    capture = CaptureOptions(source, options.ring_mib)
    # No sinks: figures of a comparison do not belong among a database's measurements.
    configured = replace(settings.configured(options.config, capture=capture, place=place), sinks=SinksConfig())
    return settings.session(configured, options.format, console)
