import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from contracts.figures import Distribution
from contracts.schema import Segment
from storage import embedded, folding, query, segments, wide
from storage.check import check
from storage.query import Filter, StoreReader
from storage.segments import HOUR_NS, segment
from tests.made_results import header
from tests.unit.storage.stored import BEGIN_NS, write_run

pytestmark = pytest.mark.slow

NS = 1_000_000_000


def folded(path):
    """Make the wide windows of all hours but the newest, as the next writer does."""
    return folding.fold_windows(path, None, 1 << 40, fsync=False)


@pytest.fixture(scope="module", params=[True, False], ids=["rows", "windows"])
def stores(request, tmp_path_factory):
    """A store with wide windows, and the same without: a run that ended, one that was killed, and one that goes on."""
    path = tmp_path_factory.mktemp("wide") / "store"
    asyncio.run(write_run(path, "a", rows=request.param))
    asyncio.run(write_run(path, "b", rows=request.param, seed=1, ends="killed", hours=3, begin_ns=BEGIN_NS + 40 * NS))
    asyncio.run(write_run(path, "c", rows=request.param, seed=2, ends="killed", begin_ns=BEGIN_NS + 5 * HOUR_NS))
    folded(path)
    without = path.with_name("without")
    shutil.copytree(path, without)
    remove_wide(without)
    return path, without


def remove_wide(path):
    for table in segments.DAILY:
        shutil.rmtree(path / table)


def told(groups):
    return {
        key: (d.count, d.sum_ns, d.min_ns, d.max_ns, *(each.tolist() for each in d.histogram()))
        for key, d in groups.items()
    }


RANGES = [
    (None, None),
    (BEGIN_NS + 59 * NS + 5, BEGIN_NS + 5 * HOUR_NS - 1),
    (BEGIN_NS + HOUR_NS, BEGIN_NS + 3 * HOUR_NS),
    (BEGIN_NS + 1234 * NS, None),
    (BEGIN_NS + 4321, BEGIN_NS + 4321 + 50 * 60 * NS),
    (BEGIN_NS + 5 * NS, BEGIN_NS + 5 * NS + 3 * NS),
]


@pytest.mark.slow
def test_wide_windows_change_no_figure(readers):
    with_, without = readers
    for since_until in RANGES:
        where = Filter(*since_until)
        by = ("container", "device", "direction", "segment", "source")
        assert told(with_.grouped(where, by, segments=tuple(Segment))) == told(
            without.grouped(where, by, segments=tuple(Segment))
        )
        over = with_.over_time(where, points=5, whole=True)
        assert told(over.whole) == told(without.grouped(where))
        assert told(over.whole) == told(
            {group: sum(each.values(), Distribution()) for group, each in over.groups.items()}
        )
    for where in (Filter(), Filter(*RANGES[1], container="c1")):
        assert with_.summary(where).as_dict() == without.summary(where).as_dict()
        assert told(with_.grouped(where)) == told(without.grouped(where))


@pytest.fixture
def readers(stores):
    """Return readers of both stores, which keep their connections."""
    found = [StoreReader(each) for each in stores]
    for each in found:
        each.keep(1)
    yield found
    for each in found:
        each.close()


def test_stretches_are_those_of_the_windows(readers):
    """Each stretch has the delays that began in it, also where hours stand for windows."""
    with_, without = readers
    over = with_.over_time(Filter(run="a"), points=3)
    assert over.width_ns % (60 * NS) == 0
    for group, stretches in over.groups.items():
        for at, delays in stretches.items():
            begin = over.first_utc_ns + at * over.width_ns
            where = Filter(begin, begin + over.width_ns, run="a")
            assert told({0: delays}) == told({0: without.grouped(where)[group]})


