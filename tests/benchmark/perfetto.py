"""Rates of reading and writing Perfetto traces, on one core; the peer uses the `perfetto` package's own messages.

Times are the process's CPU time, independent of other load. Rounds of both are interleaved.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from collector.files import recording
from collector.memory import keep_freed_memory
from collector.perfetto.source import PerfettoReader
from contracts.records import Batch
from correlator.configured import REPLAY_SLICE_NS
from correlator.engine import EngineConfig
from mace.replaying.export import Wanted, export
from storage.perfetto.file import PerfettoTrace
from storage.perfetto.sink import HopFacts, HostTracks
from tests import perfetto_traces as traces
from tests.benchmark.figures import figure, folder, one_core
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic
from tests.made_results import HEADER as RESULTS_HEADER
from tests.made_results import make_delays, topology

ROUNDS = 7
RECORDS = 200_000
PACKETS = 40_000
PIECE_ROWS = 65_536


def _interleaved(ours: Callable[[], int], theirs: Callable[[], int]) -> tuple[list[float], list[float]]:
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for values, work in zip(found, (ours, theirs), strict=True):
            begin = time.process_time()
            count = work()
            if number:
                values.append(count / (time.process_time() - begin))
    return found


def read() -> list[dict[str, Any]]:
    """events/s, file -> batches in time order; target: 0.5 million."""
    keep_freed_memory()
    names = [sighting.name for sighting in TOPOLOGY.sightings]
    given = traffic(RECORDS)
    figures = []
    with folder() as place, one_core():
        for form in ("generic", "described"):
            path = place / f"{form}.pftrace"
            path.write_bytes(traces.make(given, names, form=form, per_bundle=4_000))
            ours, theirs = _interleaved(lambda path=path: _read(path), lambda path=path: _read_by_protos(path))
            peer = float(np.median(theirs))
            figures.append(figure(f"perfetto_read_{form}", "events/s", ours, "protos", peer))
    return figures


def _read(path: Path) -> int:
    with PerfettoReader(path) as reader:
        return sum(len(item) for item in reader.items() if isinstance(item, Batch))


def _read_by_protos(path: Path) -> int:
    """Read the same columns without merging; for described events, which the package does not know, only the times."""
    columns: dict[str, list[Any]] = {name: [] for name in ("ts", "cpu", "name", "device", "skb", "len")}
    for packet in protos.Trace.FromString(path.read_bytes()).packet:
        bundle = packet.ftrace_events
        for event in bundle.event:
            kind = event.WhichOneof("event")
            device, skb, length = "", 0, 0
            if kind == "generic":
                kind = event.generic.event_name
                for one in event.generic.field:
                    match one.name:
                        case "name":
                            device = one.str_value
                        case "skbaddr":
                            skb = one.uint_value
                        case "len":
                            length = one.uint_value
            elif kind is not None:
                told = getattr(event, kind)
                device, skb, length = told.name, told.skbaddr, told.len
            row = (event.timestamp, bundle.cpu, kind, device, skb, length)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return len(columns["ts"])


def write() -> list[dict[str, Any]]:
    """hops/s, rows -> file; target: 0.2 million. Also from a capture to a file, including the raw records."""
    keep_freed_memory()
    rows = make_delays(PACKETS, containers=2)
    rows = rows[np.argsort(rows.utc_ns, kind="stable")]
    with folder() as place, one_core():
        ours, theirs = _interleaved(
            lambda: _write(place / "ours.pftrace", rows), lambda: _write_by_protos(place / "theirs.pftrace", rows)
        )
        size = (place / "ours.pftrace").stat().st_size / len(rows)
        capture = place / "made.mace"
        capture.write_bytes(capture_bytes([TOPOLOGY, *batches(traffic(RECORDS, content=True), 10_000)], HEADER))
        with_records, without = _interleaved(
            lambda: _export(capture, place / "whole.pftrace", records=True),
            lambda: _export(capture, place / "whole.pftrace", records=False),
        )
    return [
        figure("perfetto_write", "hops/s", ours, "protos", float(np.median(theirs))),
        figure("perfetto_write_bytes", "bytes/hop", [size]),
        figure("perfetto_export", "hops/s", with_records, "without the raw records", float(np.median(without))),
    ]


def _export(capture: Path, path: Path, *, records: bool) -> int:
    engine = EngineConfig(slice_ns=REPLAY_SLICE_NS)
    return export([recording(capture)], path, engine, Wanted(), records=records, overwrite=True).slices


def _write(path: Path, rows: Any) -> int:
    trace = PerfettoTrace(path, overwrite=True)
    host = HostTracks(trace, RESULTS_HEADER)
    host.devices(topology(2))
    for start in range(0, len(rows), PIECE_ROWS):
        piece = rows[start : start + PIECE_ROWS]
        nothing = np.zeros(len(piece), np.int64)
        host.hops(piece, HopFacts(piece.packet, nothing.view(np.uint64), nothing, nothing))
    trace.close()
    return len(rows)


def _write_by_protos(path: Path, rows: Any) -> int:
    """Write the same slices with the same arguments by interned names; one track per device, uncompressed."""
    columns = zip(
        *(getattr(rows, name).tolist() for name in ("utc_ns", "packet", "device", "direction", "segment", "position")),
        *(getattr(rows, name).tolist() for name in ("delay_ns", "l3_len", "grade", "outcome")),
        strict=True,
    )
    with path.open("wb") as file:
        for utc_ns, packet, device, direction, segment, position, delay_ns, l3_len, grade, outcome in columns:
            begin = protos.TracePacket(timestamp=utc_ns, trusted_packet_sequence_id=1, sequence_flags=2)
            event = begin.track_event
            event.type, event.track_uuid, event.name_iid = event.TYPE_SLICE_BEGIN, device + 1, direction
            event.category_iids.append(segment)
            event.flow_ids.append(packet)
            for name, value in (
                *((3, direction), (4, device), (5, segment)),
                *((6, position), (7, grade), (8, l3_len), (9, outcome)),
            ):
                event.debug_annotations.add(name_iid=name, uint_value=value)
            event.debug_annotations.add(name_iid=1, pointer_value=packet)
            event.debug_annotations.add(name_iid=2, int_value=delay_ns)
            end = protos.TracePacket(timestamp=utc_ns + delay_ns, trusted_packet_sequence_id=1, sequence_flags=2)
            end.track_event.type, end.track_event.track_uuid = event.TYPE_SLICE_END, device + 1
            file.write(protos.Trace(packet=[begin, end]).SerializeToString())
    return len(rows)
