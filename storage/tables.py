"""The stored tables: their columns, and the correlator's results as Arrow tables with these columns.

Rows are self-contained, so that DuckDB, pandas, Polars or Dask need only the files: columns have names instead of
numbers, and each row has its host, run, container and device. These columns have few distinct values and are
dictionary-encoded; together they cost a fraction of a byte per row (see docs/design/006-store.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contracts.cpus import CpuCounters, Measure, SoftirqCounts, StagePlace
from contracts.figures import ranks
from contracts.hooks import BY_HOOK
from contracts.interfaces import StreamHeader
from contracts.ledger import Ledger
from contracts.results import Totals
from contracts.schema import (
    NOT_TOLD,
    Delays,
    Direction,
    Grade,
    Grades,
    HookCost,
    Outcome,
    RoundTrips,
    Segment,
)
from contracts.topology import Device, Sharer
from contracts.windowtable import FIGURES, WindowTable
from storage.checksum import encoded

_TIME: Final = pa.timestamp("ns", tz="UTC")
_STORED_TIME: Final = pa.timestamp("us", tz="UTC")
_NAME: Final = pa.dictionary(pa.int16(), pa.string())


@dataclass(frozen=True, slots=True)
class Column:
    """One stored column: name, type, and meaning for `mace query` and docs/store.md."""

    name: str
    type: pa.DataType
    meaning: str
    optional: bool = False
    """Whether the column is null where the value is not known."""


_SHARER: Final = pa.struct([pa.field("container", pa.string()), pa.field("container_id", pa.string())])


_RUN: Final = (
    Column("host", _NAME, "Host that captured the packets."),
    Column("run", _NAME, "Capture run, unique on its host."),
    Column("source", _NAME, "Source of the records: `ftrace`, `kmod`, ..."),
)
_DEVICE: Final = (
    Column("container", _NAME, "Name, at that time, of the container whose packet crossed the device."),
    Column("netns", _NAME, "Name of the network namespace; `host` for the host's."),
    Column("device", _NAME, "Name of the network device."),
    Column(
        "device_id",
        _NAME,
        "`INODE:IFINDEX`: the namespace's inode and the index in it, which distinguish devices of equal names.",
    ),
    Column("kind", _NAME, "Link kind: `veth`, `bridge`, ...; empty for hardware."),
    Column("role", _NAME, "`inner`, `outer`, `host`, `remote`, `loopback` or `other`."),
    Column("rank", pa.uint8(), "Place of the device on the way out of a container, from 0; sorts a path."),
    Column("direction", _NAME, "`egress`: out of the container; `ingress`: into the container; otherwise `unknown`."),
    Column(
        "segment",
        _NAME,
        "`device`: crossing of a device that only the container's packets cross; `outside`: of a device that the"
        " host's own packets cross, too; `delivery`: from the inner device to the reader; `waiting`: the part of a"
        " delivery in which the reader waited for a CPU; `overhead`: sum of a packet's `device` rows, with the inner"
        " device's name.",
    ),
)

_CONTAINER_ID: Final = Column(
    "container_id",
    _NAME,
    "The container's full id from its runtime, which a rename does not change; a pod's UID; empty without an id.",
)

DELAYS: Final = (
    Column("time", _TIME, "When the segment began."),
    Column(
        "packet",
        pa.uint64(),
        "Number of the packet, equal in all rows of one packet of a run, without further meaning.",
    ),
    *_RUN,
    *_DEVICE,
    Column("position", pa.uint8(), "Index of the hop along the packet's path, from 0; 255 for `overhead`."),
    Column("delay_ns", pa.int64(), "Duration of the segment."),
    Column("l3_len", pa.uint32(), "Bytes of the packet without link-layer header."),
    Column("grade", _NAME, "Evidence that ties the packet's records: `ambiguous`, `buffer`, `content`, `exact`."),
    Column("outcome", _NAME, "How the packet's life ended: `consumed`, `dropped`, `open` (no end seen)."),
    Column("drop_reason", pa.uint16(), "The kernel's `enum skb_drop_reason` of a dropped packet, else 0."),
    Column(
        "waited",
        pa.bool_(),
        "Whether the packet waited for a neighbour's address (ARP, ND); windows leave such rows out.",
    ),
    _CONTAINER_ID,
)
WINDOWS: Final = (
    Column("time", _TIME, "Start of the window, a multiple of its width."),
    Column("width_s", pa.uint32(), "Width of the window, s. Windows of each width count each delay once."),
    *_RUN,
    *_DEVICE,
    Column("count", pa.int64(), "Delays that began in the window."),
    Column("sum_ns", pa.int64(), "Sum of these delays."),
    Column("min_ns", pa.int64(), "Smallest delay."),
    Column("max_ns", pa.int64(), "Largest delay."),
    Column("p50_ns", pa.int64(), "Median, from the histogram; relative error at most 0.4 %."),
    Column("p90_ns", pa.int64(), "90 % quantile, like `p50_ns`."),
    Column("p99_ns", pa.int64(), "99 % quantile, like `p50_ns`."),
    Column("p999_ns", pa.int64(), "99.9 % quantile, like `p50_ns`."),
    Column("bins", pa.list_(pa.uint16()), "Non-empty bins of `contracts.histogram`, ascending."),
    Column(
        "counts", pa.list_(pa.int64()), "Delays in each of these bins; to merge histograms, add the counts per bin."
    ),
    _CONTAINER_ID,
    Column(
        "pod_containers",
        _NAME,
        "Containers that have started in a pod, separated by commas; they share its devices. Empty for other"
        " containers.",
    ),
)
LEDGER: Final = (
    Column("time", _TIME, "Time before which this row accounts for all records."),
    Column("flush", pa.uint64(), "Number that grows with each row of a run: the largest is the newest."),
    *_RUN,
    *(
        Column(f.name, pa.int64(), "Records so far in this category of the ledger (`contracts.ledger`).")
        for f in fields(Ledger)
    ),
    Column("packets", pa.int64(), "Packets so far with at least one delay."),
    Column("rows_stored", pa.int64(), "Rows of `delays` stored so far."),
    Column("rows_not_stored", pa.int64(), "Rows of all tables so far that could not be written (disk full, ...)."),
    Column("closed", pa.bool_(), "Whether this is the run's last row, written at an orderly end."),
    Column(
        "packets_ambiguous",
        pa.int64(),
        "Packets so far without delays, because several devices or packets fit their records.",
    ),
    Column("packets_buffer", pa.int64(), "Packets of `packets` that the kernel buffer alone identifies."),
    Column("packets_content", pa.int64(), "Packets of `packets` that the content key alone identifies."),
    Column("packets_exact", pa.int64(), "Packets of `packets` that buffer and content key identify."),
    Column(
        "told_apart",
        pa.int64(),
        "How often only the content key showed that a buffer had been reused for another packet.",
    ),
    Column("packets_waited", pa.int64(), "Packets of `packets` that waited for a neighbour's address (ARP, ND)."),
    Column(
        "on_host_network",
        pa.list_(_SHARER),
        "Containers seen on the host's network since the previous row; without a device, they are in no other table.",
    ),
)
GRADES: Final = {f.name: f.name if f.name == "told_apart" else f"packets_{f.name}" for f in fields(Grades)}
"""Column of `ledger` for each field of `contracts.schema.Grades`."""
RUNS: Final = (
    Column("time", _TIME, "UTC of the clock pair."),
    *_RUN,
    Column("kernel", pa.string(), "Kernel release."),
    Column("boot_id", pa.string(), "Identifies the boot of the host."),
    Column("cpus", pa.uint32(), "CPUs of the host."),
    Column("monotonic_ns", pa.int64(), "CLOCK_MONOTONIC of the clock pair."),
    Column("uncertainty_ns", pa.int64(), "Largest error of the clock pair, ns."),
    Column("hooks", pa.list_(pa.string()), "Tracepoints that were enabled."),
    Column("mace_version", pa.string(), "Version of MACE that captured."),
    Column("command", pa.list_(pa.string()), "Command line of the capture."),
    Column(
        "clock_state",
        pa.string(),
        "The kernel's state of UTC when the run began: `synchronised`, `unsynchronised`; empty if not recorded.",
    ),
    Column("max_error_ns", pa.int64(), "Largest error of UTC itself by the kernel (adjtimex), with that state."),
    Column("est_error_ns", pa.int64(), "Error of UTC itself that the kernel was told to expect, with that state."),
)
COST: Final = (
    Column("time", _TIME, "Time up to which the row counts the run's calls."),
    *_RUN,
    Column("hook", _NAME, "Observation point."),
    Column("calls", pa.int64(), "Calls of the hook's probe, including those for unrecorded packets."),
    Column("timed", pa.int64(), "Timed calls."),
    Column("timed_ns", pa.int64(), "Time spent in the timed calls; a call costs `timed_ns / timed`."),
)
STAGES: Final = (
    Column("time", _TIME, "Start of the interval, a multiple of its width."),
    Column("width_s", pa.uint32(), "Width of the interval, s."),
    *_RUN,
    *(column for column in _DEVICE if column.name != "segment"),
    Column(
        "measure",
        _NAME,
        "`run`: a CPU's work on a packet in one stage; `wait`: the packet's time on the CPU's queue before that;"
        " `last_wait`: the same at the last device, whose work has no known end; `work`: sum of a packet's `run`, of a"
        " packet seen over its whole path; `serial`: the part of `work` on the CPU that worked most; `partial`: like"
        " `work`, of other packets.",
    ),
    Column("cpu_queued", pa.int32(), "CPU that passed the packets to the device; -1 for whole packets."),
    Column("cpu", pa.int32(), "CPU that worked on the packets; -1 for whole packets."),
    Column("count", pa.int64(), "Stages or packets, of packets that began in the interval."),
    Column("sum_ns", pa.int64(), "Sum of their durations."),
    Column("min_ns", pa.int64(), "Smallest duration."),
    Column("max_ns", pa.int64(), "Largest duration."),
    Column("bins", pa.list_(pa.uint16()), "Non-empty bins of `contracts.histogram`, ascending."),
    Column("counts", pa.list_(pa.int64()), "Durations in each of these bins."),
    _CONTAINER_ID,
    Column("owner_netns", _NAME, "Name of the network namespace of the container's own device."),
)
CPUS: Final = (
    Column("time", _TIME, "When the counters were read."),
    *_RUN,
    Column("cpu", pa.int32(), "Number of the CPU."),
    Column("processed", pa.int64(), "Packets that the CPU took from its queue and from drivers, since the boot."),
    Column("dropped", pa.int64(), "Packets dropped since the boot because the CPU's queue was full."),
    Column("squeezed", pa.int64(), "How often since the boot the softirq ended with work left."),
)
SOFTIRQS: Final = (
    Column("time", _TIME, "End of the stretch that the row counts, which begins at the CPU's row before."),
    *_RUN,
    Column("cpu", pa.int32(), "Number of the CPU."),
    Column("count", pa.int64(), "Runs of the receive softirq (NET_RX)."),
    Column("by_ksoftirqd", pa.int64(), "Of these, runs in the task ksoftirqd."),
    Column("run_ns", pa.int64(), "Sum of the runs, from `softirq_entry` to `softirq_exit`."),
    Column("wait_ns", pa.int64(), "Sum of the known waits, from `softirq_raise` to `softirq_entry`."),
    Column("wait_max_ns", pa.int64(), "Longest of these waits."),
    Column("lost", pa.int64(), "Events that the tracer's ring lost."),
    Column("bins", pa.list_(pa.uint16()), "Non-empty bins of `contracts.histogram` of the waits, ascending."),
    Column("counts", pa.list_(pa.int64()), "Waits in each of these bins."),
)
ROUND_TRIPS: Final = (
    Column(
        "time",
        _TIME,
        "When the request reached the container's device; of an unpaired sample the tool's own time, and if it has none"
        " the beginning of the run.",
    ),
    *_RUN,
    Column("container", _NAME, "Name of the container that the tool ran in."),
    Column("netns", _NAME, "Name of its network namespace."),
    Column("tool", _NAME, "The tool that measured: `ping`, `fping`, ..."),
    Column("destination", _NAME, "Address that the tool asked; empty if it is not known."),
    Column("seq", pa.int64(), "Number of the request; null if the tool has none.", optional=True),
    Column("reason", _NAME, "`paired`, or why the sample has no correction: the next columns are then null."),
    Column("tool_rtt_ns", pa.int64(), "Round trip as the tool measured it; null without a reply.", optional=True),
    Column(
        "host_rtt_ns",
        pa.int64(),
        "Round trip of a process on the host with nothing tracing, estimated with probes; null without probes.",
        optional=True,
    ),
    Column(
        "host_rtt_lower_bound_ns",
        pa.int64(),
        "`tool_rtt_ns` - `egress_ns` - `ingress_ns`: a lower bound of a host process's round trip.",
        optional=True,
    ),
    Column("nic_rtt_ns", pa.int64(), "Round trip from the outer device and back to it.", optional=True),
    Column("egress_ns", pa.int64(), "Overhead of the request.", optional=True),
    Column("ingress_ns", pa.int64(), "Overhead of the response.", optional=True),
    Column(
        "temporal_error_ns",
        pa.int64(),
        "Part of `tool_rtt_ns` in which the tool was ready but no CPU ran it; null if it is not known.",
        optional=True,
    ),
    Column(
        "tracer_cost_ns",
        pa.int64(),
        "Cost of tracing that `host_rtt_ns` is without; null if it is not known, and then not subtracted.",
        optional=True,
    ),
    Column(
        "tracer_cost_error_ns",
        pa.int64(),
        "Half width of the 95 % interval of `tracer_cost_ns`; null together with it.",
        optional=True,
    ),
    Column("grade", _NAME, "Evidence that ties the packets' records, as in `delays`; empty if unpaired."),
    _CONTAINER_ID,
)
COLUMNS: Final = {
    "delays": DELAYS,
    "windows": WINDOWS,
    "minutes": WINDOWS,
    "ten_minutes": WINDOWS,
    "hours": WINDOWS,
    "ledger": LEDGER,
    "runs": RUNS,
    "cost": COST,
    "stages": STAGES,
    "cpus": CPUS,
    "softirqs": SOFTIRQS,
    "round_trips": ROUND_TRIPS,
}

SCHEMAS: Final = {
    table: pa.schema([pa.field(c.name, c.type, nullable=c.optional) for c in columns])
    for table, columns in COLUMNS.items()
}

REMAINDER: Final = "time_remainder_ns"
"""Column of the files beside `time`: nanoseconds since `time`, 0 to 999. Files of schema version 1 have no such column,
and nanoseconds in `time`."""
STORED_SCHEMAS: Final = {
    table: pa.schema(
        [
            pa.field("time", _STORED_TIME, nullable=False),
            pa.field(REMAINDER, pa.uint16(), nullable=False),
            *[each for each in schema if each.name != "time"],
        ]
    )
    for table, schema in SCHEMAS.items()
}
"""Columns of the files: those of `SCHEMAS`, with the time in two columns, because Spark reads no Parquet time in ns."""

_SKIPPED_BY: Final = ("time", "delay_ns")
"""Columns of `delays` in which readers search for ranges."""
_DELTA: Final = dict.fromkeys((*_SKIPPED_BY, REMAINDER), "DELTA_BINARY_PACKED")
_PLAIN: Final = {REMAINDER, "delay_ns"}
"""Columns of `delays` in which zstd finds nothing: remainders and differences of delays are random."""
_COMPRESSED_BEST: Final = {"time", "packet", "rank", "position", "l3_len", "drop_reason"}
"""Columns of `delays` that zstd makes much smaller than Snappy does. Of the others, which are mostly names, little is
left in either case, and Snappy needs no context for each page."""
_COMPRESSION: Final = {
    f.name: "none" if f.name in _PLAIN else "zstd" if f.name in _COMPRESSED_BEST else "snappy"
    for f in STORED_SCHEMAS["delays"]
}
_PAGES: Final = {"version": "2.6", "max_rows_per_page": 1 << 20, "write_batch_size": 1 << 16}
"""Pages that are limited by their bytes (1 MiB) alone, and filled with so many rows at a time. pyarrow's defaults,
20,000 rows a page and 1,024 at a time, take a quarter longer."""
_FEW_ROWS: Final = 1 << 10
"""Of files with fewer rows only the lists are compressed: making a context of zstd takes longer than encoding another
column, and the file becomes larger. Merging encodes their rows again, in larger files."""
ROW_GROUP_ROWS: Final = 1 << 18
"""Number of rows that are encoded and decoded at a time: about 20 MB as Arrow."""


@cache
def parquet_options(table: str, *, few: bool = False) -> dict[str, Any]:
    """Return the encoding of a table as keyword arguments of `SegmentWriter`. `few`: a file with few rows.

    Names are dictionaries, times and delays deltas, packets and small numbers plain: zstd compresses their repetitions
    faster than a dictionary is built (123 ns and 6.2 bytes per row; with packets as deltas 142 ns and 6.8). Only
    columns by which readers can skip have statistics: those of a name column cost more than the column itself.
    """
    if table == "delays":
        return {
            **_PAGES,
            "compression": _COMPRESSION,
            "compression_level": dict.fromkeys(_COMPRESSED_BEST, 1),
            "use_dictionary": [c.name for c in DELAYS if c.type == _NAME],
            "column_encoding": _DELTA,
            "write_statistics": list(_SKIPPED_BY),
        }
    if not few:
        return {**_PAGES, "compression": "zstd", "compression_level": 1}
    schema = STORED_SCHEMAS[table]
    lists = [f"{f.name}.list.element" for f in schema if pa.types.is_list(f.type)]
    return {
        **_PAGES,
        "compression": dict.fromkeys(schema.names, "none") | dict.fromkeys(lists, "zstd"),
        "compression_level": dict.fromkeys(lists, 1) or None,
        "use_dictionary": [f.name for f in schema if pa.types.is_dictionary(f.type)],
    }


def encode(rows: pa.Table, table: str, row_group_rows: int = ROW_GROUP_ROWS) -> pa.Buffer:
    """Return rows of a table (columns `SCHEMAS`) as the bytes of a Parquet file (columns `STORED_SCHEMAS`)."""
    return encoded(to_stored(rows), row_group_rows, parquet_options(table, few=len(rows) < _FEW_ROWS))


def to_stored(rows: pa.Table) -> pa.Table:
    """Return rows with the columns of the files: `time` in microseconds, rounded down, and its `REMAINDER`."""
    assert rows.schema.field("time").type == _TIME
    time_ns = _numbers(rows["time"])
    time_us = time_ns // 1_000
    # 16 bits suffice for a difference below 1,000, whatever the upper bits are.
    remainder_ns = time_ns.astype(np.uint16) - time_us.astype(np.uint16) * np.uint16(1_000)
    at = rows.schema.get_field_index("time")
    time = pa.field("time", _STORED_TIME, nullable=False)
    stored = rows.set_column(at, time, pa.array(time_us).view(_STORED_TIME))
    return stored.add_column(at + 1, pa.field(REMAINDER, pa.uint16(), nullable=False), pa.array(remainder_ns))


def from_stored(rows: pa.Table) -> pa.Table:
    """Return rows of a file of any version with `time` in nanoseconds, and without `REMAINDER`."""
    if REMAINDER not in rows.column_names:
        return rows
    time_us = _numbers(rows["time"])
    time_ns = time_us * 1_000 + rows[REMAINDER].to_numpy()
    at = rows.schema.get_field_index("time")
    whole = rows.set_column(at, pa.field("time", _TIME, nullable=False), pa.array(time_ns).view(_TIME))
    return whole.drop_columns([REMAINDER])


def _numbers(times: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return times without nulls as numbers."""
    # `cast` would load pyarrow.compute, which takes 8 MiB and serves nothing else in a run.
    parts = [each.view(pa.int64()).to_numpy() for each in times.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


@cache
def nothing_encoded(table: str) -> bytes:
    """Return a Parquet file of a table without rows, whose schema and metadata all its segments have."""
    data: bytes = encode(SCHEMAS[table].empty_table(), table).to_pybytes()
    return data


def _names(enum: type[IntEnum]) -> list[str]:
    """Return the lower-case names of an enum by number; numbers without a name are `unknown`."""
    names = {int(e): e.name.lower() for e in enum}
    return [names.get(n, "unknown") for n in range(max(names) + 1)]


_DIRECTIONS: Final = _names(Direction)
_MEASURES: Final = _names(Measure)
_SEGMENTS: Final = _names(Segment)
_GRADES: Final = _names(Grade)
_OUTCOMES: Final = _names(Outcome)


def _named(codes: npt.NDArray[Any], values: Sequence[str]) -> pa.Array:
    """Return a dictionary column of names: `codes` index `values`, which are distinct."""
    if len(codes) and int(codes.max()) >= len(values):
        raise ValueError(f"row with number {int(codes.max())} where {len(values)} names are known: {values}")
    return _dictionary(codes.astype(np.int16, copy=False), values)


def _dictionary(codes: npt.NDArray[np.int16], values: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes), _strings(tuple(values)), safe=False)


