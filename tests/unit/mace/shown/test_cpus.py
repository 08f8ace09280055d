"""`mace report --cpus`: figures of given stages, worked out by hand."""

import argparse
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from contracts.cpus import CpuCounters, CpuReadings, Measure, SoftirqCounts, StagePlace
from contracts.errors import UsageError
from contracts.schema import Direction
from mace.commands import report as command
from mace.commands.console import Console
from mace.commands.options import typed
from mace.shown.views import Asked, view
from storage.query import StoreReader
from tests.durations import S
from tests.made_results import START_NS, make_delays, make_results, make_stages, make_windows, with_rows
from tests.unit.storage.stored import fill

OUT, IN = Direction.EGRESS, Direction.INGRESS
INNER, HOST_END, BRIDGE = 0, 1, 2  # devices of a topology with one container
RUN, WAIT, LAST_WAIT = Measure.RUN, Measure.WAIT, Measure.LAST_WAIT
ROWS = [
    (StagePlace(INNER, INNER, 0, 0), OUT, RUN, [100] * 4),
    (StagePlace(HOST_END, INNER, 0, 0), OUT, RUN, [200] * 3),
    (StagePlace(HOST_END, INNER, 0, 0), OUT, WAIT, [10] * 3),
    (StagePlace(HOST_END, INNER, 0, 1), OUT, RUN, [200]),
    (StagePlace(HOST_END, INNER, 0, 1), OUT, WAIT, [90]),
    (StagePlace(INNER, INNER, -1, -1), OUT, Measure.WORK, [300] * 4),
    (StagePlace(INNER, INNER, -1, -1), OUT, Measure.SERIAL, [300] * 3 + [200]),
    (StagePlace(INNER, INNER, -1, -1), OUT, Measure.PARTIAL, [0, 50]),
    (StagePlace(BRIDGE, INNER, 1, 1), IN, RUN, [40, 40]),
    (StagePlace(INNER, INNER, 1, 1), IN, LAST_WAIT, [7, 9]),
    (StagePlace(INNER, INNER, -1, -1), IN, Measure.WORK, [40, 40]),
    (StagePlace(INNER, INNER, -1, -1), IN, Measure.SERIAL, [40, 40]),
]


WAITS = np.array([20, 40]), np.array([1, 1])


def readings(*, softirqs=False):
    """Return a function that reads counters: 10 s later each time; CPU 1's number of packets has wrapped."""
    turns = iter(range(10))

    def read():
        at = next(turns)
        packets = ((1 << 32) - 100 + 300 * at) % (1 << 32)
        utc_ns = START_NS + at * 10 * S
        counters = [CpuCounters(utc_ns, 0, 5000 * at, 0, 2 * at), CpuCounters(utc_ns, 1, packets, at, 0)]
        return CpuReadings(counters, [SoftirqCounts(utc_ns, 1, 4, at, 4000, 60, 40, 3, *WAITS)] if softirqs else ())

    return read


def made(path, rows=ROWS, **changes):
    delays = make_delays(20)
    counts, places = make_stages(rows)
    results = make_results(delays, windows=make_windows(delays), upto_utc_ns=START_NS + 10 * S)
    # All devices of a stage have the packet's container, as the engine returns them.
    devices = tuple(replace(device, container="c0") for device in results.rows.devices)
    fill(path, [with_rows(results, stages=counts, places=places, devices=devices)], **changes)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made(tmp_path_factory.mktemp("cpus") / "store", cpus=readings())


def run(path, *options):
    parser = argparse.ArgumentParser()
    command.add(parser)
    argv = ["--store", str(path), "--cpus", *map(str, options)]
    return command.run(typed(command.Options, parser.parse_args(argv)), Console())


def found(path, capsys, *options):
    run(path, "--json", *options)
    return json.loads(capsys.readouterr().out)


