import asyncio
import shutil
import threading
from dataclasses import replace
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.clock import ClockPair, KernelClock
from contracts.errors import StoreError
from contracts.figures import Summary
from contracts.histogram import BINS, MAX_NS, bins_of, lower_bounds, quantiles
from contracts.ledger import Ledger
from contracts.pods import pod_name
from contracts.schema import Delays, Direction, Grades, Segment
from contracts.topology import Sharer
from mace.shown import tables as shown_tables
from storage import query, segments, sql, tables
from storage.embedded import EmbeddedStore
from storage.query import Filter, StoreReader
from storage.segments import HOUR_NS
from tests.made_results import (
    START_NS,
    delays_of,
    header,
    make_delays,
    make_results,
    make_windows,
    topology,
    with_totals,
)
from tests.unit.storage.stored import BEGIN_NS, fill, write_run


def naive(delays, devices):
    """Compute {(device, direction, segment): (count, sum, min, max, quantiles)} with a naive reference."""
    found = {}
    for key in zip(delays.device, delays.direction, delays.segment, delays.delay_ns, strict=True):
        device, direction, segment, delay = map(int, key)
        found.setdefault((devices[device].key, Direction(direction), Segment(segment)), []).append(delay)
    figures = {}
    for key, values in found.items():
        bins, counts = np.unique(bins_of(np.array(values)), return_counts=True)
        within = quantiles(bins, counts).clip(min(values), max(values)).tolist()
        figures[key] = (len(values), sum(values), min(values), max(values), within)
    return figures


def told(summary):
    return {
        ((place.netns_id, place.ifindex), direction, segment): (d.count, d.sum_ns, d.min_ns, d.max_ns, d.quantiles())
        for (place, direction, segment), d in summary.rows()
    }


def test_sql_bins_like_python():
    edges = lower_bounds(np.arange(BINS))
    values = np.unique(np.concatenate([edges, edges - 1, edges + 1, [-5, MAX_NS, MAX_NS + 1, 2**62], [-(2**62)]]))
    powers = np.array([2**n + d for n in range(41) for d in (-1, 0, 1)])
    values = np.concatenate([values, powers])
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT unnest($values) AS delay_ns", {"values": values.tolist()})
        got = connection.execute(f"SELECT {query.BIN_SQL} FROM t").fetchnumpy()
    assert next(iter(got.values())).tolist() == bins_of(values).tolist()


@st.composite
def stretches(draw):
    """Draw rows with extreme delays, of some devices and one or two hours, and the boundaries of their flushes."""
    rows = draw(st.integers(1, 120))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([1, 200, 10**5, 10**9, 2**41]))
    delays = delays_of(
        rows,
        utc_ns=START_NS + rng.integers(0, draw(st.sampled_from([10**9, 4 * 10**12])), rows),
        packet=rng.integers(1, 40, rows).astype("<u8"),
        device=rng.integers(0, 7, rows).astype("<i4"),
        direction=rng.integers(0, 3, rows).astype("u1"),
        segment=rng.integers(1, 5, rows).astype("u1"),
        position=rng.integers(0, 6, rows).astype("u1"),
        delay_ns=rng.integers(-2, largest, rows),
        l3_len=rng.integers(20, 1500, rows).astype("<u4"),
        grade=rng.integers(0, 4, rows).astype("u1"),
        outcome=rng.integers(0, 3, rows).astype("u1"),
    )
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
    return delays, [0, *cuts, rows]


