"""The directory of a store: segment names, atomic writing, listing, merging and retention.

    STORE/
    ├── store.json                                      schema version
    ├── lock                                            flock of the one writer; says who it is
    ├── runs|cost/FIRST-LAST.ROWS.parquet
    ├── minutes|ten_minutes|hours/day=YYYY-MM-DD/FIRST-LAST.ROWS.parquet
    └── delays|windows|stages|cpus|softirqs|round_trips|ledger/day=YYYY-MM-DD/hour=HH/FIRST-LAST.ROWS.parquet

A segment is a Parquet file that appears whole (temporary name, fsync, rename) and never changes. FIRST and LAST are the
numbers of its first and last flush, which only grow. A segment of flushes 3 to 9 makes the segments of 3, 4-7, 8 and 9
in the same directory obsolete. Several small segments therefore become one without a moment in which a reader, or a
crash, finds rows twice or not at all: the merged segment is renamed into place, the covered ones no longer count, and
are then removed. The name has the number of rows, so that a damaged segment still says how many are missing.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.errors import StoreError
from storage.ownership import NO_LINK

_LOG = logging.getLogger(__name__)

HOUR_NS: Final = 3_600_000_000_000
DAY_HOURS: Final = 24
NO_HOUR: Final = -1
"""Hour of tables that are not partitioned by time."""
PARTITIONED: Final = ("ledger", "windows", "delays", "stages", "cpus", "softirqs", "round_trips")
"""Tables in the order of writing: the ledger is first, so that no reader sees rows without their losses."""
DAILY: Final = ("minutes", "ten_minutes", "hours")
"""Tables that are partitioned by day: `storage.wide` makes them from others."""
UNFINISHED: Final = "replay"
"""Folder in a store with the state of an incomplete replay, for its resume."""
MAINTENANCE_INTERVAL_S: Final = 5.0
"""Interval at which the writer of a store merges its small segments."""
RETENTION_INTERVAL_S: Final = 60.0
"""Interval at which the writer of a store removes hours beyond the limits of age and size."""
TABLES: Final = ("runs", "cost", *PARTITIONED, *DAILY)

FULL_ROWS: Final = 1 << 18
"""A segment with so many rows, the most that a flush writes, is not merged again. A reader spends 4 ms on each file, as
on 20,000 rows; moving a row when merging costs 40 ns, encoding it 150 ns."""
MERGED_ROWS: Final = 1 << 20
"""Most rows of a merged segment, which bounds the time of one merge (about 1 s if all are encoded)."""
MERGE_BATCH_ROWS: Final = 1 << 16
"""Rows that merging holds at a time, and rows per row group that it encodes. It is a quarter of
`tables.ROW_GROUP_ROWS`, because merging runs beside everything else in a store; this costs 1 % in size."""
ROW_WEIGHT: Final = dict.fromkeys(TABLES, 1) | {
    "windows": 32,
    "stages": 32,
    "softirqs": 32,
    "minutes": 32,
    "ten_minutes": 32,
    "hours": 32,
}
"""Weight of a table's row in these limits: a window has a histogram with hundreds of numbers."""
MOVED_ROWS: Final = 1 << 14
"""Merging moves the row groups of segments with so many rows as they are. Smaller segments are decoded, and their rows
encoded in larger row groups. With 16,384 rows in a row group a row takes 4.86 bytes, with `MERGE_BATCH_ROWS` 4.76, with
4,096 rows 5.69 (made-up rows)."""
FAN_IN: Final = 32
"""Number of small segments that are merged while their hour may still grow: half a minute of 1 s flushes."""

HOURS_AHEAD: Final = 1
"""Retention accepts clocks that are so many hours ahead of this machine's."""

_NAME: Final = re.compile(r"(\d{12})-(\d{12})\.(\d+)\.parquet")
_TEMPORARY: Final = ".tmp"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HOURS: Final = range(int((datetime(9999, 12, 31, 23, tzinfo=UTC) - _EPOCH) / timedelta(hours=1)) + 1)


def first_hour_of_day(hour: int) -> int:
    """Return the first hour of an hour's day; both are hours since 1970-01-01 UTC."""
    return hour // DAY_HOURS * DAY_HOURS


@dataclass(frozen=True, slots=True, order=True)
class SegmentFile:
    """One Parquet file of a store, as its name describes it."""

    table: str
    hour: int
    """Hours since 1970-01-01 UTC; the day's first for tables in `DAILY`, `NO_HOUR` for tables without partitions."""
    first: int
    last: int
    """First and last flush of the segment."""
    rows: int
    path: Path = field(compare=False)


