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
    whole_at_least,
    with_capture,
    with_config,
    with_format,
    with_record,
    with_sinks,
    with_where,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace ping`."""

    where: Where
    record: Path | None
    sinks: SinkOptions
    host_path: int | None
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
    parser.add_argument(
        "--host-path", type=whole_at_least(1), metavar="N", help="first measure the host path term with N probes"
    )
    with_capture(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Run ping under a capture and print its corrected lines; returns ping's exit status."""
    from mace.commands import settings
    from mace.tools import ping
    from mace.tools.following import Following

    argv, user_clock, stamps_shown = ping.arguments(options.others)
    configured = settings.configured(
        options.config, capture=options.capture, sinks=options.sinks, place=settings.lab_of(options.where.lab)
    )
    as_json, term = options.format == JSON, None
    with settings.namespace(options.where, configured) as netns_fd:
        if options.host_path:
            probing = ping.probing(options.host_path, argv, netns_fd, configured.capture.host_netns)
            term = probing.measure(settings.session(configured, options.format, console))
        session = settings.session(configured, options.format, console)
        with Following.opened() as following:
            one = ping.Ping(argv, netns_fd, following, user_clock=user_clock, stamps_shown=stamps_shown, quiet=as_json)
            found = one.measure(session, settings.tee(options.record))
    session.deliver(found.round_trips())
    host_rtt = found.statistics()["host_rtt_ns"]["median"]
    if as_json:
        console.json(found.as_dict() | ({"host_path": term.as_dict(host_rtt)} if term else {}))
    else:
        found.tables(console.out(), lower_bound=term is None)
        if term:
            console.line(term.line(host_rtt))
    return one.status
