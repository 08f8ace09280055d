"""First pass over a Perfetto trace: collects everything that must be known before the first event is passed on.

Clock snapshots occur throughout a trace, the kernel's counts of lost events at its end, and events are in time order
only within a CPU. A trace is therefore read twice. This pass reads everything except the events, and notes one time for
each packet of events.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from collector.perfetto.bundle import FIRST_EVENTS, Bundle
from collector.perfetto.clock import Clocks
from collector.perfetto.wire import BYTES, VARINT, PacketReader, TracePacket, fields
from contracts.errors import WireError
from contracts.hooks import TRACEPOINTS

EventSequence: TypeAlias = tuple[int, int]
"""(sequence, CPU): a stream of events that are in order of time, or nearly."""

BUNDLE, CLOCK_SNAPSHOT, PROCESS_TREE, FTRACE_STATS, SYSTEM_INFO, TRACE_UUID, CONFIG = 1, 6, 2, 34, 45, 89, 33
SEQUENCE, DROPPED, FIRST, MACHINE = 10, 42, 87, 98
"""Fields of TracePacket."""
_MOST_NAMES: Final = 1 << 20
_MOST_SNAPSHOTS: Final = 1 << 16


@dataclass(slots=True)
class Survey:
    """Metadata of a trace."""

    clocks: Clocks
    first_ns: dict[EventSequence, list[int]] = field(default_factory=dict)
    """Stream -> time of the first event of each packet with events, in the packet's own clock."""
    lost: dict[int, int] = field(default_factory=dict)
    """CPU -> events that the kernel lost during the trace; empty if the trace has no counts."""
    flagged: dict[int, int] = field(default_factory=dict)
    """CPU -> number of packets before which events were lost."""
    kernel: str = ""
    run: str = ""
    cpus: int = 0
    hooks: tuple[str, ...] = ()
    """Configured tracepoints that are hooks."""
    threads: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Thread -> (its process, its name)."""
    processes: dict[int, str] = field(default_factory=dict)
    """Process -> its command line."""
    clock_kinds: set[int] = field(default_factory=set)
    other_machines: int = 0
    """Packets of events of other machines, which are left out."""


def survey(path: Path, *, salvage: bool = False) -> Survey:
    """Read a trace once; raises `Unavailable`, and without salvage `CaptureError` for damage."""
    reader = PacketReader(path, salvage=salvage)
    found = Survey(Clocks.of([]))
    snapshots: list[dict[int, int]] = []
    stats: dict[int, dict[int, int]] = {}
    digest = hashlib.sha256()
    try:
        for packet in reader:
            if packet.offset < 1 << 16:
                digest.update(packet.data[: 1 << 10])
            try:
                _take(packet, found, snapshots, stats)
            except WireError as error:
                reader.refuse(packet.offset, str(error))
    finally:
        reader.close()
    found.clocks = Clocks.of(snapshots)
    found.run = found.run or digest.hexdigest()[:16]
    for cpu, by_phase in stats.items():
        if 2 in by_phase:
            found.lost[cpu] = max(by_phase[2] - by_phase.get(1, 0), 0)
    return found


def _take(
    packet: TracePacket, found: Survey, snapshots: list[dict[int, int]], stats: dict[int, dict[int, int]]
) -> None:
    if (raw := packet.message(BUNDLE)) is not None:
        if packet.number(MACHINE):
            found.other_machines += 1
            return
        bundle = Bundle.parse(packet.offset, raw, most=FIRST_EVENTS)
        found.cpus = max(found.cpus, bundle.cpu + 1)
        if bundle.lost:
            found.flagged[bundle.cpu] = found.flagged.get(bundle.cpu, 0) + 1
        first = bundle.first_ns()
        if first is not None:
            found.clock_kinds.add(bundle.clock)
            found.first_ns.setdefault((packet.number(SEQUENCE), bundle.cpu), []).append(first)
    elif (raw := packet.message(CLOCK_SNAPSHOT)) is not None:
        if len(snapshots) < _MOST_SNAPSHOTS and not packet.number(MACHINE):
            snapshots.append(_clocks(raw))
    elif (raw := packet.message(FTRACE_STATS)) is not None:
        _stats(raw, stats)
    elif (raw := packet.message(SYSTEM_INFO)) is not None:
        releases = _inside(raw, (1, 3))
        found.kernel = releases[0].decode("utf-8", "replace") if releases else found.kernel
    elif (raw := packet.message(TRACE_UUID)) is not None:
        found.run = "".join(f"{one.value & (1 << 64) - 1:016x}" for one in fields(raw) if one.wire == VARINT)[:32]
    elif (raw := packet.message(CONFIG)) is not None:
        # data_sources, config, ftrace_config, ftrace_events
        asked = {one.decode("utf-8", "replace").replace("/", ":") for one in _inside(raw, (2, 1, 100, 1))}
        known = [
            i.tracepoint for i in TRACEPOINTS if asked & {i.tracepoint, i.name, i.tracepoint.partition(":")[0] + ":*"}
        ]
        found.hooks = tuple(dict.fromkeys((*found.hooks, *known)))
    elif (raw := packet.message(PROCESS_TREE)) is not None:
        _names(raw, found)


def _clocks(raw: bytes) -> dict[int, int]:
    """Return clock -> its time, ns, of a ClockSnapshot."""
    found = {}
    for one in fields(raw):
        if one.number == 1 and one.wire == BYTES:
            told = {f.number: f.value for f in fields(raw, one.start, one.end) if f.wire == VARINT}
            if told.get(2, 0) < 1 << 62:
                found[told.get(1, 0)] = told.get(2, 0) * max(told.get(4, 1), 1)
    return found


def _stats(raw: bytes, stats: dict[int, dict[int, int]]) -> None:
    phase = next((f.value for f in fields(raw) if f.number == 1 and f.wire == VARINT), 0)
    for one in fields(raw):
        if one.number == 2 and one.wire == BYTES:
            told = {f.number: f.value for f in fields(raw, one.start, one.end) if f.wire == VARINT}
            # Events overwritten before they were read, and events dropped because the ring was full.
            by_phase = stats.setdefault(told.get(1, 0), {})
            by_phase[phase] = by_phase.get(phase, 0) + told.get(3, 0) + told.get(8, 0)


def _names(raw: bytes, found: Survey) -> None:
    if len(found.threads) + len(found.processes) > _MOST_NAMES:
        return
    for one in fields(raw):
        if one.wire != BYTES or one.number not in (1, 2):
            continue
        inside = list(fields(raw, one.start, one.end))
        number = {f.number: f.value for f in inside if f.wire == VARINT}
        named = 3 if one.number == 1 else 2
        text = [
            raw[f.start : f.end].decode("utf-8", "replace") for f in inside if f.wire == BYTES and f.number == named
        ]
        if one.number == 1:
            found.processes[number.get(1, 0)] = " ".join(text)
        else:
            found.threads[number.get(1, 0)] = (number.get(3, 0), text[0] if text else "")


def _inside(raw: bytes, path: tuple[int, ...]) -> list[bytes]:
    """Return all messages or texts at a path of fields."""
    found = [raw]
    for number in path:
        found = [one[f.start : f.end] for one in found for f in fields(one) if f.number == number and f.wire == BYTES]
    return found
