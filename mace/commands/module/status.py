"""`mace module status`: whether the kernel module is loaded, its version, parameters and own cost."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console
from mace.commands.options import JSON, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print what is known of it."""
    from mace import module

    found = module.status()
    if options.format == JSON:
        console.json(found.as_dict())
    else:
        console.line(f"module {module.NAME}: {module.show(found)}")
    return 0
