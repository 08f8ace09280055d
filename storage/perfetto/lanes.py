"""Lanes: which of several tracks of a device each hop is drawn on, so that no two on one lane overlap.

Slices on one Perfetto track must nest, but packets overtake one another: two CPUs send through one bridge at once, and
a thousand packets may wait in one queue. Each hop gets the first lane of its device that is free when it begins. Mostly
that is lane 0, which whole arrays find out; only where hops do overlap they are looked at one by one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from contracts.arrays import Ints

_TIME_BITS: Final = 46
"""Of a time since the first of a call: 2**46 ns is 19 hours."""


class Lanes:
    """Which lanes are taken until when; by group (a small number)."""

    def __init__(self) -> None:
        self._until: dict[int, list[int]] = {}
        """By group: of each lane, the time at which its last slice ends."""

    def place(self, group: Ints, begin: Ints, end: Ints) -> Ints:
        """The lane, from 0, of each slice. Slices of one group and time are placed in the order in which they come.

        Slices that come in later calls may begin earlier; times within a call are less than 19 hours apart.
        """
        lane = np.zeros(len(group), np.int64)
        if not len(group):
            return lane
        earliest = int(begin.min())
        order = np.argsort(group << _TIME_BITS | (begin - earliest), kind="stable")
        groups, begins, ends = group[order], begin[order], end[order]
        base = groups << _TIME_BITS
        latest = np.maximum.accumulate(base + (ends - earliest))
        # A cluster begins where all slices before it (of its group) have ended.
        alone = np.ones(len(order) + 1, np.bool_)
        alone[1:-1] = base[1:] + (begins[1:] - earliest) >= latest[:-1]
        busy = np.zeros(len(order), np.bool_)
        for number in np.unique(groups).tolist():
            first, last = np.searchsorted(groups, [number, number + 1])
            taken = max(self._until.get(number, ()), default=earliest)
            blocked = first + int(np.searchsorted(begins[first:last], taken))
            if blocked > first:
                # Something of an earlier call reaches into these: one cluster, looked at.
                alone[first + 1 : blocked] = False
                busy[first] = True
        starts = np.flatnonzero(alone)
        size = np.diff(starts)
        starts = starts[:-1]
        for which in np.flatnonzero((size > 1) | busy[starts]).tolist():
            start, stop = int(starts[which]), int(starts[which] + size[which])
            lane[order[start:stop]] = self._one_by_one(
                int(groups[start]), begins[start:stop].tolist(), ends[start:stop].tolist()
            )
        self._take(groups, lane[order], ends)
        return lane

    def _one_by_one(self, group: int, begins: list[int], ends: list[int]) -> list[int]:
        until = list(self._until.get(group, ()))
        chosen = []
        for begin, end in zip(begins, ends, strict=True):
            lane = next((n for n, taken in enumerate(until) if taken <= begin), len(until))
            if lane == len(until):
                until.append(end)
            else:
                until[lane] = end
            chosen.append(lane)
        return chosen

    def _take(self, groups: Ints, lanes: Ints, ends: Ints) -> None:
        codes, member = np.unique(groups << 32 | lanes, return_inverse=True)
        last = np.full(len(codes), np.iinfo(np.int64).min)
        np.maximum.at(last, member, ends)
        for code, end in zip(codes.tolist(), last.tolist(), strict=True):
            until = self._until.setdefault(code >> 32, [])
            lane = code & 0xFFFFFFFF
            until += [np.iinfo(np.int64).min] * (lane + 1 - len(until))
            until[lane] = max(until[lane], end)
