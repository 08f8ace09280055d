"""The lives of one stream: the compiled loop that joins records into lives and measures them, and its state as columns.

Open lives stay inside the loop from one slice to the next. `Open` and `LooseEnds` are made for checkpoints alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Ints, Mask
from contracts.hooks import Way
from contracts.records import Batch
from contracts.schema import Delays
from correlator.answers import TABLES, Answers
from correlator.compiled.joiner import Joiner
from correlator.content import flows, keys, traits
from correlator.gaps import Gaps, disjoint
from correlator.identity import CODE_BITS, CODES, WAY, Resolver
from correlator.links import LooseEnds
from correlator.neighbours import Asked
from correlator.records import LifeTimes, Open, Records

_MOST_LEARNED: Final = 1 << 20
"""Numbers in the learned tables beyond which all is forgotten, some 20 MiB. A host with a thousand containers has a
tenth of it."""


class Numbers(NamedTuple):
    """Counts since the stream's beginning, and what the loop holds at the end of a slice."""

    records: int
    matched: int
    unmatched: int
    ambiguous: int
    expired: int
    dropped: int
    left: int
    """Single records without a partner that were still open when the stream ended."""
    told_apart: int
    """Lives that the content key alone ended."""
    several_devices: int
    """Lives with a device that has several candidates."""
    buffer: int
    """Lives with rows, by `contracts.schema.Grade`: this one and the two below."""
    content: int
    exact: int
    waited: int
    """Lives with rows that waited for a neighbour's address."""
    several_packets: int
    """Tails with a head of the same key that have several candidates."""
    open_records: int = 0
    """Records of open lives."""
    loose_records: int = 0
    """Records of lives that wait for another buffer's."""
    oldest_open_ns: int = np.iinfo(np.int64).max
    """Time of the oldest record of an open life, or the largest number."""
    oldest_loose_ns: int = np.iinfo(np.int64).max
    cells: int = 0
    """Histogram cells of open windows."""
    learned: int = 0
    """Size of the learned tables."""


NO_NUMBERS: Final = Numbers(*[0] * 14)
_COUNTS: Final = 14