@lru_cache(1 << 10)
def _strings(values: tuple[str, ...]) -> pa.Array:
    return pa.array(values, pa.string())


def _constant(value: str, rows: int) -> pa.Array:
    return _dictionary(np.zeros(rows, np.int16), [value])


Runs = StreamHeader | Sequence[tuple[StreamHeader, int]]
"""The run of all rows, or several runs, each with the number of its consecutive rows."""


def _run_columns(runs: Runs, rows: int) -> list[pa.Array]:
    if isinstance(runs, StreamHeader):
        return [_constant(value, rows) for value in (runs.host, runs.run, runs.source)]
    counts = [count for _, count in runs]
    columns = []
    for values in ([h.host for h, _ in runs], [h.run for h, _ in runs], [h.source for h, _ in runs]):
        number = {value: n for n, value in enumerate(dict.fromkeys(values))}
        codes = np.repeat(np.array([number[value] for value in values], np.int16), counts)
        columns.append(_named(codes, list(number)))
    return columns


def _container_id(device: Device) -> str:
    return device.container_id


class _OfDevices:
    """Columns that rows have of their devices. Dictionaries have only the names of devices that rows name, in order."""

    def __init__(self, device: npt.NDArray[Any], devices: Sequence[Device]) -> None:
        """`device` has the index into `devices` of each row's device."""
        used = np.flatnonzero(np.bincount(device, minlength=len(devices)))
        if len(used) and int(used[-1]) >= len(devices):
            raise ValueError(f"row with device {int(used[-1])} where {len(devices)} devices are known")
        # Of the type that numpy looks up by: it would convert each column's indices otherwise.
        self._device = device.astype(np.intp, copy=False)
        self._devices, self._used = devices, used

    def columns(self, rank: Sequence[int] | None) -> list[pa.Array]:
        """Return the columns of `_DEVICE` up to `rank`. `rank` has each device's rank; None: that of one run."""
        ranked = np.array(ranks(self._devices) if rank is None else rank, np.uint8)
        return [
            self.names(lambda device: device.container),
            self.names(lambda device: device.netns_name),
            self.names(lambda device: device.name),
            self.names(lambda device: f"{device.netns}:{device.ifindex}"),
            self.names(lambda device: device.kind),
            self.names(lambda device: device.role.value),
            pa.array(ranked.take(self._device)),
        ]

    def names(self, name_of: Callable[[Device], str]) -> pa.Array:
        """Return a dictionary column of the devices' names."""
        values = [name_of(self._devices[i]) for i in self._used.tolist()]
        distinct = sorted(set(values))
        if len(distinct) == 1:
            return _constant(distinct[0], len(self._device))
        number = {value: n for n, value in enumerate(distinct)}
        codes = np.zeros(len(self._devices), np.int16)
        codes[self._used] = [number[value] for value in values]
        return _dictionary(codes.take(self._device), distinct)


