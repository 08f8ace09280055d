"""Hostile trace.dat files give a clear error or their valid part, never a crash, within bounded time and memory.

Any damage raises a `CaptureError` that names a byte of the file. With salvage, such files give their readable part,
which is a part of the records of the undamaged file.
"""

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector.reading.options import FileOptions
from collector.tracecmd.reader import TraceDat
from collector.tracecmd.source import TraceCmdReader
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.records import Batch
from tests.made_own_events import EventWriter
from tests.made_tracedat import FORMS, MadeTraceDat, to_big, traffic
from tests.places import GOLDEN
from tests.ring_pages import layout
from tests.unit.collector.tracecmd.test_events import EVENTS, own_file

FILES = GOLDEN / "tracecmd"
PAGES = {0: traffic(0, 5), 1: traffic(1, 2)}
BIG = {cpu: [to_big(page, layout(), list(FORMS.values())) for page in pages] for cpu, pages in PAGES.items()}
BASES = {
    "v6": MadeTraceDat({"": PAGES}, version=6).content(),
    "v7": MadeTraceDat({"": PAGES}).content(),
    "zstd": MadeTraceDat({"": PAGES}, algorithm="zstd").content(),
    "zlib": MadeTraceDat({"": PAGES}, algorithm="zlib").content(),
    "big": MadeTraceDat({"": BIG}, big=True).content(),
    "own v6": own_file(EVENTS * 9, version=6),
    "own big": own_file(EVENTS * 9, machine=EventWriter(big=True), algorithm="zstd"),
    "golden": (FILES / "v7-buffers.dat").read_bytes(),
}
MEMORY_MAX = 150 << 20
EVERY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, *, salvage=False):
    """Return (records, warnings) of a file; raises the source's errors."""
    with TraceCmdReader(path, FileOptions(salvage=salvage)) as reader:
        return Batch.concatenate([item for item in reader.items() if isinstance(item, Batch)]), reader


def survives(path, content):
    """Read the file with and without salvage, and as columns of events: only errors for users are raised."""
    path.write_bytes(content)
    whole = None
    try:
        whole, _ = read(path)
    except CaptureError:
        pass
    try:
        kept, _ = read(path, salvage=True)
        if whole is not None:
            assert len(kept) == len(whole)
    except CaptureError:
        assert whole is None
    try:
        with TraceDat(path) as trace:
            # Events of ftrace itself and of other subsystems.
            own = [event for event in trace.events if event.startswith("ftrace:")]
            for event in (*own[:8], *[event for event in trace.events if event not in own][:8]):
                for _ in trace.blocks(event):
                    pass
    except CaptureError:
        pass


