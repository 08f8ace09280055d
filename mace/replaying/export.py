"""Exports recordings as a Perfetto trace, a timeline of packets, or as traces of OpenTelemetry.

    recording ──► engine ──► settled packets ──► selection ──► file
        └── records ──────────────┘

An export of the worst packets, or of packets by number, reads the recordings twice: first to find these packets and
their replies, then to write. Only packets in flight are kept in memory.
"""

from __future__ import annotations

import asyncio
import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from collector.files import LocalRecording
from contracts.arrays import Mask
from contracts.errors import UsageError, nearest
from contracts.figures import Summary
from contracts.interfaces import StreamHeader, StreamItem
from contracts.protocols import ANSWERED
from contracts.results import Results
from contracts.schema import NOT_TOLD, Direction
from correlator.engine import EngineConfig
from correlator.replies import ToldBy
from mace.live import pipeline
from mace.shown.instants import instant_ns
from mace.shown.timeline import PacketFollower, Settled
from storage.otlp import PacketFacts, SpanFile
from storage.perfetto.file import PerfettoTrace
from storage.perfetto.sink import TOLD_BY, HopFacts, HostTracks

FLOW_KEYS: Final = ("container", "direction", "proto", "port", "id", "len")
MOST_CHOSEN: Final = 10_000
"""Largest `--worst`: a person looks at a few packets, and the packets and their replies are kept in memory."""
_LINGER_NS: Final = 1_000_000_000
"""A record later than this after a packet's last hop no longer belongs to the packet: its buffer was freed before."""

assert tuple(told.name.lower() for told in ToldBy)[1:] == TOLD_BY[1:]


@dataclass(slots=True)
class Exported:
    """Counts of what an export has written."""

    packets: int = 0
    slices: int = 0
    instants: int = 0
    bytes_written: int = 0
    replies: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOLD_BY[1:], 0))
    """Number of replies by the kind of evidence that matched them to their requests."""
    summary: Summary = field(default_factory=Summary)
    """Figures of all packets, including packets that were left out."""
    warnings: list[str] = field(default_factory=list)

    def line(self, path: Path) -> str:
        """Return the counts as one line for people."""
        answers = " · ".join(f"{count:,} by {name}" for name, count in self.replies.items() if count)
        return (
            f"{path}: {self.packets:,} packets in {self.slices:,} slices, {self.instants:,} records, "
            f"{sum(self.replies.values()):,} known to be replies{f' ({answers})' if answers else ''}, "
            f"{self.bytes_written:,} bytes"
        )

    def as_dict(self, path: Path) -> dict[str, Any]:
        """Return the counts for JSON: file, packets, slices, records, replies by evidence, bytes, ledger, warnings."""
        return {
            "file": str(path),
            "packets": self.packets,
            "slices": self.slices,
            "records": self.instants,
            "replies": self.replies,
            "bytes": self.bytes_written,
            "ledger": self.summary.ledger.as_dict(),
            "warnings": self.warnings,
        }


