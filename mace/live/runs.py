"""Coroutines that measure, observe, record and replay. They need no console and handle no signal.

A terminal, a web page or a test awaits them in its own event loop and follows them through callbacks, which are called
in that loop. `stop` ends a run early (`Stop.request`), after the records already captured. `mace.live.session` calls
them for the terminal.

All raise the errors of sources and sinks: `Unavailable`, `SourceError`, `StoreError` and other `MaceError`s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from collector.live.filter import unfiltered
from contracts.config import Config
from contracts.cpus import CpuReadings
from contracts.figures import Summary
from contracts.interfaces import Sink, StreamHeader, StreamItem, StreamSink
from contracts.records import Batch
from contracts.results import Results, Rows, Totals
from contracts.schema import Delays, RoundTrips
from contracts.vitals import Account, Publishing, Vitals
from contracts.windowtable import WindowTable
from correlator import configured
from mace.live import pipeline
from mace.live.cpu_readings import cpu_readings
from mace.live.first import FirstThatOpens
from mace.live.pipeline import Stop
from mace.live.readers import readers
from storage import SINKS, wanted_sinks
from storage.shared import Alone

if TYPE_CHECKING:
    from collector.files import LocalRecording
    from storage.sealing.keys import SealKey  # needs an extra

Until = Callable[[], Awaitable[object]]
"""Returns an awaitable whose end ends the run; it is called when the source is open."""
OnOpen = Callable[[StreamHeader, str], None]
"""Called when the source is open, with the header and a text that names the chosen source and the reason."""


def _ignore(*_: object) -> None:
    """Do nothing: the default callback."""


async def measure(
    config: Config,
    until: Until,
    *,
    stop: Stop,
    store: Path | None = None,
    tee: StreamSink | None = None,
    publishing: Callable[[], Publishing] | None = None,
    seal: SealKey | None = None,
    on_open: OnOpen = _ignore,
    on_results: Callable[[Results, Summary], None] = _ignore,
) -> Summary:
    """Measure live until `until` ends: run the correlator and write to the store and the configured sinks.

    `tee` also gets the raw stream; `publishing` returns its state if it publishes to a broker. `on_results` is called
    with each result and with the figures so far, the same `Summary` that is returned at the end. `seal` seals
    the store.
    """
    source = live_source(config, raw=tee is not None)
    summary, vitals, opened = Summary(), Vitals(publishing=publishing), asyncio.Event()

    def take(results: Results) -> None:
        summary.add(results)
        on_results(results, summary)

    def begin(header: StreamHeader) -> None:
        summary.observed(header.hooks)
        on_open(header, source.told)
        opened.set()

    async with (
        cpu_readings(config.correlate) as cpus,
        readers(config.correlate) as tasks,
        _lasting(until, opened, stop),
    ):
        await pipeline.run(
            source,
            _sinks(config, store, vitals, cpus, seal),
            engine=configured.live(config.correlate),
            stop=stop,
            tee=tee,
            on_results=take,
            on_open=begin,
            vitals=vitals,
            only=lambda results: source.only(results),  # noqa: PLW0108 - known once open
            tasks=tasks,
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
    """Run the correlator live with crossings until `until` ends, and call `on_results` with each result.

    Nothing is stored. A delay over a whole path needs the records of all its devices, so the filter of `[capture]` is
    not applied. Returns the stream's header.
    """
    source = live_source(_unfiltered(config))
    opened = asyncio.Event()

    def begin(header: StreamHeader) -> None:
        on_open(header, source.told)
        opened.set()

    engine = replace(configured.live(config.correlate), crossings=True, rows=False, stages=False, waiting=False)
    async with _lasting(until, opened, stop):
        return await pipeline.run(source, [], engine=engine, stop=stop, tee=tee, on_results=on_results, on_open=begin)


async def observe_recording(
    config: Config, recording: LocalRecording, on_results: Callable[[Results, int], None], *, stop: Stop
) -> tuple[StreamHeader, Sequence[str]]:
    """Run the correlator over a recording with crossings, and call `on_results` with each result and the bytes read.

    Returns the stream's header and the reader's warnings.
    """
    source = recording.source()
    engine = replace(configured.replayed(config.correlate), crossings=True, rows=False, stages=False)
    header = await pipeline.run(
        source, [], engine=engine, stop=stop, on_results=lambda results: on_results(results, source.bytes_read)
    )
    return header, source.warnings


async def watch(config: Config, until: Until, on_item: Callable[[StreamItem], None], *, stop: Stop) -> StreamHeader:
    """Call `on_item` with each item of the live stream until `until` ends; nothing is computed or kept.

    The filter of `[capture]` is not applied, as in `observe`.
    """
    source = live_source(_unfiltered(config))
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
    """Write the live stream to `sink` until `until` ends; returns the number of records that the ring lost.

    `on_open` is called with the chosen source and the reason, `on_lost` after each batch with the lost records so far.
    """
    source = live_source(config, raw=True)
    lost, opened = 0, asyncio.Event()

    def count(item: StreamItem) -> None:
        nonlocal lost
        if not opened.is_set():
            on_open(source.told)
            opened.set()
        if isinstance(item, Batch):
            lost += item.lost
            on_lost(lost)

    async with _lasting(until, opened, stop):
        await pipeline.capture(source, sink, stop=stop, on_item=count)
    return lost


async def replay(
    config: Config,
    recording: LocalRecording,
    *,
    stop: Stop,
    store: Path | None = None,
    on_read: Callable[[int], None] = _ignore,
) -> tuple[Summary, Sequence[str]]:
    """Replay a recording through the correlator to the store and the sinks; returns the figures and warnings.

    `on_read` is called with the bytes read so far.
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
        on_open=lambda header: summary.observed(header.hooks),
        vitals=vitals,
    )
    summary.sinks = vitals.accounts
    return summary, source.warnings


