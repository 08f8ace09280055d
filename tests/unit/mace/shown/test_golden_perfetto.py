"""Real Perfetto traces give unchanged results, equal to those of MACE's own capture of the same packets."""

import json

import numpy as np
import pytest

from contracts.schema import Direction, Segment
from tests.golden_perfetto import replayed, summary
from tests.places import GOLDEN

HERE = GOLDEN / "perfetto-1"
KINDS = ("generic", "described")


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_trace_is_read_unchanged(kind):
    expected = json.loads((HERE / "expected.json").read_text())[kind]
    found = summary(HERE / f"{kind}.pftrace", HERE / f"{kind}.mace")
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_in_place_of_addresses_are_resolved(kind):
    *_, source = replayed(HERE / f"{kind}.pftrace", HERE / f"{kind}.mace")
    assert source.decoder.unresolved == 0
    assert source.warnings == []


@pytest.mark.parametrize("kind", KINDS)
def test_trace_and_capture_agree_on_each_ping(kind):
    """Two trace instances stamp an event in sequence, 0.2 µs apart."""
    overheads = []
    for path in (HERE / f"{kind}.pftrace", HERE / f"{kind}.mace"):
        _, _, _, delays, _ = replayed(path, HERE / f"{kind}.mace" if path.suffix == ".pftrace" else None)
        whole = delays[(delays.segment == Segment.OVERHEAD) & (delays.l3_len == 84)]
        overheads.append({d: whole.delay_ns[whole.direction == d] for d in (Direction.EGRESS, Direction.INGRESS)})
    for direction in (Direction.EGRESS, Direction.INGRESS):
        mine, theirs = (one[direction] for one in overheads)
        assert len(mine) == len(theirs) == 10
        assert np.abs(mine - theirs).max() < 2_000


def test_without_a_topology_devices_are_names_only():
    _, batch, last, _, source = replayed(HERE / "generic.pftrace")
    assert len(batch) > 300
    assert last.totals.ledger.imbalance == 0
    assert any("--topology" in line for line in source.warnings)
