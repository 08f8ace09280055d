"""Computes which CPU worked on each packet, stage by stage.

    Q eth0 ── X eth0 ─── r veth1 ┈┈┈┈ R veth1 ── R br1 ── Q out1 ── X out1 ── r rem1 ┈┈┈┈ R rem1
    ├─ run, stage eth0 ─┤├──── wait ──┤├ run, veth1 ┤├ run, br1 ┤├─ run, stage out1 ─┤├──── wait ──┤

The *stage* of device d begins with the packet's `netif_receive_skb` there; at a device that only sends the packet, with
its first record. It ends with the packet's next record at another device. That stretch is the stage's *run*: one CPU
calls all functions between. The *wait* before it, from `netif_rx` to `netif_receive_skb`, is the time on a CPU's queue.
A device without `netif_rx` (a tunnel's, a NIC's) has no known wait. The stage *moved* if the CPU that passed the packet
on, at `netif_rx` or else at the record before, is not the CPU that ran it.

The last device's run has no known end: behind its `netif_receive_skb` lies the protocol's work, and then perhaps a
reader's delay. Stages outside the host (in a lab: of the remote machine) are left out.

A packet counts if it was seen over its whole path: between the container's device and the outer device, or from
one container to another, where it counts once for each. Other packets are counted apart (`Measure.PARTIAL`), as their
sums would be too small. Packets that waited for a neighbour's address are in no count, as in windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from contracts.arrays import Bytes, Ints, Mask
from contracts.cpus import MOST_PLACES, STAGES_WIDTH_S, Measure, StagePlace
from contracts.schema import Segment
from contracts.topology import Role
from contracts.windowtable import WindowTable
from correlator.hops import WHOLE_PATH, Measured
from correlator.identity import CODE_BITS, ROLES, Resolver
from correlator.lives import Lives, Paths
from correlator.memo import Memo
from correlator.numbers import IP_RCV, RECEIVE_SKB, RX
from correlator.windows import Windows

_REMOTE: Final = ROLES.index(Role.REMOTE)
_CPU_BITS: Final = 17
"""Bits of a place's key for each CPU, which records hold in 16 bits, and for no CPU."""
_NO_CPU: Final = -1


@dataclass(frozen=True, slots=True)
class Stages:
    """One row per life and stage, in the order of lives and paths. `queued`, `begin` and `end` index records."""

    life: Ints
    device: Ints
    """Device number."""
    owner: Ints
    """Number of the inner device of the container that the stage counts for."""
    direction: Bytes
    queued: Ints
    """The record whose CPU passed the packet to the device; `begin` if there is none."""
    waited: Mask
    """Whether `queued` is the device's `netif_rx`, so that the wait is known."""
    begin: Ints
    end: Ints
    """The packet's first record at the next device; `begin` if there is none."""
    whole: Mask
    """Whether the packet was seen over its whole path."""


def stages(paths: Paths, told: Measured, resolver: Resolver) -> Stages:
    """Return the stages in `told`, the measurement of these paths with positions in place of times (`Paths.numbered`).

    `queued`, `begin` and `end` are positions in the life, too.
    """
    hop = (told.segment == Segment.DEVICE) | (told.segment == Segment.OUTSIDE)
    row = np.flatnonzero(hop & (resolver.role[told.device] != _REMOTE))
    life = told.life[row]
    start = paths.starts[life]
    first = start + told.ts[row]
    end = first + told.delay[row]
    onward = paths.cross[end] & (end > first)

    index = np.arange(len(paths.place))
    hook = paths.place >> CODE_BITS
    received = (hook == RECEIVE_SKB) | (hook == IP_RCV)
    next_received = np.minimum.accumulate(np.where(received, index, len(index))[::-1])[::-1]
    begin = next_received[first]
    begin = np.where(begin < np.where(onward, end, end + 1), begin, first)
    hop_begin = np.maximum.accumulate(np.where(paths.cross, index, 0))[begin]
    rx = np.maximum.accumulate(np.where(hook == RX, index, -1))[begin]
    waited = received[begin] & (rx >= hop_begin)
    queued = np.where(waited, rx, np.where(hop_begin > start, hop_begin - 1, begin))

    sides = np.zeros((len(paths.starts), 4), np.bool_)
    sides[told.life[hop], told.direction[hop]] = True
    whole = sides.sum(axis=1) > 1
    whole[told.life[told.position == WHOLE_PATH]] = True
    return Stages(
        life=life,
        device=told.device[row],
        owner=told.owner[row],
        direction=told.direction[row],
        queued=queued - start,
        waited=waited,
        begin=begin - start,
        end=np.where(onward, end, begin) - start,
        whole=whole[life],
    )