@pytest.mark.slow
@settings(max_examples=25)
@given(stretches(), st.booleans())
def test_stored_rows_give_the_reported_figures(tmp_path_factory, stretch, windows_only):
    delays, cuts = stretch
    path = tmp_path_factory.mktemp("store")
    live = Summary()
    results = []
    for first, last in pairwise(cuts):
        part = delays[first:last]
        results.append(make_results(part, containers=2, windows=(*make_windows(part), *make_windows(part, 10))))
        live.add(results[-1])
    fill(path, results, rows=not windows_only, flush_rows=30)
    store = StoreReader(path)
    expected = naive(delays, topology(2))
    summary = store.summary()
    assert told(summary) == expected
    assert told(live) == expected
    assert summary.as_dict()["devices"] == live.as_dict()["devices"]
    assert summary.ledger == live.ledger == results[-1].totals.ledger
    if not windows_only:
        assert told(store.summary(source="windows")) == expected


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    delays = make_delays(2000, containers=3, seed=7)
    fill(path, [make_results(delays, containers=3, windows=make_windows(delays))], flush_rows=2000)
    return StoreReader(path), delays


@pytest.mark.slow
def test_filters_choose_rows(stored):
    store, delays = stored
    middle = int(np.median(delays.utc_ns))
    devices = topology(3)
    assert told(store.summary(Filter(since_ns=middle))) == naive(delays[delays.utc_ns >= middle], devices)
    assert told(store.summary(Filter(until_ns=middle))) == naive(delays[delays.utc_ns < middle], devices)
    out = delays[delays.direction == Direction.EGRESS]
    found = store.summary(Filter(direction=Direction.EGRESS))
    assert told(found) == naive(out, devices)
    assert found.packets == len(np.unique(out.packet))
    bridge = delays[delays.device == len(devices) - 3]
    assert told(store.summary(Filter(device="br0"))) == naive(bridge, devices)


def test_a_container_selects_its_packets_at_all_devices(stored):
    store, delays = stored
    mine = delays.packet[(delays.device == 2) & (delays.segment == Segment.OVERHEAD)]
    chosen = delays[np.isin(delays.packet, mine)]
    found = store.summary(Filter(container="c1"))
    assert told(found) == naive(chosen, topology(3))
    assert found.packets == len(mine)
    assert {k[0].device for k, _ in found.rows()} == {"eth0", "vethc1", "br0", "out0", "rem0"}


def test_a_filter_by_time_keeps_the_whole_ledger_and_reports_it(stored):
    store, delays = stored
    found = store.summary(Filter(since_ns=int(delays.utc_ns.max())))
    assert found.ledger.records == 2 * len(delays)
    assert "whole runs" in found.note


