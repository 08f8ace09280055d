"""Hostile and damaged capture files.

Whatever bytes of a capture change, reading gives the original items, or a beginning of them reported as cut, or a
`CaptureError`; never another exception, and never other data. If the writer itself is hostile (valid checksums, any
content), the items read keep the contract of a stream.
"""

import tempfile
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collector.capture.source import Capture
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Sighting, Topology
from contracts.wire import COMPRESSED, FILE_HEAD, HEAD_SIZE, FrameKind
from tests.made_capture import (
    HEADER,
    TOPOLOGY,
    batches,
    capture_bytes,
    encode,
    forge,
    same,
    same_stream,
    stream_tag,
    traffic,
)

_LATER = Topology(
    from_ns=int(traffic(600).ts_ns[299]) + 1,
    host_netns=TOPOLOGY.host_netns,
    devices=TOPOLOGY.devices[:-1],
    sightings=(*TOPOLOGY.sightings, Sighting("late0")),
)
ITEMS = [
    *(TOPOLOGY, *batches(traffic(600)[:300], 100), _LATER, *batches(traffic(600)[300:500], 50)),
    *batches(traffic(600, content=True)[500:], 50),
]
FRAMES = encode(ITEMS)
BYTES = capture_bytes(ITEMS)
STARTS = [len(FILE_HEAD) + sum(map(len, FRAMES[:n])) for n in range(len(FRAMES) + 1)]
TAG = stream_tag(FRAMES[0])

_DIRECTORY = tempfile.TemporaryDirectory()
_FILE = Path(_DIRECTORY.name) / "fuzzed.mace"


def read(content, salvage=False):
    """Read a capture; returns its items, the reader, and the error that ended the reading."""
    _FILE.write_bytes(content)
    items = []
    try:
        with Capture(_FILE, salvage=salvage) as capture:
            for item in capture:
                items.append(item)  # noqa: PERF402 - what came before an error is wanted too
            return items, capture, None
    except CaptureError as error:
        found = error
    assert found.path == _FILE
    assert 0 <= found.offset <= len(content)
    return items, None, found


def judge(content):
    items, capture, error = read(content)
    if error is None:
        assert same_stream(items, ITEMS) or (capture.truncated and same_stream(items, ITEMS[: len(items)]))
        assert same_stream(items, ITEMS) or len(content) < len(BYTES)
    else:
        # The items before the error are the original ones.
        assert same_stream(items, ITEMS[: len(items)])


def judge_salvage(content):
    """Check salvage: only written records are read, and each record is read, discarded, or beyond the known end."""
    items, capture, error = read(content, salvage=True)
    if error is not None:
        return
    got = [item[item.hook != Hook.LOST] for item in items if isinstance(item, Batch)]
    originals = {item.ts_ns[0]: item for item in ITEMS if isinstance(item, Batch)}
    for batch in got:
        assert same(batch, originals.pop(batch.ts_ns[0]))
    assert sum(map(len, got)) + capture.discarded == capture.records
    assert capture.records == 600 or capture.truncated


def positions():
    size = len(BYTES)
    # Half of the mutations are near a frame's head, which describes the rest.
    near = st.builds(
        lambda start, off: min(max(start + off, 0), size - 1), st.sampled_from(STARTS), st.integers(-8, 60)
    )
    return near | st.integers(0, size - 1)


@st.composite
def mutations(draw):
    content = bytearray(BYTES)
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        at = min(draw(positions()), size)
        length = draw(st.integers(0, 80) | st.integers(0, 5_000))
        match draw(st.sampled_from(["flip", "set", "delete", "insert", "cut", "copy", "zero"])):
            case "flip" if at < size:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < size:
                content[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "delete":
                del content[at : at + length]
            case "insert":
                content[at:at] = draw(st.binary(max_size=80))
            case "cut":
                del content[at:]
            case "copy":
                source = draw(positions())
                content[at:at] = BYTES[source : source + length]
            case "zero":
                content[at : at + length] = bytes(len(content[at : at + length]))
    return bytes(content)


@pytest.mark.slow
@settings(max_examples=500)
@given(mutations())
@example(BYTES)
@example(b"")
def test_a_mutated_file(content):
    judge(content)
    judge_salvage(content)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(st.integers(0, len(FRAMES) - 1), max_size=15))
@example(list(range(len(FRAMES))))
def test_frames_shuffled_repeated_left_out(order):
    content = FILE_HEAD + b"".join(FRAMES[number] for number in order)
    judge_salvage(content)
    _, capture, error = read(content)
    if error is None:
        assert order == list(range(len(order)))
        assert (capture.truncated is None) == (len(order) == len(FRAMES))


@pytest.mark.slow
@given(st.binary(max_size=300))
def test_arbitrary_bytes(content):
    for start in (b"", FILE_HEAD, BYTES[: STARTS[1]], BYTES[: STARTS[3]]):
        read(start + content)
        read(start + content, salvage=True)


def keeps_the_contract(items):
    sightings, last_ns, topology = 1, None, None
    for item in items:
        if isinstance(item, Topology):
            assert topology is None or item.sightings[: len(topology.sightings)] == topology.sightings
            assert topology is None or item.from_ns >= topology.from_ns
            assert last_ns is None or item.from_ns > last_ns
            assert len({d.key for d in item.devices}) == len(item.devices)
            topology, sightings = item, len(item.sightings)
        elif len(item):
            assert (item.ts_ns[1:] >= item.ts_ns[:-1]).all()
            assert last_ns is None or item.ts_ns[0] >= last_ns
            assert (item.dev < sightings).all()
            assert np.isin(item.hook, list(Hook)).all()
            assert item.hook.all()
            last_ns = item.ts_ns[-1]


@st.composite
def hostile_payloads(draw):
    """Draw a frame whose decompressed payload is mutated, with matching sizes and checksums."""
    import zstandard

    number = draw(st.integers(0, len(FRAMES) - 1))
    frame = FRAMES[number]
    raw = frame[HEAD_SIZE:]
    if frame[6] & COMPRESSED:
        raw = zstandard.ZstdDecompressor().decompress(raw)
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        # The first bytes of a batch describe the encoding of the others.
        at = draw(st.integers(0, min(len(raw), 40)) | st.integers(0, len(raw)))
        match draw(st.sampled_from(["set", "flip", "delete", "insert"])):
            case "set" if at < len(raw):
                raw[at] = draw(st.integers(0, 255))
            case "flip" if at < len(raw):
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "delete":
                del raw[at : at + draw(st.integers(0, 40))]
            case "insert":
                raw[at:at] = draw(st.binary(max_size=40))
    raw = bytes(raw)
    stored = zstandard.compress(raw) if draw(st.booleans()) else None
    if stored is not None and len(stored) >= len(raw):
        stored = None
    tag = crc32(raw) if number == 0 else TAG
    sealed = forge(FrameKind(frame[5]), raw, stored=stored, stream=tag, sequence=number)
    return FILE_HEAD + b"".join([*FRAMES[:number], sealed, *FRAMES[number + 1 :]])


@pytest.mark.slow
@settings(max_examples=500)
@given(hostile_payloads())
def test_a_hostile_writer(content):
    items, _, _ = read(content)
    keeps_the_contract(items)
    items, _, _ = read(content, salvage=True)
    keeps_the_contract(items)


def test_the_example_is_sound():
    items, capture, error = read(BYTES)
    assert error is None
    assert same_stream(items, ITEMS)
    assert capture.header == HEADER
    keeps_the_contract(items)
