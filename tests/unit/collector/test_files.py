"""Recognising a file's format, and the order in which files replay."""

import pickle
from dataclasses import replace

import pytest

from collector.files import BY_NAME, FORMATS, FileOptions, LocalRecording, in_time_order, recording, sniff
from contracts.clock import ClockPair
from contracts.errors import CaptureError, Unavailable
from contracts.wire import SIGNATURE
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic

ITEMS = [TOPOLOGY, *batches(traffic(2_000), 500)]
BYTES = capture_bytes(ITEMS)


@pytest.fixture
def file(tmp_path):
    def make(content, name="a.mace"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


def test_files_are_sorted_by_wall_clock(file):
    # The second boot's monotonic clock is behind the first's.
    early = file(BYTES, "z-early.mace")
    late_clock = ClockPair(HEADER.clock.monotonic_ns, HEADER.clock.utc_ns + 10**15, 5)
    late = file(capture_bytes(ITEMS, replace(HEADER, clock=late_clock)), "a-late.mace")
    empty = file(capture_bytes([], replace(HEADER, clock=ClockPair(0, 5, 0))), "empty.mace")
    found = in_time_order([late, early, empty])
    assert [one.paths for one in found] == [(empty,), (early,), (late,)]
    assert found[0].first_utc_ns == 5
    first_ns = int(traffic(2_000).ts_ns[0])
    assert found[1].first_utc_ns == first_ns + HEADER.clock.offset_ns
    assert found[2].header.clock == late_clock
    assert found[1].bytes_total == len(BYTES)


def test_a_recording_can_be_sent_to_another_process(file):
    one = recording(file(BYTES), FileOptions(salvage=True))
    again: LocalRecording = pickle.loads(pickle.dumps(one))
    assert again == one
    assert type(again.source()) is type(one.source())


def test_the_names_of_formats_are_distinct():
    assert len(BY_NAME) == len(FORMATS) + 1


def test_an_unknown_format_is_refused_with_the_known_formats(file):
    with pytest.raises(CaptureError, match=r"begins with 50 41 52 31.*mace"):
        sniff(file(b"PAR1" + bytes(100)))


def test_a_missing_file(tmp_path):
    with pytest.raises(Unavailable, match="No such file"):
        sniff(tmp_path / "no.mace")


@pytest.mark.parametrize("content", [b"", SIGNATURE[:2], SIGNATURE.replace(b"\r\n", b"\n") + bytes(9)])
def test_the_reader_reports_a_damaged_capture(file, content):
    assert sniff(file(content)).name == "mace"
