"""An ingest that tests feed with single messages, and messages that a malicious host can send.

The ingest is complete except for the connection: the test decides which messages it receives, in which order, and when
it is killed.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from zlib import crc32

import aiomqtt
import numpy as np

from contracts import wire
from contracts.clock import ClockPair
from contracts.config import Config, IngestConfig, MqttConfig, StoreConfig
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topics import Shard, stream_topic
from mace.live.ingest import Ingest
from storage.broker import Brokers, properties
from storage.query import StoreReader
from tests.made_capture import HEADER, TOPOLOGY, batches, encode, forge, stream_tag, to_json, traffic

HONEST, EVIL = "honest", "evil"
RECORDS = 2_000
ITEMS = [TOPOLOGY, *batches(traffic(RECORDS), 250)]
FRAMES = encode(ITEMS, replace(HEADER, host=HONEST, run="its run"))
EXTREMES = (0, 1, -1, (1 << 62), (1 << 63) - 1, -(1 << 63), HEADER.clock.monotonic_ns)


class Driven:
    """Successive ingests on one store, driven by a test."""

    def __init__(self, path, **ingest):
        self.path, self.config = path, IngestConfig(**ingest)
        self.runner = asyncio.Runner()
        self.start()

    def start(self):
        config = Config(store=StoreConfig(sync=False), mqtt=MqttConfig(broker="mqtt://127.0.0.1:9"), ingest=self.config)

        async def begun():
            ingest = Ingest(Brokers(config.mqtt), self.path, config, Shard())
            await ingest._recover(await ingest._store.hold("a test"))
            return ingest

        self.ingest = self.runner.run(begun())

    def hear(self, topic, payload, oldest="0", *, retain=False):
        """Receive a message from the broker; the message waits to be processed."""
        told = properties(oldest=oldest) if oldest is not None else None
        message = aiomqtt.Message(topic, payload, 1, retain, 1, told)
        [broker] = self.ingest._brokers.all
        self.inside(lambda: self.ingest._hear(message, broker))

    def send(self, host, payload, oldest="0", *, retain=False):
        """Receive a frame of a host and process it at once."""
        self.hear(stream_topic(host), payload, oldest, retain=retain)
        self.work()

    def work(self):
        """Process all waiting messages that are not held back."""

        def turns():
            while (found := self.ingest._turns.take(self.ingest._hosts.is_held)) is not None:
                host, message = found
                self.ingest.message(message)
                self.ingest._turns.charge(host, 0.001)

        self.inside(turns)

    def inside(self, work):
        async def within():
            work()

        self.runner.run(within())

    def next_of(self, host, stream):
        return self.ingest._hosts.next_of(host, stream)

    def flush(self):
        self.runner.run(self.ingest._flush())

    def sync(self):
        self.runner.run(self.ingest._sync())

    def kill(self):
        """Kill the ingest: unsynced data and everything in memory are lost."""

        async def gone():
            self.ingest._disk.shutdown(wait=True)
            self.ingest._journal.close()
            await self.ingest._store.let_go()

        self.runner.run(gone())

    def end(self):
        self.flush()
        self.kill()
        self.runner.close()

    def stored(self, host):
        """Return the stored run of a host, and its number of rows."""
        found = [run for run in StoreReader(self.path).runs() if run.host == host]
        return found[-1] if found else None


def evil_header(run="1", **changes):
    return encode([], replace(HEADER, host=EVIL, run=run, **changes), end=False)[0]


def of_stream(frame, header=None):
    """Return a frame as part of the stream of `header`, by default EVIL's first run."""
    head = wire.parse_head(frame)
    payload = frame[wire.HEAD_SIZE :]
    stored = payload if head.compressed else None
    return forge(
        head.message,
        b"" if head.compressed else payload,
        stored=stored,
        raw_size=head.raw,
        stream=stream_tag(header or evil_header()),
        sequence=head.sequence,
    )


def frame(message, raw, sequence, header=None):
    return forge(message, raw, stream=stream_tag(header or evil_header()), sequence=sequence)


def topology(sequence, from_ns=0, devices=(), sightings=(("", 0, 0),), first=0, header=None):
    """Return a TOPOLOGY frame with arbitrary content."""
    told = {
        "from_ns": from_ns,
        "host_netns": 1,
        "devices": list(devices),
        "first_sighting": first,
        "sightings": [list(each) for each in sightings],
    }
    return frame(wire.FrameKind.TOPOLOGY, to_json(told), sequence, header)


def batch(sequence, ts_ns, *, before=0, header=None, **columns):
    """Return a BATCH frame with arbitrary records, in any order."""
    made = Batch.of(len(ts_ns), ts_ns=np.array(ts_ns, np.int64), **columns)
    return frame(wire.FrameKind.BATCH, wire._batch_payload(made, before), sequence, header)


def constant(sequence, count, *, before=0, ts_ns=HEADER.clock.monotonic_ns, hook=Hook.NET_DEV_QUEUE, step_ns=0):
    """Return a BATCH frame of few bytes with `count` records."""
    ts = ts_ns + step_ns * np.arange(count)
    return batch(sequence, ts, before=before, hook=np.full(count, hook), skb_id=np.full(count, 7, np.uint64))


def tampered(given, at, bit):
    """Return the frame with a flipped bit and matching checksums, as only a hostile writer can make it."""
    head = wire.parse_head(given)
    raw = bytearray(given[wire.HEAD_SIZE :])
    if not raw:
        return given
    raw[at % len(raw)] ^= 1 << bit
    if head.compressed:
        return forge(
            head.message, b"", stored=bytes(raw), raw_size=head.raw, stream=head.stream, sequence=head.sequence
        )
    stream = crc32(bytes(raw)) if head.message is wire.FrameKind.HEADER else head.stream
    return forge(head.message, bytes(raw), stream=stream, sequence=head.sequence)


CLOCK_OF_2191 = ClockPair(HEADER.clock.monotonic_ns, 7_000_000_000_000_000_000, 1)
CLOCK_AT_THE_END = ClockPair((1 << 63) - 1, HEADER.clock.utc_ns, 1)
