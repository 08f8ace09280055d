"""BPF programs as a live source: records of 64 bytes, as the module's, read from a ring per CPU.

    programs ──slots──▶ CpuRing ──views──▶ RingMerger ──▶ batches, in time order
    (one ring per CPU)  tick by tick  markers            devices, as they change, between them

One tick reads all records in the rings. A tick runs every gather interval, earlier when a CPU has written a quarter of
a ring or a device changes, and every poll interval while a ring fills fast. A ring that was read at time T and had no
busy slot has returned all records from before T: these times drive the merge. Only a program that was running at T may
still add an earlier record, for which the hold-back waits. Records that the hold-back delays stay in the rings, or are
copied out when the rings run short of room.

A full ring makes the programs discard new records and count them by CPU and hook. Each record holds the number of
records that its CPU had lost by then, so a marker stands exactly where records are missing. The kernel does not run a
program inside itself on one CPU: it skips and counts such calls, and a marker of a CPU that does not exist reports
them. At the end the counts must agree: records lost equal the records that markers report.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import platform
import select
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.bpf.layout import COUNTS
from collector.bpf.object import OBJECT
from collector.bpf.ring import BufferRing, CpuRing, MappedRing, Wakes, is_sorted, lost_before, sorted_by_time
from collector.bpf.session import STATS_RIGHTS, UNSEEN, Session, reads_pages, ring_bytes_of
from collector.live.filter import SessionFilter, wanted
from collector.live.places import Places
from collector.live.record_merge import Marker, RingMerger
from collector.live.record_source import RecordSource
from collector.live.ring_source import FollowsDevices
from collector.live.stretch import Stretch
from collector.machine.kernel import online_cpus
from collector.memory import keep_freed_memory
from contracts import clock
from contracts.abi import RECORD
from contracts.config import CaptureConfig
from contracts.errors import MaceError, SourceError, Unavailable
from contracts.hooks import BY_HOOK, HOOKS, Hook, silent_on
from contracts.interfaces import Status, StreamHeader, StreamItem
from contracts.schema import HookCost

_log = logging.getLogger(__name__)

_WATERMARK_SHARE: Final = 4
"""A CPU wakes the source when it has written one in this many of its ring's slots."""
_FILLING: Final = 0.4
"""Fill of a ring that shows that a tick came late: the watermark wakes the source at a quarter."""
_COPY_ABOVE: Final = 0.5
"""Share of a ring that may wait in place for the hold-back."""
_SETTLE_S: Final = 0.01
"""Pause between stopping the programs and the last reading, in which a running program still writes its record, s."""
_TIMED_EVERY_S: Final = 3.2
"""The kernel times the programs for one short tick in this time, because timing makes each run some 40 ns longer."""
_MACHINE: Final = "x86_64"
"""Architecture that keeps loads in order, so that a ring can be read without a barrier."""


