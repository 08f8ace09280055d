"""The kernel's tracer (ftrace) as a live source: the kernel's network tracepoints, read from a private trace instance.

    per_cpu/cpuN/trace_pipe_raw ──pages──▶ PageDecoder ──records, gaps──▶ Merger ──▶ batches, in time order
    (one ring per CPU)             tick by tick             markers            devices, as they change, between them

One tick empties the rings, including the pages that the kernel is still writing. A tick costs about the same for
hundreds of events as for thousands, and a third of a millisecond for waking up alone. Records therefore stay in the
rings until a ring fills, a device changes, or the gather interval has passed. A ring that was read at time T and found
empty has returned all events from before T: these times drive the merge.

Full rings overwrite their oldest events. Of ftrace's two modes this one shows in the stream where events are missing
and how many (docs/design/004-ftrace.md).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import platform
import select
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from collector.ftrace import tracefs
from collector.ftrace.rings import MmapRing, PageBuffer, ReadRing, Ring
from collector.gaps import marker, settle
from collector.live.filter import Choice, told
from collector.live.ring_source import FollowsDevices, RingSource
from collector.machine.kernel import online_cpus
from collector.memory import keep_freed_memory
from collector.merge import Merger
from collector.pages.decoding import DecodedPages, PageDecoder, Sightings, Stretch
from collector.pages.formats import parse_format, parse_header_page
from contracts import clock
from contracts.config import CaptureConfig
from contracts.errors import SourceError, Unavailable
from contracts.hooks import ALONG, BY_TRACEPOINT, TRACEPOINTS, Way, silent_on
from contracts.interfaces import Status, StreamHeader, StreamItem
from contracts.records import Batch
from contracts.schema import HookCost
from contracts.topology import Device

_log = logging.getLogger(__name__)

CLOCK: Final = "mono"
"""CLOCK_MONOTONIC, the clock of all records."""
_NOISE: Final = ("record-cmd", "record-tgid", "event-fork", "function-fork", "markers", "stacktrace", "userstacktrace")
"""Trace options that add other entries to the rings or make each event more expensive; switched off."""
_CHUNK_BYTES: Final = 2 << 20
"""Bytes of pages decoded at once. Measured: a quarter of this costs a third more per event; twice this, no less."""
_FILLED_PERCENT: Final = 10
"""Fill of a ring, %, at which it is emptied early. A tenth of 8 MiB is 20,000 events: enough for a low cost per event,
and no more than the heaviest flood brings between two ticks."""
_FILLING: Final = 0.25
"""Share of a ring in one tick that shows that the tick came late: at 50 ms the heaviest flood fills a tenth."""
_BARE: Final = frozenset({"ipip", "sit", "ip6tnl", "wireguard"})
"""Kinds of devices whose packets have no link-layer header. `net_dev_queue` does not show that, and
`net_dev_start_xmit` has 0 as the header's length, which is also that of a packet whose header nobody has set."""
_ETHERNET_BYTES: Final = 14
"""Header that the decoder subtracts from the length of every packet that is sent, unless the event has a length."""
_SETTLE_S: Final = 0.01
"""Pause between switching the tracer off and the last reading, in which probes that are running still commit, s."""


