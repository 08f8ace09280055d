import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import UsageError
from contracts.figures import Distribution
from contracts.ledger import Ledger
from contracts.schema import Direction, Segment
from correlator.windows import Windows
from mace.shown import packet_trace, views
from mace.shown.views import Asked, view
from storage import segments, sql, tables
from storage.query import Filter, StoreReader
from tests import trace_processor
from tests.made_results import START_NS, header, make_delays, make_results, make_windows, topology, with_rows
from tests.unit.storage.stored import fill

PACKETS = 1000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store with two runs of two sources on one host, and one run without rows on another."""
    made = tmp_path_factory.mktemp("store")
    delays = make_delays(PACKETS, containers=2)
    fill(made, [make_results(delays, containers=2, windows=make_windows(delays))])
    slower = make_delays(200, containers=2, seed=1, first_packet=5000, scale_ns=1500.0)
    fill(made, [make_results(slower, containers=2)], "run-2", head=header("run-2", source="other"))
    results = make_results(delays, containers=2, windows=make_windows(delays))
    fill(made, [results], head=header("run-3", host="far"), rows=False)
    return made


@pytest.fixture(scope="module")
def store(path):
    return StoreReader(path)


def rows(found):
    return found.table().to_pylist()


def test_devices_are_the_rows_of_the_report(store):
    where = Filter(container="c0", host="testhost")
    found = rows(view(store, "devices", Asked(container="c0", host="testhost")))
    report = json.loads(json.dumps(store.summary(where).as_dict()))
    expected = report["devices"] + report["delivery"] + report["overhead"]
    assert len(found) == len(expected)
    for row, entry in zip(found, expected, strict=True):
        assert {name: row[name] for name in entry} == entry


@pytest.mark.parametrize("source", ["rows", "windows", "auto"])
def test_stretches_add_up_to_the_whole(store, source):
    """Merged histograms of any stretches are the histogram of all: quantiles are never averaged."""
    where = Filter(run="run-1")
    whole = store.grouped(where, ("container", "direction"), source=source)
    over = store.over_time(where, ("container", "direction"), points=7, source=source)
    assert len(whole) == 4
    assert over.groups.keys() == whole.keys()
    for group, stretches in over.groups.items():
        parts = list(stretches.values())
        total = sum(parts[1:], parts[0])
        assert total.as_dict() == whole[group].as_dict()
        assert [each.tolist() for each in total.histogram()] == [each.tolist() for each in whole[group].histogram()]


def test_time_and_heat_count_each_packet_once(store):
    asked = Asked(container="c1", run="run-1", points=11)
    [[expected]] = (
        sql.table(
            store, "SELECT count(*) FROM delays WHERE run = 'run-1' AND segment = 'overhead' AND container = 'c1'"
        )
        .to_pydict()
        .values()
    )
    time, heat = view(store, "time", asked), view(store, "heat", asked)
    assert sum(time.columns["count"]) == sum(heat.columns["count"]) == expected
    assert heat.about["width_ns"] == time.about["width_ns"]
    assert set(heat.columns["utc_ns"]) == set(time.columns["utc_ns"])
    for row in rows(heat):
        assert row["low_ns"] < row["high_ns"] <= max(2 * row["low_ns"], 16)


def test_long_ranges_are_read_from_wide_windows_with_the_same_figures(tmp_path):
    """Over four hours; the narrow windows lack one delay, so that a figure tells which of the two were read."""
    delays = make_delays(600, gap_ns=24 * 10**9)
    narrow, wide = make_windows(delays[:-20]), make_windows(delays, 10)
    fill(tmp_path, [make_results(delays, windows=(*narrow, *wide))], rows=False)
    reader = StoreReader(tmp_path)
    count = int((delays.segment == Segment.OVERHEAD).sum())
    whole = reader.grouped(Filter(), ("direction",))
    assert sum(each.count for each in whole.values()) == count
    over = reader.over_time(Filter(), ("direction",), points=50)
    assert over.width_ns % (10 * 10**9) == over.first_utc_ns % (10 * 10**9) == 0
    for group, stretches in over.groups.items():
        parts = list(stretches.values())
        assert sum(parts[1:], parts[0]).as_dict() == whole[group].as_dict()
    short = Filter(until_ns=START_NS + 3600 * 10**9)
    inside = (delays.segment == Segment.OVERHEAD) & (delays.utc_ns < short.until_ns)
    assert sum(each.count for each in reader.grouped(short, ("direction",)).values()) == int(inside.sum())


def windows_of(delays, before_ns=None):
    """Return the windows that a run has stored when it has stored these rows; all of them if it has ended."""
    windows = Windows()
    windows.add(delays.utc_ns, delays.device, delays.direction, delays.segment, delays.delay_ns)
    return windows.close(before_ns)


def histograms(groups):
    return {
        key: (each.count, each.sum_ns, each.min_ns, each.max_ns, *(part.tolist() for part in each.histogram()))
        for key, each in groups.items()
    }


@pytest.fixture(scope="module")
def minutes(tmp_path_factory):
    """A store with eight minutes of rows and windows: a run that has ended, and one that was killed."""
    made = tmp_path_factory.mktemp("minutes")
    ended = make_delays(2000, containers=2, gap_ns=240_000_000)
    fill(made, [with_rows(make_results(ended, containers=2), windows=windows_of(ended))])
    live = make_delays(2000, containers=2, gap_ns=240_000_000, seed=1)
    results = with_rows(make_results(live, containers=2), windows=windows_of(live, START_NS + 333 * 10**9))
    fill(made, [results], "run-2", head=header("run-2"))
    newest = segments.listing(made, "ledger")[-1]
    rewritten = tables.from_stored(pq.ParquetFile(newest.path).read())
    closed = rewritten.schema.get_field_index("closed")
    rewritten = rewritten.set_column(closed, rewritten.schema.field(closed), pa.array([False] * len(rewritten)))
    newest.path.write_bytes(tables.encode(rewritten, "ledger"))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        Filter(),
        Filter(run="run-2"),
        Filter(container="c1"),
        Filter(since_ns=START_NS + 101_234_567_891, until_ns=START_NS + 399_999_999_999),
        Filter(since_ns=START_NS + 340 * 10**9),
        Filter(until_ns=START_NS + 20 * 10**9),
        Filter(since_ns=START_NS + 7 * 10**9, until_ns=START_NS + 9 * 10**9, direction=Direction.EGRESS),
    ],
)
def test_rows_and_the_windows_that_stand_for_them_have_the_same_delays(minutes, where):
    reader = StoreReader(minutes)
    by = ("host", "container", "direction", "source")
    rows = reader.grouped(where, by, source="rows")
    assert rows
    assert histograms(reader.grouped(where, by)) == histograms(rows)
    over = reader.over_time(where, by, points=5, whole=True)
    assert histograms(over.whole) == histograms(rows)
    assert histograms({key: sum(each.values(), Distribution()) for key, each in over.groups.items()}) == histograms(
        rows
    )


@pytest.mark.parametrize("since_s", [None, 95])
def test_windows_stand_for_rows_wherever_they_are_complete(minutes, tmp_path, since_s):
    """Rows that lie in a complete window are not read: here they are gone."""
    copy = shutil.copytree(minutes, tmp_path / "copy")
    since = None if since_s is None else START_NS + since_s * 10**9
    before = histograms(StoreReader(copy).grouped(Filter(since_ns=since)))
    for each in segments.listing(copy, "delays"):
        stored = tables.from_stored(pq.ParquetFile(each.path).read())
        ns = stored["time"].cast(pa.int64()).to_numpy()
        read = ns >= START_NS + 330 * 10**9
        if since is not None:
            read |= (ns >= since) & (ns < START_NS + 100 * 10**9)
        each.path.write_bytes(tables.encode(stored.filter(pa.array(read)), "delays"))
    assert histograms(StoreReader(copy).grouped(Filter(since_ns=since))) == before


def test_a_reader_forgets_segments_that_were_merged(minutes):
    reader = StoreReader(minutes)
    names = reader.containers()
    [one, *_] = reader._seen.values()
    reader._seen |= {minutes / f"{number}.parquet": one for number in range(10_000)}
    assert reader.containers() == names
    assert set(reader._seen) == {each.path for each in reader.segments("windows")}


def test_a_reader_that_keeps_results_reads_anew_when_the_store_has_changed(tmp_path):
    delays = make_delays(200)
    fill(tmp_path, [make_results(delays, windows=make_windows(delays))])
    reader = StoreReader(tmp_path)
    reader.keep(1)
    first = reader.over_time(points=3)
    for points in (3, 4, 5, 6, 3):
        assert (reader.over_time(points=points) is first) == (points == 3)
    assert reader.over_time(points=7) is not first
    assert reader.over_time(points=3) is not first, "the oldest of four was left out"
    fill(tmp_path, [make_results(delays, windows=make_windows(delays))], "run-2", head=header("run-2"))
    assert [r.run for r in reader.runs()] == ["run-1"]
    reader.keep(2)
    assert [r.run for r in reader.runs()] == ["run-1", "run-2"]
    assert reader.over_time(points=3) != first
    reader.close()
    assert len(reader.runs()) == 2


@pytest.mark.parametrize("source", ["rows", "windows"])
def test_the_heat_maps_rows_are_whole_bins(store, source):
    """The counts are those of the full histograms, row by row."""
    asked = Asked(container="c1", run="run-1", points=5, figures=source)
    full = store.over_time(asked.filter(0), ("direction",), points=5, source=source)
    expected = [
        (full.first_utc_ns + at * full.width_ns, direction, *row)
        for (direction,), stretches in full.groups.items()
        for at, delays in sorted(stretches.items())
        for row in zip(*views.heat_rows(delays), strict=True)
    ]
    assert [tuple(row.values()) for row in rows(view(store, "heat", asked))] == expected


def test_a_device_of_a_container(store):
    """A device's chart has the container's packets at that device."""
    asked = Asked(container="c0", device="br0", run="run-1")
    [found] = sql.table(
        store,
        "SELECT count(*) AS n, max(delay_ns) AS most FROM delays WHERE run = 'run-1' AND device = 'br0' AND packet IN"
        " (SELECT packet FROM delays WHERE run = 'run-1' AND container = 'c0' AND segment = 'overhead')",
    ).to_pylist()
    columns = view(store, "time", asked).columns
    assert (sum(columns["count"]), max(columns["max_ns"])) == (found["n"], found["most"])


@pytest.fixture
def bounded(path):
    """The store's reader with fewer rows than the store has."""
    return StoreReader(path, most_rows=100)


