"""`mace module build`: compile the kernel module, by DKMS where that is installed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    kdir: Path | None


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--kdir", type=Path, metavar="DIR", help="another kernel's build directory")


def run(options: Options, console: Console) -> int:
    """Build it and print where it is."""
    from mace import module

    console.line(f"built: {module.build(kdir=options.kdir)}")
    return 0
