"""`mace experiment`: compares ping on the host, ping in a container, and what `mace ping` prints."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mace.commands.choices import EXPERIMENT_RUNTIMES, LOADS, PACES, RUNTIMES
from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    CaptureOptions,
    FarEndOptions,
    at_least,
    renamed,
    whole_at_least,
    with_capture,
    with_config,
    with_far_end,
    with_format,
)

if TYPE_CHECKING:
    from contracts.config import Config
    from mace.trials.experiment.plan import Plan
    from mace.trials.experiment.results import Results


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace experiment`."""

    runtimes: str
    far_end: FarEndOptions
    load: str
    flood: int | None
    repetitions: int | None
    count: int | None
    paces: str
    seed: int
    duration: float | None
    quick: bool
    results: Path | None
    png: Path | None
    page: Path | None
    capture: CaptureOptions
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace experiment` to the parser."""
    parser.add_argument(
        "--runtimes",
        default=RUNTIMES[0],
        metavar="LIST",
        help="container runtimes to measure side by side, each in a lab of its own, of"
        f" {', '.join(EXPERIMENT_RUNTIMES)} (default %(default)s)",
    )
    renamed(parser, "--runtime", "--runtimes")
    with_far_end(parser)
    parser.add_argument(
        "--load", choices=LOADS, default=LOADS[0], help="contention beside the measurement (default %(default)s)"
    )
    parser.add_argument(
        "--flood",
        type=int,
        default=None,
        metavar="N",
        help="measure beside 0 to N flooding containers (default 2; with --quick 0)",
    )
    parser.add_argument(
        "--paces",
        default=",".join(PACES),
        metavar="LIST",
        help=f"paces to measure, of {', '.join(PACES)} (default all)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=None,
        metavar="N",
        help="repetitions of each combination, mixed (default 20; with --quick 4)",
    )
    renamed(parser, "--rounds", "--repetitions")
    parser.add_argument(
        "--count",
        type=whole_at_least(1),
        default=None,
        metavar="N",
        help="pings of each kind per repetition (default: by pace; at 1 s 34 of `mace ping` and 10 of each other kind)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the random order (default 1)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="keep finished repetitions in this file; if it has some, continue there",
    )
    parser.add_argument(
        "--duration", type=at_least(1), metavar="S", help="begin no repetition that would end later than S seconds"
    )
    parser.add_argument(
        "--quick", action="store_true", help="within ten minutes: no flooding containers, 4 repetitions"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures to this file")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write tables and pictures as one page, FILE.html, or FILE.md with FILE.png beside it",
    )
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure the repetitions that are missing, and print the figures of all that are finished."""
    from mace.commands import settings
    from mace.live import first
    from mace.trials.experiment import figures, load, page, results
    from mace.trials.rounds import machine

    began_s = time.monotonic()
    configured = settings.configured(options.config, capture=options.capture)
    if options.page:
        page.check(options.page)
    _plan(options, "")  # refuses what is impossible before anything is looked for
    load.check(options.load)
    source = first.name_of(configured.capture)
    plan, facts = _plan(options, source), machine()
    with results.opened(options.results, plan.settings(facts), facts) as found:
        for remark in found.remarks:
            console.complain(f"mace: {remark}")
        _measure(options, plan, found, console, began_s)
        if not found.finished:
            console.complain("mace: no repetition was finished, so there are no figures")
            return 1
        done = figures.Figures(found.finished, found.machine)
    if options.png:
        page.picture(done, options.png)
    if options.page:
        page.write(done, options.page)
    if options.format == JSON:
        console.json(done.as_dict())
    else:
        done.tables(console.out())
    return 0


def _plan(options: Options, source: str) -> Plan:
    from mace.trials.experiment import plan

    return plan.Plan(
        paces=tuple(word for word in options.paces.split(",") if word),
        flood=_given(options.flood, 0 if options.quick else plan.FLOODS),
        repetitions=_given(options.repetitions, plan.QUICK_REPETITIONS if options.quick else plan.REPETITIONS),
        count=options.count,
        runtimes=tuple(word for word in options.runtimes.split(",") if word),
        source=source,
        far_end=options.far_end.far_end,
        guest_kernel=str(options.far_end.guest_kernel.absolute()) if options.far_end.guest_kernel else "",
        load=options.load,
        seed=options.seed,
    )


def _given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _measure(options: Options, plan: Plan, found: Results, console: Console, began_s: float) -> None:
    """Measure what is missing, and say what is left out."""
    from mace import lab
    from mace.commands import settings
    from mace.trials.experiment import measuring
    from mace.trials.experiment.plan import QUICK_S

    limits = [s for s in (options.duration, QUICK_S if options.quick else None) if s is not None]
    until_s = began_s + min(limits) if limits else None
    complete = True
    if any(not found.has(number, cell) for number, cell in plan.order()):
        ring_mib = options.capture.ring_mib or measuring.RING_MIB
        capture = replace(options.capture, source=plan.source, ring_mib=ring_mib)
        more = ("--ring-mib", str(ring_mib), *(("--config", str(options.config)) if options.config else ()))
        with ExitStack() as stack:
            sites = {}
            for word, spec in plan.specs().items():
                place = stack.enter_context(lab.running(spec))
                configured: Config = settings.configured(options.config, capture=capture, place=place)
                sites[word] = measuring.Site(place, settings.session(configured, options.format, console))
            complete = measuring.Bench(plan, sites, more).run(found, until_s)
    for text in _left_out(options, plan, found, interrupted=not complete):
        console.complain(f"mace: {text}")


def _left_out(options: Options, plan: Plan, found: Results, *, interrupted: bool) -> list[str]:
    """Return what the figures lack, in words."""
    said = []
    missing = [cell for number, cell in plan.order() if not found.has(number, cell)]
    if missing:
        why = "interrupted" if interrupted else "the time is over"
        remedy = "the same command continues" if options.results else "--results FILE would keep the others for it"
        paces = ", ".join(sorted({cell.pace for cell in missing}))
        of = plan.repetitions * len(plan.cells())
        said.append(f"{why}: {len(missing)} of {of} repetitions are missing ({paces}); {remedy}")
    if options.quick:
        said.append(
            f"--quick leaves out flooding containers (--flood) and most repetitions: {plan.repetitions} of each pace "
            "say little about the coverage; other runtimes (--runtimes), sources, far ends and loads are left out too"
        )
    return said
