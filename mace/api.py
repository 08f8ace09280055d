"""The Python API for notebooks and scripts; docs/python-api.md has examples.

`open` returns a `Recording` for a file and a `Store` for a directory. Rows are returned as Arrow tables, which pandas
and Polars read without a copy where the column type allows it; neither library is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from collector.files import FileOptions
from collector.reading.opening import is_url
from contracts.config import StoreConfig
from contracts.errors import StoreError, nearest
from contracts.figures import Summary
from contracts.interfaces import StreamHeader
from contracts.records import Batch
from contracts.results import Results
from contracts.topology import Topology
from correlator.configured import REPLAY_SLICE_NS
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from mace.replaying.into_store import files_at, into_store
from mace.replaying.jobs import usable
from mace.replaying.part import PartTask, reading
from storage import sql, tables
from storage.query import Filter, StoreReader

TIMEOUT_MS: Final = 500
"""A packet without a further record for this long is complete; the default of `[correlate] timeout_ms`."""


class Recording:
    """A recorded file of any format, on disk or at a URL. Each method reads the file anew; nothing stays in memory."""

    def __init__(
        self,
        location: Path | str,
        *,
        salvage: bool = False,
        topology: Path | str | None = None,
        buffer: str = "",
        clock: str = "",
    ) -> None:
        """Open the file. The options mean what they mean for `mace replay`. Raises `Unavailable` or `CaptureError`."""
        options = FileOptions(salvage, Path(topology) if topology is not None else None, buffer, clock)
        [self._file] = files_at([str(location) if is_url(location) else Path(location)], options)
        self._told = str(location)
        self.warnings: list[str] = []
        """Warnings of the last complete reading, such as damaged parts or a missing end."""

    def __repr__(self) -> str:
        header = self.header
        return f"<mace.Recording {self._told}: {self.format}, {header.source} on {header.host}, run {header.run}>"

    @property
    def format(self) -> str:
        """Name of the file's format."""
        return self._file.format

    @property
    def header(self) -> StreamHeader:
        """The recording's host, kernel, clock and hooks."""
        return self._file.header

    def items(self) -> Iterator[Topology | Batch]:
        """Yield the stream: topologies, and batches of records in time order. Raises `CaptureError`."""
        task = PartTask(0, 0, self._file, EngineConfig(), None, None, None, None, "")
        with reading(task) as reader:
            yield from reader.items()
            self.warnings = list(reader.warnings)

    def batches(self) -> Iterator[Batch]:
        """Yield records in time order, in batches of numpy columns (`contracts.records.Batch`); raises `CaptureError`.

        The columns of a batch have equal length.
        """
        return (item for item in self.items() if isinstance(item, Batch))

    def topologies(self) -> Iterator[Topology]:
        """Yield the host's network devices: once at the start, and again after each change. Raises `CaptureError`."""
        return (item for item in self.items() if isinstance(item, Topology))

    def results(self, *, timeout_ms: int = TIMEOUT_MS, rows: bool = True) -> Iterator[Results]:
        """Yield the correlator's results, one `contracts.results.Results` per stretch; without `rows` windows only."""
        config = EngineConfig(timeout_ns=timeout_ms * 1_000_000, slice_ns=REPLAY_SLICE_NS, rows=rows)
        task = PartTask(0, 0, self._file, config, None, None, None, None, "")
        with reading(task) as reader:
            feeder = Feeder(Engine(self.header.clock.offset_ns, config), lambda: reader.discarded)
            yield from feeder.run(reader.items())
            self.warnings = list(reader.warnings)

    def delay_batches(self, *, timeout_ms: int = TIMEOUT_MS) -> Iterator[pa.Table]:
        """Yield one table of rows per stretch, in bounded memory for any length. Columns: `storage.tables.DELAYS`."""
        for results in self.results(timeout_ms=timeout_ms):
            if len(results.rows.delays):
                yield tables.delays_table(self.header, results.rows.delays, results.rows.devices)

    def delays(self, columns: Sequence[str] = (), *, timeout_ms: int = TIMEOUT_MS) -> pa.Table:
        """Return all rows, one per packet and segment, with the named columns or all of them.

        Columns: `storage.tables.DELAYS`. Raises `StoreError` for an unknown column, `CaptureError` for a damaged file.
        """
        known = [c.name for c in tables.DELAYS]
        for name in columns:
            if name not in known:
                raise StoreError(f"no column {name!r} in delays{nearest(name, known)}; there are {', '.join(known)}")
        chosen = list(columns) or known
        parts = [table.select(chosen) for table in self.delay_batches(timeout_ms=timeout_ms)]
        return _whole(parts, tables.SCHEMAS["delays"], chosen)

    def windows(self, *, timeout_ms: int = TIMEOUT_MS) -> pa.Table:
        """Return all windows as one table. Columns: `storage.tables.WINDOWS`."""
        parts = [
            tables.windows_table(self.header, results.rows.windows, results.rows.devices)
            for results in self.results(timeout_ms=timeout_ms, rows=False)
            if len(results.rows.windows)
        ]
        return _whole(parts, tables.SCHEMAS["windows"], [c.name for c in tables.WINDOWS])

    def summary(self, *, timeout_ms: int = TIMEOUT_MS) -> Summary:
        """Return the figures per device and container, and the ledger, which `mace replay` prints."""
        found = Summary()
        found.observed(self.header.hooks)
        for results in self.results(timeout_ms=timeout_ms, rows=False):
            found.add(results)
        return found

    def store(
        self,
        directory: Path | str,
        *,
        timeout_ms: int = TIMEOUT_MS,
        resume: bool = False,
        cluster: str | None = None,
        jobs: int | None = None,
    ) -> Store:
        """Write rows and windows to a store, as `mace replay --store` does; return the store. Raises `StoreError`."""
        return store([self], directory, timeout_ms=timeout_ms, resume=resume, cluster=cluster, jobs=jobs)