def delays_table(
    header: Runs, delays: Delays, devices: Sequence[Device], rank: Sequence[int] | None = None
) -> pa.Table:
    """Return rows of `delays` (columns `DELAYS`). `rank` is each device's rank, if devices are of several runs."""
    rows, of = len(delays), _OfDevices(delays.device, devices)
    return pa.Table.from_arrays(
        [
            pa.array(delays.utc_ns).view(_TIME),
            pa.array(delays.packet),
            *_run_columns(header, rows),
            *of.columns(rank),
            _named(delays.direction, _DIRECTIONS),
            _named(delays.segment, _SEGMENTS),
            pa.array(delays.position),
            pa.array(delays.delay_ns),
            pa.array(delays.l3_len),
            _named(delays.grade, _GRADES),
            _named(delays.outcome, _OUTCOMES),
            pa.array(delays.drop_reason),
            pa.array(delays.waited),
            of.names(_container_id),
        ],
        schema=SCHEMAS["delays"],
    )


def windows_table(
    header: Runs,
    windows: WindowTable,
    devices: Sequence[Device],
    rank: Sequence[int] | None = None,
    device: npt.NDArray[np.int64] | None = None,
) -> pa.Table:
    """Return rows of `windows` (columns `WINDOWS`).

    `rank` has the rank of each device, if devices are of several runs; `device` replaces the windows' device indices.
    """
    rows = len(windows)
    if device is None:
        device = windows.column("device")
    of = _OfDevices(device, devices)
    offsets = pa.array(windows.edges.astype(np.int32))
    return pa.Table.from_arrays(
        [
            pa.array(windows.column("start_utc_ns")).view(_TIME),
            pa.array(windows.column("width_s").astype(np.uint32)),
            *_run_columns(header, rows),
            *of.columns(rank),
            _named(windows.column("direction"), _DIRECTIONS),
            _named(windows.column("segment"), _SEGMENTS),
            *(pa.array(windows.column(name)) for name in FIGURES),
            pa.ListArray.from_arrays(offsets, pa.array(windows.bins.astype(np.uint16))),
            pa.ListArray.from_arrays(offsets, pa.array(windows.counts)),
            of.names(_container_id),
            of.names(lambda each: each.pod_containers),
        ],
        schema=SCHEMAS["windows"],
    )


