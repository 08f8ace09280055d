"""The pipeline: source -> correlator -> sinks, in one task group.

    source ──items──► pump ──channel──► correlate ──channel──► deliver ──► sinks
                       │                                          └──────► on_results (tables, progress)
                       └──► tee: a capture file of the raw stream

The pipeline is built from the sinks back to the source, so that every stage exists before records flow into it. It is
stopped from the source forward, so that records already captured are drained through. The channels are short: a slow
sink then keeps records in the kernel's ring, which counts the records that it loses.

An error in any task cancels the others; whatever was opened is closed, in the opposite order.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.channel import Channel, ClosedError
from contracts.config import StoreConfig
from contracts.cpus import CpuReadings
from contracts.errors import MaceError, SourceError
from contracts.interfaces import Progress, Sink, Source, StreamHeader, StreamItem, StreamSink
from contracts.results import Results
from contracts.scheduling import ReadTasks
from contracts.vitals import Vitals
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from correlator.stage import correlate

if TYPE_CHECKING:
    from storage.embedded import EmbeddedStore

if TYPE_CHECKING:  # sealing needs an extra
    from storage.sealing.keys import SealKey

_CHANNEL_ITEMS = 4
"""Capacity of a channel. A source yields an item every 50 to 250 ms, so four items are at most a second."""


@dataclass(slots=True)
class Stop:
    """A request to stop a run, by a signal or because its time is over. It may precede the opening of the source."""

    drain_s: float = 10.0
    """Time to drain the records already captured; then the run is cut off."""
    _source: Source | None = None
    _requested: bool = False
    _interrupted: bool = False
    _cut: asyncio.TimerHandle | None = None
    _task: asyncio.Task[None] | None = None
    cut_off: str = ""
    """Why the run was cut off; empty if it was not."""

    def request(self) -> None:
        """End the stream after the records already captured. To be called in the event loop."""
        if self._requested:
            return
        self._requested = True
        if self._source is not None:
            self._begin(self._source)

    def interrupt(self) -> None:
        """Handle a signal: the first ends the stream as `request` does, the second cuts the run off."""
        if self._interrupted:
            self._cut_off("by a second signal")
        self._interrupted = True
        self.request()

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self._requested

    def attach(self, source: Source, task: asyncio.Task[None]) -> None:
        """Set the source and the task that a request stops."""
        self._source, self._task = source, task
        if self._requested:
            self._begin(source)

    def release(self) -> None:
        """Cancel the timer of `drain_s`, because the run is over."""
        if self._cut is not None:
            self._cut.cancel()

    def _begin(self, source: Source) -> None:
        source.request_stop()
        self._cut = asyncio.get_running_loop().call_later(
            self.drain_s, self._cut_off, f"which took longer than {self.drain_s:g} s"
        )

    def _cut_off(self, why: str) -> None:
        self.cut_off = why
        if self._task is not None:
            self._task.cancel()


async def capture(
    source: Source, sink: StreamSink, *, stop: Stop, on_item: Callable[[StreamItem], None]
) -> StreamHeader:
    """Write the source's raw stream to a file or broker until it ends or `stop` is requested; returns its header."""
    async with AsyncExitStack() as opened:
        header = await _open_source(source, opened)
        await sink.open(header)
        opened.push_async_callback(sink.aclose)

        async def pump() -> None:
            async for item in source.items():
                if not isinstance(item, Progress):
                    await sink.write(item)
                on_item(item)

        await _supervise(source, stop, [pump()])
        return header


