"""Resources of a deployment by the rate of one host's records: the table in docs/deploy.md.

sizing_RATE_SAMPLE_...    RATE records/s of one host, published at that pace, through mosquitto and `mace ingest` into
InfluxDB 1.6.7; of all packets one in SAMPLE has rows of its own (0: windows only)
  publish_cores           processor time of publishing, made-up traffic included
  mqtt_bytes              received by the broker, a second
  ingest_cores, ingest_mib
  influx_points           rows a second
  influx_cores, influx_mib
  store_bytes             a second, of the ingest's own store
sizing_disk_RATE_SAMPLE   bytes a second that InfluxDB takes on the disk, of a quarter of an hour of such traffic
from `mace replay`: in a shorter time the index of each file, a quarter of a megabyte, would be most of it
"""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from contracts import clock
from contracts.config import MqttConfig
from contracts.records import Batch
from storage.broker import Brokers
from storage.mqtt import StreamPublisher
from tests.benchmark.figures import MACE, figure, folder
from tests.benchmark.mqtt import BROKER, ingest, received, usage
from tests.brokers import mosquitto
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic
from tests.places import ROOT
from tests.servers import Influx

SECONDS = 10
CASES = ((1_000, 100), (10_000, 0), (10_000, 100), (10_000, 1), (100_000, 0), (100_000, 100), (100_000, 1))
STEP_S = 0.1
DISK_CASES = tuple((rate, sample) for rate in (1_000, 10_000, 100_000) for sample in (0, 100, 1))
DISK_S = 900
COMPACT_S = 12
"""Time until the server has written its cache to a file, which it does after five seconds without writes."""


def run() -> list[dict[str, Any]]:
    measured = [line for rate, sample in CASES for line in one(rate, sample)]
    return measured + [on_the_disk(rate, sample) for rate, sample in DISK_CASES]


def on_the_disk(rate: int, sample: int) -> dict[str, Any]:
    with folder() as where, database(where) as influx:
        capture, config = where / "made.mace", where / "replay.toml"
        capture.write_bytes(capture_bytes([TOPOLOGY, *batches(stretched(rate, DISK_S), 50_000)]))
        config.write_text(f'[sinks.influxdb]\nspool = "{where}/spool"\nsample = {sample}\n')
        argv = [*MACE, "replay", str(capture), "--influxdb", influx.url, "--config", str(config), "--json"]
        subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        time.sleep(COMPACT_S)
        return figure(f"sizing_disk_{rate}_{sample}", "bytes/s", [size(where / "influx/data/mace/autogen") / DISK_S])


def one(rate: int, sample: int) -> Iterator[dict[str, Any]]:
    measured: dict[str, float] = {}
    with folder() as where, database(where) as influx, mosquitto(where / "broker", *BROKER) as server:
        config = where / "ingest.toml"
        config.write_text(
            f'[sinks.influxdb]\nurl = "{influx.url}"\nspool = "{where}/spool"\nsample = {sample}\n'
            f"[correlate]\nrows = {'true' if sample else 'false'}\n"
        )
        brokers = Brokers(MqttConfig(broker=server.url))
        with ingest(server, where / "store", "--config", str(config)) as process:
            before = asyncio.run(received(brokers))
            of_influx, of_ingest = usage(influx.process)[1], usage(process)[1]
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            asyncio.run(publish(brokers, where / "publish", rate))
            took_s = time.perf_counter() - begin_s
            measured["publish_cores"] = (time.process_time() - begin_cpu_s) / took_s
            measured["mqtt_bytes"] = (asyncio.run(received(brokers)) - before) / SECONDS
            memory_mib, cpu_s = usage(process)
            measured["ingest_cores"], measured["ingest_mib"] = (cpu_s - of_ingest) / took_s, memory_mib
        memory_mib, cpu_s = usage(influx.process)
        measured["influx_cores"], measured["influx_mib"] = (cpu_s - of_influx) / took_s, memory_mib
        measured["influx_points"] = sum(influx.rows().values()) / SECONDS
        measured["store_bytes"] = size(where / "store/delays", where / "store/windows") / SECONDS
    units = {"cores": "cores", "mib": "MiB", "points": "points/s", "bytes": "bytes/s"}
    for name, value in measured.items():
        yield figure(f"sizing_{rate}_{sample}_{name}", units[name.rsplit("_", 1)[1]], [value])


async def publish(brokers: Brokers, spool: Path, rate: int) -> None:
    """Publish traffic of `SECONDS` in real time."""
    records = stretched(rate, SECONDS)
    now = clock.ClockPair(TOPOLOGY.from_ns, time.time_ns(), 0)
    sink = StreamPublisher(brokers, spool, max_bytes=1 << 30, drain_s=60)
    await sink.open(replace(HEADER, run=json.dumps([rate, os.getpid()]), clock=now))
    begin_s = time.monotonic()
    try:
        await sink.write(TOPOLOGY)
        step = max(int(rate * STEP_S), 1)
        for number, first in enumerate(range(0, len(records), step)):
            await asyncio.sleep(max(begin_s + number * STEP_S - time.monotonic(), 0))
            await sink.write(records[first : first + step])
    finally:
        await sink.aclose()
    assert (sink.arrived, sink.discarded) == (len(records), 0), (sink.arrived, sink.discarded)


def stretched(rate: int, seconds: int) -> Batch:
    """Return made-up traffic at a given rate."""
    records = traffic(rate * seconds)
    span_ns = int(records.ts_ns[-1] - records.ts_ns[0])
    relative = (records.ts_ns - records.ts_ns[0]) * (seconds * 1_000_000_000 / span_ns)
    return replace(records, ts_ns=TOPOLOGY.from_ns + relative.astype("i8"))


@contextmanager
def database(where: Path) -> Iterator[Influx]:
    os.environ["INFLUXDB_DATA_CACHE_SNAPSHOT_WRITE_COLD_DURATION"] = "5s"
    influx = Influx(where / "influx").start()
    try:
        yield influx
    finally:
        influx.stop()


def size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
