"""Joined Parquet files have the rows of all, with their pages as they were, for every reader and table."""

import io
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.windowtable import WindowTable
from storage import segments, tables
from storage.checksum import bears_sum, mismatch, mismatch_of
from storage.embedded import EmbeddedStore
from storage.joining import Joiner, NotAlike
from storage.query import StoreReader
from tests.made_results import HEADER, make_delays, make_results, make_windows, topology
from tests.unit.storage.stored import fill

CONTAINERS = 3


def delays(packets, seed=0):
    return tables.delays_table(HEADER, make_delays(packets, seed=seed, containers=CONTAINERS), topology(CONTAINERS))


def windows(packets, seed=0):
    made = WindowTable.of(make_windows(make_delays(packets, seed=seed, containers=CONTAINERS)))
    return tables.windows_table(HEADER, made, topology(CONTAINERS))


def encoded(rows, table, row_group_rows=tables.ROW_GROUP_ROWS):
    return tables.encode(rows, table, row_group_rows).to_pybytes()


def joined(table, files):
    sink = io.BytesIO()
    with Joiner(sink, tables.nothing_encoded(table)) as joiner:
        for each in files:
            joiner.add(each)
    assert joiner.rows == pq.read_metadata(io.BytesIO(sink.getvalue())).num_rows
    return sink.getvalue()


def read(data):
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True)


def pages(data):
    return data[4 : -8 - int.from_bytes(data[-8:-4], "little")]


@pytest.mark.parametrize(("table", "made"), [("delays", delays), ("windows", windows)])
def test_joined_files_are_read_as_all_of_them(tmp_path, table, made):
    """Also files with many row groups, without rows, and joined ones joined again; 40 lists of the footer are long."""
    several = [(1, 1 << 18), (400, 30), (0, 1 << 18), (90, 1 << 18)]
    rows = [made(packets, seed) if packets else made(1).slice(0, 0) for seed, (packets, _) in enumerate(several)]
    files = [encoded(each, table, groups) for each, (_, groups) in zip(rows, several, strict=True)]
    whole = joined(table, [joined(table, files[:2]), *files[2:]])
    assert mismatch_of(whole) == ""
    assert pages(whole) == b"".join(map(pages, files))
    assert read(whole).equals(pa.concat_tables([read(each) for each in files]))
    assert read(whole).schema.equals(read(tables.nothing_encoded(table)).schema, check_metadata=True)

    (tmp_path / "whole.parquet").write_bytes(whole)
    (tmp_path / "plain.parquet").write_bytes(encoded(pa.concat_tables(rows).unify_dictionaries(), table))
    with duckdb.connect() as connection:
        found, wanted = (
            connection.execute(f"SELECT * FROM '{tmp_path / name}.parquet'").fetchall() for name in ("whole", "plain")
        )
    assert found == wanted
    assert pl.read_parquet(whole).equals(pl.read_parquet(tmp_path / "plain.parquet"))


def test_files_that_are_not_alike_are_refused_before_anything_is_written():
    sound = encoded(delays(20), "delays")
    rows = delays(20)
    # A field of another version of Parquet, as an unknown writer could have written it.
    foreign = io.BytesIO()
    pq.write_table(rows, foreign, write_page_index=True)
    refused = [
        encoded(windows(20), "windows"),
        encoded(rows.drop_columns(["waited"]), "delays"),
        foreign.getvalue(),
        b"",
        sound[: len(sound) // 2],
        sound[:-12] + b"\xff" * 4 + sound[-8:],
        b"PAR1" + b"\xff" * 4 + b"PAR1",
    ]
    sink = io.BytesIO()
    with Joiner(sink, tables.nothing_encoded("delays")) as joiner:
        joiner.add(sound)
        for each in refused:
            with pytest.raises(NotAlike):
                joiner.add(each)
        joiner.add(sound)
    assert pages(sink.getvalue()) == 2 * pages(sound)
    assert read(sink.getvalue()).num_rows == 2 * rows.num_rows


@pytest.mark.slow
def test_merging_moves_large_segments_and_encodes_small_ones_once(tmp_path, monkeypatch):
    """A segment without a checksum is decoded instead, because its damage would get a valid checksum."""
    monkeypatch.setattr(segments, "MOVED_ROWS", 500)
    sizes = [100, 3, 4, 120, 110, 5, 130]  # packets, 6 or 7 rows each
    for run, packets in enumerate(sizes):
        fill(tmp_path, [make_results(make_delays(packets, seed=run))], f"run-{run}")
    before = StoreReader(tmp_path).delays()
    each = {s.first: s for s in segments.listing(tmp_path, "delays")}
    assert len(each) == len(sizes)
    large = [s for s in each.values() if s.rows >= 500]
    assert len(large) == 4
    unsummed, *moved = large
    rows = pq.read_table(unsummed.path, partitioning=None)
    pq.write_table(rows.cast(tables.STORED_SCHEMAS["delays"]), unsummed.path)
    assert not bears_sum(unsummed.path)
    kept = [pages(s.path.read_bytes()) for s in moved]

    # A later hour makes this one past, so that it is merged whatever its number of segments.
    newest = segments.segment(tmp_path, "delays", large[0].hour + 1, 999, 999, 1).path
    newest.parent.mkdir(parents=True)
    newest.write_bytes(encoded(delays(1).slice(0, 1), "delays"))
    sink = EmbeddedStore(tmp_path, fsync=False)
    assert sink.merge() >= len(sizes) - 1
    newest.unlink()
    [merged] = segments.listing(tmp_path, "delays")
    data = Path(merged.path).read_bytes()
    assert mismatch(merged.path) == ""
    assert [data.count(each) for each in kept] == [1, 1, 1]
    # The unsummed segment with the two small ones behind it, two moved ones, a small one, a moved one.
    assert pq.read_metadata(merged.path).num_row_groups == 5
    assert StoreReader(tmp_path).delays().equals(before)
