"""Small runs of `mace experiment` and `mace compare` on the real kernel: figures add up and have the right signs."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.measuring import balanced, mace, start, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

ROUNDS = 3
PNG = b"\x89PNG\r\n"
SOME = ("experiment", "--source", "ftrace", "--paces", "10ms", "--repetitions", "1", "--count", "12")


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.timeout(290)
def test_an_experiment_that_is_interrupted_continues(tmp_path):
    """It is interrupted when a repetition is finished; the next run measures only what is missing."""
    results, picture = tmp_path / "results", tmp_path / "experiment.png"
    argv = (*SOME, "--flood", "1", "--results", results, "--json")
    process = start(*argv, "--repetitions", "100")
    try:
        wait_for(lambda: lines(results) > 1 or process.poll() is not None, 120)
        process.send_signal(signal.SIGINT)
        said, complaint = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, complaint
    assert re.search(r"interrupted: \d+ of 200 repetitions are missing \(10ms\); the same command continues", complaint)
    assert len(json.loads(said)["rows"]) >= 2  # traced and not
    first = results.read_bytes()
    found = json.loads(mace(*argv, "--png", picture, timeout=150).stdout)
    assert results.read_bytes().startswith(first)
    assert json.loads(mace(*argv).stdout) == found  # nothing is missing, so that nothing is measured
    assert picture.read_bytes().startswith(PNG)
    balanced(found)
    assert [(row["flood_containers"], row["traced"]) for row in found["rows"]] == [
        (0, False), (0, True), (1, False), (1, True),
    ]  # fmt: skip
    assert sum(row["repetitions"] for row in found["rows"]) == 2 * (lines(results) - 1)
    for row in found["rows"]:
        assert (row["pace"], row["source"], row["sent"]) == ("10ms", "ftrace", 12 * row["repetitions"])
        assert row["paired"] + sum(row["unpaired"].values()) == row["sent"]
        assert row["bare"] == row["sent"] * (1 if row["traced"] else 2)
        assert row["coverage"] is None or 0 <= row["coverage"] <= 1
        if row["traced"] and row["paired"] and row["repetitions"] == 1:  # each less its time in the container's devices
            assert row["plain_p50_us"] < row["container_p50_us"]


@pytest.mark.needs("apptainer")
@pytest.mark.timeout(200)
def test_a_container_on_the_host_s_network_is_measured_and_not_corrected(monkeypatch):
    from tests import apptainer

    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{apptainer.directory()}")
    found = json.loads(mace(*SOME, "--flood", "0", "--runtimes", "apptainer", "--json").stdout)
    row = found["rows"][0]
    assert (row["runtime"], row["sent"], row["corrected_p50_us"]) == ("apptainer", 0, None)
    assert row["container_p50_us"] > 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize("load", ["cpu", "io", "quota"])
def test_an_experiment_beside_a_load(load, tmp_path):
    argv = (*SOME, "--flood", "0", "--load", load, "--results", tmp_path / "results", "--json")
    truth, traced = json.loads(mace(*argv, timeout=180).stdout)["rows"]
    for row in (truth, traced):
        assert row["load"] == load
        assert row["starved_p50_us"] > 0
        if 0 < row["paired"] == row["waits_known"]:  # of the same samples, each less its wait
            assert row["without_waiting_p50_us"] <= row["corrected_p50_us"]
    assert (truth["throttled"] is None) == (load != "quota")
    if load == "quota":
        # The busy loop alone uses up the quota of each period.
        assert truth["throttled"] > 0
        assert truth["throttled_ns"] > 0
    assert not list(Path("/sys/fs/cgroup").glob("**/mace-experiment-*"))
    assert not list(Path("/var/tmp").glob("mace-experiment-*"))


def test_the_time_of_an_experiment_is_limited(tmp_path):
    """No repetition fits into a second, so that none is begun, and there are no figures."""
    done = mace(*SOME, "--flood", "0", "--duration", "1", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the time is over: 1 of 1 repetitions are missing (10ms); --results FILE" in done.stderr
    assert "no repetition was finished, so there are no figures" in done.stderr


def test_a_comparison(tmp_path):
    picture = tmp_path / "compare.png"
    argv = ("compare", "--sources", "ftrace,none", "--rounds", ROUNDS, "--count", "200", "--json", "--png", picture)
    found = json.loads(mace(*argv).stdout)
    assert picture.read_bytes().startswith(PNG)
    none, ftrace = found["sources"]["none"], found["sources"]["ftrace"]
    assert none["trips"] == ftrace["trips"] == ROUNDS * 200
    assert (none["perturbation_us"], none["perturbation_ci95_us"]) == (0, [0, 0])
    assert ftrace["perturbation_us"] == pytest.approx(ftrace["rtt_p50_us"] - none["rtt_p50_us"], abs=0.03)
    balanced(ftrace)
    assert ftrace["lost"] == 0
    assert ftrace["cpu_us_per_trip"] > 0
    egress = {row["device"]: row["ftrace"]["count"] for row in found["devices"] if row["direction"] == "egress"}
    outer = next(name for name in egress if name.startswith("out"))
    assert egress[outer] == ROUNDS * 200
    assert egress["eth0"] >= ROUNDS * 200  # and perhaps an ARP request
    # The devices' medians are parts of the whole path's.
    for direction in ("egress", "ingress"):
        parts = [row["ftrace"]["p50_us"] for row in found["devices"]
                 if (row["direction"], row["segment"]) == (direction, "device")]  # fmt: skip
        assert 0 < sum(parts) < 2 * ftrace[f"overhead_{direction}"]["p50_us"]
