"""The measurement catalogue: what goes to databases, brokers and dashboards, under which names, in which units.

One table for all that speak of them: sinks write these names, dashboards query them, docs/metrics.md lists them, and
tests hold the three together. Names that end in a unit have it (`delay_ns`); all others are counts of what they name.

Tags have few values: never a packet, an address, a port or a key, and a container's id in `container_info` alone. A row
is known by its measurement, its tags and its time; what is written again replaces itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class FieldKind(StrEnum):
    """How a field's values relate to each other."""

    SAMPLE = "sample"
    """Of one packet or round trip."""
    WINDOW = "window"
    """Of all delays of a window, and final."""
    COUNTER = "counter"
    """Since the run began; goes back to 0 when another begins."""
    GAUGE = "gauge"
    """As it is at that time."""
    HISTOGRAM = "histogram"
    """A string of `bin:count` pairs, separated by spaces; bins as in `contracts.histogram`. Merge by adding counts."""


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a row: whole numbers, but for the histogram."""

    name: str
    kind: FieldKind
    meaning: str

    @property
    def unit(self) -> str:
        """`ns`, `bytes`, `s`; `""` for a count."""
        last = self.name.rsplit("_", 1)[-1]
        return {"ns": "ns", "bytes": "bytes", "s": "s", "len": "bytes"}.get(last, "")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Rows of one kind."""

    name: str
    meaning: str
    tags: tuple[str, ...]
    """Names in `TAGS`, in the order in which they are written. One without a value is left out of the row."""
    fields: tuple[Field, ...]
    time: str
    """What the row's time is the time of."""


TAGS: Final = {
    "host": "Host that captured the packets.",
    "container": "Container whose packets they are; none for those of no container.",
    "container_id": "Whole id that the runtime gave the container; stays when it is renamed.",
    "netns": "Name of the network namespace that the device is in; `host` for the host's.",
    "device": "Name of the network device.",
    "kind": "Link kind of the device: `veth`, `bridge`, ...; none for hardware.",
    "role": "`inner`, `outer`, `host`, `remote`, `loopback` or `other`.",
    "rank": "Where the device stands on the way out of a container, from 0; sorts a path.",
    "direction": "`egress`: out of the container, `ingress`: into it, else `unknown`.",
    "segment": "`device`: part of the overhead; `outside`: crossed by the host's own packets too; `delivery`: from the"
    " inner device to the reader; `overhead`: the whole of a packet's.",
    "source": "Source that captured the packets: `ftrace`, `kmod`, ...",
    "grade": "On what ground a packet's records are tied: `buffer`, `content`, `exact`.",
    "width_s": "Width of the window, s: `1` or `10`. Each delay is in one window of each width.",
    "tool": "Tool whose round trips they are, with how it stamps time: `ping`, `ping -U`, ...",
    "reason": "`paired`, or why the sample could not be corrected: `no_reply`, `no_request`, `no_response`,"
    " `ambiguous`, `lost`, `no_time`.",
    "part": "What the row tells of: `ledger`, `cost`, `queue`, `process` or `sink`.",
    "hook": "Hook whose probe it is the cost of (`part=cost`).",
    "queue": "Channel of the pipeline (`part=queue`): `items`, `results`.",
    "sink": "Sink that it is the account of (`part=sink`).",
    "slot": "Keeps rows apart that would else have the same tags and time; none almost always.",
}
"""All tags, with their meaning."""

_DEVICE: Final = ("host", "container", "netns", "device", "kind")
_PACKET: Final = (
    Field("l3_len", FieldKind.SAMPLE, "Bytes of the packet without link-layer header."),
    Field("dropped", FieldKind.SAMPLE, "1 if the kernel dropped the packet later on; else the row has no such field."),
)


def _counter(name: str, meaning: str) -> Field:
    return Field(name, FieldKind.COUNTER, meaning)


def _gauge(name: str, meaning: str) -> Field:
    return Field(name, FieldKind.GAUGE, meaning)


