"""SQL of a user's own over a store, read-only: one SELECT, with a view for each table.

DuckDB runs it in memory, with access to the store's directory and to nothing else of the machine; statements other than
SELECT are refused before they are run. A view always has all columns of today's schema, also of a store without rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import duckdb
import pyarrow as pa

from mace.errors import StoreError, UsageError, nearest
from storage import segments, tables
from storage.query import Store, connected, relation

_MISSING: Final = re.compile(r"(?:Table with name|Referenced column|Referenced table) \"?([\w.]+)\"?", re.IGNORECASE)
_ATTEMPTS: Final = 10


@contextmanager
def rows(store: Store, sql: str) -> Iterator[pa.RecordBatchReader]:
    """What a SELECT gives, batch by batch, within the block. Tables: those of `storage.tables.COLUMNS`.

    Raises `UsageError` for SQL that is wrong or no single SELECT, `StoreError` for a store that cannot be read.
    """
    for _ in range(_ATTEMPTS):
        live = {table: store.whole_segments(table) for table in segments.TABLES}
        with connected(store.threads) as connection:
            for table, found in live.items():
                connection.execute(f"CREATE TEMP VIEW {table} AS FROM {relation(connection, table, found)}")
            connection.execute("SET allowed_directories = [$path]", {"path": str(store.path.absolute())})
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            statement = _only_select(connection, sql)
            try:
                asked = connection.sql(statement)
                # Fails here, and not at the first batch, if a segment is gone.
                reader = pa.RecordBatchReader.from_stream(asked)
            except duckdb.Error as error:
                gone = any(not s.path.exists() for found in live.values() for s in found)
                if gone:
                    continue  # merging or retention was faster: list again
                raise _told(error) from error
            try:
                yield reader
            except (duckdb.Error, pa.ArrowInvalid, OSError) as error:
                raise _told(error) from error
            return
    raise StoreError(f"{store.path}: segments vanished {_ATTEMPTS} times while they were read; try again")


def table(store: Store, sql: str) -> pa.Table:
    """All that a SELECT gives. Raises as `rows`."""
    with rows(store, sql) as reader:
        return reader.read_all()


def _only_select(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise _told(error) from error
    if len(statements) != 1:
        raise UsageError(f"{len(statements)} SQL statements: expected one")
    kind = str(statements[0].type).rpartition(".")[2]
    if kind not in {"SELECT", "SELECT_STATEMENT"}:
        raise UsageError(f"a store is only read: expected a SELECT, found {kind}")
    return statements[0].query


def _told(error: Exception) -> UsageError:
    """DuckDB's error in one line, with the nearest name of ours where a name is wrong."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "^" not in line)
    hint = ""
    if missing := _MISSING.search(said):
        said = said.split(" Did you mean")[0].split(" Candidate bindings")[0]
        known = [*tables.COLUMNS, *{c.name for columns in tables.COLUMNS.values() for c in columns}]
        hint = nearest(missing[1], sorted(known))
        if "Table" in said.split(missing[1])[0]:
            hint = nearest(missing[1], tables.COLUMNS) or f"; there are {', '.join(tables.COLUMNS)}"
    return UsageError(f"SQL: {said}{hint}")
