"""Captures of every wire version there has been are read as they always were."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import zstandard

from collector.capture_source import Capture
from mace.records import Batch
from mace.topology import Topology
from mace.wire import FILE_HEAD, HEAD_SIZE, WIRE_VERSION, parse_head
from tests.made_capture import capture_bytes, digest

GOLDEN = Path(__file__).parents[2] / "golden"


def holds(found, expected):
    """Equality; what `found` has besides (fields that came later) does not count."""
    if isinstance(expected, dict):
        return all(key in found and holds(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(holds, found, expected))
    return found == expected


@pytest.mark.parametrize("version", range(1, WIRE_VERSION + 1))
def test_a_golden_capture_is_read_as_ever(version):
    here = GOLDEN / f"wire-{version}"
    expected = json.loads((here / "expected.json").read_text())
    with Capture(here / "capture.mace") as capture:
        items = list(capture)
        assert not capture.warnings
        assert capture.bytes_read == expected["bytes"]
    topologies = [item for item in items if isinstance(item, Topology)]
    assert holds(asdict(capture.header), expected["header"])
    assert holds([asdict(one) for one in topologies[: len(expected["topologies"])]], expected["topologies"])
    assert [len(one.sightings) for one in topologies] == expected["sightings"]
    assert topologies[-1].sightings[-1].name == expected["last_sighting"]
    assert [f"Batch {len(i)}" if isinstance(i, Batch) else "Topology" for i in items] == expected["items"]
    assert sum(len(item) for item in items if isinstance(item, Batch)) == expected["records"]
    assert sum(item.lost for item in items if isinstance(item, Batch)) == expected["lost"]
    assert {name: column.tolist() for name, column in items[-1].columns()} == expected["last_batch"]
    assert digest(items) == expected["columns_sha256"]


def payloads(content):
    at = len(FILE_HEAD)
    while at < len(content):
        head = parse_head(content[at:])
        stored = content[at + HEAD_SIZE : at + HEAD_SIZE + head.stored]
        yield head.message, zstandard.decompress(stored) if head.compressed else stored
        at += HEAD_SIZE + head.stored


def test_the_writer_still_writes_this_version():
    # A change here is a change of the format: it needs a new WIRE_VERSION and a golden capture of its own.
    here = GOLDEN / f"wire-{WIRE_VERSION}"
    content = (here / "capture.mace").read_bytes()
    with Capture(here / "capture.mace") as capture:
        again = capture_bytes(list(capture), capture.header)
    assert list(payloads(again)) == list(payloads(content))
