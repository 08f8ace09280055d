"""Perfetto traces as a source: the network events that traced recorded, as if MACE had.

    survey: clocks, losses, where each CPU's packets lie in time
    packets ──▶ bundles ──▶ EventDecoder ──▶ Merger ──▶ batches, in time order

A trace knows devices by name only. What they are is taken from a capture of the same host, if one is given
(`FileOptions.topology`); else each is an unknown device of its name. docs/perfetto.md says which events to record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from collector import known_topology
from collector.gaps import marker, settle
from collector.known_topology import NAMES_ONLY, TopologyTeller
from collector.memory import keep_freed_memory
from collector.merge import Merger
from collector.pages.decoding import Sightings, process_key
from collector.perfetto.bundle import Bundle
from collector.perfetto.clock import UNKNOWN_UNCERTAINTY_NS, FtraceClock
from collector.perfetto.events import DecodedBundle, EventDecoder
from collector.perfetto.survey import BUNDLE, DROPPED, FIRST, MACHINE, SEQUENCE, EventSequence, Survey, survey
from collector.perfetto.wire import PacketReader
from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from contracts.clock import ClockPair
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.version import VERSION

NAME: Final = "perfetto"
_PIECE_EVENTS: Final = 1 << 16
"""Decoded at once: a few hundred bytes each."""
_NEVER_NS: Final = 1 << 62
_HOLD_BACK_NS: Final = 50_000_000
"""As in other sources: an event may stand behind one of a later time by as long as its writer was held up."""


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Header, and the time of the first event. Raises `Unavailable` or `CaptureError`."""
    opened = _Opened.of(paths[0], options)
    return Description(opened.header, opened.first_ns + opened.header.clock.offset_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """The reader of one trace."""
    return PerfettoReader(paths[0], options)


@dataclass(slots=True)
class _Opened:
    """A trace that was looked through."""

    survey: Survey
    header: StreamHeader
    first_ns: int
    """Of the first event, CLOCK_MONOTONIC."""
    known: known_topology.Known | None
    same_clock: bool
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, options: FileOptions) -> _Opened:
        found = survey(path, salvage=options.salvage)
        known = known_topology.read(options.topology)
        warnings: list[str] = []
        if not found.first_ns:
            raise CaptureError(
                path, 0, "it has no ftrace events: record net/* and skb/* with the data source linux.ftrace"
            )
        if FtraceClock.LOCAL in found.clock_kinds:
            raise CaptureError(
                path, 0, "its times are of the trace clock `local`, which differs from CPU to CPU: record with `boot`"
            )
        if known is None:
            warnings.append(f"{path}: {NAMES_ONLY}")
        if found.other_machines:
            warnings.append(f"{path}: {found.other_machines} packets of other machines were left out")
        earliest = min(times[0] for times in found.first_ns.values())
        kinds = found.clock_kinds - {FtraceClock.BOOT}
        first = earliest if kinds else int(found.clocks.monotonic(np.array([earliest]))[0])
        clock = found.clocks.pair
        if clock is None:
            clock = ClockPair(first, path.stat().st_mtime_ns, UNKNOWN_UNCERTAINTY_NS)
            warnings.append(
                f"{path}: no clock snapshot tells the time of day, so the first event is dated by when the file was "
                "last written"
            )
        if known is not None and found.kernel and known.header.kernel != found.kernel:
            warnings.append(
                f"{path}: of Linux {found.kernel}, but the topology is of Linux {known.header.kernel}: another host?"
            )
        same = known is not None and not kinds and known.header.kernel == found.kernel
        header = StreamHeader(
            source=NAME,
            host=known.header.host if known else "unknown",
            run=found.run,
            kernel=found.kernel,
            boot_id=known.header.boot_id if known and same else "",
            cpus=found.cpus,
            clock=clock,
            hooks=found.hooks,
            mace_version=VERSION,
            command=("traced",),
        )
        return cls(found, header, first, known, same, warnings)


