"""The kernel module as a live source: records of 64 bytes, read from rings that the module maps into this process.

    mace.ko ──sub-buffers──▶ CpuRing ──views──▶ RingMerger ──▶ batches, in time order
    (one ring per CPU)   TAKE           markers            devices, as they change, between them

One tick empties the rings, including the sub-buffers that the module is still filling. A tick runs every gather
interval, earlier when a quarter of a ring's sub-buffers is full or a device changes, and every poll interval while a
ring fills fast. TAKE returns the time up to which a ring was emptied: these
times drive the merge. Records that the hold-back delays stay in the rings, or are copied out when the rings run short
of room.

A full ring makes the module discard new records and count them. Markers report the losses in the stream. At the end the
counts must agree: records written equal records read, and records lost equal the records that markers report.
"""

from __future__ import annotations

import logging
import mmap
import platform
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

from collector.kmod.device import Hello, MaceDevice, Stats, TakenSubBuffers
from collector.kmod.ring import CpuRing, Subbuf
from collector.live.filter import SessionFilter, wanted
from collector.live.places import NETNS_MASK, Places
from collector.live.record_merge import Marker, RingMerger
from collector.live.record_source import RecordSource
from collector.live.ring_source import FollowsDevices
from collector.machine.kernel import online_cpus
from collector.memory import keep_freed_memory
from contracts import clock
from contracts.abi import RECORD
from contracts.config import CaptureConfig
from contracts.errors import MaceError, SourceError, Unavailable
from contracts.hooks import BY_HOOK, silent_on
from contracts.interfaces import Status, StreamHeader, StreamItem
from contracts.schema import HookCost

_log = logging.getLogger(__name__)

_SUBBUF_BYTES: Final = 256 << 10
"""Largest sub-buffer: 4095 records make the cost of some hundred numpy calls negligible, and still fit the cache."""
_SUBBUFS_MIN: Final = 16
"""Smallest number of sub-buffers in a ring: each tick uses one, however few its records; the hold-back and the reader
keep a few."""
_WATERMARK_SHARE: Final = 4
"""A ring wakes the source when one in this many of its sub-buffers is full."""
_FILLING: Final = 0.4
"""Fill of a ring that shows that a tick came late: the watermark wakes the source at a quarter."""
_COPY_ABOVE: Final = 0.5
"""Share of a ring that may wait in place for the hold-back."""
_FLUSH_MS: Final = 10_000
"""The module's longest flush interval: the source's own ticks flush the rings."""


