"""The command line of `mace replay` for other tools' files."""

import json

import pytest

from mace.cli import main
from tests.made_pcap import through_nat, udp_frames, written
from tests.places import GOLDEN

FILES = GOLDEN / "tracecmd"


def replayed(capsys, *argv):
    assert main(["replay", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_trace_with_the_devices_of_its_host(capsys):
    found = replayed(capsys, "--topology", FILES / "v7-zstd.mace", FILES / "v7-zstd.dat")
    live = replayed(capsys, FILES / "v7-zstd.mace")
    assert found["packets"] == live["packets"] == 18
    assert found["ledger"]["lost"] == 0


def test_two_packet_captures(capsys, tmp_path):
    frames, utc_ns = udp_frames(50)
    (tmp_path / "i.pcap").write_bytes(written(frames, utc_ns))
    (tmp_path / "o.pcap").write_bytes(written(through_nat(frames), utc_ns + 7_000))
    found = replayed(capsys, "--inner", tmp_path / "i.pcap", "--outer", tmp_path / "o.pcap")
    assert found["packets"] == found["grades"]["content"] == 50


@pytest.mark.parametrize(
    ("argv", "status", "why"),
    [
        ([], 2, "nothing to replay"),
        (["--inner", "a.pcap"], 2, "--inner and --outer go together"),
        (["--buffer", "tops", str(FILES / "v6.dat")], 1, "did you mean 'top'"),
        (["--clock", "boot", str(FILES / "v6.dat")], 1, "recorded with the clock"),
        (["--topology", "no.mace", str(FILES / "v6.dat")], 1, "no.mace"),
    ],
)
def test_files_that_cannot_be_replayed(capsys, argv, status, why):
    assert main(["replay", *argv]) == status
    assert why in " ".join(capsys.readouterr().err.split())
