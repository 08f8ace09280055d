"""The raw stream through a real broker into the store: every record is stored once, whatever process is killed."""

import asyncio
import json
import random
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import aiomqtt
import duckdb
import numpy as np
import pyarrow as pa
import pytest

from collector.capture.source import CaptureReader
from collector.reading.streaming import FileSource
from contracts.config import Config, CorrelateConfig, InfluxConfig, MqttConfig, MqttRowsConfig, SinksConfig, StoreConfig
from contracts.topics import Shard, bucket, stream_topic
from contracts.vitals import Vitals
from correlator import configured
from mace.live import pipeline
from mace.live.ingest import Ingest
from storage import journal, segments, wanted_sinks
from storage.broker import Broker, Brokers
from storage.embedded import EmbeddedStore
from storage.mqtt import StreamPublisher
from storage.query import StoreReader
from tests import servers
from tests.brokers import Authority, documented_acl, mosquitto, passwords
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, encode, traffic

pytestmark = pytest.mark.needs("mosquitto", "openssl")

RECORDS = 40_000
WITHIN_S = 60
ALL = Shard()


def stream(records=RECORDS, size=1500, seed=1):
    """Return batches with a second topology between them."""
    parts = batches(traffic(records, seed), size)
    half = len(parts) // 2
    news = replace(TOPOLOGY, from_ns=int(parts[half - 1].ts_ns[-1]) + 1)
    return [TOPOLOGY, *parts[:half], news, *parts[half:]]


def settings(**mqtt):
    return Config(
        correlate=CorrelateConfig(cpus=True),
        store=StoreConfig(flush_interval_s=0.2, sync=False),
        mqtt=MqttConfig(**mqtt),
    )


def header(host="measured.example", run="5f2b7c9e"):
    return replace(HEADER, host=host, run=run)


def direct(path, items, of):
    """Return the results of the same records without a broker."""
    capture = path.with_suffix(".mace")
    capture.write_bytes(capture_bytes(items, of))

    async def work():
        store = EmbeddedStore(path, fsync=False)
        engine = configured.live(settings().correlate)
        await pipeline.run(FileSource(CaptureReader(capture)), [store], engine=engine, stop=pipeline.Stop())

    asyncio.run(work())
    return content(path, of.host)


def content(path, host):
    """Return a host's stored delays and windows, sorted, with all columns, its counts of stages, and its ledgers."""
    found = {}
    for table in ("delays", "windows"):
        paths = [str(each.path) for each in segments.listing(path, table)]
        whole = "SELECT * EXCLUDE time_remainder_ns REPLACE (epoch_ns(time) + time_remainder_ns AS time)"
        mine = f"{whole} FROM read_parquet($paths, hive_partitioning = false) WHERE host = $host ORDER BY ALL"
        found[table] = duckdb.execute(mine, {"paths": paths, "host": host}).fetchall() if paths else []
    found["stages"] = [
        (
            one.place,
            one.direction,
            one.measure,
            one.cpu_queued,
            one.cpu,
            *map(np.ndarray.tolist, one.durations.histogram()),
        )
        for one in StoreReader(path).stages()
        if one.place.host == host
    ]
    runs = [run for run in StoreReader(path).runs() if run.host == host]
    found["ledgers"] = [(run.run, run.ledger.as_dict()) for run in runs]
    return found


@asynccontextmanager
async def ingesting(broker, store, shard=ALL, config=None):
    """Run an ingest in this process for the duration of the block."""
    config = config or settings(broker=broker.url)
    ingest = Ingest(Brokers(config.mqtt), store, config, shard)
    stop = asyncio.Event()
    running = asyncio.create_task(ingest.run(stop))
    try:
        yield ingest
    finally:
        stop.set()
        await running


def publisher(broker, spool, config=None, **options):
    options = {"max_bytes": 64 << 20, "interval_s": 0.05, "drain_s": WITHIN_S} | options
    return StreamPublisher(Brokers((config or settings(broker=broker.url)).mqtt), spool, **options)


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
        while not condition():  # noqa: ASYNC110 (what is waited for happens in other processes)
            await asyncio.sleep(0.02)


@pytest.mark.slow
def test_the_broker_changes_no_row(tmp_path):
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


