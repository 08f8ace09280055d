"""`mace lab down`: remove a test network, and all that runs in it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    name: str
    force: bool


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("name", nargs="?", default="lab", metavar="NAME", help="of the lab (default lab)")
    parser.add_argument("--force", action="store_true", help="also one that a running process holds")


def run(options: Options, console: Console) -> int:
    """Remove the lab and print whether there was one."""
    from mace import lab

    removed = lab.down(options.name, force=options.force)
    console.line(f"lab {options.name}: {'removed' if removed else 'there is none'}")
    return 0