def test_a_packet_hop_by_hop(stored):
    store, delays = stored
    number = int(delays.packet[len(delays) // 2])
    [path] = store.packet(number)
    mine = delays[delays.packet == number]
    hops = mine[mine.segment != Segment.OVERHEAD]
    hops = hops[np.argsort(hops.position)]
    assert [h.delay_ns for h in path.hops] == hops.delay_ns.tolist()
    assert [h.start_ns for h in path.hops] == (hops.utc_ns - hops.utc_ns.min()).tolist()
    assert [h.place.device for h in path.hops] == [topology(3)[d].name for d in hops.device]
    [overhead] = path.overhead_ns.values()
    assert overhead == sum(h.delay_ns for h in path.hops if h.segment is Segment.DEVICE)
    assert store.packet(12345) == []


def test_the_worst_packets_come_first(stored):
    store, delays = stored
    whole = delays[delays.segment == Segment.OVERHEAD]
    largest = whole.packet[np.lexsort((whole.packet, -whole.delay_ns))][:5]
    assert [p.packet for p in store.worst(5)] == largest.tolist()


def test_a_typical_path_is_in_the_order_of_the_hops(stored):
    store, delays = stored
    paths = store.typical_paths()
    assert [(p.container, p.direction.name) for p in paths] == [
        (f"c{c}", direction) for c in range(3) for direction in ("EGRESS", "INGRESS")
    ]
    out, back = paths[2:4]
    assert [h[0].device for h in out.hops] == ["eth0", "vethc1", "br0", "out0", "rem0"]
    assert [h[0].device for h in back.hops] == ["rem0", "out0", "br0", "vethc1", "eth0", "eth0"]
    assert back.hops[-1][1] is Segment.DELIVERY
    mine = delays[(delays.device == 2) & (delays.direction == 1) & (delays.segment == Segment.DEVICE)]
    assert out.hops[0][2].count == len(mine)
    assert out.hops[0][2].sum_ns == mine.delay_ns.sum()


@pytest.mark.parametrize("source", ["rows", "windows"])
def test_series_count_every_overhead_once(stored, source):
    store, _ = stored
    series = store.series(points=20, source=source)
    assert {(s.container, s.direction.name) for s in series} == {
        (f"c{c}", d) for c in range(3) for d in ("EGRESS", "INGRESS")
    }
    for each in series:
        assert each.utc_ns == sorted(each.utc_ns)
        assert len(each.utc_ns) == len(each.p50_ns) == len(each.p99_ns) <= 21
        assert all(a <= b for a, b in zip(each.p50_ns, each.p99_ns, strict=True))


def test_rows_as_arrow(stored):
    store, delays = stored
    assert store.delays(columns=["packet", "delay_ns"]).column("delay_ns").to_numpy().sum() == delays.delay_ns.sum()
    with pytest.raises(StoreError, match="did you mean 'delay_ns'"):
        store.delays(columns=["delay_nss"])


@pytest.mark.slow
def test_runs_and_their_ledgers_add_up(tmp_path):
    one, two = Ledger(records=10, matched=10), Ledger(records=7, matched=4, unmatched=3, lost=9)
    fill(tmp_path, [make_results(make_delays(5), ledger=one)], "a")
    later = make_delays(5, start_ns=START_NS + 10**12)
    fill(tmp_path, [make_results(later, ledger=two)], head=header("b", source="kmod"))
    store = StoreReader(tmp_path)
    assert [(r.run, r.source, r.ledger, r.closed) for r in store.runs()] == [
        ("a", "synthetic", one, True),
        ("b", "kmod", two, True),
    ]
    assert store.ledger() == one + two
    assert store.ledger(Filter(run="b")) == two
    assert store.summary().packets == 10
    # Packet numbers are unique within a run: equal numbers of two runs are two packets.
    assert store.summary(Filter(direction=Direction.EGRESS)).packets == 6
    assert store.summary(Filter(run="b")).packets == 5
    assert len(store.packet(1 << 20)) == 2
    assert "lost" in " ".join(store.summary().losses())


def test_rows_of_one_run_and_windows_of_another(tmp_path):
    first, second = make_delays(100), make_delays(150, seed=3, start_ns=START_NS + 10**12)
    fill(tmp_path, [make_results(first, windows=make_windows(first))], "a")
    fill(tmp_path, [make_results(second, windows=make_windows(second))], "b", rows=False)
    summary = StoreReader(tmp_path).summary()
    assert told(summary) == naive(Delays.concatenate([first, second]), topology())
    assert "run b" in summary.note


def test_devices_of_equal_names_are_distinguished(tmp_path):
    """A container ends, and another takes its name."""
    before = topology()
    after = tuple(
        d if d.name != "eth0" else type(d)(**{f: getattr(d, f) for f in d.__slots__} | {"netns": 99}) for d in before
    )
    delays = make_delays(40)
    later = make_delays(40, first_packet=40)
    later.device[:] += len(before)
    fill(tmp_path, [make_results(delays), make_results(later, devices=before + after)])
    summary = StoreReader(tmp_path).summary()
    inner = [(k[0].netns_id, d.count) for k, d in summary.rows(Segment.OVERHEAD) if k[1] is Direction.EGRESS]
    assert inner == [(99, 20), (4026532000, 20)]
    assert len([o for o in summary.as_dict()["overhead"] if o["direction"] == "egress"]) == 2


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(StoreError, match="no such directory"):
        StoreReader(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="not a MACE store"):
        StoreReader(tmp_path)


@pytest.mark.slow
def test_an_empty_store_has_an_empty_summary(tmp_path):
    fill(tmp_path, [])
    store = StoreReader(tmp_path)
    summary = store.summary()
    assert (summary.rows(), summary.ledger, summary.packets) == ([], Ledger(), 0)
    assert store.typical_paths() == store.series() == store.worst(3) == []
    assert store.delays().num_rows == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "empty", "overwritten"])
