"""What a row after correlation says: delays, crossings, round trips, windows. Sinks get them, and stores keep them.

`SCHEMA_VERSION` changes when a column changes its meaning or goes; a new column at the end is no change.
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

SCHEMA_VERSION: Final = 1


class Direction(IntEnum):
    """Which way the packet goes, seen from the container."""

    UNKNOWN = 0
    EGRESS = 1
    """Out of the container."""
    INGRESS = 2
    """Into the container."""


class Segment(IntEnum):
    """Which stretch of a packet's way a delay is of."""

    DEVICE = 1
    """Crossing of one device between the inner and the outer device: part of the overhead."""
    OUTSIDE = 2
    """Crossing of one device that a host process's packet would cross as well: the outer device, and beyond it."""
    DELIVERY = 3
    """From the inner device's `netif_receive_skb` to the copy to the reader."""
    OVERHEAD = 4
    """The whole of it. Egress: `net_dev_queue` inner to outer. Ingress: `netif_receive_skb` outer to inner.
    To the nanosecond the sum of the packet's `DEVICE` delays."""


class Grade(IntEnum):
    """On what ground the records of a packet are said to be of one packet."""

    AMBIGUOUS = 0
    """Several devices or packets fit: given up, and without delays."""
    BUFFER = 1
    """Same kernel buffer in one life, devices in an order that can be; content says nothing, or cannot."""
    CONTENT = 2
    """Same content key in two buffers. Needs a source that gives one."""
    EXACT = 3
    """Both: all records that have a key agree, and two at least have one."""


@dataclass(frozen=True, slots=True)
class Grades(Counted):
    """Packets by grade, of a whole run so far."""

    ambiguous: int = 0
    buffer: int = 0
    content: int = 0
    exact: int = 0
    told_apart: int = 0
    """Times that the key alone said that a buffer had become another packet's. Not packets, and in no other count."""
    waited: int = 0
    """Of the packets those that waited for a neighbour (`Delays.waited`): a flow's first, and in no window."""

    @property
    def packets(self) -> int:
        """Those with at least one delay."""
        return self.buffer + self.content + self.exact

    def line(self) -> str:
        """All of it in one line for people."""
        return "grades: " + " · ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.as_dict().items())


class Outcome(IntEnum):
    """How the packet's life ended, as far as it was seen."""

    OPEN = 0
    """No end was seen: its buffer was used again, or nothing more came."""
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
        """One after the other; no rows for no parts."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.empty()
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls._DTYPES})

    @classmethod
    def empty(cls) -> Self:
        """No rows."""
        return cls(**{name: np.zeros(0, dtype) for name, dtype in cls._DTYPES.items()})

    def __getitem__(self, index: slice | npt.NDArray[Any]) -> Self:
        return type(self)(**{name: getattr(self, name)[index] for name in self._DTYPES})


@dataclass(frozen=True, slots=True, eq=False)
class Delays(Columns):
    """One row per packet and segment. Enumerations are stored as their numbers (u1)."""

    utc_ns: npt.NDArray[np.int64]
    """When the segment began."""
    packet: npt.NDArray[np.uint64]
    """The same in all rows of one packet's life; says nothing else."""
    device: npt.NDArray[np.int32]
    """Index into `Rows.devices`. For OVERHEAD: the inner device."""
    direction: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.uint8]
    position: npt.NDArray[np.uint8]
    """Which hop of the packet's path it is, from 0; 255 for OVERHEAD."""
    delay_ns: npt.NDArray[np.int64]
    l3_len: npt.NDArray[np.uint32]
    """Bytes without link-layer header at the packet's first record."""
    grade: npt.NDArray[np.uint8]
    outcome: npt.NDArray[np.uint8]
    drop_reason: npt.NDArray[np.uint16]
    """The running kernel's `enum skb_drop_reason` where the outcome is DROPPED, else 0."""
    waited: npt.NDArray[np.bool_]
    """The packet was routed while an ARP request or a neighbour solicitation left by the device that it was sent to.
    Its delays are not like those of others, and are in no window."""

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
"""In columns of what a packet or a sample says about itself: it does not say."""


@dataclass(frozen=True, slots=True, eq=False)
class Crossings(Columns):
    """One row per packet that was seen over the whole of a container's path: what a tool's sample is corrected with.

    `inner` is the container's own device, `outer` the host's towards the network. A packet passes inner before outer on
    egress, outer before inner on ingress. A device's *stamp* is where the kernel takes software time stamps of packets:
    at `net_dev_start_xmit` on egress (the last, if the driver was busy), at `netif_rx` on ingress, or, if the device
    does without, at `netif_receive_skb`.

    The `l4_` columns are what tells one packet from another, as it is at the inner device (NAT rewrites some of it);
    `NOT_TOLD` where the source does not look into packets.
    """

    packet: npt.NDArray[np.uint64]
    """As in `Delays`."""
    device: npt.NDArray[np.int32]
    """The inner device: index into `Rows.devices`."""
    direction: npt.NDArray[np.uint8]
    inner_utc_ns: npt.NDArray[np.int64]
    """`net_dev_queue` (egress) or `netif_receive_skb` (ingress) at the inner device."""
    outer_utc_ns: npt.NDArray[np.int64]
    """The same hook at the outer device. The two differ by the packet's overhead."""
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
    """When the request came to the container's device; not paired: the tool's own time."""
    seq: npt.NDArray[np.int64]
    """Number of the request; `NOT_TOLD` where the tool has none."""
    tool_rtt_ns: npt.NDArray[np.int64]
    """`NOT_TOLD`: it saw no reply."""
    host_rtt_ns: npt.NDArray[np.int64]
    nic_rtt_ns: npt.NDArray[np.int64]
    egress_ns: npt.NDArray[np.int64]
    ingress_ns: npt.NDArray[np.int64]
    grade: npt.NDArray[np.uint8]
    reason: npt.NDArray[np.uint8]
    """Index into `RoundTrips.reasons`; 0 is `paired`."""
    temporal_error_ns: npt.NDArray[np.int64]
    """Part of `tool_rtt_ns` in which the tool waited for a CPU; `NOT_TOLD` if that is not known."""

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
    }


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Round trips of one tool in one container, corrected."""

    tool: str
    container: str
    netns: str
    reasons: tuple[str, ...]
    """Names, in small letters: `paired`, then why a sample is not."""
    rows: RoundTripRows


@dataclass(frozen=True, slots=True)
class Window:
    """All delays of one device, direction and segment that began in one stretch of UTC time. Final when given out."""

    start_utc_ns: int
    """A multiple of the width."""
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
    """How many delays are in each; adds up to `count`."""


@dataclass(frozen=True, slots=True)
class HookCost:
    """What observing packets at one hook cost the machine, as measured by the source itself."""

    hook: Hook
    calls: int
    """Calls of the probe, of all packets: those that were not recorded cost as well."""
    timed: int
    """Those of them that were timed."""
    timed_ns: int
    """Time spent in these, ns, the reading of the clock included."""

    @property
    def ns_per_call(self) -> float:
        """Mean of the timed calls; 0 if there is none."""
        return self.timed_ns / self.timed if self.timed else 0.0

    def as_dict(self) -> dict[str, str | int | float]:
        """hook (its name), calls, timed, timed_ns, ns_per_call."""
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
