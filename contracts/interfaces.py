"""The contracts of sources and sinks: few methods, and the order in which they are called.

A stream is one `StreamHeader`, then `Topology`, `Batch` and `Progress` items in time order: records never go back
in time from one batch to the next, and a topology precedes every record it applies to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from contracts.clock import ClockPair
from contracts.names import text
from contracts.records import Batch
from contracts.results import Results
from contracts.schema import HookCost
from contracts.topology import Topology


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """Origin of a stream: everything needed to read it later on another machine."""

    source: str
    """Name of the source that captured the stream (`ftrace`, `kmod`, ...); a replay keeps it."""
    host: str
    run: str
    """Identifies the capture among those of its host; a replay keeps it."""
    kernel: str
    boot_id: str
    cpus: int
    clock: ClockPair
    hooks: tuple[str, ...]
    """`HookInfo.tracepoint` of each hook that was observed."""
    mace_version: str
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # As in `Device`: an argument may be a path of arbitrary bytes.
        object.__setattr__(self, "host", text(self.host))
        object.__setattr__(self, "command", tuple(map(text, self.command)))


@dataclass(frozen=True, slots=True)
class Progress:
    """States that no further record before `upto_ns` (CLOCK_MONOTONIC) will follow.

    A source yields it when no batch implies it, so that completed results need not wait for the next packet. It changes
    when results are returned, not their values, and captures do not keep it.
    """

    upto_ns: int


StreamItem = Topology | Batch | Progress


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a part can run here; `detail` has the finding or the reason, `remedy` what the user can do."""

    ok: bool
    detail: str
    remedy: str = ""


class Source(Protocol):
    """Makes a stream of records from the kernel, a file or the network.

    `open` is called once, first; `items` once after it; `request_stop` at any time from the event loop: the source then
    yields what the kernel still holds, and ends. `aclose` is called once, last, also after an error or a cancelled
    `items`, and leaves nothing behind on the machine.
    """

    async def open(self) -> StreamHeader:
        """Acquire all resources and return the header; raises `Unavailable` if the source cannot run here."""
        ...

    def items(self) -> AsyncIterator[StreamItem]:
        """Yield the stream in order until it ends or is stopped."""
        ...

    def request_stop(self) -> None:
        """Let the stream end after the records made so far."""
        ...

    async def aclose(self) -> None:
        """Release all resources."""
        ...

    @property
    def discarded(self) -> int:
        """Records that the source itself discarded; never those lost in the ring."""
        ...

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Cost of observing since `open`, per hook; empty if the source cannot measure it."""
        ...


class Sink(Protocol):
    """Stores or forwards results. One caller calls `open`, `write` repeatedly, then `aclose`, never at the same time.

    When `write` returns, the sink is responsible for the results: they are stored where a crash cannot lose them, or in
    a buffer that the sink flushes at most `flush_interval_s` later. A sink has no retries and no queue, which are the
    task of the caller or the running sink. `aclose` flushes.
    """

    async def open(self, header: StreamHeader) -> None: ...

    async def write(self, results: Results) -> None: ...

    async def aclose(self) -> None: ...


class StreamSink(Protocol):
    """Stores or forwards the raw stream (a capture file, a broker). Its methods are called like those of `Sink`."""

    async def open(self, header: StreamHeader) -> None: ...

    async def write(self, item: StreamItem) -> None: ...

    async def aclose(self) -> None: ...
