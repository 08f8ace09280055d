"""The kept costs of tracing: between two paces, stale, of another kernel, damaged."""

import json
from dataclasses import replace

import pytest

from contracts.errors import Unavailable
from contracts.hooks import Hook
from mace.tools import tracer_cost
from mace.tools.tracer_cost import PaceCost, TracerCost, keep, kept

SIX = [(Hook.NETIF_RX,) * 6]


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("MACE_TRACER_COST", str(tmp_path / "state" / "cost.json"))


def made(source="bpf", **shape):
    paces = (PaceCost(0, 200, 150, 250, 6), PaceCost(0.01, 800, 600, 1_000, 6), PaceCost(1, 1_200, 800, 1_600, 6))
    here = {"kernel": tracer_cost.release(), "cpu": tracer_cost.cpu_model(), "utc_s": int(tracer_cost.time.time())}
    return TracerCost(**{"source": source, "paces": paces} | here | shape)


def test_the_cost_between_two_paces():
    cost = made()
    assert cost.at(0).of(SIX)[0] == pytest.approx(6 * 200)
    assert cost.at(0.1).of(SIX) == pytest.approx((6 * 1_000, 6 * 300 / 1.96))
    assert cost.at(60).of(SIX)[0] == pytest.approx(6 * 1_200)
    assert cost.at(0.1).measured


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
        ({"utc_s": 0}, "days ago, the limit is 30"),
        ({"utc_s": 1 << 40}, "days ago, the limit is 30"),
    ],
)
def test_a_cost_that_does_not_hold_is_refused(shape, why):
    keep(made(**shape))
    found, told = kept("bpf")
    assert found is None
    assert why in told


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1, "sources": {"bpf": {}}}', '{"version": 1, "sources": 3}']
)
def test_a_damaged_file_is_said_and_replaced(text):
    tracer_cost.place().parent.mkdir()
    tracer_cost.place().write_text(text)
    found, told = kept("bpf")
    assert found is None
    assert "is not readable" in told
    keep(made())
    assert kept("bpf")[0] is not None


def test_a_file_of_another_version_is_not_read():
    keep(made())
    told = json.loads(tracer_cost.place().read_text())
    tracer_cost.place().write_text(json.dumps(told | {"version": 2}))
    assert "has version 2, this MACE knows 1" in kept("bpf")[1]


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MACE_TRACER_COST", str(tmp_path / "file" / "cost.json"))
    with pytest.raises(Unavailable, match="MACE_TRACER_COST"):
        keep(made())
