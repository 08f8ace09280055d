"""The correlator as a task: channel in, engine, channel out. All that is asynchronous about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from dataclasses import replace

from contracts.channel import Channel
from contracts.interfaces import Progress, StreamItem
from contracts.schema import HookCost, Results
from correlator.engine import Engine


async def correlate(
    items: AsyncIterable[StreamItem],
    engine: Engine,
    results: Channel[Results],
    discarded: Callable[[], int],
    cost: Callable[[], tuple[HookCost, ...]] = lambda: (),
) -> None:
    """Feed the stream to the engine until it ends, send on what comes out, and close the channel.

    `discarded` tells how many records the source has thrown away; the ledger carries it from here on.
    `cost` tells what observing has cost; the results carry it.
    """

    async def send(result: Results) -> None:
        await results.send(replace(result, ledger=replace(result.ledger, discarded=discarded()), cost=cost()))

    async for item in items:
        for result in engine.advance(item.upto_ns) if isinstance(item, Progress) else engine.pieces(item):
            await send(result)
        # The engine never waits; other tasks must get their turn also when the channels have room.
        await asyncio.sleep(0)
    await send(engine.finish())
    await results.close()
