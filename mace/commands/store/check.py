"""`mace store check`: compares every segment of a store with its checksum and reads all of its rows."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mace.commands.console import Console
from mace.commands.options import JSON, with_config, with_format, with_store

if TYPE_CHECKING:
    from mace.shown.terminal import PlainTable
    from storage.check import CheckedTable


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace store check`."""

    store: Path | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace store check` to the parser."""
    with_store(parser, "the store to check")
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Check every segment and print the counts and the damaged segments; returns 1 if one is damaged."""
    from contracts import config
    from mace.shown.terminal import styled
    from storage.check import check

    found = check(options.store or Path(config.load(options.config).store.path))
    damaged = {str(each): why for one in found for each, why in one.damaged.items()}
    if options.format == JSON:
        console.json({"tables": [_as_dict(one) for one in found], "damaged": damaged})
        return 1 if damaged else 0
    out = console.out()
    out.print(_table(found, console))
    for name, why in damaged.items():
        out.print(styled(f"{name}: damaged: {why}", ""), soft_wrap=True)
    return 1 if damaged else 0


def _as_dict(one: CheckedTable) -> dict[str, str | int]:
    return {
        "table": one.table,
        "segments": one.segments,
        "rows": one.rows,
        "bytes": one.bytes,
        "without_checksum": one.without_checksum,
        "damaged": len(one.damaged),
    }


def _table(found: list[CheckedTable], console: Console) -> PlainTable:
    table = console.table("table")
    for heading in ("segments", "rows", "bytes", "without checksum", "damaged"):
        table.add_column(heading, justify="right")
    for one in found:
        numbers = (one.segments, one.rows, one.bytes, one.without_checksum, len(one.damaged))
        table.add_row(one.table, *(f"{n:,}" for n in numbers))
    return table