class Module(Protocol):
    """The methods of `MaceDevice` that the source calls."""

    hello: Hello

    def greet(self) -> Hello: ...
    def setup(
        self, *, subbuf_bytes: int, subbufs: int, watermark: int, flush_ms: int, wanted: SessionFilter, cookies: bool
    ) -> tuple[int, ...]: ...
    def has_ring(self, cpu: int) -> bool: ...
    def map(self, cpu: int) -> mmap.mmap: ...
    def record_at(self, places: Places) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def take(self, cpu: int, *, release: int = 0, flush: bool = False) -> TakenSubBuffers: ...
    def stats(self, cpu: int | None = None) -> Stats: ...
    def cost(self) -> tuple[HookCost, ...]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class KmodConfig:
    """Settings of the source; the defaults suit a busy host. Raises `ValueError` for a value out of range."""

    ring_kib_per_cpu: int = 8192
    """Memory for each CPU's ring, KiB. 8 MiB are about 131,000 records."""
    poll_interval_s: float = 0.05
    """Interval of the ticks while a ring fills."""
    gather_interval_s: float = 0.5
    """Longest stay of records in rings that do not fill."""
    hold_back_ms: float = 50
    """Delay added before records are passed on, so that a topology read later can still precede them."""
    host: str = ""
    """Host name in the stream's header; empty: the machine's own name."""
    wanted: SessionFilter = field(default_factory=SessionFilter)

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("ring_kib_per_cpu", self.ring_kib_per_cpu >= 2 * mmap.PAGESIZE // 1024, "two pages at least"),
            ("poll_interval_s", 0 < self.poll_interval_s <= 10, "more than 0 and at most 10"),
            ("gather_interval_s", 0 < self.gather_interval_s <= 10, "more than 0 and at most 10"),
            ("hold_back_ms", 0 <= self.hold_back_ms <= 10_000, "0 to 10000"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def subbuf_bytes(self) -> int:
        """Bytes of one sub-buffer: a power of two, at least a page, small enough for 16 sub-buffers in a ring."""
        most = min(_SUBBUF_BYTES, self.ring_kib_per_cpu * 1024 // _SUBBUFS_MIN)
        return max(1 << max(most, 1).bit_length() - 1, mmap.PAGESIZE)

    @property
    def subbufs(self) -> int:
        """Sub-buffers of one ring."""
        return max(self.ring_kib_per_cpu * 1024 // self.subbuf_bytes, 2)


@dataclass(slots=True)
class _Cpu:
    """State of one CPU's ring."""

    ring: CpuRing
    last_ns: int
    """Time of the last record that was handed over."""
    told_lost: int = 0
    """Lost records that markers have reported."""
    head_lost: int = 0
    """Lost records that the heads of sub-buffers have reported."""


class KmodSource(RecordSource):
    """A `contracts.interfaces.Source` over /dev/mace."""

    def __init__(
        self,
        config: KmodConfig | None = None,
        devices: FollowsDevices | None = None,
        open_module: Callable[[], Module] = MaceDevice,
    ) -> None:
        self.config = config or KmodConfig()
        super().__init__(
            "kmod",
            RingMerger,
            host=self.config.host,
            hold_back_ms=self.config.hold_back_ms,
            poll_interval_s=self.config.poll_interval_s,
            gather_interval_s=self.config.gather_interval_s,
            follower=devices,
            filling=_FILLING,
        )
        self._open_module = open_module
        self._module: Module | None = None
        self._cpus: dict[int, _Cpu] = {}
        self._elsewhere: int | None = None
        """CPU in the markers for losses of CPUs without a ring: one that came online after the rings were made."""
        self._elsewhere_told = 0
        self._cost_before: dict[int, HookCost] = {}
        self._cost: tuple[HookCost, ...] = ()

    # --- lifecycle ------------------------------------------------------------------------------

    @staticmethod
    def check(open_module: Callable[[], Module] = MaceDevice) -> Status:
        """Return whether this source can run here, with the module's version and hooks."""
        try:
            module = open_module()
        except Unavailable as error:
            return Status(ok=False, detail=error.why, remedy=error.remedy)
        except MaceError as error:
            what, _, remedy = str(error).partition("; ")
            return Status(ok=False, detail=what, remedy=remedy)
        try:
            hello, cost = module.hello, module.cost()
        except MaceError as error:
            return Status(ok=False, detail=str(error))
        finally:
            module.close()
        missing = [info.name for hook, info in BY_HOOK.items() if hook not in hello.hooks]
        without = f", without {', '.join(missing)}" if missing else ""
        sees = "every network namespace" if hello.sees_all else "its own network namespace only"
        silent = f"; {told}" if (told := silent_on(platform.release())) else ""
        paid = "; ".join(f"{BY_HOOK[c.hook].name} {c.ns_per_call:.0f} ns" for c in cost if c.timed)
        return Status(
            ok=True,
            detail=f"module {hello.version}, ABI {'.'.join(map(str, hello.abi))}: {len(hello.hooks)} of {len(BY_HOOK)}"
            f" hooks{without}; sees {sees}{silent}" + (f"; own cost per call: {paid}" if paid else ""),
        )

    async def _acquire(self) -> StreamHeader:
        keep_freed_memory()
        self._module = module = self._open_module()
        hello = module.hello
        asked = self.config.wanted.hooks
        hooks = tuple(hook for hook in hello.hooks if not asked or hook in asked)
        if not hooks:
            raise Unavailable("kmod", "this kernel has none of the hooks", "a kernel with CONFIG_NET and tracing")
        self._began_ns = time.monotonic_ns()
        config = self.config
        wanted = replace(config.wanted, hooks=hooks)
        await self._follow(wakes=True)
        cookies = hello.cookies and self._identify_by_cookie()
        self._learned(self._devices)
        places = self._find_places(config.wanted, by_cookie=cookies)
        if places is not None and not hello.sees_all:
            self._refuse_others(places, hello.netns, cookies=cookies)
        cpus = module.setup(
            subbuf_bytes=config.subbuf_bytes,
            subbufs=config.subbufs,
            watermark=max(config.subbufs // _WATERMARK_SHARE, 1),
            flush_ms=_FLUSH_MS,
            wanted=wanted,
            cookies=cookies,
        )
        if places is not None:
            module.record_at(places)
        for cpu in cpus:
            self._add_cpu(cpu, self._began_ns)
        self._cost_before = {cost.hook: cost for cost in module.cost()}
        pair = clock.measure()
        module.start()
        return self._header(len(cpus), pair, [BY_HOOK[hook].tracepoint for hook in hooks])

    def _refuse_others(self, places: Places, own: int, *, cookies: bool) -> None:
        """Raise `Unavailable` for a namespace other than that of inode `own`, which the session would not see."""
        named = [netns & NETNS_MASK for netns in places.netns]
        if any((self._inodes.get(netns) if cookies else netns) != own for netns in named):
            raise Unavailable(
                "kmod", "this session sees only its own network namespace, but others are configured", "run as root"
            )

    def _record_at(self, places: Places) -> None:
        if self._module is not None:
            self._module.record_at(places)

    def _add_cpu(self, cpu: int, since_ns: int) -> None:
        assert self._module is not None
        config, take = self.config, partial(self._module.take, cpu)
        ring = CpuRing(cpu, self._module.map(cpu), config.subbuf_bytes, config.subbufs, take)
        self._cpus[cpu] = _Cpu(ring, last_ns=since_ns)
        self._merger.add_cpu(cpu, since_ns)

    def _give_back(self) -> None:
        # No view of a ring may remain when it is unmapped.
        self._merger.clear()
        self._cpus.clear()
        if self._module is not None:
            module, self._module = self._module, None
            try:
                module.stop()
            finally:
                module.close()

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Cost of the module's probes since `open`, over all sessions; empty if this session may not read it."""
        if self._module is not None:
            self._cost = self._cost_of(self._module)
        return self._cost

    def _cost_of(self, module: Module) -> tuple[HookCost, ...]:
        return tuple(
            HookCost(c.hook, c.calls - b.calls, c.timed - b.timed, c.timed_ns - b.timed_ns)
            for c in (module.cost() if self._cost_before else ())
            if (b := self._cost_before.get(c.hook)) is not None
        )

    # --- the stream -----------------------------------------------------------------------------

    async def items(self) -> AsyncIterator[StreamItem]:
        """Yield topologies and batches until `request_stop`. A slow consumer fills the module's rings, not memory."""
        assert self._module is not None
        yield self._topology(self._began_ns)
        while not self._stopping:
            self._take_all()
            # Progress lets the consumer finish these records before the next tick. In a flood that tick comes soon.
            for item in self._released(progress=not self._swelling):
                yield item
            self._make_room()
            self._devices_changed()
            if not self._module.hello.sees_all and self._module.greet().netns_gone:
                _log.warning("kmod: the network namespace of this session has died: no further record will follow")
                break
            await self._pause(self._rest_s(), self._module.fileno())
        self._module.stop()
        self._take_all(last=True)
        for item in self._released(to_the_end=True):
            yield item
        self._balance()

    # --- the rings ------------------------------------------------------------------------------

    def _take_all(self, *, last: bool = False) -> None:
        """Read all rings, and report what they have lost."""
        self._add_late_cpus()
        fresh = 0
        for number, cpu in self._cpus.items():
            seen = cpu.ring.seen
            complete_ns = self._take(number, cpu, flush=True)
            fresh = max(fresh, cpu.ring.seen - seen)
            if cpu.ring.was_full or last:
                self._tell_untold(number, cpu)
            self._merger.complete(number, complete_ns)
        config = self.config
        self._found(
            max(cpu.ring.fill for cpu in self._cpus.values()),
            fresh * RECORD.itemsize / (config.subbuf_bytes * config.subbufs),
        )
        self._tell_elsewhere(last=last)

    def _take(self, number: int, cpu: _Cpu, *, flush: bool) -> int:
        fresh, now_ns = cpu.ring.take(flush=flush)
        for subbuf in fresh:
            if subbuf.lost:
                cpu.head_lost += subbuf.lost
                self._mark(number, cpu, cpu.head_lost, _first_ns(subbuf, now_ns))
            if len(subbuf.records):
                last_ns = int(subbuf.records["ts_ns"][-1])
                self._merger.push(number, subbuf)
                cpu.last_ns = last_ns
        return now_ns

    def _tell_untold(self, number: int, cpu: _Cpu) -> None:
        """Report records lost behind the last sub-buffer now: the next one, whose head has the count, may take long."""
        assert self._module is not None
        self._mark(number, cpu, int(self._module.stats(number).lost.sum()), time.monotonic_ns())

    def _mark(self, number: int, cpu: _Cpu, lost: int, until_ns: int) -> None:
        """Push a marker for the records, of `lost` in total, that no marker has reported yet."""
        if lost > cpu.told_lost:
            self._merger.push(number, Marker(number, cpu.last_ns, lost - cpu.told_lost, until_ns))
            cpu.told_lost = lost

    def _add_late_cpus(self) -> None:
        """Add the rings of CPUs that came online: the module makes a ring before the CPU's first packet."""
        assert self._module is not None
        for cpu in online_cpus():
            if cpu not in self._cpus and self._module.has_ring(cpu):
                # Records that the CPU wrote before `given_ns` arrive too late; the merger counts them as late.
                self._add_cpu(cpu, self._since_ns())

    def _tell_elsewhere(self, *, last: bool) -> None:
        """Report the losses of CPUs without a ring, which is all of their records.

        A CPU has no ring if memory was short when it came online.
        """
        assert self._module is not None
        late = [cpu for cpu in online_cpus() if cpu not in self._cpus]
        if self._elsewhere is None and (late or last):
            since = self._since_ns()
            self._elsewhere = late[0] if late else max(self._cpus) + 1
            self._merger.add_cpu(self._elsewhere, since)
            if late:
                _log.warning("kmod: CPU %d came online without memory for a ring: its records are lost", late[0])
        if self._elsewhere is not None:
            # Read the total first: losses of rings in between make the difference too small for now, never too large.
            everywhere = int(self._module.stats().lost.sum())
            lost = everywhere - sum(int(self._module.stats(cpu).lost.sum()) for cpu in self._cpus)
            now_ns = time.monotonic_ns()
            if lost > self._elsewhere_told:
                since = self._since_ns()
                self._merger.push(self._elsewhere, Marker(self._elsewhere, since, lost - self._elsewhere_told, now_ns))
                self._elsewhere_told = lost
            self._merger.complete(self._elsewhere, now_ns)

    def _make_room(self) -> None:
        """Release sub-buffers that were passed on; copy waiting records out of a ring that is more than half full."""
        for number, cpu in self._cpus.items():
            if cpu.ring.fill > _COPY_ABOVE:
                cpu.ring.copy_out()
            if cpu.ring.releasable > 1 / _WATERMARK_SHARE:
                self._take(number, cpu, flush=False)

    def _balance(self) -> None:
        """Compare the module's counts with those of this source at the end; raises `SourceError` if they differ."""
        assert self._module is not None
        stats = self._module.stats()
        written, lost = int(stats.written.sum()), int(stats.lost.sum())
        read = sum(cpu.ring.seen for cpu in self._cpus.values())
        told = sum(cpu.told_lost for cpu in self._cpus.values()) + self._elsewhere_told
        if (written, lost) != (read, told):
            raise SourceError(
                f"kmod: the module has written {written:,} records and lost {lost:,}, but MACE has read {read:,} and"
                f" reported {told:,} as lost: a defect, please report"
            )


def _first_ns(subbuf: Subbuf, otherwise_ns: int) -> int:
    return int(subbuf.records["ts_ns"][0]) if len(subbuf.records) else otherwise_ns


def configured(config: CaptureConfig, devices: FollowsDevices, host: str = "") -> KmodSource:
    """Make the source that `[capture]` describes; raises `ConfigError` for an unknown protocol."""
    return KmodSource(
        KmodConfig(
            ring_kib_per_cpu=config.ring_mib * 1024,
            poll_interval_s=config.poll_ms / 1000,
            gather_interval_s=config.gather_ms / 1000,
            hold_back_ms=config.hold_back_ms,
            host=host,
            wanted=wanted(config),
        ),
        devices,
    )
