"""`mace report`: shows a store or a recording as tables, as JSON or CSV, or as pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from contracts.errors import UsageError
from mace.commands.console import Console
from mace.commands.options import (
    CSV,
    JSON,
    TABLE,
    RecordingOptions,
    with_config,
    with_format,
    with_recordings,
    with_store,
)

if TYPE_CHECKING:
    from storage.query import Filter, StoreReader


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace report`."""

    recordings: RecordingOptions
    store: Path | None
    since: str | None
    until: str | None
    container: str | None
    device: str | None
    direction: str | None
    run: str | None
    runs: bool
    cpus: bool
    packet: int | None
    worst: int | None
    counted: Literal["auto", "rows", "windows"]
    skip_damaged: bool
    png: Path | None
    html: Path | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace report` to the parser."""
    with_recordings(parser, "recordings to report on instead of a store, as for `mace replay`")
    with_store(parser, "the store to read")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="packets from this time on: 2025-06-15T15:04:05 (UTC), or 90s, 5m, 2h, 1d for so long ago",
    )
    parser.add_argument("--until", metavar="WHEN", help="packets before this time, written as for --since")
    parser.add_argument("--container", metavar="NAME", help="packets of this container, at all devices")
    parser.add_argument("--device", metavar="NAME", help="this device only")
    parser.add_argument(
        "--direction", choices=("egress", "ingress"), help="only packets that leave, or enter, the container"
    )
    parser.add_argument("--run", metavar="ID", help="this run only")
    parser.add_argument("--runs", action="store_true", help="list the runs instead of the figures")
    parser.add_argument(
        "--cpus", action="store_true", help="show which CPU works on packets, and what spreading the work could give"
    )
    parser.add_argument("--packet", type=int, metavar="ID", help="show one packet's path, hop by hop")
    parser.add_argument(
        "--worst", type=int, metavar="N", help="show the paths of the N packets with the largest overhead"
    )
    parser.add_argument(
        "--from",
        dest="counted",
        choices=("auto", "rows", "windows"),
        default="auto",
        help="compute the figures from rows or from windows (default auto)",
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged segments, and say how many")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures to this file")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the page of `mace serve` with its data inside, one file"
    )
    with_config(parser)
    with_format(parser, CSV)


def run(options: Options, console: Console) -> int:
    """Print the report on the store, or on the named recordings."""
    from contracts import config
    from mace.commands import settings
    from storage.query import StoreReader

    if options.worst is not None and options.worst < 1:
        raise UsageError(f"--worst {options.worst}: expected at least 1")
    _check(options)
    settings.replaying(options.recordings, options.store)
    configured = config.load(options.config)
    quiet = options.format != TABLE
    with settings.store_to_read(
        options.recordings, options.store, configured, quiet=quiet, stages=options.cpus
    ) as path:
        sealed = options.recordings.files or (path,)
        _report(StoreReader(path, skip_damaged=options.skip_damaged), sealed, options, console)
    return 0


def _check(options: Options) -> None:
    """Raise `UsageError` for options that do not go together."""
    if not options.cpus:
        if options.format == CSV:
            raise UsageError(
                "--format csv: only `mace report --cpus` prints CSV; `mace query --format csv` prints rows"
            )
        return
    others = {
        "--device": options.device,
        "--runs": options.runs,
        "--packet": options.packet,
        "--worst": options.worst,
        "--png": options.png,
        "--html": options.html,
    }
    for name, value in others.items():
        if value is not None and value is not False:
            raise UsageError(f"--cpus and {name} do not go together: leave out one of them")


def _report(store: StoreReader, sealed: Sequence[Path | str], options: Options, console: Console) -> None:
    """Print the report; `sealed` are the store, or the recordings, that may have a seal."""
    from mace.shown import report
    from mace.shown.evidence import evidence

    where = _filter(options)
    if options.cpus:
        from mace.shown import cpus

        cpus.show(store, where, console.out(), form=options.format)
        return
    if options.runs:
        report.print_runs(store.runs(where), console.out(), as_json=options.format == JSON)
        return
    report.report(
        store,
        where,
        packet=options.packet,
        worst=options.worst,
        source=options.counted,
        as_json=options.format == JSON,
        png=options.png,
        html=options.html,
        evidence=evidence([each for each in sealed if isinstance(each, Path)], store.runs(where)),
        console=console.out(),
    )


def _filter(options: Options) -> Filter:
    from contracts.schema import Direction
    from mace.shown.instants import instant_ns
    from storage.query import Filter

    now = datetime.now(UTC)
    return Filter(
        since_ns=None if options.since is None else instant_ns(options.since, now),
        until_ns=None if options.until is None else instant_ns(options.until, now),
        container=options.container,
        device=options.device,
        direction=Direction[options.direction.upper()] if options.direction else None,
        run=options.run,
    )
