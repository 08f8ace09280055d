"""Every sink keeps the contract of `contracts.interfaces.Sink`.

To add a sink, add a maker to MAKERS, and to CLOGGED a maker of the sink with a clogged peer (a server that never
answers, a client that never reads). A sink that may make its caller wait is listed in WAITS.
"""

import asyncio
import json
import socket
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress

import pytest

from contracts.config import Config, InfluxConfig, MqttConfig, MqttRowsConfig, PrometheusConfig, SinksConfig
from contracts.interfaces import Sink
from contracts.vitals import Vitals
from storage import SINKS, wanted_sinks
from storage.embedded import EmbeddedStore
from tests import brokers, servers
from tests.fed import S, batches
from tests.made_results import START_NS, header, make_delays, make_results

FIRST = list(batches(2000, 4))
MANY = list(batches(60_000, 30, start_ns=START_NS + 10 * S))


@contextmanager
def embedded(place):
    yield EmbeddedStore(place / "store", fsync=False), Vitals()


@contextmanager
def configured(sinks, *, live=True):
    vitals = Vitals(live=live)
    (sink,) = wanted_sinks(Config(sinks=sinks), vitals)
    yield sink, vitals


@contextmanager
def influxdb(place):
    with servers.running(servers.Influx(place / "influx")) as server:
        config = InfluxConfig(url=server.url, spool=str(place / "spool"), flush_interval_s=0.1, close_s=30.0)
        with configured(SinksConfig(influxdb=config)) as made:
            yield made


@contextmanager
def prometheus(place):
    with configured(SinksConfig(prometheus=PrometheusConfig(listen="127.0.0.1:0"))) as made:
        yield made


