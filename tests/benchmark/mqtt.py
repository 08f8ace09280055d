"""Transport over a broker: mosquitto, publisher and `mace ingest` as processes on one machine, over loopback.

mqtt_ingest                records/s, written by one publisher -> processed by the ingest, in its journal on the
disk, acknowledged; QoS 1, no rows
mqtt_ingest_rows           records/s like mqtt_ingest, with a row per packet and segment stored
mqtt_bytes_per_record      bytes received by the broker: frames, topics, acknowledgements
fleet_...                  1,000 simulated hosts of 1,000 records/s each, two shards, for some seconds
"""

import asyncio
import itertools
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow.parquet as pq

from contracts import clock
from contracts.config import MqttConfig
from contracts.records import Batch
from contracts.topics import OLDEST, Ack, ack_topic, stream_topic
from contracts.wire import HEAD, HEAD_SIZE, Encoder, parse_head
from storage import segments
from storage.broker import Broker, Brokers
from storage.mqtt import StreamPublisher
from storage.query import StoreReader
from storage.tables import REMAINDER, from_stored
from tests.benchmark.figures import MACE, cpu_s, figure, folder, peak_mib
from tests.benchmark.mqtt_hosts import KEEPALIVE_S, PINGREQ, HostConnection, packet, publish
from tests.brokers import Mosquitto, mosquitto
from tests.made_capture import HEADER, TOPOLOGY, traffic
from tests.places import ROOT

RECORDS = 4_000_000
BATCH = 50_000
ROUNDS = 5
AHEAD = 1_000_000
"""Largest number of records given to the publisher and not yet arrived; further ones wait, as they would in a ring."""

HOSTS, RATE, SECONDS = 1_000, 1_000, 12
WINDOW_LEAST, RESEND_S = 4, 3.0
LEAD_S = 6
"""Time from the first connection to the first record."""
BROKER = ("allow_anonymous true", "sys_interval 1", "max_queued_messages 0", "max_connections -1")


@contextmanager
def stopped_with_us() -> Iterator[None]:
    """Raise an exception on SIGTERM (of `timeout`, say), so that all processes started here end with this one."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ingest(broker: Mosquitto, store: Path, *args: str):
    argv = [*MACE, "ingest", "--broker", broker.url, "--store", str(store), "--json", *args]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)
        if process.stdout is not None:
            process.stdout.close()


def usage(process: subprocess.Popen[Any]) -> tuple[float, float]:
    """Return peak memory, MiB, and CPU time so far, s, of a process."""
    return peak_mib(process.pid), cpu_s(process.pid)


async def received(brokers: Brokers) -> int:
    """Return the bytes received by the broker's own count."""
    async with brokers.all[0].connection() as client:
        await client.subscribe("$SYS/broker/bytes/received")
        messages = client.messages
        # The first message is the previous count; the next one is current.
        await anext(messages)
        return int((await anext(messages)).payload)


# One host, at full speed -------------------------------------------------------------------------------------------