class ExportedSpans(Exported):
    """Counts of an export as traces of OpenTelemetry: a packet is a trace, `slices` are spans."""

    def line(self, path: Path) -> str:
        """Return the counts as one line for people."""
        replies = sum(self.replies.values())
        return (
            f"{path}: {self.packets:,} traces, one a packet, with {self.slices:,} spans, {replies:,} linked to a"
            f" request, {self.bytes_written:,} bytes"
        )

    def as_dict(self, path: Path) -> dict[str, Any]:
        """Return the counts for JSON: file, traces, spans, replies by evidence, bytes, ledger, warnings."""
        found = super().as_dict(path)
        del found["records"]
        return {"file": found.pop("file"), "traces": found.pop("packets"), "spans": found.pop("slices"), **found}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter of packets; None in a field admits every value."""

    container: str | None = None
    direction: Direction | None = None
    proto: int | None = None
    port: int | None = None
    """Source or destination port; for echo requests and replies the identifier."""
    l3_len: int | None = None
    since_ns: int | None = None
    until_ns: int | None = None

    @classmethod
    def of(cls, flow: str | None, between: str | None, first_utc_ns: int) -> Wanted:
        """Parse the values of `--flow` and `--between`. Raises `UsageError`."""
        since, until = _between(between, first_utc_ns) if between else (None, None)
        return cls(**_flow(flow) if flow else {}, since_ns=since, until_ns=until)

    @property
    def any_flow(self) -> bool:
        """Whether the filter restricts nothing but time."""
        return {self.container, self.direction, self.proto, self.port, self.l3_len} == {None}

    def packets(self, settled: Settled) -> Mask:
        """Return a mask of the settled packets that the filter admits."""
        packets = settled.packets
        seen = packets.seen
        mask = np.ones(len(packets), np.bool_)
        if self.container is not None:
            ours = np.array([d.container == self.container for d in settled.devices], np.bool_)
            # A packet between two containers belongs to both.
            touched = np.zeros(len(packets), np.bool_)
            np.logical_or.at(touched, settled.of_packet, ours[settled.rows.device])
            mask &= touched
        if self.direction is not None:
            mask &= seen.direction == self.direction
        if self.proto is not None:
            mask &= seen.l4_proto == self.proto
        if self.port is not None:
            mask &= (seen.near == self.port) | (seen.far == self.port)
        if self.l3_len is not None:
            mask &= seen.l3_len == self.l3_len
        return mask & self.times(seen.begin_ns)

    def times(self, utc_ns: npt.NDArray[np.int64]) -> Mask:
        """Return a mask of the times (UTC, ns) that are between `since_ns` and `until_ns`."""
        mask = np.ones(len(utc_ns), np.bool_)
        if self.since_ns is not None:
            mask &= utc_ns >= self.since_ns
        if self.until_ns is not None:
            mask &= utc_ns < self.until_ns
        return mask


def check_worst(worst: int | None) -> None:
    """Raise `UsageError` for a number of packets that cannot be chosen."""
    if worst is not None and not 1 <= worst <= MOST_CHOSEN:
        raise UsageError(f"--worst {worst}: expected 1 to {MOST_CHOSEN}")


def export(
    recordings: Sequence[LocalRecording],
    path: Path,
    engine: EngineConfig,
    wanted: Wanted,
    *,
    packets: Sequence[int] | None = None,
    worst: int | None = None,
    records: bool = True,
    overwrite: bool = False,
    told: Callable[[int, int], None] = lambda *_: None,
) -> Exported:
    """Write the packets that `wanted` admits to a Perfetto trace at `path`; returns the counts.

    `packets` and `worst` select only packets with these numbers, or with the largest overhead; the recordings are then
    read twice. `told` is called with the bytes read so far and the bytes to read. Raises `StoreError`, `CaptureError`,
    `Unavailable`, `UsageError`.
    """
    found = Exported()
    trace = PerfettoTrace(path, overwrite=overwrite)
    try:
        _write(
            recordings,
            engine,
            _Choice(wanted, set(packets or ()), worst or 0),
            lambda chosen: _Writer(trace, wanted, chosen, found, records=records),
            found,
            told,
        )
        trace.close()
    finally:
        trace.abort()
    found.slices, found.instants, found.bytes_written = trace.slices, trace.instants, trace.bytes_written
    return found


def export_spans(
    recordings: Sequence[LocalRecording],
    path: Path,
    engine: EngineConfig,
    wanted: Wanted,
    *,
    packets: Sequence[int] | None = None,
    worst: int | None = None,
    overwrite: bool = False,
    told: Callable[[int, int], None] = lambda *_: None,
) -> ExportedSpans:
    """Write the packets that `wanted` admits as traces of OpenTelemetry (`storage.otlp`); returns the counts.

    Parameters and errors are those of `export`.
    """
    found = ExportedSpans()
    file = SpanFile(path, overwrite=overwrite)
    try:
        _write(
            recordings,
            engine,
            _Choice(wanted, set(packets or ()), worst or 0),
            lambda chosen: _SpanWriter(file, wanted, chosen, found),
            found,
            told,
        )
        file.close()
    finally:
        file.abort()
    found.slices, found.bytes_written = file.spans, file.bytes_written
    return found


def _write(
    recordings: Sequence[LocalRecording],
    engine: EngineConfig,
    choice: _Choice,
    writer_of: Callable[[npt.NDArray[np.uint64] | None], _RecordingWriter],
    found: Exported,
    told: Callable[[int, int], None],
) -> None:
    """Read the recordings, twice if packets are to be chosen first, and give the packets to a writer for each."""
    chosen: npt.NDArray[np.uint64] | None = None
    progress = _ReadSoFar(told, sum(each.bytes_total for each in recordings) * (1 + choice.needed))
    if choice.needed:
        for recording in recordings:
            _follow(recording, engine, progress, PacketFollower, choice.look)
        chosen = choice.chosen()
    for recording in recordings:
        writer = writer_of(chosen)
        found.warnings += _follow(recording, engine, progress, writer.begin, writer.write, writer.add)
        writer.finish()


@dataclass(slots=True)
class _ReadSoFar:
    """Bytes read of all recordings: `behind` is the size of the recordings that were read to the end."""

    told: Callable[[int, int], None]
    total: int
    behind: int = 0


def _follow(
    recording: LocalRecording,
    engine: EngineConfig,
    progress: _ReadSoFar,
    begin: Callable[[StreamHeader], PacketFollower],
    on_settled: Callable[[Settled], None],
    on_results: Callable[[Results], None] = lambda _: None,
) -> Sequence[str]:
    """Run a recording through the correlator and the follower that `begin` makes; returns the source's warnings."""
    source = recording.source()
    stop = pipeline.Stop()
    sink = _FollowerSink(begin, on_settled, on_results)

    def show(_: Results) -> None:
        progress.told(progress.behind + source.bytes_read, progress.total)

    async def work() -> None:
        async with pipeline.stopped_by_signals(stop):
            await pipeline.run(source, [sink], engine=engine, stop=stop, tee=_Tee(sink), on_results=show)

    asyncio.run(work())
    progress.behind += recording.bytes_total
    sink.finish()
    if stop.requested:
        raise KeyboardInterrupt
    return source.warnings


