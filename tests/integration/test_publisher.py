"""A host publishes over a real broker despite rivals, forged acknowledgements and a spool with foreign frames."""

import asyncio
import json
import logging
import subprocess
from contextlib import suppress
from dataclasses import replace
from zlib import crc32

import pytest

from contracts.clock import ClockPair
from contracts.config import Config, MqttConfig, StoreConfig
from contracts.errors import StoreError
from contracts.hooks import Hook
from contracts.topics import Ack, Refusal, Shard, ack_topic, status_topic, stream_topic
from contracts.wire import (
    HEAD,
    HEAD_SIZE,
    MAX_BATCH_BYTES,
    MAX_JSON_BYTES,
    MAX_RECORDS,
    WIRE_VERSION,
    Encoder,
    parse_head,
)
from mace.live.ingest import Ingest
from storage import mqtt
from storage.broker import Broker, Brokers, MqttError
from storage.mqtt import StreamPublisher
from storage.query import StoreReader
from storage.spool import Frame, Spool
from tests.brokers import Authority, documented_acl, free_port, mosquitto
from tests.hostile import batch
from tests.made_capture import HEADER, TOPOLOGY, batches, encode, traffic
from tests.places import ROOT

pytestmark = pytest.mark.needs("mosquitto", "openssl")

DEPLOYED = ROOT / "deploy" / "mosquitto" / "mosquitto.conf"
WITHIN_S = 60


def settings(url, **mqtt_settings):
    return Config(store=StoreConfig(flush_interval_s=0.2, sync=False), mqtt=MqttConfig(broker=url, **mqtt_settings))


def header(host="measured.example", run="5f2b7c9e"):
    return replace(HEADER, host=host, run=run)


def publisher(url, spool, config=None, **options):
    options = {"max_bytes": 64 << 20, "interval_s": 0.02, "drain_s": WITHIN_S} | options
    return StreamPublisher(Brokers((config or settings(url)).mqtt), spool, **options)


async def write(sink, items):
    for item in items:
        await sink.write(item)


async def until(condition):
    async with asyncio.timeout(WITHIN_S):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in another process)
            await asyncio.sleep(0.02)


class Ingesting:
    """Run an ingest in this process for the duration of the block."""

    def __init__(self, url, store, config=None):
        config = config or settings(url)
        self._ingest = Ingest(Brokers(config.mqtt), store, config, Shard())
        self._stop = asyncio.Event()

    async def __aenter__(self):
        self._running = asyncio.create_task(self._ingest.run(self._stop))
        await self._ingest.listening.wait()
        return self._ingest

    async def __aexit__(self, *_):
        self._stop.set()
        await self._running


def balanced(sink):
    """Check that each record is in exactly one category, while the thread that moves records moves none."""
    try:
        state = sink._thread.submit(sink.state).result()
    except RuntimeError:  # the sink is closed, and its thread has ended
        state = sink.state()
    assert sink.left_before + state.records == state.arrived + state.waiting + state.discarded + state.set_aside
    return state


# Two hosts of one name --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hosts_of_one_name_are_reported_and_do_not_reconnect_in_turns(tmp_path, monkeypatch, caplog):
    """The second pause takes a minute, so that the test sees the behaviour of a long time."""
    monkeypatch.setattr(mqtt, "_TAKEN_OVER_S", (0.2, 60.0, 600.0))
    items = [TOPOLOGY, *batches(traffic(2_000, 1), 100)]

    async def work(broker):
        sinks = [publisher(broker.url, tmp_path / name, drain_s=0) for name in ("a", "b")]
        for number, sink in enumerate(sinks):
            await sink.open(header(run=f"run-{number}"))
            await until(lambda sink=sink: sink.state().connected)
        await until(lambda: all(sink.taken_over for sink in sinks))
        await write(sinks[0], items)
        await asyncio.sleep(2)
        told = [sink.state().trouble for sink in sinks]
        for sink in sinks:
            await sink.aclose()
        return sinks, told

    with mosquitto(tmp_path / "broker") as broker, caplog.at_level(logging.WARNING):
        sinks, told = asyncio.run(work(broker))
        takeovers = broker.log.read_text().count("already connected, closing old connection")
        assert takeovers == 3
    assert sorted(sink.taken_over for sink in sinks) == [1, 2]
    warnings = [r.getMessage() for r in caplog.records if "another client took over the session" in r.getMessage()]
    assert len(warnings) == 3
    assert all("0x8E" in told and "[run] host" in told and "measured.example" in told for told in warnings)
    assert sum("[run] host" in each for each in told) == 1  # the other host is connected
    assert balanced(sinks[0]).waiting == 2_000


