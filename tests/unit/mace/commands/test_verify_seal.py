import json

from mace import cli
from storage.sealing.places import seal_path
from tests.made_results import make_delays, make_results
from tests.sealing import new_key
from tests.unit.storage.stored import fill


def verify(*arguments):
    return cli.main(["verify-seal", *map(str, arguments)])


def test_the_status_says_whether_all_is_as_sealed(tmp_path, capsys):
    root, key = tmp_path / "store", tmp_path / "key.pem"
    fill(root, [make_results(make_delays(5))], seal=new_key(tmp_path))
    assert verify(root, "--public-key", key) == 0
    assert "(the expected key)" in capsys.readouterr().out
    assert verify(root, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["verified"], found["expected_key"]) == ("intact", 3, None)
    assert verify(root, "--head", found["head"]) == 0
    assert verify(root, "--head", "0" * 64) == 1
    assert "missing: the statement 000" in capsys.readouterr().out
    assert verify(root, "--head", "0" * 63) == 2
    (tmp_path / "other").mkdir()
    new_key(tmp_path / "other")
    assert verify(root, "--public-key", tmp_path / "other" / "key.pem") == 1
    assert "signed by another key than the expected one" in capsys.readouterr().out
    lines = seal_path(root).read_bytes().splitlines(keepends=True)
    seal_path(root).write_bytes(b"".join(lines[:-1]))
    assert verify(root) == 1
    assert "seal open: 3 segments" in capsys.readouterr().out
    next(root.glob("delays/*/*/*.parquet")).unlink()
    assert verify(root) == 1
    assert "seal broken: 1 difference;" in capsys.readouterr().out


def test_what_cannot_be_verified_is_one_line(tmp_path, capsys):
    assert verify(tmp_path / "nosuch") == 1
    assert capsys.readouterr().err == f"mace: {tmp_path}/nosuch: no such file or store\n"
    assert verify(tmp_path) == 1
    assert "not sealed (there is no" in capsys.readouterr().err


def test_sealing_nothing_is_a_usage_error(tmp_path, capsys):
    assert cli.main(["run", "--no-store", "--seal", str(tmp_path / "key.pem"), "--duration", "0.1"]) == 2
    assert "--seal seals the store and the capture file" in capsys.readouterr().err
