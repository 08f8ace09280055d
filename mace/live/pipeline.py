"""Source -> correlator -> sinks, in one task group.

    source ──items──► pump ──channel──► correlate ──channel──► deliver ──► sinks
                       │                                          └──────► on_results (tables, progress)
                       └──► tee: a capture file of the raw stream

Built from the sinks back to the source, so that nothing flows before all that it flows into is there; stopped
from the source forward, so that what has happened is drained through. The channels are short: what waits in them
has left the kernel's ring, which counts what it cannot hold, and a sink that is slow makes the ring wait.

An error in any task cancels the others; whatever was opened is closed, in the opposite order.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from collector import SOURCES
from collector.machine.containers import API_SOCKETS
from collector.machine.devices import DeviceFollower
from contracts.channel import Channel, ClosedError
from contracts.config import CaptureConfig, StoreConfig
from contracts.errors import MaceError, SourceError
from contracts.interfaces import Progress, Sink, Source, StreamHeader, StreamItem, StreamSink
from contracts.results import Results
from contracts.vitals import Vitals
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from correlator.stage import correlate
from storage.embedded import EmbeddedStore

_CHANNEL_ITEMS = 4
"""A source gives out an item every 50 to 250 ms: this is a second of it at most."""


@dataclass(slots=True)
class Stop:
    """A wish to stop, from a signal or because what it was for is over; either may come before the source is open."""

    drain_s: float = 10.0
    """What is under way has this long to be drained, then the run is cut off."""
    _source: Source | None = None
    _requested: bool = False
    _interrupted: bool = False
    _cut: asyncio.TimerHandle | None = None
    _task: asyncio.Task[None] | None = None
    cut_off: str = ""
    """Why the run was cut off; empty if it was not."""

    def request(self) -> None:
        """End the stream after what has already happened. From the event loop."""
        if self._requested:
            return
        self._requested = True
        if self._source is not None:
            self._begin(self._source)

    def interrupt(self) -> None:
        """What a signal asks for: the first one ends the stream as `request` does, the second ends it now."""
        if self._interrupted:
            self._cut_off("by a second signal")
        self._interrupted = True
        self.request()

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self._requested

    def attach(self, source: Source, task: asyncio.Task[None]) -> None:
        """Say what is to be stopped."""
        self._source, self._task = source, task
        if self._requested:
            self._begin(source)

    def release(self) -> None:
        """The run is over."""
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
    """Source -> file (or broker), nothing computed. Returns the stream's header."""
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
) -> StreamHeader:
    """Source -> correlator -> sinks until the source ends or `stop` is requested. Returns the stream's header.

    Every result has been taken by all sinks before `on_results` sees it. `vitals` hears how it goes; sinks that tell of
    that were made with the same ones.
    """
    vitals = vitals or Vitals()
    items: Channel[StreamItem] = Channel(_CHANNEL_ITEMS)
    results: Channel[Results] = Channel(_CHANNEL_ITEMS)

    async with AsyncExitStack() as opened:
        # The source opens first only to say who it is: it gives out nothing before `items` is called.
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
                for sink in sinks:
                    await sink.write(result)
                on_results(result)

        feeder = Feeder(Engine(header.clock.offset_ns, engine), lambda: source.discarded, lambda: source.cost)
        await _supervise(source, stop, [deliver(), correlate(items, feeder, results), pump()])
        return header


async def _open_source(source: Source, opened: AsyncExitStack) -> StreamHeader:
    # aclose comes also after a failed open, which may have got half way.
    opened.push_async_callback(source.aclose)
    return await source.open()


async def _supervise(source: Source, stop: Stop, work: Sequence[object]) -> None:
    """Run the coroutines together to their end; the first error that is meant for the user is raised alone."""

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
            raise SourceError(f"cut off before all that was captured was worked through, {stop.cut_off}") from None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    except BaseExceptionGroup as group:
        raise _told(group) from group
    finally:
        stop.release()


def _told(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to tell: ours before others, and a closed channel (a consequence) only if there is nothing else."""
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
    """SIGINT and SIGTERM request a stop for the length of the block; then they do what they did before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop.interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            # asyncio leaves the default behind: SIGTERM would end a program past a lab that is to be removed.
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def chosen_source(config: CaptureConfig) -> tuple[str, str]:
    """The name of the live source to use, and for `auto` why no better one ("" if there is none)."""
    if config.source != "auto":
        return config.source, ""
    why_not: list[str] = []
    for name, source in SOURCES.items():
        status = source.check()
        if status.ok:
            return name, "; ".join(why_not)
        why_not.append(f"not {name}: {status.detail}" + (f" ({status.remedy})" if status.remedy else ""))
    # None can: the one that needs least says why when it is opened.
    return next(reversed(SOURCES)), "; ".join(why_not)


def live_source(config: CaptureConfig, host: str = "") -> Source:
    """The live source that the configuration asks for, following this machine's devices.

    `host` is what the stream says it is of; empty: the machine's own name.
    """
    name, _ = chosen_source(config)
    devices = DeviceFollower(
        host_netns=config.host_netns or None,
        outer=config.outer,
        remote_netns=config.remote_netns,
        docker_sockets=(*API_SOCKETS, *config.container_sockets),
    )
    return SOURCES[name].make(config, devices, host)


def embedded_store(config: StoreConfig, path: Path, *, rows: bool) -> EmbeddedStore:
    """The embedded store at `path`, as configured."""
    return EmbeddedStore(
        path,
        rows=rows,
        flush_interval_s=config.flush_interval_s,
        fsync=config.sync,
        max_age_s=config.max_age_days * 86_400 or None,
        max_bytes=int(config.max_size_gib * 2**30) or None,
    )