@contextmanager
def silent_server():
    """A server that accepts connections and never reads."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def clogged_influxdb(place):
    with silent_server() as url:
        config = InfluxConfig(
            url=url, spool=str(place / "spool"), spool_mib=1, flush_interval_s=0.05, close_s=0.2, timeout_s=0.5,
            buffer_rows=20_000,
        )  # fmt: skip
        with configured(SinksConfig(influxdb=config)) as made:
            yield made


@contextmanager
def clogged_prometheus(place):
    """A Prometheus sink with clients that connect, send a request, and never read."""
    port = servers.free_port()
    with (
        ExitStack() as clients,
        configured(SinksConfig(prometheus=PrometheusConfig(listen=f"127.0.0.1:{port}"))) as made,
    ):
        stop = threading.Event()

        def pester():
            while not stop.wait(0.05):
                client = clients.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                with suppress(OSError):  # the peer is not there yet, or is gone
                    client.connect(("127.0.0.1", port))
                    client.send(b"GET /metrics HTTP/1.0\r\n\r\n")

        thread = threading.Thread(target=pester)
        thread.start()
        try:
            yield made
        finally:
            stop.set()
            thread.join()


@contextmanager
def mqtt(place):
    with brokers.mosquitto(place / "broker") as broker, rows_to(broker.url, place, close_s=30.0) as made:
        yield made


@contextmanager
def clogged_mqtt(place):
    with (
        silent_server() as url,
        rows_to(
            url.replace("http", "mqtt"), place, spool_mib=1, close_s=0.2, timeout_s=0.5, buffer_rows=20_000
        ) as made,
    ):
        yield made


@contextmanager
def rows_to(url, place, **options):
    rows = MqttRowsConfig(publish="delays", spool=str(place / "spool"), flush_interval_s=0.05, **options)
    vitals = Vitals()
    (sink,) = wanted_sinks(Config(mqtt=MqttConfig(broker=url), sinks=SinksConfig(mqtt=rows)), vitals)
    yield sink, vitals


MAKERS = {
    "store": embedded,
    "influxdb": pytest.param(influxdb, marks=[pytest.mark.needs("influxd"), pytest.mark.slow]),
    "prometheus": prometheus,
    "mqtt": pytest.param(mqtt, marks=pytest.mark.needs("mosquitto")),
}
CLOGGED = {"influxdb": clogged_influxdb, "prometheus": clogged_prometheus, "mqtt": clogged_mqtt}
WAITS = {"store"}
"""Sinks that are lossless by design: their pressure reaches the ring (docs/design/008-pipeline.md)."""


def of(makers):
    return pytest.mark.parametrize("make", makers.values(), ids=makers)


def test_every_sink_has_its_makers():
    assert MAKERS.keys() - {"store"} == SINKS.keys()
    assert CLOGGED.keys() | WAITS == MAKERS.keys()
    assert all(getattr(Config().sinks, name) is not None for name in SINKS), "its table has its name"


@of(MAKERS)
def test_a_run(make, tmp_path):
    """A sink opens, writes, closes, closes again, and leaves nothing behind."""

    async def work():
        with make(tmp_path) as (sink, vitals):
            tasks = asyncio.all_tasks()
            await sink.open(header())
            for each in FIRST:
                await sink.write(each)
            await sink.aclose()
            assert all(account.imbalance == 0 and account.not_stored == 0 for account in vitals.accounts.values())
            assert all(account.stored == account.taken > 0 for account in vitals.accounts.values())
            assert asyncio.all_tasks() == tasks

    before = threading.active_count()
    asyncio.run(work())
    assert threading.active_count() == before


@of(MAKERS)
def test_a_run_without_results(make, tmp_path):
    async def work():
        with make(tmp_path) as (sink, _):
            await sink.open(header())
            await sink.aclose()

    asyncio.run(work())


@of(MAKERS)
def test_results_without_rows_and_with_new_devices(make, tmp_path):
    async def work():
        with make(tmp_path) as (sink, vitals):
            await sink.open(header())
            await sink.write(make_results(make_delays(0)))
            await sink.write(make_results(make_delays(10)))
            await sink.write(make_results(make_delays(30, containers=3), containers=3))
            await sink.aclose()
            assert all(account.stored == account.taken for account in vitals.accounts.values())

    asyncio.run(work())


@pytest.mark.slow
@of(CLOGGED)
def test_clogged_it_neither_waits_nor_grows(make, tmp_path):
    """A clogged sink buffers within bounds, counts dropped rows, and does not block the event loop."""

    async def work():
        with make(tmp_path) as (sink, vitals):
            turns = 0

            async def turn():
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0.001)

            turning = asyncio.create_task(turn())
            await sink.open(header())
            written = 0
            # 20 times the room of buffer and spool, while nothing is delivered.
            for _ in range(10):
                for each in MANY:
                    await sink.write(each)
                    written += len(each.rows.delays) + len(each.rows.windows)
                    for account in vitals.accounts.values():
                        assert account.imbalance == 0
                        assert account.buffer_peak <= 20_000
                        assert account.spool_bytes <= 1 << 20
                await asyncio.sleep(0.05)
            await sink.aclose()
            turning.cancel()
            for account in vitals.accounts.values():
                assert account.stored == 0
                assert account.taken == account.waiting + account.not_stored >= written
                assert account.dropped_spool + account.dropped_buffer > 0
                assert account.reasons
            assert turns >= 10  # once per pause above

    asyncio.run(work())


def test_the_endpoint_shows_a_database_that_is_away(tmp_path):
    """In a run with both sinks the endpoint shows the account of the database, and stays healthy and ready."""
    port = servers.free_port()

    def page(name):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=30) as response:
            return response.read().decode()

    async def work():
        with silent_server() as url:
            config = Config(
                sinks=SinksConfig(
                    influxdb=InfluxConfig(
                        url=url, spool=str(tmp_path), flush_interval_s=0.05, close_s=0.1, timeout_s=0.2
                    ),
                    prometheus=PrometheusConfig(listen=f"127.0.0.1:{port}"),
                )
            )
            vitals = Vitals()
            sinks = wanted_sinks(config, vitals)
            for sink in sinks:
                await sink.open(header())
            vitals.running = True
            for each in FIRST:
                vitals.got_on(items=1, results=2)
                for sink in sinks:
                    await sink.write(each)
            until = time.monotonic() + 60
            while not vitals.accounts["influxdb"].trouble and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            account = vitals.accounts["influxdb"]
            ready = json.loads(await asyncio.to_thread(page, "readyz"))
            assert ready["ok"]
            assert ready["sinks"]["influxdb"]["connected"] == 0
            assert ready["sinks"]["influxdb"]["trouble"].endswith("no answer within 0.2 s")
            assert json.loads(await asyncio.to_thread(page, "healthz"))["ok"]
            text = await asyncio.to_thread(page, "metrics")
            assert f'mace_sink_rows_waiting{{sink="influxdb"}} {float(account.waiting)}' in text
            assert 'mace_sink_connected{sink="influxdb"} 0.0' in text
            for sink in sinks:
                await sink.aclose()

    asyncio.run(work())


def test_sinks_have_the_protocols_methods():
    """Every sink has the protocol's three methods; static checkers do not see the table of sinks."""
    assert all(callable(getattr(EmbeddedStore, name)) for name in ("open", "write", "aclose"))
    assert {name for name in vars(Sink) if not name.startswith("_")} == {"open", "write", "aclose"}