@EVERY
@given(base=st.sampled_from(sorted(BASES)), data=st.data())
def test_flipped_bits(tmp_path, base, data):
    raw = bytearray(BASES[base])
    # Half of the places are in the frame, which is much smaller than the pages.
    for _ in range(data.draw(st.integers(1, 8))):
        limit = data.draw(st.sampled_from((2500, len(raw))))
        at = data.draw(st.integers(0, min(limit, len(raw)) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    survives(tmp_path / "trace.dat", bytes(raw))


@pytest.mark.slow
@EVERY
@given(base=st.sampled_from(sorted(BASES)), data=st.data())
def test_replaced_numbers(tmp_path, base, data):
    raw = bytearray(BASES[base])
    code, values = data.draw(
        st.sampled_from([("I", (0, 1, 2**31, 2**32 - 1, 4095)), ("Q", (0, 2**32, 2**63, 2**64 - 1, len(raw)))])
    )
    at = data.draw(st.integers(12, len(raw) - 8))
    struct.pack_into("<" + code, raw, at, data.draw(st.sampled_from(values)))
    survives(tmp_path / "trace.dat", bytes(raw))


@EVERY
@given(base=st.sampled_from(sorted(BASES)), data=st.data())
def test_cut_files(tmp_path, base, data):
    raw = BASES[base]
    survives(tmp_path / "trace.dat", raw[: data.draw(st.integers(0, len(raw)))])


@pytest.mark.slow
@EVERY
@given(base=st.sampled_from(sorted(BASES)), data=st.data())
def test_rearranged_pieces(tmp_path, base, data):
    raw = BASES[base]
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    survives(tmp_path / "trace.dat", raw[:first] + raw[second:] + raw[first:second])


def test_salvage_reads_the_sound_part_and_counts_the_rest(tmp_path):
    path = tmp_path / "trace.dat"
    path.write_bytes(BASES["v7"])
    whole, _ = read(path)
    raw = bytearray(BASES["v7"])
    at = raw.find(PAGES[0][2])
    struct.pack_into("<I", raw, at + 16, 0)  # the header of its first event: of type 0, and of no length
    struct.pack_into("<I", raw, at + 20, 2)
    path.write_bytes(raw)
    with pytest.raises(CaptureError, match="event of no valid length") as error:
        read(path)
    assert error.value.offset == at
    kept, source = read(path, salvage=True)
    assert len(whole) - len(kept) < 120
    assert len(whole) > len(kept) > len(whole) * 0.8
    assert abs(source.discarded - (len(whole) - len(kept))) < 60
    # Matching begins anew at the gap.
    assert (kept.hook == Hook.LOST).sum() == 1
    assert any(f"at byte {at}: " in line and "left out" in line for line in source.warnings)


def test_a_piece_that_cannot_be_decompressed(tmp_path):
    path = tmp_path / "trace.dat"
    raw = bytearray(BASES["zstd"])
    at = [i for i in range(len(raw) - 4) if raw[i : i + 4] == b"\x28\xb5\x2f\xfd"][-2]
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CaptureError, match="cannot be decompressed"):
        read(path)
    kept, source = read(path, salvage=True)
    assert len(kept) > 100
    assert source.discarded > 100
    assert (kept.hook == Hook.LOST).sum() == 1
    assert any("cannot be decompressed" in line for line in source.warnings)


def test_a_cut_file(tmp_path):
    path = tmp_path / "trace.dat"
    path.write_bytes(BASES["v6"])
    whole, _ = read(path)
    path.write_bytes(BASES["v6"][:-5000])
    with pytest.raises(CaptureError, match="it is cut"):
        read(path)
    kept, source = read(path, salvage=True)
    assert 0 < len(kept) < len(whole)
    assert source.discarded > 0
    assert any("what is there is used" in line for line in source.warnings)


def bomb():
    """Return 60 KB that announce 2 GB and decompress to 2 GB."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))


@pytest.mark.parametrize("told", [4096, 16 << 20, 64 << 20, 2**32 - 4096])
def test_a_decompression_bomb_takes_bounded_memory(tmp_path, told):
    packed = bomb()
    made = MadeTraceDat({"": {0: PAGES[0][:1]}}, algorithm="zstd")
    made.packed = lambda body: packed if len(body) == 4096 else MadeTraceDat.packed(made, body)
    raw = bytearray(made.content())
    at = raw.rfind(struct.pack("<II", len(packed), 4096))
    struct.pack_into("<I", raw, at + 4, told)
    path = tmp_path / "trace.dat"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CaptureError):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_decompression_bombs_of_many_cpus(tmp_path):
    """Each is small enough to be allowed, but all of them must not be in memory at once."""
    # Empty pages with junk behind their end; without junk the compression ratio would exceed the limit.
    empty = bytes((2 << 20) - 1024) + np.random.default_rng(6).bytes(1024)
    made = MadeTraceDat({"": {cpu: [empty] for cpu in range(300)}}, algorithm="zstd")
    packed = made.packed(empty)
    made.packed = lambda body: packed if len(body) == len(empty) else MadeTraceDat.packed(made, body)
    path = tmp_path / "trace.dat"
    path.write_bytes(made.content())
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    try:
        kept, _ = read(path)
        assert len(kept) == 0
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()


def test_options_in_a_cycle(tmp_path):
    raw = bytearray(BASES["v7"])
    (first,) = struct.unpack_from("<Q", raw, raw.find(b"none\x001\0") + 7)
    # The last option of the first section has the next section's place.
    size = struct.unpack_from("<Q", raw, first + 8)[0]
    struct.pack_into("<Q", raw, first + 16 + size - 8, first)
    path = tmp_path / "trace.dat"
    path.write_bytes(raw)
    with pytest.raises(CaptureError, match="lead in a circle"):
        read(path)


def test_pages_claimed_by_all_cpus(tmp_path):
    made = MadeTraceDat({"": {0: PAGES[0], 1: PAGES[0]}})
    raw = bytearray(made.content())
    first, second = (raw.find(struct.pack("<I", cpu) + struct.pack("<Q", raw.find(PAGES[0][0]))) for cpu in (0, 0))
    assert first == second > 0
    raw[first + 20 + 4 : first + 20 + 12] = raw[first + 4 : first + 12]
    path = tmp_path / "trace.dat"
    path.write_bytes(raw)
    with pytest.raises(CaptureError, match="begin inside those of another"):
        read(path)
