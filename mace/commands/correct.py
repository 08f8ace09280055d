"""`mace correct`: corrects the round trip times that a tool has printed, with a capture from the time it ran."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.choices import TOOLS
from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    SinkOptions,
    with_config,
    with_format,
    with_sinks,
    with_store,
    with_topology,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace correct`."""

    printed: Path
    file: Path
    container: str | None
    tool: str | None
    salvage: bool
    topology: Path | None
    sinks: SinkOptions
    store: Path | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace correct` to the parser."""
    parser.add_argument("printed", type=Path, metavar="OUTPUT", help="the tool's output; `-` reads standard input")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a capture file or trace.dat recorded while the tool ran"
    )
    parser.add_argument(
        "--container", metavar="NAME", help="the container the tool ran in; needed if the capture has several"
    )
    parser.add_argument("--tool", choices=TOOLS, help="the tool that ran, if its output does not show which")
    parser.add_argument("--salvage", action="store_true", help="skip damaged parts and count the records they held")
    with_topology(parser)
    with_sinks(parser)
    with_store(parser, "also write the round trips to this store, as a run of its own")
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print every corrected sample, and statistics over all samples."""
    from collector.files import FileOptions, recording
    from mace.commands import settings
    from mace.tools import correct

    settings.refuse_unwritable(options.store, "mace correct")
    session = settings.session(settings.configured(options.config, sinks=options.sinks), options.format, console)
    samples, reader = correct.printed(options.printed, options.tool)
    captured = recording(options.file, FileOptions(options.salvage, options.topology))
    found = correct.corrected(samples, reader, captured, session, options.container)
    session.deliver(found.round_trips())
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        correct.print_samples(found)
        found.tables(console.out())
    if options.store:
        session.keep(options.store, found.round_trips(), found.totals)
    return 0