def test_a_rival_that_says_late_that_it_is_online_is_recognised(tmp_path, caplog):
    """A broker that ends a session without a reason first publishes its last will, and then what the rival says."""
    status = json.dumps({"state": "online", "host": "measured.example", "run": "rival"})

    async def work(broker):
        sink = publisher(broker.url, tmp_path / "spool", drain_s=0)
        await sink.open(header())
        await until(lambda: sink.state().connected)
        async with Brokers(settings(broker.url).mqtt).of("").connection("mace-measured.example") as rival:
            await until(lambda: not sink.state().connected)
            await asyncio.sleep(0.3)
            await rival.publish(status_topic("measured.example"), status, qos=1, retain=True)
            await until(lambda: sink.taken_over)
        await sink.aclose()

    with mosquitto(tmp_path / "broker") as broker, caplog.at_level(logging.WARNING):
        asyncio.run(work(broker))
    assert ["[run] host" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.slow
def test_pauses_between_broken_connections_grow(tmp_path, monkeypatch):
    """The pauses between connections grow, also if a broker ends connections without a reason."""
    pauses = []

    async def served(self, client):
        raise mqtt.MqttError("gone")

    real = mqtt.retry_after_s
    monkeypatch.setattr(mqtt, "_LOOK_S", 0.05)
    monkeypatch.setattr(StreamPublisher, "_serve", served)
    monkeypatch.setattr(mqtt, "retry_after_s", lambda attempt, chance: pauses.append(real(attempt, 0)) or 0.01)

    async def work(broker):
        sink = publisher(broker.url, tmp_path / "spool", drain_s=0)
        await sink.open(header())
        await until(lambda: len(pauses) >= 8)
        await sink.aclose()

    with mosquitto(tmp_path / "broker") as broker:
        asyncio.run(work(broker))
    assert pauses[:8] == sorted(pauses[:8])
    assert pauses[7] == 5


# The deployed broker configuration --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_host_cannot_disconnect_another(tmp_path):
    """In the deployed configuration the name at the broker is the certificate's, whatever the client claims."""
    authority = Authority(tmp_path / "certs")
    for name in ("localhost", "host-a", "host-b", "ingest"):
        authority.sign(name)
    (tmp_path / "acl").write_text(documented_acl())
    own = ("listener", "cafile", "certfile", "keyfile", "acl_file", "#", "log_dest")
    lines = [line for line in DEPLOYED.read_text().splitlines() if line.strip() and not line.startswith(own)]
    assert "use_username_as_clientid true" in lines

    def known_as(broker, name):
        files = {"cert_file": str(authority.file(f"{name}.crt")), "key_file": str(authority.file(f"{name}.key"))}
        return settings(broker.url, ca_file=str(authority.ca), **files)

    items = [TOPOLOGY, *batches(traffic(4_000, 1), 200)]

    async def work(broker):
        async with Ingesting(broker.url, tmp_path / "store", known_as(broker, "ingest")) as ingest:
            sink = publisher(broker.url, tmp_path / "a", known_as(broker, "host-a"))
            await sink.open(header("host-a"))
            await until(lambda: sink.state().connected)
            rude = Broker(known_as(broker, "host-b").mqtt)
            for item in items:
                await sink.write(item)
                async with rude.connection("mace-host-a"):
                    pass
                async with rude.connection("host-a"):
                    pass
            await sink.aclose()
            return sink, ingest.counts

    with mosquitto(tmp_path / "broker", *lines, f"acl_file {tmp_path / 'acl'}", tls=authority) as broker:
        sink, counts = asyncio.run(work(broker))
    assert (sink.arrived, sink.taken_over, sink.restarts) == (4_000, 0, 1)
    assert (counts.records, counts.refused) == (4_000, 0)


@pytest.mark.slow
def test_a_message_beyond_the_deployed_limit_is_refused(tmp_path):
    limit = next(line for line in DEPLOYED.read_text().splitlines() if line.startswith("message_size_limit"))
    most = int(limit.split()[1])
    # A topology is the largest frame, because batches are cut at a number of records.
    assert most >= MAX_JSON_BYTES + HEAD_SIZE
    assert most >= mqtt.BATCH_RECORDS * MAX_BATCH_BYTES // MAX_RECORDS + HEAD_SIZE

    async def work(broker):
        plain = Broker(settings(broker.url).mqtt)
        async with plain.connection() as listener:
            await listener.subscribe(stream_topic("h"), qos=1)
            for size in (most, most + 1, 1):
                async with plain.connection() as client:
                    with suppress(MqttError):  # mosquitto does not even answer
                        await client.publish(stream_topic("h"), bytes(size), qos=1, timeout=2)
            sizes = []
            while not sizes or sizes[-1] != 1:
                sizes.append(len((await anext(aiter(listener.messages))).payload))
            return sizes

    with mosquitto(tmp_path / "broker", "allow_anonymous true", limit) as broker:
        assert asyncio.run(work(broker)) == [most, 1]


# Acknowledgements. ------------------------------------------------------------------------------------------------


def test_a_false_acknowledgement_covers_sent_frames_only(tmp_path, caplog):
    """A false acknowledgement of the whole stream, without an ingest, removes sent frames only."""
    items = [TOPOLOGY, *batches(traffic(6_000, 1), 100)]
    tag = parse_head(Encoder().header(header())).stream

    async def work(broker):
        sink = publisher(broker.url, tmp_path / "spool", drain_s=0)
        await sink.open(header())
        for item in items:
            await sink.write(item)
            await sink._flush()  # a frame for each batch
        await until(lambda: sink.sent_bytes > 0)
        async with Broker(settings(broker.url).mqtt).connection() as forger:
            await forger.publish(ack_topic(HEADER.host), Ack(tag, 2**64 - 1).to_bytes(), qos=1)
        await until(lambda: sink.disbelieved)
        state = balanced(sink)
        await sink.aclose()
        return sink, state

    with mosquitto(tmp_path / "broker") as broker, caplog.at_level(logging.WARNING):
        sink, state = asyncio.run(work(broker))
    assert 0 < state.arrived <= 100 * mqtt._WINDOW_LEAST
    assert sink.waiting == 6_000 - sink.arrived
    (told,) = [r.getMessage() for r in caplog.records if "acknowledged" in r.getMessage()]
    assert "only sent frames count as acknowledged" in told


# Frames that cannot be sent. --------------------------------------------------------------------------------------


def of_another_version(frame):
    fields = list(HEAD.unpack_from(frame))
    fields[1] = WIRE_VERSION + 1
    return repacked(fields, frame)


def of_an_unknown_kind(frame):
    fields = list(HEAD.unpack_from(frame))
    fields[2] = 99
    return repacked(fields, frame)


def of_a_stream_without_a_beginning(frame):
    fields = list(HEAD.unpack_from(frame))
    fields[5] ^= 1
    return repacked(fields, frame)


def repacked(fields, frame):
    head = HEAD.pack(*fields)[:-4]
    return head + crc32(head).to_bytes(4, "little") + frame[HEAD.size :]


STRANGE = [
    of_another_version,
    of_an_unknown_kind,
    of_a_stream_without_a_beginning,
    lambda frame: b"",
    lambda frame: b"garbage" * 100,
    lambda frame: frame[:-1],
    lambda frame: frame + b"x",
    lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]),
    lambda frame: frame[:20],
]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "between", "behind"])
def test_frames_that_cannot_be_sent_are_set_aside_and_the_others_arrive(tmp_path, caplog, place):
    items = [TOPOLOGY, *batches(traffic(2_000, 1), 200)]
    frames = encode(items, header())
    spool = Spool(tmp_path / "spool", max_bytes=64 << 20, memory_bytes=1 << 20)

    def strange():
        for make in STRANGE:
            spool.append(Frame(make(frames[3]), 7))

    # The spool of a killed run, with foreign frames in it.
    spool.open()
    if place == "before":
        strange()
    for number, frame in enumerate(frames[1:-1]):
        spool.append(Frame(frame, 200 if number else 0))
        if place == "between" and number == 4:
            strange()
    if place == "behind":
        strange()
    spool.close()
    (tmp_path / "spool" / "streams").mkdir()
    tag = parse_head(frames[0]).stream
    (tmp_path / "spool" / "streams" / f"{tag:08x}.context").write_bytes(frames[0])
    (tmp_path / "spool" / "notes.frames").write_bytes(b"not a spool's")
    again = [TOPOLOGY, *batches(traffic(1_000, 2), 200)]

    async def work(broker):
        async with Ingesting(broker.url, tmp_path / "store") as ingest:
            sink = publisher(broker.url, tmp_path / "spool")
            await sink.open(header(run="another"))
            await write(sink, again)
            await sink.aclose()
            return sink, ingest.counts

    with mosquitto(tmp_path / "broker") as broker, caplog.at_level(logging.WARNING):
        sink, counts = asyncio.run(work(broker))
    state = balanced(sink)
    assert (state.arrived, state.waiting, state.set_aside) == (3_000, 0, 7 * len(STRANGE))
    assert (counts.records, counts.refused, counts.missing) == (3_000, 0, 0)
    kept = [path.read_bytes() for path in (tmp_path / "spool" / "set-aside").iterdir()]
    assert sorted(kept) == sorted(make(frames[3]) for make in STRANGE)
    assert "cannot be sent and is set aside" in caplog.text