@dataclass(frozen=True, slots=True)
class StageRows:
    """Counts of stages as `Rows.stages` has them, with the places and devices that they refer to."""

    counts: WindowTable
    places: Sequence[StagePlace]
    devices: Sequence[Device]


def stages_table(header: StreamHeader, stages: StageRows) -> pa.Table:
    """Return rows of `stages` (columns `STAGES`)."""
    counts, rows = stages.counts, len(stages.counts)
    at = counts.column("device")
    device, owner, cpu_queued, cpu = (
        np.array([getattr(place, name) for place in stages.places], np.int64)[at]
        for name in ("device", "owner", "cpu_queued", "cpu")
    )
    of = _OfDevices(device, stages.devices)
    offsets = pa.array(counts.edges.astype(np.int32))
    return pa.Table.from_arrays(
        [
            pa.array(counts.column("start_utc_ns")).view(_TIME),
            pa.array(counts.column("width_s").astype(np.uint32)),
            *_run_columns(header, rows),
            *of.columns(None),
            _named(counts.column("direction"), _DIRECTIONS),
            _named(counts.column("segment"), _MEASURES),
            pa.array(cpu_queued.astype(np.int32)),
            pa.array(cpu.astype(np.int32)),
            *(pa.array(counts.column(name)) for name in ("count", "sum_ns", "min_ns", "max_ns")),
            pa.ListArray.from_arrays(offsets, pa.array(counts.bins.astype(np.uint16))),
            pa.ListArray.from_arrays(offsets, pa.array(counts.counts)),
            of.names(_container_id),
            _OfDevices(owner, stages.devices).names(lambda each: each.netns_name),
        ],
        schema=SCHEMAS["stages"],
    )