class PerfettoReader(FileReader):
    """A Perfetto trace as a stream."""

    def __init__(self, path: Path | str, options: FileOptions | None = None) -> None:
        self.path: Final = Path(path)
        self._options = options or FileOptions()
        self._opened: _Opened | None = None
        self._packets: PacketReader | None = None
        self._merger = Merger(_HOLD_BACK_NS)
        self._discarded = 0
        self._uncounted = 0
        self._offset: int | None = None
        self.sightings: Final = Sightings()
        self.decoder: Final = EventDecoder(self.sightings, process_key())

    def _open(self) -> StreamHeader:
        """Look through the trace. Raises `Unavailable` or `CaptureError`."""
        keep_freed_memory()
        self._opened = _Opened.of(self.path, self._options)
        self._packets = PacketReader(self.path, salvage=self._options.salvage)
        return self._opened.header

    def close(self) -> None:
        """Close the file."""
        if self._packets is not None:
            self._packets.close()

    @property
    def discarded(self) -> int:
        """Records that salvage left out, one where they cannot be counted, and those that came too late."""
        return self._discarded + self._merger.late + (self._packets.holes if self._packets else 0)

    @property
    def bytes_total(self) -> int:
        """Size of the file."""
        return self._packets.bytes_total if self._packets else 0

    @property
    def bytes_read(self) -> int:
        """How far reading has come."""
        return self._packets.bytes_read if self._packets else 0

    @property
    def threads(self) -> dict[int, tuple[int, str]]:
        """Names of threads, as the trace tells them: thread -> (its process, its name)."""
        return self._opened.survey.threads if self._opened else {}

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one line each."""
        if self._opened is None or self._packets is None:
            return []
        told = [*self._opened.warnings, *self._packets.damage]
        if self._packets.damaged > len(self._packets.damage):
            told.append(f"{self.path}: and {self._packets.damaged - len(self._packets.damage):,} more damaged places")
        if self.decoder.unresolved:
            told.append(
                f"{self.path}: of {self.decoder.unresolved:,} records it is not known whose buffer their number stands "
                "for; record net/net_dev_start_xmit and net/net_dev_xmit as well, which tell it"
            )
        if self._uncounted:
            told.append(
                f"{self.path}: {self._uncounted} gaps do not say how many events were lost in them; told are as many "
                "as the kernel's counters leave, or one each"
            )
        return told

    def items(self) -> Iterator[StreamItem]:
        """See `FileReader`."""
        assert self._opened is not None, "open() first"
        teller = TopologyTeller(self._opened.known, self.sightings, same_clock=self._opened.same_clock)
        yield from teller.stream(self._merged())
        if not teller.begun:
            yield teller.topology(0)

    def _merged(self) -> Iterator[Batch]:
        assert self._opened is not None
        assert self._packets is not None
        found = self._opened.survey
        streams = {stream: _StreamState(stream, times) for stream, times in found.first_ns.items()}
        keys = {stream: number for number, stream in enumerate(streams)}
        several = len({sequence for sequence, _ in streams}) > 1
        losses = _Losses(found)
        for number in keys.values():
            self._merger.add_cpu(number, -_NEVER_NS)
        for piece in self._pieces():
            for (stream, bundle, dropped, holes), decoded in zip(
                piece, self.decoder.decode([bundle for _, bundle, _, _ in piece]), strict=True
            ):
                if decoded.why:
                    self._packets.refuse(bundle.offset, f"events of CPU {bundle.cpu}: {decoded.why}")
                    self._discarded += decoded.damaged
                state = streams.get(stream)
                if state is None:
                    continue  # none of its events has a time
                # What salvage skipped may have been of any CPU: nothing is matched across it.
                state.gap = state.gap or holes > state.holes
                state.holes = holes
                for batch in self._finished(state, bundle, decoded, losses, dropped=dropped):
                    self._merger.push(keys[stream], batch)
                self._merger.complete(keys[stream], self._monotonic(bundle, state.complete_ns()))
            watermark = self._merger.watermark_ns
            if watermark is not None and watermark > -_HOLD_BACK_NS:
                yield self._once(self._merger.take(watermark), several=several)
        self._uncounted = losses.uncounted
        for stream, state in streams.items():
            if state.lost:
                end = state.last_ns or self._opened.first_ns
                self._merger.push(keys[stream], marker(stream[1], end, state.lost, end))
        for cpu, lost in losses.rest().items():
            self._merger.add_cpu(len(keys) + cpu, -_NEVER_NS)
            end = self._merger.given_ns or self._opened.first_ns
            self._merger.push(len(keys) + cpu, marker(cpu, end, lost, end))
        yield self._once(self._merger.flush(), several=several)

    def _pieces(self) -> Iterator[list[tuple[EventSequence, Bundle, bool, int]]]:
        """Bundles, whether their sequence lost some before them, and how many holes the file had up to there."""
        assert self._packets is not None
        piece: list[tuple[EventSequence, Bundle, bool, int]] = []
        waiting = 0
        dropped: set[int] = set()
        cpus_told: dict[int, set[int]] = {}
        for packet in self._packets:
            sequence = packet.number(SEQUENCE)
            if packet.number(DROPPED) and not packet.number(FIRST):
                dropped.add(sequence)
                cpus_told[sequence] = set()
            raw = packet.message(BUNDLE)
            if raw is None or packet.number(MACHINE):
                continue
            bundle = Bundle.parse(packet.offset, raw)
            # What a sequence lost may have been of any CPU: each has a gap before its next events.
            gap = sequence in dropped and bundle.cpu not in cpus_told[sequence]
            if gap:
                cpus_told[sequence].add(bundle.cpu)
            piece.append(((sequence, bundle.cpu), bundle, gap, self._packets.holes))
            waiting += len(bundle.starts) + 8
            if waiting >= _PIECE_EVENTS:
                yield piece
                piece, waiting = [], 0
        yield piece

    def _finished(
        self, state: _StreamState, bundle: Bundle, decoded: DecodedBundle, losses: _Losses, *, dropped: bool
    ) -> Iterator[Batch]:
        """The records of a bundle on CLOCK_MONOTONIC, after a marker for what was lost before them."""
        if bundle.first_ns() is not None:
            state.seen += 1
        if bundle.lost:
            state.lost += losses.settle(bundle.cpu)
        state.lost += dropped
        state.gap = state.gap or bundle.lost or dropped or bool(decoded.why)
        if not state.begun:
            state.lost += losses.at_the_start(bundle.cpu)
        batch = decoded.batch
        if not len(batch):
            return
        ts = self._monotonic_of(bundle, batch.ts_ns)
        first = int(ts.min())
        if state.gap or state.lost:
            yield marker(bundle.cpu, min(first if state.last_ns is None else state.last_ns, first), state.lost, first)
            state.gap, state.lost = False, 0
        state.begun = True
        state.last_ns = int(ts.max())
        yield Batch(ts, *(column for name, column in batch.columns() if name != "ts_ns"))

    def _monotonic_of(self, bundle: Bundle, ts: np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.int64]:
        assert self._opened is not None
        clocks = self._opened.survey.clocks
        if bundle.clock == FtraceClock.MONO_RAW:
            return clocks.from_raw(ts)
        if bundle.clock != FtraceClock.BOOT and bundle.boot_ns:
            offset = self._boot_offset(bundle)
            return clocks.monotonic(ts + offset)
        return clocks.monotonic(ts)

    def _boot_offset(self, bundle: Bundle) -> int:
        """What to add to times of another clock: that of the first bundle, as long as the two run alike."""
        offset = bundle.boot_ns - bundle.ftrace_ns
        if self._offset is None or abs(offset - self._offset) > _HOLD_BACK_NS:
            self._offset = offset
        return self._offset

    def _monotonic(self, bundle: Bundle, ns: int) -> int:
        return ns if abs(ns) >= _NEVER_NS else int(self._monotonic_of(bundle, np.array([ns]))[0])

    def _once(self, batch: Batch, *, several: bool) -> Batch:
        """Without what two data sources of one trace both have of the same ring."""
        if not several or len(batch) < 2:
            return batch
        order = np.lexsort((np.arange(len(batch)), batch.l3_len, batch.dev, batch.hook, batch.cpu, batch.ts_ns))
        same = np.ones(len(batch) - 1, np.bool_)
        for column in (batch.ts_ns, batch.cpu, batch.hook, batch.dev, batch.l3_len):
            same &= column[order][1:] == column[order][:-1]
        again = np.zeros(len(batch), np.bool_)
        again[order[1:]] = same & (batch.hook[order][1:] != Hook.LOST)
        return batch[~again]


@dataclass(slots=True)
class _StreamState:
    """How far one stream has been read."""

    stream: EventSequence
    times: list[int]
    seen: int = 0
    """Packets with events."""
    last_ns: int | None = None
    holes: int = 0
    """Of the file, up to its last bundle."""
    gap: bool = False
    """Something was lost, or could not be read, since the last record."""
    lost: int = 0
    """... so many, by the ring or a buffer."""
    begun: bool = False
    """It has had a record."""

    def __post_init__(self) -> None:
        # No packet from here on begins before this.
        for i in range(len(self.times) - 2, -1, -1):
            self.times[i] = min(self.times[i], self.times[i + 1])

    def complete_ns(self) -> int:
        """No record before this will come any more."""
        return self.times[self.seen] if self.seen < len(self.times) else _NEVER_NS


class _Losses:
    """Shares out what the kernel says that each CPU's ring lost among the gaps of that CPU."""

    def __init__(self, found: Survey) -> None:
        self._left = dict(found.lost)
        self._gaps = dict(found.flagged)
        self.uncounted = 0

    def settle(self, cpu: int) -> int:
        """What the next gap of a CPU lost: all that is left but one for each gap that is to come; at least one."""
        gaps = self._gaps.get(cpu, 1)
        left = self._left.get(cpu, 0)
        lost = max(settle([None] * gaps, left)[0], 1)
        self._gaps[cpu], self._left[cpu] = gaps - 1, max(left - lost, 0)
        self.uncounted += 1
        return lost

    def at_the_start(self, cpu: int) -> int:
        """What a CPU lost of which no gap is told: before its first packet, since that may be where it was."""
        return self._left.pop(cpu, 0) if not self._gaps.get(cpu) else 0

    def rest(self) -> dict[int, int]:
        """By CPU: what was lost of which no packet tells anything."""
        return {cpu: left for cpu, left in self._left.items() if left}