# Frames that the ingest refuses. ----------------------------------------------------------------------------------


def left_in_spool(path, frames, rows):
    """Fill the spool like a killed run: a HEADER, then frames with these numbers of rows."""
    spool = Spool(path, max_bytes=64 << 20, memory_bytes=1 << 20)
    spool.open()
    for frame, count in zip(frames[1:], rows, strict=True):
        spool.append(Frame(frame, count))
    spool.close()
    (path / "streams").mkdir()
    tag = parse_head(frames[0]).stream
    (path / "streams" / f"{tag:08x}.context").write_bytes(frames[0])


def published_after(tmp_path, frames, rows, within=lambda sink: True, **options):
    """Publish a run of 1,000 records after the remaining frames; return the publisher and the ingest's counts."""
    left_in_spool(tmp_path / "spool", frames, rows)

    async def work(broker):
        async with Ingesting(broker.url, tmp_path / "store") as ingest:
            sink = publisher(broker.url, tmp_path / "spool", **options)
            await sink.open(header(run="another"))
            await write(sink, [TOPOLOGY, *batches(traffic(1_000, 2), 200)])
            await until(lambda: within(sink))
            await sink.aclose()
            return sink, ingest.counts

    with mosquitto(tmp_path / "broker") as broker:
        return asyncio.run(work(broker))


