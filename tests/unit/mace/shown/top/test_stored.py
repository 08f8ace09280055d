"""A minute of a store looks like that minute did live."""

import asyncio
import shutil

import pytest

from contracts.errors import StoreError, UsageError
from contracts.recent import containers, paths
from mace.shown.top.stored import StoredFeed
from storage.query import Filter, StoreReader
from tests.made_minutes import BEGIN_NS, NS, make_minute, moment_after
from tests.unit.storage.stored import fill


@pytest.fixture(scope="module")
def minute():
    return make_minute(seconds=130, containers=3, packets_per_s=20)


@pytest.fixture(scope="module")
def store(minute, tmp_path_factory):
    path = tmp_path_factory.mktemp("looked-at") / "store"
    fill(path, minute[2])
    return StoreReader(path)


def of_host(rows):
    """Return rows as the store has them, which names the host."""
    return [(row.owner.name, row.direction, row.segment, row.place and row.place.device, row.figures) for row in rows]


@pytest.mark.parametrize("seconds", [130, 100, 30])
@pytest.mark.parametrize("window_s", [1, 10, 60])
def test_it_is_as_it_was_live(minute, store, seconds, window_s):
    live = moment_after(minute[2][:seconds])
    feed = StoredFeed(store, "store", BEGIN_NS + seconds * NS)
    look = asyncio.run(feed.look())
    assert of_host(containers(look.moment, window_s)) == of_host(containers(live, window_s))
    for moment in (live, look.moment):
        assert len({row.owner for row in containers(moment, window_s)}) == 3
    both = [
        paths(moment, window_s, {(row.owner, row.direction) for row in containers(moment, window_s)})
        for moment in (live, look.moment)
    ]
    assert [of_host(rows) for rows in both[0].values()] == [of_host(rows) for rows in both[1].values()]


def test_it_begins_at_the_end_and_stays_within_the_store(store):
    feed = StoredFeed(store, "store")
    end = asyncio.run(feed.look()).moment.until_utc_ns
    assert end == BEGIN_NS + 130 * NS
    feed.move(10)
    assert asyncio.run(feed.look()).moment.until_utc_ns == end
    feed.move(-60)
    assert asyncio.run(feed.look()).moment.until_utc_ns == end - 60 * NS
    feed.move(None)
    first = asyncio.run(feed.look())
    assert first.moment.until_utc_ns <= BEGIN_NS + 1 * NS
    feed.move(-10)
    assert asyncio.run(feed.look()).moment.until_utc_ns == first.moment.until_utc_ns
    feed.move(0, to_end=True)
    assert asyncio.run(feed.look()).moment.until_utc_ns == end


def test_its_worst_packets_are_those_of_the_minute(store):
    feed = StoredFeed(store, "store", BEGIN_NS + 100 * NS)
    look = asyncio.run(feed.look())
    where = Filter(BEGIN_NS + 40 * NS, BEGIN_NS + 100 * NS)
    assert asyncio.run(feed.worst(4, look, None)) == store.worst(4, where)
    of_one = asyncio.run(feed.worst(4, look, lambda name: name == "c1"))
    assert {path.container for path in of_one} == {"c1"}
    assert [path.packet for path in of_one] == [
        path.packet for path in store.worst(40, where) if path.container == "c1"
    ][:4]


def test_the_ledger_is_of_whole_runs(store, minute):
    look = asyncio.run(StoredFeed(store, "store", BEGIN_NS + 50 * NS).look())
    assert look.whole_runs
    assert look.ledger == minute[2][-1].totals.ledger


def test_it_has_nothing_to_record(store):
    feed = StoredFeed(store, "store")
    for work in (feed.record, feed.trace):
        with pytest.raises(UsageError):
            asyncio.run(work())


def test_a_run_without_packets_has_an_empty_table(tmp_path):
    fill(tmp_path / "store", [])
    look = asyncio.run(StoredFeed(StoreReader(tmp_path / "store"), "store").look())
    assert containers(look.moment, 60) == []


def test_a_store_without_a_run_says_so(tmp_path):
    fill(tmp_path / "store", [])
    shutil.rmtree(tmp_path / "store" / "runs")
    with pytest.raises(StoreError, match="no run"):
        StoredFeed(StoreReader(tmp_path / "store"), "store")