def test_of_too_many_rows_devices_are_from_windows_and_say_so(bounded, store):
    asked = Asked(container="c0", run="run-1")
    for name in ("devices", "distributions"):
        found = view(bounded, name, asked)
        assert "more than 100 rows: the devices are from windows" in found.about["note"]
        assert found.columns == view(store, name, replace(asked, figures="windows")).columns
        assert {row["device"] for row in rows(found)} < {row["device"] for row in rows(view(store, name, asked))}
    for name in ("time", "heat"):
        of_device = replace(asked, device=next(row["device"] for row in rows(found)))
        drawn = view(bounded, name, of_device)
        assert "from windows" in drawn.about["note"]
        # Overhead is in windows as it is in rows: nothing is left out, and nothing said.
        whole = view(bounded, name, asked)
        assert sum(drawn.columns["count"]) == sum(whole.columns["count"]) > 0
        assert whole.columns == view(store, name, asked).columns
        assert "windows" not in whole.about["note"]
    assert view(bounded, "overview", Asked()).columns == view(store, "overview", Asked()).columns


def test_of_too_many_rows_packets_are_the_newest_and_say_so(bounded, store):
    asked = Asked(container="c0", host="testhost")
    found, everything = view(bounded, "packets", asked), view(store, "packets", asked)
    assert "of the newest 100 rows" in found.about["note"]
    assert set(found.columns["run"]) == {"run-2"}
    assert 0 < found.about["found"] < everything.about["found"]
    assert "newest" not in everything.about["note"]


