"""Kept calibrations: costs and terms between two paces, stale, of another kernel or host, damaged."""

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest

from contracts.clock import ClockPair
from contracts.errors import Unavailable
from contracts.hooks import Hook
from contracts.interfaces import StreamHeader
from correlator import intervals
from mace.tools import calibration
from mace.tools.calibration import Calibration, Pace, PaceCost, PaceTerm, _Blocks, keep, kept, kept_for, place

SIX = [(Hook.NETIF_RX,) * 6]


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("MACE_CALIBRATION", str(tmp_path / "state" / "cost.json"))


def made(source="bpf", **shape):
    paces = (PaceCost(0, 200, 150, 250, 6), PaceCost(0.01, 800, 600, 1_000, 6), PaceCost(1, 1_200, 800, 1_600, 6))
    here = {
        "host": "h1",
        "kernel": calibration.release(),
        "cpu": calibration.cpu_model(),
        "utc_s": int(calibration.time.time()),
    }
    terms = (PaceTerm(0.01, 5_000, 4_000, 6_000, 48), PaceTerm(1, 15_000, 11_000, 17_000, 24))
    return Calibration(**{"source": source, "paces": paces, "terms": terms} | here | shape)


def test_the_cost_between_two_paces():
    cost = made()
    assert cost.at(0).of(SIX)[0] == pytest.approx(6 * 200)
    assert cost.at(0.1).of(SIX) == pytest.approx((6 * 1_000, 6 * 300 / 1.96))
    assert cost.at(60).of(SIX)[0] == pytest.approx(6 * 1_200)
    assert cost.at(0.1).measured


def test_the_term_between_two_paces():
    found = made()
    assert found.term_at(0.01) == intervals.Interval(5_000, 4_000, 6_000, 1)
    assert found.term_at(0.1).estimate == pytest.approx(10_000)
    assert found.term_at(0.1).low == pytest.approx(7_500)
    assert found.term_at(60).estimate == 15_000
    assert found.term_at(0.009).estimate == 5_000
    assert found.term_at(0.002) is found.term_at(0) is made(terms=()).term_at(1) is None


def test_what_a_calibration_adds_to_lower_bounds():
    cost = made().of_round_trip(1)
    assert cost.estimate == pytest.approx(6 * 1_200)
    assert (cost.low, cost.high) == (pytest.approx(6 * 800), pytest.approx(6 * 1_600))
    assert made().added_ns(1) == pytest.approx(15_000 - 6 * 1_200)
    assert made().added_ns(0.001) is None


def header(**shape):
    now_s = calibration.time.time()
    here = {"source": "bpf", "host": "h1", "run": "r", "kernel": calibration.release(), "boot_id": "b", "cpus": 2}
    clock = ClockPair(1, int(shape.pop("utc_s", now_s) * 1e9), 100)
    return StreamHeader(**here | {"clock": clock, "hooks": (), "mace_version": "1"} | shape)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({}, ""),
        ({"host": "h2"}, "it was measured on h1, and the recording is of h2"),
        ({"kernel": "5.10.0"}, ", this is 5.10.0"),
        ({"utc_s": 1e9}, "days after, the limit is 30"),
        ({"source": "ftrace"}, "it has not been measured for the source ftrace"),
    ],
)
def test_a_recording_has_the_calibration_of_its_own_host(shape, why):
    """The CPU's model is not in a recording."""
    keep(made(cpu="Z80"))
    found, told = kept_for(header(**shape))
    assert (found is None) == bool(why)
    assert told.endswith(why)


def test_a_cost_below_zero_is_none():
    below = replace(made(), paces=(PaceCost(0, -200, -300, 100, 6),))
    assert below.at(0).of(SIX)[0] == 0


def test_each_source_has_its_own_cost():
    assert kept("bpf") == (None, "it has not been measured")
    keep(made())
    assert kept("ftrace") == (None, "it has not been measured for the source ftrace")
    keep(made("ftrace"))
    assert kept("bpf") == (made(utc_s=kept("bpf")[0].utc_s), "")
    assert kept("ftrace")[0].source == "ftrace"


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"kernel": "5.10.0"}, "it was measured on Linux 5.10.0, this is "),
        ({"cpu": "Z80"}, "it was measured on Z80, this is "),
        ({"utc_s": 0}, "days before, the limit is 30"),
        ({"utc_s": 1 << 40}, "days after, the limit is 30"),
    ],
)
def test_a_cost_that_does_not_hold_is_refused(shape, why):
    keep(made(**shape))
    found, told = kept("bpf")
    assert found is None
    assert why in told


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2, "sources": {"bpf": {}}}', '{"version": 2, "sources": 3}']
)
def test_a_damaged_file_is_said_and_replaced(text):
    calibration.place().parent.mkdir()
    calibration.place().write_text(text)
    found, told = kept("bpf")
    assert found is None
    assert "is not readable" in told
    keep(made())
    assert kept("bpf")[0] is not None


def test_a_file_of_another_version_is_not_read():
    keep(made())
    told = json.loads(calibration.place().read_text())
    calibration.place().write_text(json.dumps(told | {"version": 3}))
    assert "has version 3, this MACE knows 2" in kept("bpf")[1]


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MACE_CALIBRATION", str(tmp_path / "file" / "cost.json"))
    with pytest.raises(Unavailable, match="MACE_CALIBRATION"):
        keep(made())


def test_the_error_of_one_run_contains_the_spread_between_rounds():
    alone = made()
    wide = replace(alone, paces=tuple(replace(each, spread_ns=300.0) for each in alone.paces))
    for interval_s in (0, 0.01, 0.05, 1, 60):
        at, less = wide.at(interval_s), alone.at(interval_s)
        assert at.per_record_ns == less.per_record_ns
        assert at.error_ns >= 300 > less.error_ns
        whole, its = wide.of_round_trip(interval_s), alone.of_round_trip(interval_s)
        assert whole.estimate == its.estimate
        assert whole.high - whole.low > its.high - its.low
    first = wide.at(0)
    assert first.error_ns == pytest.approx(np.hypot(50 / 1.96, 300))


def test_a_calibration_without_a_spread_is_read():
    before = made()
    keep(before)
    path = place()
    told = json.loads(path.read_text())
    for pace in told["sources"]["bpf"]["paces"]:
        del pace["spread_ns"]
    path.write_text(json.dumps(told))
    assert kept("bpf") == (before, "")


def test_the_spread_is_that_of_the_rounds():
    blocks = _Blocks(None, (Pace(0.05, 12),))
    traced, untraced = [60_000.0, 90_000.0, 75_000.0, 66_000.0], [50_000.0, 52_000.0, 53_000.0, 55_000.0]
    blocks.traced, blocks._untraced, blocks._events = [[at] for at in traced], [[at] for at in untraced], [[5, 5]]
    (found,) = blocks.costs()
    assert found.spread_ns == pytest.approx(statistics.stdev(a - b for a, b in zip(traced, untraced, strict=True)) / 5)
    assert found.low_ns <= found.per_event_ns <= found.high_ns
