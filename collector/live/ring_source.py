"""Base class of sources over rings: the kernel fills a ring for each CPU, and the source empties the rings in ticks.

The base class has the lifecycle, the stream's header, the topologies between the records, the decision which records
may be passed on, and the pause between ticks. A subclass acquires the rings and decodes their content.
"""

from __future__ import annotations

import asyncio
import platform
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from collector.live.urgency import Urgency
from collector.machine.kernel import boot_id
from collector.watermark import Watermark
from contracts.clock import ClockPair
from contracts.interfaces import Progress, StreamHeader, StreamItem
from contracts.names import command_line, name_of_this_machine
from contracts.records import Batch
from contracts.topology import Device, Sharer, Sighting, Topology
from contracts.version import VERSION


class FollowsDevices(Protocol):
    """Follows the devices of this machine for a source."""

    host_netns: int
    on_host_network: tuple[Sharer, ...]
    """Containers on the host's network, as of the last `poll`."""
    on_news: Callable[[], object]
    """Called, from any thread, when the next `poll` will return devices."""

    async def open(self) -> None: ...

    def poll(self) -> tuple[Device, ...] | None:
        """Return all devices if anything changed since the last call, else None; the first call returns them all."""
        ...

    async def aclose(self) -> None: ...


class SeenDevices(Protocol):
    """The sightings of a stream: devices as its records identify them, in order of appearance."""

    def __len__(self) -> int: ...

    def snapshot(self) -> tuple[Sighting, ...]: ...