@dataclass(frozen=True, slots=True)
class FtraceConfig:
    """Settings of the source; the defaults suit a busy host. Raises `ValueError` for a value out of range."""

    ring_kib_per_cpu: int = 8192
    """Memory for each CPU's ring, KiB. 8 MiB are about 200,000 events, a third of a second of the heaviest flood."""
    subbuf_kib: int | None = None
    """Size of a ring's pages, KiB (Linux 6.8 and later); None keeps the kernel's default."""
    poll_interval_s: float = 0.05
    """Interval at which rings that fill are read."""
    gather_interval_s: float = 0.5
    """Longest stay of records in rings that do not fill."""
    hold_back_ms: float = 50
    """Delay added before records are passed on, so that a topology read later can still precede them."""
    reader: Literal["auto", "read", "mmap"] = "auto"
    """How pages are read; `auto` is read(2), the cheaper by measurement."""
    host: str = ""
    """Host name in the stream's header; empty: the machine's own name."""
    tracepoints: tuple[str, ...] = field(default_factory=lambda: tuple(info.tracepoint for info in TRACEPOINTS))
    devices: tuple[str, ...] = ()
    """Record only events at devices of these names, and none of the tracepoints without a device; empty: all."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("ring_kib_per_cpu", self.ring_kib_per_cpu >= 8, "at least 8"),
            ("subbuf_kib", self.subbuf_kib is None or self.subbuf_kib >= 4, "at least 4"),
            ("poll_interval_s", 0 < self.poll_interval_s <= 10, "more than 0 and at most 10"),
            ("gather_interval_s", 0 < self.gather_interval_s <= 10, "more than 0 and at most 10"),
            ("hold_back_ms", 0 <= self.hold_back_ms <= 10_000, "0 to 10000"),
            ("reader", self.reader in ("auto", "read", "mmap"), "auto, read or mmap"),
            (
                "tracepoints",
                bool(self.tracepoints) and all(t in BY_TRACEPOINT for t in self.tracepoints),
                "known hooks",
            ),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")


@dataclass(slots=True)
class _Cpu:
    """State of one CPU's ring."""

    cpu: int
    ring: Ring
    complete_ns: int
    """All events before this time were read from the ring."""
    last_ns: int
    """Time of the last record."""
    told_lost: int = 0
    """Lost events that markers have reported."""
    estimated: bool = False
    """Whether a marker's count was ever derived from the kernel's total, which may be ahead of the page."""


@dataclass(slots=True)
class _Reading:
    """One CPU's part of a tick."""

    cpu: _Cpu
    began_ns: int
    pages: int = 0
    """Pages read from the ring."""
    caught_up: bool = False
    """Whether all events from before `began_ns` were read."""
    parts: list[DecodedPages] = field(default_factory=list)

    @property
    def newest_ns(self) -> int:
        """Time of the last decoded record; 0 without records."""
        return next((int(part.batch.ts_ns[-1]) for part in reversed(self.parts) if len(part.batch)), 0)


