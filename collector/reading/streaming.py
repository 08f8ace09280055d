"""Adapts a reader of files to the pipeline: the only module in which readers of files use asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from collector.reading.reader import FileReader
from contracts.interfaces import StreamHeader, StreamItem
from contracts.schema import HookCost


class FileSource:
    """A `contracts.interfaces.Source` over a `FileReader`; it reads as fast as its consumer requests items."""

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        self._stop = False

    async def open(self) -> StreamHeader:
        """Open the file. Raises `Unavailable` or `CaptureError`."""
        return self.reader.open()

    async def items(self) -> AsyncIterator[StreamItem]:
        """Yield the reader's items, and let other tasks run after each; raises `CaptureError`."""
        for item in self.reader.items():
            yield item
            await asyncio.sleep(0)
            if self._stop:
                return

    def request_stop(self) -> None:
        """End after the current item."""
        self._stop = True

    async def aclose(self) -> None:
        """Close the file."""
        self.reader.close()

    @property
    def discarded(self) -> int:
        """Records that the reader had to omit."""
        return self.reader.discarded

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Empty: files do not contain the cost of observing."""
        return self.reader.cost

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self.reader.bytes_read

    @property
    def warnings(self) -> Sequence[str]:
        """Warnings for the user after reading, one line each."""
        return self.reader.warnings