class _FollowerSink:
    """A `Sink` that gives results to a `PacketFollower`, and what that settles further on."""

    def __init__(
        self,
        begin: Callable[[StreamHeader], PacketFollower],
        on_settled: Callable[[Settled], None],
        on_results: Callable[[Results], None],
    ) -> None:
        self._begin, self._on_settled, self._on_results = begin, on_settled, on_results
        self._last: Results | None = None
        self.follower: PacketFollower

    async def open(self, header: StreamHeader) -> None:
        self.follower = self._begin(header)

    async def write(self, results: Results) -> None:
        if self._last is not None:
            self._settle(self._last)
        self._last = results

    async def aclose(self) -> None:
        """Nothing to close."""

    def finish(self) -> None:
        """Settle the remaining results as the last ones, because the stream has ended without an error."""
        if self._last is not None:
            self._settle(self._last, last=True)

    def _settle(self, results: Results, *, last: bool = False) -> None:
        self._on_settled(self.follower.settle(results, last=last))
        self._on_results(results)


class _Tee:
    """A `StreamSink` that passes the raw stream to the follower of a `_Sink`."""

    def __init__(self, sink: _FollowerSink) -> None:
        self._sink = sink

    async def open(self, header: StreamHeader) -> None:
        """Nothing to open: the `_Sink` has made the follower."""

    async def write(self, item: StreamItem) -> None:
        self._sink.follower.take(item)

    async def aclose(self) -> None:
        """Nothing to close."""


