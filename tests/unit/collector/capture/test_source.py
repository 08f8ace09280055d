import asyncio
import errno
import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from collector.capture.source import Capture, CaptureReader, read
from collector.reading.streaming import FileSource
from contracts import wire
from contracts.errors import CaptureError, Unavailable
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.wire import FILE_HEAD, HEAD_SIZE
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, encode, same, same_stream, traffic

ITEMS = [TOPOLOGY, *batches(traffic(2_000), 500)]
FRAMES = encode(ITEMS)
BYTES = capture_bytes(ITEMS)


@pytest.fixture
def file(tmp_path):
    def make(content, name="a.mace"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


def start_of(frame):
    """Return the offset in BYTES of the frame with this number."""
    return len(FILE_HEAD) + sum(map(len, FRAMES[:frame]))


def test_reads_what_was_written(file):
    with Capture(file(BYTES)) as capture:
        assert capture.header == HEADER
        assert same_stream(list(capture), ITEMS)
        assert capture.bytes_read == capture.bytes_total == len(BYTES)
        assert capture.records == 2_000
        assert not capture.truncated
        assert not capture.warnings
        assert capture.discarded == 0


def test_the_reader_has_the_protocol_of_all_formats(file):
    with CaptureReader(file(BYTES)) as reader:
        assert reader.header == HEADER
        progress, got = [], []
        for item in reader.items():
            got.append(item)
            progress.append(reader.bytes_read)
        assert same_stream(got, ITEMS)
        assert progress == sorted(set(progress))
        assert reader.bytes_read == reader.bytes_total == len(BYTES)
        assert reader.discarded == 0
        assert reader.warnings == []


def test_a_stream_lets_other_tasks_run(file):
    async def run():
        source = FileSource(CaptureReader(file(BYTES)))
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        await source.open()
        items = [item async for item in source.items()]
        task.cancel()
        await source.aclose()
        assert turns >= len(items)

    asyncio.run(run())


# --- cut at the end -------------------------------------------------------------------------------


def test_a_cut_file_is_read_up_to_the_cut(file):
    for frame in range(1, len(FRAMES)):
        for cut in (0, 1, 3, 4, HEAD_SIZE - 1, HEAD_SIZE, HEAD_SIZE + 1, len(FRAMES[frame]) - 1):
            path = file(BYTES[: start_of(frame) + cut])
            with Capture(path) as capture:
                assert same_stream(list(capture), ITEMS[: frame - 1])
                assert capture.truncated
                assert (capture.truncated.offset, capture.truncated.cut) == (start_of(frame), cut)
                (warning,) = capture.warnings
                assert warning.startswith(f"{path}: ended without END mark")
                assert f"at byte {start_of(frame)}" in warning
                assert not cut or f"{cut} bytes of an incomplete frame" in warning


def test_a_file_cut_in_its_header_is_refused(file):
    for size in range(start_of(1)):
        with pytest.raises(CaptureError, match=r"is empty|is cut inside its (signature|header)"):
            Capture(file(BYTES[:size]))


# --- damage ---------------------------------------------------------------------------------------


def test_damage_is_an_error_at_its_frame(file):
    for frame in range(1, len(FRAMES)):
        for at in (0, 5, 20, HEAD_SIZE - 1, HEAD_SIZE, len(FRAMES[frame]) - 1):
            broken = bytearray(BYTES)
            broken[start_of(frame) + at] ^= 0x10
            path = file(bytes(broken))
            got = []
            with pytest.raises(CaptureError) as caught, Capture(path) as capture:
                got.extend(capture)
            assert caught.value.offset == start_of(frame)
            assert str(caught.value).startswith(f"{path}: at byte {start_of(frame)}: ")


@pytest.mark.parametrize(
    ("match", "content"),
    [
        ("the file is empty", b""),
        ("not a MACE capture: it begins with 50 41 52 31", b"PAR1" + bytes(100)),
        ("line ends", BYTES.replace(b"\r\n", b"\n", 1)),
        ("wire version 3, this MACE reads 1 to 2", wire.SIGNATURE + b"\3\0\0\0" + BYTES[len(FILE_HEAD) :]),
        ("wire version 0, this MACE reads 1 to 2", wire.SIGNATURE + b"\0\0\0\0" + BYTES[len(FILE_HEAD) :]),
        ("version 1 whose frames are of 2", wire.SIGNATURE + b"\1\0\0\0" + BYTES[len(FILE_HEAD) :]),
        ("a BATCH before the HEADER", FILE_HEAD + FRAMES[2]),
        ("after its END mark", BYTES + BYTES),
        ("after its END mark", BYTES + b"x"),
        ("frame 2 where 1 should be", FILE_HEAD + FRAMES[0] + FRAMES[2]),
        ("where a frame should begin", BYTES[: start_of(3)] + bytes(10)),
        ("where a frame should begin", BYTES[: start_of(3)] + bytes(1000)),
    ],
)
def test_other_files_are_refused(file, match, content):
    with pytest.raises(CaptureError, match=match):
        list(read(file(content)))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(Unavailable, match="No such file"):
        Capture(tmp_path / "none")
    with pytest.raises(Unavailable, match="Is a directory"):
        Capture(tmp_path)


@pytest.mark.parametrize("salvage", [False, True])
def test_an_error_of_the_disk_is_not_reported_as_damage(file, salvage, monkeypatch):
    with Capture(file(BYTES), salvage=salvage) as capture:
        capture._window.bytes.clear()
        capture._file.close()

        class Failing:
            def read(self, size):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            def close(self):
                pass

        monkeypatch.setattr(capture._window, "_file", Failing())
        with pytest.raises(CaptureError, match="Input/output error"):
            list(capture)


# --- salvage --------------------------------------------------------------------------------------


def salvaged(path):
    with Capture(path, salvage=True) as capture:
        return list(capture), capture


def test_salvage_of_a_sound_file_changes_nothing(file):
    got, capture = salvaged(file(BYTES))
    assert same_stream(got, ITEMS)
    assert not capture.damage
    assert capture.discarded == 0


@pytest.mark.parametrize("at", [0, 5, 14, HEAD_SIZE - 1, HEAD_SIZE, HEAD_SIZE + 100])
def test_salvage_skips_a_damaged_frame(file, at):
    broken = bytearray(BYTES)
    broken[start_of(3) + at] ^= 0x10
    got, capture = salvaged(file(bytes(broken)))
    marked = got[2]
    assert isinstance(marked, Batch)
    assert marked.hook[: HEADER.cpus].tolist() == [Hook.LOST] * HEADER.cpus
    assert same_stream([got[0], got[1], marked[HEADER.cpus :], got[3]], [ITEMS[0], ITEMS[1], ITEMS[3], ITEMS[4]])
    (damage,) = capture.damage
    assert (damage.offset, damage.length) == (start_of(3), len(FRAMES[3]))
    assert capture.discarded == 500
    assert f"skipped {len(FRAMES[3])} bytes at byte {start_of(3)}" in capture.warnings[0]


@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        # Missing bytes, so that the next frame is lost, too.
        (BYTES[: start_of(3) + 50] + BYTES[start_of(3) + 150 :], 1000),
        (BYTES[: start_of(3)] + bytes(5_000_000) + BYTES[start_of(3) :], 0),  # zeros
        (BYTES[: start_of(3)] + BYTES[start_of(4) :], 500),  # a missing frame
        (BYTES[: start_of(3)] + BYTES[start_of(2) :], 0),  # a repeated frame
        (BYTES[: start_of(1)] + bytes(len(FRAMES[1])) + BYTES[start_of(2) :], 2000),  # a missing topology
        (BYTES + BYTES, 0),
        (BYTES[: start_of(5)] + bytes(len(FRAMES[5])) + FRAMES[6], 500),  # a loss that only the END mark reports
    ],
)
def test_salvage_accounts_for_every_record(file, broken, lost):
    got, capture = salvaged(file(broken))
    assert capture.discarded == lost
    records = sum(int((b.hook != Hook.LOST).sum()) for b in got if isinstance(b, Batch))
    assert records + capture.discarded == 2_000 == capture.records
    assert capture.damage or b"".join(FRAMES[3:4]) not in broken


