"""Rows after correlation: delays, crossings, round trips, windows. Sinks receive them, stores keep them.

`SCHEMA_VERSION` changes when a stored column changes its meaning or is removed; a new column does not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from contracts.counted import Counted
from contracts.hooks import BY_HOOK, Hook

SCHEMA_VERSION: Final = 2
"""1: files have `time` in nanoseconds. 2: in microseconds, beside `time_remainder_ns` (`storage.tables.REMAINDER`)."""


class Direction(IntEnum):
    """Direction of a packet, seen from the container."""

    UNKNOWN = 0
    EGRESS = 1
    """Out of the container."""
    INGRESS = 2
    """Into the container."""


class Segment(IntEnum):
    """Part of a packet's path to which a delay belongs."""

    DEVICE = 1
    """Crossing of one device between the inner and the outer device: part of the overhead."""
    OUTSIDE = 2
    """Crossing of one device that a host process's packet would cross as well: the outer device, and beyond it."""
    DELIVERY = 3
    """From the inner device's `netif_receive_skb` to the copy to the reader."""
    OVERHEAD = 4
    """The whole overhead. Egress: from `net_dev_queue` at the inner device to that at the outer one. Ingress: from
    `netif_receive_skb` at the outer device to that at the inner one. Exactly the sum of the packet's `DEVICE`
    delays."""
    WAITING = 5
    """The part of a `DELIVERY` in which the reader was ready but did not run. It begins with the delivery. Only
    deliveries whose reader was followed have it (`correlator.readers`)."""


class Grade(IntEnum):
    """Evidence that a packet's records belong together."""

    AMBIGUOUS = 0
    """Several devices or packets fit: the packet has no delays."""
    BUFFER = 1
    """One life of one kernel buffer, with devices in a possible order; content gives no evidence."""
    CONTENT = 2
    """Equal content key in two buffers; requires a source that reads keys."""
    EXACT = 3
    """Buffer and key: at least two records have a key, and all keys are equal."""


@dataclass(frozen=True, slots=True)
class Grades(Counted):
    """Packets by grade, of a whole run so far."""

    ambiguous: int = 0
    buffer: int = 0
    content: int = 0
    exact: int = 0
    told_apart: int = 0
    """How often only the key showed that a buffer had been reused for another packet. These are not packets, and no
    other count includes them."""
    waited: int = 0
    """Packets of `packets` that waited for a neighbour (`Delays.waited`), mostly a flow's first; no window counts
    them."""

    @property
    def packets(self) -> int:
        """Number of packets with at least one delay."""
        return self.buffer + self.content + self.exact

    def line(self) -> str:
        """Return all counts in one line for people."""
        return "grades: " + " · ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.as_dict().items())


class Outcome(IntEnum):
    """End of a packet's life, as far as records show it."""

    OPEN = 0
    """No record of an end: the buffer was reused, or no further record followed."""
    CONSUMED = 1
    DROPPED = 2


class Columns:
    """Columns of equal length; subclasses declare them with `_DTYPES`."""

    __slots__ = ()
    _DTYPES: ClassVar[dict[str, str]]

    def __len__(self) -> int:
        first: npt.NDArray[Any] = getattr(self, next(iter(self._DTYPES)))
        return len(first)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join parts in the given order; no parts give no rows."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.empty()
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls._DTYPES})

    @classmethod
    def empty(cls) -> Self:
        """Return no rows."""
        return cls(**{name: np.zeros(0, dtype) for name, dtype in cls._DTYPES.items()})

    def __getitem__(self, index: slice | npt.NDArray[Any]) -> Self:
        return type(self)(**{name: getattr(self, name)[index] for name in self._DTYPES})


