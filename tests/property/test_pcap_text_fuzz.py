"""Hostile packet captures and texts give a clear error or their valid part, within bounded time and memory."""

import gzip
import struct

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector.pcap.source import PcapPairReader
from collector.reading.options import FileOptions
from collector.text.source import TextReader
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.records import Batch
from tests.made_pcap import PcapFrame, pcap, pcapng, through_nat, udp_frames, written
from tests.unit.collector.text.test_source import FTRACE, NAMED, PERF
from tests.unit.collector.text.test_source import TEXTS as GOLDEN_TEXTS

FRAMES, TIMES = udp_frames(60)
ROWS = [PcapFrame(int(t), frame.tobytes()) for frame, t in zip(FRAMES, TIMES, strict=True)]
OUTER = written(through_nat(FRAMES), TIMES + 9_000)
CAPTURES = {
    "pcap": pcap(ROWS),
    "big": pcap(ROWS, order=">", unit="us"),
    "pcapng": pcapng(ROWS, interfaces=2),
    "big pcapng": pcapng(ROWS, order=">"),
    "gzip": gzip.compress(pcapng(ROWS), mtime=0),
    "zstd": zstandard.compress(pcap(ROWS)),
}
TEXTS = {
    "ftrace and perf": (FTRACE + PERF.replace("77.000000", "1234.900000")).encode(),
    "report": NAMED.encode() * 3,
    **{path.stem: path.read_bytes() for path in sorted(GOLDEN_TEXTS.glob("*.txt"))},
}
EVERY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(source):
    with source as reader:
        return Batch.concatenate([item for item in reader.items() if isinstance(item, Batch)])


def survives(make):
    """Read with and without salvage: only errors for users are raised, and salvage reads at least the same records."""
    whole = None
    try:
        whole = records(make(FileOptions()))
    except CaptureError:
        pass
    try:
        kept = records(make(FileOptions(salvage=True)))
        assert whole is None or len(kept) == len(whole)
    except CaptureError:
        assert whole is None


def mutated(data, raw):
    """Draw the data with flipped bytes, replaced numbers, and parts removed or moved."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(("flip", "number", "cut", "move")))
        at = data.draw(st.integers(0, max(len(raw) - 5, 0)))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "number" and len(raw) > 8:
            order = data.draw(st.sampled_from("<>"))
            struct.pack_into(order + "I", raw, at, data.draw(st.sampled_from((0, 1, 13, 2**20, 2**31, 2**32 - 1))))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 200))]
        else:
            piece = raw[at : at + 50]
            raw[at // 2 : at // 2] = piece
    return bytes(raw)


@EVERY
@given(base=st.sampled_from(sorted(CAPTURES)), data=st.data())
def test_packet_captures(tmp_path, base, data):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.write_bytes(mutated(data, CAPTURES[base]))
    outer.write_bytes(OUTER)
    survives(lambda options: PcapPairReader(inner, outer, options))


@EVERY
@given(base=st.sampled_from(sorted(TEXTS)), data=st.data())
def test_texts(tmp_path, base, data):
    path = tmp_path / "trace"
    path.write_bytes(mutated(data, TEXTS[base]))
    survives(lambda options: TextReader(path, options))


@pytest.mark.parametrize("line", [b"[0] 1.000000: " * 4000, b"CPU:0 [LOST " * 5000, b"-1 [001] " * 7000])
def test_lines_against_backtracking_patterns(tmp_path, line):
    """A backtracking pattern would take hours for some of these lines."""
    path = tmp_path / "trace"
    path.write_bytes(FTRACE.encode() + line + b"\n" + PERF.encode())
    kept = records(TextReader(path, FileOptions()))
    assert (kept.hook != Hook.LOST).sum() == 8