def test_rows_are_counted_by_their_share_of_an_hour(path):
    [run] = [run for run in StoreReader(path).runs() if run.run == "run-1"]
    middle = (run.started_utc_ns + run.upto_utc_ns) // 2
    whole = StoreReader(path)._rows_of("delays", Filter())
    for most_rows, since_ns, expected in ((whole, None, False), (whole - 1, None, True), (whole - 1, middle, False)):
        assert StoreReader(path, most_rows=most_rows).too_many(Filter(since_ns=since_ns, host="testhost")) is expected


def test_a_region_has_its_packets_slowest_first(store):
    everything = store.delays(Filter(run="run-1")).to_pandas()
    overhead = everything[(everything.segment == "overhead") & (everything.container == "c0")]
    low, high = (int(v) for v in np.quantile(overhead.delay_ns, [0.6, 0.9]))
    since, until = START_NS, int(np.quantile(overhead.time.astype("int64"), 0.5))
    inside = overhead[
        (overhead.delay_ns >= low) & (overhead.delay_ns <= high) & (overhead.time.astype("int64") < until)
    ].sort_values(["delay_ns", "packet"], ascending=[False, True])
    asked = Asked(container="c0", run="run-1", since=str(since), until=str(until), low_ns=low, high_ns=high, limit=5)
    found = view(store, "packets", asked)
    assert found.about["found"] == len(inside) > 5
    assert found.columns["delay_ns"] == inside.delay_ns.tolist()[:5]
    assert found.as_dict()["columns"]["packet"] == [str(number) for number in inside.packet.tolist()[:5]]


