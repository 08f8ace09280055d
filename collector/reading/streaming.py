"""A reader of files as a stream for the pipeline: the one place where files meet asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from collector.reading.reader import FileReader
from contracts.interfaces import StreamHeader, StreamItem
from contracts.schema import HookCost


class FileSource:
    """A `contracts.interfaces.Source` over a `FileReader`, at the speed of whoever reads."""

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        self._stop = False

    async def open(self) -> StreamHeader:
        """Open the file. Raises `Unavailable` or `CaptureError`."""
        return self.reader.open()

    async def items(self) -> AsyncIterator[StreamItem]:
        """The reader's items; raises `CaptureError`. Gives way to other tasks after each item."""
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
        """Records that the reader had to leave out."""
        return self.reader.discarded

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Nothing: files do not tell."""
        return self.reader.cost

    @property
    def bytes_read(self) -> int:
        """How far reading has come."""
        return self.reader.bytes_read

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know after reading, one line each."""
        return self.reader.warnings
