"""`mace query`: SQL over what a store holds, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from contracts import names
from contracts.errors import Unavailable, UsageError
from mace.commands.choices import QUERY_MEMORY_MIB
from mace.commands.console import Console
from mace.commands.options import CSV, JSON, renamed, with_config, with_format, with_store


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    sql: str | None
    store: Path | None
    skip_damaged: bool
    memory_mib: int
    timeout: float | None
    parquet: Path | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "sql",
        nargs="?",
        metavar="SQL",
        help="one SELECT; `-` reads it from stdin; without it tables and columns are listed",
    )
    with_store(parser, "the store to read")
    parser.add_argument("--skip-damaged", action="store_true", help="read on without damaged segments")
    parser.add_argument(
        "--memory-mib",
        type=_memory,
        default=QUERY_MEMORY_MIB,
        metavar="N",
        help=f"what the query may take (default {QUERY_MEMORY_MIB}); what does not fit goes to a directory of its own",
    )
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="end a query that takes longer, in seconds")
    with_config(parser)
    group = with_format(parser, CSV)
    group.add_argument("--parquet", type=Path, metavar="FILE", help="write a Parquet file instead")
    renamed(group, "--csv", "--format csv")


def _memory(text: str) -> int:
    if not 16 <= (mib := int(text)) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text}: expected 16 to {1 << 20}")
    return mib


def _seconds(text: str) -> float:
    # Written so that nan, which compares false, is refused.
    if not 0 < (seconds := float(text)) <= 1e9:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return seconds


def run(options: Options, console: Console) -> int:
    """Print the rows that the SQL selects; without SQL the tables that can be asked."""
    from contracts import config
    from mace.shown import rows
    from storage import sql
    from storage.query import StoreReader

    if options.sql is None:
        rows.list_tables(as_json=options.format == JSON)
        return 0
    path = options.store or Path(config.load(options.config).store.path)
    store = StoreReader(path, skip_damaged=options.skip_damaged)
    text = _stdin() if options.sql == "-" else options.sql
    with sql.rows(store, text, memory_mib=options.memory_mib, timeout_s=options.timeout) as reader:
        if store.damaged:
            console.complain(f"{len(store.damaged)} damaged segments ({store.rows_damaged():,} rows) were skipped")
        if options.parquet:
            rows.write_parquet(reader, options.parquet)
        elif options.format == CSV:
            rows.write_csv(reader)
        elif options.format == JSON:
            # All of it before the first line: where it fails, nothing is half an object.
            found = reader.read_all()
            console.json({"columns": found.column_names, "rows": rows.json_rows(found)})
        else:
            rows.print_table(reader)
    return 0


def _stdin() -> str:
    try:
        text = sys.stdin.read()
    except OSError as error:
        raise Unavailable("standard input", error.strerror or str(error), "give the SQL as an argument") from error
    if text != names.text(text):
        raise UsageError("the SQL on standard input is not UTF-8, or has a NUL in it")
    return text