@dataclass(frozen=True, slots=True, eq=False)
class Delays(Columns):
    """One row per packet and segment. Enumerations are stored as their numbers (u1)."""

    utc_ns: npt.NDArray[np.int64]
    """Time at which the segment began."""
    packet: npt.NDArray[np.uint64]
    """Number of the packet, equal in all rows of its life, without further meaning."""
    device: npt.NDArray[np.int32]
    """Index into `Rows.devices`. For OVERHEAD: the inner device."""
    direction: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.uint8]
    position: npt.NDArray[np.uint8]
    """Index of the hop along the packet's path, from 0; 255 for OVERHEAD."""
    delay_ns: npt.NDArray[np.int64]
    l3_len: npt.NDArray[np.uint32]
    """Bytes without link-layer header at the packet's first record."""
    grade: npt.NDArray[np.uint8]
    outcome: npt.NDArray[np.uint8]
    drop_reason: npt.NDArray[np.uint16]
    """The running kernel's `enum skb_drop_reason` where the outcome is DROPPED, else 0."""
    waited: npt.NDArray[np.bool_]
    """Whether an ARP exchange or neighbour discovery on the packet's next device delayed its routing. Windows leave
    such delays out."""

    _DTYPES: ClassVar[dict[str, str]] = {
        "utc_ns": "<i8",
        "packet": "<u8",
        "device": "<i4",
        "direction": "u1",
        "segment": "u1",
        "position": "u1",
        "delay_ns": "<i8",
        "l3_len": "<u4",
        "grade": "u1",
        "outcome": "u1",
        "drop_reason": "<u2",
        "waited": "?",
    }


NOT_TOLD: Final = -1
"""Value of an unknown field of a packet or a sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Crossings(Columns):
    """One row per packet with records over a container's whole path; tools' samples are corrected with them.

    `inner` is the container's own device, `outer` the host's towards the network. A packet passes inner before outer on
    egress, outer before inner on ingress. A device's *stamp* is where the kernel takes software time stamps of packets:
    at `net_dev_start_xmit` on egress (the last, if the driver was busy), at `netif_rx` on ingress, or, if the device
    does without, at `netif_receive_skb`.

    The `l4_` columns identify the packet by its values at the inner device (NAT rewrites some of them); `NOT_TOLD` if
    the source does not read packets.
    """

    packet: npt.NDArray[np.uint64]
    """As in `Delays`."""
    device: npt.NDArray[np.int32]
    """The inner device: index into `Rows.devices`."""
    direction: npt.NDArray[np.uint8]
    inner_utc_ns: npt.NDArray[np.int64]
    """`net_dev_queue` (egress) or `netif_receive_skb` (ingress) at the inner device."""
    outer_utc_ns: npt.NDArray[np.int64]
    """The same hook at the outer device; the two times differ by the packet's overhead."""
    inner_stamp_utc_ns: npt.NDArray[np.int64]
    outer_stamp_utc_ns: npt.NDArray[np.int64]
    outer_edge_utc_ns: npt.NDArray[np.int64]
    """Nearest to the wire: `net_dev_start_xmit` on egress, the first hook of any kind at that device on ingress."""
    l3_len: npt.NDArray[np.uint32]
    """Bytes without link-layer header at the packet's first record."""
    grade: npt.NDArray[np.uint8]
    l4_proto: npt.NDArray[np.int16]
    """IP protocol number."""
    l4_src: npt.NDArray[np.int32]
    """Source port; of ICMP and ICMPv6 echo the identifier."""
    l4_dst: npt.NDArray[np.int32]
    """Destination port; of ICMP and ICMPv6 echo the sequence number."""
    l4_seq: npt.NDArray[np.int64]
    """TCP sequence number."""

    _DTYPES: ClassVar[dict[str, str]] = {
        "packet": "<u8",
        "device": "<i4",
        "direction": "u1",
        "inner_utc_ns": "<i8",
        "outer_utc_ns": "<i8",
        "inner_stamp_utc_ns": "<i8",
        "outer_stamp_utc_ns": "<i8",
        "outer_edge_utc_ns": "<i8",
        "l3_len": "<u4",
        "grade": "u1",
        "l4_proto": "<i2",
        "l4_src": "<i4",
        "l4_dst": "<i4",
        "l4_seq": "<i8",
    }


