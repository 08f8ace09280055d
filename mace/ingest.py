"""`mace ingest`: many hosts' streams from a broker into one store.

    broker ──► judge ──► journal ──► engine of the host ──► flush ──► store ──► commit ──► journal
                            └──► acknowledgement to the host, once it is on the disk

Each host has an engine of its own, with bounded memory. A frame is acknowledged when the journal has it on the disk, so
a crash loses nothing that was acknowledged; what comes out of a crash is the store up to its last commit and the
journal behind it, from which the same rows are made once more, and only once (`storage.journal`). All in one event
loop: what waits for the disk does so in threads.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from collector.ftrace_source import keep_freed_memory
from collector.remote import Counts, Verdict
from correlator.engine import EngineConfig
from mace.broker import Broker, Connection, Message, MqttError, payload_of, retry_after_s, user_property
from mace.config import Config
from mace.errors import WireError
from mace.hosts import SLICE_NS, Hosts, RunKey
from mace.topics import OLDEST, ROOT, Ack, Shard, ack_topic, host_of_stream
from mace.vitals import Vitals
from mace.wire import Head, parse_head
from storage import SINKS
from storage.fleet import FleetStore, RunPart
from storage.journal import Commit, Journal, Kind, Place
from storage.shared import StreamOfSink

_LOG: Final = logging.getLogger(__name__)

ACK_INTERVAL_S: Final = 0.25
"""How often the journal is brought to the disk, and hosts are told."""
_AGAIN_S: Final = 1.0
"""A host is asked at most this often to send again: what is on its way meanwhile would be asked for twice."""
_SNAPSHOTS: Final = 16
"""Of the hosts that have one in an old file only, this part gets a new one at each flush."""
_AT_A_TIME: Final = 8
"""Messages that are worked on between two turns of other tasks: some ten milliseconds."""
_COLLECTED: Final = (50_000, 20, 100)
"""Python's search for cycles. A flush of a fleet makes and frees a hundred thousand windows, and no cycles; to look for
some at each 700 of them, as by default, takes a tenth of the time."""
_TROUBLE_TOLD: Final = 20
"""Refused messages that are logged; more are counted."""


class Ingest:
    """One ingest process. Raises `StoreError` when the store or the journal cannot go on."""

    def __init__(self, broker: Broker, store: Path, config: Config, shard: Shard) -> None:
        self._broker, self._config, self._shard = broker, config, shard
        kept = config.store
        self._store = FleetStore(
            store,
            fsync=kept.sync,
            max_age_s=kept.max_age_days * 86_400 or None,
            max_bytes=int(kept.max_size_gib * 2**30) or None,
        )
        self._journal = Journal(store / "ingest", fsync=kept.sync)
        # One thread, so that what is written is written in the order of asking, whoever is cancelled meanwhile.
        self._disk = ThreadPoolExecutor(1, "mace-journal")
        self._writing: asyncio.Future[None] | None = None
        """The last write that was asked for; all others are done before it."""
        self._ending = asyncio.Event()
        self._base: dict[str, int] = {}
        """File of the journal from which on a host's entries are still needed."""
        self._due: dict[str, tuple[int, bool]] = {}
        """Hosts to be told which frame is expected next: the stream, and whether frames are missing."""
        self._asked: dict[str, float] = {}
        engine = EngineConfig(
            timeout_ns=config.correlate.timeout_ms * 1_000_000,
            open_records=config.ingest.open_records,
            rows=config.correlate.rows,
        )
        self._hosts = Hosts(engine, self._store.knows)
        self.vitals = Vitals()
        self._sinks = [kind.make(config, self.vitals) for kind in SINKS.values() if kind.wanted(config)]
        self._streams: dict[RunKey, list[StreamOfSink]] = {}
        """Each run's stream of each sink."""
        self._committed_in = 0
        """File of the journal with the last COMMIT."""
        self.queue_peak = 0
        self.read_again = 0
        """Frames that were worked through once more at the start."""
        self.listening = asyncio.Event()
        """Subscribed at the broker, since the last connection."""

    @property
    def hosts(self) -> int:
        """Hosts that are known."""
        return len(self._hosts)

    @property
    def counts(self) -> Counts:
        """Of all hosts' messages since this process began."""
        return self._hosts.counts

    @property
    def rows_stored(self) -> int:
        """Rows of `delays` that this process has stored."""
        return self._store.rows_stored

    # Life. ----------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then what has come is stored and acknowledged."""
        newest = await self._store.hold(f"ingest of shard {self._shard}")
        opened = AsyncExitStack()
        try:
            await self._recover(newest)
            for sink in self._sinks:
                opened.push_async_callback(sink.aclose)
                await sink.open()
            self.vitals.running = True
            opened.callback(self.vitals.ended)
            receiving = asyncio.create_task(self._stay_connected(), name="ingest-receive")
            flushing = asyncio.create_task(self._flush_now_and_then(), name="ingest-flush")
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((receiving, flushing, stopping), return_when=asyncio.FIRST_COMPLETED)
                receiving.cancel()
                ended = await asyncio.gather(receiving, return_exceptions=True)
                # Not cancelled: a flush that has begun is brought to its end, then there is a last one.
                self._ending.set()
                await flushing
            finally:
                for task in (receiving, flushing, stopping):
                    task.cancel()
                await asyncio.gather(receiving, flushing, stopping, return_exceptions=True)
            if isinstance(ended[0], Exception):
                raise ended[0]
        finally:
            try:
                await self._sync()
            finally:
                self._disk.shutdown(wait=True)
                self._journal.close()
                await self._release(opened)

    async def _release(self, opened: AsyncExitStack) -> None:
        try:
            for stream in [stream for streams in self._streams.values() for stream in streams]:
                opened.push_async_callback(stream.aclose)
            await opened.aclose()
        finally:
            await self._store.let_go()

    async def _recover(self, newest: int) -> None:
        """Put the store back to its last commit, and work through what the journal has behind it."""
        earlier = self._journal.open()
        commit, bases = _last_commit(self._journal)
        commit = commit or Commit(newest, (0, 0), SLICE_NS)
        # What was cut in one way before is cut in the same way again, or results would be on the other side of `upto`.
        self._hosts.slice_ns = commit.slice_ns
        gone = self._store.put_back(commit.flush)
        for entry in self._journal.read():
            base = bases.get(entry.host)
            if entry.kind is Kind.COMMIT or (base is not None and entry.place < base):
                continue
            stored = entry.place < commit.upto
            if entry.kind is Kind.FRAME:
                self.read_again += 1
                self._hosts.work(entry.host, entry.payload, again=stored)
            elif entry.place == base:
                self._hosts.restore(entry.host, entry.payload)
            self._base.setdefault(entry.host, entry.place[0])
            if stored:
                self._hosts.forget_results(entry.host)
            await asyncio.sleep(0)
        self._hosts.counts = Counts()
        if earlier:
            found = len(self._hosts), self.read_again, gone
            _LOG.info("%d hosts, %d frames worked through again, %d segments put back", *found)
        self._commit(commit.flush, commit.upto)
        self._committed_in = self._journal.place[0]
        await self._sync()
        self._due = {host: (stream, True) for host, stream in self._hosts.streams().items()}

    # Broker -> journal, engines. ------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        attempt = 0
        while True:
            try:
                connection = self._broker.connection(queue=self._config.ingest.queue_messages)
                async with connection as client:
                    attempt = 0
                    await self._serve(client)
            except MqttError as error:
                level = logging.WARNING if attempt == 0 else logging.DEBUG
                _LOG.log(level, "%s: %s; the hosts keep what they measure", self._broker.address, error)
            self.listening.clear()
            attempt += 1
            await asyncio.sleep(retry_after_s(attempt, random.random()))

    async def _serve(self, client: Connection) -> None:
        filters = [(name, 1) for name in self._shard.filters()]
        answers = await client.subscribe([*filters, (f"{ROOT}/+/status", 0)])
        refused = [name for (name, _), answer in zip(filters, answers, strict=False) if _is_failure(answer)]
        if refused:
            _LOG.error("the broker does not let us subscribe to %s (and %d more)", refused[0], len(refused) - 1)
        _LOG.info("%s: shard %s, listening", self._broker.address, self._shard)
        self.listening.set()
        work = [asyncio.create_task(self._receive(client)), asyncio.create_task(self._tell_now_and_then(client))]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _receive(self, client: Connection) -> None:
        messages = client.messages
        async for message in messages:
            self.queue_peak = max(self.queue_peak, len(messages))
            at_hand = [message]
            while at_hand:
                for each in at_hand:
                    self.message(each)
                # What waits is given out without waiting: other tasks must get their turn.
                await asyncio.sleep(0)
                self.queue_peak = max(self.queue_peak, len(messages))
                at_hand = list(client.at_hand(_AT_A_TIME))

    def message(self, message: Message) -> None:
        """Take a message from the broker."""
        topic = str(message.topic)
        payload = payload_of(message)
        if topic.endswith("/status"):
            self._greet(topic, payload)
            return
        try:
            host = host_of_stream(topic)
            if not self._shard.owns(host):
                raise WireError(f"host {host} is not of shard {self._shard}")
            head = parse_head(payload)
            oldest = user_property(message, OLDEST)
            self._judged(host, payload, head, int(oldest) if oldest.isascii() and oldest.isdigit() else 0)
        except WireError as error:
            self._refuse(topic, error)

    def _judged(self, host: str, frame: bytes, head: Head, oldest: int) -> None:
        match self._hosts.judge(host, head, oldest):
            case Verdict.KNOWN:
                self.counts.duplicates += 1
                self._due.setdefault(host, (head.stream, False))
            case Verdict.GAP | Verdict.UNKNOWN:
                self.counts.repeats += 1
                self._ask_again(host, head.stream)
            case Verdict.NEW | Verdict.BEGIN:
                self._hosts.work(host, frame)
                place = self._journal.append(Kind.FRAME, host, frame)
                self._base.setdefault(host, place[0])
                self._due[host] = (head.stream, False)

    def _greet(self, topic: str, payload: bytes) -> None:
        """A host that is there may not know that we are."""
        parts = topic.split("/")
        host = parts[2] if len(parts) == 4 else ""
        if host and host not in self._hosts and self._shard.owns(host) and b'"online"' in payload:
            self._due.setdefault(host, (0, True))

    def _ask_again(self, host: str, stream: int) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._asked.get(host, -_AGAIN_S) >= _AGAIN_S:
            self._asked[host] = now
            self._due[host] = (stream, True)

    def _refuse(self, topic: str, error: WireError) -> None:
        self.counts.refused += 1
        if self.counts.refused <= _TROUBLE_TOLD:
            _LOG.warning("%s: refused: %s", topic[:200], error)

    # Journal, store. ------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        """Bring to the disk what was appended so far, by whomever; a cancelled caller does not stop it.

        Raises `StoreError` if that failed, or anything before it: also where who asked for it was cancelled.
        """
        buffer = self._journal.taken()
        if buffer:
            self._writing = asyncio.get_running_loop().run_in_executor(self._disk, self._journal.sync, buffer)
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def _tell_now_and_then(self, client: Connection) -> None:
        while True:
            await asyncio.sleep(ACK_INTERVAL_S)
            due, self._due = self._due, {}
            words = [(host, Ack(tag, self._hosts.next_of(host, tag), again)) for host, (tag, again) in due.items()]
            await self._sync()
            for host, word in words:
                await client.publish(ack_topic(host), word.to_bytes(), qos=0)

    async def _flush_now_and_then(self) -> None:
        ended = False
        while not ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.store.flush_interval_s):
                    await self._ending.wait()
            # Asked before the flush: what came while one was under way needs another one.
            ended = self._ending.is_set()
            await self._flush()

    async def _flush(self) -> None:
        """Store what came out, note that in the journal, and let go of what no crash would need any more."""
        if self.listening.is_set():
            self.vitals.got_on(messages=self.queue_peak)
        elif not self.vitals.last_results_s:
            self.vitals.waits_for = f"{self._broker.address} has not answered yet"
        self.vitals.waits_for = "" if self.vitals.last_results_s else self.vitals.waits_for
        parts = self._hosts.take_parts()
        if not parts:
            return
        snapshots = self._snapshots()
        upto = self._journal.place
        await self._sync()
        flush = await self._store.flush(list(parts.values()))
        # Before the commit: after a crash a sink gets some results twice rather than not at all, and they are the same.
        for key, part in parts.items():
            await self._deliver(key, part)
        self._commit(flush, upto)
        self._committed_in = self._journal.place[0]
        await self._sync()
        self._store.settled(flush)
        self._base |= snapshots
        self._journal.forget_before(min([*self._base.values(), self._committed_in]))
        if self._journal.is_full and not self._is_writing and not self._journal.has_unsynced:
            self._journal.rotate()

    def _commit(self, flush: int, upto: Place) -> None:
        self._journal.commit(Commit(flush, upto, self._hosts.slice_ns))

    @property
    def _is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    async def _deliver(self, key: RunKey, part: RunPart) -> None:
        """Hand a run's results to the sinks besides the store; they buffer, and never wait for a server."""
        if not self._sinks:
            return
        if key not in self._streams:
            self._streams[key] = [sink.stream() for sink in self._sinks]
            for stream in self._streams[key]:
                await stream.open(part.header)
        if part.latest is not None:
            results = replace(part.latest, delays=part.delays, windows=part.windows)
            for stream in self._streams[key]:
                await stream.write(results)
        if part.closed or part.ended:
            for stream in self._streams.pop(key):
                await stream.aclose()

    def _snapshots(self) -> dict[str, int]:
        """Of some hosts that have none in the newest file; hosts and files."""
        newest = self._journal.place[0]
        old = sorted((file, host) for host, file in self._base.items() if file < newest)
        chosen = [host for _, host in old[: len(self._hosts) // _SNAPSHOTS + 1]]
        return {host: self._snapshot(host) for host in chosen}

    def _snapshot(self, host: str) -> int:
        return self._journal.append(Kind.SNAPSHOT, host, self._hosts.put_aside(host))[0]


def _last_commit(journal: Journal) -> tuple[Commit | None, dict[str, Place]]:
    """The last COMMIT, and each host's last snapshot before the place that it tells."""
    commit: Commit | None = None
    snapshots: list[tuple[str, Place]] = []
    for entry in journal.read():
        if entry.kind is Kind.COMMIT:
            commit = Commit.parse(entry.payload)
        elif entry.kind is Kind.SNAPSHOT:
            snapshots.append((entry.host, entry.place))
    if commit is None:
        return None, {}
    return commit, {host: place for host, place in snapshots if place < commit.upto}


def _is_failure(answer: Any) -> bool:
    return bool(getattr(answer, "is_failure", False))


# The command. -----------------------------------------------------------------------------------------------------


def serve(broker: Broker, store: Path, config: Config, shard: Shard, duration_s: float | None) -> dict[str, Any]:
    """Run until a signal, or for a time; what was counted."""
    keep_freed_memory()
    gc.set_threshold(*_COLLECTED)

    async def work() -> dict[str, Any]:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        if duration_s is not None:
            loop.call_later(duration_s, stop.set)
        ingest = Ingest(broker, store, config, shard)
        await ingest.run(stop)
        return {
            "shard": str(shard),
            "hosts": ingest.hosts,
            **asdict(ingest.counts),
            "rows_stored": ingest.rows_stored,
            "queue_peak": ingest.queue_peak,
            "sinks": {name: account.as_dict() for name, account in ingest.vitals.accounts.items()},
        }

    return asyncio.run(work())
