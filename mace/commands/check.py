"""`mace check`: reports which parts can run on this machine, and for the others why not and what to do."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import JSON, with_config, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace check`."""

    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace check` to the parser."""
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print the status of every part."""
    from rich.text import Text

    from contracts import config
    from mace.live.parts import statuses

    found = statuses(config.load(options.config))
    if options.format == JSON:
        console.json({name: asdict(status) for name, status in found.items()})
        return 0
    table = console.table("part", "can run here", "found", "what to do")
    for name, status in found.items():
        table.add_row(name, Text("yes", "green") if status.ok else Text("no", "red"), status.detail, status.remedy)
    console.show(table)
    return 0