class _Choice:
    """The first pass: finds the requested packets, and the packets that they reply to or that reply to them."""

    def __init__(self, wanted: Wanted, packets: set[int], worst: int) -> None:
        self._wanted, self._asked, self._worst = wanted, packets, worst
        self._found: set[int] = set()
        self._largest: list[tuple[int, int]] = []
        """A heap of (overhead, packet)."""
        self._other: dict[int, int] = {}
        """For each of the largest, the packet that it replies to or that replies to it; 0 if none is known."""

    @property
    def needed(self) -> bool:
        """Whether packets are chosen at all."""
        return bool(self._asked or self._worst)

    def look(self, settled: Settled) -> None:
        """Note the requested and the largest of the settled packets, and their replies."""
        packets = settled.packets
        ids, request = packets.seen.packet, packets.request
        if self._asked:
            asked = np.array(sorted(self._asked), np.uint64)
            near = np.isin(ids, asked) | np.isin(request, asked)
            self._found.update(ids[near].tolist(), request[near].tolist())
        if self._worst:
            self._rank(settled)
            # A reply to one of the largest packets is settled with it or later.
            largest = np.array([packet for _, packet in self._largest], np.uint64)
            answers = np.flatnonzero(np.isin(request, largest) & (request > 0))
            for packet, answer in zip(request[answers].tolist(), ids[answers].tolist(), strict=True):
                self._other[packet] = answer

    def _rank(self, settled: Settled) -> None:
        packets = settled.packets
        candidates = np.flatnonzero((packets.whole_ns != NOT_TOLD) & self._wanted.packets(settled))
        if len(self._largest) >= self._worst:
            candidates = candidates[packets.whole_ns[candidates] > self._largest[0][0]]
        candidates = candidates[np.argsort(-packets.whole_ns[candidates], kind="stable")[: self._worst]]
        for row in candidates.tolist():
            packet = int(packets.seen.packet[row])
            heapq.heappush(self._largest, (int(packets.whole_ns[row]), packet))
            self._other[packet] = int(packets.request[row])
            if len(self._largest) > self._worst:
                del self._other[heapq.heappop(self._largest)[1]]

    def chosen(self) -> npt.NDArray[np.uint64]:
        """Return the chosen packets' numbers, ascending. Raises `UsageError` if no recording has a requested packet."""
        missing = self._asked - self._found
        if missing:
            raise UsageError(f"no packet {', '.join(f'{packet:#x}' for packet in sorted(missing))} in the recordings")
        return np.array(sorted((self._found | {*self._other, *self._other.values()}) - {0}), np.uint64)


class _RecordingWriter(Protocol):
    """The second or only pass over one recording."""

    def begin(self, header: StreamHeader) -> PacketFollower: ...

    def write(self, settled: Settled) -> None: ...

    def add(self, results: Results) -> None: ...

    def finish(self) -> None: ...


def _admitted(settled: Settled, wanted: Wanted, chosen: npt.NDArray[np.uint64] | None, found: Exported) -> Mask:
    """Return a mask of the settled packets to write, and count these."""
    packets = settled.packets
    mask = wanted.packets(settled) if chosen is None else np.isin(packets.seen.packet, chosen)
    found.packets += int(mask.sum())
    for number, count in enumerate(np.bincount(packets.told_by[mask], minlength=len(TOLD_BY)).tolist()):
        if number:
            found.replies[TOLD_BY[number]] += count
    return mask


class _SpanWriter:
    """Writes settled packets as traces of OpenTelemetry."""

    def __init__(self, file: SpanFile, wanted: Wanted, chosen: npt.NDArray[np.uint64] | None, found: Exported) -> None:
        self._file, self._wanted, self._chosen, self._found = file, wanted, chosen, found
        self._summary = Summary()

    def begin(self, header: StreamHeader) -> PacketFollower:
        self._file.host(header)
        self._summary.observed(header.hooks)
        return PacketFollower(header, records=False)

    def write(self, settled: Settled) -> None:
        packets = settled.packets
        shown = _admitted(settled, self._wanted, self._chosen, self._found)[settled.of_packet]
        told_by = [TOLD_BY[number] for number in packets.told_by.tolist()]
        facts = PacketFacts(packets.request, told_by)
        self._file.packets(settled.rows[shown], settled.of_packet[shown], settled.devices, facts)

    def add(self, results: Results) -> None:
        self._summary.add(results)

    def finish(self) -> None:
        """Add the figures, because the recording has ended."""
        self._found.summary.merge(self._summary)


