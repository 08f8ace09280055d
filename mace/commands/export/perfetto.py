"""`mace export perfetto`: writes recordings as a Perfetto trace, a timeline of packets."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

from mace.commands.console import Console
from mace.commands.export import ExportOptions, exported, with_export


@dataclass(frozen=True, slots=True)
class Options(ExportOptions):
    """Options and arguments of `mace export perfetto`."""

    no_records: bool


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace export perfetto` to the parser."""
    with_export(parser)
    parser.add_argument("--no-records", action="store_true", help="leave out the raw records")


def run(options: Options, console: Console) -> int:
    """Write the trace and print how much it contains."""
    from mace.replaying.export import export

    return exported(options, console, partial(export, records=not options.no_records))