def test_salvage_needs_the_header(file):
    broken = bytearray(BYTES)
    broken[start_of(0) + 50] ^= 1
    with pytest.raises(CaptureError):
        Capture(file(bytes(broken)), salvage=True)


def test_salvage_of_a_hostile_file_takes_linear_time_and_little_memory(file):
    # 100,000 sync marks without a frame, then as many intact heads of frames that are refused.
    content = BYTES[: start_of(3)] + wire.SYNC * 100_000 + FRAMES[2] * 2_000 + BYTES[start_of(3) :]
    got, capture = salvaged(file(content))
    assert same_stream(got, ITEMS)
    assert len(capture.damage) == 1
    assert capture.damage[0].length == len(content) - len(BYTES)


# --- pipes and several files ----------------------------------------------------------------------


def test_a_pipe_can_be_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(BYTES,))
    writer.start()
    with Capture(fifo) as capture:
        assert same_stream(list(capture), ITEMS)
        assert capture.bytes_total == 0
    writer.join()


@pytest.mark.parametrize("offset_ns", [(1 << 63) - 1, 1 << 62, -(1 << 62), -(1 << 63)])
def test_a_batch_of_impossible_times_is_damage(tmp_path, offset_ns):
    """A whole frame whose times plus the UTC offset exceed 64 bits is damage."""
    path, content = tmp_path / "odd.mace", traffic(300)
    odd = content[200:]
    odd = replace(odd, ts_ns=np.clip(odd.ts_ns.astype(object) + offset_ns, -(1 << 63), (1 << 63) - 1).astype(np.int64))
    parts = [odd, content[:200]] if offset_ns < 0 else [content[:200], odd]
    path.write_bytes(capture_bytes([replace(TOPOLOGY, from_ns=-(1 << 63)), *parts]))
    with pytest.raises(CaptureError, match="a batch with times before 1970 or after 2116"):
        list(read(path))
    with Capture(path, salvage=True) as capture:
        _, kept = list(capture)
    assert same(kept, content[:200])
    assert (capture.discarded, capture.records, len(capture.damage)) == (100, 300, 1)
