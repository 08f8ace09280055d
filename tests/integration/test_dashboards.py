"""Every query of every dashboard runs on a real InfluxDB that the real pipeline has filled.

The data are two captures of the same traffic, by the module and by ftrace (tests/golden/both-sources); the module's own
cost, recorded in a live run; and a live run and ping here by ftrace, because only these report health and host RTTs.
"""

import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pytest

from mace import lab
from tests.influxql import ALL, PanelQuery, as_grafana_would
from tests.measuring import on_one_cpu, well_traced_cpu
from tests.places import GOLDEN
from tests.servers import Influx

FILES = GOLDEN / "both-sources"
STEP_S = 10
LIVE_STEP_S = 2
"""The live run is short; a difference needs two steps."""

pytestmark = [pytest.mark.slow, pytest.mark.needs("influxd", "root", "tracefs", "netns")]


def mace(*args: object) -> str:
    return subprocess.run(
        [sys.executable, "-m", "mace", *map(str, args)], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Provide the filled server, with the times of the captures (`then`) and of the live run (`now`)."""
    place = tmp_path_factory.mktemp("influx")
    influx = Influx(place / "server").start()
    try:
        for source in ("kmod", "ftrace"):
            told = (
                "replay",
                FILES / f"{source}.mace",
                "--cpus",
                "--store",
                place / source,
                "--influxdb",
                influx.url,
                "--json",
            )
            mace(*told, "--config", config(place, source))
        said, capture = FILES / "ping.txt", FILES / "kmod.mace"
        mace("correct", said, capture, "--container", "c1", "--influxdb", influx.url, "--config", config(place, "rtt"))
        health = (FILES / "module-health.lp").read_bytes()
        urllib.request.urlopen(f"{influx.url}/write?db=mace", data=health, timeout=30).close()
        then = span(influx)
        live(influx, place)
        whole = span(influx)
        yield SimpleNamespace(influx=influx, place=place, then=then, now=(then[1] + 1, whole[1]))
    finally:
        influx.stop()


def config(place: Path, name: str) -> Path:
    path = place / f"{name}.toml"
    path.write_text(f'[sinks.influxdb]\nspool = "{place / name}-spool"\n')
    return path


def live(influx: Influx, place: Path) -> None:
    with lab.running(lab.Spec("dashboards")) as made:
        name = made.name
        traffic = threading.Thread(target=lambda: made.ping("c1", "remote", count=1500, interval_s=0.004))
        traffic.start()
        try:
            mace(
                *("run", "--lab", name, "--source", "ftrace", "--duration", 5, "--store", place / "live", "--json"),
                *("--influxdb", influx.url, "--config", config(place, "live")),
            )
        finally:
            traffic.join()
        # Only a live tool has a host RTT, for probes run beside it, and known waits, for its tasks are followed.
        with on_one_cpu(well_traced_cpu()):
            mace(
                *("ping", "--lab", name, "--container", "c1", "--source", "ftrace", "-c", 200, "-i", "0.02", "--json"),
                *("--influxdb", influx.url, "--config", config(place, "pinged"), made.address("remote")),
            )


def span(influx: Influx) -> tuple[int, int]:
    """Return the first and the last time of all rows, ns."""
    ends = []
    for order in ("ASC", "DESC"):
        times = []
        for name, field in (("device_window", "count"), ("mace_internal", "records"), ("rtt", "seq")):
            for one in influx.query(f'SELECT "{field}" FROM "{name}" ORDER BY time {order} LIMIT 1'):
                times.append(one["values"][0][0])
        ends.append(min(times) if order == "ASC" else max(times))
    return ends[0], ends[1]


EVERYTHING = dict.fromkeys(("host", "container", "device", "direction", "source"), ".*")


def rows(database, one: PanelQuery, chosen: dict[str, str], when: tuple[int, int]) -> list[dict]:
    step_s = STEP_S if when == database.then else LIVE_STEP_S
    text = as_grafana_would(one.text, interval_s=step_s, since_ns=when[0], until_ns=when[1], chosen=chosen)
    found = database.influx.query(text)
    assert all(series["values"] for series in found)
    return found


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.where)
def test_every_query_has_rows(database, one: PanelQuery):
    found = [series for when in (database.then, database.now) for series in rows(database, one, EVERYTHING, when)]
    assert found, one.text
    if one.is_variable:
        return
    # Not only nulls, in any of the columns that a panel shows.
    for column in range(1, len(found[0]["columns"])):
        values = [row[column] for series in found for row in series["values"]]
        assert any(value is not None for value in values), f"{found[0]['columns'][column]} is always empty"


@pytest.fixture(scope="module")
def values_of_variables(database) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for one in ALL:
        if one.is_variable:
            for series in rows(database, one, EVERYTHING, database.then):
                found.setdefault(one.panel["name"], set()).update(value for _, value in series["values"])
    return {name: sorted(values) for name, values in found.items()}


def test_variables_offer_the_stored_values(values_of_variables):
    assert values_of_variables["direction"] == ["egress", "ingress"]
    assert values_of_variables["source"] == ["ftrace", "kmod"]
    assert {"c1", "c2"} <= set(values_of_variables["container"])
    assert "eth0" in values_of_variables["device"]
    assert len(values_of_variables["host"]) == 2, "the machine of the captures, and this one"


def test_queries_show_the_chosen_values(database, values_of_variables):
    """Grafana inserts one chosen value literally, several as (a|b), both escaped."""
    several = {name: f"({'|'.join(map(re.escape, values))})" for name, values in values_of_variables.items()}
    nobody = dict.fromkeys(EVERYTHING, "nobody")
    for one in ALL:
        variables = set(re.findall(r"/\^\$(\w+)\$/", one.text))
        if one.is_variable or not variables:
            continue
        assert rows(database, one, EVERYTHING | nobody, database.then) == []
        if rows(database, one, EVERYTHING, database.then) and "container" not in variables:
            assert rows(database, one, several, database.then), one.where
    overview = next(one for one in ALL if one.where.startswith("overview: Overhead of the container path"))
    found = rows(database, overview, EVERYTHING | {"container": "c2", "source": "kmod"}, database.then)
    assert {series["tags"]["container"] for series in found} == {"c2"}
    assert {series["tags"]["direction"] for series in found} == {"egress", "ingress"}


def test_figures_are_those_of_the_store(database):
    """InfluxDB's quantiles for the dashboards equal those of the sorted rows of the embedded store."""
    overview = next(one for one in ALL if one.where.startswith("overview: Overhead of the container path"))
    compared = 0
    for source in ("kmod", "ftrace"):
        for series in rows(database, overview, EVERYTHING | {"source": source}, database.then):
            tags = series["tags"]
            delays = [
                row[0]
                for row in duckdb.sql(
                    f"SELECT delay_ns FROM read_parquet('{database.place}/{source}/delays/**/*.parquet') WHERE"
                    f" container = '{tags['container']}' AND direction = '{tags['direction']}' AND segment = 'overhead'"
                    " ORDER BY delay_ns"
                ).fetchall()
            ]
            found = dict(zip(series["columns"], series["values"][0], strict=True))
            assert found["packets"] == len(delays) > 50
            assert found["max"] == delays[-1]
            for name, percent in (("p50", 50), ("p99", 99), ("p99.9", 99.9)):
                # InfluxDB's rank: the nearest one, halves upwards.
                assert found[name] == delays[int(len(delays) * percent / 100 + 0.5) - 1], name
            compared += 1
    assert compared == 8, "two sources, two containers, two directions"


def test_means_are_exact_however_many_windows(database):
    """The path dashboard's means and maxima, from windows, equal those of the single packets."""
    path = next(one for one in ALL if one.where.startswith("path: Hop by hop"))
    compared = 0
    for series in rows(database, path, EVERYTHING | {"source": "kmod"}, database.then):
        tags = series["tags"]
        files = f"{database.place}/kmod/delays/**/*.parquet"
        total, count, largest = duckdb.execute(
            f"SELECT sum(delay_ns), count(*), max(delay_ns) FROM read_parquet('{files}')"
            " WHERE container = $container AND direction = $direction AND device = $device AND segment = $segment"
            " AND NOT waited",
            {name: tags[name] for name in ("container", "direction", "device", "segment")},
        ).fetchone()
        found = dict(zip(series["columns"], series["values"][0], strict=True))
        assert (found["packets"], found["max"]) == (count, largest), tags
        assert found["mean"] == pytest.approx(float(total) / count), tags
        assert found["worst p50"] <= found["worst p99"] <= found["max"] * 1.004
        compared += 1
    assert compared > 20


def test_a_loss_is_on_the_first_screen(database):
    """The first three panels show the losses that the captures' ledger has."""
    expected: dict[str, int] = {}
    for source in ("kmod", "ftrace"):
        ledger = json.loads(mace("replay", FILES / f"{source}.mace", "--json"))["ledger"]
        for name, count in ledger.items():
            expected[name] = expected.get(name, 0) + count
    for title in ("Records missing", "Records without a delay"):
        one = next(one for one in ALL if one.where.startswith(f"overview: {title}"))
        (series,) = rows(database, one, EVERYTHING, database.then)
        found = dict(zip(series["columns"], series["values"][0], strict=True))
        shown = {name: found[name] for name in found if name != "time"}
        assert shown == {name: expected[name] for name in shown}
