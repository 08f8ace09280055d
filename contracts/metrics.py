"""The measurement catalogue: what goes to databases, brokers and dashboards, under which names, in which units.

One table serves all users of the names: sinks write them, dashboards query them, docs/metrics.md lists them, and tests
compare the three. A name that ends in a unit is in that unit (`delay_ns`); every other field is a count.

Tags have few values: never a packet, an address, a port or a key, and a container's id in `container_info` alone.
Measurement, tags and time identify a row; a row written twice replaces itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class FieldKind(StrEnum):
    """What a field's value covers: one packet, a window, the run so far, or an instant."""

    SAMPLE = "sample"
    """Value of one packet or round trip."""
    WINDOW = "window"
    """Value of all delays of a window; final."""
    COUNTER = "counter"
    """Count since the run began; the next run begins at 0."""
    GAUGE = "gauge"
    """Value at the row's time."""
    HISTOGRAM = "histogram"
    """A string of `bin:count` pairs, separated by spaces; bins as in `contracts.histogram`. Merge by adding counts."""


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a row: a whole number, or a string for the histogram."""

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
    """One kind of row: its tags, its fields and the meaning of its time."""

    name: str
    meaning: str
    tags: tuple[str, ...]
    """Names in `TAGS`, in the order of writing. A row omits a tag without a value."""
    fields: tuple[Field, ...]
    time: str
    """The event that the row's time refers to."""


TAGS: Final = {
    "host": "Host that captured the packets.",
    "container": "Container whose packets they are; absent for packets of no container.",
    "container_id": "Full id that the runtime gave the container, or a pod's UID; a rename does not change it.",
    "namespace": "Kubernetes namespace of a pod, whose `container` is `NAMESPACE/POD`; absent for other containers.",
    "pod": "Name of the pod.",
    "workload": "What Kubernetes made the pod for, derived from the pod's name: without random characters or ordinal.",
    "pod_containers": "Containers that have started in the pod, separated by commas; they share its devices.",
    "netns": "Name of the network namespace that the device is in; `host` for the host's.",
    "device": "Name of the network device.",
    "kind": "Link kind of the device: `veth`, `bridge`, ...; absent for hardware.",
    "role": "`inner`, `outer`, `host`, `remote`, `loopback` or `other`.",
    "rank": "Position of the device on the way out of a container, from 0; sorts a path.",
    "direction": "`egress`: out of the container; `ingress`: into the container; else `unknown`.",
    "segment": "`device`: part of the overhead; `outside`: a device that the host's own packets cross too; `delivery`:"
    " from the inner device to the reader; `waiting`: the part of it in which the reader waited for a CPU; `overhead`:"
    " the packet's whole overhead.",
    "source": "Source that captured the packets: `ftrace`, `kmod`, ...",
    "grade": "Evidence that a packet's records belong together: `buffer`, `content`, `exact`.",
    "width_s": "Width of the window, s: `1` or `10`. Each delay is in one window of each width.",
    "tool": "Tool that measured the round trips, with its way of taking timestamps: `ping`, `ping -U`, ...",
    "reason": "`paired`, or why the sample could not be corrected: `no_reply`, `no_request`, `no_response`,"
    " `ambiguous`, `lost`, `no_time`.",
    "measure": "What is counted: `run`, a CPU's work in one stage; `wait` and `last_wait`, on the CPU's queue before"
    " it; `work`, `serial` and `partial`, of whole packets ([cpus.md](cpus.md)).",
    "cpu": "CPU that worked; absent for whole packets, and where it is not known.",
    "moved": "`yes` if another CPU had passed the packets to the device, else `no`; absent for whole packets.",
    "part": "Subject of the row: `ledger`, `cost`, `queue`, `process` or `sink`.",
    "hook": "Hook whose probe the cost belongs to (`part=cost`).",
    "queue": "Channel of the pipeline (`part=queue`): `items`, `results`.",
    "sink": "Sink whose account the row is (`part=sink`).",
    "slot": "Keeps rows apart that would otherwise have the same tags and time; almost always absent.",
}
"""Every tag and its meaning."""

