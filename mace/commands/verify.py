"""`mace verify`: sends numbered packets in scenarios and counts how often the matching is right."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from contracts.errors import UsageError, nearest
from mace.commands.choices import PACKETS, SCENARIOS
from mace.commands.console import Console
from mace.commands.options import JSON, CaptureOptions, with_config, with_format, with_source

_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace verify`."""

    scenarios: tuple[str, ...]
    packets: int
    source: str | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace verify` to the parser."""
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help="scenarios to play (default all): " + ", ".join(SCENARIOS)
    )
    parser.add_argument(
        "--packets", type=int, default=PACKETS, metavar="N", help=f"number of packets per flow (default {PACKETS})"
    )
    with_source(parser)
    with_config(parser)
    with_format(parser, short="one JSON object per scenario on stdout")


def run(options: Options, console: Console) -> int:
    """Play the scenarios and print the scores; returns 1 if a row is wrong or a matchable packet was not matched."""
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        raise UsageError(
            f"no scenario {unknown[0]!r}{nearest(unknown[0], SCENARIOS)}; there are {', '.join(SCENARIOS)}"
        )
    if not 1 <= options.packets <= 20_000:
        raise UsageError(f"--packets {options.packets}: expected 1 to 20000")
    from mace import lab
    from mace.commands import settings
    from mace.live import first
    from mace.trials.verify import verdict
    from mace.trials.verify.scenarios import BY_NAME

    configured = settings.configured(options.config, capture=CaptureOptions(options.source, None))
    source = first.name_of(configured.capture)
    configured = replace(configured, capture=replace(configured.capture, source=source))
    verdicts = []
    for scenario in (BY_NAME[name] for name in options.scenarios or SCENARIOS):
        if scenario.sample_shift and source == "ftrace":
            console.complain(f"mace: {scenario.name}: skipped, because source {source} does not sample")
            continue
        # A kernel that a scenario needs is no reason to play none; who names the scenario gets the error.
        if not options.scenarios and (missing := lab.check(scenario.spec)) and not lab.check():
            console.complain(f"mace: {scenario.name}: skipped, because {missing[0].why}")
            continue
        verdicts.append(verdict.verdict(scenario, configured, options.packets))
        if options.format == JSON:
            console.json(asdict(verdicts[-1]), flush=True)
        elif sys.stderr.isatty():
            console.complain(f"{scenario.name}: {scenario.meaning}")
    if options.format != JSON:
        console.out(_WIDTH).print(verdict.table(verdicts))
        for text in verdict.limits(verdicts):
            console.line(text)
    return 0 if all(v.wrong == 0 and v.recall >= v.recall_bound for v in verdicts) else 1
