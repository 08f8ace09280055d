"""Measuring, observing, recording and replaying as coroutines, which need no console and handle no signal.

A terminal, a web page or a test awaits them in a loop of its own and looks on through callbacks, which are called in
that loop. `stop` ends a run early (`Stop.request`), after what has already happened. `mace.live.session` is the
terminal's way of calling them.

All raise what sources and sinks raise: `Unavailable`, `SourceError`, `StoreError` and other `MaceError`s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from collector.files import Recording
from contracts.config import Config
from contracts.figures import Summary
from contracts.interfaces import Sink, Source, StreamHeader, StreamItem, StreamSink
from contracts.records import Batch
from contracts.results import Results
from contracts.schema import RoundTrips
from contracts.vitals import Account, Publishing, Vitals
from correlator import configured
from mace.live import pipeline
from mace.live.pipeline import Stop
from storage import SINKS, wanted_sinks
from storage.shared import Alone

Until = Callable[[], Awaitable[object]]
"""What a run lasts for, begun when the source is open."""
OnOpen = Callable[[StreamHeader, str], None]
"""Called with the header and with which source was chosen and why, once the source is open."""


def _ignore(*_: object) -> None:
    """Nobody looks."""


async def measure(
    config: Config,
    until: Until,
    *,
    stop: Stop,
    store: Path | None = None,
    tee: StreamSink | None = None,
    publishing: Callable[[], Publishing] | None = None,
    on_open: OnOpen = _ignore,
    on_results: Callable[[Results, Summary], None] = _ignore,
) -> Summary:
    """Live records into the correlator, the store and the sinks that are configured, for as long as `until` takes.

    `tee` gets the raw stream as well; `publishing` says how that goes, where it publishes. `on_results` is told the
    figures so far, too: the summary that is returned in the end.
    """
    source, chosen = live_source(config)
    summary, vitals, opened = Summary(), Vitals(publishing=publishing), asyncio.Event()

    def take(results: Results) -> None:
        summary.add(results)
        on_results(results, summary)

    def begin(header: StreamHeader) -> None:
        on_open(header, chosen)
        opened.set()

    async with _lasting(until, opened, stop):
        await pipeline.run(
            source,
            _sinks(config, store, vitals),
            engine=configured.live(config.correlate),
            stop=stop,
            tee=tee,
            on_results=take,
            on_open=begin,
            vitals=vitals,
        )
    summary.sinks = vitals.accounts
    return summary


async def observe(
    config: Config,
    until: Until,
    on_results: Callable[[Results], None],
    *,
    stop: Stop,
    tee: StreamSink | None = None,
    on_open: OnOpen = _ignore,
) -> StreamHeader:
    """Live records into the correlator, which tells of crossings too; `on_results` sees all that comes of them."""
    source, chosen = live_source(config)
    opened = asyncio.Event()

    def begin(header: StreamHeader) -> None:
        on_open(header, chosen)
        opened.set()

    engine = replace(configured.live(config.correlate), crossings=True, rows=False)
    async with _lasting(until, opened, stop):
        return await pipeline.run(source, [], engine=engine, stop=stop, tee=tee, on_results=on_results, on_open=begin)


async def observe_recording(
    config: Config, recording: Recording, on_results: Callable[[Results, int], None], *, stop: Stop
) -> tuple[StreamHeader, Sequence[str]]:
    """As `observe`, of a recording; `on_results` is told the bytes read so far. Returns the reader's warnings too."""
    source = recording.source()
    engine = replace(configured.replayed(config.correlate), crossings=True, rows=False)
    header = await pipeline.run(
        source, [], engine=engine, stop=stop, on_results=lambda results: on_results(results, source.bytes_read)
    )
    return header, source.warnings


async def watch(config: Config, until: Until, on_item: Callable[[StreamItem], None], *, stop: Stop) -> StreamHeader:
    """Live records to whoever looks at each item as it comes; nothing is computed or kept."""
    source, _ = live_source(config)
    opened = asyncio.Event()

    def look(item: StreamItem) -> None:
        on_item(item)
        opened.set()

    async with _lasting(until, opened, stop):
        return await pipeline.capture(source, _Nowhere(), stop=stop, on_item=look)


