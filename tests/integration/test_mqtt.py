"""The raw stream over a real broker into the store: what arrives is what was measured, whatever is killed meanwhile."""

import asyncio
import random
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import duckdb
import pytest

from collector.capture_source import CaptureSource
from mace import pipeline
from mace.broker import Broker
from mace.config import Config, MqttConfig, StoreConfig
from mace.ingest import Ingest
from mace.topics import Shard, bucket, stream_topic
from storage import segments
from storage.embedded import EmbeddedStore
from storage.mqtt import StreamPublisher
from storage.query import Store
from tests.brokers import Authority, documented_acl, mosquitto, passwords
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, encode, traffic

pytestmark = pytest.mark.needs("mosquitto", "openssl")

RECORDS = 40_000
WITHIN_S = 60


def stream(records=RECORDS, size=1500, seed=1):
    """Batches with a second topology in their midst."""
    parts = batches(traffic(records, seed), size)
    half = len(parts) // 2
    news = replace(TOPOLOGY, from_ns=int(parts[half - 1].ts_ns[-1]) + 1)
    return [TOPOLOGY, *parts[:half], news, *parts[half:]]


def settings(**mqtt):
    return Config(store=StoreConfig(flush_interval_s=0.2, sync=False), mqtt=MqttConfig(**mqtt))


def header(host="measured.example", run="5f2b7c9e"):
    return replace(HEADER, host=host, run=run)


def direct(path, items, of):
    """What the same records give without a broker."""
    capture = path.with_suffix(".mace")
    capture.write_bytes(capture_bytes(items, of))

    async def work():
        store = EmbeddedStore(path, fsync=False)
        engine = pipeline.engine_config(Config())
        await pipeline.run(CaptureSource(capture), [store], engine=engine, stop=pipeline.Stop())

    asyncio.run(work())
    return content(path, of.host)


def content(path, host):
    """A host's delays and windows in a store, every column and row, in an order of their own; and its ledgers."""
    found = {}
    for table in ("delays", "windows"):
        paths = [str(each.path) for each in segments.listing(path, table)]
        rows = "SELECT * REPLACE (epoch_ns(time) AS time) FROM read_parquet($paths, hive_partitioning = false)"
        mine = f"{rows} WHERE host = $host ORDER BY ALL"
        found[table] = duckdb.execute(mine, {"paths": paths, "host": host}).fetchall() if paths else []
    runs = [run for run in Store(path).runs() if run.host == host]
    found["ledgers"] = [(run.run, run.ledger.as_dict()) for run in runs]
    return found


@asynccontextmanager
async def ingesting(broker, store, shard=Shard(), config=None):
    """An ingest in this process for the length of the block."""
    config = config or settings(broker=broker.url)
    ingest = Ingest(Broker(config.mqtt), store, config, shard)
    stop = asyncio.Event()
    running = asyncio.create_task(ingest.run(stop))
    try:
        yield ingest
    finally:
        stop.set()
        await running


def publisher(broker, spool, config=None, **options):
    options = {"max_bytes": 64 << 20, "interval_s": 0.05, "drain_s": WITHIN_S} | options
    return StreamPublisher(Broker((config or settings(broker=broker.url)).mqtt), spool, **options)


async def publish(sink, items, of, pause_s=0.0):
    await sink.open(of)
    try:
        for item in items:
            await sink.write(item)
            await asyncio.sleep(pause_s)
    finally:
        await sink.aclose()


async def until(condition):
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.02)


def test_what_arrives_gives_the_same_answers_to_the_bit(tmp_path):
    items = stream()
    hosts = [header(f"host-{n}", f"run-{n}") for n in range(3)]

    async def work(broker):
        async with ingesting(broker, tmp_path / "store") as ingest:
            sinks = [publisher(broker, tmp_path / of.host) for of in hosts]
            await asyncio.gather(*(publish(s, items, of) for s, of in zip(sinks, hosts, strict=True)))
            return ingest, sinks

    with mosquitto(tmp_path / "broker") as broker:
        ingest, sinks = asyncio.run(work(broker))
    for of, sink in zip(hosts, sinks, strict=True):
        assert (sink.arrived, sink.waiting, sink.discarded) == (RECORDS, 0, 0)
        expected = direct(tmp_path / f"direct-{of.host}", items, of)
        assert len(expected["delays"]) > 10_000
        assert content(tmp_path / "store", of.host) == expected
    assert ingest.counts.records == 3 * RECORDS
    assert (ingest.counts.missing, ingest.counts.refused) == (0, 0)