class _Writer:
    """The second or only pass: writes settled packets to the tracks of their host."""

    def __init__(
        self,
        trace: PerfettoTrace,
        wanted: Wanted,
        chosen: npt.NDArray[np.uint64] | None,
        found: Exported,
        *,
        records: bool,
    ) -> None:
        self._trace, self._wanted, self._chosen, self._found = trace, wanted, chosen, found
        self._records = records
        self._summary = Summary()
        self._ids: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._ends: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def begin(self, header: StreamHeader) -> PacketFollower:
        self.tracks = HostTracks(self._trace, header)
        self._summary.observed(header.hooks)
        return PacketFollower(header)

    def write(self, settled: Settled) -> None:
        packets, rows = settled.packets, settled.rows
        self.tracks.devices(settled.devices)
        shown = _admitted(settled, self._wanted, self._chosen, self._found)[settled.of_packet]
        at = settled.of_packet[shown]
        request = packets.request[at]
        flow = np.where(request > 0, request, packets.seen.packet[at])
        self.tracks.hops(rows[shown], HopFacts(flow, request, packets.told_by[at], packets.drop_reason[at]))
        if self._records:
            self._instants(settled)

    def finish(self) -> None:
        """End the tracks and add the figures, because the recording has ended."""
        self.tracks.finish()
        self._found.summary.merge(self._summary)

    def _instants(self, settled: Settled) -> None:
        records, owner = settled.records, settled.of_record
        if self._chosen is not None:
            mask = np.isin(owner, self._chosen)
        elif self._wanted.any_flow:
            mask = self._wanted.times(records.ts_ns + self.tracks.offset_ns)
        else:
            mask = np.isin(owner, self._kept(settled))
        self.tracks.records(records[mask], owner[mask], settled.sightings)

    def _kept(self, settled: Settled) -> npt.NDArray[np.uint64]:
        """Return the admitted packets that may still have records."""
        packets = settled.packets
        mask = self._wanted.packets(settled)
        self._ids = np.append(self._ids, packets.seen.packet[mask])
        self._ends = np.append(self._ends, packets.end_ns[mask])
        ids = self._ids
        if len(settled.records):
            going_on = self._ends + _LINGER_NS >= int(settled.records.ts_ns[-1]) + self.tracks.offset_ns
            self._ids, self._ends = self._ids[going_on], self._ends[going_on]
        return ids

    def add(self, results: Results) -> None:
        """Write the windows, ledger and gaps of results, which must arrive in order."""
        self._summary.add(results)
        if self._chosen is not None:
            return
        rows, totals = results.rows, results.totals
        self.tracks.windows(rows.windows[self._wanted.times(rows.windows.column("start_utc_ns"))])
        if self._wanted.times(np.array([totals.upto_utc_ns])).all():
            self.tracks.ledger(totals.upto_utc_ns, totals.ledger)
        self.tracks.gaps([gap for gap in rows.gaps_utc_ns if self._wanted.times(np.array(gap)).any()])


def _flow(text: str) -> dict[str, Any]:
    """Parse `KEY=VALUE,...` into fields of `Wanted`. Raises `UsageError`."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in FLOW_KEYS:
            raise UsageError(f"--flow: unknown key {key!r}{nearest(key, FLOW_KEYS)}; keys are {', '.join(FLOW_KEYS)}")
        if key == "container":
            found[key] = value
        elif key == "direction":
            if value not in ("egress", "ingress"):
                raise UsageError(f"--flow: direction={value}: expected egress or ingress")
            found[key] = Direction[value.upper()]
        elif key == "proto" and value in ANSWERED:
            found[key] = ANSWERED[value]
        elif not value.isdecimal():
            known = f" or one of {', '.join(ANSWERED)}" if key == "proto" else ""
            raise UsageError(f"--flow: {key}={value}: expected a number{known}")
        else:
            found[{"len": "l3_len", "id": "port"}.get(key, key)] = int(value)
    return found


def _between(text: str, first_utc_ns: int) -> tuple[int, int]:
    """Parse START,END into two times (UTC, ns). Raises `UsageError`."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2:
        raise UsageError(f"--between {text}: expected START,END")
    since, until = (_instant(part, first_utc_ns) for part in parts)
    if since >= until:
        raise UsageError(f"--between {text}: the end is not after the start")
    return since, until


def _instant(text: str, first_utc_ns: int) -> int:
    if after := re.fullmatch(r"\+(\d+(?:\.\d+)?)(ns|us|µs|ms|s)?", text):
        unit = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000}.get(after[2], 1_000_000_000)
        return first_utc_ns + round(float(after[1]) * unit)
    return instant_ns(text, datetime.now(UTC))
