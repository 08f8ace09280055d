"""`mace demo`: makes a lab, sends traffic through it and shows what its devices add."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    CaptureOptions,
    LabShape,
    at_least,
    with_capture,
    with_config,
    with_format,
    with_lab_shape,
    with_no_rows,
    with_record,
    with_store,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace demo`."""

    shape: LabShape
    duration: float
    store: Path | None
    capture: CaptureOptions
    record: Path | None
    no_rows: bool
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace demo` to the parser."""
    with_lab_shape(parser, containers=2)
    parser.add_argument(
        "--duration", type=at_least(0.1), default=8.0, metavar="S", help="seconds of traffic (default 8)"
    )
    with_store(parser, "keep the rows in this store")
    with_capture(parser)
    with_record(parser)
    with_no_rows(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Make the lab, measure its traffic, print the figures, and remove the lab."""
    import tempfile
    from contextlib import ExitStack

    from mace import lab
    from mace.commands import settings
    from mace.lab import demo
    from mace.shown import report

    with ExitStack() as leaving:
        place = leaving.enter_context(lab.running(settings.spec(options.shape, "demo")))
        store = options.store or Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="mace-demo-")))
        configured = settings.configured(
            options.config, capture=options.capture, store=options.store, no_rows=options.no_rows, place=place
        )
        session = settings.session(configured, options.format, console)
        summary = session.measure(
            lambda: demo.traffic(place, options.duration, session.say), store=store, tee=settings.tee(options.record)
        )
        settings.show(summary, options.format, console)
        if options.format != JSON:
            report.print_typical_paths(store, console.out())
            session.say(
                f"`mace report --store {store}` shows more of these rows"
                if options.store
                else "the rows are not kept; --store DIR keeps them for `mace report`"
            )
    return 0
