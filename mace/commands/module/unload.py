"""`mace module unload`: unloads the kernel module."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """`mace module unload` has no options."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `mace module unload` has no options."""
    del parser


def run(options: Options, console: Console) -> int:
    """Unload the module and print whether it was loaded."""
    del options
    from mace import module

    console.line(f"module {module.NAME}: {module.unload()}")
    return 0
