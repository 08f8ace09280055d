import argparse
import json
import re
import subprocess
import sys
from datetime import UTC, datetime

import pytest

import mace
from contracts.errors import MissingExtra, StoreError, UsageError
from contracts.figures import Summary
from contracts.ledger import Ledger
from mace.commands import report as command
from mace.commands.console import Console
from mace.commands.options import typed
from mace.shown import instants
from mace.shown.page import one_file
from storage.query import Filter, StoreReader
from tests.made_results import make_delays, make_results, make_windows
from tests.unit.storage.stored import fill


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("store")
    delays = make_delays(1000, containers=2)
    fill(made, [make_results(delays, containers=2, windows=make_windows(delays))])
    return made


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    made = tmp_path_factory.mktemp("lossy")
    ledger = Ledger(records=10, matched=10, lost=1234)
    fill(made, [make_results(make_delays(100), ledger=ledger)])
    return made


def run(path, *options):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(typed(command.Options, parser.parse_args(["--store", str(path), *map(str, options)])), Console())


def test_json_is_one_line_and_the_live_object(path, capsys):
    assert run(path, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    live = Summary()
    delays = make_delays(1000, containers=2)
    live.add(make_results(delays, containers=2, windows=make_windows(delays)))
    found = json.loads(out)
    [clock] = found.pop("clocks")
    assert (clock["run"], clock["uncertainty_ns"]) == ("run-1", 50)
    assert found == json.loads(json.dumps(live.as_dict()))


@pytest.mark.slow
def test_tables_and_typical_paths(path, capsys):
    run(path)
    out = capsys.readouterr().out
    assert re.search(r"c0\s+egress\s+\d", out)
    assert "c1 ← network: typical path" in out
    assert out.index("eth0") < out.index("br0") < out.index("rem0")
    assert "ledger: records" in out
    assert "not everything was seen" not in out


@pytest.mark.parametrize("options", [(), ("--worst", 2), ("--container", "c0"), ("--direction", "egress")])
def test_every_view_reports_a_loss(lossy, capsys, options):
    run(lossy, *options)
    out = capsys.readouterr().out
    assert out.index("1,234 records were lost") < out.index("eth0")
    assert "lost 1,234" in " ".join(out.split())


@pytest.mark.slow
def test_one_packet(path, capsys):
    number = int(make_delays(1000, containers=2).packet[0])
    run(path, "--packet", number)
    out = capsys.readouterr().out
    assert f"packet {number} of c" in out
    assert "ledger:" in out
    run(path, "--packet", number, "--json")
    [found] = json.loads(capsys.readouterr().out)["packet_paths"]
    inner = sum(h["delay_ns"] for h in found["hops"] if h["segment"] == "device")
    assert list(found["overhead_ns"].values()) == [inner]


def test_the_worst(path, capsys):
    run(path, "--worst", "3", "--json")
    found = json.loads(capsys.readouterr().out)["packet_paths"]
    assert len(found) == 3
    worst = [max(p["overhead_ns"].values()) for p in found]
    assert worst == sorted(worst, reverse=True)


def test_runs(path, capsys):
    run(path, "--runs")
    assert "run-1" in capsys.readouterr().out
    run(path, "--runs", "--json")
    [found] = json.loads(capsys.readouterr().out)["runs"]
    assert found["closed"]
    assert found["rows_stored"] == len(make_delays(1000, containers=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--container", "c9"), "no container 'c9'.*there are c0, c1"),
        (("--device", "zzz"), "no device 'zzz'.*there are br0"),
        (("--run", "run-2"), "no run 'run-2'.*did you mean 'run-1'"),
        (("--packet", "99"), "no rows of a packet 99"),
        (("--worst", "0"), "at least 1"),
        (("--since", "yesterday"), "'yesterday' is no time"),
    ],
)
def test_missing_names_are_errors(path, options, said):
    with pytest.raises(UsageError, match=said):
        run(path, *options)


def test_a_time_without_packets_gives_an_empty_report(path, capsys):
    run(path, "--until", "1999-01-01", "--json")
    assert json.loads(capsys.readouterr().out)["devices"] == []


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="no such directory"):
        run(tmp_path / "none")


def test_times_without_a_zone_are_utc():
    now = datetime(2025, 6, 15, 12, tzinfo=UTC)
    assert instants.instant_ns("2025-06-15T11:00:00", now) == instants.instant_ns("1h", now)
    assert instants.instant_ns("2025-06-15T13:00:00+02:00", now) == instants.instant_ns("60m", now)
    assert instants.instant_ns("1970-01-01T00:00:00.000001", now) == 1000
    assert instants.instant_ns("0.5s", now) == int(now.timestamp()) * 10**9 - 500_000_000


@pytest.mark.slow
def test_pictures(lossy, tmp_path, capsys):
    png, html = tmp_path / "x.png", tmp_path / "x.html"
    run(lossy, "--png", png, "--html", html)
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    # Without scripts a reader sees the tables.
    tables = re.search("<noscript>(.*?)</noscript>", page, re.DOTALL)[1]
    assert "1,234 records were lost" in tables
    assert "ledger: records" in tables
    # tests/integration/test_page.py opens the page; it may only run its own scripts and load nothing.
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_a_page_holds_the_busiest_containers_and_says_so(path, tmp_path):
    one_file.write(StoreReader(path), Filter(), "auto", tmp_path / "x.html", title="t", tables="", most=1)
    data = json.loads(re.search('id="mace-data">(.*?)</script>', (tmp_path / "x.html").read_text())[1])["views"]
    assert "the 1 busiest of 2 containers" in data[one_file.key("overview")]["note"]
    busiest = max(("c0", "c1"), key=lambda c: len(StoreReader(path).delays(Filter(container=c))))
    held = {name for name in data if name.startswith("heat ")}
    assert held == {one_file.key("heat", container=busiest, host="testhost")}


@pytest.mark.slow
def test_a_picture_without_packets(tmp_path, capsys):
    fill(tmp_path / "store", [])
    run(tmp_path / "store", "--png", tmp_path / "x.png", "--json")
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert json.loads(capsys.readouterr().out)["packets"] == 0


@pytest.mark.slow
def test_a_picture_that_cannot_be_written(path, tmp_path):
    with pytest.raises(Exception, match=r"no/x\.png: cannot write"):
        run(path, "--png", tmp_path / "no" / "x.png")


@pytest.mark.slow
def test_without_matplotlib_only_pictures_fail(path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "mace.shown.plots", raising=False)
    monkeypatch.delattr(mace.shown, "plots", raising=False)
    run(path, "--json")
    assert json.loads(capsys.readouterr().out)["packets"] == 1000
    with pytest.raises(MissingExtra, match=r"pip install 'mace\[plot\]'"):
        run(path, "--png", "x.png")


@pytest.mark.slow
def test_reports_without_pictures_do_not_load_matplotlib():
    code = "import sys, mace.shown.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
