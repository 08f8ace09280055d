import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import StoreError
from storage import segments
from storage.segments import FAN_IN, FULL_ROWS, HOUR_NS, MERGED_ROWS, SegmentFile, listing, mergeable, partition, retain

HOUR = 486_111  # 2025-06-15 15:00 UTC


def put(root, table, hour, first, last, rows=1, *, size=1, mtime=None):
    found = segments.segment(root, table, hour, first, last, rows)
    segments.write_whole(found.path, segments.write_bytes(memoryview(b"x" * size)), fsync=False)
    if mtime is not None:
        os.utime(found.path, (mtime, mtime))
    return found


def test_partitions_are_hives(tmp_path):
    assert partition(tmp_path, "delays", HOUR) == tmp_path / "delays" / "day=2025-06-15" / "hour=15"
    assert partition(tmp_path, "runs", segments.NO_HOUR) == tmp_path / "runs"


@pytest.mark.parametrize("hour", [-2, 10**9])
def test_a_time_outside_the_calendar_is_an_error(tmp_path, hour):
    with pytest.raises(StoreError, match="clock"):
        partition(tmp_path, "delays", hour)


def test_listing_is_in_the_order_of_time_then_of_writing(tmp_path):
    made = [put(tmp_path, "delays", h, n, n) for h, n in ((HOUR + 1, 3), (HOUR, 2), (HOUR, 1), (HOUR - 30, 4))]
    assert listing(tmp_path, "delays") == sorted(made)
    assert listing(tmp_path, "windows") == []


def test_listing_leaves_out_other_hours(tmp_path):
    for hour in range(HOUR - 40, HOUR + 40):
        put(tmp_path, "delays", hour, 1, 1)
    found = listing(tmp_path, "delays", HOUR * HOUR_NS + 5, (HOUR + 2) * HOUR_NS)
    assert [s.hour for s in found] == [HOUR, HOUR + 1]
    assert [s.hour for s in listing(tmp_path, "delays", (HOUR + 39) * HOUR_NS)] == [HOUR + 39]


def test_covered_segments_do_not_count(tmp_path):
    small = [put(tmp_path, "delays", HOUR, n, n) for n in range(1, 10)]
    middle = put(tmp_path, "delays", HOUR, 3, 5, 3)
    elsewhere = put(tmp_path, "delays", HOUR + 1, 4, 4)
    assert listing(tmp_path, "delays") == [*small[:2], middle, *small[5:], elsewhere]
    whole = put(tmp_path, "delays", HOUR, 1, 9, 9)
    assert listing(tmp_path, "delays") == [whole, elsewhere]
    assert listing(tmp_path, "delays", covered=True) == sorted([*small, middle], key=lambda s: (s.first, -s.last))


def test_leftovers_go_and_live_segments_stay(tmp_path):
    live = [put(tmp_path, "delays", HOUR, 1, 4), put(tmp_path, "runs", segments.NO_HOUR, 1, 1)]
    put(tmp_path, "delays", HOUR, 2, 2)
    (live[0].path.parent / "000000000009-000000000009.5.parquet.tmp").write_bytes(b"half")
    assert segments.remove_leftovers(tmp_path) == 2
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(s.path for s in live)


def test_foreign_files_are_ignored(tmp_path):
    put(tmp_path, "delays", HOUR, 1, 1)
    strange = [
        tmp_path / "delays" / "day=nonsense" / "hour=01" / "x.parquet",
        tmp_path / "delays" / "day=2025-06-15" / "hour=99" / "000000000001-000000000001.1.parquet",
        tmp_path / "delays" / "day=2025-06-15" / "hour=15" / "notes.txt",
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "delays" / "stray-file").write_bytes(b"")
    assert len(listing(tmp_path, "delays")) == 1
    segments.remove_leftovers(tmp_path)
    assert all(p.exists() for p in strange)


