"""Checks all segments of a store against their checksums, and reads every row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from storage import checksum, segments
from storage.query import StoreReader
from storage.segments import SegmentFile


@dataclass(slots=True)
class CheckedTable:
    """The result of checking the live segments of one table."""

    table: str
    segments: int = 0
    rows: int = 0
    """Number of rows by the segments' names."""
    bytes: int = 0
    without_checksum: int = 0
    """Number of segments by older versions without checksums, in which damage that stays readable is not found."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Damaged segments, with a description of the damage."""


def check(path: Path) -> list[CheckedTable]:
    """Check all live segments of a store. Raises `StoreError` if `path` is no store, or one of another version."""
    store = StoreReader(path)
    return [_checked(table, store.segments(table)) for table in segments.TABLES]


def damage(segment: SegmentFile) -> str:
    """Read a whole segment; returns a description of its damage, "" if there is none. FileNotFoundError passes."""
    if why := checksum.damage(segment.path):
        return why
    rows = pq.read_metadata(segment.path).num_rows
    return "" if rows == segment.rows else f"it has {rows:,} rows, its name promises {segment.rows:,}"


def _checked(table: str, found: list[SegmentFile]) -> CheckedTable:
    told = CheckedTable(table)
    for each in found:
        try:
            size, summed, why = each.path.stat().st_size, checksum.bears_sum(each.path), damage(each)
        except FileNotFoundError:
            continue  # merged or removed by retention meanwhile: its rows are in another segment, or gone on purpose
        told.segments += 1
        told.rows += each.rows
        told.bytes += size
        told.without_checksum += not summed
        if why:
            told.damaged[each.path] = why
    return told