def cpus_table(header: StreamHeader, readings: Sequence[CpuCounters]) -> pa.Table:
    """Return one row of `cpus` (columns `CPUS`) per reading."""
    return pa.Table.from_arrays(
        [
            pa.array([each.utc_ns for each in readings], pa.int64()).view(_TIME),
            *_run_columns(header, len(readings)),
            pa.array([each.cpu for each in readings], pa.int32()),
            *(
                pa.array([getattr(each, name) for each in readings], pa.int64())
                for name in ("processed", "dropped", "squeezed")
            ),
        ],
        schema=SCHEMAS["cpus"],
    )


def softirqs_table(header: StreamHeader, readings: Sequence[SoftirqCounts]) -> pa.Table:
    """Return one row of `softirqs` (columns `SOFTIRQS`) per reading."""
    names = ("count", "by_ksoftirqd", "run_ns", "wait_ns", "wait_max_ns", "lost")
    return pa.Table.from_arrays(
        [
            pa.array([each.utc_ns for each in readings], pa.int64()).view(_TIME),
            *_run_columns(header, len(readings)),
            pa.array([each.cpu for each in readings], pa.int32()),
            *(pa.array([getattr(each, name) for each in readings], pa.int64()) for name in names),
            pa.array([each.bins.tolist() for each in readings], pa.list_(pa.uint16())),
            pa.array([each.counts.tolist() for each in readings], pa.list_(pa.int64())),
        ],
        schema=SCHEMAS["softirqs"],
    )