class FtraceSource(RingSource):
    """A `contracts.interfaces.Source` over this machine's tracepoints."""

    def __init__(self, config: FtraceConfig | None = None, devices: FollowsDevices | None = None) -> None:
        self.config = config or FtraceConfig()
        self._sightings = Sightings()
        self._merger = Merger(int(self.config.hold_back_ms * 1e6))
        super().__init__(
            "ftrace",
            host=self.config.host,
            hold_back_ms=self.config.hold_back_ms,
            follower=devices,
            watermark=self._merger,
            seen=self._sightings,
            filling=_FILLING,
        )
        self._instance: tracefs.Instance | None = None
        self._cpus: dict[int, _Cpu] = {}
        self._filling: select.epoll | None = None
        """Rings that are filled to `_FILLED_PERCENT`."""
        self._swelling = False
        """Whether the last tick found a ring that would be half full after `gather_interval_s`."""
        self._read_at_ns = 0
        """When the last tick began to read."""
        self._gathered: list[tuple[_Reading, Stretch]] = []
        self._filled = 0
        """Pages in the buffer that wait for decoding: those of `_gathered`."""
        self._bare = np.empty(0, np.uint32)
        """Sightings that are devices without a link-layer header, of the devices and sightings at the last look."""
        self._bare_of: tuple[Device, ...] | None = None
        self._bare_seen = 0

    # --- lifecycle ------------------------------------------------------------------------------

    @staticmethod
    def check() -> Status:
        """Return whether this source can run here, with the tracepoints found."""
        try:
            root = tracefs.find()
            events = [i.tracepoint for i in TRACEPOINTS if (root / "events" / i.tracepoint.replace(":", "/")).is_dir()]
            clocks = tracefs.read(root / "trace_clock").replace("[", "").replace("]", "").split()
        except Unavailable as error:
            return Status(ok=False, detail=error.why, remedy=error.remedy)
        except SourceError as error:
            return Status(ok=False, detail=str(error))
        if not events:
            return Status(
                ok=False, detail=f"{root} has no network events", remedy="a kernel with CONFIG_NET and tracing"
            )
        if CLOCK not in clocks:
            return Status(ok=False, detail=f"no trace clock {CLOCK!r}", remedy="Linux 4.2 or later")
        missing = [info.tracepoint for info in TRACEPOINTS if info.tracepoint not in events]
        without = f", without {', '.join(missing)}" if missing else ""
        silent = f"; {told}" if (told := silent_on(platform.release())) else ""
        return Status(ok=True, detail=f"{root}: {len(events)} of {len(TRACEPOINTS)} tracepoints{without}{silent}")

    async def _acquire(self) -> StreamHeader:
        keep_freed_memory()
        root = tracefs.find()
        for name in tracefs.remove_leftovers(root):
            _log.warning("ftrace: removed %s, left by a run that was killed", name)
        self._instance = instance = tracefs.Instance.create(root)
        # For a program that exits without aclose. After a kill the next run removes the instance.
        atexit.register(self._remove)
        present = self._prepare(instance)
        await self._follow(wakes=True)
        self._began_ns = time.monotonic_ns()
        self._filling = select.epoll()
        self._open_cpus()
        for tracepoint in present:
            instance.enable(tracepoint)
        pair = clock.measure()
        instance.record(on=True)
        return self._header(len(self._cpus), pair, present)

    def _prepare(self, instance: tracefs.Instance) -> list[str]:
        """Set clock, mode and ring size, read the formats, and return the tracepoints that this kernel has."""
        instance.set_clock(CLOCK)
        instance.set_option("overwrite", on=True)
        for option in _NOISE:
            instance.set_option(option, on=False)
        instance.set_ring_size(self.config.ring_kib_per_cpu, self.config.subbuf_kib)
        instance.set_readable_at(_FILLED_PERCENT)
        self._layout = parse_header_page(instance.header_page())
        self._ring_pages = max(self.config.ring_kib_per_cpu * 1024 // self._layout.page_size, 1)
        present = [t for t in self.config.tracepoints if instance.has_event(t)]
        for absent in sorted(set(self.config.tracepoints) - set(present)):
            _log.warning("ftrace: this kernel has no tracepoint %s", absent)
        if not present:
            raise Unavailable(
                "ftrace", "this kernel has none of the tracepoints", "a kernel with CONFIG_NET and tracing"
            )
        if self.config.devices:
            present = [t for t in present if BY_TRACEPOINT[t].has_device]
            names = " || ".join(f"name == {_quoted(name)}" for name in self.config.devices)
            for tracepoint in present:
                instance.set_filter(tracepoint, names)
        formats = [parse_format(t, instance.event_format(t)) for t in present]
        self._decoder = PageDecoder(self._layout, formats, self._sightings)
        self._buffer = PageBuffer(self._layout, max(_CHUNK_BYTES // self._layout.page_size, 8))
        return present

    def _give_back(self) -> None:
        try:
            self._remove()
        finally:
            atexit.unregister(self._remove)

    def _remove(self) -> None:
        for cpu in self._cpus.values():
            cpu.ring.close()
        self._cpus.clear()
        if self._filling is not None:
            self._filling.close()
        if self._instance is not None:
            instance, self._instance = self._instance, None
            instance.remove()

    @property
    def skipped(self) -> int:
        """Events in the rings that belong to no hook."""
        return self._decoder.skipped

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Empty: the kernel does not time its tracer."""
        return ()

    # --- the stream -----------------------------------------------------------------------------

    async def items(self) -> AsyncIterator[StreamItem]:
        """Yield topologies and batches until `request_stop`. A slow consumer fills the kernel's rings, not memory."""
        yield self._topology(self._began_ns)
        while not self._stopping:
            began_ns = time.monotonic_ns()
            behind = not self._read_all()
            # Progress lets the consumer finish these records before the next tick. In a flood that tick comes soon.
            for item in self._released(progress=not self._swelling):
                yield item
            if behind:
                self._devices_changed()
                await asyncio.sleep(0)
            else:
                await self._rest(began_ns)
        assert self._instance is not None
        self._instance.record(on=False)
        await asyncio.sleep(_SETTLE_S)
        while not self._read_all():
            for item in self._released(progress=not self._swelling):
                yield item
        self._tell_the_rest()
        for item in self._released(to_the_end=True):
            yield item

    async def _rest(self, began_ns: int) -> None:
        """Wait for the next tick: until a ring fills, a device changes, or the interval since `began_ns` has passed.

        The interval runs from the start of one tick to the start of the next: the time for decoding, and for the
        consumer's work meanwhile, must not add to the latency.
        """
        assert self._filling is not None
        while not self._stopping and not self._devices_changed():
            # Before Linux 6.1 a ring is readable as soon as it contains an event.
            filling = bool(self._filling.poll(0))
            # In a flood the timer decides: the wake-up by poll may come late.
            rest_s = self.config.poll_interval_s if filling or self._swelling else self.config.gather_interval_s
            rest_s -= (time.monotonic_ns() - began_ns) / 1e9
            if rest_s <= 0:
                return
            await self._pause(rest_s, None if filling else self._filling.fileno())

    def _learned(self, devices: tuple[Device, ...]) -> None:
        """Do nothing: ftrace's records carry device names."""

    def _taken(self, until_ns: int | None) -> Iterator[Batch]:
        batch = self._merger.flush() if until_ns is None else self._merger.take(until_ns)
        yield from self._whole(batch).pieces()

    def _whole(self, batch: Batch) -> Batch:
        """Give packets back the bytes that the decoder took for a link-layer header where a device has none."""
        if self._bare_of is not self._devices or self._bare_seen < len(self._sightings):
            self._bare_of, self._bare_seen = self._devices, len(self._sightings)
            bare = {each.name for each in self._devices if each.kind in _BARE}
            bare -= {each.name for each in self._devices if each.kind not in _BARE}
            seen = self._sightings.snapshot() if bare else ()
            self._bare = np.array([code for code, each in enumerate(seen) if each.name in bare], np.uint32)
        if not len(self._bare) or not len(batch):
            return batch
        taken = np.isin(batch.dev, self._bare) & np.isin(batch.hook, ALONG[Way.TRANSMIT]) & (batch.l3_len > 0)
        return replace(batch, l3_len=batch.l3_len + np.where(taken, _ETHERNET_BYTES, 0).astype(np.uint32))

    # --- the rings ------------------------------------------------------------------------------

    def _open_cpus(self) -> None:
        """Open the ring of each CPU that came online. A CPU that goes offline keeps its ring, which stays open."""
        assert self._instance is not None
        assert self._filling is not None
        for number in online_cpus():
            if number in self._cpus:
                continue
            path = self._instance.cpu(number) / "trace_pipe_raw"
            ring = MmapRing(path, self._layout) if self.config.reader == "mmap" else ReadRing(path, self._layout)
            since = self._since_ns()
            self._cpus[number] = _Cpu(number, ring, complete_ns=since, last_ns=since)
            self._filling.register(ring.fileno(), select.EPOLLIN)
            self._merger.add_cpu(number, since)

    def _read_all(self) -> bool:
        """Read all rings and return whether all events from before the reading began were read.

        Pages of all CPUs are gathered and decoded together, so that many CPUs with few events cost little.
        """
        self._open_cpus()
        readings = [_Reading(cpu, time.monotonic_ns()) for cpu in self._cpus.values()]
        for reading in readings:
            self._read(reading)
        self._decode()
        for reading in readings:
            cpu = reading.cpu
            for batch in self._with_markers(cpu, reading.parts):
                self._merger.push(cpu.cpu, batch)
            cpu.complete_ns = max(cpu.complete_ns, reading.began_ns if reading.caught_up else reading.newest_ns)
            self._merger.complete(cpu.cpu, cpu.complete_ns)
        share = max(reading.pages for reading in readings) / self._ring_pages
        self._urgency.felt(share)
        since_s, self._read_at_ns = (readings[0].began_ns - self._read_at_ns) / 1e9, readings[0].began_ns
        self._swelling = share * self.config.gather_interval_s > since_s / 2
        return all(reading.caught_up for reading in readings)

    def _read(self, reading: _Reading) -> None:
        """Read one ring; decode when the buffer is full."""
        reading.began_ns = time.monotonic_ns()
        # Read at most one full ring, so that a CPU under flood cannot starve the others.
        while reading.pages < self._ring_pages and not reading.caught_up:
            taken = reading.cpu.ring.take(self._buffer, self._filled)
            if taken.pages:
                self._gathered.append((reading, Stretch(reading.cpu.cpu, taken.pages, taken.skip)))
                self._filled += taken.pages
                reading.pages += taken.pages
            reading.caught_up = taken.empty
            if not taken.empty:
                self._decode()
                # With a writer as fast as this reader the ring is never found empty.
                reading.caught_up = reading.newest_ns >= reading.began_ns

    def _decode(self) -> None:
        """Decode the gathered pages."""
        if self._gathered:
            decoded = self._decoder.decode(self._buffer.bytes, [stretch for _, stretch in self._gathered])
            for (reading, _), part in zip(self._gathered, decoded, strict=True):
                reading.parts.append(part)
        self._gathered.clear()
        self._filled = 0

    def _with_markers(self, cpu: _Cpu, parts: list[DecodedPages]) -> Iterator[Batch]:
        """Yield the records of each part of one reading, with a `LOST` marker at each gap."""
        lost = iter(self._losses(cpu, [gap.lost for part in parts for gap in part.gaps]))
        for part in parts:
            pieces, start = [], 0
            for gap in part.gaps:
                pieces.append(part.batch[start : gap.index])
                last = int(part.batch.ts_ns[gap.index - 1]) if gap.index else cpu.last_ns
                after = int(part.batch.ts_ns[gap.index]) if gap.index < len(part.batch) else last
                pieces.append(marker(cpu.cpu, min(max(last, cpu.complete_ns), after), next(lost), after))
                start = gap.index
            pieces.append(part.batch[start:] if start else part.batch)
            if len(part.batch):
                cpu.last_ns = int(part.batch.ts_ns[-1])
            yield Batch.concatenate(pieces)

    def _losses(self, cpu: _Cpu, counts: list[int | None]) -> list[int]:
        """Return the number of events lost at each gap.

        A page has no room for its count if its last event ends within 8 bytes of the page's end. The count is then
        derived from the kernel's total for this ring. The total also counts events overwritten after that page; a later
        marker then reports fewer, so that the sum of the markers stays the kernel's total.
        """
        if not counts:
            return []
        if None in counts or cpu.estimated:
            assert self._instance is not None
            cpu.estimated = True
            losses = settle(counts, self._instance.stats(cpu.cpu).lost - cpu.told_lost)
        else:
            losses = [count or 0 for count in counts]
        cpu.told_lost += sum(losses)
        return losses

    def _tell_the_rest(self) -> None:
        """Report, after the last reading, the events that the kernel lost without a count in any page.

        This is rare: an interrupt has filled the whole ring while it delayed a writer ("commit overrun").
        """
        assert self._instance is not None
        for cpu in self._cpus.values():
            rest = self._instance.stats(cpu.cpu).lost - cpu.told_lost
            if rest > 0:
                cpu.told_lost += rest
                self._merger.push(cpu.cpu, marker(cpu.cpu, cpu.last_ns, rest, cpu.complete_ns))


def choice(config: CaptureConfig) -> Choice:
    """Return where the packets that `[capture]` names are chosen.

    The kernel chooses devices, by name, in all namespaces. ftrace's events have no namespace, so containers are chosen
    after reading, once the correlator knows each packet's path. Raises `Unavailable` for any other choice.
    """
    cannot = [name for name in ("sample_shift", "netns", "protocols") if getattr(config, name)]
    if cannot:
        raise Unavailable(
            "ftrace",
            f"ftrace's events have no namespace, protocol or content, so that [capture] {', '.join(cannot)} cannot"
            " be applied",
            "leave out --protocol, --sample and these keys, or use a source that can choose (--source bpf, or kmod)",
        )
    if config.containers:
        return Choice(f"{told(config)}, chosen after reading: ftrace records every packet", after_reading=True)
    if config.devices:
        for name in config.devices:
            _quoted(name)
        return Choice(f"{told(config)}, chosen in the kernel: by name, in every network namespace")
    return Choice()


def configured(config: CaptureConfig, devices: FollowsDevices, host: str = "") -> FtraceSource:
    """Make the source that `[capture]` describes; raises `Unavailable` if it cannot choose what `[capture]` names."""
    chosen = choice(config)
    return FtraceSource(
        FtraceConfig(
            ring_kib_per_cpu=config.ring_mib * 1024,
            poll_interval_s=config.poll_ms / 1000,
            gather_interval_s=config.gather_ms / 1000,
            hold_back_ms=config.hold_back_ms,
            host=host,
            devices=() if chosen.after_reading else config.devices,
        ),
        devices,
    )


def _quoted(name: str) -> str:
    """Return a device's name as a string of the kernel's event filter; raises `Unavailable` if no quote can hold it."""
    for quote in ('"', "'"):
        if quote not in name:
            return quote + name + quote
    raise Unavailable("ftrace", f"the kernel's event filter cannot hold the name {name!r}", "--source bpf, or kmod")
