"""The end of a run, by its time or by signals."""

import asyncio
import signal
from types import SimpleNamespace

import pytest

from contracts.errors import SourceError
from contracts.interfaces import Progress
from correlator.engine import EngineConfig
from mace.live import pipeline
from tests.made_capture import HEADER


def test_signal_handlers_are_restored():
    """SIGTERM removes a lab around a measurement, also after the measurement has ended."""
    told = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in numbers}

    async def measure(number):
        asked = asyncio.Event()
        async with pipeline.stopped_by_signals(SimpleNamespace(interrupt=asked.set)):
            signal.raise_signal(number)
            async with asyncio.timeout(30):
                await asked.wait()
        assert told == []

    try:
        for number in numbers:
            asyncio.run(measure(number))
            signal.raise_signal(number)
            assert told.pop() == number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Draining:
    """A source that still yields items after it was asked to stop."""

    def __init__(self):
        self.begun, self.asked, self.drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.discarded, self.cost = 0, ()

    async def open(self):
        return HEADER

    async def items(self):
        self.begun.set()
        await self.asked.wait()
        await self.drained.wait()
        yield Progress(1)

    def request_stop(self):
        self.asked.set()

    async def aclose(self):
        pass


@pytest.mark.parametrize(("signals", "cut_off"), [(0, False), (1, False), (2, True)])
def test_only_the_second_signal_ends_a_run_at_once(signals, cut_off):
    async def measure():
        source, stop = Draining(), pipeline.Stop()
        work = asyncio.create_task(pipeline.run(source, [], engine=EngineConfig(), stop=stop))
        await source.begun.wait()
        stop.request()
        for _ in range(signals):
            stop.interrupt()
        if not cut_off:
            source.drained.set()
        async with asyncio.timeout(30):
            await work

    if cut_off:
        with pytest.raises(SourceError, match="by a second signal"):
            asyncio.run(measure())
    else:
        asyncio.run(measure())