def test_containers(store, capsys):
    out, into = found(store, capsys)["containers"]
    assert (out["container"], out["direction"], out["packets"], out["packets_partial"]) == ("c0", "egress", 4, 2)
    assert (out["work_mean_ns"], out["longest_stage"], out["longest_stage_mean_ns"]) == (300, "vethc0", 200)
    assert (out["busiest_cpu"], out["busiest_share"]) == (0, pytest.approx(1000 / 1200))
    assert out["serial_share"] == pytest.approx(1100 / 1200)
    assert out["bound_now_per_s"] == pytest.approx(1e9 / 300)
    assert out["bound_pipelined_per_s"] == pytest.approx(1e9 / 200)
    assert out["gain"] == pytest.approx(1.5)
    assert (out["moved_per_packet"], out["moved_wait_p50_ns"], out["price_ns"]) == (0.25, 90, 22.5)
    assert (into["packets"], into["packets_partial"], into["gain"], into["price_ns"]) == (2, 0, 1.0, 0.0)
    assert out["sentence"] == (
        "c0 egress: 83 % of the work for these packets runs on CPU 0; spreading it over CPUs would allow at most 1.5"
        " times the rate; each change of CPU costs 0.1 µs, and a packet has 0.25 of them."
    )
    assert "no packet with a known wait changed CPUs" in into["sentence"]


def test_stages(store, capsys):
    stages = {(s["direction"], s["device"], s["cpu_queued"], s["cpu"]): s for s in found(store, capsys)["stages"]}
    assert len(stages) == 5
    moved = stages["egress", "vethc0", 0, 1]
    assert (moved["moved"], moved["packets"], moved["wait"]["p50_ns"], moved["run"]["p50_ns"]) == (True, 1, 90, 200)
    last = stages["ingress", "eth0", 1, 1]
    assert (last["packets"], last["run"], last["wait"]["count"], last["wait"]["sum_ns"]) == (2, None, 2, 16)
    first = stages["egress", "eth0", 0, 0]
    assert (first["packets"], first["wait"], first["run"]["sum_ns"]) == (4, None, 400)


def test_cpus(store, capsys):
    """The store reads the counters when it opens and when it closes: 10 s apart by the readings' own times."""
    zero, one = found(store, capsys)["cpus"]
    assert (zero["stages"], zero["busy_ns"], zero["busy_share"]) == (7, 1000, pytest.approx(1000 / (10 * S)))
    assert zero["stages_per_s"] == pytest.approx(0.7)
    assert (zero["packets_per_s"], zero["squeezed"], zero["dropped"]) == (500, 2, 0)
    assert (one["stages"], one["busy_ns"]) == (3, 280)
    assert (one["packets_per_s"], one["squeezed"], one["dropped"]) == (30, 0, 1)


def test_softirqs(tmp_path, capsys):
    path = made(tmp_path / "store", cpus=readings(softirqs=True))
    zero, one = found(path, capsys)["cpus"]
    assert zero["softirqs"] is None
    told = one["softirqs"]
    assert (told["count"], told["by_ksoftirqd"], told["run_ns"], told["lost"]) == (8, 1, 8000, 6)
    assert told["wait"] == {"count": 4, "sum_ns": 120, "p50_ns": 20, "p99_ns": 40, "max_ns": 40}
    run(path)
    out = capsys.readouterr().out
    assert re.search(r"^1 +testhost +8 +12\.5 +0\.0 +0\.0 +0\.0 +1\.0$", out, re.M)
    assert "The tracer lost 6 events of softirqs" in out


def test_tables(store, capsys):
    run(store)
    out = capsys.readouterr().out
    assert re.search(r"vethc0 +c0 +egress +0 → 1 +1 +25\.0 +0\.1 +0\.1 +0\.2 +0\.2", out)
    assert re.search(r"eth0 +c0 +ingress +1 → 1 +2 +0\.0 +0\.0 +0\.0 +— +—", out)
    assert re.search(r"^1 +testhost +0 +0\.00 +30 +0 +1$", out, re.M)
    assert re.search(r"c0 +egress +4 +2 +0\.3 +vethc0 0\.2 +92 +3,333,333 +5,000,000 +1\.50 +0\.0", out)
    assert "spreading it over CPUs would allow at most 1.5 times the rate" in out
    assert "not known" not in out.split("Containers", 1)[0]
    assert "ledger: records" in out
    assert "softirq" not in out


