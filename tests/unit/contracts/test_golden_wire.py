"""Captures of every wire version are read with unchanged results."""

import json
import struct
import zlib
from dataclasses import asdict

import pytest
import zstandard

from collector.capture.source import Capture
from contracts.records import Batch
from contracts.topology import Topology
from contracts.wire import FILE_HEAD, HEAD_SIZE, WIRE_VERSION, parse_head
from tests.made_capture import all_columns, capture_bytes, digest
from tests.places import GOLDEN


def holds(found, expected):
    """Return whether `found` has the expected values; its newer fields are ignored."""
    if isinstance(expected, dict):
        return all(key in found and holds(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(holds, found, expected))
    return found == expected


@pytest.mark.parametrize("version", range(1, WIRE_VERSION + 1))
def test_a_golden_capture_is_read_unchanged(version):
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
    with_content = [isinstance(item, Batch) and item.content is not None for item in items]
    assert with_content == expected.get("with_content", [False] * len(items))  # version 1 has no content
    assert {name: column.tolist() for name, column in all_columns(items[-1])} == expected["last_batch"]
    assert digest(items) == expected["columns_sha256"]


# --- a second reader, from docs/capture-format.md alone ------------------------------------------

COLUMNS = ("ts_ns", "skb_id", "dev", "l3_len", "cpu", "drop_reason", "gso_segs", "hook")
CONTENT = ("packet_key", "l4_seq", "l4_src", "l4_dst", "ip_id", "vlan", "ip_version", "l4_proto", "l4_bits", "flags")


def read_by_the_book(content):
    """Return (message, JSON object or columns) of every frame; shares no code with `contracts.wire`."""
    assert content[:8] == bytes.fromhex("4d41 4345 0d0a 1a0a")
    wire = int.from_bytes(content[8:12], "little")
    at, number, seen = 12, 0, 0
    while at < len(content):
        head = content[at : at + 36]
        sync, version, message, flags, zero, _, stored, sequence, raw, crc, own = struct.unpack("<4sBBBBIIQIII", head)
        assert (sync, version, zero, sequence) == (bytes.fromhex("ff4d4346"), wire, 0, number)
        assert zlib.crc32(head[:32]) == own
        payload = content[at + 36 : at + 36 + stored]
        assert zlib.crc32(payload) == crc
        if flags & 1:
            payload = zstandard.decompress(payload)
        assert len(payload) == raw
        if message == 3:
            columns = columns_by_the_book(payload, seen, wire)
            seen += len(columns["hook"])
            yield message, columns
        else:
            yield message, json.loads(payload)
        at, number = at + 36 + stored, number + 1


def columns_by_the_book(payload, seen, wire):
    def number(start, width, signed=False):
        return int.from_bytes(payload[start : start + width], "little", signed=signed)

    count, before = struct.unpack_from("<IQ", payload)
    assert before == seen
    at, there = (12, 8) if wire == 1 else (13, payload[12])
    names = {8: COLUMNS, 18: COLUMNS + CONTENT}[there]
    descriptors, at, columns = payload[at : at + there], at + there, {}
    for name, descriptor in zip(names, descriptors, strict=True):
        encoding, width = divmod(descriptor, 16)
        if encoding == 0:
            columns[name] = [number(at, width)] * count
            at += width
        elif encoding == 1:
            columns[name] = [number(at + i * width, width) for i in range(count)]
            at += width * count
        else:
            values, steps = [number(at, 8, signed=True)], count - 1
            for i in range(steps):
                step = sum(payload[at + 8 + plane * steps + i] << 8 * plane for plane in range(width))
                values.append(values[-1] + step)
            columns[name] = values
            at += 8 + width * steps
    assert at == len(payload)
    return columns


@pytest.mark.parametrize("version", range(1, WIRE_VERSION + 1))
def test_the_format_equals_its_description(version):
    content = (GOLDEN / f"wire-{version}" / "capture.mace").read_bytes()
    with Capture(GOLDEN / f"wire-{version}" / "capture.mace") as capture:
        items = list(capture)
    (first, header), *frames, (last, end) = read_by_the_book(content)
    assert (first, last) == (1, 4)
    assert header["clock"]["utc_ns"] == capture.header.clock.utc_ns
    assert end == {"records": capture.records, "lost": sum(i.lost for i in items if isinstance(i, Batch))}
    for (message, found), item in zip(frames, items, strict=True):
        if isinstance(item, Batch):
            assert message == 3
            assert found == {name: column.tolist() for name, column in all_columns(item)}
        else:
            assert message == 2
            assert found["from_ns"] == item.from_ns
            names = [sighting.name for sighting in item.sightings[found["first_sighting"] :]]
            assert [name for name, _, _ in found["sightings"]] == names
            assert [device["name"] for device in found["devices"]] == [device.name for device in item.devices]


def payloads(content):
    at = len(FILE_HEAD)
    while at < len(content):
        head = parse_head(content[at:])
        stored = content[at + HEAD_SIZE : at + HEAD_SIZE + head.stored]
        yield head.message, zstandard.decompress(stored) if head.compressed else stored
        at += HEAD_SIZE + head.stored


def test_the_writer_still_writes_this_version():
    # A failure here means a changed format, which needs a new WIRE_VERSION and its own golden capture.
    here = GOLDEN / f"wire-{WIRE_VERSION}"
    content = (here / "capture.mace").read_bytes()
    with Capture(here / "capture.mace") as capture:
        again = capture_bytes(list(capture), capture.header)
    assert list(payloads(again)) == list(payloads(content))