class Lives:
    """The compiled loop and what it asks. Can be pickled with what is open."""

    def __init__(
        self,
        resolver: Resolver,
        entry: Callable[[int, int], int],
        *,
        timeout_ns: int,
        link_ns: int,
        offset_ns: int,
        rows: bool,
        crossings: bool,
        stages: bool,
    ) -> None:
        """`entry` returns the number of a device and the inner device that it serves; the numbers begin with 0."""
        self._resolver = resolver
        self.answers = Answers(resolver, entry, with_stages=stages)
        self._times = timeout_ns, link_ns, offset_ns
        self._rows, self._crossings, self._stages = rows, crossings, stages
        self._learned_at = -1
        self._before = NO_NUMBERS
        """Numbers of the joiner that went before this one."""
        self.numbers = NO_NUMBERS
        self._begin()

    def _begin(self) -> None:
        asked = self.answers
        self._joiner = Joiner(
            TABLES,
            self._times,
            (self._rows, self._crossings or self._stages),
            (asked.judge, asked.start, asked.passes, asked.shape),
        )
        self._learned_at = -1

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with open lives as columns; the caller must have taken all windows."""
        kept = {name: value for name, value in self.__dict__.items() if name != "_joiner"}
        return kept | {"saved": (self.open(), self.waiting())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened, waiting = state.pop("saved")
        self.__dict__.update(state)
        self._before = self.numbers
        self._begin()
        self.restore(opened, waiting)

    def add(self, batches: list[Batch], gaps: Gaps, asked: Asked) -> None:
        """Add the records of a slice, in which all records before a time are; markers are passed over."""
        if self._learned_at != self._resolver.looked_up or self.numbers.learned > _MOST_LEARNED:
            self._joiner.forget(self._resolver.only)
            self.answers.forget()
            self._learned_at = self._resolver.looked_up
        self._joiner.begin(*disjoint(gaps), *asked.by_device())
        for batch in batches:
            flow, proto = flows(batch) if self._crossings else (None, None)
            columns = (
                *(batch.ts_ns, batch.skb_id, batch.hook, batch.dev, batch.l3_len, batch.drop_reason),
                *(keys(batch), traits(batch), flow, proto, batch.cpu if self._stages else None),
            )
            self._joiner.add(tuple(None if column is None else np.ascontiguousarray(column) for column in columns))

    def end(self, upto_ns: int, open_records: int, loose_records: int, *, last: bool) -> None:
        """End a slice: end idle lives, all lives if it is the `last`, and the oldest if too many records wait."""
        told = np.frombuffer(self._joiner.end(upto_ns, last, open_records, loose_records), np.int64).tolist()
        counts = (before + now for before, now in zip(self._before, told[:_COUNTS], strict=False))
        self.numbers = Numbers(*counts, *told[_COUNTS:])

    def rows(self, entries: npt.NDArray[np.int32]) -> Delays:
        """Return the rows since the last call: in order of time, and then those of lives that had waited likewise.

        `entries` has the index into `Rows.devices` of each number that `entry` has returned.
        """
        if not self._rows:
            return Delays.empty()
        dtypes = Delays._DTYPES.items()
        columns = {
            name: np.frombuffer(column, dtype)
            for (name, dtype), column in zip(dtypes, self._joiner.rows(entries), strict=False)
        }
        return Delays(**columns)

    def windows(self, before_utc_ns: int | None) -> tuple[Ints, Ints]:
        """Return the windows that end at or before a time (None: all) and their cells, for `Windows.add_tables`."""
        windows, cells = (np.frombuffer(table, np.int64) for table in self._joiner.windows(before_utc_ns))
        return windows.reshape(6, -1), cells.reshape(4, -1)

    def times(self) -> LifeTimes:
        """Return the lives with rows since the last call; they are kept if crossings or stages are wanted."""
        columns, lives = self._joiner.measured()
        shape, packet, size, length, grade, waited = _arrays(lives, "u4", "u8", "i8", "u4", "u1", "?")
        records, _, _ = self._records(columns, np.zeros(len(columns[0]) // 8, np.uint64))
        start = np.cumsum(size) - size
        return LifeTimes(shape.astype(np.int64), packet, start, length, grade, waited, records.ts, records)

    # State ----------------------------------------------------------------------------------------------

    def open(self) -> Open:
        """Return the records of open lives, in order of time; records of one time are ordered by buffer."""
        columns, lives = self._joiner.open()
        skb, size = _arrays(lives, "u8", "i8")
        records, number, cross = self._records(columns, np.repeat(skb, size))
        order = np.lexsort((np.arange(len(number)), records.skb, records.ts))
        return Open(records[order], number[order], cross[order])

    def waiting(self) -> LooseEnds:
        """Return the lives that wait for another buffer's."""
        columns, lives = self._joiner.loose()
        skb, size, head, end, grade = _arrays(lives, "u8", "i8", "?", "i8", "u1")
        records, number, cross = self._records(columns, np.repeat(skb, size))
        start = np.cumsum(size) - size
        return LooseEnds(
            records=records,
            number=number,
            cross=cross,
            size=size,
            key=records.column("key")[start + end],
            at_ns=records.ts[start + end],
            first_ns=records.ts[start],
            head=head,
            end=end,
            freed=WAY[records.place[start + size - 1] >> CODE_BITS] == Way.END,
            grade=grade,
        )

    def restore(self, opened: Open, waiting: LooseEnds) -> None:
        """Continue with the lives of a state; there must be none yet."""
        begin = 0
        for size, head, end, grade in zip(
            waiting.size.tolist(), waiting.head.tolist(), waiting.end.tolist(), waiting.grade.tolist(), strict=True
        ):
            life = np.arange(begin, begin + size)
            records = waiting.records[life]
            self._restore(records, waiting.number[life], waiting.cross[life])
            self._joiner.loosen(int(records.skb[0]), end, head, grade)
            begin += size
        self._restore(opened.records, opened.number, opened.cross)
        self.numbers = self.numbers._replace(
            open_records=len(opened),
            loose_records=len(waiting.records),
            oldest_open_ns=int(opened.records.ts.min()) if len(opened) else NO_NUMBERS.oldest_open_ns,
            oldest_loose_ns=int(waiting.first_ns.min()) if len(waiting.size) else NO_NUMBERS.oldest_loose_ns,
        )

    def _restore(self, records: Records, number: Ints, cross: Mask) -> None:
        hook, dev = (records.place >> CODE_BITS).astype(np.uint8), (records.place & (CODES - 1)).astype(np.uint32)
        columns = (
            *(records.ts, records.skb, hook, dev, records.length, None),
            *(records.key, records.trait, records.flow, records.proto, records.cpu, number, cross),
        )
        self._joiner.restore(tuple(None if column is None else np.ascontiguousarray(column) for column in columns))

    def _records(self, columns: tuple[bytearray, ...], skb: U64) -> tuple[Records, Ints, Mask]:
        """Return records, device numbers and `cross`; optional columns are absent as in a state."""
        ts, place, length, cpu, trait, proto, key, flow, number, cross = _arrays(
            columns, "i8", "i8", "u4", "u2", "u1", "u1", "u8", "u8", "i8", "?"
        )
        read, flows_read = bool(key.any() or trait.any()), self._crossings and bool(flow.any() or proto.any())
        records = Records(
            ts,
            skb,
            place,
            length,
            key if read else None,
            trait if read else None,
            flow if flows_read else None,
            proto if flows_read else None,
            cpu if self._stages else None,
        )
        return records, number, cross


def _arrays(columns: tuple[bytearray, ...], *dtypes: str) -> list[npt.NDArray[Any]]:
    return [np.frombuffer(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
