"""Which CPU worked on packets: what is measured of stages, and where.

A *stage* is a packet's passage of one device: the packet may wait on a CPU's queue (from `netif_rx` to
`netif_receive_skb`), and a CPU then works on it until the packet's next record at another device (`correlator.stages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from contracts.arrays import Ints

STAGES_WIDTH_S: Final = 10
"""Width of the intervals in which stages are counted, s."""


class Measure(IntEnum):
    """What a histogram of stages or packets counts."""

    RUN = 1
    """Duration of a CPU's work in one stage."""
    WAIT = 2
    """Time on the CPU's queue before that work."""
    LAST_WAIT = 3
    """Like `WAIT`, of a stage whose work has no known end, because the packet reached no further device."""
    WORK = 4
    """Sum of a packet's `RUN`, of a packet that was seen over its whole path."""
    SERIAL = 5
    """The part of `WORK` on the CPU that worked most on the packet."""
    PARTIAL = 6
    """Like `WORK`, of a packet that was not seen over its whole path; its stages are not counted."""


@dataclass(frozen=True, slots=True)
class StagePlace:
    """Where a stage was: a device on a container's path, and two CPUs.

    For `WORK`, `SERIAL` and `PARTIAL` the device is the container's own.
    """

    device: int
    """Index into `Rows.devices`."""
    owner: int
    """Index of the container's own device into `Rows.devices`."""
    cpu_queued: int
    """CPU that passed the packet to the device; -1: none, or too many pairs of CPUs to tell them apart."""
    cpu: int
    """CPU that worked on the packet; -1 as for `cpu_queued`."""


@dataclass(frozen=True, slots=True)
class CpuCounters:
    """A CPU's counters of /proc/net/softnet_stat at one time. Each counts from the boot and wraps at 2**32."""

    utc_ns: int
    cpu: int
    processed: int
    """Packets that the CPU took from its queue and from drivers."""
    dropped: int
    """Packets dropped because the CPU's queue was full (net.core.netdev_max_backlog)."""
    squeezed: int
    """How often the softirq ended with work left, by net.core.netdev_budget or its time limit."""


@dataclass(frozen=True, slots=True, eq=False)
class SoftirqCounts:
    """What was counted of one CPU's receive softirq since the reading before."""

    utc_ns: int
    cpu: int
    count: int
    """Runs of the softirq."""
    by_ksoftirqd: int
    """Of these in the task ksoftirqd."""
    run_ns: int
    """Sum of the runs."""
    wait_ns: int
    """Sum of the known waits from raise to entry."""
    wait_max_ns: int
    lost: int
    """Events that the trace's ring lost, or 1 where the kernel has no number."""
    bins: Ints
    """Bins of `contracts.histogram` of the known waits, ascending; `counts` of the same shape."""
    counts: Ints


@dataclass(frozen=True, slots=True)
class CpuReadings:
    """One reading of all CPUs of a machine."""

    counters: Sequence[CpuCounters]
    softirqs: Sequence[SoftirqCounts] = ()
    """Empty if the softirqs are not followed."""


MOST_PLACES: Final = 1 << 16
"""Most places of a stream with CPUs of their own; the stages of further places are counted without CPUs."""