class Store(StoreReader):
    """A store: all of `storage.query.StoreReader`, and SQL."""

    def __init__(self, path: Path | str, *, skip_damaged: bool = False) -> None:
        super().__init__(Path(path), skip_damaged)

    def sql(self, query: str) -> pa.Table:
        """Run one SELECT over the tables of `storage.tables.COLUMNS`. Raises `UsageError` or `StoreError`."""
        return sql.table(self, query)


def store(
    recordings: Sequence[Recording],
    directory: Path | str,
    *,
    timeout_ms: int = TIMEOUT_MS,
    resume: bool = False,
    cluster: str | None = None,
    jobs: int | None = None,
) -> Store:
    """Replay recordings of one or more hosts into one store, as `mace replay --store` does. Raises `StoreError`.

    `resume` continues a replay into this store that was stopped. `cluster` is the address of a Dask scheduler, or
    `local:N` for N processes on this machine; without it `jobs` processes work (default: as for `mace replay`).
    """
    config = EngineConfig(timeout_ns=timeout_ms * 1_000_000, slice_ns=REPLAY_SLICE_NS)
    files = sorted((each._file for each in recordings), key=lambda one: (one.first_utc_ns, one.name))
    into_store(files, str(directory), config, StoreConfig(), resume=resume, cluster=cluster, jobs=jobs or usable())
    return Store(directory)


def open(location: Path | str, **options: Any) -> Recording | Store:  # noqa: A001 (as `mace.open`, like gzip's)
    """Open a file or URL as a `Recording`, a directory as a `Store`; `options` are those of that class."""
    if not is_url(location) and Path(location).is_dir():
        return Store(location, **options)
    return Recording(location, **options)


def _whole(parts: Sequence[pa.Table], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Join the parts into one table, with one dictionary for each dictionary-encoded column."""
    if not parts:
        return schema.empty_table().select(list(columns))
    return pa.concat_tables(parts).unify_dictionaries()


__all__ = ["Filter", "Recording", "Store", "open", "store"]