def test_a_damaged_segment_is_named(tmp_path, how):
    fill(tmp_path, [make_results(make_delays(50, first_packet=50 * n)) for n in range(3)], flush_rows=1)
    victim = segments.listing(tmp_path, "delays")[1]
    data = victim.path.read_bytes()
    half = len(data) // 2
    victim.path.write_bytes({"truncated": data[:half], "empty": b"", "overwritten": b"\0" * len(data)}[how])
    with pytest.raises(StoreError, match=rf"{victim.path.name}.*damaged.*{victim.rows} rows"):
        StoreReader(tmp_path).summary()
    store = StoreReader(tmp_path, skip_damaged=True)
    summary = store.summary()
    assert sum(d.count for _, d in summary.rows()) == sum(s.rows for s in store.segments("delays"))
    assert f"1 damaged segments ({victim.rows:,} rows) were skipped" in summary.note


@pytest.mark.slow
def test_a_reader_outlives_merging_and_retention(tmp_path):
    """Segments are removed while a reader works; it sees all rows at every moment."""
    flushes, rows = 120, len(make_delays(2))
    seen, stop = [], threading.Event()

    def read():
        store = StoreReader(tmp_path)
        while not stop.is_set():
            seen.append(store.delays(columns=["delay_ns"]).num_rows)

    async def write():
        sink = EmbeddedStore(tmp_path, fsync=False, flush_interval_s=60, flush_rows=1)
        await sink.open(header())
        reader = threading.Thread(target=read)
        reader.start()
        for n in range(flushes):
            await sink.write(make_results(make_delays(2, first_packet=2 * n)))
            if n % 40 == 39:
                await asyncio.to_thread(sink.merge)
        await sink.aclose()
        stop.set()
        await asyncio.to_thread(reader.join)

    asyncio.run(write())
    assert seen == sorted(seen)
    assert all(n % rows == 0 for n in seen)
    assert StoreReader(tmp_path).delays().num_rows == flushes * rows


def test_grades_are_stored_with_the_ledger(tmp_path):
    graded = Grades(ambiguous=1, buffer=2, content=3, exact=4, waited=6, told_apart=5)
    for run, start in (("a", START_NS), ("b", START_NS + 10**12)):
        results = with_totals(make_results(make_delays(9, start_ns=start)), grades=graded)
        fill(tmp_path, [results], run)
    store = StoreReader(tmp_path)
    assert [run.grades for run in store.runs()] == [graded, graded]
    found = store.summary()
    assert found.grades == graded + graded
    assert found.as_dict()["grades"] == {
        "ambiguous": 2,
        "buffer": 4,
        "content": 6,
        "exact": 8,
        "waited": 12,
        "told_apart": 10,
    }
    assert (
        "grades: ambiguous 2 · buffer 4 · content 6 · exact 8 · told apart 10" in shown_tables.ledger_line(found).plain
    )


@pytest.mark.slow
def test_a_ledger_without_grades(tmp_path):
    """Reading and merging such files grades all packets by the buffer."""
    fill(tmp_path, [make_results(make_delays(9))], "a")
    for each in segments.listing(tmp_path, "ledger"):
        rows = pq.read_table(each.path, partitioning=None)
        pq.write_table(rows.drop_columns(list(tables.GRADES.values())), each.path)
    assert [run.grades for run in StoreReader(tmp_path).runs()] == [Grades(buffer=9)]
    later = [make_results(make_delays(3, start_ns=START_NS + 1_000_000 * n)) for n in range(2 * segments.FAN_IN)]

    async def more():
        sink = EmbeddedStore(tmp_path, fsync=False, flush_interval_s=60.0, flush_rows=1)
        await sink.open(header("b"))
        for each in later:
            await sink.write(with_totals(each, grades=Grades(exact=3)))
        await sink._submit()
        merged = sink.merge()
        await sink.aclose()
        return merged

    assert asyncio.run(more()) > 10
    assert [run.grades for run in StoreReader(tmp_path).runs()] == [Grades(buffer=9), Grades(exact=3)]
    assert all("packets_exact" in pq.read_schema(s.path).names for s in segments.listing(tmp_path, "ledger"))
    assert len(segments.listing(tmp_path, "ledger")) < segments.FAN_IN


