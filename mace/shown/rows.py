"""Prints the rows of a query as a table, JSON or CSV, writes them as Parquet, and lists the tables of a store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from pyarrow import compute

from contracts import names, strict_json
from contracts.errors import StoreError
from mace.shown import json_values
from mace.shown.lines import json_line
from mace.shown.terminal import PlainTable, output, styled
from storage import tables

SHOWN_ROWS: Final = 1000
"""Most rows of a table for people; the other formats have all rows."""
_WIDTH_OF_A_PIPE: Final = 200


def json_rows(found: pa.Table) -> list[tuple[Any, ...]]:
    """Return the rows as JSON values (`mace.shown.json_values`)."""
    return list(json_values.rows(found))


def write_csv(reader: pa.RecordBatchReader, file: BinaryIO | None = None) -> None:
    """Write the rows to a file, by default standard output, as CSV, one line per row.

    Numbers are written unchanged, other values as in JSON, and control characters in names are escaped. A cell that
    begins with an equals sign is written so, although a spreadsheet may take it for a formula: a character before it
    would change the name for every program that reads it. docs/store.md says how to import it as text.
    """
    numbers = [_is_number(field.type) for field in reader.schema]
    kinds = [field.type if plain else pa.string() for field, plain in zip(reader.schema, numbers, strict=True)]
    headings = map(names.printable, reader.schema.names)
    schema = pa.schema([pa.field(name, kind) for name, kind in zip(headings, kinds, strict=True)])
    to = sys.stdout.buffer if file is None else file
    with pc.CSVWriter(pa.PythonFile(to, mode="w"), schema) as writer:
        for batch in reader:
            columns = [
                _finite(column) if plain else pa.array(map(_cell, json_values.column(column)), pa.string())
                for column, plain in zip(batch.columns, numbers, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    to.flush()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _finite(values: pa.Array) -> pa.Array:
    return compute.if_else(compute.is_finite(values), values, None) if pa.types.is_floating(values.type) else values


def _cell(value: Any) -> str | None:
    if value is None:
        return None
    return names.printable(strict_json.dumps(value, spaced=True) if isinstance(value, list | dict) else str(value))


def write_parquet(reader: pa.RecordBatchReader, path: Path) -> None:
    """Write all rows to one Parquet file. Raises `StoreError` if that fails or Parquet lacks a column's type."""
    try:
        with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error
    except pa.ArrowNotImplementedError as error:
        raise StoreError(
            f"{path}: Parquet lacks the type of a column ({error}): cast that column in the SQL"
        ) from error


def print_table(reader: pa.RecordBatchReader) -> None:
    """Print the first `SHOWN_ROWS` rows as a table for people, and the number of rows."""
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
    more = f", the first {SHOWN_ROWS:,} shown; --format csv or --parquet gives all" if count > SHOWN_ROWS else ""
    console.print(styled(f"{count:,} rows{more}", "dim"))


def list_tables(*, as_json: bool) -> None:
    """Print each table of a store with its columns, their types and meanings."""
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
