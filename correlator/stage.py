"""The correlator as a task: channel in, engine, channel out. All that is asynchronous about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable

from contracts.channel import Channel
from contracts.interfaces import StreamItem
from contracts.results import Results
from correlator.feeder import Feeder


async def correlate(items: AsyncIterable[StreamItem], feeder: Feeder, results: Channel[Results]) -> None:
    """Feed the stream to the engine until it ends, send the results on, and close the channel."""
    async for item in items:
        for completed in feeder.take(item):
            await results.send(completed)
        # The engine never waits; other tasks must get their turn also when the channels have room.
        await asyncio.sleep(0)
    await results.send(feeder.finish())
    await results.close()
