"""`mace module unload`: take the kernel module out of the kernel."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing can be asked of it."""


def add(parser: argparse.ArgumentParser) -> None:
    """It has no options."""
    del parser


def run(options: Options, console: Console) -> int:
    """Unload it and print whether it was there."""
    del options
    from mace import module

    console.line(f"module {module.NAME}: {module.unload()}")
    return 0
