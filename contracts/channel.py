"""A bounded channel between two tasks that can be closed from the sending side.

Channels are short on purpose: items that wait here have left the kernel's ring and take memory. A full channel holds
the reader back, so that the pressure reaches the ring, which counts the records that it has no room for.
(`asyncio.Queue.shutdown` needs Python 3.13.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ClosedError(Exception):
    """A task sent into a channel whose receiver has stopped, or into a closed channel."""


class Channel(Generic[T]):
    """First in, first out, at most `size` items; one sender, one receiver, one event loop."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a channel holds at least one item, not {size}")
        self._size = size
        self._items: deque[T] = deque()
        self._changed = asyncio.Condition()
        self._closed = False
        self._abandoned = False
        self.peak = 0
        """Largest number of items that have waited at once."""

    async def send(self, item: T) -> None:
        """Wait for room, then append. Raises `ClosedError` once the receiver has stopped."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._abandoned or len(self._items) < self._size)
            if self._abandoned or self._closed:
                raise ClosedError
            self._items.append(item)
            self.peak = max(self.peak, len(self._items))
            self._changed.notify_all()

    async def close(self) -> None:
        """Close the sending side: the receiver gets the items that wait, then the iteration ends."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield items until the channel is closed and empty. A receiver that leaves early abandons the channel."""
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._items or self._closed)
                    if not self._items:
                        return
                    item = self._items.popleft()
                    self._changed.notify_all()
                yield item
        finally:
            self._abandoned = True
            async with self._changed:
                self._changed.notify_all()
