"""Records -> delays. Pure and synchronous: no I/O, no clock, no tasks; the same records give the same answers.

    feed(item) ──► slice ──► group by buffer ──► join moves into lives ──► lives that ended ──► hops ──► delays
                     ▲                                                │
                     └──────────── lives still open, carried over ────┘

Records are worked on in slices of the stream. A life that has not ended when its slice does is carried, with
what was already decided about its records, into the next one; so where slices and batches are cut changes
nothing but when a row comes out. All steps are whole-array ones: a slice costs a few sorts and gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from contracts.ledger import Ledger
from contracts.ordering import stable_order
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
from correlator.lives import NEVER, NOTHING_OPEN, Ints, Lives, Mask, Records, join
from correlator.memo import Memo
from correlator.neighbours import Asked
from correlator.numbers import LOST
from correlator.shapes import measure_all
from correlator.state import EngineState, with_numbers
from correlator.windows import Windows

IPPROTO_TCP: Final = 6
"""IANA's number of TCP."""
_GRADES: Final = tuple(grade.name.lower() for grade in Grade)
_DROPPED: Final = int(Outcome.DROPPED)
"""For comparing (see `correlator.numbers`)."""
_FEW: Final = 64
"""Records of a slice whose fixed cost is most of what it costs."""
_SPARSE: Final = 256
"""After so many slices of few records in a row, slices end by `_GATHERED` records and no longer by `slice_ns`: a second
between two records (or an hour) would else make a slice of each, and a file of a kilobyte has a million of them."""
_GATHERED: Final = 4096
"""Records of a slice of a stream that is sparse."""
_GAPS: Final = 4096
"""Gaps that may part packets at one time. A ring tells one for each CPU and loss; beyond, neighbours count as one."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine's answers depend on."""

    timeout_ns: int = 500_000_000
    """A packet's next record comes within this, or its life is over."""
    link_ns: int = 100_000_000
    """A packet's first record in another buffer comes within this: reassembly waits for the last fragment, which is
    sent at once. Packets with one content key this near to one another could be confused, and are not linked."""
    linger_ns: int = 100_000_000
    """A device that is gone can still be meant by records this long after: news of it may be dated that much early."""
    slice_ns: int = 100_000_000
    """Stretch of time that is worked on at once; changes when rows come out, not what they are."""
    whole_batches: bool = False
    """Whether a slice ends where a batch does: before a `Progress`, or before the next batch if it is as long by then.
    Else it ends at multiples of `slice_ns`, wherever batches do: then what is ended early (`open_records`) is the same
    too."""
    slice_records: int = 1 << 17
    """A slice is cut here if it gets larger: memory."""
    open_records: int = 1 << 22
    """Records of open lives that are kept at most; beyond it the oldest lives are ended early. A quarter as many
    besides are kept of lives that have ended and wait to be linked to others (`correlator.links`)."""
    rows: bool = True
    """Whether to give out a row per packet and segment; windows come in any case."""
    crossings: bool = False
    """Whether to give out `Rows.crossings`, for the correction of a tool's samples."""


