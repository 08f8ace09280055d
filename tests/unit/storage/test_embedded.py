import asyncio
import json
import multiprocessing
import os
import resource
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from contracts.errors import StoreError
from contracts.hooks import Hook
from contracts.ledger import Ledger
from contracts.schema import Delays, HookCost
from contracts.vitals import process_figures
from storage import segments, tables
from storage.embedded import EmbeddedStore
from storage.query import Filter, StoreReader
from tests.made_results import START_NS, header, make_delays, make_results, make_windows, topology, with_totals

HOUR_NS = segments.HOUR_NS


def store(path, **changes):
    return EmbeddedStore(path, **({"fsync": False, "flush_interval_s": 60.0} | changes))


async def flushed(sink):
    """Wait until all written rows are in segments."""
    await sink._submit()
    sink._encoding and await sink._encoding


async def fill(path, results, run="run-1", **changes):
    sink = store(path, **changes)
    await sink.open(header(run))
    for each in results:
        await sink.write(each)
    await sink.aclose()
    return sink


def rows_in(path, table="delays"):
    return sum(pq.read_metadata(s.path).num_rows for s in segments.listing(path, table))


def test_all_written_rows_are_stored(tmp_path):
    delays = make_delays(1000, containers=2)
    parts = [delays[i : i + 700] for i in range(0, len(delays), 700)]
    sink = asyncio.run(fill(tmp_path, [make_results(p, containers=2) for p in parts], flush_rows=1000))
    read = StoreReader(tmp_path).delays()
    assert len(read) == len(delays) == sink.rows_stored
    order = np.lexsort((delays.position, delays.packet))
    read = read.sort_by([("packet", "ascending"), ("position", "ascending")])
    assert read.column("delay_ns").to_numpy().tolist() == delays.delay_ns[order].tolist()
    assert read.column("time").cast("int64").to_numpy().tolist() == delays.utc_ns[order].tolist()


