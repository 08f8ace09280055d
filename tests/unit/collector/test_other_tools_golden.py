"""The golden files of one run by all means at once: what they gave when they were made, they give today."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[2] / "golden" / "other-tools"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def maker():
    spec = importlib.util.spec_from_file_location("make_other_tools", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def told():
    return maker().told(GOLDEN)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_it_gave_it_gives(told, name):
    assert told[name] == EXPECTED[name]


def test_the_same_records_have_the_same_delays():
    assert EXPECTED["pages.dat"] == EXPECTED["live.mace"]


@pytest.mark.parametrize(("name", "within_ns"), [("trace.txt", 5_000), ("pcap", 40_000)])
def test_others_differ_by_where_they_stamp(name, within_ns):
    for way in ("egress", "ingress"):
        live, other = np.array(EXPECTED["live.mace"][way]), np.array(EXPECTED[name][way])
        assert len(live) > 4
        # Another tool may have been running a little longer.
        assert len(other) >= len(live)
        apart = np.abs(np.median(other[-len(live) :]) - np.median(live))
        assert apart < within_ns
