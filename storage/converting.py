"""Writes a store's old segments anew, so that programs that know no time in nanoseconds read them: Apache Spark.

Files of schema version 1 have nanoseconds in `time`, later ones microseconds and a remainder (`storage.tables`). A
segment is replaced as a whole, under its name, by one with equal rows: a crash leaves the old one or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import StoreError
from contracts.schema import SCHEMA_VERSION
from storage import segments, tables
from storage.check import damage
from storage.checksum import SegmentWriter
from storage.embedded import ABOUT, check_schema, lock_store
from storage.ownership import open_new
from storage.sealing.places import has_seal
from storage.segments import SegmentFile


@dataclass(slots=True)
class ConvertedTable:
    """The result of converting the live segments of one table."""

    table: str
    converted: int = 0
    """Number of segments that were written anew."""
    rows: int = 0
    """Number of their rows."""
    current: int = 0
    """Number of segments that had the columns of today."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Damaged segments, which stay as they are, with a description of the damage."""


def convert(root: Path) -> list[ConvertedTable]:
    """Convert all live segments of a store. May be interrupted and called again.

    Raises `StoreError` if `root` is no store, is sealed or is being written, or if a segment cannot be written.
    """
    known = check_schema(root)
    if not known:
        raise StoreError(f"{root}: not a MACE store")
    if has_seal(root):
        raise StoreError(
            f"{root}: the store is sealed, and its seal states the bytes of every segment: copy the store without the"
            " folder `seal`, and convert the copy"
        )
    if (root / segments.UNFINISHED / "plan.json").exists():
        raise StoreError(f"{root}: a replay was stopped here; finish it with `mace replay --resume`, then convert")
    lock = lock_store(root, "mace store convert")
    try:
        if known < SCHEMA_VERSION:
            # First, so that no older MACE misreads what follows.
            segments.write_whole(root / "store.json", segments.write_bytes(memoryview(ABOUT)), fsync=True)
        segments.remove_leftovers(root)
        return [_converted(root, table) for table in segments.TABLES]
    except OSError as error:
        raise StoreError(f"{root}: cannot convert: {error.strerror or error}; what is converted stays so") from error
    finally:
        os.close(lock)


def _converted(root: Path, table: str) -> ConvertedTable:
    told = ConvertedTable(table)
    for each in segments.listing(root, table):
        if why := damage(each):
            told.damaged[each.path] = why
        elif tables.REMAINDER in pq.read_schema(each.path).names:
            told.current += 1
        else:
            _rewrite(each)
            told.converted += 1
            told.rows += each.rows
    return told


def _rewrite(segment: SegmentFile) -> None:
    written = segment.path.stat()
    most = segments.MERGE_BATCH_ROWS // segments.ROW_WEIGHT[segment.table]

    def write(temporary: Path) -> None:
        rows, schema = 0, tables.to_stored(tables.SCHEMAS[segment.table].empty_table()).schema
        options = tables.parquet_options(segment.table)
        with open_new(temporary) as sink, SegmentWriter(sink, schema, **options) as writer:
            for batch in _decoded(segment, most):
                writer.write(tables.to_stored(batch).select(schema.names).cast(schema), most)
                rows += len(batch)
        if rows != segment.rows:
            raise StoreError(f"{segment.path}: {rows:,} rows were read, its name promises {segment.rows:,}")
        # Retention goes by the time of writing.
        os.utime(temporary, ns=(written.st_mtime_ns, written.st_mtime_ns))

    segments.write_whole(segment.path, write, fsync=True)


def _decoded(segment: SegmentFile, most: int) -> Iterator[pa.Table]:
    """Yield a segment's rows, at most `most` at a time, with the columns of today and one dictionary per name."""
    names = [each.name for each in tables.SCHEMAS[segment.table] if pa.types.is_dictionary(each.type)]
    with pq.ParquetFile(segment.path, read_dictionary=names) as file:
        for batch in file.iter_batches(batch_size=most, use_threads=False):
            yield tables.grown(pa.Table.from_batches([batch]), segment.table).unify_dictionaries()