def test_a_packet_hop_by_hop(store):
    first = {name: column[0] for name, column in view(store, "packets", Asked(run="run-1")).columns.items()}
    found = view(store, "packet", Asked(packet=first["packet"], run="run-1", near_ns=first["utc_ns"]))
    devices = [row for row in rows(found) if row["segment"] == "device"]
    assert sum(row["delay_ns"] for row in devices) == first["delay_ns"]
    assert found.about["packet"]["overhead_ns"] == {first["direction"]: first["delay_ns"]}
    with pytest.raises(UsageError, match="no rows of a packet 99"):
        view(store, "packet", Asked(packet=99))


def test_sources_stand_side_by_side(store):
    found = view(store, "sources", Asked(host="testhost"))
    assert found.about["sources"] == ["other", "synthetic"]
    medians = {(r["container"], r["direction"], r["source"]): r["p50_ns"] for r in rows(found)}
    assert len(medians) == 8
    for container in ("c0", "c1"):
        assert medians[container, "egress", "other"] > medians[container, "egress", "synthetic"]


def test_hosts_with_equal_containers_stay_apart(store):
    found = rows(view(store, "overview", Asked()))
    assert sorted({(row["host"], row["container"]) for row in found}) == [
        (host, container) for host in ("far", "testhost") for container in ("c0", "c1")
    ]
    [far] = [r for r in found if (r["host"], r["container"], r["direction"]) == ("far", "c0", "egress")]
    expected = store.grouped(Filter(host="far"))["far", "c0", "egress"]
    assert {name: far[name] for name in expected.as_dict()} == expected.as_dict()
    assert view(store, "runs", Asked(host="far")).columns["run"] == ["run-3"]


@pytest.mark.parametrize("name", [name for name in views.VIEWS if name != "packet"])
def test_every_view_has_its_ledger_and_its_losses(name, tmp_path):
    fill(tmp_path, [make_results(make_delays(50), ledger=Ledger(records=10, matched=10, lost=1234))])
    about = view(StoreReader(tmp_path), name, Asked()).about
    assert about["ledger"]["lost"] == 1234
    assert about["losses"] == ["1,234 records were lost in the kernel's ring: the figures are without them."]


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "windows"])
def test_the_overview_says_which_ingress_no_hook_shows(tmp_path, rows):
    """It says what the report says, of all containers, without reading their distributions."""
    delays = make_delays(400, containers=2, gap_ns=100_000_000)
    devices = topology(2)
    devices = (replace(devices[0], kind="macvlan"), *devices[1:])
    egress = delays[(delays.direction == Direction.EGRESS) | (delays.device == 0)]
    fill(tmp_path, [make_results(egress, devices=devices, windows=both_widths(egress))], rows=rows)
    store = StoreReader(tmp_path)
    told = view(store, "overview", Asked()).about["losses"]
    assert told == store.summary().losses()
    assert len(told) == 2
    assert "is a macvlan" in told[0]
    assert "was seen to receive 0" in told[1]