async def one_round(brokers: Brokers, spool: Path, run: str, whole: Batch) -> float:
    sink = StreamPublisher(brokers, spool, max_bytes=1 << 30, interval_s=0.05, drain_s=120)
    await sink.open(replace(HEADER, run=run))
    span = int(whole.ts_ns[-1] - whole.ts_ns[0]) + 1_000_000
    start = time.perf_counter()
    try:
        await sink.write(TOPOLOGY)
        for turn in range(RECORDS // len(whole)):
            moved = replace(whole, ts_ns=whole.ts_ns + turn * span)
            for first in range(0, len(moved), BATCH):
                await sink.write(moved[first : first + BATCH])
                await asyncio.sleep(0)
                while sink.records - sink.arrived > AHEAD:  # noqa: ASYNC110 (as a source waits for its poll)
                    await asyncio.sleep(0.002)
    finally:
        await sink.aclose()
    assert (sink.arrived, sink.discarded) == (RECORDS, 0), (sink.arrived, sink.discarded)
    return RECORDS / (time.perf_counter() - start)


def through() -> list[dict[str, Any]]:
    whole = traffic(1_000_000)
    found = []
    with stopped_with_us(), folder() as where, mosquitto(where / "broker", *BROKER) as server:
        brokers = Brokers(MqttConfig(broker=server.url))
        for name, args in (("mqtt_ingest", ["--no-rows"]), ("mqtt_ingest_rows", [])):
            store = where / name
            rates = []
            with ingest(server, store, *args) as process:
                before = asyncio.run(received(brokers))
                for turn in range(ROUNDS + 1):
                    rates.append(asyncio.run(one_round(brokers, where / "spool", f"{name}-{turn}", whole)))
                size = (asyncio.run(received(brokers)) - before) / RECORDS / (ROUNDS + 1)
                peak, spent_s = usage(process)
            ledger = StoreReader(store).ledger()
            assert (ledger.records, ledger.discarded, ledger.imbalance) == (RECORDS * (ROUNDS + 1), 0, 0), ledger
            found.append(figure(name, "records/s", rates[1:]))
            found.append(figure(f"{name}_by_cpu", "records per CPU second", [RECORDS * (ROUNDS + 1) / spent_s]))
            found.append(figure(f"{name}_rss", "MiB", [peak]))
        found.append(figure("mqtt_bytes_per_record", "bytes", [size]))
    return found


# A fleet -----------------------------------------------------------------------------------------------------------


class SimulatedHost:
    """A host's side of the protocol with prepared frames, each due at its time (CLOCK_MONOTONIC, s).

    All hosts send the same records on clocks of their own: the HEADER relates each clock to UTC.
    """

    def __init__(self, number: int, frames: list[bytes], start: clock.ClockPair) -> None:
        self.name = f"host-{number:04d}"
        # Not all hosts publish at the same moment.
        phase_ns = (number * 618_033_989) % 1_000_000_000
        pair = clock.ClockPair(TOPOLOGY.from_ns, start.utc_ns + phase_ns, start.uncertainty_ns)
        header = replace(HEADER, host=self.name, run=f"fleet-{start.utc_ns}", clock=pair)
        self.header = Encoder().header(header)
        self.stream = parse_head(self.header).stream
        self.frames = frames
        first_s = (start.monotonic_ns + phase_ns) / 1e9
        self.due_s = [0.0, 0.0, *(first_s + turn + 1 for turn in range(SECONDS)), first_s + SECONDS]
        self.arrived = self.next = 0
        self.repeated = 0
        self.window = WINDOW_LEAST
        self.news = asyncio.Event()

    def frame(self, number: int) -> bytes:
        """Return a frame as part of this host's stream."""
        if not number:
            return self.header
        frame = self.frames[number]
        fields = HEAD.unpack_from(frame)
        head = HEAD.pack(*fields[:5], self.stream, *fields[6:])[:-4]
        return head + crc32(head).to_bytes(4, "little") + frame[HEAD_SIZE:]

    async def run(self, broker: Broker) -> None:
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(
            lambda: HostConnection(f"mace-{self.name}", ack_topic(self.name), self.hear), broker.host, broker.port
        )
        await link.ready
        topic, packets = stream_topic(self.name), 0
        told = pinged = time.monotonic()
        while self.arrived < len(self.frames):
            while self.next < min(len(self.frames), self.arrived + self.window) and self.is_due():
                packets += 1
                link.send(publish(topic, packets, OLDEST, "0", self.frame(self.next)))
                self.next += 1
                told = time.monotonic()
            now = time.monotonic()
            if self.next > self.arrived and now - told > RESEND_S:
                self.again(self.arrived)
                told = now
            if now - pinged > KEEPALIVE_S / 2:
                link.send(packet(PINGREQ, 0))
                pinged = now
            wait = 1.0 if self.next >= len(self.frames) or self.is_due() else self.due_s[self.next] - now
            self.news.clear()
            waking = loop.call_later(max(wait, 0.001), self.news.set)
            await self.news.wait()
            waking.cancel()
        link.close()

    def is_due(self) -> bool:
        return self.due_s[self.next] <= time.monotonic()

    def again(self, sequence: int) -> None:
        """Send again from a frame on, few frames at first, as `storage.mqtt` does."""
        self.repeated += 1
        self.next, self.window = sequence, WINDOW_LEAST

    def hear(self, payload: bytes) -> None:
        ack = Ack.parse(payload)
        self.arrived = max(self.arrived, ack.next)
        if ack.again and self.next > ack.next:
            self.repeated += 1
            self.next = ack.next
        self.news.set()


def one_second() -> Batch:
    """Return `RATE` records: round trips spread over a second, with times from 0."""
    made = traffic(RATE)
    trip = np.arange(RATE) // 20
    ts_ns = trip * (20 * 1_000_000_000 // RATE) + (made.ts_ns - made.ts_ns[0]) % 20_000
    return replace(made, ts_ns=np.sort(ts_ns))


def frames_of_a_host() -> list[bytes]:
    second = one_second()
    encoder = Encoder()
    moved = [replace(second, ts_ns=second.ts_ns + (TOPOLOGY.from_ns + n * 1_000_000_000)) for n in range(SECONDS)]
    return [encoder.header(HEADER), encoder.topology(TOPOLOGY), *map(encoder.batch, moved), encoder.end()]


def simulate(url: str) -> None:
    """Simulate all hosts in this process, and print a line of JSON when all records have arrived."""
    begun_s = time.process_time()
    frames = frames_of_a_host()
    now = clock.measure()
    lead_ns = LEAD_S * 1_000_000_000
    start = clock.ClockPair(now.monotonic_ns + lead_ns, now.utc_ns + lead_ns, now.uncertainty_ns)
    hosts = [SimulatedHost(number, frames, start) for number in range(HOSTS)]

    async def work() -> None:
        broker = Broker(MqttConfig(broker=url))
        async with asyncio.TaskGroup() as group:
            for host in hosts:
                group.create_task(host.run(broker))
                await asyncio.sleep(0)

    asyncio.run(work())
    took_s = (time.monotonic_ns() - start.monotonic_ns) / 1e9
    size, repeated = HOSTS * sum(map(len, frames)), sum(host.repeated for host in hosts)
    cpu_s = time.process_time() - begun_s
    print(json.dumps({"took_s": took_s, "bytes": size, "repeated": repeated, "cpu_s": cpu_s}))


def fleet() -> list[dict[str, Any]]:
    # Each host needs a descriptor, here and in the broker; child processes inherit the limit.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with stopped_with_us(), folder() as where, mosquitto(where / "broker", *BROKER) as server:
        stores = [where / "1", where / "2"]
        with ingest(server, stores[0], "--shard", "1/2") as one, ingest(server, stores[1], "--shard", "2/2") as two:
            argv = [sys.executable, "-c", f"from tests.benchmark import mqtt; mqtt.simulate({server.url!r})"]
            done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=400)
            told = json.loads(done.stdout)
            used = [usage(process) for process in (one, two)]
            broker_peak, broker_cpu_s = usage(server.process)
        ledgers = [StoreReader(store).ledger() for store in stores]
        waits = np.concatenate([wait_s(store) for store in stores])
    records = sum(ledger.records for ledger in ledgers)
    published = HOSTS * RATE * SECONDS
    lost = published - records + sum(ledger.discarded for ledger in ledgers)
    p50, p99, worst = np.quantile(waits, [0.5, 0.99, 1.0])
    return [
        figure("fleet_records_lost", "records", [lost]),
        figure("fleet_rate", "records/s", [published / told["took_s"]]),
        figure("fleet_queryable_p50", "s", [p50]),
        figure("fleet_queryable_p99", "s", [p99]),
        figure("fleet_queryable_max", "s", [worst]),
        figure("fleet_behind", "s", [told["took_s"] - SECONDS]),
        figure("fleet_ingest_rss", "MiB", [peak for peak, _ in used]),
        figure("fleet_ingest_cpu", "CPU seconds a million records", [1e6 * sum(s for _, s in used) / published]),
        figure("fleet_broker_rss", "MiB", [broker_peak]),
        figure("fleet_broker_cpu", "CPU seconds a million records", [1e6 * broker_cpu_s / published]),
        figure("fleet_hosts_cpu", "CPU seconds a million records", [1e6 * told["cpu_s"] / published]),
        figure("fleet_bytes_per_record", "bytes", [told["bytes"] / published]),
        figure("fleet_repeats", "requests", [told["repeated"]]),
    ]


def wait_s(store: Path) -> np.ndarray[Any, Any]:
    """Return for each row the time from its packet until its segment could be read."""
    found = []
    for each in segments.listing(store, "delays"):
        rows = from_stored(pq.read_table(each.path, columns=["time", REMAINDER], partitioning=None))
        # A rename changes the inode: from then on readers see the segment.
        found.append((each.path.stat().st_ctime_ns - rows["time"].cast("int64").to_numpy()) / 1e9)
    return np.concatenate(found)


def run() -> list[dict[str, Any]]:
    return list(itertools.chain(through(), fleet()))
