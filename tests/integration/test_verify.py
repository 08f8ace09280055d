"""`mace verify` on this kernel: every row is right, and every packet that can be matched has a row."""

import json

import pytest

from mace.lab import Layout
from mace.lab.plan import NETKIT
from mace.trials.verify.scenarios import BY_NAME, SCENARIOS
from tests.measuring import mace

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow, pytest.mark.timeout(240)]

PACKETS = 400
NEWER = (Layout.IPIP, *NETKIT)
"""Layouts that not every kernel can have; tests/kernel/guest/test_layouts.py has them."""
HERE = [scenario.name for scenario in SCENARIOS if not scenario.sample_shift and scenario.spec.layout not in NEWER]
KEYS = ("scenario", "packets", "precision", "recall", "delay_error_p50_ns", "delay_error_p99_ns")


@pytest.fixture(scope="module")
def verdicts():
    done = mace("verify", "--source", "ftrace", "--packets", PACKETS, "--json", check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {verdict["scenario"]: verdict for verdict in map(json.loads, done.stdout.splitlines())}
    skipped = {name for name in NEWER if f"mace: {name}: skipped, because the kernel makes no" in done.stderr}
    assert found.keys() | skipped == {*HERE, *NEWER}, "each is played, or said not to be"
    assert not found.keys() & skipped
    return found


@pytest.mark.parametrize("name", HERE)
def test_no_row_is_wrong_and_none_is_missing(verdicts, name):
    found = verdicts[name]
    assert tuple(found)[: len(KEYS)] == KEYS
    assert found["packets"] >= PACKETS
    assert (found["precision"], found["wrong"]) == (1.0, 0)
    assert found["recall"] == found["recall_bound"]
    if BY_NAME[name].unseen:
        assert found["recall"] == 0.5, "every request and no echo"
        assert found["why_bound"] == BY_NAME[name].unseen
    if BY_NAME[name].loss:
        assert found["lost"] > 0
        assert 0 < found["recall"] < 1
    elif not BY_NAME[name].partial:
        assert (found["recall"], found["lost"]) == (1.0, 0)
    assert (found["why_bound"] is None) == (found["recall_bound"] == 1.0)
    if name in ("plain", "nat", "ipv6"):
        assert found["round_trips"] == found["packets"] // 2, "each request has an echo"


def test_below_the_table_it_says_what_the_source_allows_and_which_allows_more():
    done = mace("verify", "--source", "ftrace", "--packets", PACKETS, "fragments", "plain")
    *_, last = done.stdout.splitlines()
    assert last.startswith("fragments: the recall can be at most 0.33")
    assert "source ftrace records buffers alone; kmod and bpf record the packets' content" in last
    assert "plain: " not in done.stdout


def test_what_the_source_cannot_record_is_said():
    done = mace("verify", "--source", "ftrace", "sampling_8", "--json")
    assert done.stdout == ""
    assert "sampling_8: skipped, because source ftrace" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["vlxan"], "no scenario 'vlxan' (did you mean 'vxlan'?)"), (["nat", "--packets", "0"], "expected 1 to 20000")],
)
def test_invalid_requests_are_refused(arguments, told):
    done = mace("verify", *arguments, check=False)
    assert done.returncode == 2
    assert told in done.stderr
