"""A replayed recording gives the live run's rows, windows and ledger bit for bit, for any batch boundaries."""

import json

import numpy as np
import pytest

from collector.capture.source import Capture
from contracts.records import Batch
from contracts.schema import Delays
from correlator.engine import Engine, EngineConfig
from mace.lab import Spec, running
from tests.measuring import balanced, files, mace, measured, query
from tests.property.test_engine_reference import all_windows

pytestmark = pytest.mark.needs("root", "tracefs", "netns")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Record a flood, bulk TCP, pings, and a container that is added and removed, so that the topology changes."""
    with (
        running(Spec(name="again", containers=2)) as lab,
        measured(lab, tmp_path_factory.mktemp("again"), "--ring-mib", "32") as found,
    ):
        flood = lab.start_udp("c2", count=20_000, size=18)
        lab.ping("c1", count=100)
        lab.add_container("guest")
        lab.tcp("c1", size=5_000_000)
        lab.ping("guest", count=50, interval_s=0.005)
        lab.remove_container("guest")
        flood.wait()
    assert balanced(found.found).records > 100_000
    return found


@pytest.fixture(scope="module")
def again(run, tmp_path_factory):
    """Replay the recording; returns the command's JSON and the store."""
    store = tmp_path_factory.mktemp("replayed") / "store"
    return mace("replay", run.capture, "--store", store, "--json").stdout, store


def of_the_stream(found):
    """Return a live run's figures without what recording cost, which the source measures apart from the stream."""
    return {name: value for name, value in found.items() if name != "cost"}


@pytest.mark.slow
def test_the_same_json(run, again):
    assert json.loads(again[0]) == of_the_stream(run.found)
    assert mace("replay", run.capture, "--json").stdout == again[0], "without a store"


@pytest.mark.slow
def test_the_same_report_from_either_store(run, again):
    live, replayed = (json.loads(mace("report", "--store", store, "--json").stdout) for store in (run.store, again[1]))
    assert replayed == of_the_stream(live)


@pytest.mark.parametrize("table", ["delays", "windows"])
def test_the_same_rows_in_both_stores(run, again, table):
    """Both stores have the same rows equally often, in all columns, including the windows' histograms."""
    live, replayed = (f"(SELECT * FROM {files(store, table)})" for store in (run.store, again[1]))
    [(count,)] = query(run.store, f"SELECT count(*) FROM {live}").fetchall()
    assert count > (100_000 if table == "delays" else 50)
    assert query(run.store, f"{live} EXCEPT ALL {replayed} LIMIT 5").fetchall() == []
    assert query(run.store, f"{replayed} EXCEPT ALL {live} LIMIT 5").fetchall() == []


def test_the_last_ledger_in_both_stores_is_the_same(run, again):
    # The number and time of the last flush depend on the wall clock.
    last = "SELECT * EXCLUDE (time, flush) FROM ledger WHERE closed"
    live, replayed = (query(store, last).fetchall() for store in (run.store, again[1]))
    assert live == replayed
    assert len(live) == 1


def cut_small(items, rng):
    """Return the stream in batches of other sizes, from single records to thousands."""
    for item in items:
        if not isinstance(item, Batch):
            yield item
            continue
        start = 0
        while start < len(item):
            size = int(rng.integers(1, 3_000))
            yield item[start : start + size]
            start += size


def glued(items):
    """Return the stream with all batches between two topologies joined."""
    parts = []
    for item in items:
        if isinstance(item, Batch):
            parts.append(item)
            continue
        if parts:
            yield Batch.concatenate(parts)
        parts = []
        yield item
    if parts:
        yield Batch.concatenate(parts)


@pytest.mark.slow
@pytest.mark.parametrize("slice_ns", [10_000_000, 1_000_000_000])
@pytest.mark.parametrize("cut", ["small", "glued"])
def test_batch_boundaries_change_nothing(run, cut, slice_ns):
    def correlate(items, slice_ns):
        engine = Engine(0, EngineConfig(slice_ns=slice_ns))
        results = [result for item in items for result in engine.feed(item)]
        return [*results, engine.finish()]

    def of_the_recording():
        with Capture(run.capture) as capture:
            yield from capture

    whole = correlate(of_the_recording(), EngineConfig().slice_ns)
    stream = cut_small(of_the_recording(), np.random.default_rng(5)) if cut == "small" else glued(of_the_recording())
    other = correlate(stream, slice_ns)
    assert sorted_rows(other) == sorted_rows(whole)
    assert all_windows(other) == all_windows(whole)
    assert other[-1].totals.ledger == whole[-1].totals.ledger
    assert other[-1].totals.packets == whole[-1].totals.packets


def sorted_rows(results):
    """Return all rows as bytes, in an order that depends only on the rows."""
    rows = Delays.concatenate([result.rows.delays for result in results])
    devices = results[-1].rows.devices
    # Of a device that came and went the table of devices may or may not know, where no row refers to it.
    order = sorted({devices[n] for n in np.unique(rows.device)}, key=repr)
    place = {device: n for n, device in enumerate(order)}
    device = np.array([place.get(d, -1) for d in devices], np.int32)[rows.device]
    columns = [
        device,
        *(getattr(rows, name) for name in ("packet", "position", "segment", "utc_ns", "delay_ns", "l3_len")),
    ]
    columns += [rows.direction, rows.grade, rows.outcome]
    by = np.lexsort(columns)
    return b"".join(column[by].tobytes() for column in columns), [repr(d) for d in order]