def test_a_long_range_reads_wide_windows(stores, monkeypatch):
    """Of windows, only those at the ends of the range and beside the wide ones are read."""
    reader = StoreReader(stores[0])
    read = []
    monkeypatch.setattr("storage.query.relation", spied(read))
    found = reader.grouped(Filter(BEGIN_NS + 10 * NS, BEGIN_NS + 5 * HOUR_NS, run="a"))
    assert sum(each.count for each in found.values())
    tables = [each.table for each in read]
    assert {"hours", "ten_minutes", "minutes"} <= set(tables)
    assert {each.hour for each in read if each.table == "windows"} <= {BEGIN_NS // HOUR_NS, BEGIN_NS // HOUR_NS + 5}


def spied(read):
    real = query.relation

    def relation(connection, table, found, **options):
        read.extend(found)
        return real(connection, table, found, **options)

    return relation


def test_names_and_ends_come_from_the_footer(stores):
    with_, without = map(StoreReader, stores)
    assert with_.containers() == without.containers()
    pieces = with_.segments(wide.STANDING)
    assert {each.hour for each in pieces} == {BEGIN_NS // HOUR_NS - 21, BEGIN_NS // HOUR_NS + 3}
    both = wide.About()
    for each in pieces:
        both |= wide.About.of(each.path)
    known = {key: end for key, end in both.ends.items() if key[1] == "a"}
    assert known.keys() == {("testhost", "a", 1), ("testhost", "a", 10)}


def test_every_table_has_all_delays(stores):
    counted = []
    for width_s, table in wide.TABLES.items():
        paths = [each.path for each in StoreReader(stores[0]).segments(table)]
        rows = pd.concat([pq.read_table(path).to_pandas() for path in paths])
        assert set(rows.width_s) == {width_s}
        counted.append(rows.groupby(["container", "device", "direction", "segment"])["count"].sum().to_dict())
        assert (rows["counts"].map(sum) == rows["count"]).all()
        assert (rows.time.dt.as_unit("ns").astype("int64") % (width_s * NS) == 0).all()
        assert ((rows.p50_ns >= rows.min_ns) & (rows.p50_ns <= rows.max_ns)).all()
        # Row groups have one segment each, by which readers skip them.
        for file in map(pq.ParquetFile, paths):
            for index in range(file.num_row_groups):
                assert len(file.read_row_group(index, columns=["segment"])["segment"].unique()) == 1
    assert counted[0] == counted[1] == counted[2]


def test_the_check_reads_wide_windows(stores):
    found = {each.table: each for each in check(stores[0])}
    assert found["hours"].segments == found["minutes"].segments >= 2
    assert not found["hours"].damaged


def copied(stores, tmp_path):
    return shutil.copytree(stores[0], tmp_path / "store")


@pytest.mark.parametrize("table", segments.DAILY)
def test_damaged_wide_windows_do_not_count(stores, tmp_path, table):
    path = copied(stores, tmp_path)
    where = Filter(BEGIN_NS + 10 * NS, BEGIN_NS + 5 * HOUR_NS + 10 * NS)
    expected = told(StoreReader(path).grouped(where))
    for each in segments.listing(path, table):
        data = bytearray(each.path.read_bytes())
        data[len(data) // 2] ^= 1
        each.path.write_bytes(data)
    assert told(StoreReader(path).grouped(where)) == expected
    assert {each.table for each in check(path) if each.damaged} == {table}


def test_windows_beside_and_removed_ones_are_told_apart(stores, tmp_path):
    """Hours that retention has removed do not come back from the wide windows of their day."""
    path = copied(stores, tmp_path)
    first = BEGIN_NS // HOUR_NS
    for table in segments.PARTITIONED:
        shutil.rmtree(segments.partition(path, table, first), ignore_errors=True)
    without = shutil.copytree(path, tmp_path / "without")
    remove_wide(without)
    assert told(StoreReader(path).grouped()) == told(StoreReader(without).grouped())
    assert told(StoreReader(path).grouped(source="windows")) == told(StoreReader(without).grouped(source="windows"))


def test_retention_removes_a_day_with_its_last_hour(stores, tmp_path):
    path = copied(stores, tmp_path)
    newest = max(each.path.stat().st_mtime for each in segments.listing(path, "windows"))
    size = sum(each.stat().st_size for each in path.rglob("*.parquet"))
    removed, left = segments.Removed(), []
    for limit in (size - 1, size // 2, 1):
        removed += segments.retain(path, newest, None, limit)
        days = {wide.day_of(each) for table in segments.PARTITIONED for each in segments.listing(path, table)}
        left.append({each.hour for each in segments.listing(path, wide.STANDING)})
        assert left[-1] == days
    assert [len(each) for each in left] == [2, 1, 1]
    assert not (path / wide.STANDING / "day=2025-06-15").exists()
    assert removed.segments


def test_an_interrupted_writer_leaves_what_the_next_one_makes(stores, tmp_path):
    path = copied(stores, tmp_path)
    expected = told(StoreReader(path).grouped())
    first = segments.listing(path, wide.STANDING)[0]
    first.path.rename(first.path.with_name(first.path.name + ".tmp"))
    assert told(StoreReader(path).grouped()) == expected
    segments.remove_leftovers(path)
    assert folded(path) >= 1
    assert folded(path) == 0
    again = segments.listing(path, wide.STANDING)[0]
    assert (again.hour, again.first, again.last) == (first.hour, first.first, first.last)
    assert told(StoreReader(path).grouped()) == expected


def test_an_older_store_gets_its_wide_windows_little_by_little(stores, tmp_path, monkeypatch):
    """A writer makes those of months in many rounds, so that the measurement keeps its cores."""
    path = shutil.copytree(stores[1], tmp_path / "store")
    monkeypatch.setattr(wide, "_MOST_ROWS", 1)
    monkeypatch.setattr(embedded, "FOLDING_S", 0.0)

    async def rounds():
        sink = embedded.EmbeddedStore(path, fsync=False, flush_interval_s=60.0)
        await sink.open(header("d"))
        counts = []
        while len(counts) < 2 or counts[-1] != counts[-2]:
            sink.merge()
            counts.append(len(segments.listing(path, wide.STANDING)))
        await sink.aclose()
        return counts

    counts = asyncio.run(rounds())
    assert counts[0] == 1
    assert counts[-1] > 1
    assert told(StoreReader(path).grouped()) == told(StoreReader(stores[1]).grouped())


def made(*bounds, hour=0, table="windows", root=Path("/store")):
    return [segment(root, table, hour, first, last, 10) for first, last in bounds]


def test_a_wide_segment_counts_unless_windows_are_partly_within_it():
    windows = made((1, 5), (6, 9)) + made((10, 12), hour=1)
    [piece] = made((1, 9), table=wide.STANDING)
    found = wide.cover(windows, [piece])
    assert (found.wide, list(found.covered), found.others) == ([piece], windows[:2], windows[2:])
    straddling = [*windows[:1], *made((6, 10))]
    found = wide.cover(straddling, [piece])
    assert (found.wide, found.others) == ([], straddling)
    # Of overlapping ones, one counts.
    both = made((1, 9), (6, 12), table=wide.STANDING)
    found = wide.cover(windows, both)
    assert (found.wide, found.others) == (both[:1], windows[2:])
    # Another day's windows have nothing to do with it, and without windows it shows nothing.
    assert wide.cover(made((6, 10), hour=24), [piece]).wide == []
    assert wide.cover([], [piece]).wide == []


def test_what_is_folded():
    past, newest = made((1, 5), (6, 9)), made((10, 12), hour=1)
    assert wide.to_fold([*past, *newest], [], 100, 1) == [past]
    assert wide.to_fold([*past, *newest], [], 8, 1) == []
    assert wide.to_fold([*past, *newest], [], 100, 1, [past[0].path]) == []
    assert wide.to_fold([*past, *newest], made((1, 9), table=wide.STANDING), 100, 1) == []
    # Windows whose flushes overlap belong together, also those of the newest hour.
    late = made((6, 11))
    assert wide.to_fold([*past[:1], *late, *newest], [], 100, 1) == [[*past[:1], *late, *newest]]
    # Hours with many windows are folded apart, which bounds the memory.
    third = made((13, 14), hour=2)
    assert wide.to_fold([*past, *newest, *third], [], 100, 2) == [[*past, *newest]]
    large = [replace(each, rows=1 << 16) for each in past]
    assert wide.to_fold([*large, *newest, *third], [], 100, 2) == [large, newest]


def test_what_is_joined():
    pieces = made((1, 5), (6, 9), table=wide.STANDING)
    windows = made((1, 5), (6, 9))
    assert wide.to_join(windows, pieces, 23) == []
    assert wide.to_join(windows, pieces, 24) == [pieces]
    assert wide.to_join(made((1, 3), (6, 9), (4, 5)), pieces, 24) == [pieces]
    assert wide.to_join([*windows, *made((10, 11))], pieces, 24) == [pieces]
    assert (
        wide.to_join(made((1, 5), (7, 9)) + made((6, 6), hour=1), made((1, 5), (7, 9), table=wide.STANDING), 24) == []
    )


def test_merging_keeps_to_the_bounds_of_wide_segments():
    windows = made(*((n, n) for n in range(1, 9)), (20, 20)) + made((30, 30), hour=1)
    assert segments.mergeable(windows, ends=[4]) == [windows[:4], windows[4:9]]
    assert segments.mergeable(windows) == [windows[:9]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0, 3600, 3600), [(3600, 0, 3600)]),
        ((10, 3700, 3600), [(10, 10, 60), (60, 60, 600), (600, 600, 3600), (60, 3600, 3660), (10, 3660, 3700)]),
        ((3590, 7210, 3600), [(10, 3590, 3600), (3600, 3600, 7200), (10, 7200, 7210)]),
        ((10, 50, 3600), [(10, 10, 50)]),
        ((0, 1200, 60), [(60, 0, 1200)]),
    ],
)
def test_spans(given, expected):
    low, high, widest_s = given
    found = wide.spans(low * NS, high * NS, widest_s)
    assert [(width, begin // NS, end // NS) for width, begin, end in found] == expected
