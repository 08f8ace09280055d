"""Round trips in a store: written as a run of their own, read as rows and as figures over time."""

import asyncio
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from contracts.errors import StoreError
from mace.commands import settings
from mace.shown.views import Asked, view
from storage import sql
from storage.embedded import EmbeddedStore
from storage.query import Filter, StoreReader
from tests.made_results import START_NS, header, make_delays, make_results
from tests.made_trips import COUNT, LEDGER, kept, made_trips
from tests.unit.storage.stored import fill

HOUR_NS = 3_600_000_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store with a run of packets, a ping with probes, and a fping without probes."""
    made = tmp_path_factory.mktemp("store")
    fill(made, [make_results(make_delays(200, containers=2), containers=2)])
    kept(made, made_trips())
    kept(made, made_trips(probes=False, tool="fping", destination="", container="c2"), "fping-1")
    return made


def test_every_sample_is_a_row(path):
    trips = made_trips()
    rows = trips.rows
    found = sql.table(
        StoreReader(path), "SELECT *, epoch_ns(time) AS utc_ns FROM round_trips WHERE run = 'ping-1' ORDER BY seq"
    ).to_pylist()
    assert len(found) == COUNT
    assert [row["utc_ns"] for row in found[:-1]] == rows.utc_ns[:-1].tolist()
    assert found[-1]["utc_ns"] == START_NS, "without a time of its own: when the run began"
    figures = ("host_rtt_ns", "host_rtt_lower_bound_ns", "nic_rtt_ns", "egress_ns", "ingress_ns")
    for name in (*figures, "tracer_cost_ns", "tracer_cost_error_ns"):
        assert [row[name] for row in found[:-2]] == getattr(rows, name)[:-2].tolist()
        assert [row[name] for row in found[-2:]] == [None, None]
    assert [row["tool_rtt_ns"] for row in found] == [*rows.tool_rtt_ns[:-2].tolist(), None, None]
    assert {row["temporal_error_ns"] for row in found} == {None}
    assert [(row["reason"], row["grade"]) for row in found[-3:]] == [
        ("paired", "exact"),
        ("no_reply", ""),
        ("no_reply", ""),
    ]
    same = ("container", "container_id", "netns", "tool", "destination", "source")
    assert {tuple(row[name] for name in same) for row in found} == {
        ("c1", "id-1", "c1", "ping", "203.0.113.2", "synthetic")
    }


def test_the_call_is_a_run_with_its_ledger(path):
    found = StoreReader(path).runs(Filter(run="ping-1"))
    assert [(r.ledger, r.packets, r.rows_stored, r.closed) for r in found] == [(LEDGER, 2 * COUNT, 0, True)]
    summary = StoreReader(path).summary()
    assert summary.ledger.lost == 2 * LEDGER.lost
    assert summary.note == "", "it has neither rows nor windows that figures could be from"


def test_the_view_has_the_quantiles_of_the_rows(path):
    found = view(StoreReader(path), "round_trips", Asked(container="c1", points=7))
    whole = {row["figure"]: row for row in pa.table(found.about["whole"]).to_pylist()}
    rows = sql.table(StoreReader(path), "SELECT * FROM round_trips WHERE container = 'c1' AND reason = 'paired'")
    assert list(whole) == ["tool_rtt", "host_rtt", "host_rtt_lower_bound", "nic_rtt", "egress", "ingress"]
    for name, figures in whole.items():
        exact = np.sort(rows[f"{name}_ns"].to_numpy())
        assert (figures["count"], figures["min_ns"], figures["max_ns"]) == (COUNT - 2, exact[0], exact[-1])
        assert figures["p50_ns"] == pytest.approx(exact[(len(exact) - 1) // 2], rel=2**-8)
    assert found.about["samples"] == {"no_reply": 2, "paired": COUNT - 2}
    table = found.table().to_pandas()
    assert table.groupby("figure")["count"].sum().to_dict() == dict.fromkeys(whole, COUNT - 2)
    assert 5 <= table["utc_ns"].nunique() <= 7
    assert set(table["destination"]) == {"203.0.113.2"}


def test_without_probes_there_is_no_host_rtt_but_its_lower_bound(path):
    found = view(StoreReader(path), "round_trips", Asked(container="c2"))
    assert "host_rtt" not in found.columns["figure"]
    assert "host_rtt_lower_bound" in found.columns["figure"]
    assert set(found.columns["tool"]) == {"fping"}


def test_the_filter_leaves_out_what_it_should(path):
    reader = StoreReader(path)
    until = START_NS + 100 * 10**7
    found = reader.round_trips(Filter(until_ns=until, run="ping-1"))
    assert found.samples == {"no_reply": 1, "paired": 100}, "the sample without a time has the run's"
    nothing = view(reader, "round_trips", Asked(container="c9"))
    assert nothing.about["samples"] == {}
    assert nothing.table().schema == view(reader, "round_trips", Asked(container="c1")).table().schema


def test_samples_of_two_hours_are_in_the_partitions_of_both(tmp_path):
    trips = made_trips(10)
    later = trips.rows.utc_ns.copy()
    later[5:8] += HOUR_NS
    trips = replace(trips, rows=replace(trips.rows, utc_ns=later))
    kept(tmp_path, trips)
    assert len({each.hour for each in StoreReader(tmp_path).segments("round_trips")}) == 2
    assert StoreReader(tmp_path).round_trips().samples == {"paired": 8, "no_reply": 2}


def test_merging_keeps_unknown_values_unknown(tmp_path):
    for number in range(3):
        kept(tmp_path, made_trips(20, probes=False), f"ping-{number}")
    before = sql.table(StoreReader(tmp_path), "SELECT * FROM round_trips ORDER BY run, seq")
    kept(
        tmp_path,
        replace(made_trips(5), rows=replace(made_trips(5).rows, utc_ns=made_trips(5).rows.utc_ns + HOUR_NS)),
        "later",
    )

    async def merged():
        sink = EmbeddedStore(tmp_path, fsync=False, flush_interval_s=60.0)
        await sink.open(header("merging"))
        gone = sink.merge()
        await sink.aclose()
        return gone

    assert asyncio.run(merged()) > 0
    hour = StoreReader(tmp_path).segments("round_trips")[0].hour
    assert len([each for each in StoreReader(tmp_path).segments("round_trips") if each.hour == hour]) == 1
    after = sql.table(StoreReader(tmp_path), "SELECT * FROM round_trips WHERE run != 'later' ORDER BY run, seq")
    assert after.equals(before)
    assert after["host_rtt_ns"].null_count == len(after)
    assert pa.types.is_int64(after["host_rtt_ns"].type)


def test_a_store_that_is_being_written_is_refused_before_the_tool_runs(tmp_path):
    settings.refuse_unwritable(None, "mace ping")
    settings.refuse_unwritable(tmp_path / "new", "mace ping")
    assert not (tmp_path / "new").exists()

    async def busy():
        sink = EmbeddedStore(tmp_path / "busy", fsync=False)
        await sink.open(header())
        try:
            with pytest.raises(StoreError, match=r"process \d+ .* is writing to this store"):
                settings.refuse_unwritable(tmp_path / "busy", "mace ping")
        finally:
            await sink.aclose()

    asyncio.run(busy())
    settings.refuse_unwritable(tmp_path / "busy", "mace ping")
