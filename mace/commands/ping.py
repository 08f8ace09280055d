"""`mace ping`: runs ping in a container and corrects each round trip for the time in the container's devices."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    CaptureOptions,
    SinkOptions,
    Where,
    renamed,
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
    """Options and arguments of `mace ping`."""

    where: Where
    record: Path | None
    sinks: SinkOptions
    store: Path | None
    no_probes: bool
    capture: CaptureOptions
    config: Path | None
    format: str
    others: tuple[str, ...]
    """Options that `mace ping` does not know: ping's arguments."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace ping` to the parser; all others are ping's."""
    parser.allow_abbrev = False
    parser.usage = "%(prog)s (--container NAME | --netns NAME | --pid N) [option ...] [ping's arguments] HOST"
    with_where(parser)
    with_record(parser)
    with_sinks(parser)
    with_store(parser, "also write the round trips to this store, as a run of its own")
    with_probes(parser)
    renamed(parser, "--host-path", "the default; --no-probes sends no probes")
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Run ping under a capture and print its corrected lines; returns ping's exit status."""
    from mace.commands import settings
    from mace.tools import ping
    from mace.tools.beside import Beside
    from mace.tools.following import Following

    settings.refuse_unwritable(options.store, "mace ping")
    argv, user_clock, stamps_shown = ping.arguments(options.others)
    configured = settings.configured(
        options.config, capture=options.capture, sinks=options.sinks, place=settings.lab_of(options.where.lab)
    )
    as_json = options.format == JSON
    with settings.namespace(options.where, configured) as netns_fd:
        session = settings.session(configured, options.format, console)
        beside = Beside(netns_fd, configured.capture, probes=not options.no_probes)
        with Following.opened() as following:
            one = ping.Ping(
                argv, netns_fd, following, beside, user_clock=user_clock, stamps_shown=stamps_shown, quiet=as_json
            )
            found = one.measure(session, settings.tee(options.record))
    session.deliver(found.round_trips())
    if as_json:
        console.json(found.as_dict())
    else:
        found.tables(console.out())
    if options.store:
        session.keep(options.store, found.round_trips(), found.totals)
    return one.status