def test_a_long_query_writes_no_progress_bar(stored, monkeypatch):
    """DuckDB must not draw its progress bar to stdout, which has the JSON."""
    store, _ = stored
    settings = []
    relation = query.relation

    def watched(connection, table, found):
        settings.append(connection.execute("SELECT current_setting('enable_progress_bar')").fetchall()[0][0])
        return relation(connection, table, found)

    monkeypatch.setattr(query, "relation", watched)
    store.runs()
    assert settings
    assert not any(settings)


ID, OTHER_ID = "a" * 64, "b" * 64


def stretch(second, name, container_id, containers=1, seed=0):
    """Return a second of packets of several containers, the first with that name and id."""
    delays = make_delays(
        40, containers=containers, seed=seed, start_ns=START_NS + second * 10**9, first_packet=1000 * second
    )
    devices = tuple(
        # The row of a host's device names the container whose packets crossed the device.
        replace(d, container=name, container_id=container_id) if d.container == "c0" or d.name == "vethc0" else d
        for d in topology(containers)
    )
    return make_results(delays, devices=devices, windows=make_windows(delays))


def renaming(path, *names, containers=1):
    """Make a store of several flushes; its first container had these (name, id) in turn."""
    for number, (name, container_id) in enumerate(names):
        fill(path, [stretch(number, name, container_id, containers)], f"run-{number}")
    return StoreReader(path)


def containers_of(summary):
    return {(k[0].container, k[0].container_id) for k, _ in summary.overhead()}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rows", "windows"])
@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([("web-tmp", ID), ("web", ID)], {("web", ID)}),
        ([("web-tmp", ID), ('it\'s \\ "web"', ID)], {('it\'s \\ "web"', ID)}),
        ([("a", ID), ("b", ID), ("a", ID)], {("a", ID)}),
        ([("web", ""), ("web", ID)], {("web", ID)}),
        ([("web", ID), ("web", OTHER_ID)], {("web", OTHER_ID)}),
        ([("web-tmp", ""), ("web", "")], {("web-tmp", ""), ("web", "")}),
        ([("web-tmp", ID), ("web", OTHER_ID)], {("web-tmp", ID), ("web", OTHER_ID)}),
    ],
)
def test_a_container_that_was_renamed_is_read_by_its_newest_name(tmp_path, names, shown, source):
    store = renaming(tmp_path, *names, containers=2)
    summary = store.summary(source=source)
    assert containers_of(summary) == shown | {("c1", "")}
    assert sum(d.count for k, d in summary.overhead()) == 40 * len(names)
    names_shown = {name for name, _ in shown} | {"c1"}
    assert {s.container for s in store.series(source=source)} == names_shown
    assert {p.container for p in store.typical_paths()} == names_shown
    assert {p.container for p in store.worst(1000)} == names_shown
    asked = sql.table(store, "SELECT DISTINCT container FROM delays UNION SELECT DISTINCT container FROM windows")
    assert set(asked["container"].to_pylist()) - {""} == names_shown


@pytest.mark.slow
def test_a_renamed_container_is_found_by_any_name_that_it_had(tmp_path):
    store = renaming(tmp_path, ("web-tmp", ID), ("web", ID), ("c0", OTHER_ID))
    whole = told(store.summary(Filter(container="web")))
    assert whole
    assert told(store.summary(Filter(container="web-tmp"))) == whole
    assert store.summary(Filter(container="c0")).packets == 40
    # Within a time range the container has its newest name of that range.
    before = Filter(until_ns=START_NS + 10**9)
    assert store.summary(before).packets == 40
    assert [c.earlier for c in store.containers() if c.container == "web"] == [("web-tmp",)]