def test_csv_has_the_stages(store, capfdbinary):
    run(store, "--format", "csv")
    heading, *lines = capfdbinary.readouterr().out.decode().splitlines()
    assert heading.startswith(
        '"host","owner","container","netns","device","kind","direction","cpu_queued","cpu","moved"'
    )
    assert len(lines) == 5


def test_filters(store, capsys):
    assert [one["direction"] for one in found(store, capsys, "--direction", "ingress")["containers"]] == ["ingress"]
    assert found(store, capsys, "--container", "nobody")["containers"] == []
    assert found(store, capsys, "--until", "2000-01-01T00:00:00")["stages"] == []


def test_counters_that_nobody_stored_are_not_known(tmp_path, capsys):
    path = made(tmp_path / "store")
    assert found(path, capsys)["cpus"][0]["packets_per_s"] is None
    run(path)
    assert "counters (packets, squeezed, dropped) are not known" in capsys.readouterr().out


def test_a_store_without_stages_says_what_to_do(tmp_path):
    fill(tmp_path / "store", [make_results(make_delays(10))])
    with pytest.raises(UsageError, match="measure or replay with --cpus"):
        run(tmp_path / "store")


@pytest.mark.parametrize("other", [("--worst", 3), ("--device", "eth0"), ("--runs",), ("--packet", 0), ("--png", "a")])
def test_options_that_do_not_go_together(store, other):
    with pytest.raises(UsageError, match=other[0]):
        run(store, *other)


def test_csv_without_cpus_is_refused(store):
    parser = argparse.ArgumentParser()
    command.add(parser)
    options = typed(command.Options, parser.parse_args(["--store", str(store), "--format", "csv"]))
    with pytest.raises(UsageError, match="mace query --format csv"):
        command.run(options, Console())


def test_containers_without_a_name_are_named_by_their_namespace(tmp_path, capsys):
    counts, places = make_stages(ROWS)
    results = make_results(make_delays(20), upto_utc_ns=START_NS + 10 * S)
    devices = tuple(replace(device, container="") for device in results.rows.devices)
    fill(tmp_path / "store", [with_rows(results, stages=counts, places=places, devices=devices)])
    told = found(tmp_path / "store", capsys)
    assert [(one["container"], one["netns"], one["packets"]) for one in told["containers"]] == [
        ("", "c0", 4),
        ("", "c0", 2),
    ]
    assert told["containers"][0]["gain"] == pytest.approx(1.5)
    assert {(one["device"], one["netns"], one["owner"]) for one in told["stages"]} == {
        ("eth0", "c0", "c0"),
        ("vethc0", "host", "c0"),
        ("br0", "host", "c0"),
    }


def test_the_view_has_the_figures_of_the_report(store):
    found = view(StoreReader(store), "cpus", Asked(container="c0"))
    rows = found.table().to_pylist()
    assert [(r["device"], r["direction"], r["cpu_queued"], r["cpu"], r["count"], r["moved"]) for r in rows] == [
        ("eth0", "egress", 0, 0, 4, False),
        ("vethc0", "egress", 0, 0, 3, False),
        ("vethc0", "egress", 0, 1, 1, True),
        ("br0", "ingress", 1, 1, 2, False),
        ("eth0", "ingress", 1, 1, 2, False),
    ]
    assert [(r["run_p50_ns"], r["wait_p99_ns"]) for r in rows] == [
        (100, None), (200, 10), (200, 90), (40, None), (None, 9),
    ]  # fmt: skip
    assert found.about["sentences"][0].startswith("c0 egress: 83 % of the work for these packets runs on CPU 0;")
    nothing = view(StoreReader(store), "cpus", Asked(container="c9"))
    assert nothing.table().schema == found.table().schema
    assert len(nothing.table()) == 0
