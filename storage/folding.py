"""Makes a store's wide windows: for the writer of the store, beside its other work, or at the end of a replay.

Whatever is interrupted here is made by the next writer. A segment of wide windows appears whole, and after the segments
that it is made from; a segment that it replaces is removed after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from contracts.errors import StoreError
from storage import segments, wide
from storage.checksum import mismatch
from storage.segments import DAY_HOURS, HOUR_NS, SegmentFile

if TYPE_CHECKING:  # sealing needs an extra
    from storage.sealing.segments import StoreSeal

_LOG = logging.getLogger(__name__)


def fold_windows(
    root: Path,
    days: Iterable[int] | None,
    settled: int,
    *,
    seal: StoreSeal | None = None,
    damaged: set[Path] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    fsync: bool = True,
) -> int:
    """Make the wide windows of hours that have ended and have none; returns the number of groups.

    `days` are first hours of days, None for all. Windows of flushes after `settled` stay as they are, and so do groups
    with a damaged segment, which is added to `damaged`. Once `stopped` returns true, no further group is made. Only the
    writer of a store may call it. Errors are logged.
    """
    with_ = _Folding(root, seal, set() if damaged is None else damaged, fsync)
    made, newest = 0, segments.newest_hour(root, "windows")
    for day in _days(root, days):
        for group in wide.to_fold(day.windows, day.whole(), settled, newest, with_.bad):
            if made and stopped():
                return made
            made += with_.done(with_.fold, group, day)
    for day in _days(root, days):
        for group in wide.to_join(day.windows, day.whole(), newest, with_.bad):
            if made and stopped():
                return made
            made += with_.done(with_.join, group, day)
    return made


@dataclass(frozen=True, slots=True)
class _Day:
    """The segments of one day."""

    windows: list[SegmentFile]
    wide: dict[str, dict[tuple[int, int], SegmentFile]]
    """By table, then by first and last flush."""

    def whole(self) -> list[SegmentFile]:
        """Return the segments that say what stands for what, of those that every table has."""
        return [
            each
            for bounds, each in self.wide[wide.STANDING].items()
            if all(bounds in here for here in self.wide.values())
        ]


def _days(root: Path, days: Iterable[int] | None) -> Iterator[_Day]:
    for day in segments.days(root, "windows") if days is None else sorted(days):
        begin, end = day * HOUR_NS, (day + DAY_HOURS) * HOUR_NS
        yield _Day(
            segments.listing(root, "windows", begin, end),
            {
                table: {(each.first, each.last): each for each in segments.listing(root, table, begin, end)}
                for table in wide.TABLES.values()
            },
        )


@dataclass(frozen=True, slots=True)
class _Folding:
    """What the writer of a store folds with."""

    root: Path
    seal: StoreSeal | None
    bad: set[Path]
    fsync: bool

    def verify(self, each: SegmentFile) -> None:
        """Raise `StoreError` for a segment that is damaged, or not as it was sealed."""
        try:
            if why := mismatch(each.path):
                raise StoreError(f"{each.path}: damaged: {why}")
            if self.seal is not None:
                self.seal.check(each)
        except StoreError:
            self.bad.add(each.path)
            raise

    def fold(self, group: Sequence[SegmentFile], day: _Day) -> None:
        """Make the wide windows of a group, in the place of those that stand for a part of it."""
        found, about = wide.folded(group, self.verify)
        first, last = min(each.first for each in group), max(each.last for each in group)
        for table, rows in found.items():
            old = [each for each in day.wide[table].values() if each.first <= last and first <= each.last]
            target = segments.segment(self.root, table, wide.day_of(group[0]), first, last, len(rows))
            segments.write_whole(target.path, partial(wide.write, rows, about, table=table), fsync=self.fsync)
            old = [each for each in old if each.path != target.path]
            if self.seal is not None:
                self.seal.merged(target, old)
            for each in old:
                each.path.unlink(missing_ok=True)

    def join(self, group: Sequence[SegmentFile], day: _Day) -> None:
        """Make one segment of the group in each table."""
        first, last = group[0].first, group[-1].last
        for table in wide.TABLES.values():
            here = [day.wide[table][each.first, each.last] for each in group]
            joined = segments.segment(self.root, table, group[0].hour, first, last, sum(each.rows for each in here))
            written = partial(self.seal.merged, joined, here) if self.seal is not None else lambda: None

            def write(temporary: Path, here: Sequence[SegmentFile] = here) -> None:
                for each in here:
                    self.verify(each)
                wide.join(here, temporary)

            segments.replace_covered(joined, here, write, fsync=self.fsync, written=written)

    def done(self, work: Callable[[Sequence[SegmentFile], _Day], None], group: list[SegmentFile], day: _Day) -> bool:
        """Fold or join a group; returns whether it could be done, and logs why not."""
        try:
            work(group, day)
        except FileNotFoundError:
            return False  # retention has removed a segment meanwhile
        except (OSError, pa.ArrowInvalid, StoreError, ValueError) as error:
            _LOG.warning("%s: making wide windows of %d segments: %s", self.root, len(group), error)
            return False
        finally:
            # Arrow's allocator keeps a thread's freed memory for that thread, and this thread rarely runs.
            pa.default_memory_pool().release_unused()
        return True
