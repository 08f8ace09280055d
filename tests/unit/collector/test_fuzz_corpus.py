"""The kept corpus of hostile and damaged files: each gives its known records, counts or error, within bounds."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from collector.files import PCAP_PAIR, FileOptions, recording, recording_of
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.records import Batch
from correlator.engine import Engine, EngineConfig
from tests.places import GOLDEN

pytestmark = pytest.mark.slow

CORPUS = GOLDEN / "fuzz"
FILES = sorted(CORPUS.glob("*/*.bin"))
EXPECTED = json.loads((CORPUS / "expected.json").read_text())
FORMATS = {path.parent.name for path in FILES}
MEMORY_MAX = 200 << 20
"""The largest accepted packet of Perfetto has 64 MiB; parsing holds three copies of it."""
RECORDS_MAX = 20_000
SIZE_MAX = 300_000


def read(path, *, salvage):
    """Read a file; returns (records and markers, last results with the whole ledger, source); raises its errors."""
    options = FileOptions(salvage=salvage)
    if path.parent.name == "pcap":
        one = recording_of(PCAP_PAIR, (path, CORPUS / "outer.pcap"), options)
    else:
        one = recording(path, options)
    with one.reader() as reader:
        engine, found, counted = Engine(reader.header.clock.offset_ns, EngineConfig()), [], 0
        for item in reader.items():
            if isinstance(item, Batch):
                found.append(item)
                counted += len(item)
                assert counted <= RECORDS_MAX
            for _ in engine.feed(item):
                pass
        last = engine.finish()
        return Batch.concatenate(found), replace(last.totals.ledger, discarded=reader.discarded), reader.warnings


def told(path, *, salvage):
    """Return the result of reading a file as in `expected.json`: the byte of an error, or the fate of its records."""
    refused = None
    try:
        batch, ledger, warnings = read(path, salvage=salvage)
    except CaptureError as error:
        refused = error
    if refused is not None:
        assert f"at byte {refused.offset}" in str(refused)
        assert 0 <= refused.offset <= refused.path.stat().st_size
        return {"error_at": refused.offset}
    assert ledger.imbalance == 0
    assert ledger.records == int((batch.hook != Hook.LOST).sum())
    assert (np.diff(batch.ts_ns) >= 0).all()
    counts = {"records": ledger.records, "discarded": ledger.discarded, "lost": ledger.lost}
    return counts | {"warnings": len(warnings)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("salvage", [False, True], ids=["read", "salvaged"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_file_reads_as_it_did(path, salvage):
    tracemalloc.start()
    try:
        found = told(path, salvage=salvage)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()
    assert found == EXPECTED[f"{path.parent.name}/{path.stem}"]["salvaged" if salvage else "read"]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_each_format_has_files_with_a_salvaged_part(form):
    """Salvage reads records of files that are otherwise refused, and counts or reports the omitted parts."""
    mine = [one for name, one in EXPECTED.items() if name.startswith(f"{form}/")]
    kept = [one["salvaged"] for one in mine if "error_at" in one["read"] and one["salvaged"].get("records")]
    assert kept
    assert all(one["warnings"] for one in kept)
    assert any(one["discarded"] for one in kept)


def test_the_corpus_is_whole_and_small():
    assert {f"{path.parent.name}/{path.stem}" for path in FILES} == set(EXPECTED)
    assert all(len(list(CORPUS.glob(f"{form}/*.bin"))) >= 12 for form in FORMATS)
    assert {"mace", "tracedat", "text", "perfetto", "pcap"} == FORMATS
    assert sum(path.stat().st_size for path in FILES) < SIZE_MAX
