"""Whether a store's segments are what was written: all tables, every byte and every row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from storage import checksum, segments
from storage.query import StoreReader
from storage.segments import SegmentFile


@dataclass(slots=True)
class CheckedTable:
    """The live segments of one table."""

    table: str
    segments: int = 0
    rows: int = 0
    """By the segments' names."""
    bytes: int = 0
    without_checksum: int = 0
    """Segments of a MACE that wrote none: damage that leaves them readable is not found."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Segments that are damaged, and how."""


def check(path: Path) -> list[CheckedTable]:
    """Read all live segments of a store. Raises `StoreError` for what is no store, or of another version."""
    store = StoreReader(path)
    return [_checked(table, store.segments(table)) for table in segments.TABLES]


def damage(segment: SegmentFile) -> str:
    """Why a segment cannot be trusted; empty if it can. Reads all of it. FileNotFoundError passes."""
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
            continue  # merged or retired meanwhile: its rows are in another segment, or meant to be gone
        told.segments += 1
        told.rows += each.rows
        told.bytes += size
        told.without_checksum += not summed
        if why:
            told.damaged[each.path] = why
    return told