@pytest.mark.slow
def test_two_shards_divide_the_hosts(tmp_path):
    items = stream(8_000)
    hosts = [header(f"host-{n}", f"run-{n}") for n in range(6)]
    shards = [Shard(0, 2), Shard(1, 2)]
    assert len({bucket(of.host) % 2 for of in hosts}) == 2

    async def work(broker):
        async with ingesting(broker, tmp_path / "0", shards[0]), ingesting(broker, tmp_path / "1", shards[1]):
            sinks = [publisher(broker, tmp_path / of.host) for of in hosts]
            await asyncio.gather(*(publish(s, items, of) for s, of in zip(sinks, hosts, strict=True)))

    with mosquitto(tmp_path / "broker") as broker:
        asyncio.run(work(broker))
    expected = direct(tmp_path / "direct", items, header())
    for of in hosts:
        mine, other = bucket(of.host) % 2, 1 - bucket(of.host) % 2
        found = content(tmp_path / str(mine), of.host)
        assert found["ledgers"] == [(of.run, expected["ledgers"][0][1])]
        assert len(found["delays"]) == len(expected["delays"])
        assert content(tmp_path / str(other), of.host)["delays"] == []


@pytest.mark.slow
def test_broker_killed_again_and_again(tmp_path):
    """By default mosquitto keeps nothing on its disk, so a kill loses messages that it had acknowledged."""
    items = stream()

    async def work(broker):
        async with ingesting(broker, tmp_path / "store") as ingest:
            sink = publisher(broker, tmp_path / "spool")
            publishing = asyncio.create_task(publish(sink, items, header(), pause_s=0.1))
            for round_ in range(4):
                await until(lambda round_=round_: ingest.counts.records >= round_ * 8_000)
                await asyncio.to_thread(broker.kill)
                await asyncio.sleep(0.3 * (round_ == 1))
                await asyncio.to_thread(broker.start)
            await publishing
            return ingest, sink

    with mosquitto(tmp_path / "broker") as broker:
        ingest, sink = asyncio.run(work(broker))
    assert (sink.arrived, sink.waiting, sink.discarded) == (RECORDS, 0, 0)
    assert sink.restarts >= 2
    assert ingest.counts.missing == 0
    assert content(tmp_path / "store", HEADER.host) == direct(tmp_path / "direct", items, HEADER)


class Served:
    """`mace ingest` as a process of its own."""

    def __init__(self, broker, store, *args):
        self.argv = [sys.executable, "-m", "mace", "ingest", "--broker", broker.url, "--store", str(store), *args]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return self

    def kill(self):
        self.process.kill()
        self.process.communicate(timeout=WITHIN_S)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=WITHIN_S)
        assert self.process.returncode == 0, err
        return out


@pytest.mark.slow
def test_ingest_killed_again_and_again(tmp_path):
    """After kills at any moment each row is stored once, and the ledger equals that of a run without kills."""
    items = stream()
    (tmp_path / "c.toml").write_text("[correlate]\ncpus = true\n[store]\nflush_interval_s = 0.1\n")
    chance = random.Random(7)

    async def work(broker):
        served = Served(broker, tmp_path / "store", "--config", str(tmp_path / "c.toml")).start()
        sink = publisher(broker, tmp_path / "spool")
        publishing = asyncio.create_task(publish(sink, items, header(), pause_s=0.15))
        for round_ in range(4):
            await until(lambda round_=round_: sink.arrived > round_ * 8_000)
            await asyncio.sleep(chance.random() * 0.4)
            await asyncio.to_thread(served.kill)
            served.start()
        await publishing
        await asyncio.to_thread(served.stop)
        return sink

    with mosquitto(tmp_path / "broker") as broker:
        sink = asyncio.run(work(broker))
    assert (sink.arrived, sink.waiting, sink.discarded) == (RECORDS, 0, 0)
    assert content(tmp_path / "store", HEADER.host) == direct(tmp_path / "direct", items, HEADER)


