"""Damaged and hostile Perfetto traces give a clear error with its offset, or their good part, in bounded memory."""

import re
import tracemalloc
import zlib
from contextlib import closing

import numpy as np
import pytest
import zstandard

from collector.files import recording
from collector.perfetto import wire as perfetto_wire
from contracts.errors import CaptureError
from contracts.hooks import Hook
from tests import perfetto_traces as traces
from tests.unit.collector.perfetto.test_source import NAMES, read, records, write

GIVEN = records(1_000)
RAW = traces.make(GIVEN, NAMES)


def packets_of(raw):
    """Return (start, end) of each packet."""
    found, at = [], 0
    while at < len(raw):
        size, start = perfetto_wire.varint(raw, at + 1, len(raw))
        found.append((at, start + size))
        at = start + size
    return found


def packet(field, payload):
    """Return a trace of one packet with one field of bytes."""
    return traces._field(1, traces._field(field, payload))


def refused(tmp_path, raw, match):
    """Return the offset in the error."""
    with pytest.raises(CaptureError, match=match) as caught:
        read(write(tmp_path, raw))
    assert f"at byte {caught.value.offset}:" in str(caught.value)
    return caught.value.offset


def bundle_number(which):
    """Return the index of a packet of events."""
    spans = packets_of(RAW)
    events = [span for span in spans if b"net_dev_queue" in RAW[slice(*span)]]
    return events[which]


def test_a_cut_trace_is_refused_where_its_last_packet_begins_and_salvaged(tmp_path):
    start, end = bundle_number(8)
    cut = RAW[: (start + end) // 2]
    assert refused(tmp_path, cut, "file ends after") == start
    source, found = read(write(tmp_path, cut), salvage=True)
    assert 300 < len(found) < 1_000
    assert any(f"skipped at byte {start}" in line for line in source.warnings)


def test_salvage_skips_foreign_bytes_up_to_the_next_packet(tmp_path):
    start, end = bundle_number(4)
    noise = RAW[:start] + bytes([0xFF, 0x13, 0x0A, 0x05, 0xEE]) * 40 + RAW[end:]
    assert refused(tmp_path, noise, "where a packet begins") == start
    source, found = read(write(tmp_path, noise), salvage=True)
    kept = found[found.hook != Hook.LOST]
    assert 900 <= len(kept) < 1_000
    # The gap counts as one lost event, and no CPU's records are matched across it.
    assert source.discarded == 1
    assert set(found.cpu[found.hook == Hook.LOST].tolist()) == set(kept.cpu.tolist())
    assert len([line for line in source.warnings if "skipped" in line]) == 1


def test_a_damaged_event_is_left_out_and_makes_a_gap(tmp_path):
    start, _ = bundle_number(3)
    at = RAW.index(b"netif_rx", start)
    bad = bytearray(RAW)
    bad[at - 1] = 0x7F  # the length of the event's name exceeds the event
    assert refused(tmp_path, bytes(bad), "no message|events of CPU") == start
    source, found = read(write(tmp_path, bytes(bad)), salvage=True)
    assert source.discarded == 1
    markers = found[found.hook == Hook.LOST]
    assert len(markers) == 1
    assert markers.l3_len.tolist() == [0]  # the ring did not lose the event
    assert len(found) == 1_000


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"\x0a\xff\xff\xff\xff\x0f" + bytes(100), "a packet of 4294967295 bytes, at most"),
        (b"\x0a\xff\xff\xff\x0f" + bytes(100), "file ends after"),
        (b"\x0a" + b"\xff" * 11 + bytes(30), "more than ten bytes"),
        (traces._field(1, b"\x0b\x00\x00"), "wire type 3"),
        (traces._field(1, b"\x52\x7f"), "of 127 bytes, of which 0"),
        (traces._field(1, b"\x00\x00"), "field of number 0"),
    ],
)
def test_wrong_sizes_are_refused(tmp_path, raw, match):
    assert refused(tmp_path, RAW + raw, match) == len(RAW)


@pytest.mark.parametrize(
    ("field", "packed", "match"),
    [
        (50, zlib.compress(bytes(200 << 20)), "become more than"),
        (133, zstandard.compress(bytes(200 << 20)), "become more than"),
        (50, zlib.compress(packet(50, zlib.compress(RAW))), "inside compressed ones"),
        (50, zlib.compress(RAW)[:-20], "end too early"),
        (50, b"no deflate at all", "cannot be inflated"),
        (133, b"no zstd at all", "cannot be inflated"),
        (50, zlib.compress(b"no packets"), "are no packets"),
    ],
)
def test_hostile_compressed_packets_are_refused(tmp_path, field, packed, match):
    raw = RAW + packet(field, packed)
    tracemalloc.start()
    try:
        assert refused(tmp_path, raw, match) == len(RAW)
        assert tracemalloc.get_traced_memory()[1] < 3 * perfetto_wire.MAX_PACKET_BYTES
    finally:
        tracemalloc.stop()


def test_many_small_decompression_bombs_take_bounded_memory(tmp_path):
    bomb = packet(50, zlib.compress(traces._field(1, traces._field(900, bytes(8 << 20)))))
    refused(tmp_path, RAW + bomb * 40, "become more than")


def test_deep_nesting_is_not_parsed(tmp_path):
    nested = b""
    for _ in range(2_000):
        nested = traces._field(8, nested)
    _, found = read(write(tmp_path, RAW + packet(11, nested)))
    assert len(found) == 1_000
    deep_event = traces._field(2, traces._field(327, nested))
    refused(tmp_path, RAW + packet(1, traces._field(1, 0) + deep_event + b"\x12\x7f"), "event")


def test_an_event_of_endless_fields_is_refused(tmp_path):
    event = traces._field(1, 7_000_000_000) + traces._field(5, 1) * 5_000
    refused(tmp_path, RAW + packet(1, traces._field(1, 0) + traces._field(2, event)), "no message")


def test_names_longer_than_the_kernel_allows_are_cut(tmp_path):
    names = [name and name + "x" * 40 for name in NAMES]
    source, found = read(write(tmp_path, traces.make(GIVEN, names)))
    assert len(found) == 1_000
    assert all(len(one.name) <= 15 for one in source.sightings.snapshot())


@pytest.mark.parametrize(
    "raw", [b"", b"\x0a", b"\x0a\x00", b"PK\x03\x04" * 10, b"\x0a\x01\xff", b"\x0a\x05hello world"]
)
def test_other_files_are_refused(tmp_path, raw):
    path = write(tmp_path, raw)
    with pytest.raises(CaptureError) as caught:
        recording(path)
    assert re.search(r"at byte \d+", str(caught.value))


def same(one, other):
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(one.columns(), other.columns(), strict=True))


def test_empty_packets_change_nothing(tmp_path):
    """The work is counted, not timed: each yielded packet would cost microseconds, and 20 MB can have ten million."""
    empty = b"\n\0" * 100_000
    packed = zlib.compress(empty + RAW)
    _, found = read(write(tmp_path, RAW))
    for raw in (empty + RAW + empty, packet(50, packed)):
        path = write(tmp_path, raw)
        _, again = read(path)
        assert same(again, found)
        with closing(perfetto_wire.PacketReader(path)) as reader:
            assert sum(1 for _ in reader) == len(packets_of(RAW))


def test_packets_across_blocks_of_the_file(tmp_path, monkeypatch):
    _, found = read(write(tmp_path, RAW))
    for size in (1, 7, 100, 4096):
        monkeypatch.setattr("collector.reading.window._READ_BYTES", size)
        _, again = read(write(tmp_path, RAW))
        assert same(again, found)
