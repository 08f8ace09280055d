"""Collector, correlator and store work with the module as they do with ftrace on a host."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from collector.kmod.source import KmodSource
from contracts import abi
from mace.lab import Lab
from tests.kernel.guest.commands import mace, start
from tests.kernel.guest.conftest import KO, load, unload
from tests.measuring import PATHS, ROOT, balanced, measured, query

PACKETS = 100
# Length of each kind's packets, by which its rows are found: payload and headers.
LENGTHS = {"ping": 101 + 28, "ping6": 102 + 48, "udp": 203 + 28}


@pytest.fixture(scope="module")
def run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One measurement of some traffic, with all stages and a recording."""
    load()
    try:
        with measured(lab, tmp_path_factory.mktemp("run"), "--source", "kmod", start=start) as measurement:
            # No flood: that sends one more where a reply takes more than 10 ms.
            lab.ping("c1", count=PACKETS, interval_s=0.01, size=101)
            lab.ping("c1", count=PACKETS, interval_s=0.01, size=102, family=6)
            lab.udp("c1", count=PACKETS, echo=True, size=203)
            lab.tcp("c2", size=300_000)
    finally:
        unload()
    return measurement


def test_every_packet_has_its_whole_path_in_both_directions(run: Any, lab: Lab) -> None:
    ledger = balanced(run.found)
    assert ledger.lost == ledger.discarded == 0
    assert ledger.ambiguous == 0  # namespace and ifindex leave nothing to guess
    tag = lab.outer_device[3:]
    out = ("eth0", f"veth{tag}-c1", f"br{tag}", f"out{tag}", f"rem{tag}")
    for length in LENGTHS.values():
        found = run.query(
            f"SELECT direction, devices, count(*) FROM ({PATHS})"
            f" WHERE container = 'c1' AND l3_len = {length} GROUP BY ALL"
        )
        assert {(direction, tuple(devices)): count for direction, devices, count in found} == {
            ("egress", out): PACKETS,
            ("ingress", out[::-1]): PACKETS,
        }


def test_the_runs_source_and_delays_are_told(run: Any) -> None:
    assert run.query("SELECT DISTINCT source FROM runs") == [("kmod",)]
    assert {(row["container"], row["direction"]) for row in run.found["overhead"]} >= {
        ("c1", "egress"),
        ("c1", "ingress"),
        ("c2", "egress"),
        ("c2", "ingress"),
    }
    assert all(row["p50_ns"] > 0 for row in run.found["overhead"])


def test_its_replay_gives_the_same(run: Any) -> None:
    again = json.loads(mace("replay", run.capture, "--json").stdout)
    for part in ("ledger", "packets", "devices", "overhead"):
        assert again[part] == run.found[part]


def test_cost_is_stored_with_the_run_and_reported(run: Any) -> None:
    report = json.loads(mace("report", "--store", run.store, "--json").stdout)
    costs = {row["hook"]: row for row in report["cost"]}
    assert costs.keys() >= {"net_dev_queue", "netif_receive_skb"}
    assert sum(row["calls"] for row in costs.values()) >= run.found["ledger"]["records"]
    assert all(row["timed_ns"] > 0 for row in costs.values() if row["timed"])


def test_auto_takes_the_module_where_it_is(lab: Lab, tmp_path: Path) -> None:
    # Without the module `auto` would take BPF, whose programs an emulator verifies for minutes: a host's tests do that.
    arguments = ("run", "--lab", lab.name, "--duration", "1", "--store")
    load()
    try:
        mace(*arguments, tmp_path / "with")
        # Not `mace check`, which also verifies the BPF programs: minutes, in an emulator.
        check = KmodSource.check()
    finally:
        unload()
    assert query(tmp_path / "with", "SELECT source FROM runs").fetchall() == [("kmod",)]
    assert check.ok, check
    assert f"ABI {abi.ABI_MAJOR}.{abi.ABI_MINOR}" in check.detail


def test_module_commands() -> None:
    assert "not loaded" in mace("module", "status", check=False).stdout
    shutil.copy(KO, ROOT / "kmod/mace.ko")  # as `mace module build` leaves it
    mace("module", "load", "max_sessions=2")
    try:
        assert Path("/sys/module/mace/parameters/max_sessions").read_text() == "2\n"
        assert f"ABI {abi.ABI_MAJOR}.{abi.ABI_MINOR}" in mace("module", "status").stdout
        with Path("/dev/mace").open("rb"):
            busy = mace("module", "unload", check=False)
            assert busy.returncode == 1
            assert "use" in busy.stderr
    finally:
        mace("module", "unload")
    assert not Path("/sys/module/mace").exists()


def test_a_kernel_without_headers_is_told_which_package_it_wants() -> None:
    release = os.uname().release
    assert not Path(f"/lib/modules/{release}/build/Makefile").exists()
    done = mace("module", "build", check=False)
    assert done.returncode == 1
    assert f"linux-headers-{release}" in done.stderr


@pytest.mark.timeout(900)
def test_a_chosen_container_with_its_whole_path(lab: Lab, tmp_path: Path) -> None:
    """The module records at c1's devices and at the outer device: no delay of c2 is known, every overhead of c1 is."""
    load()
    try:
        chosen = ("--container", "c1", "--device", lab.outer_device, "--protocol", "icmp")
        with measured(lab, tmp_path, "--source", "kmod", *chosen, start=start) as measurement:
            for container in ("c1", "c2"):
                lab.ping(container, count=PACKETS, interval_s=0.01, size=101)
                lab.udp(container, count=PACKETS, echo=True, size=203)
    finally:
        unload()
    ledger = balanced(measurement.found)
    assert ledger.lost == ledger.discarded == 0
    found = measurement.query(
        "SELECT container, direction, l3_len, count(*) FROM delays WHERE segment = 'overhead' GROUP BY ALL"
    )
    assert sorted(found) == [("c1", way, LENGTHS["ping"], PACKETS) for way in ("egress", "ingress")]
    assert measurement.query("SELECT DISTINCT container FROM delays") == [("c1",)]
