"""`mace lab down`: removes a test network and ends all processes in it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace lab down`."""

    name: str
    force: bool


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace lab down` to the parser."""
    parser.add_argument("name", nargs="?", default="lab", metavar="NAME", help="name of the lab (default lab)")
    parser.add_argument("--force", action="store_true", help="remove the lab even if a running process holds it")


def run(options: Options, console: Console) -> int:
    """Remove the lab and print whether it existed."""
    from mace import lab

    removed = lab.down(options.name, force=options.force)
    console.line(f"lab {options.name}: {'removed' if removed else 'no such lab'}")
    return 0
