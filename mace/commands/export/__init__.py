"""Files for other tools: the commands of the group, one file each, and what they have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from mace.replaying.export import Exported


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options and arguments of every command of the group."""

    recordings: RecordingOptions
    output: Path
    force: bool
    packets: PacketOptions
    config: Path | None
    format: str


def with_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command of the group to the parser."""
    with_recordings(parser, "recordings to export", Path)
    with_output(parser)
    with_packets(parser)
    with_config(parser)
    with_format(parser)


def exported(options: ExportOptions, console: Console, write: Callable[..., Exported]) -> int:
    """Write the packets that the options choose by `write`, a function of `mace.replaying.export`; print the counts."""
    from contracts import config
    from correlator import configured
    from mace.commands import settings
    from mace.replaying import export
    from mace.replaying.progress import bar
    from mace.shown.terminal import warn

    chosen = options.packets
    export.check_worst(chosen.worst)
    recordings = settings.recordings(options.recordings)
    wanted = export.Wanted.of(chosen.flow, chosen.between, recordings[0].first_utc_ns)
    engine = replace(configured.replayed(config.load(options.config).correlate), rows=True)
    with bar(console.err(), quiet=options.format == JSON, what="export") as told:
        found = write(
            recordings,
            options.output,
            engine,
            wanted,
            packets=chosen.packet,
            worst=chosen.worst,
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
