"""Hosts spread over two brokers by their names: one ingest for both, and a broker that dies touches only its hosts."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from contracts.config import Config, MqttConfig, MqttRowsConfig, RunConfig, SinksConfig, StoreConfig
from contracts.topics import Shard
from contracts.vitals import Vitals
from mace.live import publish
from mace.live.ingest import Ingest
from storage import SINKS
from storage.broker import Brokers
from storage.mqtt import StreamPublisher
from storage.query import StoreReader
from tests.brokers import mosquitto
from tests.made_capture import HEADER, TOPOLOGY, batches, traffic
from tests.made_results import make_delays, make_results

pytestmark = [pytest.mark.needs("mosquitto"), pytest.mark.slow]

RECORDS = 4_000
WITHIN_S = 60


def settings(urls, **run):
    return Config(
        store=StoreConfig(flush_interval_s=0.2, sync=False),
        mqtt=MqttConfig(broker=", ".join(urls)),
        run=RunConfig(**run),
    )


def hosts_of(brokers):
    """Return two hosts of each broker, by the broker's address."""
    found = {each.address: [] for each in brokers.all}
    for number in range(100):
        found[brokers.of(f"host-{number}").address].append(f"host-{number}")
    return {address: names[:2] for address, names in found.items()}


def parts():
    return [TOPOLOGY, *batches(traffic(RECORDS, 3), 500)]


def publisher(config, place, host):
    return StreamPublisher(
        Brokers(config.mqtt), place / host, max_bytes=64 << 20, interval_s=0.02, drain_s=float(WITHIN_S)
    )


async def until(condition):
    async with asyncio.timeout(WITHIN_S):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in other processes)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def ingesting(config, store, shard=Shard()):  # noqa: B008 (immutable)
    ingest, stop = Ingest(Brokers(config.mqtt), store, config, shard), asyncio.Event()
    running = asyncio.create_task(ingest.run(stop))
    try:
        await ingest.listening.wait()
        yield ingest
    finally:
        stop.set()
        await running


def ledgers(store):
    return {run.host: (run.ledger.records, run.ledger.discarded, run.closed) for run in StoreReader(store).runs()}


def test_a_broker_that_dies_touches_only_its_hosts(tmp_path):
    async def work(first, second):
        config = settings([first.url, second.url])
        of_first, of_second = (hosts_of(Brokers(config.mqtt))[url] for url in (first.url, second.url))
        sinks = {host: publisher(config, tmp_path, host) for host in (*of_first, *of_second)}
        begin, end = parts()[:4], parts()[4:]
        async with ingesting(config, tmp_path / "store") as ingest:
            for host, sink in sinks.items():
                await sink.open(replace(HEADER, host=host))
                for item in begin:
                    await sink.write(item)
            await until(lambda: all(sink.arrived for sink in sinks.values()))
            second.kill()
            for sink in sinks.values():
                for item in end:
                    await sink.write(item)
            # The hosts of the living broker finish, while those of the dead one keep their records in their spools.
            await asyncio.gather(*(sinks[host].aclose() for host in of_first))
            assert [sinks[host].arrived for host in of_first] == [RECORDS, RECORDS]
            assert all(sinks[host].waiting > 0 and not sinks[host].discarded for host in of_second)
            assert not ingest.listening.is_set()
            second.start()
            await asyncio.gather(*(sinks[host].aclose() for host in of_second))
            assert [sinks[host].arrived for host in of_second] == [RECORDS, RECORDS]
        return sinks

    with mosquitto(tmp_path / "first") as first, mosquitto(tmp_path / "second") as second:
        sinks = asyncio.run(work(first, second))
    assert ledgers(tmp_path / "store") == dict.fromkeys(sinks, (RECORDS, 0, True))


def test_a_broker_that_is_away_holds_up_the_rows_of_its_own_hosts_alone(tmp_path):
    """Each broker has a spool and an account of its own; what a run leaves in one, the next delivers."""

    def settled(urls):
        rows = MqttRowsConfig(publish="delays", spool=str(tmp_path / "rows"), flush_interval_s=0.05, close_s=0.2)
        return replace(settings(urls), sinks=SinksConfig(mqtt=rows))

    async def work(first, second):
        config, vitals = settled([first.url, second.url]), Vitals()
        (here, *_), (there, *_) = (hosts_of(Brokers(config.mqtt))[each.url] for each in (first, second))
        second.kill()
        sink = SINKS["mqtt"].make(config, vitals)
        await sink.open()
        living, dead = (vitals.accounts[f"mqtt@127.0.0.1:{each.port}"] for each in (first, second))
        for host in (there, here, there, here):
            stream = sink.stream()
            await stream.open(replace(HEADER, host=host))
            await stream.write(make_results(make_delays(100)))
            await stream.aclose()
        await until(lambda: living.taken > 0 and not living.waiting)
        await until(lambda: dead.trouble)
        assert (living.not_stored, living.trouble) == (0, "")
        await sink.aclose()
        assert (dead.taken, dead.stored, dead.not_stored) == (living.stored, 0, 0)
        assert dead.waiting == dead.taken > 0
        assert dead.imbalance == living.imbalance == 0
        # The broker is taken out of the list: its hosts, and their rows in its spool, move to the other one.
        after = Vitals()
        sink = SINKS["mqtt"].make(settled([first.url]), after)
        await sink.open()
        left = after.accounts[f"mqtt@127.0.0.1:{second.port}"]
        await until(lambda: left.stored == dead.waiting)
        await sink.aclose()
        assert (left.taken, left.waiting, left.imbalance) == (left.stored, 0, 0)

    with mosquitto(tmp_path / "first") as first, mosquitto(tmp_path / "second") as second:
        asyncio.run(work(first, second))


def test_a_host_moves_to_a_broker_that_is_added(tmp_path):
    """The ingest already has the new list; the host publishes by the old one first, then by the new one."""

    async def work(first, second):
        old, new = settings([first.url]), settings([first.url, second.url])
        host = hosts_of(Brokers(new.mqtt))[second.url][0]
        async with ingesting(new, tmp_path / "store", Shard(0, 1)) as ingest:
            for run, config in (("before", old), ("after", new)):
                sink = publisher(config, tmp_path, host)
                await sink.open(replace(HEADER, host=host, run=run))
                for item in parts():
                    await sink.write(item)
                await sink.aclose()
                assert (sink.arrived, sink.waiting) == (RECORDS, 0), run
                assert bool(ingest._via) is (run == "before")
        return host

    with mosquitto(tmp_path / "first") as first, mosquitto(tmp_path / "second") as second:
        host = asyncio.run(work(first, second))
    runs = StoreReader(tmp_path / "store").runs()
    assert [(run.host, run.ledger.records, run.closed) for run in runs] == [(host, RECORDS, True)] * 2


def test_check_names_the_broker_of_this_host_and_one_that_is_away(tmp_path):
    with mosquitto(tmp_path / "first") as first, mosquitto(tmp_path / "second") as second:
        config = settings([first.url, second.url], host="host-1")
        told = publish.check(config)
        mine = Brokers(config.mqtt).of("host-1").address
        assert told.ok
        assert told.detail.endswith(f"host host-1 publishes to {mine}")
        second.kill()
        told = publish.check(config)
        assert not told.ok
        assert second.url in told.detail
        assert first.url not in told.detail
