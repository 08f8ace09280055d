import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from collector.capture.source import Capture, read
from contracts.errors import StoreError, WireError
from contracts.interfaces import Progress
from contracts.records import Batch
from contracts.wire import MAX_RECORDS
from storage.capture import CaptureSink
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, same_stream, traffic
from tests.places import ROOT

ITEMS = [TOPOLOGY, *batches(traffic(3_000), 1_000)]


def record(path, items=ITEMS, **how):
    async def run():
        sink = CaptureSink(path, **how)
        await sink.open(HEADER)
        try:
            for item in items:
                await sink.write(item)
        finally:
            await sink.aclose()
        return sink

    return asyncio.run(run())


@pytest.mark.parametrize("sync", ["close", "frame", "never"])
def test_the_file_is_the_stream(tmp_path, sync):
    sink = record(tmp_path / "a.mace", sync=sync)
    assert (tmp_path / "a.mace").read_bytes() == capture_bytes(ITEMS)
    assert sink.records == 3_000


def test_every_write_reaches_the_kernel_at_once(tmp_path):
    async def run():
        sink = CaptureSink(tmp_path / "a.mace")
        await sink.open(HEADER)
        for count, item in enumerate(ITEMS, 1):
            await sink.write(item)
            assert (tmp_path / "a.mace").stat().st_size == sink.bytes_written
            with Capture(tmp_path / "a.mace") as capture:
                assert same_stream(list(capture), ITEMS[:count])
                assert capture.truncated
                assert capture.truncated.cut == 0
        await sink.aclose()
        await sink.aclose()

    asyncio.run(run())


def test_a_long_batch_is_cut(tmp_path):
    whole = traffic(MAX_RECORDS + 10)
    record(tmp_path / "a.mace", [TOPOLOGY, whole])
    _, *got = read(tmp_path / "a.mace")
    assert [len(batch) for batch in got] == [MAX_RECORDS, 10]
    assert same_stream([Batch.concatenate(got)], [whole])


def test_no_file_is_overwritten_unless_asked(tmp_path):
    path = tmp_path / "a.mace"
    path.write_bytes(b"precious" * 1_000)
    with pytest.raises(StoreError, match="exists already"):
        record(path)
    assert path.read_bytes() == b"precious" * 1_000
    record(path, overwrite=True)
    assert path.read_bytes() == capture_bytes(ITEMS)


def test_two_recordings_into_one_file(tmp_path):
    async def run():
        first, second = CaptureSink(tmp_path / "a.mace"), CaptureSink(tmp_path / "a.mace", overwrite=True)
        await first.open(HEADER)
        with pytest.raises(StoreError, match="another recording"):
            await second.open(HEADER)
        await second.aclose()
        for item in ITEMS:
            await first.write(item)
        await first.aclose()

    asyncio.run(run())
    assert (tmp_path / "a.mace").read_bytes() == capture_bytes(ITEMS)


def test_a_path_that_cannot_be_created(tmp_path):
    with pytest.raises(StoreError, match=r"no-such/a.mace: cannot be created: No such file or directory"):
        record(tmp_path / "no-such" / "a.mace")
    with pytest.raises(StoreError, match="Is a directory"):
        record(tmp_path, overwrite=True)


def test_a_disk_that_is_full_from_the_start():
    with pytest.raises(StoreError, match="/dev/full: No space left on device after 0 bytes") as kept:
        record("/dev/full", overwrite=True)
    # A caller that keeps the error, and with it the recording, does not keep the file locked.
    assert kept.traceback
    with pytest.raises(StoreError, match="/dev/full: No space left on device after 0 bytes"):
        record("/dev/full", overwrite=True)


@pytest.fixture
def file_size_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_becomes_full(tmp_path, file_size_limit):
    # The limit behaves like a full disk: a short write first, then the error.
    path = tmp_path / "a.mace"
    *_, half = _frame_ends()[:4]
    file_size_limit(half + 100)
    with pytest.raises(StoreError, match=f"a.mace: File too large after {half} bytes; the records written before"):
        record(path)
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert path.stat().st_size == half
    with Capture(path) as capture:
        assert same_stream(list(capture), ITEMS[:3])
        assert capture.truncated


