"""One sink for the streams of several hosts, and what each stream sees of it.

stream of host a ──► HostSink ──┐
stream of host b ──► HostSink ──┴──► RunningSink ──► server
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from contracts.interfaces import StreamHeader
from contracts.results import Results
from contracts.schema import RoundTrips
from storage.running_sink import RunningSink


@dataclass(frozen=True, slots=True)
class HostResults:
    """What one stream has to say: results, round trips, or (None) that it has ended."""

    header: StreamHeader
    results: Results | RoundTrips | None


class StreamOfSink(Protocol):
    """A `Sink` that takes round trips too."""

    async def open(self, header: StreamHeader) -> None: ...

    async def write(self, results: Results | RoundTrips) -> None: ...

    async def aclose(self) -> None: ...


class SharedSink(Protocol):
    """`open` once, first; a `stream` for each stream; `aclose` once, when all of these are closed."""

    async def open(self) -> None: ...

    def stream(self) -> StreamOfSink: ...

    async def aclose(self) -> None: ...


class HostSink:
    """A `Sink` for one stream, into a running sink that others may share."""

    def __init__(self, running: RunningSink[HostResults]) -> None:
        self._running = running
        self._header: StreamHeader | None = None

    async def open(self, header: StreamHeader) -> None:
        """Say whose results they will be."""
        self._header = header

    async def write(self, results: Results | RoundTrips) -> None:
        """Hand over; never waits for a server (see `RunningSink.write`)."""
        assert self._header is not None
        await self._running.write(HostResults(self._header, results))

    async def aclose(self) -> None:
        """The stream has ended: what only its end makes final can be written."""
        if self._header is not None:
            await self._running.write(HostResults(self._header, None))
            self._header = None


class SharedRunningSink:
    """A `SharedSink` of a running sink."""

    def __init__(self, running: RunningSink[HostResults]) -> None:
        self.running = running

    async def open(self) -> None:
        """See `RunningSink.open`."""
        await self.running.open()

    def stream(self) -> HostSink:
        """For one stream."""
        return HostSink(self.running)

    async def aclose(self) -> None:
        """See `RunningSink.aclose`."""
        await self.running.aclose()


class Alone:
    """A `Sink` for the only stream of a shared sink: opens and closes both."""

    def __init__(self, shared: SharedSink) -> None:
        self._shared = shared
        self._stream = shared.stream()

    async def open(self, header: StreamHeader) -> None:
        """Open the sink, then the stream."""
        await self._shared.open()
        await self._stream.open(header)

    async def write(self, results: Results | RoundTrips) -> None:
        """Hand over."""
        await self._stream.write(results)

    async def aclose(self) -> None:
        """Close the stream, then the sink."""
        try:
            await self._stream.aclose()
        finally:
            await self._shared.aclose()