def round_trips_table(header: StreamHeader, trips: RoundTrips) -> pa.Table:
    """Return one row of `round_trips` (columns `ROUND_TRIPS`) per sample."""
    rows, count = trips.rows, len(trips.rows)
    paired = rows.reason == 0

    def told(values: npt.NDArray[np.int64], known: npt.NDArray[np.bool_] | None = None) -> pa.Array:
        unknown = values == NOT_TOLD
        return pa.array(values, mask=unknown if known is None else unknown | ~known)

    grades = ["", *_GRADES]
    return pa.Table.from_arrays(
        [
            pa.array(trip_times(header, trips)).view(_TIME),
            *_run_columns(header, count),
            *(_constant(value, count) for value in (trips.container, trips.netns, trips.tool, trips.destination)),
            told(rows.seq),
            _named(rows.reason, trips.reasons),
            told(rows.tool_rtt_ns),
            *(
                told(getattr(rows, name), paired)
                for name in ("host_rtt_ns", "host_rtt_lower_bound_ns", "nic_rtt_ns", "egress_ns", "ingress_ns")
            ),
            *(
                told(getattr(rows, name), paired)
                for name in ("temporal_error_ns", "tracer_cost_ns", "tracer_cost_error_ns")
            ),
            _named(np.where(paired, rows.grade.astype(np.int16) + 1, 0), grades),
            _constant(trips.container_id, count),
        ],
        schema=SCHEMAS["round_trips"],
    )


