"""What an ingest does with what an earlier one had acknowledged, without any broker."""

import asyncio

import pytest

from mace.broker import Broker
from mace.config import Config, MqttConfig, StoreConfig
from mace.errors import StoreError
from mace.ingest import Ingest
from mace.topics import Shard
from storage import segments
from storage.journal import Journal, Kind
from storage.query import Store
from tests.made_capture import HEADER, TOPOLOGY, batches, encode, traffic

RECORDS = 3_000
FRAMES = encode([TOPOLOGY, *batches(traffic(RECORDS), 500)])


def acknowledged(path, frames):
    """As a process leaves it that was killed before its first flush."""
    journal = Journal(path / "ingest", fsync=False)
    journal.open()
    for frame in frames:
        journal.append(Kind.FRAME, HEADER.host, frame)
    journal.sync(journal.taken())
    journal.close()


def run(path):
    """An ingest that is told to stop before it has begun: it still owes what was acknowledged."""

    async def work():
        # Port 9 (discard): nobody is there, and nobody is asked for long.
        config = Config(store=StoreConfig(sync=False), mqtt=MqttConfig(broker="mqtt://127.0.0.1:9"))
        stop = asyncio.Event()
        stop.set()
        ingest = Ingest(Broker(config.mqtt), path, config, Shard())
        await ingest.run(stop)
        return ingest

    return asyncio.run(work())


def rows(path):
    return [each.rows for each in segments.listing(path, "delays")]


@pytest.fixture
def store(tmp_path):
    run(tmp_path / "store")  # makes it
    return tmp_path / "store"


def test_what_was_acknowledged_is_stored_once_however_often_it_starts(store):
    acknowledged(store, FRAMES)
    assert run(store).read_again == len(FRAMES)
    (stored,) = Store(store).runs()
    assert (stored.ledger.records, stored.ledger.imbalance, stored.ledger.discarded) == (RECORDS, 0, 0)
    before = rows(store)
    assert sum(before) > 1_000
    for _ in range(2):
        again = run(store)
        assert (again.rows_stored, rows(store)) == (0, before)


def test_a_flush_without_its_commit_is_put_back(store):
    acknowledged(store, FRAMES)
    run(store)
    before = rows(store)
    # What a killed process wrote last: a segment of a flush that no journal speaks of.
    (kept,) = segments.listing(store, "delays")
    newer = segments.segment(store, "delays", kept.hour, kept.last + 5, kept.last + 5, kept.rows)
    newer.path.write_bytes(kept.path.read_bytes())
    assert rows(store) != before
    run(store)
    assert rows(store) == before


def test_a_journal_of_an_unreadable_snapshot_says_what_to_do(store):
    journal = Journal(store / "ingest", fsync=False)
    journal.open()
    journal.append(Kind.SNAPSHOT, HEADER.host, b"9.9.9\nno snapshot")
    journal.commit(0, journal.place)
    journal.sync(journal.taken())
    journal.close()
    with pytest.raises(StoreError, match=r"written by MACE 9\.9\.9 and cannot be read"):
        run(store)
