"""Wide windows: minutes, ten minutes and hours, folded from a store's windows of ten seconds.

    windows/day=D/hour=00/000000000001-000000003632.ROWS.parquet  ┐   minutes|ten_minutes|hours/
    windows/day=D/hour=01/000000003601-000000007201.ROWS.parquet  ┴→  day=D/000000000001-000000007201.ROWS.parquet

A segment FIRST-LAST of `hours`, and with it one of `minutes` and one of `ten_minutes`, has all delays of the windows of
ten seconds in those segments of `windows` of its day whose flushes lie within FIRST..LAST: their histograms are added
up. It therefore stands for these segments exactly, and a reader takes its rows or theirs. It does not count while a
segment of `windows` is partly within FIRST..LAST; merging makes no such segment, but an older MACE may. Rows of equal
time and place add up. Each width is a table of its own, because a reader verifies whole files: of a month, the hours
are a twentieth of the minutes.

The footer has, under the name `mace.wide`, what a reader would otherwise read the segments of `windows` for: their
hours, the names of containers, and the ends of the runs' newest windows.

Wide windows are made from stored windows, and not along with them, so that every writer and every older store gets
them, and a crash loses none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.arrays import Ints
from contracts.histogram import BINS, quantiles_of_each
from contracts.windowtable import FIGURES
from storage import checksum, tables
from storage.ownership import open_new
from storage.segments import DAY_HOURS, SegmentFile, first_hour_of_day

TABLES: Final = {60: "minutes", 600: "ten_minutes", 3600: "hours"}
"""Tables by the width of their windows in s, each a multiple of the one before, in the order of writing.

A month's chart has hours, a week's has ten minutes.
"""
WIDTHS_S: Final = tuple(TABLES)
STANDING: Final = TABLES[3600]
"""The table whose segments say what stands for what: it is written last."""
FROM_S: Final = 10
"""Width of the windows that are folded."""
_KEY: Final = b"mace.wide"
_S: Final = 1_000_000_000
_BATCH_ROWS: Final = 2_048
"""Windows that are decoded at a time; most of them are of one second."""
_FOLD_ROWS: Final = 8_192
"""Windows of ten seconds that are folded at a time: 10 MB with histograms of a hundred bins."""
_MOST_ROWS: Final = 1 << 16
"""Windows after which the next hour is folded apart: that bounds the memory, and the files of sparse hours."""
_ROW_GROUP_ROWS: Final = {"minutes": 4_096, "ten_minutes": 4_096, "hours": 512}
"""Rows of a row group. DuckDB decodes the histograms of whole row groups: with 512 hours, those of a few containers."""
_NAMES: Final = tuple(f.name for f in tables.SCHEMAS[STANDING] if pa.types.is_dictionary(f.type))
_KEYS: Final = ("segment", "container", *(name for name in _NAMES if name not in ("segment", "container")), "rank")
"""Columns that rows must share to be folded into one, besides the time."""


@dataclass(slots=True)
class About:
    """What segments of windows say of the whole; it can only grow."""

    names: dict[tuple[str, str, str], tuple[int, str]] = field(default_factory=dict)
    """By host, container's id and name: start of that name's newest window, UTC, ns, and the pod's containers."""
    ends: dict[tuple[str, str, int], int] = field(default_factory=dict)
    """By host, run and width in s: end of the newest window, UTC, ns."""
    hours: set[int] = field(default_factory=set)
    """Hours since 1970-01-01 UTC of the segments."""

    def add(self, host: str, run: str, width_s: int, container_id: str, container: str, utc_ns: int, pod: str) -> None:
        """Note that the newest window of such a kind starts at `utc_ns`."""
        end = (host, run, width_s)
        self.ends[end] = max(self.ends.get(end, 0), utc_ns + width_s * _S)
        if container_id:
            name, last = (host, container_id, container), (utc_ns, pod)
            self.names[name] = max(self.names.get(name, last), last)

    def __ior__(self, other: About) -> Self:
        for name, last in other.names.items():
            self.names[name] = max(self.names.get(name, last), last)
        for end, utc_ns in other.ends.items():
            self.ends[end] = max(self.ends.get(end, 0), utc_ns)
        self.hours |= other.hours
        return self

    def encoded(self) -> bytes:
        """Return it as JSON, for a footer."""
        told = {
            "names": [[*key, *last] for key, last in sorted(self.names.items())],
            "ends": [[*key, utc_ns] for key, utc_ns in sorted(self.ends.items())],
            "hours": sorted(self.hours),
        }
        return json.dumps(told, separators=(",", ":")).encode()

    @classmethod
    def of(cls, path: Path) -> About:
        """Read it from the footer of a segment of wide windows. Raises `ValueError` without it; OSErrors pass."""
        told = json.loads((pq.read_metadata(path).metadata or {}).get(_KEY, b""))
        return cls(
            {(host, id_, name): (utc_ns, pod) for host, id_, name, utc_ns, pod in told["names"]},
            {(host, run, width_s): utc_ns for host, run, width_s, utc_ns in told["ends"]},
            set(told["hours"]),
        )