def trip_times(header: StreamHeader, trips: RoundTrips) -> npt.NDArray[np.int64]:
    """Return the column `time` of `round_trips`: UTC, ns."""
    return np.where(trips.rows.utc_ns == NOT_TOLD, header.clock.utc_ns, trips.rows.utc_ns)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """The ledger of one run at one time."""

    header: StreamHeader
    time_ns: int
    ledger: Ledger
    packets: int
    grades: Grades
    rows_stored: int
    rows_not_stored: int
    closed: bool
    on_host_network: tuple[Sharer, ...] = ()

    @classmethod
    def of(
        cls,
        header: StreamHeader,
        totals: Totals,
        *,
        rows_stored: int = 0,
        rows_not_stored: int = 0,
        closed: bool = False,
    ) -> Self:
        """Return the row of a run's totals."""
        return cls(
            header,
            totals.upto_utc_ns,
            totals.ledger,
            packets=totals.packets,
            grades=totals.grades,
            rows_stored=rows_stored,
            rows_not_stored=rows_not_stored,
            closed=closed,
            on_host_network=totals.on_host_network,
        )


def ledger_table(entries: Sequence[LedgerRow], flush: int) -> pa.Table:
    """Return one row of `ledger` (columns `LEDGER`) per entry."""
    ledgers, grades = [e.ledger.as_dict() for e in entries], [e.grades.as_dict() for e in entries]
    return pa.Table.from_arrays(
        [
            pa.array([e.time_ns for e in entries], pa.int64()).view(_TIME),
            pa.array([flush] * len(entries), pa.uint64()),
            *_run_columns([(e.header, 1) for e in entries], len(entries)),
            *(pa.array([each[f.name] for each in ledgers], pa.int64()) for f in fields(Ledger)),
            pa.array([e.packets for e in entries], pa.int64()),
            pa.array([e.rows_stored for e in entries], pa.int64()),
            pa.array([e.rows_not_stored for e in entries], pa.int64()),
            pa.array([e.closed for e in entries]),
            *(pa.array([each[name] for each in grades], pa.int64()) for name in GRADES),
            pa.array([[asdict(one) for one in e.on_host_network] for e in entries], pa.list_(_SHARER)),
        ],
        schema=SCHEMAS["ledger"],
    )


