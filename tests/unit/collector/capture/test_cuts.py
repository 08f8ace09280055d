"""Cutting a capture in time: the parts between cuts have every record once."""

import itertools

import numpy as np
import pytest

from collector.capture.cuts import cuts, stretch
from collector.capture.source import Capture
from contracts.errors import CaptureError
from contracts.records import Batch
from tests.made_capture import TOPOLOGY, batches, capture_bytes, same, traffic

RECORDS = 60_000
ALIGN_NS = 10_000_000


def stream():
    records = traffic(RECORDS)
    first, *rest = batches(records, 997)
    return [TOPOLOGY, first, *rest]


@pytest.fixture
def capture(tmp_path):
    path = tmp_path / "made.mace"
    path.write_bytes(capture_bytes(stream()))
    return path


def test_parts_together_have_every_record(capture):
    found = cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=3_000_000)
    assert len(found) > 3
    edges = [None, *found, None]
    parts = []
    for begin, end in itertools.pairwise(edges):
        with Capture(capture) as reader:
            items = stretch(reader, begin and begin.position, begin and begin.at_ns, end and end.at_ns)
            parts += [item for item in items if isinstance(item, Batch)]
    assert same(Batch.concatenate(parts), traffic(RECORDS))


def test_a_cut_is_aligned_and_has_a_warm_up(capture):
    times = traffic(RECORDS).ts_ns
    for cut in cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=3_000_000):
        assert cut.at_ns % ALIGN_NS == 0
        with Capture(capture) as reader:
            warm = Batch.concatenate([i for i in stretch(reader, cut.warm, None, cut.at_ns) if isinstance(i, Batch)])
        before = times[times < cut.at_ns]
        assert np.array_equal(warm.ts_ns, before[len(before) - len(warm) :])
        assert warm.ts_ns[0] <= cut.at_ns - 3_000_000
        assert cut.warm.offset <= cut.position.offset


def test_a_reader_in_the_middle_knows_the_topology(capture):
    cut = cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=3_000_000)[-1]
    with Capture(capture) as reader:
        assert next(stretch(reader, cut.position, cut.at_ns, None)) == TOPOLOGY


def test_the_end_is_still_verified(capture):
    cut = cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=0)[-1]
    with Capture(capture) as reader:
        list(stretch(reader, cut.position, cut.at_ns, None))
        assert reader.end is not None
        assert reader.end.records == reader.records == RECORDS


def test_no_cuts_in_a_small_file_or_behind_damage(capture):
    assert cuts(capture, part_bytes=1 << 30, align_ns=ALIGN_NS, warm_up_ns=0) == []
    data = bytearray(capture.read_bytes())
    middle = data.index(b"\xffMCF", len(data) // 2)
    data[middle + 8] ^= 0xFF
    capture.write_bytes(data)
    found = cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=0)
    assert found
    assert all(cut.position.offset < middle for cut in found)


def test_a_changed_file_is_an_error(capture):
    cut = cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=0)[-1]
    capture.write_bytes(capture_bytes([TOPOLOGY, *batches(traffic(RECORDS, seed=2), 997)]))
    with Capture(capture) as reader, pytest.raises(CaptureError):
        list(stretch(reader, cut.position, cut.at_ns, None))


def test_urls_are_read_by_ranges(capture):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/cuts/made.mace", capture.read_bytes())
    there = cuts("memory://cuts/made.mace", part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=0)
    assert there == cuts(capture, part_bytes=20_000, align_ns=ALIGN_NS, warm_up_ns=0)
    with Capture("memory://cuts/made.mace") as reader:
        assert same(Batch.concatenate([i for i in reader if isinstance(i, Batch)]), traffic(RECORDS))
