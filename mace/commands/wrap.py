"""`mace wrap`: runs a tool in a container under a capture, and corrects the samples it printed when it has ended."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.choices import TOOLS
from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    CaptureOptions,
    SinkOptions,
    Where,
    with_capture,
    with_config,
    with_format,
    with_probes,
    with_record,
    with_sinks,
    with_store,
    with_where,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace wrap`."""

    where: Where
    record: Path | None
    tool: str | None
    command: tuple[str, ...]
    no_probes: bool
    sinks: SinkOptions
    store: Path | None
    capture: CaptureOptions
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace wrap` to the parser; the tool's command line follows `--`."""
    with_where(parser)
    with_record(parser)
    parser.add_argument("--tool", choices=TOOLS, help="the tool that runs, if its output does not show which")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the tool and its arguments, after `--`")
    with_probes(parser)
    with_sinks(parser)
    with_store(parser, "also write the round trips to this store, as a run of its own")
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Run the tool and print its corrected samples; returns the tool's exit status."""
    from mace.commands import settings
    from mace.tools import correct, wrap
    from mace.tools.beside import Beside
    from mace.tools.following import Following

    settings.refuse_unwritable(options.store, "mace wrap")
    configured = settings.configured(
        options.config, capture=options.capture, sinks=options.sinks, place=settings.lab_of(options.where.lab)
    )
    as_json = options.format == JSON
    with settings.namespace(options.where, configured) as netns_fd:
        session = settings.session(configured, options.format, console)
        beside = Beside(netns_fd, configured.capture, probes=not options.no_probes)
        with Following.opened() as following:
            found, status = wrap.measure(
                options.command,
                netns_fd,
                session,
                following,
                beside,
                settings.tee(options.record),
                reader_name=options.tool,
                quiet=as_json,
            )
    session.deliver(found.round_trips())
    if as_json:
        console.json(found.as_dict())
    else:
        correct.print_samples(found)
        found.tables(console.out())
    if options.store:
        session.keep(options.store, found.round_trips(), found.totals)
    return status
