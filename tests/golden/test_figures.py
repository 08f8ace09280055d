"""Every golden recording still gives its figures and stored rows, bit for bit."""

import json

import pytest

from tests.golden.figures.make import EXPECTED, figures, inputs

KNOWN = json.loads(EXPECTED.read_text())


def test_every_recording_is_known():
    assert inputs().keys() == KNOWN.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_figures_are_unchanged(name):
    expected, found = KNOWN[name], figures(inputs()[name])
    assert (found["status"], found["packets"]) == (expected["status"], expected["packets"])
    for part in ("figures", "delays", "windows", "ledger"):
        here = {column: found[part].get(column) for column in expected[part]}
        assert here == expected[part], part
