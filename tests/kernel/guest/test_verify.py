"""`mace verify` on the module: packets that only a source that reads packets can match, and those it can exclude."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest

from tests.kernel.guest.commands import mace
from tests.kernel.guest.conftest import load, unload

pytestmark = [
    # One kernel: it is the correlator that is tried here; what the module reads is tried on all of them.
    pytest.mark.skipif(not platform.release().startswith("6.12"), reason="on 6.12 only"),
    pytest.mark.timeout(240),
]

SCENARIOS = ("fragments", "sampling_8")


@pytest.fixture(scope="module")
def verdicts() -> Any:
    load()
    try:
        done = mace("verify", "--source", "kmod", "--packets", "80", "--json", *SCENARIOS, check=False, timeout=220)
    finally:
        unload()
    assert done.returncode in (0, 1), done.stderr
    return {verdict["scenario"]: verdict for verdict in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_row_is_wrong_and_none_is_missing(verdicts: Any, name: str) -> None:
    found = verdicts[name]
    assert (found["precision"], found["wrong"], found["lost"]) == (1.0, 0, 0)
    # Links have a time limit, which an emulator that its host starves can exceed.
    missing = 0.1 if name == "fragments" else 0
    assert found["recall_bound"] - missing <= found["recall"] <= found["recall_bound"]
    if name != "sampling_8":
        assert found["recall_bound"] == 1.0


def test_fragments_are_tied_by_their_content(verdicts: Any) -> None:
    """Two of three go on in another buffer, and the third's buffer is where the first one's content goes on."""
    found = verdicts["fragments"]
    assert found["packets"] == 3 * 2 * 80
    assert 2 * 2 * 80 * 0.9 <= found["grades"]["content"] <= 2 * 2 * 80


def test_a_sample_is_of_whole_packets(verdicts: Any) -> None:
    assert 0 < verdicts["sampling_8"]["recall"] < 0.5
