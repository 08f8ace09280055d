"""One run for a person at a terminal: measure, record or replay, with what is shown meanwhile.

Everything shown here goes to stderr and vanishes; the caller prints what came out of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from rich.console import Console
from rich.live import Live
from rich.text import Text

from collector.files import Recording
from collector.memory import keep_freed_memory
from contracts.config import Config
from contracts.figures import Summary
from contracts.hooks import silent_on
from contracts.interfaces import Sink, Source, StreamHeader, StreamItem, StreamSink
from contracts.names import printable
from contracts.records import Batch
from contracts.schema import Results, RoundTrips
from contracts.vitals import Publishing, Vitals
from correlator import configured
from mace.live import pipeline
from mace.live.pipeline import Stop
from mace.replaying.into_store import How, asked_to_stop, bar, into_store
from mace.replaying.part import RecordedFile
from mace.shown import tables
from mace.shown.terminal import styled, warn
from storage import SINKS, wanted_sinks
from storage.capture import CaptureSink
from storage.shared import Alone

Until = Callable[[], Awaitable[object]]
"""What a measurement lasts for, begun when the source is open."""


class Session:
    """What the three have in common: the configuration, the terminal, and how a run is stopped.

    Each call is a run by itself, to be stopped anew.
    """

    def __init__(self, config: Config, console: Console, *, quiet: bool = False) -> None:
        self._config = config
        self._console = console
        self._quiet = quiet
        self._stop = Stop()
        self._header: StreamHeader | None = None
        """Of what was observed last."""
        keep_freed_memory()

    @property
    def stopped(self) -> bool:
        """Whether the last run was asked to end, by a signal or because what it was for was over."""
        return self._stop.requested

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if not self._quiet:
            self._console.print(styled(text, "dim"))

    def measure(
        self,
        until: Until,
        *,
        store: Path | None,
        tee: StreamSink | None,
        publishing: Callable[[], Publishing] | None = None,
    ) -> Summary:
        """Live records into the correlator, the store and a table on the terminal, for as long as `until` takes.

        `publishing`: how it goes with that, where `tee` publishes.
        """
        self._stop = Stop()
        summary = Summary()
        source, chosen = self._source()
        vitals = Vitals(publishing=publishing)
        sinks = self._sinks(store, vitals)

        async def work() -> None:
            opened = asyncio.Event()
            with self._live() as view:

                def show(results: Results) -> None:
                    summary.add(results)
                    if results.windows and view.auto_refresh:
                        view.update(tables.renderable(summary))

                def begin(header: StreamHeader) -> None:
                    self.say(f"measuring {header.host}, Linux {header.kernel}, {chosen}")
                    if silent := silent_on(header.kernel):
                        self.say(silent)
                    opened.set()

                engine = configured.live(self._config.correlate)
                async with self._timed(until, opened):
                    await pipeline.run(
                        source,
                        sinks,
                        engine=engine,
                        stop=self._stop,
                        tee=tee,
                        on_results=show,
                        on_open=begin,
                        vitals=vitals,
                    )

        asyncio.run(work())
        summary.sinks = vitals.accounts
        return summary

    def observe(self, until: Until, on_results: Callable[[Results], None], *, tee: CaptureSink | None) -> None:
        """Live records into the correlator, which tells of crossings too; `on_results` sees all that comes of them."""
        self._stop = Stop()
        source, chosen = self._source()

        async def work() -> None:
            opened = asyncio.Event()

            def begin(_: StreamHeader) -> None:
                self.say(chosen)
                opened.set()

            engine = replace(configured.live(self._config.correlate), crossings=True, rows=False)
            async with self._timed(until, opened):
                self._header = await pipeline.run(
                    source, [], engine=engine, stop=self._stop, tee=tee, on_results=on_results, on_open=begin
                )

        asyncio.run(work())

    def watch(self, until: Until, on_item: Callable[[StreamItem], None]) -> None:
        """Live records to whoever looks at each item as it comes; nothing is computed or kept."""
        self._stop = Stop()
        source, _ = self._source()

        async def work() -> None:
            opened = asyncio.Event()

            def look(item: StreamItem) -> None:
                on_item(item)
                opened.set()

            async with self._timed(until, opened):
                await pipeline.capture(source, _Nowhere(), stop=self._stop, on_item=look)

        asyncio.run(work())

    def observed(self, recording: Recording, on_results: Callable[[Results], None]) -> None:
        """The same of a recording."""
        self._stop = Stop()
        source = recording.source()
        engine = replace(configured.replayed(self._config.correlate), crossings=True, rows=False)

        async def work(told: Callable[[int, int], None]) -> None:
            def show(results: Results) -> None:
                on_results(results)
                told(source.bytes_read, recording.bytes_total)

            async with self._timed(None, asyncio.Event()):
                self._header = await pipeline.run(source, [], engine=engine, stop=self._stop, on_results=show)

        with bar(self._console, quiet=self._quiet) as told:
            asyncio.run(work(told))
        self._warn(source.warnings)

    def deliver(self, trips: RoundTrips) -> None:
        """Round trips of what was observed last, to the sink that takes them, if it is configured."""
        if self._header is None or not SINKS["influxdb"].wanted(self._config):
            return
        header, influx = self._header, self._config.sinks.influxdb
        # A spool of its own: that of a measurement that goes on meanwhile is that one's.
        influx = replace(influx, spool=str(Path(influx.spool) / "round-trips") if influx.spool else "")
        vitals = Vitals(live=False)
        sinks = replace(self._config.sinks, influxdb=influx)
        sink = Alone(SINKS["influxdb"].make(replace(self._config, sinks=sinks), vitals))

        async def work() -> None:
            async with AsyncExitStack() as opened:
                opened.push_async_callback(sink.aclose)
                await sink.open(header)
                await sink.write(trips)

        asyncio.run(work())
        for name, account in vitals.accounts.items():
            self.say(f"{name}: {account.line()}")

    def record(self, until: Until, sink: CaptureSink) -> int:
        """Live records into a file. Returns how many the ring lost."""
        self._stop = Stop()
        lost = 0
        source, chosen = self._source()

        async def work() -> None:
            opened = asyncio.Event()
            with self._live() as view:

                def count(item: StreamItem) -> None:
                    nonlocal lost
                    if not opened.is_set():
                        self.say(chosen)
                        opened.set()
                    if isinstance(item, Batch):
                        lost += item.lost
                        size = f"{sink.records:,} records, {lost:,} lost, {sink.bytes_written:,} bytes"
                        view.update(Text(printable(f"{sink.path}: {size}")))

                async with self._timed(until, opened):
                    await pipeline.capture(source, sink, stop=self._stop, on_item=count)

        asyncio.run(work())
        return lost

    def replay(self, recordings: Sequence[Recording], *, store: Path | None = None) -> Summary:
        """Recordings, one after the other as given, into the correlator and the sinks, as a live stream."""
        self._stop = Stop()
        whole = Summary()
        engine = configured.replayed(self._config.correlate)
        done = 0

        async def one(recording: Recording, told: Callable[[int, int], None]) -> Summary:
            source = recording.source()
            summary = Summary()

            def show(results: Results) -> None:
                summary.add(results)
                told(done + source.bytes_read, total)

            vitals = Vitals(live=False)
            sinks = self._sinks(store, vitals)
            async with self._timed(None, asyncio.Event()):
                await pipeline.run(source, sinks, engine=engine, stop=self._stop, on_results=show, vitals=vitals)
            summary.sinks = vitals.accounts
            self._warn(source.warnings)
            return summary

        total = sum(each.bytes_total for each in recordings)
        with bar(self._console, quiet=self._quiet) as told:
            for each in recordings:
                if self._stop.requested:
                    break
                whole.merge(asyncio.run(one(each, told)))
                done += each.bytes_total
        return whole

    def replay_into(self, store: str | None, files: Sequence[RecordedFile], **how: Unpack[How]) -> Summary:
        """The same into a store, or on a cluster: in parts, so that it can be stopped and gone on with."""
        engine = configured.replayed(self._config.correlate)
        with asked_to_stop() as stop, bar(self._console, quiet=self._quiet) as told:
            summary, warnings = into_store(files, store, engine, self._config.store, told=told, stop=stop, **how)
        self._warn(warnings)
        return summary

    @property
    def has_servers(self) -> bool:
        """Whether the configuration asks for sinks beside the embedded store."""
        return any(sink.wanted(self._config) for sink in SINKS.values())

    def _warn(self, warnings: Sequence[str]) -> None:
        warn(self._console, warnings)

    def _sinks(self, store: Path | None, vitals: Vitals) -> list[Sink]:
        """The embedded store, if there is to be one, then those that the configuration asks for."""
        rows = self._config.correlate.rows
        embedded: list[Sink] = [pipeline.embedded_store(self._config.store, store, rows=rows)] if store else []
        return [*embedded, *wanted_sinks(self._config, vitals)]

    def _source(self) -> tuple[Source, str]:
        """The live source, and which one it is and why: to be said once it is open, so that an error stands alone."""
        name, why = pipeline.chosen_source(self._config.capture)
        source = pipeline.live_source(replace(self._config.capture, source=name), self._config.run.host)
        return source, f"source {name}" + (f" ({why})" if why else "")

    def _live(self) -> Live:
        return Live(
            console=self._console,
            refresh_per_second=2,
            transient=True,
            auto_refresh=self._console.is_terminal and not self._quiet,
        )

    @asynccontextmanager
    async def _timed(self, until: Until | None, opened: asyncio.Event) -> AsyncIterator[None]:
        """Signals request a stop, and so does the end of `until`, which begins once `opened` is set."""

        async def wait(until: Until) -> None:
            await opened.wait()
            try:
                await until()
            finally:
                self._stop.request()

        async with pipeline.stopped_by_signals(self._stop):
            timer = asyncio.create_task(wait(until)) if until is not None else None
            try:
                yield
            finally:
                if timer is not None:
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