@pytest.mark.slow
def test_an_ingest_continues_from_its_snapshots(tmp_path, monkeypatch):
    """Journal files hold a few frames, so that each start finds snapshots and rereads few frames."""
    monkeypatch.setattr(journal, "FILE_BYTES", 20_000)
    items = stream(80_000)

    async def work(broker):
        sink = publisher(broker, tmp_path / "spool")
        publishing = asyncio.create_task(publish(sink, items, header(), pause_s=0.05))
        read_again = []
        for round_ in range(4):
            ingest = Ingest(Brokers(settings(broker=broker.url).mqtt), tmp_path / "store", settings(), ALL)
            running = asyncio.create_task(ingest.run(asyncio.Event()))
            await until(lambda round_=round_: sink.arrived > round_ * 15_000)
            # The last records may leave nothing to store.
            await until(lambda ingest=ingest: ingest.rows_stored > 0 or sink.arrived == 80_000)
            read_again.append(ingest.read_again)
            # As if killed: nothing more is stored.
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        async with ingesting(broker, tmp_path / "store"):
            await publishing
        return read_again

    with mosquitto(tmp_path / "broker") as broker:
        read_again = asyncio.run(work(broker))
    assert read_again[0] == 0
    assert sum(read_again) < len(items)
    assert len(list((tmp_path / "store" / "ingest").iterdir())) < 10
    assert content(tmp_path / "store", HEADER.host) == direct(tmp_path / "direct", items, HEADER)


@pytest.mark.slow
def test_rows_for_other_subscribers_are_those_of_the_store(tmp_path):
    """A subscriber that needs only Arrow reads the rows, under the documented access list."""
    items = stream(8_000)
    (tmp_path / "acl").write_text(documented_acl() + "\nuser reader\ntopic read mace/v1/+/+\n")
    users = passwords(tmp_path / "passwords", {"host-a": "first", "reader": "second"})
    (tmp_path / "word").write_text("first\n")
    capture = tmp_path / "c.mace"
    capture.write_bytes(capture_bytes(items, header("host-a")))

    async def work(broker):
        rows = MqttRowsConfig(publish="delays", spool=str(tmp_path / "spool"), batch_rows=1_000, close_s=WITHIN_S)
        known = {"username": "host-a", "password_file": str(tmp_path / "word")}
        config = replace(settings(broker=broker.url, **known), sinks=SinksConfig(mqtt=rows))
        heard = {"delays": [], "windows": [], "ledger": []}

        async def listen(ready):
            async with aiomqtt.Client("127.0.0.1", broker.port, username="reader", password="second") as client:
                await client.subscribe("mace/v1/host-a/+", qos=1)
                ready.set()
                async for message in client.messages:
                    table = pa.ipc.open_stream(message.payload).read_all()
                    heard[str(message.topic).rpartition("/")[2]].append(table)

        ready = asyncio.Event()
        listening = asyncio.create_task(listen(ready))
        await ready.wait()
        vitals = Vitals()
        sinks = [EmbeddedStore(tmp_path / "store", fsync=False), *wanted_sinks(config, vitals)]
        engine = configured.live(config.correlate)
        await pipeline.run(FileSource(CaptureReader(capture)), sinks, engine=engine, stop=pipeline.Stop())
        stored = content(tmp_path / "store", "host-a")
        await until(lambda: sum(map(len, heard["delays"])) == len(stored["delays"]))
        await until(lambda: sum(map(len, heard["windows"])) == len(stored["windows"]))
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        return heard, stored, vitals

    lines = ["allow_anonymous false", f"password_file {users}", f"acl_file {tmp_path / 'acl'}"]
    with mosquitto(tmp_path / "broker", *lines) as broker:
        heard, stored, vitals = asyncio.run(work(broker))
    for table in ("delays", "windows"):
        whole = pa.concat_tables(heard[table]).unify_dictionaries()  # noqa: F841 (DuckDB finds it by its name)
        rows = duckdb.execute("SELECT * REPLACE (epoch_ns(time) AS time) FROM whole ORDER BY ALL").fetchall()
        assert rows == stored[table]
    numbers = [int(t.schema.metadata[b"number"]) for tables in heard.values() for t in tables]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert vitals.accounts["mqtt"].imbalance == 0
    assert vitals.accounts["mqtt"].not_stored == 0


