"""The stage adds the source's discarded records and cost to the engine's results."""

import asyncio

from contracts.channel import Channel
from contracts.hooks import Hook
from contracts.interfaces import Progress
from contracts.records import Batch
from contracts.schema import HookCost
from contracts.topology import Topology
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from correlator.stage import correlate


def test_every_result_carries_the_sources_counts():
    calls = iter(range(1, 100))

    async def stream():
        yield Topology(0, 1)
        for second in (1, 2, 3):
            ts = second * 10**9
            yield Batch.of(1, ts_ns=[ts], skb_id=[second], hook=[Hook.NETIF_RX])
            yield Progress(ts + 999_999_999)

    async def main():
        results = Channel(100)
        await correlate(
            stream(),
            Feeder(Engine(0, EngineConfig()), lambda: 7, lambda: (HookCost(Hook.NETIF_RX, next(calls), 0, 0),)),
            results,
        )
        return [result async for result in results]

    found = asyncio.run(main())
    assert len(found) > 1
    assert [result.totals.ledger.discarded for result in found] == [7] * len(found)
    assert [result.totals.cost[0].calls for result in found] == list(range(1, len(found) + 1))
