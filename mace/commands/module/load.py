"""`mace module load`: loads the kernel module."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace module load`."""

    parameters: tuple[str, ...]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace module load` to the parser."""
    parser.add_argument(
        "parameters", nargs="*", metavar="NAME=VALUE", help="parameters of the module; `modinfo -p` lists them"
    )


def run(options: Options, console: Console) -> int:
    """Load the module and print how it was loaded."""
    from mace import module

    console.line(f"module {module.NAME}: {module.load(options.parameters)}")
    return 0
