"""ping in a real container, corrected: live, from a recording, and against ping on the host itself."""

import json
import re
import signal
import statistics
import time

import numpy as np
import pytest

from mace.lab import HOST, Spec, running
from mace.shown.views import Asked, view
from mace.trials.rounds import dithered, median_us
from storage import sql
from storage.query import StoreReader
from tests.measuring import balanced, mace, start, trace_instances, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

COUNT = 200
ROUNDS = 11
SHOWN = re.compile(
    r"icmp_seq=(\d+) ttl=\d+ time=([0-9.]+) ms"
    r" · host≥([0-9.,-]+) nic=([0-9.,]+) egress=([0-9.,]+) ingress=([0-9.,]+) µs (?:buffer|exact)$"
)


@pytest.fixture(scope="module")
def lab():
    with running(Spec(name="corrected", containers=2)) as place:
        for family in (4, 6):
            for member in (*place.containers, HOST):
                place.ping(member, count=3, family=family)
        yield place


def ping(lab, *argv, **options):
    return mace("ping", "--lab", lab.name, "--container", "c1", *argv, lab.address("remote"), **options)


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    """Run `mace ping` beside a neighbour that pings at the same pace; returns its output and the capture."""
    folder = tmp_path_factory.mktemp("corrected")
    capture = folder / "run.mace"
    with lab.start_ping("c2", count=4 * COUNT, size=64, interval_s=0.01) as neighbour:
        done = ping(lab, "--record", capture, "--store", folder / "store", "--no-probes", "-D", "-c", COUNT,
                    "-i", "0.01")  # fmt: skip
        neighbour.stop()
    return done.stdout, capture


def as_ping_said(shown):
    """Return the lines in the format of ping."""
    return re.sub(r" · .*", "", shown.split("\nc1: ", 1)[0]) + "\n"


def test_all_pings_are_paired(run):
    shown, _ = run
    found = [SHOWN.search(line) for line in shown.splitlines() if " bytes from " in line]
    assert [int(match[1]) for match in found] == list(range(1, COUNT + 1))
    assert f"c1: {COUNT} of {COUNT} samples paired" in shown
    assert "unpaired" not in shown
    assert "not understood" not in shown
    assert f"{COUNT} packets transmitted, {COUNT} received" in shown
    assert "lost 0 · discarded 0" in re.sub(r"\s+", " ", shown)


def test_figures_add_up(run):
    for line in run[0].splitlines():
        if match := SHOWN.search(line):
            tool, host, nic, egress, ingress = (float(match[i].replace(",", "")) for i in range(2, 7))
            # Each is rounded to 0.1 µs.
            assert abs(tool * 1000 - egress - ingress - host) < 0.2
            assert 0 < nic < host


def test_a_recording_gives_the_same_corrections(run, tmp_path):
    shown, capture = run
    said = tmp_path / "said.txt"
    said.write_text(as_ping_said(shown))
    found = json.loads(mace("correct", said, capture, "--container", "c1", "--json").stdout)
    figures = ("host_rtt_lower_bound_ns", "nic_rtt_ns", "egress_ns", "ingress_ns")
    later = {row["seq"]: [f"{row[name] / 1000:,.1f}" for name in figures] for row in found["samples"]}
    live = {int(m[1]): [m[i] for i in range(3, 7)] for m in map(SHOWN.search, shown.splitlines()) if m}
    assert live == later
    assert found["not_understood"] == 0
    balanced(found)


def test_the_store_has_the_printed_round_trips(run, lab, tmp_path):
    """So has a store that `mace correct` writes from the recording, and the page's view of it."""
    shown, capture = run
    said = tmp_path / "said.txt"
    said.write_text(as_ping_said(shown))
    mace("correct", said, capture, "--container", "c1", "--store", tmp_path / "later")
    printed = [(int(m[1]), *(m[i] for i in range(3, 7))) for m in map(SHOWN.search, shown.splitlines()) if m]
    for folder, destination in ((capture.parent / "store", lab.address("remote")), (tmp_path / "later", "")):
        store = StoreReader(folder)
        rows = sql.table(store, "SELECT * FROM round_trips WHERE reason = 'paired' ORDER BY seq").to_pylist()
        figures = ("host_rtt_lower_bound_ns", "nic_rtt_ns", "egress_ns", "ingress_ns")
        assert [(row["seq"], *(f"{row[name] / 1000:,.1f}" for name in figures)) for row in rows] == printed
        assert {(row["tool"], row["container"], row["destination"]) for row in rows} == {("ping", "c1", destination)}
        assert {row["host_rtt_ns"] for row in rows} == {None}, "no probes were sent"
        whole = view(store, "round_trips", Asked(container="c1")).about["whole"]
        assert whole["count"] == [COUNT] * len(whole["figure"])
        assert dict(zip(whole["figure"], whole["max_ns"], strict=True))["nic_rtt"] == max(r["nic_rtt_ns"] for r in rows)
        assert store.ledger().imbalance == 0
        assert store.ledger().records > 2 * COUNT


