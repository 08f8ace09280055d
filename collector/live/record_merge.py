"""Merges rings of 64-byte records into batches in time order, moving whole records.

Waiting records are kept as views of the rings. The merge computes the order from the times alone, then copies whole
records into that order, a cache line each, and transposes their words: all first words, all second words, and so on. A
column of a batch is a view of one such row of words. Each batch has some thousand records, so that all steps after the
first read from the processor's cache.

The rules are those of `collector.merge`: when a record may be passed on, what happens to late records, and the order
(time, then CPU, then place in the ring, independent of the reading). A caller that pushes the records of a ring sorts
them by time, so that the merge only has to combine runs that are already sorted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.gaps import marker_columns
from collector.live.stretch import RingRecords, Stretch
from collector.watermark import Watermark
from contracts import abi
from contracts.errors import SourceError
from contracts.hooks import HOOKS, Hook
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Content, Flag
from contracts.topology import NO_DEVICE, Sighting

ROUND_RECORDS: Final = 1 << 14
"""Approximate number of records merged at once: 1 MiB in the rings. A quarter of this was a third slower, four times
this a tenth slower."""
_NEVER: Final = int(np.iinfo(np.int64).max)
_NO_REASON: Final = int(np.iinfo(DTYPES["drop_reason"]).max)
"""Value for a drop reason that the column cannot hold: a subsystem's own reason has the subsystem's number in the upper
half (SKB_DROP_REASON_SUBSYS_MASK, include/net/dropreason.h). The segments of a buffer never reach this value."""

_WHOLE: Final = np.dtype(f"V{abi.RECORD.itemsize}")

_HAS_DEVICE: Final = np.zeros(256, np.bool_)
_HAS_DEVICE[[info.hook for info in HOOKS if info.has_device]] = True
_IS_HOOK: Final = np.zeros(256, np.bool_)
_IS_HOOK[[Hook.LOST, *(info.hook for info in HOOKS)]] = True


class SeenPlaces:
    """Assigns codes of sightings to places (namespace, ifindex), in order of appearance.

    A lookup hashes into a direct-mapped table; a place that is not in its slot is searched in a sorted table. `name_of`
    returns the name of a device when it is first seen, or "". If records identify namespaces by cookie, `inode_of`
    returns the inode of each, or 0.
    """

    _BITS: Final = 16
    _MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
    """2**64 divided by the golden ratio."""

    def __init__(self, name_of: Callable[[int, int], str] = lambda _netns, _ifindex: "") -> None:
        self._name_of = name_of
        self.inode_of: Callable[[int], int] | None = None
        self._sightings = [NO_DEVICE]
        # An empty slot holds key 0 with code 0, which is the correct entry for key 0: no device.
        self._slot_keys = np.zeros(1 << self._BITS, np.uint64)
        self._slot_codes = np.zeros(1 << self._BITS, np.uint32)
        self._keys = np.zeros(1, np.uint64)
        self._codes = np.zeros(1, np.uint32)

    def __len__(self) -> int:
        return len(self._sightings)

    def snapshot(self) -> tuple[Sighting, ...]:
        """Return all sightings so far, indexed by code."""
        return tuple(self._sightings)

    def codes(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        """Return the codes (uint32) of places, each `netns | ifindex << 32`; 0 for 0. New places get new codes."""
        slots = self._slots(keys)
        found = self._slot_codes.take(slots)
        strange = np.flatnonzero(self._slot_keys.take(slots) != keys)
        if len(strange):
            found[strange] = self._search(keys[strange])
        return found

    def _slots(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        hashed = keys * self._MULTIPLIER
        hashed >>= np.uint64(64 - self._BITS)
        return hashed.view(np.int64)

    def _search(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        known = np.isin(keys, self._keys)
        if not known.all():
            fresh, first = np.unique(keys[~known], return_index=True)
            self._learn(fresh[np.argsort(first)])
        found: npt.NDArray[np.uint32] = self._codes[np.searchsorted(self._keys, keys)]
        return found

    def _learn(self, fresh: npt.NDArray[np.uint64]) -> None:
        """Add new keys, given in order of appearance."""
        codes = np.arange(len(self), len(self) + len(fresh), dtype=np.uint32)
        for key in fresh.tolist():
            netns, ifindex = key & 0xFFFFFFFF, key >> 32
            name = self._name_of(netns, ifindex)
            self._sightings.append(
                Sighting(name, netns, ifindex)
                if self.inode_of is None
                else Sighting(name, self.inode_of(netns), ifindex, netns_cookie=netns)
            )
        keys, all_codes = np.append(self._keys, fresh), np.append(self._codes, codes)
        order = np.argsort(keys)
        self._keys, self._codes = keys[order], all_codes[order]
        # If two places share a slot the newer one gets it: most packets are of new devices.
        slots = self._slots(fresh)
        self._slot_keys[slots], self._slot_codes[slots] = fresh, codes


class Marker(Stretch):
    """A stretch of one `LOST` record: `cpu` lost `lost` records after `ts_ns` and before `until_ns`."""

    __slots__ = ()

    def __init__(self, cpu: int, ts_ns: int, lost: int, until_ns: int) -> None:
        made = np.zeros(1, abi.COLUMNS)
        for name, value in marker_columns(cpu, ts_ns, lost, max(until_ns, ts_ns)).items():
            made[name] = value
        super().__init__(made, held=False)

    def move_to(self, ts_ns: int) -> None:
        """Move the marker to a later time: "lost after `ts_ns`" stays true once earlier records were passed on."""
        self.records["ts_ns"] = ts_ns
        self.records["skb_id"] = np.maximum(self.records["skb_id"], np.uint64(ts_ns))


class RingMerger(Watermark):
    """Merges stretches of several CPUs, of which it keeps views; raises `SourceError` for impossible records.

    `of` names the writer of the rings in such an error.
    """

    def __init__(
        self, hold_back_ns: int, places: SeenPlaces, round_records: int = ROUND_RECORDS, of: str = "the module"
    ) -> None:
        super().__init__(hold_back_ns)
        self._of = of
        self._places = places
        self._round_records = round_records
        self._waiting: dict[int, deque[Stretch]] = {}

    def __len__(self) -> int:
        return sum(len(stretch.records) for waiting in self._waiting.values() for stretch in waiting)

    def add_cpu(self, cpu: int, complete_ns: int) -> None:
        """Wait for this CPU from now on; it has no record before `complete_ns`."""
        super().add_cpu(cpu, complete_ns)
        self._waiting[cpu] = deque()
        # In order of CPU, which is the order of records of equal time.
        self._waiting = dict(sorted(self._waiting.items()))

    def push(self, cpu: int, stretch: Stretch) -> None:
        """Add a stretch of one CPU, which follows in its ring those pushed before."""
        ts = stretch.records["ts_ns"]
        if self.given_ns is not None and len(ts) and ts[0] < self.given_ns:
            if isinstance(stretch, Marker):
                stretch.move_to(self.given_ns)
            else:
                late = bisect_left(ts, self.given_ns)
                self.late += late
                stretch.given(late)
        if len(stretch.records):
            self._waiting[cpu].append(stretch)

    def take(self, until_ns: int) -> Iterator[Batch]:
        """Yield all records before `until_ns`, in order, in batches of about `ROUND_RECORDS` records at most.

        `until_ns` is at most the watermark, except at the end of the stream. The records of a batch are copies; its
        stretches count them as passed on.
        """
        while True:
            round_ns = self._round(until_ns)
            runs = self._runs(round_ns)
            if runs:
                yield self._merged(runs)
            self.given_ns = round_ns if self.given_ns is None else max(self.given_ns, round_ns)
            if round_ns >= until_ns:
                return

    def flush(self) -> Iterator[Batch]:
        """Yield all remaining records, at the end of the stream."""
        return self.take(_NEVER)

    def clear(self) -> None:
        """Forget all waiting records, so that no view of a ring remains."""
        self._waiting.clear()

    # --- one round --------------------------------------------------------------------------------

    def _round(self, until_ns: int) -> int:
        """Return the time up to which to merge next, so that no CPU exceeds its share of a round."""
        share = max(self._round_records // max(sum(map(bool, self._waiting.values())), 1), 1)
        for waiting in self._waiting.values():
            room = share
            for stretch in waiting:
                if len(stretch.records) >= room:
                    # Include all records of this time: records of equal time belong into one round.
                    until_ns = min(until_ns, int(stretch.records["ts_ns"][room - 1]) + 1)
                    break
                room -= len(stretch.records)
        return until_ns

    def _runs(self, until_ns: int) -> list[tuple[int, list[RingRecords]]]:
        """Return (cpu, records before `until_ns`) by CPU; the records of each CPU are in order of time."""
        runs = []
        for cpu, waiting in self._waiting.items():
            run: list[RingRecords] = []
            while waiting:
                stretch = waiting[0]
                ts = stretch.records["ts_ns"]
                count = len(ts) if ts[-1] < until_ns else bisect_left(ts, until_ns)
                if count:
                    run.append(stretch.records[:count])
                    stretch.given(count)
                if len(stretch.records):
                    break
                waiting.popleft()
            if run:
                runs.append((cpu, run))
        return runs

    def _merged(self, runs: list[tuple[int, list[RingRecords]]]) -> Batch:
        lengths = [sum(map(len, run)) for _, run in runs]
        pieces = [piece for _, run in runs for piece in run]
        ts = np.concatenate([piece["ts_ns"] for piece in pieces])
        words = np.concatenate([piece.view(abi.WORDS) for piece in pieces])
        order = self._order(ts, [cpu for cpu, _ in runs], lengths)
        if order is not None:
            # As opaque 64-byte items, which numpy copies in one piece.
            words = words.view(_WHOLE).reshape(-1).take(order).view(abi.WORDS)
        columns = abi.columns(np.ascontiguousarray(words.T))
        hook, flags, place = columns["hook"], columns["flags"], columns["place"]
        if not _IS_HOOK.take(hook).all():
            raise SourceError(
                f"the rings of {self._of}: a record of hook {hook[~_IS_HOOK[hook]][0]}, which does not exist: a"
                f" defect of {self._of}, please report"
            )
        # A record without a device can still name the namespace of a socket: clear it.
        place *= _HAS_DEVICE.take(hook) | ((flags & Flag.RECALLED) != 0)
        return Batch(
            ts_ns=columns["ts_ns"],
            skb_id=columns["skb_id"],
            dev=self._places.codes(place),
            l3_len=columns["l3_len"],
            cpu=columns["cpu"],
            drop_reason=_reasons(columns["drop_reason"]),
            gso_segs=columns["gso_segs"],
            hook=hook,
            content=Content(*(columns[name] for name in CONTENT_DTYPES)),
        )

    def _order(self, ts: npt.NDArray[np.int64], cpus: list[int], lengths: list[int]) -> npt.NDArray[np.int64] | None:
        """Return indices that bring concatenated runs into order of time, or None if they already are in order."""
        back = ts[1:] < ts[:-1]
        steps = int(np.count_nonzero(back))
        starts = [0, *np.cumsum(lengths).tolist()]
        between = sum(bool(back[start - 1]) for start in starts[1:-1])
        if steps > between or (self.given_ns is not None and min(ts[s] for s in starts[:-1]) < self.given_ns):
            raise SourceError(
                f"the rings of {self._of}: time goes back in a ring of CPUs {', '.join(map(str, cpus))}: a defect of"
                f" {self._of}, please report"
            )
        # numpy's stable sort (timsort) detects the sorted runs and only merges them.
        return np.argsort(ts, kind="stable") if between else None


def _reasons(told: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Return drop reasons in the column's dtype. Mostly all are 0, and checking is cheaper than converting."""
    if not np.count_nonzero(told):
        return np.zeros(len(told), DTYPES["drop_reason"])
    return np.minimum(told, _NO_REASON).astype(DTYPES["drop_reason"])