def test_rows_go_to_their_own_hours(tmp_path):
    delays = make_delays(500)
    delays.utc_ns[:] = START_NS + np.arange(len(delays)) * (HOUR_NS // 100)
    asyncio.run(fill(tmp_path, [make_results(delays)]))
    found = segments.listing(tmp_path, "delays")
    assert len(found) == len(delays) // 100 + 1
    for each in found:
        rows = tables.from_stored(pq.read_table(each.path, partitioning=None))
        hours = rows.column("time").cast("int64").to_numpy() // HOUR_NS
        assert set(hours) == {each.hour}
        assert len(hours) == each.rows
    assert rows_in(tmp_path) == len(delays)


def test_rows_appear_within_the_flush_interval(tmp_path):
    async def run():
        sink = store(tmp_path, flush_interval_s=0.05)
        await sink.open(header())
        await sink.write(make_results(make_delays(10)))
        while not segments.listing(tmp_path, "delays"):  # noqa: ASYNC110 (a directory has no event)
            await asyncio.sleep(0.01)
        seen = StoreReader(tmp_path).summary().packets
        await sink.aclose()
        return seen

    assert asyncio.run(asyncio.wait_for(run(), 30)) == 10


def test_results_without_rows_keep_the_ledger_going(tmp_path):
    empty = make_results(Delays.empty(), ledger=Ledger(records=7, unmatched=7), packets=0)
    asyncio.run(fill(tmp_path, [empty]))
    [run] = StoreReader(tmp_path).runs()
    assert run.ledger == Ledger(records=7, unmatched=7)
    assert run.closed


def test_a_run_without_any_results_is_there(tmp_path):
    asyncio.run(fill(tmp_path, []))
    [run] = StoreReader(tmp_path).runs()
    assert (run.run, run.ledger, run.packets) == ("run-1", Ledger(), 0)


def test_the_cost_of_observing_is_stored_at_the_end(tmp_path):
    """Each run stores its last cost once, for any number of flushes; the costs of runs add up."""
    for run, times in (("first", 1), ("second", 2)):
        said = [
            with_totals(
                make_results(make_delays(10)),
                cost=(HookCost(Hook.NETIF_RX, n * times * 100, n, n * 50), HookCost(Hook.KFREE_SKB, n, 0, 0)),
            )
            for n in (1, 2, 3)
        ]
        asyncio.run(fill(tmp_path, said, run=run, flush_rows=10))
    store_ = StoreReader(tmp_path)
    assert [s.rows for s in store_.segments("cost")] == [2, 2]
    netif_rx, kfree_skb = store_.summary().cost
    assert netif_rx == HookCost(Hook.NETIF_RX, 300 + 600, 6, 300)
    assert kfree_skb == HookCost(Hook.KFREE_SKB, 6, 0, 0)
    assert store_.cost(Filter(run="second"))[0].calls == 600


@pytest.mark.slow
def test_a_source_that_cannot_tell_its_cost_leaves_none(tmp_path):
    asyncio.run(fill(tmp_path, [make_results(make_delays(10))]))
    assert not (tmp_path / "cost").exists()
    assert StoreReader(tmp_path).summary().cost == ()
    assert "cost" not in StoreReader(tmp_path).summary().as_dict()


def test_windows_alone_can_be_kept(tmp_path):
    delays = make_delays(200)
    asyncio.run(fill(tmp_path, [make_results(delays, windows=make_windows(delays))], rows=False))
    assert segments.listing(tmp_path, "delays") == []
    assert rows_in(tmp_path, "windows") == len(make_windows(delays))


def test_the_buffer_is_bounded(tmp_path):
    async def run():
        sink = store(tmp_path, flush_rows=1000)
        await sink.open(header())
        most = 0
        for n in range(50):
            await sink.write(make_results(make_delays(100, first_packet=100 * n)))
            most = max(most, sink._buffered)
        await sink.aclose()
        return most

    assert asyncio.run(run()) < 1000


def test_a_second_writer_is_refused_with_the_first_ones_process(tmp_path):
    async def run():
        first, second = store(tmp_path), store(tmp_path)
        await first.open(header("first"))
        with pytest.raises(StoreError, match=rf"process {os.getpid()} on .*run first"):
            await second.open(header("second"))
        await first.aclose()
        await second.open(header("second"))
        await second.aclose()

    asyncio.run(run())
    assert [r.run for r in StoreReader(tmp_path).runs()] == ["first", "second"]


def test_the_same_run_is_not_stored_twice(tmp_path):
    asyncio.run(fill(tmp_path, [make_results(make_delays(5))]))
    with pytest.raises(StoreError, match="twice"):
        asyncio.run(fill(tmp_path, [make_results(make_delays(5))]))
    # A run of equal name on another host is another run.
    sink = store(tmp_path)

    async def other():
        await sink.open(header(host="elsewhere"))
        await sink.aclose()

    asyncio.run(other())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"schema": 99}), r"version 99.*knows 1 to 2.*upgrade"),
        (json.dumps({"schema": "1"}), "version 1"),
        (json.dumps({"schema": True}), "version True"),
        ("{", "not a description"),
        ("[]", "not a description"),
        ("{}", "not a description"),
    ],
)
def test_a_store_of_another_schema_is_refused(tmp_path, text, said):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(StoreError, match=said):
        asyncio.run(fill(tmp_path, []))
    with pytest.raises(StoreError, match=said):
        StoreReader(tmp_path)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"not empty.*thesis\.tex"):
        asyncio.run(fill(tmp_path, []))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        asyncio.run(fill(tmp_path / "file", []))


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    asyncio.run(fill(tmp_path, [make_results(make_delays(5))]))
    left = segments.listing(tmp_path, "delays")[0].path.with_name("000000000099-000000000099.7.parquet.tmp")
    left.write_bytes(b"PAR1 and then nothing")
    assert StoreReader(tmp_path).summary().packets == 5
    asyncio.run(fill(tmp_path, [], "run-2"))
    assert not left.exists()


@pytest.mark.slow
def test_merging_keeps_the_rows(tmp_path):
    delays = make_delays(3000, containers=3)
    parts = [delays[i : i + 100] for i in range(0, len(delays), 100)]
    windows = make_windows(delays)
    results = [make_results(p, containers=3, windows=windows[i : i + 1]) for i, p in enumerate(parts)]
    sink = store(tmp_path, flush_rows=100)

    async def run():
        await sink.open(header())
        for each in results:
            await sink.write(each)
        await sink._submit()
        before = {t: StoreReader(tmp_path).segments(t) for t in segments.TABLES}
        summaries = [StoreReader(tmp_path).summary(source=source).as_dict() for source in ("rows", "windows")]
        assert sink.merge() > 200
        after = {t: StoreReader(tmp_path).segments(t) for t in segments.TABLES}
        assert [StoreReader(tmp_path).summary(source=source).as_dict() for source in ("rows", "windows")] == summaries
        await sink.aclose()
        return before, after

    before, after = asyncio.run(run())
    for table in ("delays", "windows", "ledger"):
        assert sum(s.rows for s in before[table]) == sum(s.rows for s in after[table])
        assert len(after[table]) < segments.FAN_IN
    files = [p for p in tmp_path.rglob("*.parquet") if "delays" in p.parts]
    assert len(files) == len(segments.listing(tmp_path, "delays")), "covered segments are removed"
    schema = pq.read_schema(after["delays"][0].path)
    assert str(schema.field("container").type).startswith("dictionary")