class Engine:
    """One stream's correlator. Feed it the stream's items in order, then `finish`."""

    _present: tuple[Device, ...] | None = None
    """Devices of the newest topology."""
    _sharers: tuple[Sharer, ...] = ()
    """Containers on the host's network, of the same."""

    def __init__(
        self, utc_offset_ns: int, config: EngineConfig = EngineConfig(), state: EngineState | None = None
    ) -> None:
        """With `state` it goes on where another one stopped; what it counts begins at zero."""
        self._config = config
        self._offset_ns = utc_offset_ns
        self._resolver = Resolver(config.linger_ns)
        self._windows = Windows()
        self._waiting: list[Batch] = []
        self._waiting_records = 0
        self._slice_end = -NEVER
        """No slice has records from then on."""
        self._due_ns = -NEVER
        """With records up to then it is worked on."""
        self._sparse = 0
        """Slices of few records in a row."""
        self._latest = -NEVER
        self._open = NOTHING_OPEN
        self._links = Links(self._resolver, config.link_ns, config.open_records // 4)
        self._gaps: list[tuple[int, int]] = []
        self._asked = Asked()
        self._gaps_to_tell: list[tuple[int, int]] = []
        self._entries = Memo(self._new_entry)
        self._devices: list[Device] = []
        self._owners: set[int] = set()
        self._grades = dict.fromkeys((*_GRADES, "waited", "told_apart"), 0)
        self._tally = dict.fromkeys(("records", "matched", "unmatched", "ambiguous", "expired", "dropped", "lost"), 0)
        self._left = 0
        """Single records that were still waiting when the stream ended."""
        self._began_ns: int | None = None
        self.open_peak = 0
        """The most records of open lives that were carried."""
        if state is not None:
            self._resolver.restore(state.resolver)
            self._open, self._gaps = state.open, list(state.gaps)
            self._links.waiting, self._asked = state.waiting, state.asked.since(-NEVER)
            self._latest, self._began_ns = state.latest_ns, state.began_ns

    def feed(self, item: Topology | Batch) -> list[Results]:
        """Take the next item of the stream. Returns what the item completes, in order. Raises as `pieces`."""
        return list(self.pieces(item))

    def pieces(self, item: Topology | Batch) -> Iterator[Results]:
        """As `feed`, but piece by piece: the item is taken when all of them were asked for.

        A batch of a million records can complete a million results. Raises `WireError` for times that no clock tells.
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
        """Told that no record before `upto_ns` will come any more: finish what that completes.

        `at_once` also in the middle of a slice, for a caller who has its own measure of how much to work on at a time;
        so it is with whole batches, where nothing else need come for a while. Raises as `pieces`.
        """
        check_times(upto_ns, upto_ns, self._offset_ns)
        return self._advance(upto_ns) if at_once or self._config.whole_batches or upto_ns >= self._due_ns else []

    def stop_at(self, upto_ns: int) -> list[Results]:
        """As `advance`, and work on all that waits: there is a cut, and another engine goes on with `state`."""
        return self._advance(upto_ns)

    def state(self, upto_ns: int) -> EngineState:
        """What it carries at a cut. The caller has fed all records before `upto_ns`, then called `stop_at(upto_ns)`."""
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
        """Histogram cells of open windows, and devices: what grows with what a stream tells, for who sets limits."""
        return self._windows.cells, len(self._resolver.devices)

    @property
    def devices(self) -> tuple[Device, ...]:
        """What the rows' `device` points to; only ever appended to."""
        return tuple(self._devices)

    def close_windows(self) -> WindowTable:
        """All windows that are still open, as they are at a cut: the rest of them is in the other engine's."""
        return self._windows.close(None)

    def finish(self) -> Results:
        """The stream has ended: all that is left. Buffers of which one record is known stay in flight."""
        batch = Batch.concatenate(self._waiting)
        self._waiting, self._waiting_records = [], 0
        return self._work(batch, self._latest, last=True)

    # Slicing ------------------------------------------------------------------------------------------

    def _take(self, batch: Batch) -> Iterator[Results]:
        size, whole = self._config.slice_ns, self._config.whole_batches
        if whole and self._waiting_records and self._latest >= self._due_ns:
            # Not when it came: most often a `Progress` comes right behind it, and ends the slice.
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
        """Count the slices of few records, by the records alone: wherever batches end, it is the same."""
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
            # What was under way when the capture began looks like what is left after a gap.
            self._began_ns = int(batch.ts_ns[0])
            self._gaps.insert(0, (-NEVER, self._began_ns))

        self._asked.note(batch)
        found: list[tuple[Delays, Crossings]] = []
        if len(batch) or len(self._open):
            new = Records.of(batch, flows=self._config.crossings)
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
        windows = self._windows.close(None if last else self._settled(upto_ns) + self._offset_ns)
        return Results(Rows(delays, windows, self.devices, crossings, told), self.so_far(upto_ns))

    def so_far(self, upto_ns: int) -> Totals:
        """The totals of the run."""
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
        """Time of the oldest record of a life that is open, or of the end of what was looked at."""
        return int(self._open.records.ts.min()) if len(self._open) else upto_ns

    def _settled(self, upto_ns: int) -> int:
        """All lives that begin before it have been given out."""
        return min(self._oldest_open(upto_ns), upto_ns, self._links.oldest_ns)

    def _still_parting(self, upto_ns: int) -> list[tuple[int, int]]:
        """Gaps that can still lie between two records of one packet."""
        return [gap for gap in self._gaps if gap[1] > self._nothing_before(upto_ns)]

    def _nothing_before(self, upto_ns: int) -> int:
        """What happened before it can no longer matter to any packet."""
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
        """Carry the lives that go on, count those of one record, and say which others have ended."""
        last_ns, single = lives.ts[lives.ends], lives.starts == lives.ends
        idle = ~lives.reused & (last_ns < upto_ns - self._config.timeout_ns)
        ended = lives.freed | lives.reused | idle | last
        evicted = self._overfull(lives, last_ns, ended)
        if last:
            self._open = NOTHING_OPEN
        else:
            self._open = lives.still_open(~(ended | evicted))
            self.open_peak = max(self.open_peak, len(self._open))

        # A single record has no partner. Which kind of "no partner" depends on how long one could have come.
        expired = single & ~lives.freed & (idle | lives.late | evicted)
        left = single & ~lives.freed & ~lives.reused & ~expired & last
        unmatched = single & (ended | evicted) & ~expired & ~left
        self._tally["expired"] += int(expired.sum())
        self._tally["unmatched"] += int(unmatched.sum())
        self._left += int(left.sum())
        measured: Mask = (ended | evicted) & ~single
        return measured

    def _overfull(self, lives: Lives, last_ns: Ints, ended: Mask) -> Mask:
        """The lives to end early, longest idle first, so that no more than the configured records stay open."""
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
        """Count the lives in `ended`, put their delays into windows and give them out as rows."""
        if not ended.any():
            return Delays.empty(), Crossings.empty()
        found = measure_all(lives, ended, self._resolver, crossings=self._config.crossings)
        size = lives.size
        dropped, unclear = found.dropped & ended, found.unclear & ended
        self._tally["dropped"] += int(size[dropped].sum())
        self._tally["ambiguous"] += int(size[unclear].sum())
        self._tally["matched"] += int(size[ended & ~dropped & ~unclear].sum())
        self._grades["ambiguous"] += int(unclear.sum())
        waited = self._asked.waited(lives, ended)
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
        """Index into `devices` of a device and the inner device of the container whose packet crosses it."""
        number, owner = divmod(key, 1 << 32)
        if owner not in self._owners:
            # Where a device stands on a path is told by these two (`contracts.figures.ranks`): with them from the
            # beginning it does not depend on which packets came first.
            self._owners.add(owner)
            for other in (owner, *self._resolver.beside(owner)):
                if other != number:
                    self._entries.of((other << 32) | owner)
        device, owning = self._resolver.devices[number], self._resolver.devices[owner]
        self._devices.append(replace(device, container=owning.container, container_id=owning.container_id))
        return len(self._devices) - 1


def _few(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, at most `_GAPS`; where they are more, each with what lies between it and its neighbours."""
    gaps.sort()
    if len(gaps) <= _GAPS:
        return gaps
    starts, ends = np.array(gaps, np.int64).T
    first = np.arange(0, len(gaps), -(-len(gaps) // _GAPS))
    return list(zip(starts[first].tolist(), np.maximum.reduceat(ends, first).tolist(), strict=True))


def _told(records: Records) -> tuple[Ints, Ints, Ints, Ints]:
    """What records say of their flows: IP protocol, source, destination, TCP sequence number; `NOT_TOLD` if nothing."""
    if records.flow is None or records.proto is None or records.trait is None:
        nothing = np.full(len(records), NOT_TOLD, np.int64)
        return nothing, nothing, nothing, nothing
    proto = records.proto.astype(np.int64)
    read = (records.trait & Flag.FLOW) != 0
    src, dst = (np.where(read, column, NOT_TOLD) for column in ports(records.flow))
    seq = np.where(read & (proto == IPPROTO_TCP), sequence(records.flow), NOT_TOLD)
    return np.where(proto == 0, NOT_TOLD, proto), src, dst, seq