@pytest.mark.slow
def test_a_present_name_takes_precedence_over_a_past_one(tmp_path):
    store = renaming(tmp_path, ("web", ID), ("old", ID), ("web", OTHER_ID))
    assert containers_of(store.summary(Filter(container="web"))) == {("web", OTHER_ID)}
    assert containers_of(store.summary(Filter(container="old"))) == {("old", ID)}


def test_rows_are_given_as_they_are_stored(tmp_path):
    rows = renaming(tmp_path, ("web-tmp", ID), ("web", ID)).delays()
    assert set(rows["container"].to_pylist()) - {""} == {"web-tmp", "web"}
    assert set(rows["container_id"].to_pylist()) == {"", ID}


@pytest.mark.slow
def test_a_store_without_ids_is_read(tmp_path):
    store = renaming(tmp_path, ("web", ""), ("db", ""), containers=2)
    before = store.summary().as_dict()
    later_columns = {"delays": ["container_id"], "windows": ["container_id", "pod_containers"]}
    for table, columns in (later_columns | {"ledger": ["on_host_network"]}).items():
        for each in segments.listing(tmp_path, table):
            rows = pq.read_table(each.path, partitioning=None)
            pq.write_table(rows.drop_columns(columns), each.path)
    store = StoreReader(tmp_path)
    assert store.summary().as_dict() == before
    for source in ("rows", "windows"):
        assert told(store.summary(source=source)) == told(store.summary())
    assert store.sharers() == ()
    # Beside rows with all columns, and merged with them.
    fill(tmp_path, [stretch(2, "web", ID, 2)], "now")
    assert containers_of(StoreReader(tmp_path).summary()) == {("web", ID), ("db", ""), ("c1", "")}
    later = [stretch(3 + n, "web", ID, 2) for n in range(2 * segments.FAN_IN)]

    async def more():
        sink = EmbeddedStore(tmp_path, fsync=False, flush_interval_s=60.0, flush_rows=1)
        await sink.open(header("b"))
        for each in later:
            await sink.write(each)
        await sink.aclose()
        return EmbeddedStore.merge(sink)

    count = StoreReader(tmp_path).delays().num_rows
    asyncio.run(more())
    assert StoreReader(tmp_path).delays().num_rows > count
    assert containers_of(StoreReader(tmp_path).summary()) == {("web", ID), ("db", ""), ("c1", "")}


def test_missing_columns_of_old_rows_get_defaults():
    for table, column, nothing in (
        ("delays", "container_id", ""),
        ("windows", "container_id", ""),
        ("windows", "pod_containers", ""),
        ("ledger", "on_host_network", []),
        ("round_trips", "tracer_cost_ns", None),
    ):
        schema = tables.SCHEMAS[table]
        assert tables.grown(schema.empty_table().drop_columns([column]), table).schema == schema
        assert tables._nothing(schema.field(column), 2).to_pylist() == [nothing] * 2


def test_a_pod_and_its_containers_are_read_from_a_store(tmp_path):
    """A pod has no name at first; then it has one, and one more container."""
    pods = [(ID[:12], ""), ("default/web-6d4cf56db6-8xk2p", "app"), ("default/web-6d4cf56db6-8xk2p", "app,sidecar")]
    for number, (name, pod_containers) in enumerate(pods):
        one = stretch(number, name, ID, 2)
        devices = tuple(replace(d, pod_containers=pod_containers) if d.container_id else d for d in one.rows.devices)
        fill(tmp_path, [replace(one, rows=replace(one.rows, devices=devices))], f"run-{number}")
    store = StoreReader(tmp_path)
    (pod,) = [row for row in store.summary().as_dict()["overhead"] if row.get("container_id") == ID][:1]
    assert (pod["namespace"], pod["workload"], pod["pod_containers"]) == ("default", "web", ["app", "sidecar"])
    asked = (
        "SELECT DISTINCT container, pod_namespace(container), pod_name(container), pod_workload(container) FROM delays"
    )
    rows = {row[0]: row[1:] for row in zip(*sql.table(store, asked).to_pydict().values(), strict=True)}
    assert rows == {name: tuple(pod_name(name)) for name in ("", "c1", pods[1][0])}


