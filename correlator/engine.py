"""Computes delays from records. Synchronous, without I/O, clock or tasks: the same records give the same results.

    feed(item) ──► slice ──► group by buffer ──► join moves into lives ──► lives that ended ──► hops ──► delays
                     ▲                                                │
                     └──────────── lives still open, carried over ────┘

The engine processes the stream in slices. A life that has not ended when its slice ends is carried into the next slice,
with everything already decided about its records. The boundaries of slices and batches therefore change only when a row
is returned. All steps work on whole arrays: a slice costs a few sorts and gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from contracts.arrays import Ints, Mask
from contracts.cpus import StagePlace
from contracts.ledger import Ledger
from contracts.ordering import stable_order
from contracts.protocols import TCP
from contracts.records import Batch, Flag
from contracts.results import Results, Rows, Totals
from contracts.schema import NOT_TOLD, Crossings, Delays, Grade, Grades, Outcome
from contracts.timerange import check_from, check_times
from contracts.topology import Device, Sharer, Topology
from contracts.windowtable import WindowTable
from correlator.content import ports, sequence
from correlator.hops import Crossed
from correlator.identity import Resolver
from correlator.links import Links
from correlator.lives import NEVER, NOTHING_OPEN, Lives, Records, join
from correlator.memo import Memo
from correlator.neighbours import Asked
from correlator.numbers import LOST
from correlator.shapes import measure_all, measure_stages
from correlator.stages import StageCounts
from correlator.state import EngineState, with_numbers
from correlator.windows import Windows

_GRADES: Final = tuple(grade.name.lower() for grade in Grade)
_DROPPED: Final = int(Outcome.DROPPED)
"""Plain number, for comparing with arrays (see `correlator.numbers`)."""
_FEW: Final = 64
"""Number of records below which a slice's cost is mostly its fixed cost."""
_SPARSE: Final = 256
"""Number of consecutive slices of few records after which slices end after `_GATHERED` records instead of `slice_ns`.
Otherwise a stream with a second (or an hour) between records would have a slice for each record, and a file of a
kilobyte can have a million of them."""
_GATHERED: Final = 4096
"""Records in a slice of a sparse stream."""
_GAPS: Final = 4096
"""Largest number of gaps remembered at a time. A ring reports one gap for each CPU and loss; beyond this number
adjacent gaps are merged."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's settings, on which its results depend."""

    timeout_ns: int = 500_000_000
    """Longest time between two records of a packet; a longer pause ends its life."""
    link_ns: int = 100_000_000
    """Longest time until a packet's first record in another buffer: reassembly waits for the last fragment, which is
    sent at once. Packets with the same content key within this time could be confused, and are not linked."""
    linger_ns: int = 100_000_000
    """How long records can still refer to a device that is gone: the change may be dated that much too early."""
    slice_ns: int = 100_000_000
    """Stretch of time that is processed at once; it affects when rows are returned, not their values."""
    whole_batches: bool = False
    """Whether a slice ends at the end of a batch: before a `Progress`, or before the next batch once the slice is long
    enough. Otherwise slices end at multiples of `slice_ns`, independent of batch boundaries, so that even the lives
    ended early (`open_records`) do not depend on the batches."""
    slice_records: int = 1 << 17
    """Largest number of records in a slice; bounds memory."""
    open_records: int = 1 << 22
    """Largest number of records of open lives; beyond it the oldest lives are ended early. A quarter as many are kept
    of lives that have ended and wait to be linked to others (`correlator.links`)."""
    rows: bool = True
    """Whether to return a row per packet and segment; windows are returned in any case."""
    crossings: bool = False
    """Whether to return `Rows.crossings`, for the correction of a tool's samples."""
    stages: bool = False
    """Whether to return `Rows.stages`: which CPU worked on packets."""


