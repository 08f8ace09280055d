"""`mace module status`: shows whether the kernel module is loaded, and its version, parameters and cost."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console
from mace.commands.options import JSON, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace module status`."""

    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace module status` to the parser."""
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print the module's status."""
    from mace import module

    found = module.status()
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        console.line(f"module {module.NAME}: {module.show(found)}")
    return 0
