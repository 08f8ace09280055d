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
from typing import Final, NamedTuple

import numpy as np

from contracts.arrays import Bytes, Ints
from contracts.cpus import MOST_PLACES, STAGES_WIDTH_S, Measure, StagePlace
from contracts.schema import Segment
from contracts.topology import Role
from contracts.windowtable import WindowTable
from correlator.hops import WHOLE_PATH, Measured, Path
from correlator.identity import ROLES, Resolver
from correlator.numbers import IP_RCV, RECEIVE_SKB, RX
from correlator.records import LifeTimes, laid_out
from correlator.windows import Windows

_REMOTE: Final = ROLES.index(Role.REMOTE)
_CPU_BITS: Final = 17
"""Bits of a place's key for each CPU, which records hold in 16 bits, and for no CPU."""
_NO_CPU: Final = -1
_LOW: Final = (1 << 32) - 1


class Stage(NamedTuple):
    """A stage of a life. `queued`, `begin` and `end` are indices of its records."""

    device: int
    """Device number."""
    owner: int
    """Number of the inner device of the container that the stage counts for."""
    direction: int
    queued: int
    """The record whose CPU passed the packet to the device; `begin` if there is none."""
    waited: bool
    """Whether `queued` is the device's `netif_rx`, so that the wait is known."""
    begin: int
    end: int
    """The packet's first record at the next device; `begin` if there is none."""
    whole: bool
    """Whether the packet was seen over its whole path."""


def stages(path: Path, told: Measured, resolver: Resolver) -> list[Stage]:
    """Return the stages of a life in order; `told` is its measurement."""
    hops = [row for row in told.rows if row.segment in (Segment.DEVICE, Segment.OUTSIDE)]
    whole = len({hop.direction for hop in hops}) > 1 or any(row.position == WHOLE_PATH for row in told.rows)
    found = []
    for hop in hops:
        if resolver.role[hop.device] == _REMOTE:
            continue
        onward = path.crosses[hop.end] and hop.end > hop.begin
        upto = hop.end if onward else hop.end + 1
        received = (i for i in range(hop.begin, upto) if path.hooks[i] in (RECEIVE_SKB, IP_RCV))
        begin = next(received, hop.begin)
        first = next(i for i in range(begin, -1, -1) if path.crosses[i])
        rx = next((i for i in range(begin, first - 1, -1) if path.hooks[i] == RX), None)
        waited = rx is not None and path.hooks[begin] in (RECEIVE_SKB, IP_RCV)
        queued = rx if rx is not None and waited else first - 1 if first else begin
        end = hop.end if onward else begin
        found.append(Stage(hop.device, hop.owner, hop.direction, queued, waited, begin, end, whole))
    return found


class StageCounts:
    """Counts stages and packets of one stream in intervals of UTC, by device, direction and CPUs.

    Rows of equal time and place add up: a cut of the stream gives two rows in place of one.
    """

    def __init__(self, entry: Callable[[int, int], int], own: Sequence[int]) -> None:
        """`entry` returns the index into `Rows.devices` of a device and the inner device that it serves.

        `own` has for each of these devices the index of the container's own device; it grows with the devices.
        """
        self._entry, self._own = entry, own
        self._places: dict[int, int] = {}
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

    def add(self, lives: LifeTimes, of_shape: Sequence[Sequence[Stage]], offset_ns: int) -> None:
        """Count the stages of lives that did not wait for an address.

        `of_shape`: the stages of a life of each shape. `offset_ns`: offset of UTC.
        """
        chosen = np.flatnonzero(~lives.waited)
        count = np.array([len(each) for each in of_shape], np.int64)
        rows = count[lives.shape[chosen]]
        cpus = lives.records.cpu
        if not rows.sum() or cpus is None:
            return
        table = np.array([stage for each in of_shape for stage in each], np.int64)
        row = laid_out((np.cumsum(count) - count)[lives.shape[chosen]], rows)
        life = np.repeat(chosen, rows)
        device, owner, direction, queued, waited, begin, end, whole = table[row].T
        direction, waited, whole = direction.astype(np.uint8), waited != 0, whole != 0
        start = lives.start[life]
        begin, end, queued = start + begin, start + end, start + queued
        cpu, cpu_queued = cpus[begin].astype(np.int64), cpus[queued].astype(np.int64)
        utc_ns = lives.ts[start] + offset_ns
        run, wait, onward = lives.ts[end] - lives.ts[begin], lives.ts[begin] - lives.ts[queued], end > begin
        entry = _each(lambda key: self._entry(key >> 32, key & _LOW), device << 32 | owner)
        place = _each(self._place, (entry << _CPU_BITS | cpu_queued + 1) << _CPU_BITS | cpu + 1)
        for measure, values, rows in (
            (Measure.RUN, run, whole & onward),
            (Measure.WAIT, wait, whole & onward & waited),
            (Measure.LAST_WAIT, wait, whole & ~onward & waited),
        ):
            self._count(utc_ns[rows], place[rows], direction[rows], measure, values[rows])

        # A packet between two containers is one packet of each.
        side = np.flatnonzero(np.append(True, (life[1:] != life[:-1]) | (direction[1:] != direction[:-1])))
        total, most = _summed(run, cpu, side)
        own = _each(lambda number: self._entry(number, number), owner[side])
        place = _each(self._place, (own << _CPU_BITS) << _CPU_BITS)
        utc_ns, direction, whole = utc_ns[side], direction[side], whole[side]
        for measure, values, rows in (
            (Measure.WORK, total, whole),
            (Measure.SERIAL, most, whole),
            (Measure.PARTIAL, total, ~whole),
        ):
            self._count(utc_ns[rows], place[rows], direction[rows], measure, values[rows])

    def _count(self, utc_ns: Ints, place: Ints, direction: Bytes, measure: Measure, values: Ints) -> None:
        self._windows.add(utc_ns, place, direction, np.full(len(utc_ns), measure, np.uint8), values)

    def _place(self, key: int) -> int:
        """Return the index into `places` of a device's entry, and of CPUs, packed as in `add`."""
        if key not in self._places:
            self._places[key] = self._new_place(key)
        return self._places[key]

    def _new_place(self, key: int) -> int:
        device = key >> 2 * _CPU_BITS
        cpu_queued, cpu = ((key >> shift & (1 << _CPU_BITS) - 1) - 1 for shift in (_CPU_BITS, 0))
        if len(self.places) >= MOST_PLACES and (cpu_queued, cpu) != (_NO_CPU, _NO_CPU):
            return self._place(device << 2 * _CPU_BITS)
        self.places.append(StagePlace(device, self._own[device], cpu_queued, cpu))
        return len(self.places) - 1


def _each(answer: Callable[[int], int], keys: Ints) -> Ints:
    """Return the answer for each key, asked once for each that occurs."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    return np.array([answer(key) for key in distinct.tolist()], np.int64)[inverse]


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
