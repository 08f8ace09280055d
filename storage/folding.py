"""Makes a store's wide windows: for the writer of the store, beside its other work, or at the end of a replay.

Whatever is interrupted here is made by the next writer. A segment of wide windows appears whole, and after the segments
that it is made from; a segment that it replaces is removed after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
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
    """Make the wide windows of hours that have ended and have none; returns the number of segments written.

    `days` are first hours of days, None for all. Windows of flushes after `settled` stay as they are, and so do groups
    with a damaged segment, which is added to `damaged`. Only the writer of a store may call it. Errors are logged.
    """
    bad = set[Path]() if damaged is None else damaged
    made = 0
    newest = segments.newest_hour(root, "windows")
    for windows, known in _listed(root, days):
        made += sum(
            _made(root, group, known, seal=seal, bad=bad, fsync=fsync)
            for group in wide.to_fold(windows, known, settled, newest, bad)
            if not stopped()
        )
    for windows, known in _listed(root, days):
        made += sum(
            _joined(root, group, seal=seal, bad=bad, fsync=fsync)
            for group in wide.to_join(windows, known, newest, bad)
            if not stopped()
        )
    return made


def _listed(root: Path, days: Iterable[int] | None) -> Iterable[tuple[list[SegmentFile], list[SegmentFile]]]:
    """Yield the segments of windows and of wide windows, of each day."""
    if days is None:
        days = segments.days(root, "windows")
    for day in sorted(days):
        begin, end = day * HOUR_NS, (day + DAY_HOURS) * HOUR_NS
        yield segments.listing(root, "windows", begin, end), segments.listing(root, wide.TABLE, begin, end)


def _made(
    root: Path,
    group: Sequence[SegmentFile],
    known: Sequence[SegmentFile],
    *,
    seal: StoreSeal | None,
    bad: set[Path],
    fsync: bool,
) -> bool:
    def verify(each: SegmentFile) -> None:
        if why := mismatch(each.path):
            bad.add(each.path)
            raise StoreError(f"{each.path}: damaged: {why}")
        if seal is not None:
            seal.check(each)

    try:
        parts, about = wide.folded(group, verify)
        first, last = min(each.first for each in group), max(each.last for each in group)
        target = segments.segment(root, wide.TABLE, wide.day_of(group[0]), first, last, sum(map(len, parts)))
        # Segments of another division of the same windows, which do not count.
        old = [each for each in known if each.first <= last and first <= each.last and each.path != target.path]
        segments.write_whole(target.path, lambda temporary: wide.write(parts, about, temporary), fsync=fsync)
        if seal is not None:
            seal.merged(target, old)
        for each in old:
            each.path.unlink(missing_ok=True)
    except FileNotFoundError:
        return False  # retention has removed a segment meanwhile
    except (OSError, pa.ArrowInvalid, StoreError) as error:
        bad.update(each.path for each in group if not isinstance(error, OSError))
        _LOG.warning("%s: folding %d segments of windows: %s", root, len(group), error)
        return False
    finally:
        pa.default_memory_pool().release_unused()
    return True


def _joined(root: Path, group: Sequence[SegmentFile], *, seal: StoreSeal | None, bad: set[Path], fsync: bool) -> bool:
    joined = segments.segment(
        root, wide.TABLE, group[0].hour, group[0].first, group[-1].last, sum(each.rows for each in group)
    )

    def write(temporary: Path) -> None:
        for each in group:
            if why := mismatch(each.path):
                raise StoreError(f"{each.path}: damaged: {why}")
            if seal is not None:
                seal.check(each)
        wide.join(group, temporary)

    def written() -> None:
        if seal is not None:
            seal.merged(joined, group)

    try:
        segments.replace_covered(joined, group, write, fsync=fsync, written=written)
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowInvalid, StoreError, ValueError) as error:
        bad.update(each.path for each in group if not isinstance(error, OSError))
        _LOG.warning("%s: joining %d segments of wide windows: %s", root, len(group), error)
        return False
    finally:
        pa.default_memory_pool().release_unused()
    return True