@pytest.mark.slow
def test_a_merged_segment_of_windows_has_small_row_groups(tmp_path, monkeypatch):
    """Small row groups keep merging and reading from holding many histograms at once."""
    monkeypatch.setattr(segments, "MERGE_BATCH_ROWS", 4 * segments.ROW_WEIGHT["windows"])

    async def run():
        sink = store(tmp_path, flush_rows=1)
        await sink.open(header())
        for n in range(segments.FAN_IN):
            await sink.write(
                make_results(make_delays(3, first_packet=3 * n), windows=make_windows(make_delays(30))[:1])
            )
        await flushed(sink)
        sink.merge()
        await sink.aclose()

    asyncio.run(run())
    (merged, *_) = segments.listing(tmp_path, "windows")
    assert merged.rows > 8
    found = pq.read_metadata(merged.path)
    assert max(found.row_group(n).num_rows for n in range(found.num_row_groups)) <= 4


@pytest.mark.slow
def test_merging_frees_its_memory(tmp_path):
    """Merging does not grow a long run's memory; a new process measures it, whose allocator holds no memory yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
        before, after = own.submit(resident_around_merging, tmp_path).result(timeout=60)
    assert len(segments.listing(tmp_path, "delays")) == 1
    assert after - before < 48 << 20


def resident_around_merging(path):
    """Return the resident bytes before and after merging small segments into a full one."""

    async def run():
        sink = store(path, flush_rows=1)
        await sink.open(header())
        delays = make_delays(segments.MERGED_ROWS // segments.FAN_IN // 7)
        for _ in range(segments.FAN_IN):
            await sink.write(make_results(delays))
        await flushed(sink)
        before = process_figures()["resident_bytes"]
        with ThreadPoolExecutor(1) as merger:
            await asyncio.get_running_loop().run_in_executor(merger, sink.merge)
            after = process_figures()["resident_bytes"]
        await sink.aclose()
        return before, after

    return asyncio.run(run())


@pytest.mark.slow
def test_merging_keeps_a_damaged_segment(tmp_path):
    async def run():
        sink = store(tmp_path, flush_rows=1)
        await sink.open(header())
        for n in range(80):
            await sink.write(make_results(make_delays(3, first_packet=3 * n)))
        await flushed(sink)
        victim = segments.listing(tmp_path, "delays")[40].path
        victim.write_bytes(victim.read_bytes()[:200])
        sink.merge()
        sink.merge()
        await sink.aclose()
        return victim

    victim = asyncio.run(run())
    assert victim.exists()
    assert len(segments.listing(tmp_path, "delays")) < 60, "the others are merged around it"
    with pytest.raises(StoreError, match=victim.name):
        StoreReader(tmp_path).summary(source="rows")
    read = StoreReader(tmp_path, skip_damaged=True)
    assert read.delays().num_rows == sum(s.rows for s in read.segments("delays"))
    assert list(read.damaged) == [victim]
    assert read.rows_damaged() > 0


class Hours:
    """A store in which each flush is a segment of an hour that the test chooses."""

    def __init__(self, path, sink):
        self.path, self.sink, self.packets = path, sink, 0

    async def write(self, *hours):
        for hour in hours:
            delays = make_delays(3, first_packet=self.packets, start_ns=START_NS + hour * HOUR_NS)
            self.packets += 3
            await self.sink.write(make_results(delays))
            await flushed(self.sink)

    def segments(self):
        """Return the number of segments of each hour."""
        return Counter(s.hour - START_NS // HOUR_NS for s in segments.listing(self.path, "delays"))


def with_hours(path, work):
    async def run():
        sink = store(path, flush_rows=1 << 20)
        await sink.open(header())
        try:
            return await work(Hours(path, sink))
        finally:
            await sink.aclose()

    return asyncio.run(run())


def test_merging_looks_at_past_hours_once(tmp_path, monkeypatch):
    """Merging examines a past hour once: a store of months has thousands, and merging runs every few seconds."""
    looked = []
    listing = segments.listing

    def listed(root, table, since_ns=None, *args, **options):
        if table == "delays":
            looked.append(since_ns // HOUR_NS - START_NS // HOUR_NS if since_ns >= 0 else "all")
        return listing(root, table, since_ns, *args, **options)

    async def work(hours):
        await hours.write(0, 0, 1, 2, 2)
        monkeypatch.setattr(segments, "listing", listed)
        for _ in range(2):
            hours.sink.merge()
        await hours.write(3)
        for _ in range(2):
            hours.sink.merge()
        await hours.write(1)
        for _ in range(2):
            hours.sink.merge()
        monkeypatch.undo()
        return hours.segments()

    assert with_hours(tmp_path, work) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert looked == ["all", 2, 2, 3, 1, 3]


def test_an_hour_whose_merge_failed_is_examined_again(tmp_path, monkeypatch, caplog):
    async def work(hours):
        await hours.write(0, 0, 1, 1, 2)

        def on_a_full_disk(group):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(hours.sink, "_merge", on_a_full_disk)
            hours.sink.merge()
        before = hours.segments()
        hours.sink.merge()
        return before, hours.segments()

    before, after = with_hours(tmp_path, work)
    assert before == {0: 2, 1: 2, 2: 1}
    assert after == {0: 1, 1: 1, 2: 1}
    assert "No space left on device" in caplog.text


def test_unsettled_segments_are_merged_later(tmp_path):
    async def work(hours):
        await hours.write(0, 0)
        hours.sink._settled = hours.sink._flush - 1
        await hours.write(0, 1, 1)
        hours.sink.merge()
        before = hours.segments()
        hours.sink._settled = hours.sink._flush - 1
        hours.sink.merge()
        return before, hours.segments()

    before, after = with_hours(tmp_path, work)
    assert before == {0: 3, 1: 2}
    assert after == {0: 1, 1: 2}


def test_retention_runs_at_open(tmp_path):
    delays = make_delays(10)
    delays.utc_ns[: len(delays) // 2] -= 5 * HOUR_NS
    asyncio.run(fill(tmp_path, [make_results(delays)]))
    sink = asyncio.run(fill(tmp_path, [], "run-2", max_bytes=1))
    assert sink.removed.rows == len(delays) // 2
    assert len({s.hour for s in segments.listing(tmp_path, "delays")}) == 1


class FileTooLarge:
    """Limit the size of files to `limit` bytes, which acts like a full disk."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.hard))

    def __exit__(self, *exc):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))
        signal.signal(signal.SIGXFSZ, self.handler)