def test_without_times_the_order_pairs_samples(run, tmp_path):
    shown, capture = run
    said = tmp_path / "said.txt"
    said.write_text(re.sub(r"^\[[0-9.]+\] ", "", as_ping_said(shown), flags=re.MULTILINE))
    found = json.loads(mace("correct", said, capture, "--container", "c1", "--json").stdout)
    assert found["paired"] == COUNT
    # The neighbour's packets are longer. With equal pace and length only times could distinguish them.
    other = json.loads(mace("correct", said, capture, "--container", "c2", "--json").stdout)
    assert other["paired"] == 0


def test_corrected_round_trips_are_closer_to_the_hosts(lab, tmp_path):
    """Host and container ping alternately in one capture, so that tracing costs the same; each when a reply arrives."""
    remote, capture, text = lab.address("remote"), tmp_path / "run.mace", tmp_path / "said.txt"
    recording = start("record", "--lab", lab.name, "-o", capture, "--ring-mib", "32")
    try:
        wait_for(lambda: capture.exists() and capture.stat().st_size > 0)

        def said(member):
            argv = ["ping", "-D", "-c", str(2 * COUNT), "-i", "0", remote]
            return lab.popen(member, argv).communicate(timeout=60)[0]

        rounds = [(said(HOST), said("c1")) for _ in range(ROUNDS)]
    finally:
        recording.send_signal(signal.SIGINT)
        recording.communicate(timeout=60)
    text.write_text("".join(inside for _, inside in rounds))
    found = json.loads(mace("correct", text, capture, "--json").stdout)
    assert found["paired"] == ROUNDS * 2 * COUNT
    samples = {row["seq"]: row for row in found["samples"]}
    added_ns, left_ns = [], []
    for number, (bare, _) in enumerate(rounds):
        bare_ns = median_ns(float(ms) * 1e6 for ms in re.findall(r"time=([0-9.]+) ms", bare))
        round_ = [samples[number * 2 * COUNT + seq] for seq in range(1, 2 * COUNT + 1)]
        added_ns.append(median_ns(row["tool_rtt_ns"] for row in round_) - bare_ns)
        left_ns.append(statistics.median(row["host_rtt_lower_bound_ns"] for row in round_) - bare_ns)
    # Few rounds are affected by a change of the machine's speed between their pings.
    added = statistics.median(added_ns)
    assert added > 0
    assert abs(statistics.median(left_ns)) < added / 2


def median_ns(rtts_ns):
    """Return the median of round trips that ping has truncated to whole microseconds."""
    return median_us([dithered(np.array(list(rtts_ns)).round().astype(np.int64))]) * 1000


def test_other_ways_to_ping(lab):
    found = json.loads(ping(lab, "--json", "-U", "-s", "500", "-c", "20", "-i", "0.01").stdout)
    assert (found["tool"], found["paired"]) == ("ping -U", 20)
    argv = ("ping", "--lab", lab.name, "--netns", lab.netns_path("c1"), "--json", "-6", "-c", "20", "-i", "0.01")
    found = json.loads(mace(*argv, lab.address("remote", 6)).stdout)
    assert (found["container"], found["paired"]) == ("c1", 20)


def test_missing_replies_are_reported_with_pings_exit_status(lab):
    done = mace("ping", "--lab", lab.name, "--container", "c1", "-c", "2", "-i", "0.1", "-W", "0.3",
                lab.address("remote").rsplit(".", 1)[0] + ".77", check=False)  # fmt: skip
    assert done.returncode == 1
    assert "unpaired 2 · no reply: the tool saw none (seq 1, 2)" in done.stdout


def test_an_interrupted_run_prints_its_result(lab):
    process = start("ping", "--lab", lab.name, "--container", "c1", "-i", "0.02", lab.address("remote"))
    lines = [process.stdout.readline() for _ in range(6)]
    assert SHOWN.search(lines[5].rstrip())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "ping statistics" in rest
    assert "samples paired" in rest
    assert trace_instances(process.pid) == []


def test_an_unknown_container_is_an_error_at_once(lab):
    done = mace("ping", "--lab", lab.name, "--container", "c9", "203.0.113.2", check=False)
    assert done.returncode == 2
    assert "no member 'c9'" in done.stderr