async def record(
    config: Config,
    until: Until,
    sink: StreamSink,
    *,
    stop: Stop,
    on_open: Callable[[str], None] = _ignore,
    on_lost: Callable[[int], None] = _ignore,
) -> int:
    """Live records into `sink`, nothing computed. Returns how many the ring lost.

    `on_open` is told which source was chosen and why, `on_lost` after each batch how many records are lost so far.
    """
    source, chosen = live_source(config)
    lost, opened = 0, asyncio.Event()

    def count(item: StreamItem) -> None:
        nonlocal lost
        if not opened.is_set():
            on_open(chosen)
            opened.set()
        if isinstance(item, Batch):
            lost += item.lost
            on_lost(lost)

    async with _lasting(until, opened, stop):
        await pipeline.capture(source, sink, stop=stop, on_item=count)
    return lost


async def replay(
    config: Config,
    recording: Recording,
    *,
    stop: Stop,
    store: Path | None = None,
    on_read: Callable[[int], None] = _ignore,
) -> tuple[Summary, Sequence[str]]:
    """A recording into the correlator and the sinks, as a live stream. Returns the reader's warnings too.

    `on_read` is told the bytes read so far.
    """
    source = recording.source()
    summary, vitals = Summary(), Vitals(live=False)

    def take(results: Results) -> None:
        summary.add(results)
        on_read(source.bytes_read)

    await pipeline.run(
        source,
        _sinks(config, store, vitals),
        engine=configured.replayed(config.correlate),
        stop=stop,
        on_results=take,
        vitals=vitals,
    )
    summary.sinks = vitals.accounts
    return summary, source.warnings


async def deliver(config: Config, header: StreamHeader, trips: RoundTrips) -> dict[str, Account]:
    """Round trips of that stream to the sink that takes them, if it is configured; accounts by name of the sink."""
    if not SINKS["influxdb"].wanted(config):
        return {}
    influx = config.sinks.influxdb
    # A spool of its own: that of a measurement that goes on meanwhile is that one's.
    influx = replace(influx, spool=str(Path(influx.spool) / "round-trips") if influx.spool else "")
    vitals = Vitals(live=False)
    sink = Alone(SINKS["influxdb"].make(replace(config, sinks=replace(config.sinks, influxdb=influx)), vitals))
    async with AsyncExitStack() as opened:
        opened.push_async_callback(sink.aclose)
        await sink.open(header)
        await sink.write(trips)
    return vitals.accounts


def has_servers(config: Config) -> bool:
    """Whether the configuration asks for sinks beside the embedded store."""
    return any(sink.wanted(config) for sink in SINKS.values())


def live_source(config: Config) -> tuple[Source, str]:
    """The live source, and which one it is and why: to be said once it is open, so that an error stands alone."""
    name, why = pipeline.chosen_source(config.capture)
    source = pipeline.live_source(replace(config.capture, source=name), config.run.host)
    return source, f"source {name}" + (f" ({why})" if why else "")


def _sinks(config: Config, store: Path | None, vitals: Vitals) -> list[Sink]:
    """The embedded store, if there is to be one, then those that the configuration asks for."""
    embedded: list[Sink] = []
    if store:
        embedded = [pipeline.embedded_store(config.store, store, rows=config.correlate.rows)]
    return [*embedded, *wanted_sinks(config, vitals)]


@asynccontextmanager
async def _lasting(until: Until, opened: asyncio.Event, stop: Stop) -> AsyncIterator[None]:
    """The end of `until`, which begins once `opened` is set, requests a stop."""

    async def wait() -> None:
        await opened.wait()
        try:
            await until()
        finally:
            stop.request()

    timer = asyncio.create_task(wait())
    try:
        yield
    finally:
        timer.cancel()
        with suppress(asyncio.CancelledError):
            await timer


class _Nowhere:
    """A sink for a stream of which each item has been looked at."""

    async def open(self, header: StreamHeader) -> None:
        """Nothing to do."""

    async def write(self, item: StreamItem) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to do."""
