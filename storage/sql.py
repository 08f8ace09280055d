"""Runs a user's SQL over a store, read-only: one SELECT, with a view for each table.

DuckDB runs the SQL in memory, with access to the store's directory and no other file of the machine; statements other
than SELECT are refused before they run. A view always has all columns of the present schema, even in a store without
rows; the functions in `_POD_MACROS` return the parts of pods' names. A separate thread runs the query, so that Ctrl-C
and a time limit can end it at any point.
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

from contracts import pods
from contracts.errors import StoreError, UsageError, nearest
from storage import segments, tables
from storage.naming import TABLES, by_newest_name
from storage.query import StoreReader, connected, relation

_T = TypeVar("_T")
_POD_MACROS: Final = {
    "pod_namespace": f"regexp_extract(container, '{pods.SHOWN}', 1)",
    "pod_name": f"regexp_extract(container, '{pods.SHOWN}', 2)",
    "pod_workload": " ".join(
        (
            f"coalesce(nullif(regexp_extract(pod_name(container), '{pods.WORKLOAD}', 1), ''),",
            f"nullif(regexp_extract(pod_name(container), '{pods.WORKLOAD}', 2), ''), pod_name(container))",
        )
    ),
}
"""Functions of a container's name, for Kubernetes pods (`contracts.pods.pod_name`): "" if it is no pod."""
DuckDBType: TypeAlias = Any
"""DuckDB's DuckDBPyType, whose module differs between releases."""
_MISSING: Final = re.compile(r"(?:Table with name|Referenced column|Referenced table) \"?([\w.]+)\"?", re.IGNORECASE)
_ATTEMPTS: Final = 10
MEMORY_MIB: Final = 2048
"""Default memory limit of a query: sums over a billion rows need some tens of MiB; a sort of all rows uses the disk."""
_BATCH_ROWS: Final = 1 << 16
_TURN_S: Final = 0.1
_OUT_OF_MEMORY: Final = "Out of Memory Error"
_FAILURES: Final = (duckdb.Error, pa.ArrowException, OSError)
"""Errors of DuckDB: before the first batch its own, after it through Arrow."""
_LOSSY: Final = frozenset(
    ("bit", "bignum", "geometry", "interval", "time with time zone", "tuple", "uhugeint", "variant")
)
"""DuckDB's types that Arrow cannot carry: half of the numbers of a UHUGEINT become negative, a time of day loses its
zone, others are DuckDB's own bytes. They are converted to DuckDB's text.
"""
_OF_THE_SQL: Final = ("Parser", "Syntax", "Binder", "Catalog", "Conversion", "Out of Range", "Permission")
"""Kinds of errors that no segment causes; after these no damaged segment is searched, which would read all of them."""


@contextmanager
def rows(
    store: StoreReader, sql: str, *, memory_mib: int = MEMORY_MIB, timeout_s: float | None = None
) -> Iterator[pa.RecordBatchReader]:
    """Yield a reader of the result of a SELECT, batch by batch. Tables: those of `storage.tables.COLUMNS`.

    With `store.skip_damaged` the whole result is computed before the block begins, because only then it is known which
    segments can be read. Raises `UsageError` for wrong SQL or no single SELECT, and `StoreError` for a store that
    cannot be read, a query beyond `memory_mib` and the limit of temporary files, and one longer than `timeout_s`.
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
    """Return the whole result of a SELECT. Raises the errors of `rows`."""
    with rows(store, sql) as reader:
        return reader.read_all()


class _Beside:
    """Runs calls of DuckDB in a separate thread, so that a waiting caller can be interrupted and interrupts DuckDB.

    It is a context manager; when it is left, DuckDB has stopped.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, deadline_s: float | None) -> None:
        self._connection, self._deadline_s = connection, deadline_s
        self._thread = ThreadPoolExecutor(1, "mace-query")
        self._call: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Repeated, because DuckDB ignores an interrupt before the call has begun.
        while self._call is not None and not self._call.done():
            self._connection.interrupt()
            wait([self._call], _TURN_S)
        self._thread.shutdown()

    def call(self, function: Callable[[], _T]) -> _T:
        """Run the function and return its result. Raises `StoreError` at the deadline, and the function's errors."""
        self._call = self._thread.submit(function)
        # Short waits: another thread may receive a signal, and its handler runs only when this thread continues.
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
    for macro, expression in _POD_MACROS.items():
        connection.execute(f"CREATE TEMP MACRO {macro}(container) AS {expression}")
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
    # If a segment is gone, this call fails, and not the first batch.
    return asked.to_arrow_reader(_BATCH_ROWS)


def _is_lossy(kind: DuckDBType) -> bool:
    return kind.id in _LOSSY or any(_is_lossy(part) for _, part in _parts(kind))


def _text_where_lossy(kind: DuckDBType) -> str:
    """Return the type in SQL, with VARCHAR for the types that Arrow cannot carry."""
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
    """Return the types that a type consists of, by name, without an array's size and a union's tag."""
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
    """Return DuckDB's error as one line, with the nearest known name for an unknown one."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "^" not in line)
    if said.startswith(_OUT_OF_MEMORY):
        return StoreError(
            f"the query needs more than its memory limit of {memory_mib:,} MiB; raise it with --memory-mib"
        )
    hint = ""
    if missing := _MISSING.search(said):
        said = said.split(" Did you mean")[0].split(" Candidate bindings")[0]
        known = [*tables.COLUMNS, *{c.name for columns in tables.COLUMNS.values() for c in columns}]
        hint = nearest(missing[1], sorted(known))
        if "Table" in said.split(missing[1])[0]:
            hint = nearest(missing[1], tables.COLUMNS) or f"; there are {', '.join(tables.COLUMNS)}"
    return UsageError(f"SQL: {said}{hint}")
