"""`mace store convert`: writes the segments of older MACE versions anew, so that Apache Spark reads them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import JSON, with_config, with_format, with_store


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace store convert`."""

    store: Path | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace store convert` to the parser."""
    with_store(parser, "the store to convert")
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Convert every old segment and print the counts and the damaged segments; returns 1 if one is damaged."""
    from contracts import config
    from mace.shown.terminal import styled
    from storage.converting import convert

    found = convert(options.store or Path(config.load(options.config).store.path))
    damaged = {str(each): why for one in found for each, why in one.damaged.items()}
    if options.format == JSON:
        told = [{"table": o.table, "converted": o.converted, "rows": o.rows, "current": o.current} for o in found]
        console.json({"tables": told, "damaged": damaged})
        return 1 if damaged else 0
    table = console.table("table")
    for heading in ("converted", "rows", "as today before"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(one.table, *(f"{number:,}" for number in (one.converted, one.rows, one.current)))
    out = console.out()
    out.print(table)
    for name, why in damaged.items():
        out.print(styled(f"{name}: damaged, and left as it is: {why}", ""), soft_wrap=True)
    return 1 if damaged else 0
