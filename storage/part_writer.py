"""Writes the rows of one part of a replay to Parquet files, which become segments when the part is committed.

No reader reads the files before that, and an abandoned attempt leaves only its folder. Memory is bounded by two row
groups, one being filled and one being encoded, and by the open files: those of the hours written to last. An hour that
is written to after its file was closed gets another file, and all files of an hour are joined at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Self

import pyarrow as pa

from contracts.arrays import Ints
from contracts.cpus import StagePlace
from contracts.errors import StoreError
from contracts.interfaces import StreamHeader
from contracts.schema import Delays
from contracts.topology import Device
from contracts.windowtable import WindowTable
from storage import tables
from storage.checksum import SegmentWriter
from storage.joining import Joiner
from storage.places import Place
from storage.segments import by_hour

_OPEN_FILES: Final = 32
"""Most open files. A recording's rows are nearly in time order, so they need two hours of three tables at most."""
MOST_HOURS: Final = 10_000
"""Most hours with rows in one part: more than a year. Each hour has its own files, and a capture of some kilobytes can
claim one packet per hour for a century."""
_WAITING_BINS: Final = 1 << 20
"""Most histogram bins of windows that wait for their row group: 16 MiB."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete file that waits for its commit."""

    table: str
    hour: int
    rows: int
    name: str
    """Name of the file in the place."""


@dataclass(slots=True)
class _File:
    """The files of one table and hour: the open one, if there is one, and the names of all."""

    opened: ExitStack | None = None
    writer: Any = None
    names: list[str] = field(default_factory=list)
    rows: int = 0

    def close(self) -> None:
        if self.opened is not None:
            opened, self.opened, self.writer = self.opened, None, None
            opened.close()


class PartWriter:
    """Writer of one attempt at one part; a context manager. Raises `StoreError` if it cannot write."""

    def __init__(self, place: Place, folder: str, header: StreamHeader, *, overlap: bool) -> None:
        """`overlap`: a second thread encodes while the caller goes on computing."""
        self._place, self._folder, self._header = place, folder, header
        self._files: dict[tuple[str, int], _File] = {}
        self._open: dict[tuple[str, int], _File] = {}
        """The open files; the one written to last is last."""
        self._delays: list[Delays] = []
        self._waiting_rows = 0
        self._windows: list[WindowTable] = []
        self._waiting_bins = 0
        self._stages: list[WindowTable] = []
        self._places: tuple[StagePlace, ...] = ()
        self._devices: tuple[Device, ...] = ()
        self._encoder = ThreadPoolExecutor(1, "mace-part") if overlap else None
        self._encoding: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._encoder is not None:
            self._encoder.shutdown(wait=True)
        if kind is not None:
            try:
                with ExitStack() as opened:
                    for file in self._open.values():
                        opened.callback(file.close)
            finally:
                self._place.remove(self._folder)

    def add(self, delays: Delays, windows: WindowTable, devices: tuple[Device, ...]) -> None:
        """Add rows and windows, whose device indices refer to `devices`."""
        self._devices = devices
        if len(delays):
            self._delays.append(delays)
            self._waiting_rows += len(delays)
        if len(windows):
            self._windows.append(windows)
            self._waiting_bins += len(windows.bins)
        if self._waiting_rows >= tables.ROW_GROUP_ROWS:
            self._write_delays()
        if self._waiting_bins >= _WAITING_BINS:
            self._write_windows()

    def add_stages(self, stages: WindowTable, places: tuple[StagePlace, ...], devices: tuple[Device, ...]) -> None:
        """Add counts of stages, whose indices refer to `places`, and these to `devices`."""
        if not len(stages):
            return
        self._places, self._devices = places, devices
        self._stages.append(stages)
        self._waiting_bins += len(stages.bins)
        if self._waiting_bins >= _WAITING_BINS:
            self._write_windows()

    def close(self) -> list[Staged]:
        """Write the waiting rows and complete all files; returns the files."""
        self._write_delays()
        self._write_windows()
        self._wait()
        try:
            while self._open:
                self._close_one()
            for (table, _), file in self._files.items():
                if len(file.names) > 1:
                    self._join(table, file)
        except OSError as error:
            raise self._cannot(error) from error
        return [Staged(*key, file.rows, *file.names) for key, file in sorted(self._files.items())]

    def _write_delays(self) -> None:
        if not self._waiting_rows:
            return
        parts, devices = self._delays, self._devices
        self._delays, self._waiting_rows = [], 0

        def work() -> None:
            delays = Delays.concatenate(parts)
            self._append_by_hour("delays", delays.utc_ns, tables.delays_table(self._header, delays, devices))

        self._do(work)

    def _write_windows(self) -> None:
        windows, stages = WindowTable.concatenate(self._windows), WindowTable.concatenate(self._stages)
        places, devices = self._places, self._devices
        self._windows, self._stages, self._waiting_bins = [], [], 0

        def work() -> None:
            if len(windows):
                table = tables.windows_table(self._header, windows, devices)
                self._append_by_hour("windows", windows.column("start_utc_ns"), table)
            if len(stages):
                table = tables.stages_table(self._header, tables.StageRows(stages, places, devices))
                self._append_by_hour("stages", stages.column("start_utc_ns"), table)

        self._do(work)

    def _do(self, work: Callable[[], None]) -> None:
        if self._encoder is None:
            work()
            return
        self._wait()
        self._encoding = self._encoder.submit(work)

    def _wait(self) -> None:
        if self._encoding is not None:
            encoding, self._encoding = self._encoding, None
            encoding.result()

    def _append_by_hour(self, table: str, utc_ns: Ints, rows: pa.Table) -> None:
        for hour, chosen in by_hour(utc_ns):
            self._append(table, hour, rows if chosen is None else rows.take(chosen))

    def _append(self, table: str, hour: int, rows: pa.Table) -> None:
        key = (table, hour)
        if key not in self._files and len(self._files) >= 3 * MOST_HOURS:
            raise StoreError(
                f"{self._place.location}: one recording has rows of more than {MOST_HOURS:,} hours: check its clock"
            )
        file = self._files.setdefault(key, _File())
        try:
            if file.writer is None:
                if len(self._open) >= _OPEN_FILES:
                    self._close_one()
                self._begin(table, file, f"{self._folder}/{table}-{hour}-{len(file.names)}.parquet")
            file.writer.write(tables.to_stored(rows), tables.ROW_GROUP_ROWS)
        except OSError as error:
            raise self._cannot(error) from error
        file.rows += len(rows)
        self._open.pop(key, None)
        self._open[key] = file

    def _begin(self, table: str, file: _File, name: str) -> None:
        with ExitStack() as opened:
            # Entered after the sink, so that the writer is closed before the file.
            sink = opened.enter_context(self._place.sink(name))
            options = tables.parquet_options(table)
            file.writer = opened.enter_context(SegmentWriter(sink, tables.STORED_SCHEMAS[table], **options))
            file.opened = opened.pop_all()
        file.names.append(name)

    def _close_one(self) -> None:
        self._open.pop(next(iter(self._open))).close()

    def _join(self, table: str, file: _File) -> None:
        """Join the row groups of an hour's files in one file."""
        names, joined = file.names, file.names[0].removesuffix(".parquet") + "-joined.parquet"
        with self._place.sink(joined) as sink, Joiner(sink, tables.nothing_encoded(table)) as joiner:
            for name in names:
                joiner.add(self._place.read(name) or b"")
        file.names = [joined]
        for name in names:
            self._place.remove(name)

    def _cannot(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._place.location}: cannot write: {error.strerror or error}; the parts committed before stay"
            " readable: free space, then continue with --resume"
        )
