"""SQL of a user's own over a store, read-only: one SELECT, with a view for each table.

DuckDB runs it in memory, with access to the store's directory and to nothing else of the machine; statements other than
SELECT are refused before they are run. A view always has all columns of today's schema, also of a store without rows.
It runs in a thread of its own, so that Ctrl-C and a time limit end it wherever it is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Self, TypeAlias, TypeVar

import duckdb
import pyarrow as pa

from contracts.errors import StoreError, UsageError, nearest
from storage import segments, tables
from storage.naming import TABLES, by_newest_name
from storage.query import StoreReader, connected, relation

_T = TypeVar("_T")
DuckDBType: TypeAlias = Any
"""DuckDB's DuckDBPyType, which each release has in another module."""
_MISSING: Final = re.compile(r"(?:Table with name|Referenced column|Referenced table) \"?([\w.]+)\"?", re.IGNORECASE)
_ATTEMPTS: Final = 10
MEMORY_MIB: Final = 2048
"""What a query may take by itself: sums over a billion rows need some tens of MiB, a sort of all goes to the disk."""
_BATCH_ROWS: Final = 1 << 16
_TURN_S: Final = 0.1
_OUT_OF_MEMORY: Final = "Out of Memory Error"
_FAILURES: Final = (duckdb.Error, pa.ArrowException, OSError)
"""How DuckDB says that it cannot: before the first batch, and after it through Arrow."""
_LOSSY: Final = frozenset(
    ("bit", "bignum", "geometry", "interval", "time with time zone", "tuple", "uhugeint", "variant")
)
"""DuckDB's types that do not survive the way through Arrow: of a UHUGEINT half its numbers become negative, a time of
day loses its zone, others are DuckDB's own bytes. They come as DuckDB's text.
"""
_OF_THE_SQL: Final = ("Parser", "Syntax", "Binder", "Catalog", "Conversion", "Out of Range", "Permission")
"""Kinds of errors that no segment is the cause of: looking for a damaged one takes reading them all."""


@contextmanager
def rows(
    store: StoreReader, sql: str, *, memory_mib: int = MEMORY_MIB, timeout_s: float | None = None
) -> Iterator[pa.RecordBatchReader]:
    """What a SELECT gives, batch by batch, within the block. Tables: those of `storage.tables.COLUMNS`.

    With `store.skip_damaged` it is computed whole before the block begins, because only then it is known which segments
    can be read. Raises `UsageError` for SQL that is wrong or no single SELECT, `StoreError` for a store that cannot be
    read and a query that takes more than `memory_mib` and what it may write to the disk, or longer than `timeout_s`.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    for _ in range(_ATTEMPTS):
        live = {table: store.whole_segments(table) for table in segments.TABLES}
        paths = [segment.path for found in live.values() for segment in found]
        with connected(store.threads, memory_mib) as connection, _Beside(connection, deadline_s) as beside:
            try:
                reader = beside.call(partial(_asked, connection, store, live, sql))
                if store.skip_damaged:
                    reader = beside.call(reader.read_all).to_reader(_BATCH_ROWS)
            except _FAILURES as error:
                if not _is_of_the_sql(error) and store.blame(paths, error):
                    continue
                raise _told(error, memory_mib) from error

            def batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
                try:
                    while (batch := beside.call(partial(next, reader, None))) is not None:
                        yield batch
                except _FAILURES as error:
                    if not _is_of_the_sql(error) and store.blame(paths, error):  # noqa: B023
                        raise StoreError(f"{store.path}: a segment vanished while it was read; try again") from error
                    raise _told(error, memory_mib) from error

            yield pa.RecordBatchReader.from_batches(reader.schema, batches(reader))
            return
    raise StoreError(f"{store.path}: segments vanished {_ATTEMPTS} times while they were read; try again")


def table(store: StoreReader, sql: str) -> pa.Table:
    """All that a SELECT gives. Raises as `rows`."""
    with rows(store, sql) as reader:
        return reader.read_all()


class _Beside:
    """Calls of DuckDB in a thread of their own. Whoever waits for one can be interrupted, and then so is DuckDB.

    A context manager; DuckDB does nothing any more when it is left.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, deadline_s: float | None) -> None:
        self._connection, self._deadline_s = connection, deadline_s
        self._thread = ThreadPoolExecutor(1, "mace-query")
        self._call: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # An interrupt that comes before the call has begun is forgotten.
        while self._call is not None and not self._call.done():
            self._connection.interrupt()
            wait([self._call], _TURN_S)
        self._thread.shutdown()

    def call(self, function: Callable[[], _T]) -> _T:
        """What the function returns. Raises `StoreError` at the deadline, and what it raises."""
        self._call = self._thread.submit(function)
        # In turns: a signal may have gone to another thread, and its handler runs when this one does something.
        while not wait([self._call], _TURN_S).done:
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                raise StoreError("the query took longer than --timeout allows")
        found: _T = self._call.result()
        return found