def partition(root: Path, table: str, hour: int) -> Path:
    """Return the directory of a table's segments of an hour. Raises `StoreError` for an hour outside the calendar."""
    if hour == NO_HOUR:
        return root / table
    if hour not in _HOURS:
        raise StoreError(f"{root}: a row's time is {hour} hours after 1970, outside the calendar: check the clock")
    day = _day(root, table, hour)
    return day if table in DAILY else day / f"hour={hour % DAY_HOURS:02d}"


def _day(root: Path, table: str, hour: int) -> Path:
    return root / table / f"day={_EPOCH + timedelta(hours=hour):%Y-%m-%d}"


def segment(root: Path, table: str, hour: int, first: int, last: int, rows: int) -> SegmentFile:
    """Return the segment with that name, whether it exists or not."""
    path = partition(root, table, hour) / f"{first:012d}-{last:012d}.{rows}.parquet"
    return SegmentFile(table, hour, first, last, rows, path)


def named(path: Path) -> SegmentFile | None:
    """Return the segment that a path relative to a store describes; None if it is no segment's."""
    table, *within, name = path.parts or ("",)
    matched = _NAME.fullmatch(name) if within or table in TABLES else None
    if matched is None or table not in TABLES:
        return None
    hour = NO_HOUR
    if within:
        try:
            form = "day=%Y-%m-%d" if table in DAILY else "day=%Y-%m-%d/hour=%H"
            start = datetime.strptime("/".join(within), form).replace(tzinfo=UTC)
        except ValueError:
            return None
        hour = (start - _EPOCH) // timedelta(hours=1)
    return SegmentFile(table, hour, int(matched[1]), int(matched[2]), int(matched[3]), path)