@dataclass(frozen=True, slots=True)
class BpfConfig:
    """Settings of the source; the defaults suit a busy host. Raises `ValueError` for a value out of range."""

    ring_kib_per_cpu: int = 8192
    """Memory for each CPU's ring, KiB; rounded down to a power of two. 8 MiB are 131,072 records."""
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
            ("ring_kib_per_cpu", self.ring_kib_per_cpu >= mmap.PAGESIZE // 1024, "at least a page"),
            ("poll_interval_s", 0 < self.poll_interval_s <= 10, "more than 0 and at most 10"),
            ("gather_interval_s", 0 < self.gather_interval_s <= 10, "more than 0 and at most 10"),
            ("hold_back_ms", 0 <= self.hold_back_ms <= 10_000, "0 to 10000"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def ring_bytes(self) -> int:
        """Size of one ring, bytes: the largest power of two within `ring_kib_per_cpu`."""
        return ring_bytes_of(self.ring_kib_per_cpu)


@dataclass(slots=True)
class _Cpu:
    """State of one CPU's ring."""

    ring: CpuRing | None
    """None if there was no memory for a ring: all records of the CPU are lost."""
    last_ns: int
    """Time of the last record."""
    told_lost: int = 0
    """Lost records that markers have reported."""


class _Merger(RingMerger):
    """A `RingMerger` whose stretches of one CPU may overlap in time.

    An interrupt's slot may precede that of the program that it interrupted, whose record is earlier, and a tick may
    fall between the two. `push` sorts such a stretch together with the waiting stretches that it overlaps.
    """

    def push(self, cpu: int, stretch: Stretch) -> None:
        before = self._waiting[cpu]
        pieces = [stretch.records]
        while before and len(pieces[0]) and before[-1].records["ts_ns"][-1] > stretch.records["ts_ns"][0]:
            earlier = before.pop()
            pieces.insert(0, earlier.records.copy())
            earlier.given(len(earlier.records))
        if len(pieces) > 1:
            whole = sorted_by_time(pieces)
            stretch.given(len(stretch.records))
            stretch = Stretch(whole, held=False)
        super().push(cpu, stretch)


class BpfSource(RecordSource):
    """A `contracts.interfaces.Source` that reads MACE's BPF programs on this machine's tracepoints."""

    def __init__(
        self,
        config: BpfConfig | None = None,
        devices: FollowsDevices | None = None,
        open_session: Callable[..., Session] = Session,
    ) -> None:
        self.config = config or BpfConfig()
        super().__init__(
            "bpf",
            partial(_Merger, of="the BPF programs"),
            host=self.config.host,
            hold_back_ms=self.config.hold_back_ms,
            poll_interval_s=self.config.poll_interval_s,
            gather_interval_s=self.config.gather_interval_s,
            follower=devices,
            filling=_FILLING,
        )
        self._open_session = open_session
        self._session: Session | None = None
        self._cpus: dict[int, _Cpu] = {}
        self._wakes: Wakes | None = None
        self._filling: select.epoll | None = None
        """Readable when a CPU has written a quarter of its ring since it last woke the source."""
        self._counts: npt.NDArray[Any] = np.zeros(0, COUNTS)
        """The programs' counts at the last tick."""
        self._missed_told = 0
        """Skipped calls that markers have reported."""
        self._nowhere: int | None = None
        """Number of the CPU that does not exist, whose markers report skipped calls; None before the first."""
        self._next_timed_s = 0.0
        self._timed_from: dict[Hook, tuple[int, int]] = {}
        self._timed: dict[Hook, tuple[int, int]] = {}
        """By hook: number of runs that were timed, and their total time, ns."""
        self._cost: tuple[HookCost, ...] = ()

    # --- lifecycle ------------------------------------------------------------------------------

    @staticmethod
    def check(open_session: Callable[..., Session] = Session) -> Status:
        """Return whether this source can run here, by loading the programs and unloading them."""
        try:
            _check_machine()
            session = open_session(SessionFilter(), ring_bytes=mmap.PAGESIZE, wake_every=1, cookies=False, path=OBJECT)
            timed = session.time_runs(on=True)
            missing = [info.name for info in HOOKS if info.hook not in session.programs]
            refusal = session.refusal
            session.close()
        except Unavailable as error:
            return Status(ok=False, detail=error.why, remedy=error.remedy)
        except MaceError as error:
            return Status(ok=False, detail=str(error))
        without = f", without {', '.join(missing)}" if missing else ""
        refused = f"; {refusal}, so {UNSEEN}" if refusal else ""
        untimed = "" if timed else f"; not what the programs cost, which needs {STATS_RIGHTS}"
        silent = f"; {told}" if (told := silent_on(platform.release())) else ""
        return Status(
            ok=True,
            detail=f"programs on {len(HOOKS) - len(missing)} of {len(HOOKS)} hooks{without}; sees every network"
            f" namespace; content key{'' if reads_pages() else ' of packets without payload in pages'}"
            f"{untimed}{silent}{refused}",
        )

    async def _acquire(self) -> StreamHeader:
        _check_machine()
        keep_freed_memory()
        self._began_ns = time.monotonic_ns()
        config = self.config
        await self._follow(wakes=True)
        cookies = self._identify_by_cookie()
        self._learned(self._devices)
        places = self._find_places(config.wanted, by_cookie=cookies)
        self._session = session = self._open_session(
            config.wanted,
            ring_bytes=config.ring_bytes,
            wake_every=max(config.ring_bytes // RECORD.itemsize // _WATERMARK_SHARE, 1),
            cookies=cookies,
            path=OBJECT,
        )
        if places is not None:
            session.record_at(places)
        self._filling = select.epoll()
        if session.maps_rings:
            self._wakes = Wakes(session.wakes_fd)
            self._wakes_up(session.wakes_fd)
        for cpu in online_cpus():
            self._cpus[cpu] = _Cpu(self._ring_of(cpu), last_ns=self._began_ns)
            self._merger.add_cpu(cpu, self._began_ns)
        session.attach()
        self._missed_before = sum(runs.missed for runs in session.runs().values())
        pair = clock.measure()
        session.start()
        return self._header(len(self._cpus), pair, [BY_HOOK[hook].tracepoint for hook in session.programs])

    def _record_at(self, places: Places) -> None:
        if self._session is not None:
            self._session.record_at(places)

    def _ring_of(self, cpu: int) -> CpuRing:
        assert self._session is not None
        fd = self._session.add_ring(cpu)
        if self._session.maps_rings:
            return MappedRing(cpu, fd, self.config.ring_bytes)
        self._wakes_up(fd)
        return BufferRing(cpu, fd, self.config.ring_bytes)

    def _wakes_up(self, fd: int) -> None:
        """Let the programs wake the source through the BPF ring buffer `fd`."""
        assert self._filling is not None
        # Edge-triggered: to the kernel any buffer with an entry is readable, but the programs choose when to wake us.
        self._filling.register(fd, select.EPOLLIN | select.EPOLLET)

    def _give_back(self) -> None:
        if self._session is not None:
            self._session.stop()
        # No view of a ring may remain when it is unmapped.
        self._merger.clear()
        rings = [cpu.ring for cpu in self._cpus.values() if cpu.ring is not None]
        self._cpus.clear()
        for ring in rings:
            ring.close()
        if self._wakes is not None:
            wakes, self._wakes = self._wakes, None
            wakes.close()
        if self._filling is not None:
            filling, self._filling = self._filling, None
            filling.close()
        if self._session is not None:
            session, self._session = self._session, None
            session.close()

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Cost of the programs since `open`; empty without CAP_SYS_ADMIN, which the kernel's timing needs."""
        if self._session is not None and self._timed:
            calls = self._counts["calls"].sum(axis=0)
            self._cost = tuple(HookCost(hook, int(calls[hook]), *timed) for hook, timed in self._timed.items())
        return self._cost

    # --- the stream -----------------------------------------------------------------------------

    async def items(self) -> AsyncIterator[StreamItem]:
        """Yield topologies and batches until `request_stop`. A slow consumer fills the rings, not memory."""
        assert self._session is not None
        assert self._filling is not None
        yield self._topology(self._began_ns)
        while not self._stopping:
            self._time_runs()
            self._take_all()
            # Progress lets the consumer finish these records before the next tick. In a flood that tick comes soon.
            for item in self._released(progress=not self._swelling):
                yield item
            self._make_room()
            self._devices_changed()
            self._take_wakes()
            await self._pause(self._rest_s(soon=bool(self._timed_from)), self._filling.fileno())
        self._session.stop()
        await self._settle()
        self._take_all()
        for item in self._released(to_the_end=True):
            yield item
        self._balance()

    def _take_wakes(self) -> None:
        """Forget the wakeups until now, so that only a later one ends the pause."""
        assert self._filling is not None
        if self._wakes is not None:
            self._wakes.empty()
        self._filling.poll(0)

    async def _settle(self) -> None:
        """Read until no slot is busy, at most a second. A running program completes its slot within microseconds."""
        for _ in range(100):
            await asyncio.sleep(_SETTLE_S)
            if self._take_all():
                return
        _log.warning("bpf: a slot was still busy a second after the end; the stream lacks its record and all behind it")

    # --- the rings ------------------------------------------------------------------------------

    def _take_all(self) -> bool:
        """Read all rings, and report what they have lost; return whether no ring had a busy slot."""
        assert self._session is not None
        self._add_late_cpus()
        rings = [cpu.ring for cpu in self._cpus.values() if cpu.ring is not None]
        self._found(
            max((ring.waiting for ring in rings), default=0.0), max((ring.fresh for ring in rings), default=0.0)
        )
        begun_ns = time.monotonic_ns()
        fresh = {number: cpu.ring.take() for number, cpu in self._cpus.items() if cpu.ring is not None}
        # Read the counts after the rings: then they include every loss that a record reports.
        self._counts = counts = self._session.counts()
        for number, cpu in self._cpus.items():
            stretches, caught_up = fresh.get(number, ([], True))
            lost = int(counts["lost_all"][number])
            for taken in stretches:
                self._push(number, cpu, taken, lost)
            self._mark(number, cpu, lost - cpu.told_lost, time.monotonic_ns())
            self._merger.complete(number, begun_ns if caught_up else cpu.last_ns)
        self._tell_missed()
        return all(caught_up for _, caught_up in fresh.values())

    def _push(self, number: int, cpu: _Cpu, taken: Stretch, lost: int) -> None:
        records = taken.records
        pieces = [(0, taken)]
        if lost > cpu.told_lost:
            ahead = lost_before(records, cpu.told_lost)
            cuts = np.flatnonzero(np.diff(ahead, prepend=0)).tolist()
            if cuts:
                taken.copy_out()
                whole = taken.records
                edges = pairwise([0, *cuts, len(records)])
                pieces = [(int(ahead[at]), Stretch(whole[at:to], held=False)) for at, to in edges if to > at]
                taken.given(len(records))
        base = cpu.told_lost
        for ahead_of, piece in pieces:
            self._mark(number, cpu, base + ahead_of - cpu.told_lost, int(piece.records["ts_ns"][0]))
            cpu.last_ns = max(cpu.last_ns, int(piece.records["ts_ns"][-1]))
            if not is_sorted(piece.records):
                ordered = sorted_by_time([piece.records])
                piece.given(len(piece.records))
                piece = Stretch(ordered, held=False)
            self._merger.push(number, piece)

    def _mark(self, number: int, cpu: _Cpu, lost: int, until_ns: int) -> None:
        """Push a marker for `lost` records that no marker has reported yet."""
        if lost > 0:
            self._merger.push(number, Marker(number, cpu.last_ns, lost, until_ns))
            cpu.told_lost += lost

    def _tell_missed(self) -> None:
        """Report the calls that the kernel skipped since the last tick. It counts them per program, not per CPU."""
        assert self._session is not None
        missed = sum(runs.missed for runs in self._session.runs().values()) - self._missed_before
        if missed and self._nowhere is None:
            self._nowhere = self._session.possible_cpus
            self._nowhere_ns = self._since_ns()
            self._merger.add_cpu(self._nowhere, self._nowhere_ns)
        if self._nowhere is None:
            return
        now_ns = time.monotonic_ns()
        if missed > self._missed_told:
            marker = Marker(self._nowhere, max(self._nowhere_ns, self._since_ns()), missed - self._missed_told, now_ns)
            self._merger.push(self._nowhere, marker)
            self._missed_told = missed
        self._nowhere_ns = now_ns
        self._merger.complete(self._nowhere, now_ns)

    def _add_late_cpus(self) -> None:
        """Add rings for CPUs that came online. The programs count the records of a CPU without a ring as lost."""
        for number in online_cpus():
            if number in self._cpus:
                continue
            try:
                ring = self._ring_of(number)
            except Unavailable as error:
                _log.warning("bpf: CPU %d came online without a ring, so its records are lost: %s", number, error)
                ring = None
            since_ns = self._since_ns()
            self._cpus[number] = _Cpu(ring, last_ns=since_ns)
            self._merger.add_cpu(number, since_ns)

    def _make_room(self) -> None:
        """Release records that were passed on; copy waiting records out of a ring that is more than half full."""
        for cpu in self._cpus.values():
            if cpu.ring is not None:
                if cpu.ring.fill > _COPY_ABOVE:
                    cpu.ring.copy_out()
                cpu.ring.release()

    def _time_runs(self) -> None:
        """Switch the kernel's timing of the programs on for a tick each `_TIMED_EVERY_S`, and add up its counts."""
        assert self._session is not None
        if self._timed_from:
            for hook, runs in self._session.runs().items():
                before_runs, before_ns = self._timed_from[hook]
                timed, timed_ns = self._timed.get(hook, (0, 0))
                self._timed[hook] = (timed + runs.runs - before_runs, timed_ns + runs.run_ns - before_ns)
            self._timed_from = {}
            self._session.time_runs(on=False)
        elif (now_s := time.monotonic()) >= self._next_timed_s and self._session.time_runs(on=True):
            self._next_timed_s = now_s + _TIMED_EVERY_S
            self._timed_from = {hook: (runs.runs, runs.run_ns) for hook, runs in self._session.runs().items()}

    def _balance(self) -> None:
        """Compare the programs' counts with those of this source at the end; raises `SourceError` if they differ."""
        assert self._session is not None
        counts: npt.NDArray[Any] = self._session.counts()
        lost = int(counts["lost_all"].sum())
        told = sum(cpu.told_lost for cpu in self._cpus.values())
        if lost != told or lost != int(counts["lost"].sum()):
            raise SourceError(
                f"bpf: the programs count {int(counts['lost'].sum()):,} lost records by hook and {lost:,} in total, but"
                f" MACE has reported {told:,} as lost: a defect, please report"
            )


def _check_machine() -> None:
    if platform.machine() != _MACHINE:
        raise Unavailable(
            "bpf", f"runs on {_MACHINE} only, and this machine is {platform.machine()}", "--source ftrace, or kmod"
        )


def configured(config: CaptureConfig, devices: FollowsDevices, host: str = "") -> BpfSource:
    """Make the source that `[capture]` describes; raises `ConfigError` for an unknown protocol."""
    return BpfSource(
        BpfConfig(
            ring_kib_per_cpu=config.ring_mib * 1024,
            poll_interval_s=config.poll_ms / 1000,
            gather_interval_s=config.gather_ms / 1000,
            hold_back_ms=config.hold_back_ms,
            host=host,
            wanted=wanted(config),
        ),
        devices,
    )
