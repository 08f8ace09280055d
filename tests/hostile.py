"""An ingest that is given messages by hand, and what a host that means harm can send it.

All of the ingest is there but the connection: what it hears, in which order, and when it is killed, the test says.
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
from storage.broker import Broker, properties
from storage.query import StoreReader
from tests.made_capture import HEADER, TOPOLOGY, batches, encode, forge, stream_tag, to_json, traffic

HONEST, EVIL = "honest", "evil"
RECORDS = 2_000
ITEMS = [TOPOLOGY, *batches(traffic(RECORDS), 250)]
FRAMES = encode(ITEMS, replace(HEADER, host=HONEST, run="its run"))
EXTREMES = (0, 1, -1, (1 << 62), (1 << 63) - 1, -(1 << 63), HEADER.clock.monotonic_ns)


class Driven:
    """One ingest after the other on one store."""

    def __init__(self, path, **ingest):
        self.path, self.config = path, IngestConfig(**ingest)
        self.runner = asyncio.Runner()
        self.start()

    def start(self):
        config = Config(store=StoreConfig(sync=False), mqtt=MqttConfig(broker="mqtt://127.0.0.1:9"), ingest=self.config)

        async def begun():
            ingest = Ingest(Broker(config.mqtt), self.path, config, Shard())
            await ingest._recover(await ingest._store.hold("a test"))
            return ingest

        self.ingest = self.runner.run(begun())

    def hear(self, topic, payload, oldest="0", *, retain=False):
        """A message from the broker: it waits."""
        told = properties(oldest=oldest) if oldest is not None else None
        message = aiomqtt.Message(topic, payload, 1, retain, 1, told)
        self.inside(lambda: self.ingest._hear(message))

    def send(self, host, payload, oldest="0", *, retain=False):
        """A frame of a host, worked on at once."""
        self.hear(stream_topic(host), payload, oldest, retain=retain)
        self.work()

    def work(self):
        """All that waits and is not held up."""

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
        """What was not synced is gone, and so is all that was in memory."""

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
        """The run that is stored of a host, and how many rows it has."""
        found = [run for run in StoreReader(self.path).runs() if run.host == host]
        return found[-1] if found else None


def evil_header(run="1", **changes):
    return encode([], replace(HEADER, host=EVIL, run=run, **changes), end=False)[0]


def of_stream(frame, header=None):
    """A frame as one of the stream of `header`, which is EVIL's first run by default."""
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
    """A TOPOLOGY that says anything."""
    told = {
        "from_ns": from_ns,
        "host_netns": 1,
        "devices": list(devices),
        "first_sighting": first,
        "sightings": [list(each) for each in sightings],
    }
    return frame(wire.FrameKind.TOPOLOGY, to_json(told), sequence, header)


def batch(sequence, ts_ns, *, before=0, header=None, **columns):
    """A BATCH that says anything, its order included."""
    made = Batch.of(len(ts_ns), ts_ns=np.array(ts_ns, np.int64), **columns)
    return frame(wire.FrameKind.BATCH, wire._batch_payload(made, before), sequence, header)


def constant(sequence, count, *, before=0, ts_ns=HEADER.clock.monotonic_ns, hook=Hook.NET_DEV_QUEUE, step_ns=0):
    """A BATCH of some bytes that has as many records."""
    ts = ts_ns + step_ns * np.arange(count)
    return batch(sequence, ts, before=before, hook=np.full(count, hook), skb_id=np.full(count, 7, np.uint64))


def tampered(given, at, bit):
    """The frame with a bit turned, and checksums that are right again: what only a hostile writer does."""
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
