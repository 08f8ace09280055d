"""Runs are coroutines without console or signal handlers, and do not block the event loop."""

import asyncio
import signal

import pytest

from collector.files import recording
from contracts.config import Config
from contracts.errors import Unavailable
from mace.live import runs
from mace.live.pipeline import Stop
from storage.query import StoreReader
from tests.places import DOCS

EXAMPLE = DOCS / "example.mace"


@pytest.mark.slow
def test_two_replays_share_a_loop_with_another_task(tmp_path, capfd):
    ticks, read = 0, []

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def both():
        other = asyncio.create_task(tick())
        handler = signal.getsignal(signal.SIGINT)
        found = await asyncio.gather(
            *(
                runs.replay(Config(), recording(EXAMPLE), stop=Stop(), store=tmp_path / name, on_read=read.append)
                for name in ("first", "second")
            )
        )
        other.cancel()
        assert signal.getsignal(signal.SIGINT) is handler
        return found

    (first, warnings), (second, _) = asyncio.run(both())
    assert first.as_dict() == second.as_dict()
    assert not warnings
    assert StoreReader(tmp_path / "first").summary().packets == first.packets > 0
    assert ticks > 10
    assert read[-1] == EXAMPLE.stat().st_size
    assert capfd.readouterr() == ("", "")


def test_a_recording_is_observed_with_its_crossings():
    crossings = []

    async def observe():
        return await runs.observe_recording(
            Config(), recording(EXAMPLE), lambda results, _: crossings.append(len(results.rows.crossings)), stop=Stop()
        )

    header, warnings = asyncio.run(observe())
    assert header == recording(EXAMPLE).header
    assert sum(crossings) > 0
    assert not warnings


@pytest.mark.parametrize("kind", ["measure", "observe", "watch", "record"])
def test_a_live_run_ends_with_its_until(kind, monkeypatch):
    """A live run ends with its `until`. A recording replaces the live source; it ends by itself or on request."""
    source = recording(EXAMPLE).source()
    source.told, source.only = "source made", lambda results: results
    monkeypatch.setattr(runs, "live_source", lambda config, **_: source)
    stop, opened, lasted = Stop(), [], []

    async def until():
        lasted.append(True)
        await asyncio.Event().wait()

    class Kept:
        items = 0

        async def open(self, header):
            assert header.host

        async def write(self, item):
            self.items += 1

        async def aclose(self):
            assert self.items

    calls = {
        "measure": lambda: runs.measure(Config(), until, stop=stop, on_open=lambda *told: opened.append(told[1])),
        "observe": lambda: runs.observe(
            Config(), until, lambda _: None, stop=stop, on_open=lambda *told: opened.append(told[1])
        ),
        "watch": lambda: runs.watch(Config(), until, lambda _: opened.append("source made"), stop=stop),
        "record": lambda: runs.record(Config(), until, Kept(), stop=stop, on_open=opened.append),
    }
    found = asyncio.run(calls[kind]())
    assert opened[0] == "source made"
    assert lasted == [True]
    assert stop.requested
    if kind == "measure":
        assert found.packets == 1_215
    elif kind == "record":
        assert found == 0


def test_what_a_run_is_for_ends_it(monkeypatch):
    monkeypatch.setattr(runs, "live_source", lambda config, **_: recording(EXAMPLE).source())
    stop = Stop()

    async def nothing():
        return None

    asyncio.run(runs.watch(Config(), nothing, lambda _: None, stop=stop))
    assert stop.requested


def test_an_error_reaches_the_awaiting_task(monkeypatch):
    class Absent:
        async def open(self):
            raise Unavailable("source made", "it is not there", "make it")

        async def aclose(self):
            pass

    monkeypatch.setattr(runs, "live_source", lambda *_, **__: Absent())

    async def forever():
        await asyncio.Event().wait()

    with pytest.raises(Unavailable, match="it is not there"):
        asyncio.run(runs.measure(Config(), forever, stop=Stop()))