LEDGER_FIELDS: Final = (
    _counter("records", "Records seen: matched + unmatched + ambiguous + expired + dropped + in_flight."),
    _counter("matched", "Tied to another record of the same packet."),
    _counter("unmatched", "No partner was seen."),
    _counter("ambiguous", "Several devices or packets fit."),
    _counter("expired", "The partner came too late."),
    _counter("dropped", "Of packets that the kernel dropped."),
    _gauge("in_flight", "Of packets whose life has not ended yet."),
    _counter("lost", "Not stored by the kernel's ring."),
    _counter("discarded", "Discarded by a bounded buffer of the source's."),
    _counter("packets", "Packets with at least one delay."),
    _counter("packets_ambiguous", "Packets that were given up."),
    _counter("packets_several_devices", "Of these the packets that several devices fit."),
    _counter("packets_several_packets", "Of these the packets that fit several packets of one content."),
    _counter("packets_buffer", "Packets that the kernel buffer alone holds together."),
    _counter("packets_content", "Packets that their content key alone does."),
    _counter("packets_exact", "Packets that both do."),
    _counter("told_apart", "Times that the key alone said that a buffer had become another packet's."),
    _counter("packets_waited", "Packets that waited for a neighbour's address (ARP, ND), and are in no window."),
)
SINK_FIELDS: Final = (
    _counter("taken", "Rows that the sink was given, and found in its spool when it began."),
    _counter("stored", "Rows that the server has acknowledged."),
    _gauge("waiting", "Rows in the buffer, in the spool or under way."),
    _counter("refused", "Rows that the server refused for what they are."),
    _counter("over_budget", "Rows that would have begun a series beyond the series budget."),
    _counter("dropped_buffer", "Rows that the full buffer in memory had no room for."),
    _counter("dropped_spool", "The oldest rows, given up because the spool was full."),
    _counter("left_out", "Rows that the configuration leaves out (sampling)."),
    _counter("attempts", "Requests to the server."),
    _counter("retries", "Those that failed and are made again."),
    _gauge("buffer_peak", "The most rows that ever waited in the buffer."),
    _gauge("spool_bytes", "Bytes that the spool takes on the disk."),
    _gauge("series", "Series that the sink has begun."),
    _gauge("delivery_ns", "How long the last successful request took."),
    _gauge("connected", "1 if the last request succeeded, else 0."),
)

MEASUREMENTS: Final = {
    m.name: m
    for m in (
        Measurement(
            "device_delay",
            "One packet's crossing of one device, or its delivery.",
            (*_DEVICE, "direction", "segment", "source", "grade", "slot"),
            (
                Field("delay_ns", FieldKind.SAMPLE, "How long it took."),
                *_PACKET,
                Field("position", FieldKind.SAMPLE, "Which hop of the packet's path it is, from 0."),
            ),
            "When the packet came to the device.",
        ),
        Measurement(
            "overhead",
            "What the container path added to one packet; the device is the container's own.",
            (*_DEVICE, "direction", "source", "grade", "slot"),
            (Field("overhead_ns", FieldKind.SAMPLE, "The sum of its `device` delays."), *_PACKET),
            "When the packet came to the first of the devices.",
        ),
        Measurement(
            "device_window",
            "All delays of a device, direction and segment that began in a stretch of time.",
            (*_DEVICE, "role", "rank", "direction", "segment", "source", "width_s", "slot"),
            (
                Field("count", FieldKind.WINDOW, "Delays in the window."),
                Field("sum_ns", FieldKind.WINDOW, "Their sum."),
                Field("min_ns", FieldKind.WINDOW, "The smallest."),
                Field("max_ns", FieldKind.WINDOW, "The largest."),
                Field("p50_ns", FieldKind.WINDOW, "Median, read from the histogram; relative error at most 0.4 %."),
                Field("p90_ns", FieldKind.WINDOW, "90 % are not larger."),
                Field("p99_ns", FieldKind.WINDOW, "99 % are not larger."),
                Field("p999_ns", FieldKind.WINDOW, "99.9 % are not larger."),
                Field("histogram", FieldKind.HISTOGRAM, "All of them, mergeable."),
            ),
            "Start of the window, a multiple of its width.",
        ),
        Measurement(
            "container_info",
            "Which container has which name: its id stays when it is renamed. None for containers without an id.",
            ("host", "container", "container_id", "netns", "source"),
            (_gauge("present", "1: it is there, and called so."),),
            "When it was first seen under that name, then once a minute.",
        ),
        Measurement(
            "rtt",
            "One round trip of a tool in a container, and what of it was not spent in the container's devices.",
            ("host", "container", "netns", "tool", "source", "grade", "reason", "slot"),
            (
                Field("seq", FieldKind.SAMPLE, "Number of the request in the order of sending."),
                Field("tool_rtt_ns", FieldKind.SAMPLE, "What the tool says."),
                Field(
                    "host_rtt_ns",
                    FieldKind.SAMPLE,
                    "`tool_rtt_ns` - `egress_ns` - `ingress_ns`: at low rates a lower bound of a host process's.",
                ),
                Field("nic_rtt_ns", FieldKind.SAMPLE, "From the outer device and back to it."),
                Field("egress_ns", FieldKind.SAMPLE, "Overhead of the request."),
                Field("ingress_ns", FieldKind.SAMPLE, "Overhead of the response."),
            ),
            "When the request came to the container's device; of a sample that is not paired, the tool's time.",
        ),
        Measurement(
            "mace_internal",
            "How the measurement itself is doing. Each `part` has its own fields.",
            ("host", "source", "part", "hook", "queue", "sink"),
            (
                *LEDGER_FIELDS,
                *SINK_FIELDS,
                _counter("calls", "Calls of the hook's probe."),
                _counter("timed", "Those of them that were timed."),
                _counter("timed_ns", "Time spent in these."),
                _gauge("queue_peak", "The most items that ever waited in the channel."),
                _counter("cpu_ns", "Processor time of the process."),
                _gauge("resident_bytes", "Memory of the process."),
                _gauge("open_files", "File descriptors of the process."),
            ),
            "All records before it are accounted for in this row.",
        ),
    )
}
"""All measurements, by name."""
