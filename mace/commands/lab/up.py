"""`mace lab up`: make a test network that stays."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console
from mace.commands.options import LabShape, with_lab_shape


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    name: str
    shape: LabShape


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("name", nargs="?", default="lab", metavar="NAME", help="of the lab (default lab)")
    with_lab_shape(parser, containers=1)


def run(options: Options, console: Console) -> int:
    """Make the lab and print who is in it."""
    from mace import lab
    from mace.commands import settings

    made = lab.up(settings.spec(options.shape, options.name))
    console.line(f"lab {made.name} is up: {', '.join(made.members)}")
    return 0
