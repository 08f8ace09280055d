"""Layouts that need a kernel with netkit or IP in IP: everyone is reached, and `mace verify` finds no error.

The packets are few, because the machine is emulated; BPF is left out, because its verifier takes a minute there, and
test_past_tracepoints.py has netkit with BPF.
"""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest

from mace.lab import Layout, Spec, check, running
from tests.kernel.guest.commands import mace
from tests.kernel.guest.conftest import load, unload

pytestmark = [
    # One kernel, the newest: it is the layouts that are tried here.
    pytest.mark.skipif(int(platform.release().partition(".")[0]) < 7, reason="on the newest kernel only"),
    pytest.mark.timeout(240),
]

LAYOUTS = {Layout.IPIP: "ipip", Layout.NETKIT_L2: "netkit", Layout.NETKIT_L3: "netkit"}
"""Layout -> kind of its devices in the host's namespace."""
PACKETS = 60


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everyone_is_reached_both_ways_without_translation(layout: Layout) -> None:
    spec = Spec("layout", containers=2, layout=layout)
    assert check(spec) == []
    with running(spec) as lab:
        shown = lab.popen("host", ["ip", "-d", "link", "show", "type", LAYOUTS[layout]]).communicate()[0]
        assert "mtu 1480" in shown if layout is Layout.IPIP else shown.count("veth") == 2
        for sender, to in (("c1", "remote"), ("remote", "c2"), ("c1", "c2"), ("host", "c2")):
            for family in (4, 6):
                assert lab.ping(sender, to, count=1, family=family).received == 1, (sender, to, family)
        assert lab.tcp("c1", size=100_000, reverse=True).received == 100_000
        lab.remove_container("c1")
        lab.add_container("c1")
        assert lab.ping("c1", count=1).received == 1


@pytest.fixture(scope="module", params=["kmod", "ftrace"])
def verdicts(request: pytest.FixtureRequest) -> Any:
    source = request.param
    if source == "kmod":
        load()
    try:
        done = mace("verify", "--source", source, "--packets", PACKETS, "--json", *LAYOUTS, check=False, timeout=220)
    finally:
        if source == "kmod":
            unload()
    assert done.returncode == 0, done.stdout + done.stderr
    found = {verdict["scenario"]: verdict for verdict in map(json.loads, done.stdout.splitlines())}
    for verdict in found.values():
        print(source, json.dumps(verdict))
    return source, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_row_is_wrong_and_none_is_missing(verdicts: Any, layout: Layout) -> None:
    source, found = verdicts
    one = found[layout]
    assert (one["precision"], one["wrong"], one["lost"]) == (1.0, 0, 0)
    assert (one["recall"], one["recall_bound"]) == (1.0, 1.0)
    assert one["packets"] == 2 * 2 * PACKETS, "a request and its echo, from two containers"
    assert one["grades"]["exact" if source == "kmod" else "buffer"] >= one["packets"]
