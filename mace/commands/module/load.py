"""`mace module load`: put the kernel module into the kernel."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    parameters: tuple[str, ...]


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help="of the module; `modinfo -p` lists them")


def run(options: Options, console: Console) -> int:
    """Load it and print how that was done."""
    from mace import module

    console.line(f"module {module.NAME}: {module.load(options.parameters)}")
    return 0
