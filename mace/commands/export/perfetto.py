"""`mace export perfetto`: writes recordings as a Perfetto trace, a timeline of packets."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from contracts.errors import UsageError
from mace.commands.choices import FLOW_KEYS
from mace.commands.console import Console
from mace.commands.options import JSON, RecordingOptions, with_config, with_format, with_output, with_recordings


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace export perfetto`."""

    recordings: RecordingOptions
    output: Path
    force: bool
    packet: tuple[int, ...] | None
    worst: int | None
    flow: str | None
    between: str | None
    no_records: bool
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace export perfetto` to the parser."""
    with_recordings(parser, "recordings to export", Path)
    with_output(parser)
    parser.add_argument(
        "--packet",
        action="append",
        type=_packet_id,
        metavar="ID",
        help="export this packet and its reply; may be repeated",
    )
    parser.add_argument(
        "--worst", type=int, metavar="N", help="export the N packets with the largest overhead, and their replies"
    )
    parser.add_argument(
        "--flow", metavar="KEY=VALUE,...", help=f"export packets that match all pairs; keys: {', '.join(FLOW_KEYS)}"
    )
    parser.add_argument(
        "--between",
        metavar="START,END",
        help="export packets that begin in this time: 2025-06-15T15:04:05.25 (UTC), or +1.5s after the first record",
    )
    parser.add_argument("--no-records", action="store_true", help="leave out the raw records")
    with_config(parser)
    with_format(parser)


def _packet_id(text: str) -> int:
    """Parse a packet's number: decimal as `mace report` prints it, or hexadecimal as in the trace."""
    value = int(text, 0)
    if not 0 < value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text}: expected a packet's number, as `mace report` prints it")
    return value


def run(options: Options, console: Console) -> int:
    """Write the trace and print how much it contains."""
    from contracts import config
    from correlator import configured
    from mace.commands import settings
    from mace.replaying import export
    from mace.replaying.progress import bar
    from mace.shown.terminal import warn

    if options.worst is not None and not 1 <= options.worst <= export.MOST_CHOSEN:
        raise UsageError(f"--worst {options.worst}: expected 1 to {export.MOST_CHOSEN}")
    recordings = settings.recordings(options.recordings)
    wanted = export.Wanted.of(options.flow, options.between, recordings[0].first_utc_ns)
    engine = replace(configured.replayed(config.load(options.config).correlate), rows=True)
    with bar(console.err(), quiet=options.format == JSON, what="export") as told:
        found = export.export(
            recordings,
            options.output,
            engine,
            wanted,
            packets=options.packet,
            worst=options.worst,
            records=not options.no_records,
            overwrite=options.force,
            told=told,
        )
    if options.format == JSON:
        console.json(found.as_dict(options.output))
        return 0
    warn(console.err(), found.warnings)
    console.line(found.line(options.output))
    console.line(found.summary.ledger.line())
    return 0
