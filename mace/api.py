"""The Python API: what a notebook or a script of a user's own calls. docs/python-api.md tells it with examples.

`open` gives a `Recording` for a file and a `Store` for a directory. Rows come as Arrow tables, from which pandas and
Polars take them without a copy of their own where they can; nothing here needs either.
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
from mace.replaying.part import PartTask, reading
from storage import sql, tables
from storage.query import Filter
from storage.query import Store as StoreReader

TIMEOUT_MS: Final = 500
"""A packet's next record comes within this, or its life is over; as `[correlate] timeout_ms` of the configuration."""


class Recording:
    """A recorded file of any format, on disk or at a URL. Nothing is kept in memory: each iteration reads it anew."""

    def __init__(
        self,
        location: Path | str,
        *,
        salvage: bool = False,
        topology: Path | str | None = None,
        buffer: str = "",
        clock: str = "",
    ) -> None:
        """Options as those of `mace replay`. Raises `Unavailable` or `CaptureError`."""
        options = FileOptions(salvage, Path(topology) if topology is not None else None, buffer, clock)
        [self._file] = files_at([str(location) if is_url(location) else Path(location)], options)
        self._told = str(location)
        self.warnings: list[str] = []
        """What the last complete reading had to say: damage, a missing end."""

    def __repr__(self) -> str:
        header = self.header
        return f"<mace.Recording {self._told}: {self.format}, {header.source} on {header.host}, run {header.run}>"

    @property
    def format(self) -> str:
        """Name of the file's format."""
        return self._file.format

    @property
    def header(self) -> StreamHeader:
        """Host, kernel, clock, hooks."""
        return self._file.header

    def items(self) -> Iterator[Topology | Batch]:
        """The stream: topologies, and batches of records in the order of time. Raises `CaptureError`."""
        task = PartTask(0, 0, self._file, EngineConfig(), None, None, None, None, "")
        with reading(task) as reader:
            yield from reader.items()
            self.warnings = list(reader.warnings)

    def batches(self) -> Iterator[Batch]:
        """Records: numpy columns of equal length, as `contracts.records.Batch` says; raises `CaptureError`."""
        return (item for item in self.items() if isinstance(item, Batch))

    def topologies(self) -> Iterator[Topology]:
        """What the host's devices are, whenever it changed."""
        return (item for item in self.items() if isinstance(item, Topology))

    def results(self, *, timeout_ms: int = TIMEOUT_MS, rows: bool = True) -> Iterator[Results]:
        """What the correlator says, stretch by stretch (`contracts.results.Results`); without `rows` windows only."""
        config = EngineConfig(timeout_ns=timeout_ms * 1_000_000, slice_ns=REPLAY_SLICE_NS, rows=rows)
        task = PartTask(0, 0, self._file, config, None, None, None, None, "")
        with reading(task) as reader:
            feeder = Feeder(Engine(self.header.clock.offset_ns, config), lambda: reader.discarded)
            yield from feeder.run(reader.items())
            self.warnings = list(reader.warnings)

    def delay_batches(self, *, timeout_ms: int = TIMEOUT_MS) -> Iterator[pa.Table]:
        """Rows, a table each stretch: bounded memory for recordings of any length. Columns `storage.tables.DELAYS`."""
        for results in self.results(timeout_ms=timeout_ms):
            if len(results.rows.delays):
                yield tables.delays_table(self.header, results.rows.delays, results.rows.devices)

    def delays(self, columns: Sequence[str] = (), *, timeout_ms: int = TIMEOUT_MS) -> pa.Table:
        """All rows, one per packet and segment (all columns, or those named). Raises `StoreError` for a wrong name."""
        known = [c.name for c in tables.DELAYS]
        for name in columns:
            if name not in known:
                raise StoreError(f"no column {name!r} in delays{nearest(name, known)}; there are {', '.join(known)}")
        chosen = list(columns) or known
        parts = [table.select(chosen) for table in self.delay_batches(timeout_ms=timeout_ms)]
        return _whole(parts, tables.SCHEMAS["delays"], chosen)

    def windows(self, *, timeout_ms: int = TIMEOUT_MS) -> pa.Table:
        """All windows. Columns `storage.tables.WINDOWS`."""
        parts = [
            tables.windows_table(self.header, results.rows.windows, results.rows.devices)
            for results in self.results(timeout_ms=timeout_ms, rows=False)
            if len(results.rows.windows)
        ]
        return _whole(parts, tables.SCHEMAS["windows"], [c.name for c in tables.WINDOWS])

    def summary(self, *, timeout_ms: int = TIMEOUT_MS) -> Summary:
        """Figures per device and container, and the ledger: what `mace replay` prints."""
        found = Summary()
        for results in self.results(timeout_ms=timeout_ms, rows=False):
            found.add(results)
        return found

    def store(
        self, directory: Path | str, *, timeout_ms: int = TIMEOUT_MS, resume: bool = False, cluster: str | None = None
    ) -> Store:
        """Keep rows and windows in a store, as `mace replay --store`; the store, to ask. Raises `StoreError`."""
        return store([self], directory, timeout_ms=timeout_ms, resume=resume, cluster=cluster)


class Store(StoreReader):
    """A store: all of `storage.query.Store`, and SQL."""

    def __init__(self, path: Path | str, *, skip_damaged: bool = False) -> None:
        super().__init__(Path(path), skip_damaged)

    def sql(self, query: str) -> pa.Table:
        """One SELECT over `delays`, `windows`, `ledger`, `runs`, `cost`. Raises `UsageError` or `StoreError`."""
        return sql.table(self, query)


def store(
    recordings: Sequence[Recording],
    directory: Path | str,
    *,
    timeout_ms: int = TIMEOUT_MS,
    resume: bool = False,
    cluster: str | None = None,
) -> Store:
    """Replay recordings of one host or many into one store; see `Recording.store`."""
    config = EngineConfig(timeout_ns=timeout_ms * 1_000_000, slice_ns=REPLAY_SLICE_NS)
    files = sorted((each._file for each in recordings), key=lambda one: (one.first_utc_ns, one.name))
    into_store(files, str(directory), config, StoreConfig(), resume=resume, cluster=cluster)
    return Store(directory)


def open(location: Path | str, **options: Any) -> Recording | Store:  # noqa: A001 (as `mace.open`, like gzip's)
    """A file as a `Recording`, a directory as a `Store`; `options` are theirs."""
    if not is_url(location) and Path(location).is_dir():
        return Store(location, **options)
    return Recording(location, **options)


def _whole(parts: Sequence[pa.Table], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """One table with one dictionary for each column of names."""
    if not parts:
        return schema.empty_table().select(list(columns))
    return pa.concat_tables(parts).unify_dictionaries()


__all__ = ["Filter", "Recording", "Store", "open", "store"]
