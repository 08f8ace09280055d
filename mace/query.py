"""`mace query`: SQL over what a store holds, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from pyarrow import compute
from rich.console import Console
from rich.table import Table

from mace import config
from mace.errors import StoreError
from mace.summary import plain_table
from storage import sql, tables
from storage.query import Store

SHOWN_ROWS: Final = 1000
"""Rows of a table for people; --json, --csv and --parquet give all."""
_WIDTH_OF_A_PIPE: Final = 200


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `mace query` but `--config` and `--json`."""
    parser.add_argument(
        "sql",
        nargs="?",
        metavar="SQL",
        help="one SELECT; `-` reads it from stdin; without it tables and columns are listed",
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="the store to read")
    parser.add_argument("--skip-damaged", action="store_true", help="read on without damaged segments")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="CSV on stdout, with a header line")
    form.add_argument("--parquet", type=Path, metavar="FILE", help="write a Parquet file instead")


def run(args: argparse.Namespace) -> int:
    """`mace query` with parsed options; its exit status."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_OF_A_PIPE)
    if args.sql is None:
        _list_tables(console, as_json=args.json)
        return 0
    store = Store(args.store or Path(config.load(args.config).store.path), skip_damaged=args.skip_damaged)
    text = sys.stdin.read() if args.sql == "-" else args.sql
    with sql.rows(store, text) as reader:
        if args.parquet:
            _write_parquet(reader, args.parquet)
        elif args.csv:
            with pc.CSVWriter(pa.PythonFile(sys.stdout.buffer, mode="w"), _flat(reader.schema)) as writer:
                for batch in reader:
                    writer.write_table(_flattened(pa.Table.from_batches([batch])))
            sys.stdout.buffer.flush()
        elif args.json:
            found = reader.read_all()
            console.out(
                json.dumps({"columns": found.column_names, "rows": json_rows(found)}, separators=(",", ":")),
                highlight=False,
            )
        else:
            _print(reader, console)
    return 0


def json_rows(found: pa.Table) -> list[list[Any]]:
    """Rows as JSON has them: times as ISO 8601 with nanoseconds, what JSON does not know as text."""
    columns = [_plain(column).to_pylist() for column in found.columns]
    return [[_value(v) for v in row] for row in zip(*columns, strict=True)] if columns else []


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_timestamp(kind) or pa.types.is_decimal(kind):
        # Python's times have no nanoseconds.
        text = column.cast(pa.int64()) if _is_whole(kind) else column.cast(pa.string())
        if pa.types.is_timestamp(kind) and kind.tz:
            text = compute.replace_substring_regex(text, r"^(\S+) (\S+?)(Z|[+]00:?00)$", r"\1T\2Z")
        return text
    return column


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_decimal(kind) and kind.scale == 0)


def _value(value: Any) -> Any:
    if isinstance(value, float) and value != value:  # noqa: PLR0124 (nan)
        return None
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value if isinstance(value, str | int | float | bool | list | dict | type(None)) else str(value)


def _flat(schema: pa.Schema) -> pa.Schema:
    """As CSV can hold it: lists as text."""
    return pa.schema(
        [pa.field(f.name, pa.string() if pa.types.is_nested(f.type) else _unnamed(f.type)) for f in schema]
    )


def _unnamed(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _flattened(found: pa.Table) -> pa.Table:
    columns = []
    for column in found.columns:
        if pa.types.is_nested(column.type):
            columns.append(pa.array([None if v is None else json.dumps(v) for v in column.to_pylist()], pa.string()))
        else:
            columns.append(column.cast(_unnamed(column.type)))
    return pa.Table.from_arrays(columns, schema=_flat(found.schema))


def _write_parquet(reader: pa.RecordBatchReader, path: Path) -> None:
    try:
        with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error


def _print(reader: pa.RecordBatchReader, console: Console) -> None:
    shown = Table(box=None, pad_edge=False, header_style="underline")
    for field in reader.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        shown.add_column(field.name, justify="right" if number else "left", no_wrap=number)
    count = 0
    for batch in reader:
        for row in json_rows(pa.Table.from_batches([batch])):
            count += 1
            if count <= SHOWN_ROWS:
                shown.add_row(*("" if v is None else f"{v:,.6g}" if isinstance(v, float) else str(v) for v in row))
    console.print(shown)
    more = (
        f", the first {SHOWN_ROWS:,} of them here; --json, --csv and --parquet give all" if count > SHOWN_ROWS else ""
    )
    console.print(f"[dim]{count:,} rows{more}[/]")


def _list_tables(console: Console, *, as_json: bool) -> None:
    if as_json:
        found = {
            name: [{"name": c.name, "type": str(c.type), "meaning": c.meaning} for c in columns]
            for name, columns in tables.COLUMNS.items()
        }
        console.out(json.dumps({"tables": found}, separators=(",", ":")), highlight=False)
        return
    for name, columns in tables.COLUMNS.items():
        shown = plain_table(name)
        shown.add_column("column", no_wrap=True)
        shown.add_column("type", no_wrap=True)
        shown.add_column("meaning")
        for c in columns:
            shown.add_row(c.name, str(_unnamed(c.type)), c.meaning)
        console.print(shown, "")