# Which segments stand for which ---------------------------------------------------------------------------


def day_of(segment: SegmentFile) -> int:
    """Return the first hour of a segment's day."""
    return first_hour_of_day(segment.hour)


@dataclass(slots=True)
class Cover:
    """Segments of wide windows, and the segments of windows that they stand for."""

    wide: list[SegmentFile]
    covered: dict[SegmentFile, SegmentFile]
    """Segments of windows, each with the wide one that stands for it."""
    others: list[SegmentFile]
    """Segments of windows that no wide one stands for."""


def cover(windows: Iterable[SegmentFile], wide: Iterable[SegmentFile]) -> Cover:
    """Return which of the wide segments, of `STANDING`, count. `windows` are all live segments of their days."""
    found = Cover([], {}, [])
    by_day: dict[int, list[SegmentFile]] = {}
    for each in windows:
        by_day.setdefault(day_of(each), []).append(each)
    pieces: dict[int, list[SegmentFile]] = {}
    for piece in wide:
        pieces.setdefault(day_of(piece), []).append(piece)
    for day, fine in by_day.items():
        stand: list[SegmentFile] = []
        for each in sorted(pieces.get(day, ()), key=lambda each: (each.first, -each.last)):
            # Of overlapping ones, which an interrupted writer may leave, the first counts.
            if not (stand and each.first <= stand[-1].last) and not any(_straddles(one, each) for one in fine):
                stand.append(each)
        for one in fine:
            standing = next((each for each in stand if each.first <= one.first and one.last <= each.last), None)
            if standing is None:
                found.others.append(one)
            else:
                found.covered[one] = standing
    # A wide segment without any of its windows, which retention has removed, counts no longer.
    found.wide = sorted(set(found.covered.values()))
    return found


def _straddles(one: SegmentFile, wide: SegmentFile) -> bool:
    within = wide.first <= one.first and one.last <= wide.last
    return not within and one.first <= wide.last and wide.first <= one.last


def to_fold(
    windows: Sequence[SegmentFile],
    wide: Sequence[SegmentFile],
    settled: int,
    newest: int,
    damaged: Iterable[Path] = (),
) -> list[list[SegmentFile]]:
    """Return groups of segments of windows, each of one day, of which a segment of wide windows should be made.

    These are the segments of hours before `newest` that no wide segment stands for, and those whose flushes overlap
    with theirs, up to the flush `settled`. A group with one of `damaged` is left out.
    """
    found, bad = cover(windows, wide), set(damaged)
    standing: dict[int, list[SegmentFile]] = {}
    for each in found.wide:
        standing.setdefault(day_of(each), []).append(each)
    groups: list[list[SegmentFile]] = []
    for day in dict.fromkeys(map(day_of, found.others)):
        here = sorted((each for each in found.others if day_of(each) == day), key=lambda each: (each.first, each.last))
        # Segments with overlapping flushes belong together; others do up to a bound, if no wide one is between them.
        together: list[SegmentFile] = []
        last = -1
        for each in here:
            if together and each.first > last:
                full = each.hour != together[-1].hour and (
                    sum(one.rows for one in together) > _MOST_ROWS or each.hour >= newest
                )
                if full or any(last < one.first < each.first for one in standing.get(day, ())):
                    groups.append(together)
                    together = []
            together.append(each)
            last = max(last, each.last)
        groups.append(together)
    return [
        sorted(group)
        for group in groups
        if min(each.hour for each in group) < newest
        and max(each.last for each in group) <= settled
        and not bad & {each.path for each in group}
    ]


def to_join(
    windows: Sequence[SegmentFile], wide: Sequence[SegmentFile], newest: int, damaged: Iterable[Path] = ()
) -> list[list[SegmentFile]]:
    """Return groups of at least two wide segments, each of one day before that of the hour `newest`, to become one."""
    found, bad = cover(windows, wide), set(damaged)
    groups = []
    for day in dict.fromkeys(map(day_of, found.wide)):
        group = sorted(each for each in found.wide if day_of(each) == day)
        apart = any(
            day_of(one) == day and one.first <= group[-1].last and group[0].first <= one.last for one in found.others
        )
        past = day + DAY_HOURS <= newest
        if past and len(group) > 1 and not apart and not bad & {each.path for each in group}:
            groups.append(group)
    return groups


# Folding ---------------------------------------------------------------------------------------------------


