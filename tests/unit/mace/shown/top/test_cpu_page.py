"""The page of CPUs in `mace top` has the numbers of `mace report --cpus`, of a store and live."""

import asyncio
import io
import json
from dataclasses import replace

import pytest

from contracts.errors import UsageError
from mace.live.recent_stages import RecentStages
from mace.shown import cpus
from mace.shown.terminal import PlainConsole
from mace.shown.top.screen import Messages, TopApp
from mace.shown.top.stored import StoredFeed
from storage.query import Filter, StoreReader
from tests.durations import S
from tests.made_results import START_NS, header, make_delays, make_results, make_stages, with_rows
from tests.unit.mace.shown.test_cpus import ROWS, made, readings
from tests.unit.mace.shown.top.test_screen import MadeFeed, shown, until
from tests.unit.storage.stored import fill

WIDTH = 250


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return StoreReader(made(tmp_path_factory.mktemp("cpus") / "store", cpus=readings(softirqs=True)))


def reported(store):
    """Return the lines of the tables and sentences of `mace report --cpus`."""
    out = io.StringIO()
    cpus.show(store, Filter(), PlainConsole(width=WIDTH, file=out), form="table")
    lines = [line.rstrip() for line in out.getvalue().split("\n") if line.strip()]
    (ledger,) = (number for number, line in enumerate(lines) if " ledger: " in line)
    return lines[:ledger]


def paged(feed, *, size=(WIDTH, 60), keys=("c",), wait="CPU"):
    """Return the screen's text after the keys, once it has this text."""
    app, found = TopApp(feed, Messages()), []

    async def run():
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app.table._lines)
            await pilot.press(*keys)
            await until(pilot, lambda: wait in shown(app))
            found.append(shown(app))

    asyncio.run(run())
    return found[0]


def test_a_store_has_every_line_of_the_report(store):
    told = paged(StoredFeed(store, "made"), wait="of the work for these packets")
    lines = {line.rstrip() for line in told.split("\n")}
    expected = reported(store)
    assert any("83 % of the work for these packets runs on CPU 0" in line for line in expected)
    assert {"Receive softirqs, µs", "Stages: CPU that passed the packet on → CPU that ran it, µs"} <= {*expected}
    assert [line for line in expected if line not in lines] == []


def test_a_narrow_screen_is_moved_over_the_tables(store):
    """A table keeps its width: no number is cut in two, and left and right show the rest."""
    feed, size = StoredFeed(store, "made"), (60, 40)
    first = paged(feed, size=size, wait="Stages")
    (heading,) = (line for line in reported(store) if line.startswith("device") and "run p99" in line)
    assert heading[:60].rstrip() in {line.rstrip() for line in first.split("\n")}
    assert "run p99" not in first
    assert "run p99" in paged(feed, size=size, keys=("c", *["right"] * 6), wait="run p99")
    again = paged(feed, size=size, keys=("c", *["right"] * 6, *["left"] * 6), wait="device")
    assert heading[:60].rstrip() in {line.rstrip() for line in again.split("\n")}


def test_a_store_without_stages_says_what_to_do(tmp_path):
    fill(tmp_path / "none", [make_results(make_delays(10))])
    feed = StoredFeed(StoreReader(tmp_path / "none"), "none")
    assert "measure or replay with --cpus" in paged(feed, wait="--cpus")


def rows():
    counts, places = make_stages(ROWS)
    devices = tuple(replace(device, container="c0") for device in make_results(make_delays(20)).rows.devices)
    return with_rows(make_results(make_delays(20)), stages=counts, places=places, devices=devices).rows


def test_live_figures_are_those_of_the_store(store):
    """Of the same counts and counters; a store's softirqs apart, which are not followed live."""
    read, recent = readings(), RecentStages()
    recent.begin(header(), read().counters)
    with pytest.raises(UsageError, match="nothing is counted yet"):
        recent.chosen(0).report()
    recent.add(rows(), read().counters)
    live, stored = (
        json.loads(json.dumps(each.as_dict())) for each in (recent.chosen(0).report(), cpus.figures(store, Filter()))
    )
    assert live["stages"] == stored["stages"]
    assert live["containers"] == stored["containers"]
    for one, other in zip(live["cpus"], stored["cpus"], strict=True):
        assert {name: value for name, value in one.items() if name != "softirqs"} == {
            name: value for name, value in other.items() if name != "softirqs"
        }


def test_live_figures_are_of_the_last_minute():
    recent, whole = RecentStages(), rows()
    recent.begin(header(), ())
    for number in range(20):
        columns = replace(whole, stages=later(whole.stages, number * 10 * S))
        recent.add(columns, ())
    assert len(recent._parts) <= 7
    assert len(recent._readings) <= 7
    since = START_NS // (10 * S) * 10 * S + 160 * S
    found = recent.chosen(since)
    assert (len(found.parts), found.span_ns) == (4, 40 * S)
    once = recent.chosen(since + 30 * S).report().containers[0].packets
    assert found.report().containers[0].packets == 4 * once > 0


def later(stages, ns):
    return stages.with_column("start_utc_ns", stages.column("start_utc_ns") + ns)


def test_live_without_the_option_says_so():
    class Refusing(MadeFeed):
        async def cpus(self, look):
            raise UsageError("start `mace top --cpus`")

    assert "start `mace top --cpus`" in paged(Refusing(), wait="--cpus")
