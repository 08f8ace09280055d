"""Reads views for many viewers with bounded memory: one query at a time, its answer kept for whoever asks the same."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from contracts.errors import MaceError
from mace.serving.changes import Changes
from mace.shown import views
from mace.shown.views import Asked, View
from storage.query import StoreReader

MEMORY_MIB: Final = 1024
"""Memory limit of a query; a sort beyond it uses the disk."""
SHARE_BESIDE: Final = 0.1
"""CPUs that the views of changes may take, on average, beside a measurement in the same process."""
_MEMORY_BESIDE_MIB: Final = 96
"""Memory limit of a query beside a measurement in the same process."""
_MOST_ROWS: Final = 20_000_000
"""Rows that a view looks for single packets in: ten million take two thirds of a second."""
_MOST_ROWS_BESIDE: Final = 1_000_000
"""Rows beside a measurement in the same process: 10 s of 100,000 events/s."""
_MOST_WARM: Final = 5_000_000
"""Windows that are read before anybody asks: two seconds' work."""
_MOST_WAITING: Final = 16
"""Requests that wait for their turn; DuckDB itself uses all CPUs, so that more at once would not be faster."""
_MOST_KEPT: Final = 64
_MOST_VALUES: Final = 4_000_000
"""Values of all kept views: 250 MB at most, a few MB in practice."""


class Busy(MaceError):
    """Too many requests wait for the store."""


class Reading:
    """A store's reader for several threads. Raises `StoreError` if there is no store, unless it is `made_later`.

    With `made_later` the store is written by this process: queries then use one thread and little memory, and pages
    follow the store as often as `SHARE_BESIDE` allows.
    """

    def __init__(self, store: Path, *, skip_damaged: bool = False, made_later: bool = False) -> None:
        self.path: Final = store
        self.changes: Final = Changes(store, SHARE_BESIDE if made_later else None)
        self._skip_damaged, self._beside = skip_damaged, made_later
        self._reader = None if made_later else self._opened()
        self._lock = threading.Lock()
        self._closed = False
        # The C library keeps freed memory by thread: queries of many threads would hold it many times.
        self._queries = ThreadPoolExecutor(1, "mace-query")
        self._waiting = threading.BoundedSemaphore(_MOST_WAITING)
        self._kept: OrderedDict[tuple[int, str, Asked], tuple[int, View]] = OrderedDict()

    def _opened(self) -> StoreReader:
        threads, memory_mib, most_rows = (
            (1, _MEMORY_BESIDE_MIB, _MOST_ROWS_BESIDE) if self._beside else (None, MEMORY_MIB, _MOST_ROWS)
        )
        return StoreReader(self.path, self._skip_damaged, threads, memory_mib, most_rows)

    def view(self, name: str, asked: Asked) -> View:
        """Return a view (`mace.shown.views.view`). Raises its errors, and `Busy`."""
        with self.reader() as reader:
            number = self.changes.state().number
            reader.keep(number)
            key = (number, name, asked)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][1]
            begin_s = time.monotonic()
            try:
                found = self._queries.submit(views.view, reader, name, asked).result()
            finally:
                # With one thread no more than that; less where other work has the CPU.
                self.changes.spend(time.monotonic() - begin_s)
            self._keep(key, found)
            return found

    @contextmanager
    def reader(self) -> Iterator[StoreReader]:
        """Yield the reader for the block, to one thread at a time. Raises `Busy`."""
        if not self._waiting.acquire(blocking=False):
            raise Busy("too many requests at once; try again in a few seconds")
        try:
            with self._lock:
                if self._closed:
                    raise Busy("the page is closing")
                if self._reader is None:
                    self._reader = self._opened()
                yield self._reader
        finally:
            self._waiting.release()

    def warm(self) -> None:
        """Read what every view needs first, and make the view that viewers open first: it is kept for them.

        A store of months without wide windows is left to whoever asks: closing waits for the query that runs.
        """
        with suppress(MaceError):  # whoever asks for a view is told
            with self.reader() as reader:
                reader.keep(self.changes.state().number)
                reader.runs()
                reader.containers()
                few = reader.windows_without_wide() <= _MOST_WARM
            if few:
                self.view("overview", Asked())

    def close(self) -> None:
        """Wait for the query that runs, and refuse all others.

        The process may end afterwards: ending a thread inside DuckDB would abort it (C++ cannot unwind there).
        """
        with self._lock:
            self._closed = True
            if self._reader is not None:
                self._reader.close()
            self._queries.shutdown()

    def _keep(self, key: tuple[int, str, Asked], found: View) -> None:
        values = sum(map(len, found.columns.values()))
        # An age counts from the newest data, and views of an earlier state are of no use to anybody.
        self._kept = OrderedDict((k, v) for k, v in self._kept.items() if k[0] == key[0])
        self._kept[key] = values, found
        while len(self._kept) > _MOST_KEPT or sum(v for v, _ in self._kept.values()) > _MOST_VALUES:
            self._kept.popitem(last=False)
