"""Streams of many hosts through the ingest into a real InfluxDB: each host has the rows of the embedded store."""

import asyncio
import urllib.request
from dataclasses import replace

import duckdb
import pytest

from contracts.config import Config, InfluxConfig, MqttConfig, PrometheusConfig, SinksConfig, StoreConfig
from contracts.topics import Shard
from mace.live.ingest import Ingest
from storage import segments
from storage.broker import Brokers
from storage.mqtt import StreamPublisher
from tests.brokers import mosquitto
from tests.made_capture import HEADER, TOPOLOGY, batches, traffic
from tests.servers import Influx, free_port

pytestmark = [pytest.mark.slow, pytest.mark.needs("mosquitto", "influxd")]

HOSTS = ("a.example", "b.example", "c.example")
RECORDS = 12_000
WITHIN_S = 60


def stored(path, host, table, condition="true"):
    paths = [str(each.path) for each in segments.listing(path, table)]
    sql = "SELECT count(*) FROM read_parquet($paths, hive_partitioning = false) WHERE host = $host AND "
    return duckdb.execute(sql + condition, {"paths": paths, "host": host}).fetchone()[0]


def rows(influx, measurement, field, host):
    found = influx.query(f'SELECT count("{field}") FROM "{measurement}" WHERE "host" = \'{host}\'')
    return found[0]["values"][0][1] if found else 0


@pytest.mark.parametrize("restarted", [False, True], ids=["in one go", "ingest stopped and started"])
def test_the_database_has_the_rows_of_the_store(tmp_path, restarted):
    influx = Influx(tmp_path / "influx").start()
    listen = f"127.0.0.1:{free_port()}"

    def settings(broker):
        return Config(
            store=StoreConfig(flush_interval_s=0.2, sync=False),
            mqtt=MqttConfig(broker=broker.url),
            sinks=SinksConfig(
                influxdb=InfluxConfig(url=influx.url, spool=str(tmp_path / "spool"), flush_interval_s=0.1),
                prometheus=PrometheusConfig(listen=listen),
            ),
        )

    async def ingest_for(broker, during):
        ingest, stop = (
            Ingest(Brokers(settings(broker).mqtt), tmp_path / "store", settings(broker), Shard()),
            asyncio.Event(),
        )
        running = asyncio.create_task(ingest.run(stop))
        try:
            await asyncio.wait_for(during(ingest), WITHIN_S)
        finally:
            stop.set()
            await running

    async def work(broker):
        parts = [TOPOLOGY, *batches(traffic(RECORDS, 3), 500)]
        options = {"max_bytes": 64 << 20, "interval_s": 0.05, "drain_s": WITHIN_S}
        sinks = [StreamPublisher(Brokers(settings(broker).mqtt), tmp_path / host, **options) for host in HOSTS]
        half = len(parts) // 2

        async def give(part):
            await asyncio.gather(*(sink.write(item) for sink in sinks for item in part))

        async def first(ingest):
            for sink, host in zip(sinks, HOSTS, strict=True):
                await sink.open(replace(HEADER, host=host, run=f"run-{host[0]}"))
            for item in parts[:half]:
                await give([item])
            while ingest.counts.records < 100:  # noqa: ASYNC110 (another task counts)
                await asyncio.sleep(0.02)
            health = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{listen}/healthz").status)
            assert health == 200
            if not restarted:
                await second(ingest)

        async def second(_):
            for item in parts[half:]:
                await give([item])
            await asyncio.gather(*(sink.aclose() for sink in sinks))

        await ingest_for(broker, first)
        if restarted:
            await ingest_for(broker, second)

    try:
        with mosquitto(tmp_path / "broker") as broker:
            asyncio.run(work(broker))
        for host in HOSTS:
            overhead = stored(tmp_path / "store", host, "delays", "segment = 'overhead'")
            devices = stored(tmp_path / "store", host, "delays", "segment <> 'overhead'")
            windows = stored(tmp_path / "store", host, "windows")
            assert min(overhead, devices, windows) > 0
            assert rows(influx, "overhead", "overhead_ns", host) == overhead
            assert rows(influx, "device_delay", "delay_ns", host) == devices
            assert rows(influx, "device_window", "count", host) == windows
            ledger = influx.query(
                f'SELECT last("records"), last("discarded") FROM "mace_internal" WHERE "host" = \'{host}\''
                " AND \"part\" = 'ledger'"
            )
            assert ledger[0]["values"][0][1:] == [RECORDS, 0]
    finally:
        influx.stop()
