"""Keeps the raw stream's last seconds in bounded memory, and writes a recording from any moment on.

    source ──items──► KeptStream ──► memory: the batches of the last seconds
                          └────────► CaptureSink, while a recording runs

Both begin with the newest topology before their first record, so that each is a stream of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from contracts.errors import MaceError, StoreError
from contracts.interfaces import Progress, StreamHeader, StreamItem
from contracts.records import Batch
from contracts.topology import Topology
from storage.capture import CaptureSink

_LOG: Final = logging.getLogger(__name__)
KEPT_S: Final = 10
"""Seconds of the stream that are kept."""
MOST_RECORDS: Final = 1 << 20
"""Most records that are kept: 64 MiB with content. At 100,000 records a second these are ten seconds."""
_NS: Final = 1_000_000_000


@dataclass(slots=True)
class KeptStream:
    """A `StreamSink` for `mace.live.runs.measure`. Its coroutines run in the measurement's event loop."""

    _header: StreamHeader | None = None
    _items: deque[Batch | Topology] = field(default_factory=deque)
    _records: int = 0
    _before: Topology | None = None
    """The topology that holds before the first kept item."""
    _newest: Topology | None = None
    _since_ns: int = 0
    """Time from which all records are kept."""
    _upto_ns: int = 0
    _sink: CaptureSink | None = None
    finished: list[CaptureSink] = field(default_factory=list)
    """Sinks of the recordings that ended without an error."""

    async def open(self, header: StreamHeader) -> None:
        """Begin with the stream of this header."""
        self._header = header

    async def write(self, item: StreamItem) -> None:
        """Keep an item, and write it to the recording. A recording that fails ends, with a warning in the log."""
        if isinstance(item, Topology):
            self._newest = item
            self._items.append(item)
        elif isinstance(item, Progress):
            self._reached(item.upto_ns)
        elif len(item):
            self._since_ns = self._since_ns or int(item.ts_ns[0])
            self._items.append(item)
            self._records += len(item)
            self._reached(int(item.ts_ns[-1]))
        if self._sink is not None:
            await self._written(self._sink, item)

    async def aclose(self) -> None:
        """End the recording, if one runs."""
        if self._sink is not None:
            await self.end_recording()

    @property
    def seconds(self) -> float:
        """Length of the stretch of the stream that is kept whole, s."""
        return max(self._upto_ns - self._since_ns, 0) / _NS if self._since_ns else 0.0

    @property
    def recording(self) -> CaptureSink | None:
        """The running recording."""
        return self._sink

    def kept(self) -> tuple[StreamHeader, tuple[Batch | Topology, ...]]:
        """Return the header and the kept items. Raises `StoreError` if no record is kept."""
        if self._header is None or not self._records:
            raise StoreError("no packet was recorded in the last seconds: there is nothing to write")
        before = (self._before,) if self._before is not None else ()
        return self._header, (*before, *self._items)

    async def begin_recording(self, path: Path) -> None:
        """Write all further items to a new capture file. Raises `StoreError`."""
        if self._sink is not None:
            raise StoreError(f"{self._sink.path} is being recorded already")
        if self._header is None:
            raise StoreError("the stream has not begun")
        sink = CaptureSink(path)
        written: Topology | None = None
        try:
            await sink.open(self._header)
            # Devices may change while the file is written.
            while (newest := self._newest) is not None and newest is not written:
                await sink.write(newest)
                written = newest
        except BaseException:
            await sink.aclose()
            raise
        self._sink = sink

    async def end_recording(self) -> CaptureSink:
        """Complete the recording's file and return its sink. Raises `StoreError`."""
        sink, self._sink = self._sink, None
        if sink is None:
            raise StoreError("nothing is being recorded")
        await sink.aclose()
        self.finished.append(sink)
        return sink

    async def _written(self, sink: CaptureSink, item: StreamItem) -> None:
        try:
            await sink.write(item)
        except MaceError as error:
            if self._sink is not sink:
                return  # `end_recording` has closed it meanwhile
            self._sink = None
            _LOG.warning("the recording has ended: %s", error)
            await sink.aclose()

    def _reached(self, upto_ns: int) -> None:
        """Forget what is older than `KEPT_S`, or too much."""
        self._upto_ns = max(self._upto_ns, upto_ns)
        oldest_ns = self._upto_ns - KEPT_S * _NS
        while self._items:
            first = self._items[0]
            if isinstance(first, Batch):
                if int(first.ts_ns[-1]) >= oldest_ns and self._records <= MOST_RECORDS:
                    break
                self._records -= len(first)
                self._since_ns = max(self._since_ns, int(first.ts_ns[-1]) + 1)
            elif len(self._items) == 1:
                break
            else:
                self._before = first
            self._items.popleft()
        self._since_ns = max(self._since_ns, oldest_ns) if self._since_ns else 0