@pytest.mark.slow
@pytest.mark.needs("influxd")
def test_all_sinks_get_the_same_results(tmp_path):
    items = stream(8_000)
    hosts = [header(f"host-{n}", f"run-{n}") for n in range(2)]

    async def work(broker, influx):
        sinks = SinksConfig(influxdb=InfluxConfig(url=influx.url, spool=str(tmp_path / "influx"), flush_interval_s=0.1))
        config = replace(settings(broker=broker.url), sinks=sinks)
        async with ingesting(broker, tmp_path / "store", config=config):
            made = [publisher(broker, tmp_path / of.host) for of in hosts]
            await asyncio.gather(*(publish(s, items, of) for s, of in zip(made, hosts, strict=True)))

    with mosquitto(tmp_path / "broker") as broker, servers.running(servers.Influx(tmp_path / "db")) as influx:
        asyncio.run(work(broker, influx))
        written = influx.count("device_window", "count")
    rows = [len(content(tmp_path / "store", of.host)["windows"]) for of in hosts]
    assert written == sum(rows) > 0


@pytest.mark.slow
def test_a_late_ingest_gets_all_waiting_frames(tmp_path):
    """No ingest ran during the measurement, and the publisher was killed meanwhile."""
    items = stream()

    async def measure(broker):
        sink = publisher(broker, tmp_path / "spool", drain_s=0.2)
        await publish(sink, items, header())
        assert sink.waiting == RECORDS

    async def later(broker):
        async with ingesting(broker, tmp_path / "store"):
            sink = publisher(broker, tmp_path / "spool")
            await publish(sink, [], header(run="the next one"))
            return sink

    with mosquitto(tmp_path / "broker") as broker:
        asyncio.run(measure(broker))
        sink = asyncio.run(later(broker))
    assert (sink.left_before, sink.arrived, sink.waiting) == (RECORDS, RECORDS, 0)
    expected = direct(tmp_path / "direct", items, HEADER)
    found = content(tmp_path / "store", HEADER.host)
    assert (found["delays"], found["windows"]) == (expected["delays"], expected["windows"])
    assert [run for run, _ in found["ledgers"]] == ["5f2b7c9e", "the next one"]
    assert not list((tmp_path / "spool" / "streams").iterdir())


@pytest.mark.slow
def test_a_full_spool_discards_the_oldest_and_the_ledger_counts_them(tmp_path):
    items = stream(300_000)

    async def measure(broker):
        sink = publisher(broker, tmp_path / "spool", max_bytes=400_000)
        publishing = asyncio.create_task(publish(sink, items, header(), pause_s=0.01))
        await until(lambda: sink.discarded > 0 and sink.records == 300_000)
        await asyncio.to_thread(broker.start)
        async with ingesting(broker, tmp_path / "store") as ingest:
            await publishing
        return sink, ingest

    with mosquitto(tmp_path / "broker") as broker:
        broker.kill()
        sink, ingest = asyncio.run(measure(broker))
    assert sink.arrived + sink.discarded == 300_000
    assert 0 < sink.discarded < 300_000
    assert ingest.counts.missing == sink.discarded
    ((_, ledger),) = content(tmp_path / "store", HEADER.host)["ledgers"]
    assert (ledger["records"], ledger["discarded"]) == (sink.arrived, sink.discarded)


@pytest.mark.slow
def test_dropped_frames_are_requested_again(tmp_path):
    """Frames beyond the bound of the ingest's or the broker's queue are dropped, and are sent again."""
    items = stream(20_000, size=50)

    async def work(broker):
        config = settings(broker=broker.url)
        async with ingesting(broker, tmp_path / "store") as ingest:
            sink = publisher(broker, tmp_path / "spool", interval_s=0.05)
            real, seen = ingest.message, 0

            def forgetful(message):
                nonlocal seen
                seen += 1
                if seen % 11:
                    real(message)

            ingest.message = forgetful
            await publish(sink, items, header(), pause_s=0.002)
            return ingest, sink, config

    with mosquitto(tmp_path / "broker") as broker:
        ingest, sink, _ = asyncio.run(work(broker))
    assert sink.arrived == 20_000
    assert ingest.counts.repeats > 0
    assert content(tmp_path / "store", HEADER.host) == direct(tmp_path / "direct", items, HEADER)


