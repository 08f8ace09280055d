"""How an ingest recovers the frames that an earlier process had acknowledged, without a broker."""

import asyncio
import threading
from dataclasses import replace

import pytest

from contracts.config import Config, MqttConfig, StoreConfig
from contracts.errors import StoreError
from contracts.topics import Shard
from contracts.topology import Sharer
from correlator.engine import EngineConfig
from mace.live.hosts import SLICE_NS, Hosts
from mace.live.ingest import Ingest
from storage import broker, segments
from storage.broker import Brokers
from storage.journal import FIRST_SLICE_NS, Commit, EntryKind, Journal
from storage.query import StoreReader
from tests.made_capture import HEADER, TOPOLOGY, batches, encode, traffic

RECORDS = 3_000
FRAMES = encode([TOPOLOGY, *batches(traffic(RECORDS), 500)])


def acknowledged(path, frames):
    """Make the journal of a process that was killed before its first flush."""
    journal = Journal(path / "ingest", fsync=False)
    journal.open()
    for frame in frames:
        journal.append(EntryKind.FRAME, HEADER.host, frame)
    journal.sync(journal.taken())
    journal.close()


def run(path):
    """Run an ingest that is stopped before it has begun: it still stores the acknowledged frames."""

    async def work():
        # Port 9 (discard): no broker listens there, and the connection fails at once.
        config = Config(store=StoreConfig(sync=False), mqtt=MqttConfig(broker="mqtt://127.0.0.1:9"))
        stop = asyncio.Event()
        stop.set()
        ingest = Ingest(Brokers(config.mqtt), path, config, Shard())
        await ingest.run(stop)
        return ingest

    return asyncio.run(work())


def rows(path):
    return [each.rows for each in segments.listing(path, "delays")]


@pytest.fixture
def store(tmp_path):
    run(tmp_path / "store")  # creates the store
    return tmp_path / "store"


def test_acknowledged_frames_are_stored_once_over_several_starts(store):
    acknowledged(store, FRAMES)
    assert run(store).read_again == len(FRAMES)
    (stored,) = StoreReader(store).runs()
    assert (stored.ledger.records, stored.ledger.imbalance, stored.ledger.discarded) == (RECORDS, 0, 0)
    before = rows(store)
    assert sum(before) > 1_000
    for _ in range(2):
        again = run(store)
        assert (again.rows_stored, rows(store)) == (0, before)


def test_containers_without_devices_are_stored(store):
    """A flush has all containers that were present during it, by their newest names."""
    devices = tuple(replace(d, container_id=d.container and f"{d.netns:064x}") for d in TOPOLOGY.devices)
    first = replace(TOPOLOGY, devices=devices, on_host_network=(Sharer("tmp", "f" * 64), Sharer("image.sif[7]")))
    whole = traffic(RECORDS)
    half = len(whole) // 2
    second = replace(first, from_ns=int(whole.ts_ns[half]), on_host_network=(Sharer("agent", "f" * 64),))
    acknowledged(store, encode([first, *batches(whole[:half], 500), second, *batches(whole[half:], 500)]))
    run(store)
    assert StoreReader(store).sharers() == (Sharer("agent", "f" * 64), Sharer("image.sif[7]"))
    known = {(one.container, one.container_id) for one in StoreReader(store).containers()}
    assert known == {(d.container, d.container_id) for d in devices if d.container}


def test_a_flush_without_its_commit_is_undone(store):
    acknowledged(store, FRAMES)
    run(store)
    before = rows(store)
    # The last segment of a killed process; the journal has no commit of its flush.
    (kept,) = segments.listing(store, "delays")
    newer = segments.segment(store, "delays", kept.hour, kept.last + 5, kept.last + 5, kept.rows)
    newer.path.write_bytes(kept.path.read_bytes())
    assert rows(store) != before
    run(store)
    assert rows(store) == before


def test_an_unreadable_snapshot_is_an_error_with_a_remedy(store):
    journal = Journal(store / "ingest", fsync=False)
    journal.open()
    journal.append(EntryKind.SNAPSHOT, HEADER.host, b"9.9.9\nno snapshot")
    journal.commit(Commit(0, journal.position, SLICE_NS))
    journal.sync(journal.taken())
    journal.close()
    with pytest.raises(StoreError, match=r"written by MACE 9\.9\.9 and .* cannot read it"):
        run(store)