@pytest.mark.needs("root")
def test_a_file_system_that_becomes_full(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", mount], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs root: a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        with pytest.raises(StoreError, match="No space left on device after") as caught:
            record(mount / "a.mace", [TOPOLOGY, *batches(traffic(100_000), 1_000)])
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
        with Capture(mount / "a.mace") as capture:
            _, *got = capture
            assert same_stream(got, batches(traffic(100_000), 1_000)[: len(got)])
            assert len(got) > 10
            assert capture.truncated
            assert capture.truncated.cut == 0
    finally:
        subprocess.run(["umount", mount], check=True)


def _frame_ends():
    ends = [len(capture_bytes([], end=False))]
    for count in range(1, len(ITEMS) + 1):
        ends.append(len(capture_bytes(ITEMS[:count], end=False)))
    return ends


def test_after_a_failure_nothing_more_is_written(tmp_path, file_size_limit):
    path = tmp_path / "a.mace"

    async def run():
        sink = CaptureSink(path)
        await sink.open(HEADER)
        file_size_limit(_frame_ends()[1])
        await sink.write(ITEMS[0])
        with pytest.raises(StoreError, match="File too large"):
            await sink.write(ITEMS[1])
        file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        with pytest.raises(StoreError, match="File too large"):
            await sink.write(ITEMS[2])
        await sink.aclose()

    asyncio.run(run())
    assert path.read_bytes() == capture_bytes(ITEMS[:1], end=False)


def test_a_stream_out_of_order_leaves_no_end_mark(tmp_path):
    with pytest.raises(WireError, match="go back in time"):
        record(tmp_path / "a.mace", [ITEMS[0], ITEMS[2], ITEMS[1]])
    assert (tmp_path / "a.mace").read_bytes() == capture_bytes([ITEMS[0], ITEMS[2]], end=False)


def test_a_cancelled_write_is_whole_or_not_there(tmp_path):
    async def run(path, patience):
        sink = CaptureSink(path)
        await sink.open(HEADER)
        await sink.write(TOPOLOGY)
        task = asyncio.create_task(sink.write(traffic(50_000)))
        await asyncio.sleep(patience)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sink.aclose()

    for number in range(20):
        path = tmp_path / f"{number}.mace"
        asyncio.run(run(path, number * 0.0005))
        assert path.read_bytes() in (capture_bytes([TOPOLOGY, traffic(50_000)]), capture_bytes([TOPOLOGY]))


@pytest.mark.slow
def test_a_killed_writer_leaves_a_readable_file(tmp_path):
    program = textwrap.dedent(
        """
        import asyncio, sys
        from storage.capture import CaptureSink
        from tests.made_capture import HEADER, TOPOLOGY, batches, traffic

        async def run():
            sink = CaptureSink(sys.argv[1])
            await sink.open(HEADER)
            await sink.write(TOPOLOGY)
            for number, batch in enumerate(batches(traffic(2_000_000), 997)):
                await sink.write(batch)
                print(number + 1, flush=True)

        asyncio.run(run())
        """
    )
    path = tmp_path / "a.mace"
    writer = subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert writer.stdout is not None
    acknowledged = 0
    with writer:
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged == 100:
                writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    with Capture(path) as capture:
        topology, *got = capture
        assert capture.truncated
        assert "without END mark" in capture.warnings[0]
    assert topology == TOPOLOGY
    assert len(got) >= acknowledged
    assert same_stream(got, batches(traffic(2_000_000), 997)[: len(got)])


def test_writing_before_opening(tmp_path):
    with pytest.raises(StoreError, match="not open"):
        asyncio.run(CaptureSink(tmp_path / "a.mace").write(TOPOLOGY))


def test_pipes_are_taken(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
        record(fifo, overwrite=True)
        assert reader.communicate()[0] == capture_bytes(ITEMS)


def test_progress_is_not_recorded(tmp_path):
    record(tmp_path / "a.mace", [*ITEMS, Progress(2**62)])
    assert (tmp_path / "a.mace").read_bytes() == capture_bytes(ITEMS)
