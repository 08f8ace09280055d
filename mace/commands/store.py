"""`mace store check`: whether what a store holds is what was written."""

from __future__ import annotations

import argparse
from pathlib import Path

from contracts import config
from mace.shown.terminal import PlainTable, json_line, output, styled
from storage.check import check


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `mace store check` but `--config` and `--json`."""
    parser.add_argument("--store", type=Path, metavar="DIR", help="the store to check")


def run(args: argparse.Namespace) -> int:
    """`mace store check` with parsed options; 1 if a segment is damaged."""
    path = args.store or Path(config.load(args.config).store.path)
    found = check(path)
    damaged = {str(each): why for one in found for each, why in one.damaged.items()}
    if args.json:
        whole = [
            {
                "table": one.table,
                "segments": one.segments,
                "rows": one.rows,
                "bytes": one.bytes,
                "without_checksum": one.without_checksum,
                "damaged": len(one.damaged),
            }
            for one in found
        ]
        json_line({"tables": whole, "damaged": damaged})
        return 1 if damaged else 0
    console = output()
    table = PlainTable()
    table.add_column("table")
    for heading in ("segments", "rows", "bytes", "without checksum", "damaged"):
        table.add_column(heading, justify="right")
    for one in found:
        numbers = (one.segments, one.rows, one.bytes, one.without_checksum, len(one.damaged))
        table.add_row(one.table, *(f"{n:,}" for n in numbers))
    console.print(table)
    for name, why in damaged.items():
        console.print(styled(f"{name}: damaged: {why}", ""), soft_wrap=True)
    return 1 if damaged else 0