class StageCounts:
    """Counts stages and packets of one stream in intervals of UTC, by device, direction and CPUs.

    Rows of equal time and place add up: a cut of the stream gives two rows in place of one.
    """

    def __init__(self, entry: Callable[[Ints], Ints], own: Sequence[int]) -> None:
        """`entry` returns the index into `Rows.devices` of each (device, owner), packed as the engine packs them.

        `own` has for each of these devices the index of the container's own device; it grows with the devices.
        """
        self._entry, self._own = entry, own
        self._places = Memo(self._new_place)
        self.places: list[StagePlace] = []
        self._windows = Windows()

    @property
    def cells(self) -> int:
        """Number of histogram cells that wait, 32 bytes each."""
        return self._windows.cells

    def close(self, before_utc_ns: int | None) -> WindowTable:
        """Return the counts of intervals that end at or before a time (None: all).

        `device` is an index into `places`, `segment` a `Measure`.
        """
        closed = self._windows.close(before_utc_ns)
        return closed[closed.column("width_s") == STAGES_WIDTH_S] if len(closed) else closed

    def add(self, lives: Lives, found: Stages, left_out: Mask, offset_ns: int) -> None:
        """Count the stages of lives; `left_out` is a mask of lives to ignore, `offset_ns` the offset of UTC."""
        keep = np.flatnonzero(~left_out[found.life])
        if not len(keep) or lives.records.cpu is None:
            return
        life, direction = found.life[keep], found.direction[keep]
        start = lives.starts[life]
        begin, end, queued = (start + column[keep] for column in (found.begin, found.end, found.queued))
        waited, whole = found.waited[keep], found.whole[keep]
        cpus = lives.records.cpu[lives.order]
        cpu, cpu_queued = cpus[begin].astype(np.int64), cpus[queued].astype(np.int64)
        utc_ns = lives.ts[start] + offset_ns
        run, wait, onward = lives.ts[end] - lives.ts[begin], lives.ts[begin] - lives.ts[queued], end > begin
        entry = self._entry(found.device[keep] << 32 | found.owner[keep])
        place = self._places((entry << _CPU_BITS | cpu_queued + 1) << _CPU_BITS | cpu + 1)
        for measure, values, rows in (
            (Measure.RUN, run, whole & onward),
            (Measure.WAIT, wait, whole & onward & waited),
            (Measure.LAST_WAIT, wait, whole & ~onward & waited),
        ):
            self._count(utc_ns[rows], place[rows], direction[rows], measure, values[rows])

        # A packet between two containers is one packet of each.
        side = np.flatnonzero(np.append(True, (life[1:] != life[:-1]) | (direction[1:] != direction[:-1])))
        total, most = _summed(run, cpu, side)
        own = found.owner[keep][side]
        place = self._places((self._entry(own << 32 | own) << _CPU_BITS) << _CPU_BITS)
        utc_ns, direction, whole = utc_ns[side], direction[side], whole[side]
        for measure, values, rows in (
            (Measure.WORK, total, whole),
            (Measure.SERIAL, most, whole),
            (Measure.PARTIAL, total, ~whole),
        ):
            self._count(utc_ns[rows], place[rows], direction[rows], measure, values[rows])

    def _count(self, utc_ns: Ints, place: Ints, direction: Bytes, measure: Measure, values: Ints) -> None:
        self._windows.add(utc_ns, place, direction, np.full(len(utc_ns), measure, np.uint8), values)

    def _new_place(self, key: int) -> int:
        device = key >> 2 * _CPU_BITS
        cpu_queued, cpu = ((key >> shift & (1 << _CPU_BITS) - 1) - 1 for shift in (_CPU_BITS, 0))
        if len(self.places) >= MOST_PLACES and (cpu_queued, cpu) != (_NO_CPU, _NO_CPU):
            return self._places.of(device << 2 * _CPU_BITS)
        self.places.append(StagePlace(device, self._own[device], cpu_queued, cpu))
        return len(self.places) - 1


def _summed(run: Ints, cpu: Ints, side: Ints) -> tuple[Ints, Ints]:
    """Return, for the stretches that begin at `side`, the sum of `run`, and the largest sum of one CPU."""
    total = np.add.reduceat(run, side)
    mixed = np.minimum.reduceat(cpu, side) != np.maximum.reduceat(cpu, side)
    most = total.copy()
    if mixed.any():
        of_side = np.repeat(np.arange(len(side)), np.diff(side, append=len(run)))
        rows = np.flatnonzero(mixed[of_side])
        order = rows[np.lexsort((cpu[rows], of_side[rows]))]
        ordered, ordered_cpu = of_side[order], cpu[order]
        first = np.append(True, (ordered[1:] != ordered[:-1]) | (ordered_cpu[1:] != ordered_cpu[:-1]))
        of_cpu = np.add.reduceat(run[order], np.flatnonzero(first))
        of_cpu_side = ordered[first]
        begins = np.flatnonzero(np.append(True, of_cpu_side[1:] != of_cpu_side[:-1]))
        most[of_cpu_side[begins]] = np.maximum.reduceat(of_cpu, begins)
    return total, most