@dataclass(frozen=True, slots=True, eq=False)
class RoundTripRows(Columns):
    """One row per sample of a tool. If `reason` is not 0, only time, number and tool RTT have a meaning."""

    utc_ns: npt.NDArray[np.int64]
    """Time at which the request reached the container's device; if unpaired, the tool's time."""
    seq: npt.NDArray[np.int64]
    """Number of the request; `NOT_TOLD` if the tool has none."""
    tool_rtt_ns: npt.NDArray[np.int64]
    """Round trip by the tool; `NOT_TOLD` without a reply."""
    host_rtt_ns: npt.NDArray[np.int64]
    """Round trip of a process on the host with nothing tracing, by probes; `NOT_TOLD` without probes."""
    nic_rtt_ns: npt.NDArray[np.int64]
    egress_ns: npt.NDArray[np.int64]
    ingress_ns: npt.NDArray[np.int64]
    grade: npt.NDArray[np.uint8]
    reason: npt.NDArray[np.uint8]
    """Index into `RoundTrips.reasons`; 0 is `paired`."""
    temporal_error_ns: npt.NDArray[np.int64]
    """Part of `tool_rtt_ns` in which the tool waited for a CPU; `NOT_TOLD` if that is not known."""
    host_rtt_lower_bound_ns: npt.NDArray[np.int64]
    """`tool_rtt_ns` - `egress_ns` - `ingress_ns`."""
    tracer_cost_ns: npt.NDArray[np.int64]
    """Cost of tracing that `host_rtt_ns` is without: with it, it is the round trip of a traced process on the host.
    `NOT_TOLD` where the host RTT or the cost is not known."""
    tracer_cost_error_ns: npt.NDArray[np.int64]
    """Half width of the 95 % interval of `tracer_cost_ns`; `NOT_TOLD` together with it."""

    _DTYPES: ClassVar[dict[str, str]] = {
        "utc_ns": "<i8",
        "seq": "<i8",
        "tool_rtt_ns": "<i8",
        "host_rtt_ns": "<i8",
        "nic_rtt_ns": "<i8",
        "egress_ns": "<i8",
        "ingress_ns": "<i8",
        "grade": "u1",
        "reason": "u1",
        "temporal_error_ns": "<i8",
        "host_rtt_lower_bound_ns": "<i8",
        "tracer_cost_ns": "<i8",
        "tracer_cost_error_ns": "<i8",
    }


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Round trips of one tool in one container, corrected."""

    tool: str
    container: str
    netns: str
    reasons: tuple[str, ...]
    """Lower-case names: `paired`, then the reasons why samples are unpaired."""
    rows: RoundTripRows
    container_id: str = ""
    destination: str = ""
    """Address that the tool asked; empty if it is not known."""


@dataclass(frozen=True, slots=True)
class Window:
    """All delays of one device, direction and segment that began in one interval of UTC. Final when returned."""

    start_utc_ns: int
    """Start of the interval, a multiple of the width."""
    width_s: int
    device: int
    """Index into `Rows.devices`."""
    direction: Direction
    segment: Segment
    count: int
    sum_ns: int
    min_ns: int
    max_ns: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    p999_ns: int
    bins: npt.NDArray[np.int64] = field(compare=False)
    """Ascending bins of `contracts.histogram`."""
    counts: npt.NDArray[np.int64] = field(compare=False)
    """Number of delays in each of `bins`; the sum is `count`."""


@dataclass(frozen=True, slots=True)
class HookCost:
    """Cost of observing packets at one hook, measured by the source itself."""

    hook: Hook
    calls: int
    """Calls of the probe, including those for unrecorded packets."""
    timed: int
    """Timed calls."""
    timed_ns: int
    """Time spent in the timed calls, ns, including the readings of the clock."""

    @property
    def ns_per_call(self) -> float:
        """Mean of the timed calls; 0 if there is none."""
        return self.timed_ns / self.timed if self.timed else 0.0

    def as_dict(self) -> dict[str, str | int | float]:
        """Return hook (its name), calls, timed, timed_ns, ns_per_call."""
        return {
            "hook": BY_HOOK[self.hook].name,
            "calls": self.calls,
            "timed": self.timed,
            "timed_ns": self.timed_ns,
            "ns_per_call": round(self.ns_per_call, 1),
        }


assert tuple(f.name for f in fields(Delays)) == tuple(Delays._DTYPES)
assert tuple(f.name for f in fields(Crossings)) == tuple(Crossings._DTYPES)
assert tuple(f.name for f in fields(RoundTripRows)) == tuple(RoundTripRows._DTYPES)
