"""`mace correct`: what a tool has printed, and a capture of the time when it ran, to corrected round trip times."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.choices import TOOLS
from mace.commands.console import Console
from mace.commands.options import JSON, SinkOptions, with_config, with_format, with_sinks, with_topology


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    printed: Path
    file: Path
    container: str | None
    tool: str | None
    salvage: bool
    topology: Path | None
    sinks: SinkOptions
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("printed", type=Path, metavar="OUTPUT", help="what the tool printed; `-`: standard input")
    parser.add_argument("file", type=Path, metavar="FILE", help="a capture file of that time, or a trace.dat")
    parser.add_argument("--container", metavar="NAME", help="where the tool ran; needed where there are several")
    parser.add_argument("--tool", choices=TOOLS, help="which tool it was, if its first line does not tell")
    parser.add_argument("--salvage", action="store_true", help="skip damaged parts, counting what they held")
    with_topology(parser)
    with_sinks(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print every sample corrected, and statistics of all."""
    from collector.files import FileOptions, recording
    from mace.commands import settings
    from mace.tools import correct

    session = settings.session(settings.configured(options.config, sinks=options.sinks), options.format, console)
    samples, reader = correct.printed(options.printed, options.tool)
    captured = recording(options.file, FileOptions(options.salvage, options.topology))
    found = correct.corrected(samples, reader, captured, session, options.container)
    session.deliver(found.round_trips())
    if options.format == JSON:
        console.json(found.as_dict())
        return 0
    correct.print_samples(found)
    found.tables(console.out())
    return 0