@pytest.mark.parametrize("slice_ns", [FIRST_SLICE_NS, SLICE_NS])
def test_a_restart_cuts_the_stream_where_stored_rows_end(store, slice_ns):
    """After a kill behind a commit, only the results of frames after that commit are stored again."""
    seconds = [batch for n in range(8) for batch in batches(later(traffic(RECORDS), n), RECORDS)]
    frames = encode([TOPOLOGY, *seconds])
    # The killed process had stored the rows of seven of the frames, with its own slice length.
    before = Hosts(EngineConfig(), lambda header: False)
    before.slice_ns = slice_ns
    for frame in frames[:7]:
        before.work(HEADER.host, frame)
    (part,) = before.take_parts().values()
    for frame in frames[7:]:
        before.work(HEADER.host, frame)
    (rest,) = before.take_parts().values()
    journal = Journal(store / "ingest", fsync=False)
    journal.open()
    for frame in frames[:7]:
        journal.append(EntryKind.FRAME, HEADER.host, frame)
    # According to the journal this flush is stored: only later frames are examined.
    journal.commit(Commit(0, journal.position, slice_ns))
    for frame in frames[7:]:
        journal.append(EntryKind.FRAME, HEADER.host, frame)
    journal.sync(journal.taken())
    journal.close()
    assert len(part.rows.delays)
    assert run(store).rows_stored == len(rest.rows.delays)


def later(batch, seconds):
    return replace(batch, ts_ns=batch.ts_ns + seconds * 1_000_000_000)


def test_a_connection_that_swallows_cancellation_lets_the_ingest_end(tmp_path, monkeypatch):
    """A connection that breaks while it is closed raises its own error instead of the cancellation."""
    forgotten, begun = 0, asyncio.Event()

    async def forgetful(self, _):
        nonlocal forgotten
        begun.set()
        while True:
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                forgotten += 1
                if forgotten == 2:
                    raise

    monkeypatch.setattr(Ingest, "_stay_connected", forgetful)
    monkeypatch.setattr(broker, "CANCEL_AGAIN_S", 0.01)

    async def work():
        config = Config(store=StoreConfig(sync=False), mqtt=MqttConfig(broker="mqtt://127.0.0.1:9"))
        stop = asyncio.Event()
        running = asyncio.create_task(Ingest(Brokers(config.mqtt), tmp_path / "store", config, Shard()).run(stop))
        await begun.wait()
        stop.set()
        await running

    asyncio.run(work())
    assert forgotten == 2


async def writing(place, monkeypatch, sync):
    """Return an ingest whose journal writes with `sync`, and the task that has just requested a write."""
    ingest = Ingest(Brokers(MqttConfig(broker="mqtt://127.0.0.1:9")), place, Config(), Shard())
    ingest._journal.open()
    monkeypatch.setattr(Journal, "sync", sync)
    ingest._journal.append(EntryKind.FRAME, "a", b"1")
    task = asyncio.create_task(ingest._sync())
    await asyncio.sleep(0)
    return ingest, task


def ended(ingest):
    ingest._disk.shutdown()
    ingest._journal.close()


def test_an_acknowledgement_waits_for_writes_in_progress(tmp_path, monkeypatch):
    """An acknowledgement waits for the disk, also for frames that are in another task's write."""
    may_end, written = threading.Event(), []
    sync = Journal.sync

    def slow(self, buffer):
        may_end.wait(60)
        sync(self, buffer)
        written.append(len(buffer))

    async def work():
        ingest, first = await writing(tmp_path, monkeypatch, slow)
        second = asyncio.create_task(ingest._sync())
        await asyncio.wait([first, second], timeout=0.05)
        assert not second.done()
        first.cancel()
        may_end.set()
        await second
        assert written
        ended(ingest)

    asyncio.run(work())


def test_a_failed_write_is_reported_after_its_caller_was_cancelled(tmp_path, monkeypatch):
    def full(self, buffer):
        raise StoreError("no space")

    async def work():
        ingest, first = await writing(tmp_path, monkeypatch, full)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with pytest.raises(StoreError, match="no space"):
            await ingest._sync()
        ended(ingest)

    asyncio.run(work())
