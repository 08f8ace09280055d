"""`mace export perfetto`: writes recordings as a Perfetto trace, a timeline of packets."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    PacketOptions,
    RecordingOptions,
    with_config,
    with_format,
    with_output,
    with_packets,
    with_recordings,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace export perfetto`."""

    recordings: RecordingOptions
    output: Path
    force: bool
    packets: PacketOptions
    no_records: bool
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace export perfetto` to the parser."""
    with_recordings(parser, "recordings to export", Path)
    with_output(parser)
    with_packets(parser)
    parser.add_argument("--no-records", action="store_true", help="leave out the raw records")
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Write the trace and print how much it contains."""
    from contracts import config
    from correlator import configured
    from mace.commands import settings
    from mace.replaying import export
    from mace.replaying.into_store import bar
    from mace.shown.terminal import warn

    chosen = options.packets
    export.check_worst(chosen.worst)
    recordings = settings.recordings(options.recordings)
    wanted = export.Wanted.of(chosen.flow, chosen.between, recordings[0].first_utc_ns)
    engine = replace(configured.replayed(config.load(options.config).correlate), rows=True)
    with bar(console.err(), quiet=options.format == JSON, what="export") as told:
        found = export.export(
            recordings,
            options.output,
            engine,
            wanted,
            packets=chosen.packet,
            worst=chosen.worst,
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
