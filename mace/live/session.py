"""Runs for a person at a terminal: measures, records or replays, and shows the progress.

The progress goes to stderr and vanishes; the caller prints the result. `mace.live.runs` has what a run does.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

from rich.console import Console
from rich.live import Live
from rich.text import Text

from collector.memory import keep_freed_memory
from contracts.config import Config
from contracts.figures import Summary
from contracts.hooks import silent_on
from contracts.interfaces import StreamHeader, StreamItem, StreamSink
from contracts.names import printable
from contracts.results import Results, Totals
from contracts.schema import RoundTrips
from contracts.vitals import Publishing
from correlator import configured
from mace.live import pipeline, runs
from mace.live.pipeline import Stop
from mace.live.runs import Until
from mace.replaying.progress import asked_to_stop, bar
from mace.shown import tables
from mace.shown.terminal import styled, warn
from storage.capture import CaptureSink

if TYPE_CHECKING:
    from collector.files import LocalRecording
    from mace.replaying.into_store import How
    from mace.replaying.part import RecordedFile
    from storage.sealing.keys import SealKey  # needs an extra

T = TypeVar("T")


class Session:
    """Runs with one configuration on one terminal; Ctrl-C and SIGTERM stop a run.

    Each method call is a separate run.
    """

    def __init__(self, config: Config, console: Console, *, quiet: bool = False) -> None:
        self._config = config
        self._console = console
        self._quiet = quiet
        self._stop = Stop()
        self._header: StreamHeader | None = None
        """Header of the stream that was observed last."""
        keep_freed_memory()

    @property
    def stopped(self) -> bool:
        """Whether the last run was requested to stop, by a signal or because its time was over."""
        return self._stop.requested

    @property
    def header(self) -> StreamHeader | None:
        """Header of the stream that was observed last; None before the first."""
        return self._header

    @property
    def utc_offset_ns(self) -> int:
        """Nanoseconds to add to CLOCK_MONOTONIC to get UTC, in the stream that was observed last."""
        return self._header.clock.offset_ns if self._header else 0

    @property
    def has_servers(self) -> bool:
        """Whether sinks other than the embedded store are configured."""
        return runs.has_servers(self._config)

    def say(self, text: str) -> None:
        """Print a line on the terminal, unless the session is quiet."""
        if not self._quiet:
            self._console.print(styled(text, "dim"))

    def measure(
        self,
        until: Until,
        *,
        store: Path | None,
        tee: StreamSink | None,
        publishing: Callable[[], Publishing] | None = None,
        seal: SealKey | None = None,
    ) -> Summary:
        """Measure until `until` ends, with a table on the terminal (`runs.measure`); returns the figures."""

        def begin(header: StreamHeader, chosen: str) -> None:
            # What is loaded by now stays to the end: a collection of all objects need not visit it each time.
            gc.collect()
            gc.freeze()
            self.say(f"measuring {header.host}, Linux {header.kernel}, {chosen}")
            if silent := silent_on(header.kernel):
                self.say(silent)

        with self._live() as view:

            def show(results: Results, summary: Summary) -> None:
                if len(results.rows.windows) and view.auto_refresh:
                    view.update(tables.renderable(summary))

            return self._run(
                lambda stop: runs.measure(
                    self._config,
                    until,
                    stop=stop,
                    store=store,
                    tee=tee,
                    publishing=publishing,
                    seal=seal,
                    on_open=begin,
                    on_results=show,
                )
            )

    def observe(self, until: Until, on_results: Callable[[Results], None], *, tee: StreamSink | None) -> None:
        """Run the correlator live with crossings until `until` ends (`runs.observe`)."""

        def begin(header: StreamHeader, chosen: str) -> None:
            self._header = header
            self.say(chosen)

        self._run(lambda stop: runs.observe(self._config, until, on_results, stop=stop, tee=tee, on_open=begin))

    def watch(self, until: Until, on_item: Callable[[StreamItem], None]) -> None:
        """Call `on_item` with each item of the live stream until `until` ends (`runs.watch`)."""
        self._run(lambda stop: runs.watch(self._config, until, on_item, stop=stop))

    def observed(self, recording: LocalRecording, on_results: Callable[[Results], None]) -> None:
        """Run the correlator over a recording, with a progress bar (`runs.observe_recording`)."""
        with bar(self._console, quiet=self._quiet) as told:

            def take(results: Results, read: int) -> None:
                on_results(results)
                told(read, recording.bytes_total)

            self._header, warnings = self._run(
                lambda stop: runs.observe_recording(self._config, recording, take, stop=stop)
            )
        self._warn(warnings)

    def deliver(self, trips: RoundTrips) -> None:
        """Write round trips of the stream observed last to InfluxDB, if it is configured (`runs.deliver`)."""
        if self._header is None:
            return
        for name, account in asyncio.run(runs.deliver(self._config, self._header, trips)).items():
            self.say(f"{name}: {account.line()}")

    def keep(self, store: Path, trips: RoundTrips, totals: Totals | None) -> None:
        """Write round trips of the stream observed last, and its totals, to a store as a run (`runs.keep`)."""
        if self._header is None or totals is None:
            return
        asyncio.run(runs.keep(self._config, self._header, trips, totals, store))
        self.say(f"{store}: {len(trips.rows):,} round trips stored as run {self._header.run}")

    def record(self, until: Until, sink: CaptureSink) -> int:
        """Record until `until` ends, with counts on the terminal (`runs.record`); returns the records the ring lost."""
        with self._live() as view:

            def show(lost: int) -> None:
                size = f"{sink.records:,} records, {lost:,} lost, {sink.bytes_written:,} bytes"
                view.update(Text(printable(f"{sink.path}: {size}")))

            return self._run(
                lambda stop: runs.record(self._config, until, sink, stop=stop, on_open=self.say, on_lost=show)
            )

    def replay(self, recordings: Sequence[LocalRecording], *, store: Path | None = None) -> Summary:
        """Replay recordings in the given order, with a progress bar (`runs.replay`); returns the figures of all."""
        self._stop = Stop()
        whole = Summary()
        total, done = sum(each.bytes_total for each in recordings), 0
        with bar(self._console, quiet=self._quiet) as told:
            for each in recordings:
                if self._stop.requested:
                    break
                found, warnings = asyncio.run(
                    self._stoppable(
                        runs.replay(
                            self._config,
                            each,
                            stop=self._stop,
                            store=store,
                            on_read=lambda read, before=done: told(before + read, total),  # type: ignore[misc]
                        )
                    )
                )
                self._warn(warnings)
                whole.merge(found)
                done += each.bytes_total
        return whole

    def replay_into(self, store: str | None, files: Sequence[RecordedFile], **how: Unpack[How]) -> Summary:
        """Replay recordings in parts, into a store or on a cluster, so that a stopped replay can be resumed."""
        from mace.replaying.into_store import into_store  # noqa: PLC0415 (loads Arrow, which no other run needs)

        engine = configured.replayed(self._config.correlate)
        with asked_to_stop() as stop, bar(self._console, quiet=self._quiet) as told:
            summary, warnings = into_store(files, store, engine, self._config.store, told=told, stop=stop, **how)
        self._warn(warnings)
        return summary

    def _run(self, work: Callable[[Stop], Coroutine[object, object, T]]) -> T:
        self._stop = Stop()
        return asyncio.run(self._stoppable(work(self._stop)))

    async def _stoppable(self, work: Coroutine[object, object, T]) -> T:
        async with pipeline.stopped_by_signals(self._stop):
            return await work

    def _warn(self, warnings: Sequence[str]) -> None:
        warn(self._console, warnings)

    def _live(self) -> Live:
        return Live(
            console=self._console,
            refresh_per_second=2,
            transient=True,
            auto_refresh=self._console.is_terminal and not self._quiet,
        )
