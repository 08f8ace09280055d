"""The channel with a slow, a cancelled and a closed peer."""

import asyncio

import pytest

from contracts.channel import Channel, ClosedError


def test_order_and_end():
    async def work():
        channel = Channel(2)

        async def send():
            for i in range(10):
                await channel.send(i)
            await channel.close()

        task = asyncio.create_task(send())
        found = [item async for item in channel]
        await task
        return found, channel.peak

    assert asyncio.run(work()) == (list(range(10)), 2)


def test_a_clogged_receiver_blocks_the_sender():
    async def work():
        channel = Channel(3)
        sender = asyncio.create_task(_fill(channel, 100))
        await asyncio.sleep(0.01)
        waiting = not sender.done()
        sender.cancel()
        return waiting, channel.peak

    assert asyncio.run(work()) == (True, 3)


def test_a_sender_gets_an_error_when_the_receiver_is_gone():
    async def work():
        channel = Channel(1)
        sender = asyncio.create_task(_fill(channel, 100))
        async for _ in channel:
            break
        # The generator's clean-up runs when the generator is dropped; the sender's next wake-up raises the error.
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await asyncio.wait_for(sender, 5)

    asyncio.run(work())


def test_a_closed_channel_takes_nothing():
    async def work():
        channel = Channel(1)
        await channel.close()
        with pytest.raises(ClosedError):
            await channel.send(1)

    asyncio.run(work())


def test_a_channel_without_room_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Channel(0)


async def _fill(channel, count):
    for i in range(count):
        await channel.send(i)
