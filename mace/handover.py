"""What an ingest makes of many hosts' streams, into the sinks that the configuration asks for.

    engine of host a ──┐                       ┌── influxdb: one buffer, spool and connection for all hosts
    engine of host b ──┴──► Handover, a stream ┴── prometheus
                            of a sink for each run

The embedded store is not among them: it is what the ingest's journal is measured against. Results are handed over when
the store has them on the disk; what a sink then keeps in memory only, for at most its `flush_interval_s`, is what a
crash of the ingest can cost it. The store has these rows.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from mace.config import Config
from mace.interfaces import StreamHeader
from mace.schema import Results
from mace.vitals import Vitals
from storage import SINKS
from storage.shared import SharedSink, StreamOfSink


@dataclass(slots=True)
class Handover:
    """`open` once, first; `take` for each run's results, `end` when the run has ended; `aclose` once, last."""

    config: Config
    vitals: Vitals = field(default_factory=Vitals)
    _sinks: list[SharedSink] = field(default_factory=list)
    _streams: dict[tuple[str, int], list[StreamOfSink]] = field(default_factory=dict)
    _opened: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self) -> None:
        """Open the sinks. Raises what they raise: `MissingExtra`, `ConfigError`, `Unavailable`, `StoreError`."""
        for kind in SINKS.values():
            if kind.wanted(self.config):
                sink = kind.make(self.config, self.vitals)
                self._opened.push_async_callback(sink.aclose)
                await sink.open()
                self._sinks.append(sink)
        self.vitals.running = True

    def got_on(self, queue_peak: int) -> None:
        """The ingest has got on, with results or without: nobody may be measuring."""
        self.vitals.got_on(messages=queue_peak)

    async def take(self, run: tuple[str, int], header: StreamHeader, results: Results) -> None:
        """Results of one run; a run that is new, or was before the ingest was started, gets its streams."""
        if run not in self._streams:
            self._streams[run] = [sink.stream() for sink in self._sinks]
            for stream in self._streams[run]:
                await stream.open(header)
        for stream in self._streams[run]:
            await stream.write(results)

    async def end(self, run: tuple[str, int]) -> None:
        """Nothing more comes of this run."""
        for stream in self._streams.pop(run, ()):
            await stream.aclose()

    async def aclose(self) -> None:
        """Close the runs' streams, then the sinks, each of which has its own time for what waits."""
        self.vitals.running = False
        for run in list(self._streams):
            await self.end(run)
        await self._opened.aclose()