class RingSource(ABC):
    """A `contracts.interfaces.Source` without `items` and `cost`.

    `name`: the source's name in headers. `host`: the host's name in headers; empty: the machine's own. `follower`:
    follows devices; None for a stream without devices. `watermark`: the merger. `seen`: the stream's sightings.
    `filling`: see `begins` of `Urgency`.
    """

    def __init__(
        self,
        name: str,
        *,
        host: str,
        hold_back_ms: float,
        follower: FollowsDevices | None,
        watermark: Watermark,
        seen: SeenDevices,
        filling: float,
    ) -> None:
        self._name, self._host = name, host
        self._hold_back_ns = int(hold_back_ms * 1e6)
        self._follower = follower
        self._following = False
        self._watermark, self._seen = watermark, seen
        self._seen_told = 0
        self._devices: tuple[Device, ...] = ()
        self._sharers: tuple[Sharer, ...] = ()
        self._coming: deque[tuple[int, tuple[Device, ...], tuple[Sharer, ...]]] = deque()
        """Changes that wait for their place in the stream: (from_ns, devices, containers on the host's network)."""
        self._host_netns = 0
        """Inode of the host's network namespace; 0 without a follower."""
        self._began_ns = 0
        self._urgency = Urgency(begins=filling)
        self._stopping = False
        self._wake = asyncio.Event()

    # --- lifecycle ------------------------------------------------------------------------------

    async def open(self) -> StreamHeader:
        """Acquire the rings and begin to record; raises `Unavailable` or `SourceError` and then leaves nothing open."""
        try:
            return await self._acquire()
        except BaseException:
            await self.aclose()
            raise

    def request_stop(self) -> None:
        """Stop recording; `items` ends after the records made so far."""
        self._stopping = True
        self._wake.set()

    async def aclose(self) -> None:
        """Release the rings and the real-time priority, and stop following devices. Safe to call again."""
        self._urgency.end()
        try:
            self._give_back()
        finally:
            if self._following and self._follower is not None:
                self._following = False
                await self._follower.aclose()

    @property
    def discarded(self) -> int:
        """Records that arrived too late to be passed on in order (see `collector.merge`)."""
        return self._watermark.late

    @abstractmethod
    async def _acquire(self) -> StreamHeader:
        """Acquire the source's resources, as in `open`; if it raises, `_give_back` releases them."""

    @abstractmethod
    def _give_back(self) -> None:
        """Release the acquired resources. Safe to call again."""

    @abstractmethod
    def _taken(self, until_ns: int | None) -> Iterator[Batch]:
        """Yield the merged records before `until_ns`, or all remaining ones for None; no batch is empty."""

    @abstractmethod
    def _learned(self, devices: tuple[Device, ...]) -> None:
        """Note a change of devices, before its place in the stream is reached."""

    def _header(self, cpus: int, pair: ClockPair, hooks: Sequence[str]) -> StreamHeader:
        return StreamHeader(
            source=self._name,
            host=self._host or name_of_this_machine(),
            run=secrets.token_hex(8),
            kernel=platform.release(),
            boot_id=boot_id(),
            cpus=cpus,
            clock=pair,
            hooks=tuple(hooks),
            mace_version=VERSION,
            command=command_line(),
        )

    # --- devices --------------------------------------------------------------------------------

    async def _follow(self, *, wakes: bool) -> None:
        """Begin to follow devices. With `wakes`, a change of devices ends a pause."""
        if self._follower is None:
            return
        if wakes:
            self._follower.on_news = partial(asyncio.get_running_loop().call_soon_threadsafe, self._wake.set)
        await self._follower.open()
        self._following = True
        self._devices = self._follower.poll() or ()
        self._sharers = self._follower.on_host_network
        self._host_netns = self._follower.host_netns

    def _devices_changed(self) -> bool:
        """Poll for devices and return whether they changed; a change waits in `_coming` for its place in the stream."""
        if self._follower is None or (devices := self._follower.poll()) is None:
            return False
        self._learned(devices)
        # A change holds from the latest time up to which records were passed on. The change is reported within less
        # than a hold-back, so that packets of a new device follow its topology.
        from_ns = time.monotonic_ns() - self._hold_back_ns
        self._coming.append((max(from_ns, self._began_ns), devices, self._follower.on_host_network))
        return True

    def _topology(self, from_ns: int) -> Topology:
        sightings = self._seen.snapshot()
        self._seen_told = len(sightings)
        return Topology(from_ns, self._host_netns, self._devices, sightings, self._sharers)

    # --- the stream -----------------------------------------------------------------------------

    def _since_ns(self) -> int:
        """Return the time from which on a CPU that is added now can have records in the stream."""
        return max(self._began_ns, self._watermark.given_ns or 0)

    def _released(self, *, to_the_end: bool = False, progress: bool = False) -> Iterator[StreamItem]:
        """Yield the records that may be passed on, topologies where devices changed, and progress up to the watermark.

        Progress follows only if there is no record, or always with `progress`. `to_the_end` releases all records.
        """
        watermark_ns = self._watermark.watermark_ns
        if watermark_ns is None:
            return
        while self._coming and (to_the_end or self._coming[0][0] <= watermark_ns):
            from_ns, devices, sharers = self._coming.popleft()
            yield from self._named(self._taken(from_ns))
            self._devices, self._sharers = devices, sharers
            yield self._topology(from_ns)
        given = False
        for item in self._named(self._taken(None if to_the_end else watermark_ns)):
            given = True
            yield item
        if progress or not given:
            yield Progress(watermark_ns)

    def _named(self, batches: Iterator[Batch]) -> Iterator[StreamItem]:
        """Yield the batches, each preceded by a topology if it has new sightings."""
        for batch in batches:
            if len(self._seen) > self._seen_told:
                yield self._topology(int(batch.ts_ns[0]))
            yield batch

    async def _pause(self, duration_s: float, readable: int | None) -> None:
        """Pause for at most `duration_s`; ends early on a stop, a change of devices, or when `readable` is readable."""
        loop = asyncio.get_running_loop()
        if not self._stopping:
            self._wake.clear()
        if readable is not None:
            loop.add_reader(readable, self._wake.set)
        try:
            async with asyncio.timeout(duration_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            if readable is not None:
                loop.remove_reader(readable)
