"""`mace ingest`: receives many hosts' streams from brokers and writes their results to one store.

    broker ──► turns ──► judge ──► engine of the host ──► journal
                                          │                  └──► acknowledgement to the host, once it is on the disk
                                          └──► flush ──► store ──► commit ──► journal

Each host has an engine of its own, with bounded memory. A frame is acknowledged when the journal has it on the disk, so
a crash loses no acknowledged frame. After a crash the store is put back to its last commit, and the frames that the
journal has after that commit are processed again, so that each row is stored exactly once (`storage.journal`). One
event loop does everything; threads wait for the disk.

No host's messages may harm the other hosts. A message that is no fitting frame is refused and changes nothing; the
hosts take turns (`mace.live.turns`); what is kept for each host is bounded (`collector.remote`, `mace.live.hosts`). Any
other error ends at `_border`: the host's run is given up, and the log says so.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from collector.memory import keep_freed_memory
from collector.remote import Arrival, Counts
from contracts.config import Config
from contracts.errors import AheadError, MaceError, NotNowError, StoreError, WireError
from contracts.results import Results
from contracts.topics import MAX_SEQUENCE, OLDEST, ROOT, Ack, Refusal, Shard, ack_topic, check_host, host_of_stream
from contracts.vitals import Vitals
from contracts.wire import FrameKind, Head, parse_head
from correlator.engine import EngineConfig
from mace.live.hosts import SLICE_NS, Hosts, RunKey
from mace.live.turns import Turns
from storage import SINKS
from storage.broker import (
    QUEUE_BYTES,
    Broker,
    Brokers,
    Connection,
    MqttError,
    MqttMessage,
    cancelled,
    is_failure,
    payload_of,
    retry_after_s,
    user_property,
)
from storage.fleet import FleetStore, RunPart
from storage.journal import Commit, Entry, EntryKind, Journal, JournalPosition
from storage.shared import StreamOfSink

_LOG: Final = logging.getLogger(__name__)

ACK_INTERVAL_S: Final = 0.25
"""Interval at which the journal is synchronised to the disk and acknowledgements are sent."""
_AGAIN_S: Final = 1.0
"""A host is asked to send again at most once in this time, so that frames on their way are not requested twice."""
_SNAPSHOTS: Final = 16
"""At each flush, one in so many hosts gets a new snapshot, among those whose snapshot is in an old file."""
_AT_A_TIME: Final = 8
"""Messages that are received before other tasks have a turn."""
_YIELD_S: Final = 0.01
"""Time of work before other tasks have a turn."""
_COLLECTED: Final = (50_000, 20, 100)
"""Thresholds of Python's search for reference cycles. A flush of a fleet makes and frees a hundred thousand windows and
no cycles; with the default threshold of 700 objects the search takes a tenth of the time."""
_MESSAGE_BYTES: Final = 1 << 10
"""Approximate memory of a message besides its payload."""
_HOST_LENGTH: Final = 80
_TOLD_OF: Final = 10_000
"""Most hosts whose refused messages are counted separately. The log reports the 1st, 2nd, 4th, 8th, ... of a host."""


class Ingest:
    """One ingest process. Raises `StoreError` when the store or the journal cannot be written."""

    def __init__(self, brokers: Brokers, store: Path, config: Config, shard: Shard) -> None:
        self._brokers, self._config, self._shard = brokers, config, shard
        kept = config.store
        self._store = FleetStore(
            store,
            fsync=kept.sync,
            max_age_s=kept.max_age_s,
            max_bytes=kept.max_bytes,
        )
        self._journal = Journal(store / "ingest", fsync=kept.sync)
        # One thread, so that writes keep the order of their requests even if a requester is cancelled.
        self._disk = ThreadPoolExecutor(1, "mace-journal")
        self._writing: asyncio.Future[None] | None = None
        """The last requested write; all others end before it."""
        self._ending = asyncio.Event()
        self._base: dict[str, int] = {}
        """First file of the journal whose entries are still needed, by host."""
        self._due: dict[str, tuple[int, bool]] = {}
        """Hosts that get an acknowledgement next: the stream's tag, and whether frames are missing."""
        self._asked: dict[str, float] = {}
        self._refusals: dict[str, tuple[int, Refusal]] = {}
        """Hosts that get a refusal next: the stream's tag, and the refused frames."""
        self._turned_away: dict[str, tuple[int, type[WireError], str]] = {}
        """Each host's last stream whose HEADER was refused, and why; its other frames are refused likewise."""
        self._refused: dict[str, int] = {}
        """Number of each host's refused messages, for the log."""
        self._turns: Turns[MqttMessage] = Turns(config.ingest.queue_messages, QUEUE_BYTES)
        self._stirred = asyncio.Event()
        """Set when a message arrives, when one has been processed, and by each flush."""
        engine = EngineConfig(
            timeout_ns=config.correlate.timeout_ms * 1_000_000,
            open_records=config.ingest.open_records,
            rows=config.correlate.rows,
            stages=config.correlate.cpus,
        )
        self._hosts = Hosts(engine, self._store.knows, config.ingest.hosts)
        self.vitals = Vitals()
        self._sinks = [kind.make(config, self.vitals) for kind in SINKS.values() if kind.wanted(config)]
        self._streams: dict[RunKey, list[StreamOfSink]] = {}
        """The streams of each run, one per sink."""
        self._committed_in = 0
        """File of the journal with the last COMMIT."""
        self.queue_peak = 0
        self.read_again = 0
        """Frames of the journal that were processed again at the start."""
        self.listening = asyncio.Event()
        """Set while connected to every broker and subscribed there."""
        self._away = {each.address for each in brokers.all}
        """Addresses of the brokers that are not connected."""
        self._via: dict[str, Broker] = {}
        """Brokers of hosts that publish elsewhere than the list of brokers says: an older or newer list sent them."""

    @property
    def hosts(self) -> int:
        """Number of known hosts."""
        return len(self._hosts)

    @property
    def counts(self) -> Counts:
        """Counters of all hosts' messages since this process started."""
        return self._hosts.counts

    @property
    def rows_stored(self) -> int:
        """Rows of `delays` that this process has stored."""
        return self._store.rows_stored

    # Life. ----------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; then store and acknowledge what has been received."""
        newest = await self._store.hold(f"ingest of shard {self._shard}")
        opened = AsyncExitStack()
        try:
            await self._recover(newest)
            for sink in self._sinks:
                opened.push_async_callback(sink.aclose)
                await sink.open()
            self.vitals.running = True
            opened.callback(self.vitals.ended)
            receiving = [
                asyncio.create_task(self._stay_connected(each), name="ingest-receive") for each in self._brokers.all
            ]
            working = asyncio.create_task(self._work(), name="ingest-work")
            flushing = asyncio.create_task(self._flush_now_and_then(), name="ingest-flush")
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((*receiving, working, flushing, stopping), return_when=asyncio.FIRST_COMPLETED)
                ended = await cancelled(*receiving, working)
                # The flushing task is not cancelled: it ends the flush under way, and then flushes once more.
                self._ending.set()
                await flushing
            finally:
                await cancelled(*receiving, working, flushing, stopping)
            for error in ended:
                if isinstance(error, Exception):
                    raise error
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
        """Put the store back to its last commit, and process the journal's frames after that commit again."""
        earlier = self._journal.open()
        commit, bases = _last_commit(self._journal)
        commit = commit or Commit(newest, (0, 0), SLICE_NS)
        # Slices must end where they ended before the crash; otherwise results would move across `upto`.
        self._hosts.slice_ns = commit.slice_ns
        gone = self._store.put_back(commit.flush)
        for entry in self._journal.read():
            base = bases.get(entry.host)
            if entry.kind == EntryKind.COMMIT or (base is not None and entry.position < base):
                continue
            stored = entry.position < commit.upto
            try:
                self._apply(entry, base, stored=stored)
            except StoreError:
                raise
            except Exception as error:  # noqa: BLE001 (one host's entry must not keep the others from starting)
                self._set_aside(entry, error)
            if stored:
                self._hosts.forget_results(entry.host)
            await asyncio.sleep(0)
        self._hosts.counts = Counts(set_aside=self.counts.set_aside)
        if earlier:
            found = len(self._hosts), self.read_again, gone
            _LOG.info("recovered %d hosts: %d frames processed again, %d uncommitted segments removed", *found)
        self._commit(commit.flush, commit.upto)
        self._committed_in = self._journal.position[0]
        await self._sync()
        self._due = {host: (stream, True) for host, stream in self._hosts.streams().items()}

    def _apply(self, entry: Entry, base: JournalPosition | None, *, stored: bool) -> None:
        """Apply an entry of the journal again: process a frame, or restore a host from its snapshot."""
        if entry.kind == EntryKind.FRAME:
            self.read_again += 1
            self._hosts.work(entry.host, entry.payload, before=True, again=stored)
        elif entry.kind != EntryKind.SNAPSHOT:
            raise WireError(f"the journal entry has kind {entry.kind}, which this version of MACE does not know")
        elif entry.position == base:
            self._hosts.restore(entry.host, entry.payload)
        self._base.setdefault(entry.host, entry.position[0])

    def _set_aside(self, entry: Entry, error: Exception) -> None:
        if not isinstance(error, WireError):
            self._hosts.give_up(entry.host, _told(error))
        path = self._journal.set_aside(entry)
        self.counts.set_aside += 1
        if (count := self._count(entry.host)) & (count - 1) == 0:
            _LOG.error(
                "host %s: a journal entry cannot be applied (%s) and is kept in %s (%d of this host so far)",
                *(entry.host[:80], _told(error), path, count),
            )

    # Broker -> journal, engines. ------------------------------------------------------------------------------

    async def _stay_connected(self, broker: Broker) -> None:
        attempt = 0
        queue = max(1, self._config.ingest.queue_messages // len(self._brokers.all))
        while True:
            try:
                async with broker.connection(queue=queue) as client:
                    attempt = 0
                    await self._serve(client, broker)
            except MqttError as error:
                level = logging.WARNING if attempt == 0 else logging.DEBUG
                _LOG.log(level, "%s: %s; retrying; its hosts spool their records meanwhile", broker.address, error)
            self._away.add(broker.address)
            self.listening.clear()
            attempt += 1
            await asyncio.sleep(retry_after_s(attempt, random.random()))

    async def _serve(self, client: Connection, broker: Broker) -> None:
        filters = [(name, 1) for name in self._shard.filters()]
        answers = await client.subscribe([*filters, (f"{ROOT}/+/status", 0)])
        refused = [name for (name, _), answer in zip(filters, answers, strict=False) if is_failure(answer)]
        if refused:
            _LOG.error("the broker refuses subscriptions: %s (and %d more)", refused[0], len(refused) - 1)
        _LOG.info("%s: shard %s, listening", broker.address, self._shard)
        self._away.discard(broker.address)
        if not self._away:
            self.listening.set()
        receiving = asyncio.create_task(self._receive(client, broker))
        work = [receiving, asyncio.create_task(self._tell_now_and_then(client, broker))]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await cancelled(*work)

    async def _receive(self, client: Connection, broker: Broker) -> None:
        messages = client.messages
        async for message in messages:
            at_hand = [message]
            while at_hand:
                for each in at_hand:
                    self._hear(each, broker)
                self.queue_peak = max(self.queue_peak, len(messages) + len(self._turns))
                # `at_hand` does not wait, so other tasks get their turn here.
                await asyncio.sleep(0)
                while self._turns.is_full:
                    # Messages that are not received stay with the broker.
                    self._stirred.clear()
                    await self._stirred.wait()
                at_hand = list(client.at_hand(_AT_A_TIME))

    def _hear(self, message: MqttMessage, broker: Broker) -> None:
        """Queue a host's message for its turn; greet a host on a status message; refuse any other topic."""
        topic = str(message.topic)
        try:
            if topic.endswith("/status"):
                self._greet(topic, payload_of(message), broker)
                return
            host = host_of_stream(topic)
        except WireError as error:
            self._refuse(topic[:_HOST_LENGTH], topic, error)
            return
        self._came_by(host, broker)
        self._turns.put(host, message, len(payload_of(message)) + _MESSAGE_BYTES)
        self.counts.let_fall = self._turns.let_fall
        self._stirred.set()

    async def _work(self) -> None:
        """Process the hosts' messages, in turns, as long as the ingest runs."""
        clock = time.perf_counter
        yielded_s = clock()
        while True:
            found = self._turns.take(self._hosts.is_held)
            if found is None:
                self._stirred.clear()
                await self._stirred.wait()
                yielded_s = clock()
                continue
            host, message = found
            began_s = clock()
            self.message(message)
            ended_s = clock()
            self._turns.charge(host, ended_s - began_s)
            self._stirred.set()
            if ended_s - yielded_s >= _YIELD_S:
                await asyncio.sleep(0)
                yielded_s = clock()

    def message(self, message: MqttMessage) -> None:
        """Process one message of a host's stream: judge the frame, feed the engine, append it to the journal."""
        topic = str(message.topic)
        host = host_of_stream(topic)
        with self._border(host, topic):
            if not self._shard.owns(host):
                raise NotNowError(f"host {host} does not belong to shard {self._shard}")
            if message.retain:
                raise WireError("the message is retained; frames of a stream are never retained")
            payload = payload_of(message)
            head, oldest = parse_head(payload), _oldest(user_property(message, OLDEST))
            try:
                self._judged(host, payload, head, oldest)
            except WireError as error:
                self._turn_away(host, head, error)
                raise

    def _turn_away(self, host: str, head: Head, error: WireError) -> None:
        """Note a refusal to send to the host, which would otherwise send the frame again for ever."""
        if isinstance(error, NotNowError) and not isinstance(error, AheadError):
            return  # this process may accept the frame later, or the process of the host's shard accepts it
        clock_utc_ns = time.time_ns() if isinstance(error, AheadError) else None
        refusal = Refusal(head.sequence, head.sequence, _told(error), clock_utc_ns)
        stream, before = self._refusals.get(host, (head.stream, refusal))
        self._refusals[host] = head.stream, before.with_next(refusal) if stream == head.stream else refusal
        if head.message is FrameKind.HEADER:
            if len(self._turned_away) >= _TOLD_OF:
                self._turned_away.clear()
            self._turned_away[host] = head.stream, type(error), str(error)

    @contextmanager
    def _border(self, host: str, topic: str) -> Iterator[None]:
        """Catch the errors of one host's messages or results: log and count them, so that the other hosts go on."""
        try:
            yield
        except WireError as error:
            self._refuse(host, topic, error)
        except StoreError:
            raise  # all hosts share the disk
        except Exception as error:  # noqa: BLE001 (the only such place; see the docstring)
            self._give_up(host, error)

    def _give_up(self, host: str, error: Exception, stream: int | None = None) -> None:
        _LOG.error("host %s: its run is given up and the rest of it refused: %s", host[:80], _told(error))
        _LOG.debug("host %s", host[:80], exc_info=error)
        self._hosts.give_up(host, _told(error), stream)

    def _judged(self, host: str, frame: bytes, head: Head, oldest: int) -> None:
        match self._hosts.judge(host, head, oldest):
            case Arrival.KNOWN:
                self.counts.duplicates += 1
                self._due.setdefault(host, (head.stream, False))
            case Arrival.UNKNOWN if (away := self._turned_away.get(host)) is not None and away[0] == head.stream:
                raise away[1](away[2])
            case Arrival.GAP | Arrival.UNKNOWN:
                self.counts.repeats += 1
                self._ask_again(host, head.stream)
            case Arrival.NEW | Arrival.BEGIN as verdict:
                runs = self._store.runs_of(host)
                if verdict is Arrival.BEGIN and runs >= self._config.ingest.runs:
                    raise NotNowError(f"the store has {runs} runs of this host, the limit ([ingest] runs)")
                self._hosts.work(host, frame)
                position = self._journal.append(EntryKind.FRAME, host, frame)
                self._base.setdefault(host, position[0])
                self._due[host] = (head.stream, False)

    def _greet(self, topic: str, payload: bytes, broker: Broker) -> None:
        """Ask a host that is online, and unknown here, to send its stream from the start."""
        parts = topic.split("/")
        host = check_host(parts[2] if len(parts) == 4 else "")
        if host not in self._hosts and self._shard.owns(host) and b'"online"' in payload:
            self._came_by(host, broker)
            self._due.setdefault(host, (0, True))

    def _came_by(self, host: str, broker: Broker) -> None:
        """Note through which broker a host is reached."""
        if broker is self._brokers.of(host):
            self._via.pop(host, None)
        elif host in self._via or len(self._via) < self._config.ingest.hosts:
            self._via[host] = broker

    def _is_by(self, host: str, broker: Broker) -> bool:
        return self._via.get(host) is broker or (host not in self._via and self._brokers.of(host) is broker)

    def _ask_again(self, host: str, stream: int) -> None:
        now = asyncio.get_running_loop().time()
        if len(self._asked) >= _TOLD_OF:
            self._asked = {each: at for each, at in self._asked.items() if now - at < _AGAIN_S}
        if now - self._asked.get(host, -_AGAIN_S) >= _AGAIN_S:
            self._asked[host] = now
            self._due[host] = (stream, True)

    def _refuse(self, host: str, topic: str, error: WireError) -> None:
        self.counts.refused += 1
        if (count := self._count(host)) & (count - 1) == 0:
            _LOG.warning("%s: refused: %s (%d of this host so far)", topic[:200], error, count)

    def _count(self, host: str) -> int:
        """Count one more refused or failed message of a host; returns the count."""
        if len(self._refused) >= _TOLD_OF:
            self._refused.clear()
        self._refused[host] = self._refused.get(host, 0) + 1
        return self._refused[host]

    # Journal, store. ------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        """Write all entries appended so far to the disk. Cancelling the caller does not cancel the write.

        Raises `StoreError` if this write or an earlier one failed, also an earlier one whose caller was cancelled.
        """
        buffer = self._journal.taken()
        if buffer:
            self._writing = asyncio.get_running_loop().run_in_executor(self._disk, self._journal.sync, buffer)
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def _tell_now_and_then(self, client: Connection, broker: Broker) -> None:
        while True:
            await asyncio.sleep(ACK_INTERVAL_S)
            words = self._words(broker)
            await self._sync()
            for host, word in words:
                await client.publish(ack_topic(host), word.to_bytes(), qos=0)

    def _words(self, broker: Broker) -> list[tuple[str, Ack]]:
        """Return the acknowledgements to send to a broker's hosts, and forget them.

        They may be sent once all entries appended so far are on the disk.
        """
        due = {host: told for host, told in self._due.items() if self._is_by(host, broker)}
        refusals = {host: told for host, told in self._refusals.items() if self._is_by(host, broker)}
        for host in due:
            del self._due[host]
        for host in refusals:
            del self._refusals[host]
        words = [(host, Ack(tag, self._hosts.next_of(host, tag), again)) for host, (tag, again) in due.items()]
        for host, (tag, refusal) in refusals.items():
            words.append((host, Ack(tag, self._hosts.next_of(host, tag), refused=refusal)))
        return words

    async def _flush_now_and_then(self) -> None:
        ended = False
        while not ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.store.flush_interval_s):
                    await self._ending.wait()
            # Read before the flush: frames that arrive during the last flush need one more.
            ended = self._ending.is_set()
            await self._flush()

    async def _flush(self) -> None:
        """Store the results since the last flush, commit in the journal, and remove files that no recovery needs."""
        if len(self._away) < len(self._brokers.all):
            self.vitals.got_on(messages=self.queue_peak)
        elif not self.vitals.last_results_s:
            self.vitals.waits_for = f"the broker {', '.join(sorted(self._away))} has not answered yet"
        self.vitals.waits_for = "" if self.vitals.last_results_s else self.vitals.waits_for
        parts = self._hosts.take_parts()
        if not parts:
            return
        snapshots = self._snapshots()
        upto = self._journal.position
        await self._sync()
        self._stirred.set()  # hosts that had reached a limit may go on
        flush, unstorable = await self._store.flush(list(parts.values()))
        for (host, stream), part in parts.items():
            for each in unstorable:
                if each.part is part:
                    self._give_up(host, StoreError(f"its rows cannot be stored: {each.why}"), stream)
        # Before the commit, so that after a crash a sink gets some results twice, and equal, rather than not at all.
        for key, part in parts.items():
            with self._border(key[0], "sinks"):
                await self._deliver(key, part)
        self._commit(flush, upto)
        self._committed_in = self._journal.position[0]
        await self._sync()
        self._store.settled(flush)
        self._base |= snapshots
        self._journal.forget_before(min([*self._base.values(), self._committed_in]))
        if self._journal.is_full and not self._is_writing and not self._journal.has_unsynced:
            self._journal.rotate()

    def _commit(self, flush: int, upto: JournalPosition) -> None:
        self._journal.commit(Commit(flush, upto, self._hosts.slice_ns))

    @property
    def _is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    async def _deliver(self, key: RunKey, part: RunPart) -> None:
        """Write a run's results to the sinks other than the store; sinks buffer and never wait for a server."""
        if not self._sinks:
            return
        if key not in self._streams:
            self._streams[key] = [sink.stream() for sink in self._sinks]
            for stream in self._streams[key]:
                await stream.open(part.header)
        if part.totals is not None:
            results = Results(part.rows, part.totals)
            for stream in self._streams[key]:
                await stream.write(results)
        if part.closed or part.ended:
            for stream in self._streams.pop(key):
                await stream.aclose()

    def _snapshots(self) -> dict[str, int]:
        """Append snapshots of some hosts whose snapshot is in an old file; returns the new file by host."""
        newest = self._journal.position[0]
        old = sorted((file, host) for host, file in self._base.items() if file < newest)
        chosen = [host for _, host in old[: len(self._hosts) // _SNAPSHOTS + 1]]
        return {host: self._snapshot(host) for host in chosen}

    def _snapshot(self, host: str) -> int:
        return self._journal.append(EntryKind.SNAPSHOT, host, self._hosts.put_aside(host))[0]


def _oldest(told: str) -> int:
    """Return the number in the property `OLDEST`, 0 without the property. Raises `WireError`."""
    if not told:
        return 0
    if not (told.isascii() and told.isdigit() and len(told) <= len(str(MAX_SEQUENCE))):
        raise WireError(f"{OLDEST} {told[:40]!r} is not the number of a frame")
    return int(told)


def _told(error: Exception) -> str:
    """Return an error as one line of at most 500 characters."""
    text = str(error) if isinstance(error, MaceError) else f"{type(error).__name__}: {error}"
    return text.replace("\n", " ")[:500]


def _last_commit(journal: Journal) -> tuple[Commit | None, dict[str, JournalPosition]]:
    """The last COMMIT, and each host's last snapshot before the position that it names."""
    commit: Commit | None = None
    snapshots: list[tuple[str, JournalPosition]] = []
    for entry in journal.read():
        if entry.kind == EntryKind.COMMIT:
            commit = Commit.parse(entry.payload)
        elif entry.kind == EntryKind.SNAPSHOT:
            snapshots.append((entry.host, entry.position))
    if commit is None:
        return None, {}
    return commit, {host: position for host, position in snapshots if position < commit.upto}


# The command. -----------------------------------------------------------------------------------------------------


def serve(brokers: Brokers, store: Path, config: Config, shard: Shard, duration_s: float | None) -> dict[str, Any]:
    """Run the ingest until a signal, or for `duration_s`; returns its counters."""
    keep_freed_memory()
    gc.set_threshold(*_COLLECTED)

    async def work() -> dict[str, Any]:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        if duration_s is not None:
            loop.call_later(duration_s, stop.set)
        ingest = Ingest(brokers, store, config, shard)
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
