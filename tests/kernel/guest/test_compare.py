"""`mace compare` with the module: runs with each source and without any, on the same traffic."""

from __future__ import annotations

import json
import platform

import pytest

from mace.lab import Lab
from tests.kernel.guest.commands import mace
from tests.kernel.guest.conftest import load, unload
from tests.measuring import balanced

TRIPS = 40


# Half a minute; what would differ on other kernels is what test_source.py and test_equals_ftrace.py are about.
@pytest.mark.skipif(not platform.release().startswith("6.12"), reason="once is enough: on 6.12")
def test_the_module_beside_ftrace_and_beside_nothing(lab: Lab) -> None:
    load()
    try:
        argv = (
            "compare",
            "--lab",
            lab.name,
            "--sources",
            "kmod,ftrace,none",
            "--rounds",
            "1",
            "--count",
            TRIPS,
            "--json",
        )
        found = json.loads(mace(*argv).stdout)
    finally:
        unload()
    assert list(found["sources"]) == ["kmod", "ftrace", "none"]
    for name, row in found["sources"].items():
        assert row["trips"] + row["unanswered"] == TRIPS
        assert row["unanswered"] == 0
        if name != "none":
            balanced(row)
            assert row["lost"] == 0
            assert row["overhead_egress"]["p50_us"] > 0
    # Only the module counts its own cost, and only it reads packets.
    assert found["sources"]["kmod"]["own_cost"]
    assert "own_cost" not in found["sources"]["ftrace"]
    assert found["sources"]["kmod"]["grades"]["exact"] >= 2 * TRIPS
    # Both have seen the same packets at the same devices; the inner ones may carry an ARP request besides.
    egress = [row for row in found["devices"] if (row["direction"], row["of"]) == ("egress", "c1")]
    assert {row["device"] for row in egress} >= {"eth0", lab.outer_device}
    for row in egress:
        counts = [row[source]["count"] for source in ("kmod", "ftrace")]
        if row["device"] == lab.outer_device:
            assert counts == [TRIPS, TRIPS]
        assert min(counts) >= TRIPS