def grown(rows: pa.Table, table: str) -> pa.Table:
    """Convert rows that any version has stored to the columns and types of `SCHEMAS`.

    A ledger stored before grades existed gets the grades that it would have had: all packets matched by the buffer.
    """
    schema, rows = SCHEMAS[table], from_stored(rows)
    for field in schema:
        if field.name not in rows.column_names:
            told = rows["packets"] if field.name == GRADES["buffer"] else _nothing(field, len(rows))
            rows = rows.append_column(field.name, told)
    columns = [_as(rows[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _as(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Return a column as another type. Names that Arrow has read have wider indices than `_NAME`."""
    if column.type == type_:
        return column
    if pa.types.is_dictionary(column.type) and type_ == _NAME and not column.null_count:
        named = [_named(each.indices.to_numpy(), each.dictionary.to_pylist()) for each in column.chunks]
        return pa.chunked_array(named, type_)
    return column.cast(type_)


def _nothing(field: pa.Field, rows: int) -> pa.Array:
    """Return a column of what rows without it say: null if it may be, else 0, false, an empty name or list."""
    type_ = field.type
    if field.nullable:
        return pa.nulls(rows, type_)
    if pa.types.is_dictionary(type_):
        return _constant("", rows)
    nothing: Any = [] if pa.types.is_list(type_) else "" if pa.types.is_string(type_) else 0
    return pa.array([nothing] * rows, type_)


def cost_table(header: StreamHeader, time_ns: int, cost: Sequence[HookCost]) -> pa.Table:
    """Return one row of `cost` (columns `COST`) per hook."""
    rows = len(cost)
    return pa.Table.from_arrays(
        [
            pa.array([time_ns] * rows, pa.int64()).view(_TIME),
            *_run_columns(header, rows),
            _named(np.arange(rows), [BY_HOOK[c.hook].name for c in cost]),
            *(pa.array([getattr(c, name) for c in cost], pa.int64()) for name in ("calls", "timed", "timed_ns")),
        ],
        schema=SCHEMAS["cost"],
    )


def runs_table(header: StreamHeader) -> pa.Table:
    """Return the row of `runs` (columns `RUNS`) for a run."""
    kernel = header.clock.kernel
    return pa.Table.from_arrays(
        [
            pa.array([header.clock.utc_ns], pa.int64()).view(_TIME),
            *_run_columns(header, 1),
            pa.array([header.kernel]),
            pa.array([header.boot_id]),
            pa.array([header.cpus], pa.uint32()),
            pa.array([header.clock.monotonic_ns], pa.int64()),
            pa.array([header.clock.uncertainty_ns], pa.int64()),
            pa.array([list(header.hooks)], pa.list_(pa.string())),
            pa.array([header.mace_version]),
            pa.array([list(header.command)], pa.list_(pa.string())),
            pa.array([kernel.state if kernel else ""]),
            pa.array([kernel.max_error_ns if kernel else 0], pa.int64()),
            pa.array([kernel.est_error_ns if kernel else 0], pa.int64()),
        ],
        schema=SCHEMAS["runs"],
    )
