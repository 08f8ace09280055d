"""A plain, synchronous reader of a file as a stream: what the sources over files share of their lifecycle."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator

from contracts.interfaces import StreamItem
from contracts.schema import HookCost


class PlainReader(ABC):
    """Makes the stream of a `FileSource` out of `read`, at the speed of whoever reads."""

    _stop = False

    @abstractmethod
    def read(self) -> Iterator[StreamItem]:
        """The stream without the asyncio shell; after `open`. Raises `CaptureError`."""

    async def items(self) -> AsyncIterator[StreamItem]:
        """The stream; raises `CaptureError`. Gives way to other tasks after each item."""
        for item in self.read():
            yield item
            await asyncio.sleep(0)
            if self._stop:
                return

    def request_stop(self) -> None:
        """End after the current item."""
        self._stop = True

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Nothing: files do not tell."""
        return ()