def refused_batch(frames, number):
    """Return a frame with this number that replaces a batch of 200; its time is years away."""
    before = (number - 2) * 200
    years_away = [HEADER.clock.monotonic_ns + (1 << 62)]
    return batch(number, years_away, before=before, header=frames[0], hook=[Hook.NET_DEV_QUEUE])


@pytest.mark.slow
def test_a_frame_that_the_ingest_refuses_is_set_aside_and_the_others_arrive(tmp_path, caplog):
    frames = encode([TOPOLOGY, *batches(traffic(2_000, 1), 200)], header())
    frames[5] = refused_batch(frames, 5)
    frames[8] = refused_batch(frames, 8)
    with caplog.at_level(logging.WARNING):
        sink, counts = published_after(tmp_path, frames, [0, *[200] * 10, 0])
    state = balanced(sink)
    assert (state.arrived, state.waiting, state.set_aside) == (2_600, 0, 400)
    # Behind each of the two gaps is a marker for each CPU.
    assert (counts.records, counts.missing, counts.gaps) == (2_600 + 2 * HEADER.cpus, 400, 2)
    kept = sorted(path.read_bytes() for path in (tmp_path / "spool" / "set-aside").iterdir())
    assert kept == sorted([frames[5], frames[8]])
    assert "set aside: the ingest refuses it: a time of" in caplog.text
    ledgers = {run.run: run.ledger for run in StoreReader(tmp_path / "store").runs()}
    assert (ledgers[header().run].records, ledgers[header().run].discarded) == (1_600, 400)
    assert (ledgers["another"].records, ledgers["another"].discarded) == (1_000, 0)


@pytest.mark.slow
def test_a_topology_that_the_ingest_refuses_is_not_sent_again(tmp_path):
    parts = batches(traffic(2_000, 1), 200)
    long = replace(TOPOLOGY.devices[-1], name="x" * 2_000)
    news = replace(TOPOLOGY, from_ns=int(parts[3].ts_ns[-1]) + 1, devices=(*TOPOLOGY.devices[:-1], long))
    frames = encode([TOPOLOGY, *parts[:4], news, *parts[4:]], header())
    sink, counts = published_after(tmp_path, frames, [0, *[200] * 4, 0, *[200] * 6, 0])
    state = balanced(sink)
    assert (state.arrived, state.waiting, sink.set_aside_frames) == (3_000, 0, 1)
    assert (counts.records, counts.missing) == (3_000, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"run": "r" * 2_000}, {"clock": ClockPair(HEADER.clock.monotonic_ns, 7_000_000_000_000_000_000, 1)}],
    ids=["name", "clock"],
)
def test_a_refused_run_does_not_block_the_next(tmp_path, changes):
    """The run's name is too long, or its time is in 2191, although the host's clock is right by now."""
    frames = encode([TOPOLOGY, *batches(traffic(2_000, 1), 200)], replace(header(), **changes))
    sink, counts = published_after(tmp_path, frames, [0, *[200] * 10, 0])
    state = balanced(sink)
    assert (state.arrived, state.waiting, state.set_aside) == (1_000, 0, 2_000)
    assert counts.records == 1_000


