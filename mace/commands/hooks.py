"""`mace hooks`: lists the points of the kernel at which packets are observed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from contracts.hooks import HOOKS
from mace.commands.console import Console
from mace.commands.options import JSON, with_format
from mace.shown.lines import columns


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace hooks`."""

    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace hooks` to the parser."""
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print the hook table."""
    if options.format == JSON:
        rows = [{"id": int(i.hook), "name": i.name, "tracepoint": i.tracepoint, "meaning": i.meaning} for i in HOOKS]
        console.json({"hooks": rows})
        return 0
    headings = ("id", "letter", "tracepoint", "sees the packet", "meaning")
    cells = [(str(int(i.hook)), i.letter, i.tracepoint, i.way.name.lower(), i.meaning) for i in HOOKS]
    for line in columns(headings, cells):
        console.line(line)
    return 0