async def run(
    source: Source,
    sinks: Sequence[Sink],
    *,
    engine: EngineConfig,
    stop: Stop,
    tee: StreamSink | None = None,
    on_results: Callable[[Results], None] = lambda _: None,
    on_open: Callable[[StreamHeader], None] = lambda _: None,
    vitals: Vitals | None = None,
    only: Callable[[Results], Results] = lambda results: results,
    tasks: ReadTasks | None = None,
) -> StreamHeader:
    """Run source -> correlator -> sinks until the source ends or `stop` is requested; returns the stream's header.

    `on_results` is called with each result after all sinks have accepted it. The run notes its progress in `vitals`;
    sinks that report it have to be made with the same object. `only` returns the part of each result to deliver.
    `tasks` reads the tasks of containers, for an engine that counts their waiting.
    """
    vitals = vitals or Vitals()
    items: Channel[StreamItem] = Channel(_CHANNEL_ITEMS)
    results: Channel[Results] = Channel(_CHANNEL_ITEMS)

    async with AsyncExitStack() as opened:
        # The source opens first, to give its header; it yields no item before `items` is called.
        header = await _open_source(source, opened)
        for sink in sinks:
            await sink.open(header)
            opened.push_async_callback(sink.aclose)
        if tee is not None:
            await tee.open(header)
            opened.push_async_callback(tee.aclose)
        on_open(header)
        vitals.got_on(items=items.peak, results=results.peak)
        vitals.running = True
        opened.callback(vitals.ended)

        async def pump() -> None:
            async for item in source.items():
                if tee is not None:
                    await tee.write(item)
                await items.send(item)
            await items.close()

        async def deliver() -> None:
            async for result in results:
                vitals.got_on(items=items.peak, results=results.peak)
                chosen = only(result)
                for sink in sinks:
                    await sink.write(chosen)
                on_results(chosen)

        made = Engine(header.clock.offset_ns, engine)
        feeder = Feeder(made, lambda: source.discarded, lambda: source.cost, tasks=tasks)
        await _supervise(source, stop, [deliver(), correlate(items, feeder, results), pump()])
        return header


async def _open_source(source: Source, opened: AsyncExitStack) -> StreamHeader:
    # aclose is called after a failed open too, which may have opened something.
    opened.push_async_callback(source.aclose)
    return await source.open()


async def _supervise(source: Source, stop: Stop, work: Sequence[object]) -> None:
    """Run the coroutines together to their end. If several fail, the error for the user is raised alone."""

    async def all_of_it() -> None:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)  # type: ignore[arg-type]

    task = asyncio.create_task(all_of_it())
    stop.attach(source, task)
    try:
        await task
    except asyncio.CancelledError:
        if stop.cut_off:
            raise SourceError(
                f"the run was cut off before all captured records were processed, {stop.cut_off}"
            ) from None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    except BaseExceptionGroup as group:
        raise _told(group) from group
    finally:
        stop.release()


def _told(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error to raise: a `MaceError` before others; a closed channel, a consequence, only if it is alone."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending = [*error.exceptions, *pending]
        else:
            leaves.append(error)
    causes = [e for e in leaves if not isinstance(e, ClosedError)] or leaves
    return next((e for e in causes if isinstance(e, MaceError)), causes[0])


@asynccontextmanager
async def stopped_by_signals(stop: Stop) -> AsyncIterator[None]:
    """Let SIGINT and SIGTERM request a stop within the block; restore their handlers after it."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop.interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            # asyncio restores the default handler, with which SIGTERM would end the program before it removes its lab.
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def embedded_store(
    config: StoreConfig, path: Path, *, rows: bool, cpus: Callable[[], CpuReadings] | None, seal: SealKey | None = None
) -> EmbeddedStore:
    """Return the embedded store at `path`, with the configured flush interval, synchronisation and retention.

    `cpus` reads this machine's CPUs, whose readings are stored, too. `seal` seals the store.
    """
    from storage.embedded import EmbeddedStore  # noqa: PLC0415 (loads Arrow, which a run without a store does not need)

    return EmbeddedStore(
        path,
        rows=rows,
        flush_interval_s=config.flush_interval_s,
        fsync=config.sync,
        max_age_s=config.max_age_s,
        max_bytes=config.max_bytes,
        cpus=cpus,
        seal=seal,
    )
