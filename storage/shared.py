"""A sink that the streams of several hosts share, and the sink that each stream uses.

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
    """Results or round trips of one stream; None means that the stream has ended."""

    header: StreamHeader
    results: Results | RoundTrips | None


class StreamOfSink(Protocol):
    """A `Sink` that accepts round trips too."""

    async def open(self, header: StreamHeader) -> None: ...

    async def write(self, results: Results | RoundTrips) -> None: ...

    async def aclose(self) -> None: ...


class SharedSink(Protocol):
    """A sink for several streams. Call `open` first, `stream` for each stream, and `aclose` when all are closed."""

    async def open(self) -> None: ...

    def stream(self) -> StreamOfSink: ...

    async def aclose(self) -> None: ...


class HostSink:
    """A `Sink` for one stream, which writes to a running sink that other streams may share."""

    def __init__(self, running: RunningSink[HostResults]) -> None:
        self._running = running
        self._header: StreamHeader | None = None

    async def open(self, header: StreamHeader) -> None:
        """Set the stream's header."""
        self._header = header

    async def write(self, results: Results | RoundTrips) -> None:
        """Pass results to the running sink; never waits for a server (see `RunningSink.write`)."""
        assert self._header is not None
        await self._running.write(HostResults(self._header, results))

    async def aclose(self) -> None:
        """Announce the stream's end, so that its last rows can be written."""
        if self._header is not None:
            await self._running.write(HostResults(self._header, None))
            self._header = None


class SharedRunningSink:
    """A `SharedSink` of a running sink."""

    def __init__(self, running: RunningSink[HostResults]) -> None:
        self.running = running

    async def open(self) -> None:
        """Open the running sink (`RunningSink.open`)."""
        await self.running.open()

    def stream(self) -> HostSink:
        """Return a sink for one stream."""
        return HostSink(self.running)

    async def aclose(self) -> None:
        """Close the running sink (`RunningSink.aclose`)."""
        await self.running.aclose()


class Alone:
    """A `Sink` for the only stream of a shared sink, which it opens and closes too."""

    def __init__(self, shared: SharedSink) -> None:
        self._shared = shared
        self._stream = shared.stream()

    async def open(self, header: StreamHeader) -> None:
        """Open the sink, then the stream."""
        await self._shared.open()
        await self._stream.open(header)

    async def write(self, results: Results | RoundTrips) -> None:
        """Pass results to the stream."""
        await self._stream.write(results)

    async def aclose(self) -> None:
        """Close the stream, then the sink."""
        try:
            await self._stream.aclose()
        finally:
            await self._shared.aclose()