def _asked(
    connection: duckdb.DuckDBPyConnection, store: StoreReader, live: dict[str, list[segments.SegmentFile]], sql: str
) -> pa.RecordBatchReader:
    containers = store.containers()
    for table, found in live.items():
        rows = relation(connection, table, found)
        rows = by_newest_name(rows, containers) if table in TABLES else rows
        connection.execute(f"CREATE TEMP VIEW {table} AS FROM {rows}")
    connection.execute("SET allowed_directories = [$path]", {"path": str(store.path.absolute())})
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    asked: Any = connection.sql(_only_select(connection, sql))
    if any(_is_lossy(kind) for kind in asked.types):
        names = [f"c{number}" for number in range(len(asked.columns))]
        columns = ", ".join(
            f"CAST({name} AS {_text_where_lossy(kind)}) AS {_quoted(column)}"
            if _is_lossy(kind)
            else f"{name} AS {_quoted(column)}"
            for name, kind, column in zip(names, asked.types, asked.columns, strict=True)
        )
        asked = asked.query("asked", f"SELECT {columns} FROM asked AS asked({', '.join(names)})")
    # Fails here, and not at the first batch, if a segment is gone.
    return asked.to_arrow_reader(_BATCH_ROWS)


def _is_lossy(kind: DuckDBType) -> bool:
    return kind.id in _LOSSY or any(_is_lossy(part) for _, part in _parts(kind))


def _text_where_lossy(kind: DuckDBType) -> str:
    """The type in SQL, with text in place of what Arrow cannot carry."""
    if kind.id in _LOSSY:
        return "VARCHAR"
    parts = {name: _text_where_lossy(part) for name, part in _parts(kind)}
    match kind.id:
        case "list":
            return f"{parts['child']}[]"
        case "array":
            return f"{parts['child']}[{dict(kind.children)['size']}]"
        case "map":
            return f"MAP({parts['key']}, {parts['value']})"
        case "struct" | "union":
            return f"{kind.id}({', '.join(f'{_quoted(name)} {part}' for name, part in parts.items())})"
    return str(kind)


def _parts(kind: DuckDBType) -> list[tuple[str, DuckDBType]]:
    """The types that a type is made of, by name; of an array without its size, of a union without its tag."""
    if kind.id not in {"struct", "list", "map", "array", "union"}:
        return []
    return [(name, part) for name, part in kind.children if name and not isinstance(part, int)]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _only_select(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise UsageError(f"{len(statements)} SQL statements: expected one")
    kind = str(statements[0].type).rpartition(".")[2]
    if kind not in {"SELECT", "SELECT_STATEMENT"}:
        raise UsageError(f"a store is only read: expected a SELECT, found {kind}")
    return statements[0].query


def _is_of_the_sql(error: Exception) -> bool:
    return str(error).startswith((*(f"{kind} Error" for kind in _OF_THE_SQL), _OUT_OF_MEMORY))


def _told(error: Exception, memory_mib: int) -> UsageError | StoreError:
    """DuckDB's error in one line, with the nearest name of ours where a name is wrong."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "^" not in line)
    if said.startswith(_OUT_OF_MEMORY):
        return StoreError(
            f"the query needs more than the {memory_mib:,} MiB that it may take: --memory-mib allows more"
        )
    hint = ""
    if missing := _MISSING.search(said):
        said = said.split(" Did you mean")[0].split(" Candidate bindings")[0]
        known = [*tables.COLUMNS, *{c.name for columns in tables.COLUMNS.values() for c in columns}]
        hint = nearest(missing[1], sorted(known))
        if "Table" in said.split(missing[1])[0]:
            hint = nearest(missing[1], tables.COLUMNS) or f"; there are {', '.join(tables.COLUMNS)}"
    return UsageError(f"SQL: {said}{hint}")
