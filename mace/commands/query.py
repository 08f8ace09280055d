"""`mace query`: SQL over what a store holds, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from pyarrow import compute

from contracts import config, names, strict_json
from contracts.errors import StoreError, Unavailable, UsageError
from mace.shown import json_values
from mace.shown.terminal import PlainTable, complaint, json_line, output, styled
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
    parser.add_argument(
        "--memory-mib",
        type=_memory,
        default=sql.MEMORY_MIB,
        metavar="N",
        help=f"what the query may take (default {sql.MEMORY_MIB}); what does not fit goes to a directory of its own",
    )
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="end a query that takes longer, in seconds")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="CSV on stdout, with a header line")
    form.add_argument("--parquet", type=Path, metavar="FILE", help="write a Parquet file instead")


def _memory(text: str) -> int:
    if not 16 <= (mib := int(text)) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text}: expected 16 to {1 << 20}")
    return mib


def _seconds(text: str) -> float:
    # Written so that nan, which compares false, is refused.
    if not 0 < (seconds := float(text)) <= 1e9:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return seconds


def run(args: argparse.Namespace) -> int:
    """`mace query` with parsed options; its exit status."""
    if args.sql is None:
        _list_tables(as_json=args.json)
        return 0
    store = Store(args.store or Path(config.load(args.config).store.path), skip_damaged=args.skip_damaged)
    text = _stdin() if args.sql == "-" else args.sql
    with sql.rows(store, text, memory_mib=args.memory_mib, timeout_s=args.timeout) as reader:
        if store.damaged:
            complaint(f"{len(store.damaged)} damaged segments ({store.rows_damaged():,} rows) were skipped")
        if args.parquet:
            _write_parquet(reader, args.parquet)
        elif args.csv:
            _write_csv(reader)
        elif args.json:
            # All of it before the first line: where it fails, nothing is half an object.
            found = reader.read_all()
            json_line({"columns": found.column_names, "rows": json_rows(found)})
        else:
            _print(reader)
    return 0


def json_rows(found: pa.Table) -> list[tuple[Any, ...]]:
    """Rows as JSON has them (`mace.shown.json_values`)."""
    return list(json_values.rows(found))


def _stdin() -> str:
    try:
        text = sys.stdin.read()
    except OSError as error:
        raise Unavailable("standard input", error.strerror or str(error), "give the SQL as an argument") from error
    if text != names.text(text):
        raise UsageError("the SQL on standard input is not UTF-8, or has a NUL in it")
    return text


def _write_csv(reader: pa.RecordBatchReader) -> None:
    """Numbers as they are, everything else as JSON has it, names as on a terminal: a line is a row.

    A cell that begins with an equals sign stays so, though a spreadsheet may take it for a formula: a sign before it
    would change the name for every program that reads it. docs/store.md says how to import it as text.
    """
    numbers = [_is_number(field.type) for field in reader.schema]
    kinds = [field.type if plain else pa.string() for field, plain in zip(reader.schema, numbers, strict=True)]
    headings = map(names.printable, reader.schema.names)
    schema = pa.schema([pa.field(name, kind) for name, kind in zip(headings, kinds, strict=True)])
    with pc.CSVWriter(pa.PythonFile(sys.stdout.buffer, mode="w"), schema) as writer:
        for batch in reader:
            columns = [
                _finite(column) if plain else pa.array(map(_cell, json_values.column(column)), pa.string())
                for column, plain in zip(batch.columns, numbers, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    sys.stdout.buffer.flush()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _finite(values: pa.Array) -> pa.Array:
    return compute.if_else(compute.is_finite(values), values, None) if pa.types.is_floating(values.type) else values


def _cell(value: Any) -> str | None:
    if value is None:
        return None
    return names.printable(strict_json.dumps(value, spaced=True) if isinstance(value, list | dict) else str(value))


def _write_parquet(reader: pa.RecordBatchReader, path: Path) -> None:
    try:
        with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error
    except pa.ArrowNotImplementedError as error:
        raise StoreError(f"{path}: a type that Parquet does not have ({error}): cast that column in the SQL") from error


def _print(reader: pa.RecordBatchReader) -> None:
    shown = PlainTable()
    for field in reader.schema:
        number = _is_number(field.type)
        shown.add_column(field.name, justify="right" if number else "left", no_wrap=number)
    count = 0
    for batch in reader:
        for row in json_values.rows(batch.slice(0, max(SHOWN_ROWS - count, 0))):
            shown.add_row(*(f"{v:,.6g}" if isinstance(v, float) else _cell(v) or "" for v in row))
        count += len(batch)
    console = output(_WIDTH_OF_A_PIPE)
    console.print(shown)
    more = (
        f", the first {SHOWN_ROWS:,} of them here; --json, --csv and --parquet give all" if count > SHOWN_ROWS else ""
    )
    console.print(styled(f"{count:,} rows{more}", "dim"))


def _list_tables(*, as_json: bool) -> None:
    if as_json:
        found = {
            name: [{"name": c.name, "type": str(c.type), "meaning": c.meaning} for c in columns]
            for name, columns in tables.COLUMNS.items()
        }
        json_line({"tables": found})
        return
    console = output(_WIDTH_OF_A_PIPE)
    for name, columns in tables.COLUMNS.items():
        shown = PlainTable(name)
        shown.add_column("column", no_wrap=True)
        shown.add_column("type", no_wrap=True)
        shown.add_column("meaning")
        for c in columns:
            kind = c.type.value_type if pa.types.is_dictionary(c.type) else c.type
            shown.add_row(c.name, str(kind), c.meaning)
        console.print(shown, "")
