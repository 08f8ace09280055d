import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

import mace
from contracts.errors import CaptureError, StoreError, Unavailable
from mace import cli
from storage import tables
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic
from tests.made_replay import count_rows


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    path = tmp_path_factory.mktemp("capture") / "made.mace"
    path.write_bytes(capture_bytes([TOPOLOGY, *batches(traffic(40_000), 3_000)]))
    return path


@pytest.fixture(scope="module")
def recording(capture):
    return mace.open(capture)


def sorted_rows(table, schema):
    plain = table.cast(pa.schema([(f.name, getattr(f.type, "value_type", f.type)) for f in schema]))
    return plain.sort_by([("time", "ascending"), ("packet", "ascending"), ("position", "ascending")])


@pytest.mark.slow
def test_rows_are_those_of_a_store(recording, tmp_path):
    store = recording.store(tmp_path / "store")
    assert isinstance(store, mace.Store)
    ours, stored = recording.delays(), store.delays()
    assert ours.num_rows == stored.num_rows > 10_000
    assert ours.schema == tables.SCHEMAS["delays"]
    assert sorted_rows(ours, ours.schema).equals(sorted_rows(stored, ours.schema))
    assert store.sql("SELECT count(*) AS n FROM windows")["n"].to_pylist() == [recording.windows().num_rows]
    assert store.summary().ledger == recording.summary().ledger
    assert isinstance(mace.open(tmp_path / "store"), mace.Store)


def test_batches_and_topologies(recording):
    assert np.concatenate([batch.ts_ns for batch in recording.batches()]).shape == (40_000,)
    assert list(recording.topologies()) == [TOPOLOGY]


def test_stretches_together_are_all_results(recording):
    parts = list(recording.delay_batches())
    assert sum(map(len, parts)) == recording.delays(["packet"]).num_rows


def test_a_wrong_name_and_a_missing_file(recording, tmp_path):
    with pytest.raises(StoreError, match=r"did you mean 'delay_ns'"):
        recording.delays(["delay"])
    with pytest.raises(Unavailable):
        mace.open(tmp_path / "none.mace")
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        mace.opne  # noqa: B018


def test_a_capture_without_packets(tmp_path):
    (tmp_path / "empty.mace").write_bytes(capture_bytes([TOPOLOGY]))
    recording = mace.open(tmp_path / "empty.mace")
    assert recording.delays(["delay_ns", "packet"]).column_names == ["delay_ns", "packet"]
    assert recording.windows().num_rows == 0
    assert recording.store(tmp_path / "store").summary().packets == 0


def test_damage(capture, tmp_path):
    data = bytearray(capture.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.mace").write_bytes(data)
    with pytest.raises(CaptureError):
        mace.open(tmp_path / "bad.mace").delays()
    salvaged = mace.open(tmp_path / "bad.mace", salvage=True)
    assert salvaged.summary().ledger.discarded > 0
    assert "skipped" in salvaged.warnings[0]


@pytest.mark.slow
def test_several_hosts_in_one_store(capture, tmp_path):
    other = tmp_path / "other.mace"
    other.write_bytes(capture_bytes([TOPOLOGY, traffic(1_000)], replace(HEADER, host="other.example")))
    store = mace.store([mace.open(capture), mace.open(other)], tmp_path / "store")
    assert sorted(run.host for run in store.runs()) == ["measured.example", "other.example"]
    assert count_rows(tmp_path / "store", "runs") == 2


def test_a_url(capture):
    files = pytest.importorskip("fsspec").filesystem("memory")
    files.pipe("/api/made.mace", capture.read_bytes())
    assert mace.open("memory://api/made.mace").delays(["packet"]).num_rows > 10_000
    files.rm("/api", recursive=True)


def test_contracts_do_not_load_the_api():
    code = "import sys, contracts.records; sys.exit('duckdb' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_report_over_recordings_is_the_replay(capture, capsys):
    assert cli.main(["report", str(capture), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert cli.main(["replay", str(capture), "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    # A store, which `mace report` reads, does not keep the reason why packets are ambiguous.
    assert replayed.pop("ambiguous")["several_devices"] == report["grades"]["ambiguous"]
    assert report.pop("clocks")[0]["run"] == HEADER.run
    assert replayed == report
    assert cli.main(["report", str(capture), "--worst", "1"]) == 0
    assert "packet " in capsys.readouterr().out
    assert cli.main(["report", str(capture), "--store", "somewhere"]) == 2