class Engine:
    """One stream's correlator. Feed it the stream's items in order, then `finish`."""

    _present: tuple[Device, ...] | None = None
    """Devices of the newest topology."""
    _sharers: tuple[Sharer, ...] = ()
    """Containers on the host's network, by the newest topology."""

    def __init__(
        self, utc_offset_ns: int, config: EngineConfig = EngineConfig(), state: EngineState | None = None
    ) -> None:
        """Make an engine. With `state` it continues where another engine stopped; its counts begin at zero."""
        self._config = config
        self._offset_ns = utc_offset_ns
        self._resolver = Resolver(config.linger_ns)
        self._windows = Windows()
        self._waiting: list[Batch] = []
        self._waiting_records = 0
        self._slice_end = -NEVER
        """Time before which all records of the current slice lie."""
        self._due_ns = -NEVER
        """Time at which the current slice is due: with records up to here it is processed."""
        self._sparse = 0
        """Number of consecutive slices of few records."""
        self._latest = -NEVER
        self._open = NOTHING_OPEN
        self._links = Links(self._resolver, config.link_ns, config.open_records // 4)
        self._gaps: list[tuple[int, int]] = []
        self._asked = Asked()
        self._gaps_to_tell: list[tuple[int, int]] = []
        self._entries = Memo(self._new_entry)
        self._devices: list[Device] = []
        self._own: list[int] = []
        """For each of `_devices`, the index of the container's own device."""
        self._stages = StageCounts(self._entries, self._own)
        self._owners: set[int] = set()
        self._grades = dict.fromkeys((*_GRADES, "waited", "told_apart"), 0)
        self._tally = dict.fromkeys(("records", "matched", "unmatched", "ambiguous", "expired", "dropped", "lost"), 0)
        self._left = 0
        """Single records without a partner that were still open when the stream ended."""
        self._began_ns: int | None = None
        self.open_peak = 0
        """Largest number of records of open lives that were carried."""
        if state is not None:
            self._resolver.restore(state.resolver)
            self._open, self._gaps = state.open, list(state.gaps)
            self._links.waiting, self._asked = state.waiting, state.asked.since(-NEVER)
            self._latest, self._began_ns = state.latest_ns, state.began_ns

    def feed(self, item: Topology | Batch) -> list[Results]:
        """Process the next item of the stream and return the results that it completes, in order.

        Raises `WireError` for impossible times.
        """
        return list(self.pieces(item))

    def pieces(self, item: Topology | Batch) -> Iterator[Results]:
        """Process the next item of the stream and yield the results that it completes, in order.

        The item is processed once the iterator is exhausted. Unlike `feed`, this bounds memory: a batch of a million
        records can complete a million results. Raises `WireError` for impossible times.
        """
        if isinstance(item, Topology):
            check_from(item.from_ns, self._offset_ns)
            if self._waiting:
                yield from self._advance(item.from_ns)
            self._resolver.update(item)
            self._present = item.devices
            self._sharers = item.on_host_network
        elif len(item):
            check_times(int(item.ts_ns[0]), int(item.ts_ns[-1]), self._offset_ns)
            yield from self._take(item)

    def advance(self, upto_ns: int, *, at_once: bool = False) -> list[Results]:
        """Return the results that are complete if no record before `upto_ns` will follow.

        `at_once` ends the current slice, for a caller that chooses the size of its own slices. With `whole_batches` the
        slice always ends, because no other item may follow for a while. Raises `WireError` for impossible times.
        """
        check_times(upto_ns, upto_ns, self._offset_ns)
        return self._advance(upto_ns) if at_once or self._config.whole_batches or upto_ns >= self._due_ns else []

    def stop_at(self, upto_ns: int) -> list[Results]:
        """Process all waiting records before a cut at `upto_ns`, from which another engine continues with `state`."""
        return self._advance(upto_ns)

    def state(self, upto_ns: int) -> EngineState:
        """Return the state at a cut. The caller must have fed all records before `upto_ns` and called `stop_at`."""
        assert not self._waiting_records, "stop_at() first"
        waiting = self._links.waiting
        resolver, new = self._resolver.state(upto_ns, np.concatenate([self._open.number, waiting.number]))
        return EngineState(
            resolver,
            with_numbers(self._open, new),
            with_numbers(waiting, new),
            self._still_parting(upto_ns),
            self._asked.since(self._nothing_before(upto_ns)),
            self._latest,
            self._began_ns,
        )

    @property
    def held(self) -> tuple[int, int]:
        """Histogram cells of open windows, and number of devices: both grow with the stream; callers limit them."""
        return self._windows.cells + self._stages.cells, len(self._resolver.devices)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices to which the rows' `device` refers by index; only appended to."""
        return tuple(self._devices)

    def close_windows(self) -> WindowTable:
        """Return all open windows at a cut; the other engine returns the delays of the same windows after the cut."""
        return self._windows.close(None)

    def close_stages(self) -> tuple[WindowTable, tuple[StagePlace, ...]]:
        """Return all open counts of stages at a cut, and the places that they refer to."""
        return self._stages.close(None), tuple(self._stages.places)

    def finish(self) -> Results:
        """Return the remaining results at the end of the stream. Buffers with a single record stay in flight."""
        batch = Batch.concatenate(self._waiting)
        self._waiting, self._waiting_records = [], 0
        return self._work(batch, self._latest, last=True)

    # Slicing ------------------------------------------------------------------------------------------

    def _take(self, batch: Batch) -> Iterator[Results]:
        size, whole = self._config.slice_ns, self._config.whole_batches
        if whole and self._waiting_records and self._latest >= self._due_ns:
            # Not when the batch arrived: mostly a `Progress` follows at once and ends the slice.
            yield self._slice(self._latest)
        while len(batch):
            if self._waiting_records == 0:
                first = int(batch.ts_ns[0])
                if first >= self._resolver.changes_at_ns:
                    self._resolver.forget(first)
                changes_ns = self._resolver.changes_at_ns
                self._due_ns = min(first + size if whole else first - first % size + size, changes_ns)
                self._slice_end = changes_ns if whole or self._sparse >= _SPARSE else self._due_ns
            most = self._config.slice_records if whole or self._sparse < _SPARSE else _GATHERED
            inside = (
                len(batch) if batch.ts_ns[-1] < self._slice_end else int(np.searchsorted(batch.ts_ns, self._slice_end))
            )
            inside = min(inside, most - self._waiting_records)
            assert inside or self._waiting_records, "a slice without records"
            head, batch = batch[:inside], batch[inside:]
            self._waiting.append(head)
            self._waiting_records += len(head)
            if len(head):
                self._latest = int(head.ts_ns[-1])
            if len(batch) or self._waiting_records == most:
                if not whole:
                    self._note_pace(most)
                upto_ns = min(int(batch.ts_ns[0]), self._slice_end) if len(batch) else self._latest
                yield self._slice(upto_ns)

    def _note_pace(self, most: int) -> None:
        """Count the slices of few records, independent of batch boundaries."""
        if self._sparse < _SPARSE:
            self._sparse = self._sparse + 1 if self._waiting_records < _FEW else 0
        elif self._waiting_records == most and self._latest - int(self._waiting[0].ts_ns[0]) < self._config.slice_ns:
            self._sparse = 0

    def _advance(self, upto_ns: int) -> list[Results]:
        if not self._waiting_records and not len(self._open) and not len(self._links):
            return []
        return [self._slice(max(upto_ns, self._latest))]

    def _slice(self, upto_ns: int) -> Results:
        batch = Batch.concatenate(self._waiting)
        self._waiting, self._waiting_records = [], 0
        return self._work(batch, upto_ns)

    # One slice ----------------------------------------------------------------------------------------

    def _work(self, batch: Batch, upto_ns: int, *, last: bool = False) -> Results:
        markers = batch.hook == LOST
        if markers.any():
            self._note_gaps(batch[markers])
            batch = batch[~markers]
        self._tally["records"] += len(batch)
        if self._began_ns is None and len(batch):
            # Packets under way when the capture began look like packets after a gap.
            self._began_ns = int(batch.ts_ns[0])
            self._gaps.insert(0, (-NEVER, self._began_ns))

        self._asked.note(batch)
        found: list[tuple[Delays, Crossings]] = []
        if len(batch) or len(self._open):
            new = Records.of(batch, flows=self._config.crossings, cpus=self._config.stages)
            lives = join(self._open, new, self._resolver, self._gaps, self._config.timeout_ns)
            self._grades["told_apart"] += lives.told_apart
            ended = self._finish(lives, upto_ns, last=last)
            found.append(self._measure(lives, ended & ~self._links.take(lives, ended)))
        nothing_before = None if last else min(self._oldest_open(upto_ns), upto_ns)
        if (linked := self._links.release(nothing_before, self._gaps)) is not None:
            found.append(self._measure(linked, np.ones(len(linked.starts), np.bool_)))
        delays = Delays.concatenate([rows for rows, _ in found])
        crossings = Crossings.concatenate([rows for _, rows in found])
        self._gaps = self._still_parting(upto_ns)
        self._asked.forget(self._nothing_before(upto_ns))
        told = tuple((start + self._offset_ns, end + self._offset_ns) for start, end in self._gaps_to_tell)
        self._gaps_to_tell = []
        settled_utc_ns = None if last else self._settled(upto_ns) + self._offset_ns
        windows, stages = self._windows.close(settled_utc_ns), self._stages.close(settled_utc_ns)
        places = tuple(self._stages.places) if len(stages) else ()
        rows = Rows(delays, windows, self.devices, crossings, told, stages, places)
        return Results(rows, self.so_far(upto_ns))

    def so_far(self, upto_ns: int) -> Totals:
        """Return the totals of the run."""
        grades = Grades(**self._grades | {"ambiguous": self._grades["ambiguous"] + self._links.ambiguous})
        return Totals(
            upto_ns + self._offset_ns,
            self._ledger(),
            grades.packets,
            grades=grades,
            settled_utc_ns=self._settled(upto_ns) + self._offset_ns,
            present=self._present,
            several_devices=self._grades["ambiguous"],
            on_host_network=self._sharers,
        )

    def _oldest_open(self, upto_ns: int) -> int:
        """Return the time of the oldest record of an open life, or `upto_ns` without one."""
        return int(self._open.records.ts.min()) if len(self._open) else upto_ns

    def _settled(self, upto_ns: int) -> int:
        """Return the time before which the results of all lives that began have been returned."""
        return min(self._oldest_open(upto_ns), upto_ns, self._links.oldest_ns)

    def _still_parting(self, upto_ns: int) -> list[tuple[int, int]]:
        """Return the gaps that can still lie between two records of one packet."""
        return [gap for gap in self._gaps if gap[1] > self._nothing_before(upto_ns)]

    def _nothing_before(self, upto_ns: int) -> int:
        """Return the time before which gaps and requests no longer matter to any packet."""
        return min(self._settled(upto_ns), upto_ns - self._config.timeout_ns)

    def _ledger(self) -> Ledger:
        tally = self._tally | {"matched": self._tally["matched"] + self._links.spare}
        return Ledger(**tally, in_flight=self._left + len(self._open) + len(self._links))

    def _note_gaps(self, markers: Batch) -> None:
        self._tally["lost"] += markers.lost
        gaps = list(zip(markers.ts_ns.tolist(), markers.skb_id.astype(np.int64).tolist(), strict=True))
        self._gaps_to_tell += gaps
        self._gaps = _few(self._gaps + gaps)

    def _finish(self, lives: Lives, upto_ns: int, *, last: bool) -> Mask:
        """Carry the open lives, count lives of a single record, and return a mask of other lives that have ended."""
        last_ns, single = lives.ts[lives.ends], lives.starts == lives.ends
        idle = ~lives.reused & (last_ns < upto_ns - self._config.timeout_ns)
        ended = lives.freed | lives.reused | idle | last
        evicted = self._overfull(lives, last_ns, ended)
        if last:
            self._open = NOTHING_OPEN
        else:
            self._open = lives.still_open(~(ended | evicted))
            self.open_peak = max(self.open_peak, len(self._open))

        # A single record has no partner: it is expired, unmatched or in flight, by whether a partner could still
        # follow.
        expired = single & ~lives.freed & (idle | lives.late | evicted)
        left = single & ~lives.freed & ~lives.reused & ~expired & last
        unmatched = single & (ended | evicted) & ~expired & ~left
        self._tally["expired"] += int(expired.sum())
        self._tally["unmatched"] += int(unmatched.sum())
        self._left += int(left.sum())
        measured: Mask = (ended | evicted) & ~single
        return measured

    def _overfull(self, lives: Lives, last_ns: Ints, ended: Mask) -> Mask:
        """Return a mask of lives to end early, longest idle first, so that at most `open_records` stay open."""
        chosen = np.zeros(len(ended), np.bool_)
        waiting = np.flatnonzero(~ended)
        size = lives.size[waiting]
        excess = int(size.sum()) - self._config.open_records
        if excess > 0:
            oldest = np.argsort(last_ns[waiting], kind="stable")
            enough = int(np.searchsorted(np.cumsum(size[oldest]), excess)) + 1
            chosen[waiting[oldest[:enough]]] = True
        return chosen

    def _measure(self, lives: Lives, ended: Mask) -> tuple[Delays, Crossings]:
        """Count the lives in `ended`, add their delays to windows, and return their rows."""
        if not ended.any():
            return Delays.empty(), Crossings.empty()
        waited = self._asked.waited(lives, ended)
        if self._config.stages:
            found, stages = measure_stages(lives, ended, self._resolver, crossings=self._config.crossings)
            self._stages.add(lives, stages, waited, self._offset_ns)
        else:
            found = measure_all(lives, ended, self._resolver, crossings=self._config.crossings)
        size = lives.size
        dropped, unclear = found.dropped & ended, found.unclear & ended
        self._tally["dropped"] += int(size[dropped].sum())
        self._tally["ambiguous"] += int(size[unclear].sum())
        self._tally["matched"] += int(size[ended & ~dropped & ~unclear].sum())
        self._grades["ambiguous"] += int(unclear.sum())
        self._grades["waited"] += int(waited[found.packets].sum())
        counts = np.bincount(lives.grade[found.packets], minlength=len(_GRADES)).tolist()
        for grade, count in zip(_GRADES, counts, strict=True):
            self._grades[grade] += count
        utc_ns = found.ts + self._offset_ns
        device = self._entries((found.device << 32) | found.owner).astype(np.int32)
        counted = ~waited[found.life] if waited.any() else slice(None)
        self._windows.add(
            utc_ns[counted],
            device[counted],
            found.direction[counted],
            found.segment[counted],
            found.delay[counted],
        )
        crossings = Crossings.empty()
        if self._config.crossings and found.crossed is not None:
            crossings = self._crossings(lives, found.crossed)
        if not self._config.rows:
            return Delays.empty(), crossings
        by_time = stable_order(utc_ns)
        life = found.life[by_time]
        delays = Delays(
            utc_ns=utc_ns[by_time],
            packet=lives.packet()[life],
            device=device[by_time],
            direction=found.direction[by_time],
            segment=found.segment[by_time],
            position=found.position[by_time],
            delay_ns=found.delay[by_time],
            l3_len=lives.length()[life],
            grade=lives.grade[life],
            outcome=found.outcome[life],
            drop_reason=np.where(found.outcome == _DROPPED, lives.drop_reason(), np.uint16(0))[life],
            waited=waited[life],
        )
        return delays, crossings

    def _crossings(self, lives: Lives, crossed: Crossed) -> Crossings:
        by_time = stable_order(crossed.inner)
        life = crossed.life[by_time]
        owner = crossed.owner[by_time]
        proto, src, dst, seq = _told(lives.records[lives.order[crossed.at[by_time]]])
        return Crossings(
            packet=lives.packet()[life],
            device=self._entries((owner << 32) | owner).astype(np.int32),
            direction=crossed.direction[by_time],
            inner_utc_ns=crossed.inner[by_time] + self._offset_ns,
            outer_utc_ns=crossed.outer[by_time] + self._offset_ns,
            inner_stamp_utc_ns=crossed.inner_stamp[by_time] + self._offset_ns,
            outer_stamp_utc_ns=crossed.outer_stamp[by_time] + self._offset_ns,
            outer_edge_utc_ns=crossed.outer_edge[by_time] + self._offset_ns,
            l3_len=lives.length()[life],
            grade=lives.grade[life],
            l4_proto=proto.astype(np.int16),
            l4_src=src.astype(np.int32),
            l4_dst=dst.astype(np.int32),
            l4_seq=seq,
        )

    def _new_entry(self, key: int) -> int:
        """Add (device, inner device of the container whose packets cross it) to `devices`; return the index."""
        number, owner = divmod(key, 1 << 32)
        if owner not in self._owners:
            # The inner device and its peer determine the ranks of a path (`contracts.figures.ranks`). Adding both at
            # once makes ranks independent of which packets came first.
            self._owners.add(owner)
            for other in (owner, *self._resolver.beside(owner)):
                if other != number:
                    self._entries.of((other << 32) | owner)
        self._own.append(len(self._devices) if number == owner else self._entries.of((owner << 32) | owner))
        device, owning = self._resolver.devices[number], self._resolver.devices[owner]
        called = {name: getattr(owning, name) for name in ("container", "container_id", "pod_containers")}
        self._devices.append(replace(device, **called))
        return len(self._devices) - 1


def _few(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the gaps in order, at most `_GAPS`; if there are more, adjacent gaps are merged."""
    gaps.sort()
    if len(gaps) <= _GAPS:
        return gaps
    starts, ends = np.array(gaps, np.int64).T
    first = np.arange(0, len(gaps), -(-len(gaps) // _GAPS))
    return list(zip(starts[first].tolist(), np.maximum.reduceat(ends, first).tolist(), strict=True))


def _told(records: Records) -> tuple[Ints, Ints, Ints, Ints]:
    """Return IP protocol, source, destination and TCP sequence number of records, int64; `NOT_TOLD` where unknown."""
    if records.flow is None or records.proto is None or records.trait is None:
        nothing = np.full(len(records), NOT_TOLD, np.int64)
        return nothing, nothing, nothing, nothing
    proto = records.proto.astype(np.int64)
    read = (records.trait & Flag.FLOW) != 0
    src, dst = (np.where(read, column, NOT_TOLD) for column in ports(records.flow))
    seq = np.where(read & (proto == TCP), sequence(records.flow), NOT_TOLD)
    return np.where(proto == 0, NOT_TOLD, proto), src, dst, seq