def test_frames_refused_by_one_of_two_clocks_wait(tmp_path, monkeypatch, caplog):
    """An ingest whose clock shows 1970 must not make a fleet discard its records."""
    monkeypatch.setattr(mqtt, "_CLOCKS_AGREE_NS", -1)
    ahead = ClockPair(HEADER.clock.monotonic_ns, 7_000_000_000_000_000_000, 1)
    frames = encode([TOPOLOGY, *batches(traffic(2_000, 1), 200)], replace(header(), clock=ahead))
    told = "its clock differs from this machine's"
    with caplog.at_level(logging.WARNING):
        sink, _ = published_after(
            tmp_path, frames, [0, *[200] * 10, 0], lambda sink: told in sink.state().trouble, drain_s=0
        )
    state = balanced(sink)
    assert (state.arrived, state.waiting, state.set_aside) == (0, 3_000, 0)
    assert caplog.text.count(told) == 1


def test_a_false_refusal_covers_sent_frames_only(tmp_path):
    """A false refusal of the whole stream, without an ingest, sets sent frames aside only."""
    tag = parse_head(Encoder().header(header())).stream
    refusal = Refusal(0, 2**64 - 1, "for no reason")

    async def work(broker):
        sink = publisher(broker.url, tmp_path / "spool", drain_s=0)
        await sink.open(header())
        for item in [TOPOLOGY, *batches(traffic(6_000, 1), 100)]:
            await sink.write(item)
            await sink._flush()
        await until(lambda: sink.sent_bytes > 0)
        async with Broker(settings(broker.url).mqtt).connection() as forger:
            for stream in (tag ^ 1, tag):
                await forger.publish(ack_topic(HEADER.host), Ack(stream, 0, refused=refusal).to_bytes(), qos=1)
        await until(lambda: sink.set_aside)
        state = balanced(sink)
        await sink.aclose()
        return state

    with mosquitto(tmp_path / "broker") as broker:
        state = asyncio.run(work(broker))
    assert 0 < state.set_aside <= 100 * mqtt._WINDOW_LEAST
    assert state.waiting == 6_000 - state.set_aside


def test_a_defect_in_the_background_ends_the_run(tmp_path, monkeypatch):
    """A defect in a background task raises an error in `write` and in `aclose`."""

    async def defect(self, client):
        raise RuntimeError("a defect")

    monkeypatch.setattr(StreamPublisher, "_serve", defect)

    async def work(broker):
        sink = publisher(broker.url, tmp_path / "spool")
        await sink.open(header())
        await until(sink._tasks[1].done)
        with pytest.raises(RuntimeError, match="a defect"):
            await sink.write(TOPOLOGY)
        with pytest.raises(RuntimeError, match="a defect"):
            await sink.aclose()

    with mosquitto(tmp_path / "broker") as broker:
        asyncio.run(work(broker))


# A full disk. -----------------------------------------------------------------------------------------------------


@pytest.mark.needs("root")
def test_after_a_full_disk_each_record_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mqtt, "_MEMORY_BYTES", 60_000)
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True)
    try:

        async def work():
            sink = publisher(f"mqtt://127.0.0.1:{free_port()}", place / "spool", drain_s=0)
            await sink.open(header())
            for item in [TOPOLOGY, *batches(traffic(200_000, 1), 2_000)]:
                await sink.write(item)
                await sink._flush()
            await sink.aclose()
            return sink

        sink = asyncio.run(work())
        state = balanced(sink)
        assert (state.records, state.arrived) == (200_000, 0)
        assert state.discarded > 0
        assert state.waiting > 0
        # The next run finds this run's account and cannot begin its own stream on the full disk: it reports that and
        # holds nothing.
        with pytest.raises(StoreError, match="No space left on device"):
            asyncio.run(publisher("mqtt://127.0.0.1:1", place / "spool").open(header(run="another")))
        found = Spool(place / "spool", max_bytes=64 << 20, memory_bytes=60_000)
        assert found.open() == state.waiting
        found.close()
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_state_has_the_account_of_waiting_records(tmp_path):
    async def work():
        sink = publisher(f"mqtt://127.0.0.1:{free_port()}", tmp_path / "spool", drain_s=0)
        await sink.open(header())
        await write(sink, [TOPOLOGY, *batches(traffic(1_000, 1), 500)])
        await until(lambda: "refused" in sink.state().trouble)
        state = balanced(sink)
        await sink.aclose()
        return state

    state = asyncio.run(work())
    assert (state.connected, state.answered, state.waiting) == (False, False, 1_000)
    assert json.dumps(state.trouble)
