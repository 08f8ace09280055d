"""What a source and a sink promise. Small on purpose; the lifecycle is part of the contract.

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
    """How a stream came to be: all that is needed to read it later and elsewhere."""

    source: str
    """Name of the source that captured it (`ftrace`, `kmod`, ...); a replay keeps it."""
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
        # As in `Device`: an argument may be a path in any bytes.
        object.__setattr__(self, "host", text(self.host))
        object.__setattr__(self, "command", tuple(map(text, self.command)))


@dataclass(frozen=True, slots=True)
class Progress:
    """Nothing to report: no record before `upto_ns` (CLOCK_MONOTONIC) will come any more.

    Given out where no batch says so, so that what is ready does not wait for the next packet. It changes when
    results come out, not what they are, and is not kept in captures.
    """

    upto_ns: int


StreamItem = Topology | Batch | Progress


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a part can run here; if not, why and what to do. `detail` says what was found."""

    ok: bool
    detail: str
    remedy: str = ""


class Source(Protocol):
    """Kernel, file or network -> stream.

    `open` is called once, first; `items` once after it; `request_stop` at any time from the event loop: the
    source then gives out what the kernel still holds and ends. `aclose` is called once, last, also after an
    error or a cancelled `items`, and leaves nothing behind on the machine.
    """

    async def open(self) -> StreamHeader:
        """Acquire everything; raises `Unavailable` if it cannot run here."""
        ...

    def items(self) -> AsyncIterator[StreamItem]:
        """The stream, in order, until it ends or is stopped."""
        ...

    def request_stop(self) -> None:
        """Ask the stream to end after what has already happened."""
        ...

    async def aclose(self) -> None:
        """Release everything."""
        ...

    @property
    def discarded(self) -> int:
        """Records that the source itself had to throw away; never those lost in the ring."""
        ...

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """What observing has cost the machine since `open`, per hook; empty where the source cannot tell."""
        ...


class Sink(Protocol):
    """Results -> somewhere. Single caller: `open`, `write`..., `aclose`, never at the same time.

    When `write` returns the results are the sink's to keep: a store has them where a crash cannot take them, or
    has them in a buffer that it flushes at most `flush_interval_s` later. No retry, no queue: that is the
    caller's (or the running sink's) business. `aclose` flushes.
    """

    async def open(self, header: StreamHeader) -> None: ...

    async def write(self, results: Results) -> None: ...

    async def aclose(self) -> None: ...


class StreamSink(Protocol):
    """The raw stream -> somewhere (a capture file, a broker). Same lifecycle as `Sink`."""

    async def open(self, header: StreamHeader) -> None: ...

    async def write(self, item: StreamItem) -> None: ...

    async def aclose(self) -> None: ...
