"""The collector, the correlator and the store on the module: the main job, as on a host with ftrace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mace.lab import Lab
from storage.query import Store
from tests.kernel.guest.conftest import KO, load, unload

ROOT = Path(__file__).parents[3]
MACE = (sys.executable, "-m", "mace")


def mace(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*MACE, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 or not check, done.stderr
    return done


def last_object(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo run with the module: its capture and its last line."""
    load()
    try:
        capture = tmp_path_factory.mktemp("demo") / "demo.mace"
        done = mace(
            "demo", "--source", "kmod", "--json", "--store", str(capture.parent / "store"), "--record", str(capture)
        )
        return capture, last_object(done)
    finally:
        unload()


def test_the_demo_runs_on_the_module(recorded: tuple[Path, dict[str, Any]]) -> None:
    _, found = recorded
    ledger = found["ledger"]
    assert ledger["lost"] == ledger["discarded"] == 0
    assert ledger["records"] == sum(
        ledger[name] for name in ("matched", "unmatched", "ambiguous", "expired", "dropped", "in_flight")
    )
    assert ledger["matched"] > 0.8 * ledger["records"]
    # Namespace and ifindex leave nothing to guess.
    assert ledger["ambiguous"] == 0
    kinds = {(device["kind"], device["direction"]) for device in found["devices"]}
    assert {("veth", "egress"), ("bridge", "egress"), ("veth", "ingress")} <= kinds
    assert {row["direction"] for row in found["overhead"]} == {"egress", "ingress"}
    assert all(row["p50_ns"] > 0 for row in found["overhead"])


def test_its_replay_gives_the_same(recorded: tuple[Path, dict[str, Any]]) -> None:
    capture, found = recorded
    again = last_object(mace("replay", str(capture), "--json"))
    for part in ("ledger", "packets", "devices", "overhead"):
        assert again[part] == found[part]


def test_cost_is_stored_with_the_run_and_reported(recorded: tuple[Path, dict[str, Any]]) -> None:
    capture, found = recorded
    report = last_object(mace("report", "--store", str(capture.parent / "store"), "--json"))
    costs = {row["hook"]: row for row in report["cost"]}
    assert costs.keys() >= {"net_dev_queue", "netif_receive_skb"}
    assert sum(row["calls"] for row in costs.values()) >= found["ledger"]["records"]
    assert all(row["timed_ns"] > 0 for row in costs.values() if row["timed"])


def test_auto_takes_the_module_where_it_is(lab: Lab, tmp_path: Path) -> None:
    arguments = ("run", "--lab", "vm", "--duration", "1", "--json", "--store")
    done = mace(*arguments, str(tmp_path / "without"))
    assert "kmod" in done.stderr  # why not
    load()
    try:
        mace(*arguments, str(tmp_path / "with"))
        check = json.loads(mace("check", "--json").stdout)
    finally:
        unload()
    assert sources(tmp_path / "without") == {"ftrace"}
    assert sources(tmp_path / "with") == {"kmod"}
    assert check["source kmod"]["ok"], check["source kmod"]
    assert "1.0" in check["source kmod"]["detail"]


def sources(store: Path) -> set[str]:
    return {run.source for run in Store(store).runs()}


def test_module_commands() -> None:
    assert "not loaded" in mace("module", "status", check=False).stdout
    shutil.copy(KO, ROOT / "kmod/mace.ko")  # as `mace module build` leaves it
    mace("module", "load")
    try:
        status = mace("module", "status").stdout
        assert "1.0" in status
        with Path("/dev/mace").open("rb"):
            busy = mace("module", "unload", check=False)
            assert busy.returncode == 1
            assert "use" in busy.stderr
    finally:
        mace("module", "unload")
    assert not Path("/sys/module/mace").exists()


def test_a_kernel_without_headers_is_told_which_package_it_wants() -> None:
    Path(f"/lib/modules/{os.uname().release}/build").unlink(missing_ok=True)
    done = mace("module", "build", check=False)
    assert done.returncode == 1
    assert f"linux-headers-{os.uname().release}" in done.stderr