@pytest.mark.slow
def test_a_damaged_segment_of_windows_affects_names_only(tmp_path):
    store = renaming(tmp_path, ("web-tmp", ID), ("web", ID))
    [*_, last] = segments.listing(tmp_path, "windows")
    data = bytearray(last.path.read_bytes())
    data[len(data) // 2] ^= 1
    last.path.write_bytes(data)
    summary = StoreReader(tmp_path).summary(source="rows")
    assert {k[0].container for k, _ in summary.overhead()} == {"web-tmp", "web"}
    assert told(summary).keys() == told(store.summary(source="rows")).keys()


@pytest.mark.slow
def test_containers_on_the_host_s_network_are_kept_with_the_ledger(tmp_path):
    agent, image = Sharer("agent", ID), Sharer("image.sif[7]")
    one = make_results(make_delays(9))
    fill(tmp_path, [with_totals(one, on_host_network=(agent, image)), with_totals(one, on_host_network=())], "a")
    later = make_results(make_delays(9, start_ns=START_NS + 10**12))
    fill(tmp_path, [with_totals(later, on_host_network=(Sharer("agent-2", ID),))], "b")
    store = StoreReader(tmp_path)
    # At the time of the flush the first container was gone, and the second had another name.
    assert store.sharers() == (Sharer("agent-2", ID), image)
    assert store.summary().on_host_network == ["agent-2", "image.sif[7]"]
    assert store.sharers(Filter(run="a")) == (agent, image)
    assert store.sharers(Filter(until_ns=START_NS + 10**11)) == (agent, image)
    assert store.sharers(Filter(since_ns=START_NS + 2 * 10**12)) == ()


@pytest.fixture
def opened(monkeypatch):
    """The segments of `ledger` that DuckDB opens, in order."""
    found, real = [], query.relation

    def relation(connection, table, some, **options):
        found.extend(each for each in some if table == "ledger")
        return real(connection, table, some, **options)

    monkeypatch.setattr(query, "relation", relation)
    return found


def several_runs(path):
    """Write six runs of an hour each, an hour apart, every other one killed; yields after each."""
    for number in range(6):
        begin_ns = BEGIN_NS + 2 * number * HOUR_NS
        ends = "killed" if number % 2 else "closed"
        asyncio.run(write_run(path, f"run-{number}", rows=False, hours=1, minutes=5, ends=ends, begin_ns=begin_ns))
        yield


@pytest.mark.slow
def test_a_reader_remembers_what_ledgers_say(tmp_path, opened):
    kept, before = None, set()
    for number, _ in enumerate(several_runs(tmp_path)):
        kept = kept or StoreReader(tmp_path)
        opened.clear()
        found = kept.runs()
        assert opened
        assert not before & {each.path for each in opened}
        before = {each.path for each in kept.segments("ledger")}
        assert found == StoreReader(tmp_path).runs()
        assert [run.run for run in found] == [f"run-{n}" for n in range(number + 1)]


def test_the_newest_ledger_of_a_run_is_read_first(tmp_path, opened):
    asyncio.run(write_run(tmp_path, "long", rows=False, hours=20, minutes=60, ends="killed"))
    hours = {each.hour for each in StoreReader(tmp_path).segments("ledger")}
    store = StoreReader(tmp_path)
    [run] = store.runs()
    assert max(each.hour for each in opened) == max(hours)
    assert len({each.hour for each in opened}) <= 8 < len(hours)
    [newest] = sql.table(store, "SELECT * FROM ledger ORDER BY flush DESC LIMIT 1").to_pylist()
    assert run.packets == newest["packets"]


def test_what_retention_removes_is_forgotten(tmp_path):
    for _ in several_runs(tmp_path):
        pass
    kept = StoreReader(tmp_path)
    before = kept.runs()
    for hour in sorted({each.hour for each in kept.segments("ledger")})[:3]:
        shutil.rmtree(segments.partition(tmp_path, "ledger", hour))
    assert kept.runs() == StoreReader(tmp_path).runs() != before


def test_what_ledgers_say_of_shared_networks_is_remembered(tmp_path, opened):
    for number in range(3):
        made = make_results(make_delays(9, start_ns=START_NS + number * HOUR_NS))
        fill(tmp_path, [with_totals(made, on_host_network=(Sharer(f"agent-{number}"),))], f"run-{number}")
    kept = StoreReader(tmp_path)
    assert [each.container for each in kept.sharers()] == ["agent-0", "agent-1", "agent-2"]
    opened.clear()
    assert [each.container for each in kept.sharers()] == ["agent-0", "agent-1", "agent-2"]
    assert [each.container for each in kept.sharers(Filter(run="run-1"))] == ["agent-1"]
    assert kept.sharers(Filter(host="nobody")) == ()
    assert not opened
    # Of an hour that a range cuts, the rows are read.
    [cut] = [run.upto_utc_ns for run in kept.runs() if run.run == "run-1"]
    assert [each.container for each in kept.sharers(Filter(until_ns=cut + 1))] == ["agent-0", "agent-1"]
    assert [each.container for each in kept.sharers(Filter(until_ns=cut))] == ["agent-0"]


def drawn(paths):
    return [
        (path.host, path.container, path.direction, [(*hop[:2], hop[2].as_dict()) for hop in path.hops])
        for path in paths
    ]


@pytest.mark.slow
def test_packets_of_equal_numbers_are_of_their_runs(tmp_path):
    """Packet numbers are unique within a run: another run's packets with the same numbers are others."""
    for number, host in enumerate(("near", "far")):
        made = make_results(make_delays(100 * (number + 1), containers=2, seed=number), containers=2)
        for path in (tmp_path / "both", tmp_path / host):
            fill(path, [made], f"run-{number}", head=header(f"run-{number}", host=host))
    both = StoreReader(tmp_path / "both")
    for number, host in enumerate(("near", "far")):
        alone = StoreReader(tmp_path / host)
        for where in (Filter(container="c1", host=host), Filter(container="c1", run=f"run-{number}")):
            assert told(both.summary(where)) == told(alone.summary(Filter(container="c1")))
            assert drawn(both.typical_paths(where)) == drawn(alone.typical_paths(Filter(container="c1")))
            assert both.delays(where).num_rows == alone.delays(Filter(container="c1")).num_rows


def test_sql_lists_the_tables_that_people_use(stored):
    store, _ = stored
    listed = sql.table(store, "SHOW TABLES").column("name").to_pylist()
    assert listed == sorted(tables.COLUMNS)


def test_runs_stored_before_the_kernels_clock_was(tmp_path):
    fill(tmp_path, [], head=header("old", clock=ClockPair(1_000, START_NS, 50)))
    [stored] = tmp_path.glob("runs/*.parquet")
    rows = pq.read_table(stored, partitioning=None)
    older = rows.drop_columns(["clock_state", "max_error_ns", "est_error_ns"])
    pq.write_table(older, stored)
    assert StoreReader(tmp_path).runs()[0].clock == ClockPair(1_000, START_NS, 50)
    kernel = KernelClock("synchronised", 5_000, 1_000)
    fill(tmp_path, [], head=header("new", clock=ClockPair(1_000, START_NS, 50, kernel)))
    reader = StoreReader(tmp_path)
    assert {run.run: run.clock.kernel for run in reader.runs()} == {"old": None, "new": kernel}
    assert reader.header("testhost", "new").clock.kernel == kernel
    assert tables.grown(older, "runs").to_pylist() == tables.from_stored(rows).to_pylist()
