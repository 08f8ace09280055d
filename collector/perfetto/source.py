"""Perfetto traces as a source: reads the network events that traced recorded.

    survey: clocks, losses, times of each CPU's packets
    packets ──▶ bundles ──▶ EventDecoder ──▶ Merger ──▶ batches, in time order

A trace contains only the names of devices. Their namespaces and connections are read from a capture of the same host,
if one is given (`FileOptions.topology`); otherwise each is an unknown device of that name. docs/perfetto.md lists the
events to record.
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
from collector.merge import HOLD_BACK_NS, Merger
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
"""Events decoded at once; each takes a few hundred bytes."""
_NEVER_NS: Final = 1 << 62


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Read the header and the time of the first event; raises `Unavailable` or `CaptureError`."""
    opened = _Opened.of(paths[0], options)
    return Description(opened.header, opened.first_ns + opened.header.clock.offset_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """Make a reader of one trace."""
    return PerfettoReader(paths[0], options)


@dataclass(slots=True)
class _Opened:
    """A surveyed trace, with its header and all else that is known before it is read."""

    survey: Survey
    header: StreamHeader
    first_ns: int
    """Time of the first event, CLOCK_MONOTONIC."""
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
                f"{path}: no clock snapshot contains the time of day, so the first event is dated by the file's "
                "modification time"
            )
        if known is not None and found.kernel and known.header.kernel != found.kernel:
            warnings.append(
                f"{path}: recorded on Linux {found.kernel}, but the topology on Linux {known.header.kernel}: is it of"
                " another host?"
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
    """Reads a Perfetto trace as a stream."""

    def __init__(self, path: Path | str, options: FileOptions | None = None) -> None:
        self.path: Final = Path(path)
        self._options = options or FileOptions()
        self._opened: _Opened | None = None
        self._packets: PacketReader | None = None
        self._merger = Merger(HOLD_BACK_NS)
        self._discarded = 0
        self._uncounted = 0
        self._offset: int | None = None
        self.sightings: Final = Sightings()
        self.decoder: Final = EventDecoder(self.sightings, process_key())

    def _open(self) -> StreamHeader:
        """Survey the trace; raises `Unavailable` or `CaptureError`."""
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
        """Records that salvage left out (one for each uncountable hole), and those too far out of order."""
        return self._discarded + self._merger.late + (self._packets.holes if self._packets else 0)

    @property
    def bytes_total(self) -> int:
        """Size of the file."""
        return self._packets.bytes_total if self._packets else 0

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._packets.bytes_read if self._packets else 0

    @property
    def threads(self) -> dict[int, tuple[int, str]]:
        """Thread -> (its process, its name), as recorded in the trace."""
        return self._opened.survey.threads if self._opened else {}

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        if self._opened is None or self._packets is None:
            return []
        told = [*self._opened.warnings, *self._packets.damage]
        if self._packets.damaged > len(self._packets.damage):
            told.append(f"{self.path}: and {self._packets.damaged - len(self._packets.damage):,} more damaged places")
        if self.decoder.unresolved:
            told.append(
                f"{self.path}: the buffers of {self.decoder.unresolved:,} records could not be resolved; also record "
                "net/net_dev_start_xmit and net/net_dev_xmit, which reveal them"
            )
        if self._uncounted:
            told.append(
                f"{self.path}: {self._uncounted} gaps have no number of lost events; each is counted as what the "
                "kernel's counters leave, or as one event"
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
                # Data that salvage skipped may be of any CPU: no packet is matched across it.
                state.gap = state.gap or holes > state.holes
                state.holes = holes
                for batch in self._finished(state, bundle, decoded, losses, dropped=dropped):
                    self._merger.push(keys[stream], batch)
                self._merger.complete(keys[stream], self._monotonic(bundle, state.complete_ns()))
            watermark = self._merger.watermark_ns
            if watermark is not None and watermark > -HOLD_BACK_NS:
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
        """Yield lists of (stream, bundle, whether its sequence lost packets before it, holes in the file so far)."""
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
            # Packets that a sequence lost may be of any CPU: each CPU gets a gap before its next events.
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
        """Yield the records of a bundle on CLOCK_MONOTONIC, preceded by a marker for losses before them."""
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
        """Return the nanoseconds to add to times of another clock to get boot time.

        The offset of the first bundle is used as long as the two clocks stay within the hold-back.
        """
        offset = bundle.boot_ns - bundle.ftrace_ns
        if self._offset is None or abs(offset - self._offset) > HOLD_BACK_NS:
            self._offset = offset
        return self._offset

    def _monotonic(self, bundle: Bundle, ns: int) -> int:
        return ns if abs(ns) >= _NEVER_NS else int(self._monotonic_of(bundle, np.array([ns]))[0])

    def _once(self, batch: Batch, *, several: bool) -> Batch:
        """Return the batch without duplicates, which occur if two data sources of a trace read the same ring."""
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
    """State of reading one stream."""

    stream: EventSequence
    times: list[int]
    seen: int = 0
    """Packets with events read so far."""
    last_ns: int | None = None
    holes: int = 0
    """Holes in the file up to the stream's last bundle."""
    gap: bool = False
    """Whether events were lost, or could not be read, since the last record."""
    lost: int = 0
    """Events lost by the ring or a buffer since the last record."""
    begun: bool = False
    """Whether the stream has had a record."""

    def __post_init__(self) -> None:
        # times[i] becomes the earliest time of the packets from i on.
        for i in range(len(self.times) - 2, -1, -1):
            self.times[i] = min(self.times[i], self.times[i + 1])

    def complete_ns(self) -> int:
        """Return the time before which the stream has no further record, ns."""
        return self.times[self.seen] if self.seen < len(self.times) else _NEVER_NS


class _Losses:
    """Distributes the kernel's count of events lost by each CPU's ring over the gaps of that CPU."""

    def __init__(self, found: Survey) -> None:
        self._left = dict(found.lost)
        self._gaps = dict(found.flagged)
        self.uncounted = 0

    def settle(self, cpu: int) -> int:
        """Return the number of events of a CPU's next gap, at least one.

        It is all that is left of the count, except one event for each later gap.
        """
        gaps = self._gaps.get(cpu, 1)
        left = self._left.get(cpu, 0)
        lost = max(settle([None] * gaps, left)[0], 1)
        self._gaps[cpu], self._left[cpu] = gaps - 1, max(left - lost, 0)
        self.uncounted += 1
        return lost

    def at_the_start(self, cpu: int) -> int:
        """Return the losses of a CPU without any flagged gap; they are reported before the CPU's first packet."""
        return self._left.pop(cpu, 0) if not self._gaps.get(cpu) else 0

    def rest(self) -> dict[int, int]:
        """Return CPU -> lost events that no packet reports."""
        return {cpu: left for cpu, left in self._left.items() if left}
