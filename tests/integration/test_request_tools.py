"""Samples of the distribution's fping, dig and curl, run in a container, are paired with their packets."""

import json
import signal
import statistics
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from correlator.correction import Reason
from correlator.stamps import MODELS
from mace.lab import REMOTE, Spec, running
from mace.tools.correct import arrays
from tests.measuring import balanced, mace, start, wait_for
from tests.places import ROOT

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

COUNT = 40


@pytest.fixture(scope="module")
def lab():
    with running(Spec(name="asking", containers=2)) as place:
        for container in place.containers:
            place.ping(container, count=2)
        yield place


@contextmanager
def answering(lab, what):
    script = ROOT / "tests" / "answering.py"
    server = lab.popen(REMOTE, [sys.executable, str(script), what, lab.address(REMOTE)])
    try:
        assert server.stdout.readline() == "ready\n"
        yield
    finally:
        server.kill()
        server.communicate()


def wrapped(lab, *argv):
    """Run a tool in c1 with `mace wrap` while a neighbour pings; returns its JSON."""
    with lab.start_ping("c2", count=2000, interval_s=0.01) as neighbour:
        done = mace("wrap", "--lab", lab.name, "--container", "c1", "--json", "--", *argv)
        neighbour.stop()
    found = json.loads(done.stdout)
    balanced(found)
    paired = [row for row in found["samples"] if row["reason"] == "paired"]
    for row in paired:
        assert row["nic_rtt_ns"] > 0
        assert 0 < row["host_rtt_lower_bound_ns"] < row["tool_rtt_ns"]
        assert row["host_rtt_lower_bound_ns"] + row["egress_ns"] + row["ingress_ns"] == row["tool_rtt_ns"]
    # A single sample may differ: the kernel stamps at netif_rx, and netif_receive_skb may wait for its softirq.
    assert median_of(paired, "nic_rtt_ns") < median_of(paired, "host_rtt_lower_bound_ns")
    return found


def median_of(rows, column):
    return statistics.median(row[column] for row in rows)


@pytest.mark.needs("fping")
def test_fping(lab):
    found = wrapped(lab, "fping", "-D", "-c", str(COUNT), "-p", "10", lab.address(REMOTE))
    assert (found["tool"], found["paired"], found["not_understood"]) == ("fping", COUNT, 0)


@pytest.mark.needs("busybox")
def test_ping_of_busybox(lab):
    """busybox reads the clock itself and prints no times: order and length identify its packets."""
    found = wrapped(lab, "busybox", "ping", "-c", str(COUNT), "-i", "0.05", "-s", "100", lab.address(REMOTE))
    assert (found["tool"], found["paired"], found["not_understood"]) == ("ping of busybox", COUNT, 0)


@pytest.mark.needs("dig")
def test_dig(lab):
    """One run asks its questions in sequence; the length of each answer follows from the name."""
    names = [f"host{'x' * (n % 7)}.example" for n in range(COUNT)]
    with answering(lab, "dns"):
        found = wrapped(lab, "dig", "-u", "+noedns", f"@{lab.address(REMOTE)}", *names)
    assert (found["tool"], found["paired"], found["not_understood"]) == ("dig", COUNT, 0)


@pytest.mark.needs("curl")
def test_the_connect_times_of_curl(lab):
    url = f"http://{lab.address(REMOTE)}/"
    command = f"for n in $(seq {COUNT}); do curl -s -o /dev/null -w '%{{json}}\\n' {url}; done"
    with answering(lab, "http"):
        found = wrapped(lab, "sh", "-c", command)
    assert (found["tool"], found["paired"], found["not_understood"]) == ("curl connect", COUNT, 0)
    # No server listens: without a connection there is no time to correct.
    done = mace(
        "wrap", "--lab", lab.name, "--container", "c1", "--", "curl", "-s", "-w", "%{json}\\n", url, check=False
    )
    assert done.returncode == 7
    assert "unpaired 1 · no reply" in done.stdout


def test_arrays_of_a_program(lab, tmp_path):
    """The library call gives the results of the command line, here for ping's output and stamp model."""
    capture = tmp_path / "run.mace"
    argv = ("ping", "--lab", lab.name, "--container", "c1", "--record", capture, "--json")
    found = json.loads(mace(*argv, "-c", COUNT, "-i", "0.01", lab.address(REMOTE)).stdout)
    rows = found["samples"]
    columns = {name: np.array([row[name] for row in rows]) for name in ("stamp_utc_ns", "seq")}
    tool_ns = np.array([row["tool_rtt_ns"] for row in rows])
    made = arrays(
        capture,
        tool_ns,
        container="c1",
        stamps=MODELS["ping"],
        resolution_ns=1000,
        request_len=84,
        reply_len=84,
        **columns,
    )
    assert (made.reason == Reason.PAIRED).all()
    assert made.host_rtt_lower_bound_ns.tolist() == [row["host_rtt_lower_bound_ns"] for row in rows]
    assert statistics.median(made.host_rtt_lower_bound_ns.tolist()) < statistics.median(tool_ns.tolist())


def test_an_unknown_tool_is_an_error(lab):
    done = mace("wrap", "--lab", lab.name, "--container", "c1", "--", "echo", "hello", check=False)
    assert done.returncode == 2
    assert "'hello' is what no known tool prints first" in done.stderr


@pytest.mark.needs("fping")
def test_an_interrupted_tool_prints_its_result(lab, tmp_path):
    capture = tmp_path / "run.mace"
    argv = ("wrap", "--lab", lab.name, "--container", "c1", "--record", capture, "--")
    process = start(*argv, "fping", "-D", "-l", "-p", "20", lab.address(REMOTE))
    try:
        wait_for(lambda: capture.exists() and capture.stat().st_size > 0)
        time.sleep(2)  # for some pings, whose number does not matter
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "samples paired" in said, complaints
    assert "host≥" in said
