"""What a report says of seals and clocks."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from contracts.clock import KernelClock
from mace import cli
from mace.shown import evidence
from storage.query import StoreReader
from storage.sealing.places import seal_path
from tests.made_results import HEADER, make_delays, make_results
from tests.places import ROOT
from tests.sealing import new_key
from tests.unit.storage.stored import fill


def report(root, capsys, *options):
    assert cli.main(["report", "--store", str(root), *options]) == 0
    return capsys.readouterr().out


def told(root):
    """Return the lines that a report on a store would end with."""
    return evidence.evidence([root], StoreReader(root).runs()).lines


def with_kernel(run, state="synchronised", max_error_ns=2_345_000):
    clock = replace(HEADER.clock, kernel=KernelClock(state, max_error_ns, 12_000))
    return replace(HEADER, run=run, clock=clock)


def test_a_report_ends_with_the_seal_and_the_clock(tmp_path, capsys, monkeypatch):
    root = tmp_path / "store"
    key = new_key(tmp_path)
    fill(root, [make_results(make_delays(5))], head=with_kernel("run-1"), seal=key)
    out = report(root, capsys)
    seal, clock = out.splitlines()[-2:]
    assert seal.startswith(f"{root}: seal intact: 3 segments, ")
    assert seal.endswith(f"key {key.public.fingerprint} (not compared with a key of yours)")
    assert clock == (
        "clocks: UTC - CLOCK_MONOTONIC = 1,749,999,999,999,999,000 ± 50 ns; the kernel calls its UTC synchronised, off"
        " by at most 2.345 ms, by its estimate 0.012 ms"
    )
    found = json.loads(report(root, capsys, "--json"))
    assert found["seals"][0]["state"] == "intact"
    assert found["clocks"][0]["kernel"] == {"state": "synchronised", "max_error_ns": 2_345_000, "est_error_ns": 12_000}
    monkeypatch.setattr(evidence, "VERIFIED_BYTES", 1_000)
    assert f"not verified here (0 MiB): mace verify-seal {root}" in told(root)[0]


def test_a_report_names_a_broken_seal(tmp_path):
    root = tmp_path / "store"
    fill(root, [make_results(make_delays(5))], seal=new_key(tmp_path))
    [delays] = root.glob("delays/*/*/*.parquet")
    delays.unlink()
    assert f"missing: segment {delays.relative_to(root)}" in told(root)[1]
    seal_path(root).write_bytes(b"hello\n")
    assert "sealed, but the seal cannot be verified: " in told(root)[0]


def test_clocks_of_several_runs_are_one_line(tmp_path):
    fill(tmp_path, [], head=with_kernel("a"))
    fill(tmp_path, [], head=with_kernel("b", "unsynchronised", 16_000_000_000))
    fill(tmp_path, [], run="c")
    assert told(tmp_path)[-1] == (
        "clocks of 3 runs: UTC - CLOCK_MONOTONIC known to ± 50 ns; the kernels' UTC: synchronised 1, unsynchronised 1,"
        " not recorded 1; where synchronised, off by at most 2.345 ms"
    )


@pytest.mark.slow
def test_without_the_extra_a_report_says_so_and_a_command_names_the_package(tmp_path):
    root = tmp_path / "store"
    fill(root, [make_results(make_delays(5))], seal=new_key(tmp_path))
    script = "import sys; sys.modules['cryptography'] = None; from mace import cli; sys.exit(cli.main(sys.argv[1:]))"

    def run(*argv):
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, check=False
        )

    found = run("report", "--store", root)
    assert found.returncode == 0
    assert (
        "sealed, but the seal cannot be verified: seal: the Python module cryptography is not installed" in found.stdout
    )
    found = run("verify-seal", root)
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert "pip install 'mace[seal]'" in found.stderr