def _names(directory: Path) -> list[str]:
    """Return all names in a directory at one moment; none if there is no directory.

    readdir is not a snapshot: during a merge it can miss both the new segment and those it covers. Two equal listings
    in a row cannot, because the second has what the first has missed.
    """
    before: list[str] | None = None
    for _ in range(100):
        try:
            now = sorted(each.name for each in directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            now = []
        if now == before:
            return now
        before = now
    raise StoreError(f"{directory}: changes faster than it can be listed")


def _partitions(root: Path, table: str, first_hour: int, last_hour: int) -> Iterator[tuple[int, Path]]:
    if table not in PARTITIONED and table not in DAILY:
        yield NO_HOUR, root / table
        return
    for day_hour in days(root, table):
        if day_hour + DAY_HOURS <= first_hour or day_hour > last_hour:
            continue
        directory = _day(root, table, day_hour)
        if table in DAILY:
            yield day_hour, directory
            continue
        for name in _names(directory):
            matched = re.fullmatch(r"hour=([01]\d|2[0-3])", name)
            if matched and first_hour <= (hour := day_hour + int(matched[1])) <= last_hour:
                yield hour, directory / name


def listing(
    root: Path, table: str, since_ns: int | None = None, until_ns: int | None = None, *, covered: bool = False
) -> list[SegmentFile]:
    """Return a table's live segments, oldest hour first, then in the order of writing.

    `since_ns` <= time < `until_ns` (UTC) leaves out hours that can have no such row. With `covered` it returns the
    segments that merged ones have made obsolete instead.
    """
    first_hour = 0 if since_ns is None else since_ns // HOUR_NS
    last_hour = _HOURS[-1] if until_ns is None else (until_ns - 1) // HOUR_NS
    found: list[SegmentFile] = []
    for hour, directory in _partitions(root, table, first_hour, last_hour):
        here = [
            SegmentFile(table, hour, int(m[1]), int(m[2]), int(m[3]), directory / name)
            for name in _names(directory)
            if (m := _NAME.fullmatch(name))
        ]
        # Widest first, so that whatever is covered comes after what covers it.
        here.sort(key=lambda s: (s.first, -s.last))
        upto = -1
        for each in here:
            live = each.last > upto
            upto = max(upto, each.last)
            if live != covered:
                found.append(each)
    return found


def days(root: Path, table: str) -> list[int]:
    """Return the first hours of the days of a partitioned table, since 1970-01-01 UTC, ascending."""
    found = []
    for day in _names(root / table):
        try:
            start = datetime.strptime(day, "day=%Y-%m-%d").replace(tzinfo=UTC)
        except ValueError:
            continue
        found.append((start - _EPOCH) // timedelta(hours=1))
    return found


def newest_hour(root: Path, table: str) -> int:
    """Return the newest hour of a partitioned table with live segments; `NO_HOUR` without any."""
    for day in reversed(days(root, table)):
        if found := listing(root, table, day * HOUR_NS, (day + DAY_HOURS) * HOUR_NS):
            return found[-1].hour
    return NO_HOUR


def by_hour(time_ns: Ints) -> list[tuple[int, Ints | None]]:
    """Group times (UTC, ns) by hour: returns each hour with the indices of its rows in order, or None for all rows.

    It takes one pass over the rows for any number of hours.
    """
    if not len(time_ns):
        return []
    first_hour = int(time_ns.min()) // HOUR_NS
    if int(time_ns.max()) // HOUR_NS == first_hour:
        return [(first_hour, None)]
    hours = time_ns // HOUR_NS
    order = np.argsort(hours, kind="stable")
    found, first = np.unique(hours[order], return_index=True)
    return list(zip(found.tolist(), np.split(order, first[1:]), strict=True))


def sync_directory(directory: Path) -> None:
    """Synchronise a directory to the disk, so that its entries survive a power failure."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directory(directory: Path, *, fsync: bool) -> None:
    if directory.is_dir():
        return
    _make_directory(directory.parent, fsync=fsync)
    directory.mkdir(exist_ok=True)
    if fsync:
        sync_directory(directory.parent)


def write_whole(path: Path, write: Callable[[Path], object], *, fsync: bool) -> None:
    """Make a file appear at `path` whole or not at all: `write(temporary)` writes it, then it is renamed.

    OSErrors of `write` pass, after the temporary file was removed.
    """
    _make_directory(path.parent, fsync=fsync)
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        write(temporary)
        if fsync:
            fd = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if fsync:
        sync_directory(path.parent)


def write_bytes(data: memoryview) -> Callable[[Path], object]:
    """Return a function for `write_whole` that writes these bytes."""

    def write(temporary: Path) -> None:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o644)
        try:
            left = data
            while left:
                # On a full disk a write is short first, and then fails.
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)

    return write


def remove_leftovers(root: Path) -> int:
    """Remove temporary files and covered segments that a killed writer has left; returns their number.

    Only the writer of a store may call it.
    """
    left = [p for table in TABLES for p in (root / table).rglob(f"*{_TEMPORARY}") if p.is_file()]
    left += [s.path for table in TABLES for s in listing(root, table, covered=True)]
    for path in left:
        path.unlink(missing_ok=True)
    if left:
        _LOG.info("%s: removed %d files that an interrupted writer left", root, len(left))
    return len(left)


def next_flush(root: Path) -> int:
    """Return a flush number above those of all segments."""
    return 1 + max((s.last for table in TABLES for s in listing(root, table)), default=0)


def mergeable(
    segments: Sequence[SegmentFile], damaged: Iterable[Path] = (), ends: Iterable[int] = ()
) -> list[list[SegmentFile]]:
    """Return groups of at least two of a table's live segments (in the order of `listing`) that should be merged.

    A group is consecutive, because a merged segment covers all flushes between its first and its last. Segments of the
    newest hour are merged only when there are `FAN_IN` small ones. No group has flushes on both sides of one of `ends`,
    the last flushes of segments that were made from these.
    """
    cuts = sorted(ends)
    bad = set(damaged)
    newest = segments[-1].hour if segments else NO_HOUR
    groups: list[list[SegmentFile]] = []
    group: list[SegmentFile] = []

    def close() -> None:
        if len(group) >= (FAN_IN if group and group[0].hour == newest else 2):
            groups.append(group)

    for each in segments:
        small = _weight(each) < FULL_ROWS and each.path not in bad
        cut = group and bisect_left(cuts, group[-1].last) != bisect_left(cuts, each.first)
        if cut:
            close()
            group = []
        fits = group and group[0].hour == each.hour and sum(map(_weight, group)) + _weight(each) <= MERGED_ROWS
        if not small or not fits:
            # A full group is merged even if it has few segments.
            if group and small and group[0].hour == each.hour and len(group) > 1:
                groups.append(group)
            else:
                close()
            group = []
        if small:
            group.append(each)
    close()
    return groups


def movable(segment: SegmentFile) -> bool:
    """Return whether merging moves the row groups of a segment."""
    return _weight(segment) >= MOVED_ROWS


def _weight(segment: SegmentFile) -> int:
    return segment.rows * ROW_WEIGHT[segment.table]


def replace_covered(
    merged: SegmentFile,
    covered: Sequence[SegmentFile],
    write: Callable[[Path], object],
    *,
    fsync: bool,
    written: Callable[[], object] = lambda: None,
) -> None:
    """Replace the covered segments by `merged`, which `write` writes; `written` is called before they are removed.

    The merged segment gets the newest modification time of the covered ones, which retention uses.
    """
    written_ns = max(s.path.stat().st_mtime_ns for s in covered)

    def make(temporary: Path) -> None:
        write(temporary)
        os.utime(temporary, ns=(written_ns, written_ns))

    write_whole(merged.path, make, fsync=fsync)
    written()
    for each in covered:
        each.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Removed:
    """Counts of what retention has removed."""

    segments: int = 0
    rows: int = 0
    bytes: int = 0

    def __add__(self, other: Removed) -> Removed:
        return Removed(self.segments + other.segments, self.rows + other.rows, self.bytes + other.bytes)


def retain(
    root: Path,
    now_s: float,
    max_age_s: float | None,
    max_bytes: int | None,
    *,
    before: Callable[[Sequence[SegmentFile], str], object] | None = None,
) -> Removed:
    """Remove whole hours that were written more than `max_age_s` ago or exceed `max_bytes`, oldest first.

    Age counts from the writing, not from the packets' time, because a replay of last year's capture must not be deleted
    at once. The hour of `now_s` always stays, or if there is none the newest before it. To meet `max_bytes`, hours in
    the future of this machine's clock are removed first, the furthest first: rows of a host whose clock is wrong must
    not outlive those of the others. A table in `DAILY` goes with the last hour of its day. `runs` stays, with one row
    per run. `before` is called with the segments of an hour and the reason, `age` or `size`, before they are removed.
    """
    hours: dict[int, list[tuple[SegmentFile, int]]] = {}
    newest_s: dict[int, float] = {}
    total = 0
    for table in PARTITIONED:
        for each in listing(root, table):
            try:
                status = each.path.stat()
            except FileNotFoundError:
                continue  # merged meanwhile
            hours.setdefault(each.hour, []).append((each, status.st_size))
            newest_s[each.hour] = max(newest_s.get(each.hour, 0.0), status.st_mtime)
            total += status.st_size
    daily: dict[int, list[tuple[SegmentFile, int]]] = {}
    for table in DAILY:
        for each in listing(root, table):
            try:
                daily.setdefault(each.hour, []).append((each, each.path.stat().st_size))
            except FileNotFoundError:
                continue
    total += sum(size for day in daily.values() for _, size in day)
    # The newest file's time counts as present too, so that a clock that was set back does not remove everything.
    present = int(max([now_s, *newest_s.values()])) // 3600
    to_come = sorted((hour for hour in hours if hour > present + HOURS_AHEAD), reverse=True)
    come = sorted(hours.keys() - to_come)
    if not come:  # this machine's clock is wrong
        come, to_come = to_come[::-1], []
    stays = {hour for hour in come if present <= hour <= present + HOURS_AHEAD} or set(come[-1:])
    removed, gone = Removed(), set[int]()
    # What was made while the last hour of its day was removed.
    for day in daily.keys() - {first_hour_of_day(hour) for hour in hours}:
        for each, size in daily.pop(day):
            if before is not None:
                before([each], "age")
            each.path.unlink(missing_ok=True)
            total -= size
    for hour in [*to_come, *come]:
        if hour in stays:
            continue
        old = max_age_s is not None and newest_s[hour] < now_s - max_age_s
        large = max_bytes is not None and total > max_bytes
        if not (old or large):
            continue
        day = first_hour_of_day(hour)
        gone.add(hour)
        last = all(each in gone for each in hours if day <= each < day + DAY_HOURS)
        away = [*hours[hour], *(daily.pop(day, []) if last else [])]
        here = Removed(len(away), sum(s.rows for s, _ in away), sum(size for _, size in away))
        if before is not None:
            before([each for each, _ in away], "age" if old else "size")
        for each, _ in away:
            each.path.unlink(missing_ok=True)
        for table in PARTITIONED:
            _remove_empty(partition(root, table, hour))
        if last:
            for table in DAILY:
                _remove_empty(partition(root, table, day))
        total -= here.bytes
        removed += here
        _LOG.info(
            "%s: retention (%s) removed %s: %d segments, %d rows, %d bytes",
            root,
            "age" if old else "size",
            partition(Path(), "*", hour),
            here.segments,
            here.rows,
            here.bytes,
        )
    return removed


def _remove_empty(directory: Path) -> None:
    for each in (directory, directory.parent):
        try:
            each.rmdir()
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
                raise
            return
