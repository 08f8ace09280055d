"""`mace lab list`: lists test networks, including those that killed runs have left behind."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from mace.commands.console import Console
from mace.commands.options import JSON, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace lab list`."""

    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace lab list` to the parser."""
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print all labs of this machine."""
    from mace import lab

    labs = lab.list_labs()
    if options.format == JSON:
        console.json({"labs": [asdict(info) for info in labs]})
        return 0
    table = console.table("lab", "status", "runtime", "containers", "")
    for info in labs:
        table.add_row(info.name, info.status, info.runtime, ", ".join(info.containers), info.detail)
    console.show(table)
    return 0
