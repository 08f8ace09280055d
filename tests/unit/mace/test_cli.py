"""The command line without a kernel: usage, errors, replays. `tests/contract/test_commands.py` has help."""

import json
import subprocess
import sys

import pytest

from mace.cli import main
from tests.measuring import ROOT, balanced, mace


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nosuch"],
        ["record"],
        ["run", "--duration", "0"],
        ["run", "--duration", "nan"],
        ["run", "--source", "kmodd"],
        ["lab", "up", "--containers", "0"],
    ],
)
def test_wrong_usage(argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2


def test_usage_errors_found_by_the_parts(capsys):
    assert main(["lab", "up", "../x"]) == 2
    assert capsys.readouterr().err.startswith("mace: ")


def test_hooks(capsys):
    assert main(["hooks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hooks"]
    assert found[0] == {"id": 1, "name": "net_dev_queue", "tracepoint": "net:net_dev_queue"} | {
        "meaning": found[0]["meaning"]
    }


def test_check_names_every_part(capsys):
    assert main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"source ftrace", "sink store", "lab netns", "lab docker", "lab guest", "devices for bpf"} <= set(found)
    assert all(part["ok"] or (part["detail"] and part["remedy"]) for part in found.values())


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "x.mace").write_bytes(b"not a capture at all")
    for argv in (
        ["replay", str(tmp_path / "no.mace")],
        ["replay", str(tmp_path / "x.mace")],
        ["report", "--store", str(tmp_path / "nothing")],
        ["check", "--config", str(tmp_path / "no.toml")],
    ):
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert err.startswith("mace: ")
        assert err.count("\n") == 1


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path):
    done = mace("--debug", "replay", tmp_path / "no.mace", check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_closed_pipe_ends_the_output():
    with subprocess.Popen(
        [sys.executable, "-m", "mace", "hooks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        done.stdout.close()
        assert b"Traceback" not in done.stderr.read()


def test_the_last_line_of_replay_has_the_ledger(capsys):
    assert main(["replay", str(ROOT / "docs/example.mace"), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    found = json.loads(out.splitlines()[-1])
    promised = "records matched unmatched ambiguous expired dropped in_flight lost discarded"
    assert balanced(found).records > 0
    assert list(found["ledger"]) == promised.split()
    assert found["packets"] > 0
    figures = {"container", "direction", "count", "p50_ns", "p99_ns"}
    assert found["overhead"]
    assert all(row.keys() >= figures for row in found["overhead"])
    assert found["devices"]
    assert all(row.keys() >= figures | {"netns", "device", "kind", "max_ns"} for row in found["devices"])


def test_a_misspelt_key_is_one_line(tmp_path, capsys):
    file = tmp_path / "mace.toml"
    file.write_text("[store]\nmax_age_day = 3\n")
    assert main(["replay", str(ROOT / "docs/example.mace"), "--config", str(file)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"mace: {file}: [store] has no key 'max_age_day' (did you mean 'max_age_days'?)")
    assert err.count("\n") == 1