async def keep_writing(sink):
    while True:
        await sink.write(make_results(Delays.empty()))
        await sink._submit()


def test_rows_that_cannot_be_written_are_counted_and_reported(tmp_path):
    small, large = make_delays(20), make_delays(5000, seed=2, first_packet=100)

    async def run():
        sink = store(tmp_path, flush_rows=1)
        await sink.open(header())
        await sink.write(make_results(small))
        with FileTooLarge(20_000):
            await sink.write(make_results(large))
            with pytest.raises(StoreError, match=f"{len(large):,} rows") as told:
                await keep_writing(sink)
            assert str(tmp_path) in str(told.value)
            assert "too large" in str(told.value).lower()
        await sink.aclose()
        return sink

    sink = asyncio.run(asyncio.wait_for(run(), 60))
    assert (sink.rows_stored, sink.rows_not_stored) == (len(small), len(large))
    assert not list(tmp_path.rglob("*.tmp"))
    summary = StoreReader(tmp_path).summary()
    assert StoreReader(tmp_path).delays().num_rows == len(small)
    assert summary.rows_not_stored == len(large), "a report says so, too"
    assert any("could not be written" in line for line in summary.losses())


def test_an_invalid_row_ends_the_run(tmp_path):
    broken = make_delays(5)
    broken.device[0] = 99
    with pytest.raises(StoreError, match="99"):
        asyncio.run(fill(tmp_path, [make_results(broken)]))


def test_devices_may_be_appended_during_a_run(tmp_path):
    first, second = make_delays(50), make_delays(50, containers=2, seed=1, first_packet=50)
    # Container 1's devices come last in a topology that only grows.
    grown = (*topology(1), *topology(2)[2:4])
    at = np.array([0, 1, 5, 6, 2, 3, 4], np.int32)
    second.device[:] = at[second.device]
    results = [make_results(first), make_results(second, devices=grown)]
    asyncio.run(fill(tmp_path, results))
    devices = {(k[0].container, k[0].device) for k, _ in StoreReader(tmp_path).summary().rows()}
    assert {("c0", "eth0"), ("c1", "eth0"), ("", "vethc1")} <= devices


def test_closing_twice_or_unopened_is_harmless(tmp_path):
    async def run():
        sink = store(tmp_path)
        await sink.aclose()
        await sink.open(header())
        await sink.aclose()
        await sink.aclose()

    asyncio.run(run())
