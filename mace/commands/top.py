"""`mace top`: shows containers and devices in the terminal, live or from a store or recordings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import UsageError
from mace.commands.console import Console
from mace.commands.options import (
    CaptureOptions,
    FilterOptions,
    RecordingOptions,
    with_capture,
    with_config,
    with_duration,
    with_filter,
    with_lab,
    with_recordings,
    with_store,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace top`."""

    recordings: RecordingOptions
    store: Path | None
    until: str | None
    skip_damaged: bool
    lab: str | None
    duration: float | None
    capture: CaptureOptions
    filter: FilterOptions
    cpus: bool
    config: Path | None

    @property
    def live(self) -> list[str]:
        """The options given that apply to a live measurement only."""
        given = {
            "--lab": self.lab,
            "--duration": self.duration,
            "--source": self.capture.source,
            "--ring-mib": self.capture.ring_mib,
            "--container": self.filter.containers,
            "--device": self.filter.devices,
            "--protocol": self.filter.protocols,
            "--sample": self.filter.sample_shift is not None,
        }
        return [name for name, value in given.items() if value]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace top` to the parser."""
    with_recordings(parser, "recordings to look at instead of measuring, as for `mace replay`")
    with_store(parser, "look at this store instead of measuring")
    parser.add_argument(
        "--until",
        metavar="WHEN",
        help="begin with the minute before this time (default: the last): 2025-06-15T15:04:05 (UTC), or 5m, 2h, 1d ago",
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged segments, and say how many")
    with_lab(parser)
    with_duration(parser)
    with_capture(parser)
    with_filter(parser)
    parser.add_argument(
        "--cpus",
        action="store_true",
        help="count which CPU works on packets, live or in recordings, for the key c; a store has it or not",
    )
    with_config(parser)


def run(options: Options, console: Console) -> int:
    """Show the screen until `q`, a signal, or the end of the duration."""
    from mace.commands import settings
    from mace.shown.top import running

    stored = settings.replaying(options.recordings, options.store) or options.store is not None
    if stored and options.live:
        raise UsageError(
            f"{options.live[0]} is for measuring, and a store or recording was measured before: leave it out"
        )
    if options.until is not None and not stored:
        raise UsageError("--until is a time in a store or recording: name one with --store or as FILE")
    running.require_terminal()
    if stored:
        _look_back(options, console)
    else:
        _measure(options, console)
    return 0


def _measure(options: Options, console: Console) -> None:
    from mace.commands import settings
    from mace.live.watching import Watched
    from mace.shown import tables
    from mace.shown.top import running

    configured = settings.configured(
        options.config,
        capture=options.capture,
        chosen=options.filter,
        place=settings.lab_of(options.lab),
        cpus=options.cpus,
    )
    running.require_library()
    watched = Watched(configured, settings.lasting(options.duration))
    messages: list[str] = []
    with running.interrupted_by_signals(watched.interrupt):
        try:
            watched.begin()
            if not watched.is_over:
                console.complain(watched.remarks[0])
                messages = running.show(watched, watched.remarks[1:])
        finally:
            watched.end()
    for told in dict.fromkeys([*messages, *watched.written]):
        console.complain(told)
    console.show(*tables.losses_panel(watched.summary), tables.ledger_line(watched.summary))


def _look_back(options: Options, console: Console) -> None:
    from contracts import config
    from mace.commands import settings
    from mace.shown.top import running

    configured = config.load(options.config)
    running.require_library()
    with settings.store_to_read(options.recordings, options.store, configured, stages=options.cpus) as path:
        for told in _shown(options, path):
            console.complain(told)


def _shown(options: Options, path: Path) -> list[str]:
    from datetime import UTC, datetime

    from mace.shown.instants import instant_ns
    from mace.shown.top import running
    from mace.shown.top.stored import StoredFeed
    from storage.query import StoreReader

    until_ns = None if options.until is None else instant_ns(options.until, datetime.now(UTC))
    feed = StoredFeed(StoreReader(path, skip_damaged=options.skip_damaged), path.name, until_ns)
    with running.interrupted_by_signals(feed.interrupt):
        return running.show(feed, [])
