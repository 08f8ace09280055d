"""A recording of a live run, replayed: the same rows, windows, ledger, to the last bit, however it is cut."""

import json

import pytest

from collector.capture_source import read
from mace.lab import Spec, running
from mace.records import Batch
from tests.measuring import mace, measured
from tests.property.test_engine_reference import all_rows, all_windows

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with running(Spec(name="again", containers=2)) as lab, measured(lab, tmp_path_factory.mktemp("again")) as found:
        flood = lab.start_udp("c2", count=100_000, duration_s=2, size=18)
        lab.ping("c1", count=200)
        lab.tcp("c1", size=5_000_000)
        flood.wait()
    return found


def test_the_same_json(run, tmp_path):
    again = mace("replay", run.capture, "--store", tmp_path / "store", "--json").stdout
    live = mace("replay", run.capture, "--json").stdout
    assert again == live
    assert json.loads(again) == run.found


def test_the_same_report_from_either_store(run, tmp_path):
    mace("replay", run.capture, "--store", tmp_path / "store")
    reports = [mace("report", "--store", store, "--json").stdout for store in (run.store, tmp_path / "store")]
    assert reports[0] == reports[1]


def test_the_same_rows_in_both_stores(run, tmp_path):
    mace("replay", run.capture, "--store", tmp_path / "store")
    live = run.rows()
    run.store = tmp_path / "store"
    again = run.rows()
    assert len(live) > 1000

    def ordered(rows):
        return sorted(tuple(row.items()) for row in rows)

    assert ordered(live) == ordered(again)


@pytest.mark.parametrize(("cut", "slice_ns"), [(1_000, 100_000_000), (None, 10_000_000), (333, 1_000_000_000)])
def test_other_cuts_change_nothing(run, cut, slice_ns):
    from correlator.engine import Engine, EngineConfig

    def correlate(cut, slice_ns):
        engine = Engine(0, EngineConfig(slice_ns=slice_ns))
        results = []
        for item in read(run.capture):
            if isinstance(item, Batch) and cut:
                for start in range(0, len(item), cut):
                    results += engine.feed(item[start : start + cut])
            else:
                results += engine.feed(item)
        return [*results, engine.finish()]

    whole, other = correlate(None, 100_000_000), correlate(cut, slice_ns)
    assert all_rows(other) == all_rows(whole)
    assert all_windows(other) == all_windows(whole)
    assert other[-1].ledger == whole[-1].ledger
