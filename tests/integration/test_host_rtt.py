"""The host RTT by probes beside a real tool: how many are sent, what they add, and what is said without them."""

import json
import re
import signal
from pathlib import Path

import pytest

from mace.lab import REMOTE, Spec, running
from storage import sql
from storage.query import StoreReader
from tests.measuring import balanced, mace, start, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

COUNT = 100


@pytest.fixture(scope="module")
def lab():
    with running(Spec(name="hostrtt")) as place:
        for family in (4, 6):
            place.ping("c1", count=3, family=family)
        yield place


@pytest.fixture(autouse=True)
def _uncalibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("MACE_CALIBRATION", str(tmp_path / "cost.json"))


def ping(lab, *argv, address=None, **options):
    where = ("--lab", lab.name, "--container", "c1")
    return mace("ping", *where, *argv, address or lab.address(REMOTE), **options)


def probed(found, count):
    """Check what a result with a host RTT has to hold, and return its host path."""
    term, paired = found["host_path"], [row for row in found["samples"] if row["reason"] == "paired"]
    assert found["no_host_rtt"] is None
    assert min(term["probes"]) >= 3
    assert term["probed_by"] == "prober"
    assert sum(term["probes"]) <= count // 5
    assert {row["host_rtt_ns"] - row["host_rtt_lower_bound_ns"] for row in paired} == {term["added_ns"]}
    assert abs(term["send_ns"] + term["device_ns"] + term["far_end_ns"] - term["term_ns"]) <= 2
    assert abs(term["term_ns"] - (term["tracer_cost_ns"] or 0) - term["added_ns"]) <= 2
    median = found["statistics"]["host_rtt_ns"]["median"]
    assert median["low"] <= median["estimate"] <= median["high"]
    balanced(found)
    return term


@pytest.mark.parametrize(("source", "family"), [pytest.param("bpf", 4, marks=pytest.mark.needs("bpf")), ("ftrace", 6)])
def test_the_default_has_a_host_rtt(lab, source, family, tmp_path):
    argv = ("--source", source, "--json", "-c", COUNT, "-i", "0.05", "--store", tmp_path / "store")
    found = json.loads(ping(lab, *argv, address=lab.address(REMOTE, family)).stdout)
    term = probed(found, COUNT)
    assert found["paired"] == COUNT
    if source == "bpf":
        assert term["tracer_cost_by"] == "source"
        assert term["tracer_cost_ns"] > 0
    else:
        assert term["tracer_cost_ns"] is None
        assert "mace calibrate" in found["no_tracer_cost"]
    rows = sql.table(StoreReader(tmp_path / "store"), "SELECT * FROM round_trips WHERE reason = 'paired'").to_pylist()
    assert {row["tracer_cost_ns"] for row in rows} == {term["tracer_cost_ns"]}
    low, high = term["tracer_cost_ci95_ns"] or (None, None)
    (error_ns,) = {row["tracer_cost_error_ns"] for row in rows}
    assert error_ns is None if low is None else abs(2 * error_ns - (high - low)) <= 2


def test_lines_have_what_is_known_by_then_and_the_measured_cost(lab):
    made = json.loads(mace("calibrate", "--source", "ftrace", "--rounds", "3", "--json").stdout)
    assert [pace["interval_s"] for pace in made["paces"]] == [0, 0.01, 0.05, 0.2]
    for pace in made["paces"]:
        assert pace["events"] >= 4
        assert pace["low_ns"] <= pace["per_event_ns"] <= pace["high_ns"]
    assert [term["interval_s"] for term in made["terms"]] == [0.01, 0.05, 0.2]
    assert all(term["low_ns"] <= term["term_ns"] <= term["high_ns"] for term in made["terms"])
    assert Path(made["kept"]).exists()
    said = ping(lab, "--source", "ftrace", "-c", COUNT, "-i", "0.05").stdout
    kinds = "".join(re.findall(r"icmp_seq=\d+ .* · host([=≥])[0-9.,-]+ nic=", said))
    assert len(kinds) == COUNT
    assert re.fullmatch("≥*=+", kinds)
    whole = " ".join(said.split())
    assert "host RTT = lower bound " in whole
    assert "tracer's cost, measured, " in whole


def test_without_probes_there_is_a_lower_bound(lab):
    done = ping(lab, "--source", "ftrace", "--no-probes", "-c", "20", "-i", "0.01")
    assert "host=" not in done.stdout
    assert "only a lower bound is known" in " ".join(done.stdout.split())
    assert "(no probes: --no-probes; no calibration is used: it has not been measured)" in " ".join(done.stdout.split())
    few = json.loads(ping(lab, "--source", "ftrace", "--json", "-c", "1").stdout)
    assert "too few probes" in few["no_host_rtt"]
    assert "host_rtt_ns" not in few["samples"][0]


def test_a_destination_that_answers_no_probe(lab):
    """The far end drops packets of the probes' length, and answers ping's."""
    rules = "table ip drop76 { chain in { type filter hook input priority 0; meta length 76 drop; }; }"
    assert lab.popen(REMOTE, ["nft", rules]).wait(timeout=60) == 0
    try:
        found = json.loads(ping(lab, "--source", "ftrace", "--json", "-c", "160", "-i", "0.05").stdout)
    finally:
        assert lab.popen(REMOTE, ["nft", "delete table ip drop76"]).wait(timeout=60) == 0
    assert found["paired"] == 160
    assert found["host_path"] is None
    # On a slow machine ping may have ended before the fifth probe has waited for its reply in vain.
    assert found["no_host_rtt"].startswith(("no probes: the destination answers no probe", "too few probes: 0 of"))
    balanced(found)


@pytest.mark.needs("fping")
def test_another_tool_is_probed_at_its_pace(lab):
    argv = ("wrap", "--source", "ftrace", "--lab", lab.name, "--container", "c1", "--json", "--")
    found = json.loads(mace(*argv, "fping", "-D", "-c", COUNT, "-p", "50", lab.address(REMOTE)).stdout)
    probed(found, COUNT)
    named = json.loads(mace(*argv, "sh", "-c", f"fping -D -c 20 -p 10 $(echo {lab.address(REMOTE)[:-1]})2").stdout)
    assert named["no_host_rtt"].startswith("no probes: the tool's destination")


def test_an_interrupted_ping_leaves_no_prober(lab):
    where = ("--lab", lab.name, "--container", "c1", "--source", "ftrace")
    process = start("ping", *where, "-i", "0.05", lab.address(REMOTE))
    try:
        wait_for(lambda: len(probers(process.pid)) == 2)
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "samples paired" in said, complaints
    assert probers(process.pid) == []


def probers(parent):
    """Return the processes that run the prober for `mace` with that process id."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"host_prober.py" in path.read_bytes() and f"PPid:\t{parent}\n" in (path.parent / "status").read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