def test_a_failed_write_leaves_nothing(tmp_path):
    def write(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        segments.write_whole(tmp_path / "a" / "x.parquet", write, fsync=True)
    assert list((tmp_path / "a").iterdir()) == []


def test_flush_numbers_only_grow(tmp_path):
    assert segments.next_flush(tmp_path) == 1
    put(tmp_path, "delays", HOUR, 3, 17)
    put(tmp_path, "ledger", HOUR, 18, 18)
    assert segments.next_flush(tmp_path) == 19


def made(rows, hour=HOUR, first=1):
    return [
        SegmentFile("delays", hour, first + i, first + i, n, segments.Path(f"{hour}/{first + i}"))
        for i, n in enumerate(rows)
    ]


def test_the_newest_hour_waits_for_enough_small_segments():
    assert mergeable(made([10] * (FAN_IN - 1))) == []
    assert mergeable(made([10] * FAN_IN)) == [made([10] * FAN_IN)]


def test_a_past_hour_is_merged_at_once():
    past, newest = made([10, 20]), made([10], HOUR + 1, 3)
    assert mergeable([*past, *newest]) == [past]
    assert mergeable([*made([10]), *newest]) == []


def test_large_segments_are_not_merged():
    assert mergeable([*made([FULL_ROWS] * 100), *made([1], HOUR + 1, 101)]) == []
    mixed = made([5, 5, FULL_ROWS, 5, 5])
    assert mergeable([*mixed, *made([1], HOUR + 1, 10)]) == [mixed[:2], mixed[3:]]


def test_a_group_is_no_larger_than_a_merged_segment_may_be():
    rows = [FULL_ROWS - 1] * 20
    groups = mergeable([*made(rows), *made([1], HOUR + 1, 100)])
    assert sum(map(len, groups)) == 20
    assert all(sum(s.rows for s in g) <= MERGED_ROWS for g in groups)
    # In an hour that may still grow, a full group is merged at once.
    assert mergeable(made(rows))[0] == made(rows)[: MERGED_ROWS // FULL_ROWS]


def test_a_damaged_segment_is_not_merged():
    five = made([1] * 5)
    assert mergeable([*five, *made([1], HOUR + 1, 9)], [five[2].path]) == [five[:2], five[3:]]


@pytest.mark.slow
def test_merging_repeatedly_ends():
    live = made([100] * 5000) + made([1], HOUR + 1, 9000)
    for _ in range(50):
        groups = mergeable(live)
        if not groups:
            break
        for g in groups:
            live = [s for s in live if s not in g]
            live.append(SegmentFile("delays", HOUR, g[0].first, g[-1].last, sum(s.rows for s in g), g[0].path))
        live.sort()
    assert mergeable(live) == []
    assert sum(s.rows for s in live) == 500_001


def test_retention_by_age_counts_from_the_writing(tmp_path):
    old = put(tmp_path, "delays", HOUR - 1, 1, 1, 5, mtime=1000)
    replayed = put(tmp_path, "delays", HOUR - 5000, 2, 2, mtime=5000)
    newest = put(tmp_path, "windows", HOUR, 3, 3, mtime=1000)
    removed = retain(tmp_path, 5000, 3600, None)
    assert (removed.segments, removed.rows, removed.bytes) == (1, 5, 1)
    assert not old.path.exists()
    assert not old.path.parent.exists()
    assert replayed.path.exists()
    assert newest.path.exists(), "the newest hour stays, however old"


def test_retention_by_size_takes_the_oldest_hours_of_all_tables(tmp_path):
    for n in range(10):
        for table in segments.PARTITIONED:
            put(tmp_path, table, HOUR + n, n, n, size=100)
    put(tmp_path, "runs", segments.NO_HOUR, 1, 1, size=100)
    tables = len(segments.PARTITIONED)
    removed = retain(tmp_path, 0, None, 3 * 100 * tables + 50)
    assert removed.segments == 7 * tables
    assert [s.hour for s in listing(tmp_path, "delays")] == [HOUR + 7, HOUR + 8, HOUR + 9]
    assert retain(tmp_path, 0, None, 0).segments == 2 * tables
    assert [s.hour for s in listing(tmp_path, "ledger")] == [HOUR + 9]
    assert len(listing(tmp_path, "runs")) == 1


@pytest.mark.slow
def test_a_reader_sees_every_row_once_while_segments_are_merged(tmp_path):
    """While a writer merges continuously, each listing has flushes 1 to n once. The test makes a few hundred changes a
    second, a hundred times as many as a store: at much higher rates a listing gives up.

    A few hundred changes a second, a hundred times what a store makes: a listing gives up on many more.
    """
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            seen = [n for s in listing(tmp_path, "delays") for n in range(s.first, s.last + 1)]
            if seen != list(range(1, len(seen) + 1)):
                wrong.append(seen)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    live = []
    for n in range(1, 400):
        live.append(put(tmp_path, "delays", HOUR, n, n))
        time.sleep(0.004)
        if n % 8 == 0:
            merged = segments.segment(tmp_path, "delays", HOUR, live[-8].first, n, 8)
            segments.replace_covered(merged, live[-8:], lambda t: t.write_bytes(b"x"), fsync=False)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_windows_are_merged_by_size():
    """One segment of an hour's windows could take a gigabyte, merged again with each minute of the hour."""
    weight = segments.ROW_WEIGHT["windows"]
    heavy = [replace(each, table="windows") for each in made([FULL_ROWS // weight] * 100)]
    assert mergeable([*heavy, *(replace(each, table="windows") for each in made([1], HOUR + 1, 101))]) == []
    assert len(mergeable(made([FULL_ROWS // weight] * 100))) == 1


NOW_S = (HOUR * 3600) + 1_800


def kept(root):
    return [s.hour for s in listing(root, "delays")]


@pytest.mark.parametrize("ahead", [2, 30 * 24, 166 * 8_766])
def test_future_hours_are_removed_first(tmp_path, ahead):
    honest = [put(tmp_path, "delays", HOUR - n, n + 1, n + 1, size=100, mtime=NOW_S) for n in range(5)]
    for n in range(20):
        put(tmp_path, "delays", HOUR + ahead + n, 10 + n, 10 + n, size=100, mtime=NOW_S)
    assert retain(tmp_path, NOW_S, None, 700).segments == 18
    assert kept(tmp_path) == sorted({s.hour for s in honest} | {HOUR + ahead, HOUR + ahead + 1})
    retain(tmp_path, NOW_S, None, 500)
    assert kept(tmp_path) == sorted(s.hour for s in honest)
    retain(tmp_path, NOW_S, None, 0)
    assert kept(tmp_path) == [HOUR], "the hour of this machine's clock stays"


def test_hours_of_a_slow_clock_are_removed_first(tmp_path):
    honest = [put(tmp_path, "delays", HOUR - n, n + 1, n + 1, size=100, mtime=NOW_S - 3_600 * n) for n in range(5)]
    put(tmp_path, "delays", 300_000, 20, 20, size=10_000, mtime=NOW_S)
    retain(tmp_path, NOW_S, None, 500)
    assert kept(tmp_path) == sorted(s.hour for s in honest)


def test_a_clock_set_back_removes_no_present_hour(tmp_path):
    for n in range(5):
        put(tmp_path, "delays", HOUR - n, n + 1, n + 1, size=100, mtime=NOW_S - 3_600 * n)
    retain(tmp_path, 0, None, 200)
    assert kept(tmp_path) == [HOUR - 1, HOUR]


@given(st.lists(st.integers(-(1 << 61), 1 << 61), max_size=50))
def test_rows_by_hour_are_all_rows_each_in_its_hour_and_in_order(times):
    time_ns = np.array(times, np.int64)
    found = segments.by_hour(time_ns)
    rows = [(hour, index) for hour, chosen in found for index in (range(len(times)) if chosen is None else chosen)]
    assert rows == sorted((t // HOUR_NS, index) for index, t in enumerate(times))