def fold(rows: pa.Table, width_s: int) -> pa.Table:
    """Return windows of `width_s` with the delays of `rows`, narrower windows with the same columns.

    They are sorted by segment, container and time. Rows of the result have the quantiles of their merged histograms.
    """
    if not len(rows):
        return rows
    rows = rows.unify_dictionaries().combine_chunks()
    width_ns = width_s * _S
    starts = rows["time"].cast(pa.int64()).to_numpy() // width_ns * width_ns
    code = _joined(_codes(rows["segment"]), _codes(rows["container"]))
    code = _joined(code, np.unique(starts, return_inverse=True)[1])
    for name in _KEYS[2:]:
        code = _joined(code, _codes(rows[name]))
    _, chosen, group = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.append(True, np.diff(group[order])))
    figures = {name: rows[name].to_numpy()[order] for name in FIGURES[:4]}
    added = {name: np.add.reduceat(figures[name], begins) for name in ("count", "sum_ns")}
    low, high = np.minimum.reduceat(figures["min_ns"], begins), np.maximum.reduceat(figures["max_ns"], begins)
    edges, bins, counts = _histograms(rows, group, len(chosen))
    found = quantiles_of_each(bins, counts, edges).clip(low, high)
    columns: dict[str, Any] = {name: rows[name].take(pa.array(chosen)) for name in (*_NAMES, "rank")}
    columns |= {
        "time": pa.array(starts[chosen]).cast(rows["time"].type),
        "width_s": pa.array(np.full(len(chosen), width_s, np.uint32)),
        "count": pa.array(added["count"]),
        "sum_ns": pa.array(added["sum_ns"]),
        "min_ns": pa.array(low),
        "max_ns": pa.array(high),
        **{name: pa.array(each) for name, each in zip(FIGURES[4:], found, strict=True)},
        "bins": pa.ListArray.from_arrays(pa.array(edges.astype(np.int32)), pa.array(bins.astype(np.uint16))),
        "counts": pa.ListArray.from_arrays(pa.array(edges.astype(np.int32)), pa.array(counts)),
    }
    schema = tables.SCHEMAS[STANDING]
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _codes(column: pa.ChunkedArray) -> Ints:
    """Return a number for each value of a column, in the order of the values."""
    whole = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
        rank = np.unique(whole.dictionary.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
        found: Ints = rank.astype(np.int64)[whole.indices.to_numpy(zero_copy_only=False)]
        return found
    return np.unique(column.to_numpy(), return_inverse=True)[1].astype(np.int64)


def _joined(code: Ints, more: Ints) -> Ints:
    """Return numbers that are equal where both are, in the order of the first, then the second."""
    found: Ints = np.unique(code * (int(more.max()) + 1) + more, return_inverse=True)[1].astype(np.int64)
    return found


def _histograms(rows: pa.Table, group: Ints, groups: int) -> tuple[Ints, Ints, Ints]:
    """Return the histograms of all groups end to end: edges, ascending bins and their counts, as `WindowTable` does."""
    from pyarrow import compute  # noqa: PLC0415 (8 MiB, which a run takes when its first hour ends)

    sizes = compute.list_value_length(rows["bins"]).to_numpy()
    bins, counts = (
        compute.list_flatten(rows[name]).to_numpy().astype(np.int64, copy=False) for name in ("bins", "counts")
    )
    cells = np.repeat(group * BINS, sizes) + bins
    order = np.argsort(cells, kind="stable")
    cells, counts = cells[order], counts[order]
    first = np.flatnonzero(np.append(True, np.diff(cells)))
    cells, counts = cells[first], np.add.reduceat(counts, first)
    return np.searchsorted(cells, np.arange(groups + 1) * BINS), cells % BINS, counts


def folded(group: Sequence[SegmentFile], verify: Callable[[SegmentFile], object]) -> tuple[dict[str, pa.Table], About]:
    """Return the wide windows of segments of windows, by table, and what they say.

    `verify` is called with each segment before it is read. Raises the errors of `verify`; OSErrors and
    `pyarrow.ArrowInvalid` of damaged segments pass.
    """
    about = About(hours={each.hour for each in group})
    narrow: list[pa.Table] = []
    waiting: list[pa.Table] = []
    waits = 0

    def fold_waiting() -> None:
        nonlocal waits
        if waits:
            narrow.append(fold(pa.concat_tables(waiting), WIDTHS_S[0]))
            waiting.clear()
            waits = 0

    for each in group:
        verify(each)
        for batch in _decoded(each.path):
            _note(about, batch)
            chosen = batch.filter(pa.array(batch["width_s"].to_numpy() == FROM_S))
            if len(chosen):
                waiting.append(chosen)
                waits += len(chosen)
            if waits >= _FOLD_ROWS:
                fold_waiting()
    fold_waiting()
    rows = pa.concat_tables(narrow) if narrow else tables.SCHEMAS[STANDING].empty_table()
    found = {TABLES[WIDTHS_S[0]]: rows}
    for width_s in WIDTHS_S[1:]:
        rows = found[TABLES[width_s]] = fold(rows, width_s)
    return found, about


def _decoded(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, read_dictionary=list(_NAMES)) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            yield tables.grown(pa.Table.from_batches([batch]), "windows")


def _note(about: About, rows: pa.Table) -> None:
    by = ("host", "run", "width_s", "container_id", "container")
    rows = rows.unify_dictionaries().combine_chunks()
    code = np.zeros(len(rows), np.int64)
    for name in by:
        code = _joined(code, _codes(rows[name]))
    time_ns = rows["time"].cast(pa.int64()).to_numpy()
    # Of each group the newest row.
    order = np.lexsort((time_ns, code))
    last = order[np.append(np.flatnonzero(np.diff(code[order])), len(order) - 1)] if len(order) else order
    newest = rows.select([*by, "pod_containers"]).take(pa.array(last)).to_pydict()
    for *key, pod, utc_ns in zip(*newest.values(), time_ns[last].tolist(), strict=True):
        host, run, width_s, container_id, container = key
        about.add(host, run, width_s, container_id, container, utc_ns, pod)


def write(rows: pa.Table, about: About, target: Path, table: str) -> None:
    """Write wide windows to a new file: row groups have one segment each, so that readers skip the others."""
    rows = rows.unify_dictionaries().combine_chunks()
    segment = _codes(rows["segment"])
    with open_new(target) as sink, _writer(sink, about) as writer:
        for each in np.unique(segment).tolist():
            chosen = rows.filter(pa.array(segment == each)).combine_chunks()
            writer.write(tables.to_stored(chosen), _ROW_GROUP_ROWS[table])


def join(group: Sequence[SegmentFile], target: Path) -> None:
    """Write one segment of wide windows with the rows of several. OSErrors and `pyarrow.ArrowInvalid` pass."""
    about, table = About(), group[0].table
    at: list[tuple[str, int, int]] = []
    for number, each in enumerate(group):
        about |= About.of(each.path)
        at += [(segment, number, index) for index, segment in enumerate(_row_groups(each.path))]
    waiting: list[pa.Table] = []
    with open_new(target) as sink, _writer(sink, about) as writer:

        def write_out() -> None:
            if waiting:
                rows = pa.concat_tables(waiting).unify_dictionaries().combine_chunks()
                order = np.lexsort((rows["time"].cast(pa.int64()).to_numpy(), _codes(rows["container"])))
                writer.write(tables.to_stored(rows.take(pa.array(order))), _ROW_GROUP_ROWS[table])
                waiting.clear()

        before = ""
        for segment, number, index in sorted(at):
            # A day's hours are sorted as a whole.
            if segment != before or sum(map(len, waiting)) >= 2 * _ROW_GROUP_ROWS["minutes"]:
                write_out()
                before = segment
            with pq.ParquetFile(group[number].path, read_dictionary=list(_NAMES)) as file:
                waiting.append(tables.grown(file.read_row_group(index, use_threads=False), table))
        write_out()


def _writer(sink: Any, about: About) -> checksum.SegmentWriter:
    told = {_KEY: about.encoded()}
    return checksum.SegmentWriter(sink, tables.STORED_SCHEMAS[STANDING], told, **tables.parquet_options(STANDING))


def _row_groups(path: Path) -> Iterator[str]:
    """Yield the segment of each row group, of which it has one."""
    found = pq.read_metadata(path)
    column = found.schema.names.index("segment")
    for index in range(found.num_row_groups):
        yield str(found.row_group(index).column(column).statistics.min)


# Reading ---------------------------------------------------------------------------------------------------


def spans(low_ns: int, high_ns: int, widest_s: int) -> list[tuple[int, int, int]]:
    """Return (width in s, from, to) of the widest windows up to `widest_s` that cover a range of time, UTC, ns.

    The range begins and ends at multiples of `FROM_S`. The spans are in order, and each begins and ends at multiples of
    its width.
    """
    widths = [width_s for width_s in (*reversed(WIDTHS_S), FROM_S) if width_s <= widest_s]
    return [each for each in _spans(low_ns, high_ns, widths) if each[1] < each[2]]


def _spans(low_ns: int, high_ns: int, widths: Sequence[int]) -> list[tuple[int, int, int]]:
    unit = widths[0] * _S
    begin, end = -(-low_ns // unit) * unit, high_ns // unit * unit
    if len(widths) == 1:
        return [(widths[0], low_ns, high_ns)]
    if begin >= end:
        return _spans(low_ns, high_ns, widths[1:])
    return [*_spans(low_ns, begin, widths[1:]), (widths[0], begin, end), *_spans(end, high_ns, widths[1:])]