def both_widths(delays):
    return (*make_windows(delays), *make_windows(delays, 10))


# `tests/unit/storage/test_round_trips.py` has a store with round trips, `test_cpus.py` one with stages.
@pytest.mark.parametrize("name", [name for name in views.VIEWS if name not in {"packet", "round_trips", "cpus"}])
def test_an_empty_view_has_the_same_columns_and_types(name, store):
    nothing = view(store, name, Asked(since="1000000000000000000", until="1000000000000000001"))
    full = view(store, name, Asked())
    assert nothing.table().schema == full.table().schema
    assert len(full.table()) > len(nothing.table()) == 0
    assert pa.null() not in full.table().schema.types


def test_the_last_minute_counts_from_the_newest_data(tmp_path):
    early, late = make_delays(100), make_delays(100, start_ns=START_NS + 600 * 10**9, first_packet=1000)
    fill(tmp_path, [make_results(early), make_results(late, packets=200)])
    reader = StoreReader(tmp_path)
    assert sum(view(reader, "overview", Asked(last="1m")).columns["count"]) == 100
    assert sum(view(reader, "overview", Asked(last="20m")).columns["count"]) == 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"containr": "c0"}, "no parameter 'containr'.*did you mean 'container'"),
        ({"points": "315360000"}, "points 315,360,000: expected 1 to 2,000"),
        ({"points": "-1"}, "points '-1': expected a whole number"),
        ({"points": "٣"}, "expected a whole number"),
        ({"limit": "1001"}, "expected 1 to 1,000"),
        ({"direction": "up"}, "direction 'up': expected egress or ingress"),
        ({"segment": "wire"}, "no segment 'wire'; there are device"),
        ({"last": "1h", "since": "2h"}, "last excludes since and until"),
        ({"figures": "all"}, "figures 'all': expected auto, rows, windows"),
    ],
)
def test_wrong_parameters_are_errors(given, said):
    with pytest.raises(UsageError, match=said):
        Asked.of(given)


def test_a_filter_and_what_asks_for_it():
    where = Filter(1_700_000_000_000_000_001, 1_800_000_000_000_000_001, "c", "d", Direction.INGRESS, "r", "h")
    asked = Asked.like(where, "rows")
    assert asked.filter(0) == where
    assert Asked.of({name: str(value) for name, value in asdict(asked).items()}) == replace(asked)
    assert asked.segments() == (Segment.DEVICE, Segment.OUTSIDE)


def test_a_trace_has_the_packet_and_its_neighbours(store, tmp_path):
    [found] = store.worst(1, Filter(run="run-1"))
    packets = packet_trace.write(store, found, tmp_path / "x.pftrace")
    near = store.delays(
        Filter(found.utc_ns - packet_trace.AROUND_NS, found.utc_ns + packet_trace.AROUND_NS, run="run-1")
    )
    assert packets == len(near["packet"].unique()) > 1
    assert (tmp_path / "x.pftrace").stat().st_size > 1000
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.slow
@pytest.mark.needs("trace_processor")
def test_perfettos_own_reader_finds_each_row_of_the_trace(store, tmp_path):
    [found] = store.worst(1, Filter(run="run-1"))
    file, around = tmp_path / "x.pftrace", packet_trace.AROUND_NS
    packet_trace.write(store, found, file)
    errors, slices = trace_processor.ask(
        file.read_bytes(),
        "select name, value from stats where value > 0 and severity in ('error', 'data_loss')",
        "select s.ts, extract_arg(s.arg_set_id, 'debug.packet') as packet,"
        " extract_arg(s.arg_set_id, 'debug.delay_ns') as delay_ns from slice s",
    )
    near = store.delays(Filter(found.utc_ns - around, found.utc_ns + around, run="run-1"))
    expected = zip(near["time"].cast(pa.int64()).to_pylist(), near["delay_ns"].to_pylist(), strict=True)
    assert errors == []
    assert sorted((each["ts"], each["delay_ns"]) for each in slices) == sorted(expected)