_DEVICE: Final = ("host", "container", "netns", "device", "kind")
_PACKET: Final = (
    Field("l3_len", FieldKind.SAMPLE, "Bytes of the packet without link-layer header."),
    Field("dropped", FieldKind.SAMPLE, "1 if the kernel dropped the packet later; otherwise absent."),
)


def _counter(name: str, meaning: str) -> Field:
    return Field(name, FieldKind.COUNTER, meaning)


def _gauge(name: str, meaning: str) -> Field:
    return Field(name, FieldKind.GAUGE, meaning)


LEDGER_FIELDS: Final = (
    _counter("records", "Records seen: matched + unmatched + ambiguous + expired + dropped + in_flight."),
    _counter("matched", "Records matched to another record of the same packet."),
    _counter("unmatched", "Records without a partner."),
    _counter("ambiguous", "Records that several devices or packets fit."),
    _counter("expired", "Records whose partner did not arrive in time."),
    _counter("dropped", "Records of packets that the kernel dropped."),
    _gauge("in_flight", "Records of packets whose life has not ended yet."),
    _counter("lost", "Records that the kernel's ring did not store."),
    _counter("discarded", "Records that a bounded buffer of the source discarded."),
    _counter("packets", "Packets with at least one delay."),
    _counter("packets_ambiguous", "Packets without delays because several devices or packets fit."),
    _counter("packets_several_devices", "Ambiguous packets that several devices fit."),
    _counter("packets_several_packets", "Ambiguous packets whose content several packets share."),
    _counter("packets_buffer", "Packets matched by the kernel buffer alone."),
    _counter("packets_content", "Packets matched by the content key alone."),
    _counter("packets_exact", "Packets matched by kernel buffer and content key."),
    _counter("told_apart", "Reuses of a kernel buffer that only the content key revealed."),
    _counter("packets_waited", "Packets that waited for a neighbour's address (ARP, ND), and are in no window."),
)
SINK_FIELDS: Final = (
    _counter("taken", "Rows that the sink was given, and rows in its spool at the start."),
    _counter("stored", "Rows that the server has acknowledged."),
    _gauge("waiting", "Rows in the buffer, in the spool or in a request under way."),
    _counter("refused", "Rows that the server refused for their content."),
    _counter("over_budget", "Rows that would have begun a series beyond the series budget."),
    _counter("dropped_buffer", "Rows dropped because the buffer in memory was full."),
    _counter("dropped_spool", "Oldest rows, dropped because the spool was full."),
    _counter("left_out", "Rows that the configuration leaves out (sampling)."),
    _counter("attempts", "Requests to the server."),
    _counter("retries", "Requests that failed and are repeated."),
    _gauge("buffer_peak", "Largest number of rows that have waited in the buffer."),
    _gauge("spool_bytes", "Bytes that the spool takes on the disk."),
    _gauge("series", "Series that the sink has begun."),
    _gauge("delivery_ns", "Duration of the last successful request."),
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
                Field("delay_ns", FieldKind.SAMPLE, "Duration of the crossing or the delivery."),
                *_PACKET,
                Field("position", FieldKind.SAMPLE, "Index of the hop in the packet's path, from 0."),
            ),
            "When the packet arrived at the device.",
        ),
        Measurement(
            "overhead",
            "Time that one packet spent in the container's devices; the device is the container's own.",
            (*_DEVICE, "direction", "source", "grade", "slot"),
            (Field("overhead_ns", FieldKind.SAMPLE, "Sum of the packet's `device` delays."), *_PACKET),
            "When the packet arrived at the first of the devices.",
        ),
        Measurement(
            "device_window",
            "All delays of a device, direction and segment that began in the window.",
            (*_DEVICE, "role", "rank", "direction", "segment", "source", "width_s", "slot"),
            (
                Field("count", FieldKind.WINDOW, "Delays in the window."),
                Field("sum_ns", FieldKind.WINDOW, "Sum of the delays."),
                Field("min_ns", FieldKind.WINDOW, "Smallest delay."),
                Field("max_ns", FieldKind.WINDOW, "Largest delay."),
                Field("p50_ns", FieldKind.WINDOW, "Median, read from the histogram; relative error at most 0.4 %."),
                Field("p90_ns", FieldKind.WINDOW, "90 % of the delays are not larger."),
                Field("p99_ns", FieldKind.WINDOW, "99 % of the delays are not larger."),
                Field("p999_ns", FieldKind.WINDOW, "99.9 % of the delays are not larger."),
                Field("histogram", FieldKind.HISTOGRAM, "Histogram of the delays, mergeable."),
            ),
            "Start of the window, a multiple of its width.",
        ),
        Measurement(
            "cpu_stage",
            "Work of a CPU on a container's packets at a device, with `--cpus`. A row is written when it has grown.",
            (*_DEVICE, "direction", "measure", "cpu", "moved", "source"),
            (
                _counter("count", "Stages, or whole packets."),
                _counter("sum_ns", "Sum of their durations."),
            ),
            "All records before this time are accounted for in the row.",
        ),
        Measurement(
            "container_info",
            "Name of each container by id: a rename changes the name alone. Containers without an id have no row.",
            (
                *("host", "container", "container_id", "netns"),
                *("namespace", "pod", "workload", "pod_containers", "source"),
            ),
            (_gauge("present", "1: the container exists under this name."),),
            "When the container was first seen under this name, then once a minute.",
        ),
        Measurement(
            "rtt",
            "One round trip of a tool in a container, as measured and without the delay of the container's devices.",
            ("host", "container", "netns", "tool", "source", "grade", "reason", "slot"),
            (
                Field("seq", FieldKind.SAMPLE, "Number of the request in the order of sending."),
                Field("tool_rtt_ns", FieldKind.SAMPLE, "Round-trip time that the tool reported."),
                Field(
                    "host_rtt_ns",
                    FieldKind.SAMPLE,
                    "Round-trip time that a process on the host would have measured with nothing tracing, estimated"
                    " with probes; absent without probes.",
                ),
                Field(
                    "host_rtt_lower_bound_ns",
                    FieldKind.SAMPLE,
                    "`tool_rtt_ns` - `egress_ns` - `ingress_ns`: a lower bound of a host process's round-trip time.",
                ),
                Field("nic_rtt_ns", FieldKind.SAMPLE, "Round-trip time from the outer device and back to it."),
                Field("egress_ns", FieldKind.SAMPLE, "Overhead of the request."),
                Field("ingress_ns", FieldKind.SAMPLE, "Overhead of the response."),
                Field(
                    "temporal_error_ns",
                    FieldKind.SAMPLE,
                    "Part of `tool_rtt_ns` in which the tool was ready but no CPU ran it; absent where it is not known."
                    " `host_rtt_ns` - `temporal_error_ns` is the host RTT without waiting.",
                ),
                Field(
                    "tracer_cost_ns",
                    FieldKind.SAMPLE,
                    "Cost of tracing that `host_rtt_ns` is without; absent where it is not known, and then not"
                    " subtracted.",
                ),
                Field(
                    "tracer_cost_error_ns",
                    FieldKind.SAMPLE,
                    "Half width of the 95 % interval of `tracer_cost_ns`; absent together with it.",
                ),
            ),
            "When the request arrived at the container's device; for an unpaired sample, the tool's own time.",
        ),
        Measurement(
            "mace_internal",
            "Health of the measurement itself. Each `part` has its own fields.",
            ("host", "source", "part", "hook", "queue", "sink"),
            (
                *LEDGER_FIELDS,
                *SINK_FIELDS,
                _counter("calls", "Calls of the hook's probe."),
                _counter("timed", "Calls of the hook's probe that were timed."),
                _counter("timed_ns", "Time spent in the timed calls."),
                _gauge("queue_peak", "Largest number of items that have waited in the channel."),
                _counter("cpu_ns", "Processor time of the process."),
                _gauge("resident_bytes", "Memory of the process."),
                _gauge("open_files", "File descriptors of the process."),
            ),
            "All records before this time are accounted for in the row.",
        ),
    )
}
"""Every measurement, by name."""