@pytest.mark.slow
def test_tls_certificates_and_the_documented_access_list(tmp_path):
    """A host has its certificate's name, and cannot publish as another."""
    items = stream(4_000)
    authority = Authority(tmp_path / "certs")
    for name in ("localhost", "host-a", "host-b", "ingest"):
        authority.sign(name)
    stranger = Authority(tmp_path / "strangers")
    stranger.sign("host-a")
    (tmp_path / "acl").write_text(documented_acl())
    lines = ["require_certificate true", "use_identity_as_username true", "allow_anonymous false"]

    def known_as(broker, name, by=authority):
        files = {"cert_file": str(by.file(f"{name}.crt")), "key_file": str(by.file(f"{name}.key"))}
        return settings(broker=broker.url, ca_file=str(authority.ca), **files)

    async def work(broker):
        async with ingesting(broker, tmp_path / "store", config=known_as(broker, "ingest")) as ingest:
            honest = publisher(broker, tmp_path / "a", known_as(broker, "host-a"))
            await publish(honest, items, header("host-a"))
            # Host a publishes as b: the broker refuses.
            liar = publisher(broker, tmp_path / "b", known_as(broker, "host-a"), drain_s=1)
            await publish(liar, items, header("host-b"))
            # A certificate of another authority gets no connection.
            foreign = publisher(broker, tmp_path / "c", known_as(broker, "host-a", stranger), drain_s=1)
            await publish(foreign, items, header("host-a", "another"))
            return ingest, honest, liar, foreign

    with mosquitto(tmp_path / "broker", *lines, f"acl_file {tmp_path / 'acl'}", tls=authority) as broker:
        ingest, honest, liar, foreign = asyncio.run(work(broker))
    assert (honest.arrived, honest.refused) == (4_000, 0)
    assert liar.refused > 0
    assert (liar.arrived, liar.waiting) == (0, 4_000)
    assert (foreign.arrived, foreign.waiting, foreign.sent_bytes) == (0, 4_000, 0)
    assert ingest.hosts == 1
    assert [run.host for run in StoreReader(tmp_path / "store").runs()] == ["host-a"]


@pytest.mark.slow
def test_passwords_and_a_stream_of_another_host_on_the_own_topic(tmp_path, monkeypatch):
    items = stream(4_000)
    users = passwords(tmp_path / "passwords", {"host-a": "first", "ingest": "second"})
    (tmp_path / "acl").write_text(documented_acl())
    (tmp_path / "word").write_text("second\n")
    monkeypatch.setenv("MACE_MQTT_PASSWORD", "first")
    strange = [*encode(items, header("host-b")), b"no frame"]

    async def work(broker):
        served = settings(broker=broker.url, username="ingest", password_file=str(tmp_path / "word"))
        host = settings(broker=broker.url, username="host-a")
        async with ingesting(broker, tmp_path / "store", config=served) as ingest:
            await ingest.listening.wait()
            # The topic is the host's own, the HEADER names another host.
            async with Broker(host.mqtt).connection() as client:
                for frame in strange:
                    await client.publish(stream_topic("host-a"), frame, qos=1)
                assert client.refused == 0
            await until(lambda: ingest.counts.refused >= len(strange))
            sink = publisher(broker, tmp_path / "a", host)
            await publish(sink, items, header("host-a"))
            return ingest, sink

    lines = ["allow_anonymous false", f"password_file {users}", f"acl_file {tmp_path / 'acl'}"]
    with mosquitto(tmp_path / "broker", *lines) as broker:
        ingest, sink = asyncio.run(work(broker))
    assert (sink.arrived, ingest.counts.refused) == (4_000, len(strange))
    assert [run.host for run in StoreReader(tmp_path / "store").runs()] == ["host-a"]


def test_status_is_retained_and_the_last_will_says_offline(tmp_path):
    async def work(broker):
        plain = Broker(settings(broker=broker.url).mqtt)
        said = []

        async def status():
            async with plain.connection() as client:
                await client.subscribe("mace/v1/+/status", qos=1)
                async for message in client.messages:
                    return json.loads(message.payload)
            raise AssertionError("the broker had no status")

        sink = publisher(broker, tmp_path / "spool", drain_s=0.1)
        await sink.open(header())
        for word in ("online", "offline"):
            async with asyncio.timeout(WITHIN_S):
                while (found := await status())["state"] != word:  # noqa: ASYNC110 (another process's word)
                    await asyncio.sleep(0.05)
            said.append(found)
            if word == "online":
                await sink.aclose()
        return said

    with mosquitto(tmp_path / "broker") as broker:
        online, offline = asyncio.run(work(broker))
    assert online == {"state": "online", "host": HEADER.host, "run": HEADER.run}
    assert offline["state"] == "offline"