async def deliver(config: Config, header: StreamHeader, trips: RoundTrips) -> dict[str, Account]:
    """Write round trips of the stream with `header` to InfluxDB, if it is configured; returns accounts by sink name."""
    if not SINKS["influxdb"].wanted(config):
        return {}
    influx = config.sinks.influxdb
    # A spool of its own, because a concurrent measurement may hold the configured one.
    influx = replace(influx, spool=str(Path(influx.spool) / "round-trips") if influx.spool else "")
    vitals = Vitals(live=False)
    sink = Alone(SINKS["influxdb"].make(replace(config, sinks=replace(config.sinks, influxdb=influx)), vitals))
    async with AsyncExitStack() as opened:
        opened.push_async_callback(sink.aclose)
        await sink.open(header)
        await sink.write(trips)
    return vitals.accounts


async def keep(config: Config, header: StreamHeader, trips: RoundTrips, totals: Totals, store: Path) -> None:
    """Write round trips of the stream with `header` to a store, as a run with these totals. Raises `StoreError`."""
    sink = pipeline.embedded_store(config.store, store, rows=False, cpus=None)
    await sink.open(header)
    try:
        await sink.write(Results(Rows(Delays.empty(), WindowTable.empty(), ()), totals))
        sink.add_round_trips(trips)
    finally:
        await sink.aclose()


def has_servers(config: Config) -> bool:
    """Return whether sinks other than the embedded store are configured."""
    return any(sink.wanted(config) for sink in SINKS.values())


def live_source(config: Config, *, raw: bool = False) -> FirstThatOpens:
    """Return the configured live source; `raw`: the caller keeps the raw stream."""
    return FirstThatOpens(config.capture, config.run.host, raw=raw)


def _unfiltered(config: Config) -> Config:
    return replace(config, capture=unfiltered(config.capture))


def _sinks(
    config: Config,
    store: Path | None,
    vitals: Vitals,
    cpus: Callable[[], CpuReadings] | None = None,
    seal: SealKey | None = None,
) -> list[Sink]:
    """Return the embedded store, if `store` is given, and the configured sinks.

    `cpus` reads this machine's CPUs, whose readings are stored, too. `seal` seals the embedded store.
    """
    embedded: list[Sink] = []
    if store:
        embedded = [pipeline.embedded_store(config.store, store, rows=config.correlate.rows, cpus=cpus, seal=seal)]
    return [*embedded, *wanted_sinks(config, vitals)]


@asynccontextmanager
async def _lasting(until: Until, opened: asyncio.Event, stop: Stop) -> AsyncIterator[None]:
    """Start `until` when `opened` is set, and request a stop when it ends."""

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
    """A sink that discards the stream."""

    async def open(self, header: StreamHeader) -> None:
        """Nothing to do."""

    async def write(self, item: StreamItem) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to do."""
