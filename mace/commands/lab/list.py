"""`mace lab list`: test networks, those left over by killed runs included."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

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
