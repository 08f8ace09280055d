"""`mace module build`: compiles the kernel module, through DKMS where DKMS is installed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace module build`."""

    kdir: Path | None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace module build` to the parser."""
    parser.add_argument(
        "--kdir",
        type=Path,
        metavar="DIR",
        help="build for the kernel with this build directory (default: the running one)",
    )


def run(options: Options, console: Console) -> int:
    """Build the module and print its path, or the DKMS package."""
    from mace import module

    console.line(f"built: {module.build(kdir=options.kdir)}")
    return 0
