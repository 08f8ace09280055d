"""Computes delays from records. Synchronous, without I/O, clock or tasks: the same records give the same results.

    feed(item) ──► slice ──► record by record: join it to a life ──► lives that ended ──► delays ──► rows, windows
                                  │  ▲                                   │  ▲
                          can it follow? (identity)           where are its delays? (hops)

The engine processes the stream in slices. A life that has not ended when its slice ends stays open, with everything
already decided about its records. The boundaries of slices and batches therefore change only when a row is returned.
The loop over records is compiled (`correlator.lives`). It asks what a move and a path mean once for each that occurs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from contracts.arrays import Ints
from contracts.cpus import StagePlace
from contracts.ledger import Ledger
from contracts.ordering import stable_order
from contracts.protocols import TCP
from contracts.records import Batch, Flag
from contracts.results import Results, Rows, Totals
from contracts.scheduling import TaskReading
from contracts.schema import NOT_TOLD, Crossings, Delays, Direction, Grades
from contracts.timerange import check_from, check_times
from contracts.topology import Device, Sharer, Topology
from contracts.windowtable import WindowTable
from correlator.content import ports, sequence
from correlator.gaps import NO_GAPS, Gaps, few, of_markers
from correlator.hops import Crossed
from correlator.identity import Resolver
from correlator.lives import Lives
from correlator.neighbours import Asked
from correlator.numbers import LOST
from correlator.readers import Readers
from correlator.records import NEVER, LifeTimes, Records
from correlator.stages import StageCounts
from correlator.state import EngineState, with_numbers
from correlator.windows import CODE, CODE_SHIFT, Windows

_NOTHING: Final = Batch.empty()
_NOT_CROSSED: Final = Crossed(0, 0, Direction.UNKNOWN, 0, 0, 0, 0, 0)
_FEW: Final = 64
"""Number of records below which a slice's cost is mostly its fixed cost."""
_SPARSE: Final = 256
"""Number of consecutive slices of few records after which slices end after `_GATHERED` records instead of `slice_ns`.
Otherwise a stream with a second (or an hour) between records would have a slice for each record, and a file of a
kilobyte can have a million of them."""
_GATHERED: Final = 4096
"""Records in a slice of a sparse stream."""


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
    waiting: bool = False
    """Whether to return rows and windows of the segment `WAITING`, by the readings given to `Engine.follow`."""


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
        self._gaps = NO_GAPS
        self._asked = Asked()
        self._gaps_to_tell: list[Gaps] = []
        self._entries: dict[tuple[int, int], int] = {}
        self._given: dict[tuple[int, int], int] = {}
        """Number that the loop uses of each (device, inner device of the container whose packets cross it)."""
        self._entry_of = np.zeros(0, np.int32)
        """Index into `devices` by that number."""
        self._devices: list[Device] = []
        self._own: list[int] = []
        """For each of `_devices`, the index of the container's own device."""
        self._lives = Lives(
            self._resolver,
            self._number_given,
            timeout_ns=config.timeout_ns,
            link_ns=config.link_ns,
            offset_ns=utc_offset_ns,
            rows=config.rows or config.waiting,
            crossings=config.crossings,
            stages=config.stages,
        )
        self._stages = StageCounts(self._entry, self._own)
        self._readers = Readers(utc_offset_ns) if config.waiting else None
        self._owners: set[int] = set()
        self._lost = 0
        self._began_ns: int | None = None
        self.open_peak = 0
        """Largest number of records of open lives that were carried."""
        if state is not None:
            self._resolver.restore(state.resolver)
            self._lives.restore(state.open, state.waiting)
            self._gaps = np.array(state.gaps, np.int64).reshape(-1, 2)
            self._asked = state.asked.since(-NEVER)
            self._latest, self._began_ns = state.latest_ns, state.began_ns

    def __getstate__(self) -> dict[str, Any]:
        self._collect_windows(None)
        return self.__dict__.copy()

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

    @property
    def waiting(self) -> bool:
        """Whether the engine needs readings of the tasks that read packets."""
        return self._readers is not None

    def follow(self, reading: TaskReading) -> None:
        """Note what became of the tasks that read packets, before the items whose records came before the reading."""
        if self._readers is not None:
            self._readers.add(reading)

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
        opened, waiting = self._lives.open(), self._lives.waiting()
        resolver, new = self._resolver.state(upto_ns, np.concatenate([opened.number, waiting.number]))
        return EngineState(
            resolver,
            with_numbers(opened, new),
            with_numbers(waiting, new),
            [(start, end) for start, end in self._still_parting(upto_ns).tolist()],
            self._asked.since(self._nothing_before(upto_ns)),
            self._latest,
            self._began_ns,
        )

    @property
    def held(self) -> tuple[int, int]:
        """Histogram cells of open windows, and number of devices: both grow with the stream; callers limit them."""
        return self._windows.cells + self._lives.numbers.cells + self._stages.cells, len(self._resolver.devices)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices to which the rows' `device` refers by index; only appended to."""
        return tuple(self._devices)

    def close_windows(self) -> WindowTable:
        """Return all open windows at a cut; the other engine returns the delays of the same windows after the cut."""
        return self._closed(None)

    def close_stages(self) -> tuple[WindowTable, tuple[StagePlace, ...]]:
        """Return all open counts of stages at a cut, and the places that they refer to."""
        return self._stages.close(None), tuple(self._stages.places)

    def finish(self) -> Results:
        """Return the remaining results at the end of the stream. Buffers with a single record stay in flight."""
        return self._slice(self._latest, last=True)

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
            head, batch = (batch, _NOTHING) if inside == len(batch) else (batch[:inside], batch[inside:])
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
        numbers = self._lives.numbers
        if not self._waiting_records and not numbers.open_records and not numbers.loose_records:
            return []
        return [self._slice(max(upto_ns, self._latest))]

    # One slice ----------------------------------------------------------------------------------------

    def _slice(self, upto_ns: int, *, last: bool = False) -> Results:
        batches, self._waiting, self._waiting_records = self._waiting, [], 0
        for batch in batches:
            self._note(batch)
        lives, config = self._lives, self._config
        lives.add(batches, self._gaps, self._asked)
        lives.end(upto_ns, config.open_records, config.open_records // 4, last=last)
        self.open_peak = max(self.open_peak, lives.numbers.open_records)
        self._number_entries()
        delays, crossings = lives.rows(self._entry_of), Crossings.empty()
        if self._readers is not None:
            delays = self._with_waits(delays, self._readers)
        if config.crossings or config.stages:
            times = lives.times()
            if config.crossings:
                crossings = self._crossings(times)
            if config.stages:
                self._stages.add(times, lives.answers.stages, self._offset_ns)
        self._gaps = self._still_parting(upto_ns)
        self._asked.forget(self._nothing_before(upto_ns))
        told = np.concatenate([NO_GAPS, *self._gaps_to_tell]) + self._offset_ns
        self._gaps_to_tell = []
        settled_utc_ns = None if last else self._settled(upto_ns) + self._offset_ns
        windows, stages = self._closed(settled_utc_ns), self._stages.close(settled_utc_ns)
        if self._readers is not None and settled_utc_ns is not None:
            self._readers.forget(settled_utc_ns)
        places = tuple(self._stages.places) if len(stages) else ()
        gaps = tuple(zip(*told.T.tolist(), strict=True))
        return Results(
            Rows(delays, windows, self.devices, crossings, gaps, stages, places),
            self.so_far(upto_ns),
        )

    def _note(self, batch: Batch) -> None:
        """Note what is lost, where the stream begins, and which neighbours are asked for."""
        markers = batch.hook == LOST
        records = batch
        if markers.any():
            self._lost += batch[markers].lost
            gaps = of_markers(batch[markers])
            self._gaps_to_tell.append(gaps)
            self._gaps = few(np.concatenate([self._gaps, gaps]))
            records = batch[~markers]
        if self._began_ns is None and len(records):
            # Packets under way when the capture began look like packets after a gap.
            self._began_ns = int(records.ts_ns[0])
            self._gaps = np.concatenate([[(-NEVER, self._began_ns)], self._gaps])
        self._asked.note(records)

    def _with_waits(self, delays: Delays, readers: Readers) -> Delays:
        """Count the waiting of readers in windows, and return the rows with it, or none if rows are not wanted."""
        waits = readers.waits(delays, np.array([device.netns for device in self._devices], np.int64))
        counted = waits[np.flatnonzero(~waits.waited)]
        self._windows.add(counted.utc_ns, counted.device, counted.direction, counted.segment, counted.delay_ns)
        return Delays.concatenate([delays, waits]) if self._config.rows else Delays.empty()

    def _number_given(self, number: int, owner: int) -> int:
        """Return the loop's number of a device and the inner device of the container whose packets cross it."""
        return self._given.setdefault((number, owner), len(self._given))

    def _number_entries(self) -> None:
        """Add to `devices` what the slice needs, in an order that does not depend on the order of its packets."""
        known = len(self._entry_of)
        if known < len(self._given):
            new = list(self._given)[known:]
            for key in sorted(new):
                self._entry(*key)
            entries = np.array([self._entries[key] for key in new], np.int32)
            self._entry_of = np.append(self._entry_of, entries)

    def _collect_windows(self, before_utc_ns: int | None) -> None:
        """Take the windows that end at or before a time (None: all) from the loop."""
        windows, cells = self._lives.windows(before_utc_ns)
        for table in (windows, cells):
            device, rest = np.divmod(table[CODE], 1 << CODE_SHIFT)
            table[CODE] = (self._entry_of[device].astype(np.int64) << CODE_SHIFT) + rest
        self._windows.add_tables(windows, cells)

    def _closed(self, before_utc_ns: int | None) -> WindowTable:
        self._collect_windows(before_utc_ns)
        return self._windows.close(before_utc_ns)

    def so_far(self, upto_ns: int) -> Totals:
        """Return the totals of the run."""
        numbers = self._lives.numbers
        grades = Grades(
            ambiguous=numbers.several_devices + numbers.several_packets,
            buffer=numbers.buffer,
            content=numbers.content,
            exact=numbers.exact,
            waited=numbers.waited,
            told_apart=numbers.told_apart,
        )
        return Totals(
            upto_ns + self._offset_ns,
            self._ledger(),
            grades.packets,
            grades=grades,
            settled_utc_ns=self._settled(upto_ns) + self._offset_ns,
            present=self._present,
            several_devices=numbers.several_devices,
            on_host_network=self._sharers,
        )

    def _settled(self, upto_ns: int) -> int:
        """Return the time before which the results of all lives that began have been returned."""
        return min(upto_ns, self._lives.numbers.oldest_open_ns, self._lives.numbers.oldest_loose_ns)

    def _still_parting(self, upto_ns: int) -> Gaps:
        """Return the gaps that can still lie between two records of one packet."""
        return self._gaps[self._gaps[:, 1] > self._nothing_before(upto_ns)]

    def _nothing_before(self, upto_ns: int) -> int:
        """Return the time before which gaps and requests no longer matter to any packet."""
        return min(self._settled(upto_ns), upto_ns - self._config.timeout_ns)

    def _ledger(self) -> Ledger:
        numbers = self._lives.numbers
        return Ledger(
            records=numbers.records,
            matched=numbers.matched,
            unmatched=numbers.unmatched,
            ambiguous=numbers.ambiguous,
            expired=numbers.expired,
            dropped=numbers.dropped,
            in_flight=numbers.left + numbers.open_records + numbers.loose_records,
            lost=self._lost,
        )

    def _crossings(self, lives: LifeTimes) -> Crossings:
        """Return the crossings of lives that were seen over a whole path, in the order of their times."""
        of_shape = [shape.crossed for shape in self._lives.answers.measured]
        has = np.array([crossed is not None for crossed in of_shape], np.bool_)
        life = np.flatnonzero(has[lives.shape])
        if not len(life):
            return Crossings.empty()
        table = np.array([crossed or _NOT_CROSSED for crossed in of_shape], np.int64)[lives.shape[life]]
        owner, direction = table[:, 1], table[:, 2]
        records = table[:, [0, 3, 4, 5, 6, 7]] + lives.start[life][:, None]
        by_time = stable_order(lives.ts[records[:, 1]])
        life, owner, direction, records = life[by_time], owner[by_time], direction[by_time], records[by_time]
        inner, outer, inner_stamp, outer_stamp, outer_edge = lives.ts[records[:, 1:]].T + self._offset_ns
        proto, src, dst, seq = _told(lives.records[records[:, 0]])
        return Crossings(
            packet=lives.packet[life],
            device=np.array([self._entry(number, number) for number in owner.tolist()], np.int32),
            direction=direction.astype(np.uint8),
            inner_utc_ns=inner,
            outer_utc_ns=outer,
            inner_stamp_utc_ns=inner_stamp,
            outer_stamp_utc_ns=outer_stamp,
            outer_edge_utc_ns=outer_edge,
            l3_len=lives.length[life],
            grade=lives.grade[life],
            l4_proto=proto.astype(np.int16),
            l4_src=src.astype(np.int32),
            l4_dst=dst.astype(np.int32),
            l4_seq=seq,
        )

    def _entry(self, number: int, owner: int) -> int:
        """Return the index into `devices` of a device and the inner device of the container whose packet crosses it."""
        key = number, owner
        if key not in self._entries:
            self._entries[key] = self._new_entry(number, owner)
        return self._entries[key]

    def _new_entry(self, number: int, owner: int) -> int:
        if owner not in self._owners:
            # The inner device and its peer determine the ranks of a path (`contracts.figures.ranks`). Adding both at
            # once makes ranks independent of which packets came first.
            self._owners.add(owner)
            for other in (owner, *self._resolver.beside(owner)):
                if other != number:
                    self._entry(other, owner)
        self._own.append(len(self._devices) if number == owner else self._entry(owner, owner))
        device, owning = self._resolver.devices[number], self._resolver.devices[owner]
        called = {name: getattr(owning, name) for name in ("container", "container_id", "pod_containers")}
        self._devices.append(replace(device, **called))
        return len(self._devices) - 1


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
