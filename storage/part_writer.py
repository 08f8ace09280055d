"""Writes the rows of one part of a replay into Parquet files: segments, once it is committed.

Nobody reads them where they lie; an attempt that was given up leaves nothing but its folder. Memory is bounded by two
row groups, one that is filled and one that is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa

from mace.errors import StoreError
from mace.interfaces import StreamHeader
from mace.schema import Delays, Window
from mace.topology import Device
from storage import tables
from storage.checksum import SegmentWriter
from storage.places import Place
from storage.segments import HOUR_NS

_WAITING_BINS: Final = 1 << 20
"""Histogram bins of windows that may wait for their row group: 16 MiB."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A whole file that waits to be committed."""

    table: str
    hour: int
    rows: int
    name: str
    """In the place."""


class PartWriter:
    """One attempt at one part; a context manager. Raises `StoreError` if it cannot write."""

    def __init__(self, place: Place, folder: str, header: StreamHeader, *, overlap: bool) -> None:
        """`overlap`: encode in a thread while the caller computes on."""
        self._place, self._folder, self._header = place, folder, header
        self._files: dict[tuple[str, int], tuple[Any, str]] = {}
        self._rows: dict[tuple[str, int], int] = {}
        self._opened = ExitStack()
        self._delays: list[Delays] = []
        self._waiting_rows = 0
        self._windows: list[Window] = []
        self._waiting_bins = 0
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
                self._opened.close()
            finally:
                self._place.remove(self._folder)

    def add(self, delays: Delays, windows: Sequence[Window], devices: tuple[Device, ...]) -> None:
        """Take rows; `devices` is what they point to."""
        self._devices = devices
        if len(delays):
            self._delays.append(delays)
            self._waiting_rows += len(delays)
        self._windows.extend(windows)
        self._waiting_bins += sum(len(w.bins) for w in windows)
        if self._waiting_rows >= tables.ROW_GROUP_ROWS:
            self._write_delays()
        if self._waiting_bins >= _WAITING_BINS:
            self._write_windows()

    def close(self) -> list[Staged]:
        """Write what waits; all files are whole then."""
        self._write_delays()
        self._write_windows()
        self._wait()
        try:
            self._opened.close()
        except OSError as error:
            raise self._cannot(error) from error
        return [Staged(*key, self._rows[key], name) for key, (_, name) in sorted(self._files.items())]

    def _write_delays(self) -> None:
        if not self._waiting_rows:
            return
        parts, devices = self._delays, self._devices
        self._delays, self._waiting_rows = [], 0

        def work() -> None:
            delays = Delays.concatenate(parts)
            hours = delays.utc_ns // HOUR_NS
            for hour in np.unique(hours).tolist():
                here = delays if hours[0] == hours[-1] and (hours == hour).all() else delays[hours == hour]
                self._append("delays", hour, tables.delays_table(self._header, here, devices))

        self._do(work)

    def _write_windows(self) -> None:
        if not self._windows:
            return
        windows, devices = self._windows, self._devices
        self._windows, self._waiting_bins = [], 0

        def work() -> None:
            by_hour: dict[int, list[Window]] = {}
            for window in windows:
                by_hour.setdefault(window.start_utc_ns // HOUR_NS, []).append(window)
            for hour, here in by_hour.items():
                self._append("windows", hour, tables.windows_table(self._header, here, devices))

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

    def _append(self, table: str, hour: int, rows: pa.Table) -> None:
        key = (table, hour)
        try:
            if key not in self._files:
                name = f"{self._folder}/{table}-{hour}.parquet"
                # The writer's end comes before the file's.
                file = self._opened.enter_context(self._place.sink(name))
                options = tables.parquet_options(table)
                writer = self._opened.enter_context(SegmentWriter(file, tables.SCHEMAS[table], **options))
                self._files[key], self._rows[key] = (writer, name), 0
            self._files[key][0].write(rows, tables.ROW_GROUP_ROWS)
        except OSError as error:
            raise self._cannot(error) from error
        self._rows[key] += len(rows)

    def _cannot(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._place.location}: cannot write: {error.strerror or error}; what was committed before stays"
            " readable: free space, then go on with --resume"
        )
