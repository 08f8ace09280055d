"""The kept seconds of the raw stream, and recordings that begin in its middle."""

import asyncio
import logging
import os
from dataclasses import replace

import pytest

from collector.capture.source import Capture
from contracts.errors import StoreError
from contracts.interfaces import Progress
from mace.live import keeping
from mace.live.keeping import KEPT_S, KeptStream
from tests.made_capture import HEADER, TOPOLOGY, batches, same_stream, traffic
from tests.streams import check_stream, records

PARTS = list(batches(traffic(4_000), 100))
NS = 1_000_000_000


def at(batch, second):
    """Return a batch moved to a second of the stream."""
    return replace(batch, ts_ns=batch.ts_ns - batch.ts_ns[0] + HEADER.clock.monotonic_ns + second * NS)


def stream(seconds):
    return [at(batch, second) for second, batch in zip(range(seconds), PARTS, strict=False)]


async def fed(items):
    kept = KeptStream()
    await kept.open(HEADER)
    for item in items:
        await kept.write(item)
    return kept


def test_the_last_seconds_are_kept_behind_their_topology():
    later = replace(TOPOLOGY, from_ns=HEADER.clock.monotonic_ns + 19 * NS)
    items = stream(30)
    kept = asyncio.run(fed([TOPOLOGY, *items[:19], later, *items[19:]]))
    header, found = kept.kept()
    assert header is HEADER
    assert found[0] == later
    check_stream(list(found))
    last = int(items[-1].ts_ns[-1])
    expected = [batch for batch in items if int(batch.ts_ns[-1]) >= last - KEPT_S * NS]
    assert same_stream(list(found[1:]), expected)
    assert kept.seconds == pytest.approx(KEPT_S)


def test_all_of_a_short_stream_is_kept():
    kept = asyncio.run(fed([TOPOLOGY, *stream(4)]))
    assert same_stream(list(kept.kept()[1]), [TOPOLOGY, *stream(4)])
    assert 3 <= kept.seconds < 4


def test_time_without_packets_counts():
    items = stream(3)
    quiet = Progress(int(items[-1].ts_ns[-1]) + 100 * NS)
    kept = asyncio.run(fed([TOPOLOGY, *items, quiet]))
    assert kept.seconds == KEPT_S
    with pytest.raises(StoreError, match="no packet was recorded"):
        kept.kept()
    kept = asyncio.run(fed([TOPOLOGY, *items, quiet, at(PARTS[3], 103)]))
    check_stream(list(kept.kept()[1]))


def test_memory_is_bounded_and_the_seconds_say_so(monkeypatch):
    monkeypatch.setattr(keeping, "MOST_RECORDS", 250)
    kept = asyncio.run(fed([TOPOLOGY, *stream(8)]))
    assert len(records(kept.kept()[1])) == 200
    assert 1 <= kept.seconds < 2


def recorded(path):
    with Capture(path) as capture:
        found = list(capture)
        assert not capture.truncated
    return found


def test_a_recording_has_what_came_after_its_beginning(tmp_path):
    items = stream(8)

    async def run():
        kept = await fed([TOPOLOGY, *items[:3]])
        await kept.begin_recording(tmp_path / "now.mace")
        with pytest.raises(StoreError, match="already"):
            await kept.begin_recording(tmp_path / "more.mace")
        for item in items[3:6]:
            await kept.write(item)
        sink = await kept.end_recording()
        await kept.write(items[6])
        return kept, sink

    kept, sink = asyncio.run(run())
    assert same_stream(recorded(tmp_path / "now.mace"), [TOPOLOGY, *items[3:6]])
    assert (kept.finished, sink.records) == ([sink], 300)
    assert not (tmp_path / "more.mace").exists()


def test_the_end_of_the_measurement_completes_the_recording(tmp_path):
    async def run():
        kept = await fed([TOPOLOGY])
        await kept.begin_recording(tmp_path / "now.mace")
        await kept.write(PARTS[0])
        await kept.aclose()
        return kept

    assert len(asyncio.run(run()).finished) == 1
    assert same_stream(recorded(tmp_path / "now.mace"), [TOPOLOGY, PARTS[0]])


def test_a_failing_disk_ends_the_recording_and_nothing_else(tmp_path, caplog):
    async def run():
        kept = await fed([TOPOLOGY, PARTS[0]])
        await kept.begin_recording(tmp_path / "now.mace")
        # The descriptor is now one that cannot be written.
        assert kept.recording._fd is not None
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, kept.recording._fd)
        os.close(null)
        for item in PARTS[1:5]:
            await kept.write(item)
        return kept

    with caplog.at_level(logging.WARNING):
        kept = asyncio.run(run())
    assert kept.recording is None
    assert kept.finished == []
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["the recording has ended"]
    assert len(records(kept.kept()[1])) == 500


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "there.mace").write_text("mine")

    async def run():
        kept = await fed([TOPOLOGY, PARTS[0]])
        with pytest.raises(StoreError, match="exists already"):
            await kept.begin_recording(tmp_path / "there.mace")
        return kept

    assert asyncio.run(run()).recording is None
    assert (tmp_path / "there.mace").read_text() == "mine"
