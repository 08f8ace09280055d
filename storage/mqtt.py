"""Publishes the raw stream to an MQTT broker: a `StreamSink` that never waits for the broker.

    write() ──► pending ──► frames ──► spool ──► window ──► broker ──► ingest
                  every `interval_s`     ▲                               │
                                         └──── removed by the ack ◄──────┘  mace/v1/HOST/ack

A frame stays in the spool until the *ingest* acknowledges that its journal has the frame; frames that only the broker
has acknowledged can be lost with the broker. Broker and ingest therefore need not keep anything: after either of them
was killed or restarted, missing frames are sent again, and repeated frames are recognised by their numbers. Up to
`_WINDOW_MOST` frames are in flight at once, few at the beginning and after a loss, so that a returning fleet does not
flood the broker. docs/mqtt.md has topics and messages, docs/design/015-mqtt.md the reasons.

Acknowledgements and refusals are believed only for frames that were sent, and a frame in the spool only if it is valid.
A frame that cannot be sent, or whose content the ingest refuses, is moved to `set-aside` in the spool's directory, and
the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from contracts.errors import StoreError, WireError
from contracts.interfaces import Progress, StreamHeader, StreamItem
from contracts.records import Batch
from contracts.topics import Ack, Refusal, ack_topic, status_topic, stream_topic
from contracts.topology import Topology
from contracts.vitals import Publishing
from contracts.wire import Encoder, FrameKind, Head, whole_head
from storage.broker import (
    IN_FLIGHT,
    Brokers,
    Connection,
    MqttError,
    Will,
    cancelled,
    is_failure,
    payload_of,
    properties,
    retry_after_s,
)
from storage.context import Contexts
from storage.spool import Frame, Spool

_LOG: Final = logging.getLogger(__name__)
T = TypeVar("T")

BATCH_RECORDS: Final = 1 << 16
"""Most records of a message: some 200 kB, below every broker's limit."""
_PENDING_RECORDS: Final = 1 << 22
"""Most records that wait for a hanging disk, 130 MB of columns (230 MB with content); newer ones are discarded."""
_MEMORY_BYTES: Final = 16 << 20
"""Frames that are also kept in memory, so that sending rarely reads the disk; the whole spool if the disk is full."""
_WINDOW_LEAST: Final = 4
_WINDOW_MOST: Final = 256
_WINDOW_BYTES: Final = 8 << 20
"""Most bytes in flight; with 2.7 bytes per record, 3 M records."""
RESEND_S: Final = 3.0
"""An ingest acknowledges a frame within a second. Without an acknowledgement for this time a few frames are sent again,
which also finds an ingest that has returned."""
_STEADY_S: Final = 10.0
"""A connection that breaks earlier counts as a failed attempt, after which the next pause is longer."""
_TAKEN_OVER_S: Final = (2.0, 60.0, 600.0)
"""Pauses after the first, second, ... time that another client has taken over the session. The first is short, so that
the other client also notices; the others keep two hosts with one name from disconnecting each other for ever."""
_LOOK_S: Final = 2.0
"""Time within which a broker sends a retained status; without a retained one, nothing arrives."""
_LOOK_ON_S: Final = 1.0
"""Time after that within which another client that has just taken over says that it is online."""
_FORGIVEN_S: Final = 3600.0
"""After a connection of this length, the next takeover counts as the first."""
_SET_ASIDE_BYTES: Final = 64 << 20
"""Most bytes of frames in `set-aside`; further frames are only counted."""
_CLOCKS_AGREE_NS: Final = 3_600_000_000_000
"""Largest difference of clocks that agree on whether a time is a day ahead."""


@dataclass(frozen=True, slots=True)
class _Skipped:
    """A number of records discarded before they were encoded, at this place in the stream."""

    records: int


@dataclass(slots=True)
class _InFlight:
    """The frames in flight to the ingest."""

    stream: int = -1
    next: int = 0
    """Number of the frame to be sent next."""
    run_from: int = 0
    """All frames from this one up to `next` were sent without a gap."""
    bytes: int = 0
    """Bytes sent and not acknowledged."""
    window: int = _WINDOW_LEAST
    restart: bool = True
    """Whether to start again with the oldest frame in the spool, after HEADER and topology."""


class StreamPublisher:
    """A `StreamSink` that publishes to the host's broker.

    An unreachable broker is never an error; the spool keeps the records.

    `open` raises `StoreError` or `Unavailable` if the spool cannot be used, and `WireError` if the host's name is not
    valid in a topic.
    """

    def __init__(
        self, brokers: Brokers, spool: Path, *, max_bytes: int, interval_s: float = 1.0, drain_s: float = 5.0
    ) -> None:
        self._brokers, self._interval_s, self._drain_s = brokers, interval_s, drain_s
        self._broker = brokers.all[0]
        """The broker of this host, from `open` on."""
        self._spool = Spool(spool, max_bytes=max_bytes, memory_bytes=_MEMORY_BYTES)
        self._contexts = Contexts(spool / "streams")
        self._aside = spool / "set-aside"
        self._encoder = Encoder()
        self._host = self._run = ""
        self._stream = -1
        """Tag of this run's stream."""
        self._pending: list[StreamItem | _Skipped] = []
        self._pending_records = 0
        self._progress: Progress | None = None
        self._failure: StoreError | WireError | None = None
        # Only this thread uses encoder, spool and contexts, in the order of the requests.
        self._thread = ThreadPoolExecutor(1, "mace-publish")
        self._full = asyncio.Event()
        self._news = asyncio.Event()
        """Set when there are new frames to send, or an acknowledgement has arrived."""
        self._emptier = asyncio.Event()
        """Set when frames have left the spool."""
        self._tasks: list[asyncio.Task[None]] = []
        self._way = _InFlight()
        self._acknowledged = 0
        """Number of acknowledged frames."""
        self._sent: dict[int, int] = {}
        """By stream, the number after the last frame that this process has sent; acknowledgements beyond are false."""
        self._connected = self._answered = False
        self._trouble = "not connected yet"
        self.records = 0
        """Number of records accepted from the source."""
        self.arrived = 0
        """Number of records that the ingest has acknowledged, including those of earlier runs."""
        self.skipped = 0
        """Number of records discarded before they reached the spool."""
        self.left_before = 0
        """Number of records that earlier runs have left in the spool."""
        self.sent_bytes = 0
        """Bytes of payload sent, including repetitions."""
        self.restarts = 0
        """How often sending has started again with the oldest frame, after a connection or a loss."""
        self.refused = 0
        """Number of publishes that the broker has refused."""
        self.set_aside = 0
        """Number of records in frames that cannot be sent, or that the ingest refuses."""
        self.set_aside_frames = 0
        self.taken_over = 0
        """How often another client with this name has taken over the session."""
        self.disbelieved = 0
        """Number of acknowledgements for frames that were never sent."""

    @property
    def discarded(self) -> int:
        """Number of records lost because the spool was full or damaged on the disk."""
        return self._spool.dropped_rows + self._spool.damaged_rows + self.skipped

    @property
    def waiting(self) -> int:
        """Number of records that are not acknowledged yet."""
        return self._spool.rows + self._pending_records

    def state(self) -> Publishing:
        """Return the state of publishing; may be called from any thread."""
        return Publishing(
            records=self.records,
            arrived=self.arrived,
            waiting=self.waiting,
            discarded=self.discarded,
            set_aside=self.set_aside,
            connected=self._connected,
            answered=self._answered,
            taken_over=self.taken_over,
            trouble=self._trouble,
        )

    # The sink. ------------------------------------------------------------------------------------------------

    async def open(self, header: StreamHeader) -> None:
        """Read the frames of earlier runs in the spool, begin the stream, and connect in the background."""
        self._host, self._run = header.host, header.run
        stream_topic(self._host)  # raises for a name that cannot be part of one
        self._broker = self._brokers.of(self._host)
        await self._do(lambda: self._begin(header))
        self._tasks = [
            asyncio.create_task(self._flush_now_and_then(), name="publish-flush"),
            asyncio.create_task(self._stay_connected(), name="publish-send"),
        ]

    async def write(self, item: StreamItem) -> None:
        """Accept an item; never waits. Raises `WireError` if an earlier item was out of order."""
        if self._failure is not None:
            raise self._failure
        for task in self._tasks:
            if task.done():
                task.result()  # a defect here ends the run, which would otherwise publish nothing in silence
        if isinstance(item, Progress):
            self._progress = item
            return
        if isinstance(item, Batch):
            self.records += len(item)
            if self._pending_records + len(item) > _PENDING_RECORDS:
                if not self.skipped:
                    _LOG.warning("publishing does not keep up (does the spool's disk hang?): records are discarded")
                self.skipped += len(item)
                self._pending.append(_Skipped(len(item)))
                return
            self._pending_records += len(item)
        self._pending.append(item)
        if self._pending_records >= BATCH_RECORDS:
            self._full.set()

    async def aclose(self) -> None:
        """End the stream and wait up to `drain_s` for acknowledgements; other frames stay in the spool."""
        try:
            if self._tasks:
                await self._finish()
        finally:
            await cancelled(*self._tasks)
            if self._tasks:
                self._tasks = []
                await self._do(self._end)
            self._thread.shutdown(wait=True)

    async def _finish(self) -> None:
        flushing, sending = self._tasks
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
        await self._flush(last=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while self._spool.frames and not sending.done():
                    self._emptier.clear()
                    await self._emptier.wait()
        if self._failure is not None:
            raise self._failure
        if sending.done():
            sending.result()

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # Stream -> spool. -----------------------------------------------------------------------------------------

    def _begin(self, header: StreamHeader) -> None:
        try:
            self.left_before = self._spool.open()
            self._contexts.open(keep=self._spool.frames > 0)
            frame = self._encoder.header(header)
            self._stream = whole_head(frame).stream
            self._contexts.begin(frame)
        except OSError as error:
            self._spool.close()
            raise StoreError(f"the spool for publishing cannot be used: {error}") from error

    def _end(self) -> None:
        self._contexts.close(keep=bool(self._spool.frames))
        lost = self._spool.close()
        if lost:
            _LOG.warning("%d records are lost: the spool's disk is full, and they were in memory only", lost)
            self.skipped += lost

    async def _flush_now_and_then(self) -> None:
        while True:
            # Not wait_for: before Python 3.12 it can swallow the waiting task's cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._full.wait()
            self._full.clear()
            await self._flush()

    async def _flush(self, *, last: bool = False) -> None:
        items, self._pending, self._pending_records = self._pending, [], 0
        progress, self._progress = self._progress, None
        if items or progress is not None or last:
            # Shielded, so that accepted items reach the spool even if this task is cancelled.
            await asyncio.shield(self._do(lambda: self._encode(items, progress, last=last)))
            self._news.set()

    def _encode(self, items: list[StreamItem | _Skipped], progress: Progress | None, *, last: bool) -> None:
        """Encode items: one frame for all batches up to the next topology, or several for large ones."""
        together: list[Batch] = []

        def put_batches() -> None:
            batch = Batch.concatenate(together)
            together.clear()
            for part in batch.pieces(BATCH_RECORDS):
                self._spool.append(Frame(self._encoder.batch(part), len(part)))

        try:
            for item in items:
                if isinstance(item, Batch):
                    together.append(item)
                    continue
                put_batches()
                if isinstance(item, Topology):
                    frame = self._encoder.topology(item, full=True)
                    self._contexts.add(frame)
                    self._spool.append(Frame(frame, 0))
                elif isinstance(item, _Skipped):
                    self._encoder.skip(item.records)
            put_batches()
            if progress is not None and not items:
                self._spool.append(Frame(self._encoder.item(progress), 0))
            if last:
                self._spool.append(Frame(self._encoder.end(), 0))
        except WireError as error:
            # The stream is out of order, and readers would refuse the following frames.
            self._failure = error
        except OSError as error:
            self._failure = StoreError(f"the spool for publishing: {error}")

    # Spool -> broker. -----------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = takeovers = 0
        while True:
            client = self._broker.connection(f"mace-{self._host}", self._will())
            began_s = 0.0
            try:
                async with client:
                    began_s = loop.time()
                    _LOG.info("%s: connected", self._broker.address)
                    self._connected, self._answered, self._trouble = True, True, ""
                    await self._serve(client)
            except MqttError as error:
                self._trouble = f"{self._broker.address}: {error}"
            finally:
                self._connected = False
                self._emptier.set()
            lasted_s = loop.time() - began_s if began_s else 0.0
            if client.taken_over or (began_s and await self._is_another_online()):
                takeovers = 0 if lasted_s > _FORGIVEN_S else takeovers
                pause_s = _TAKEN_OVER_S[min(takeovers, len(_TAKEN_OVER_S) - 1)]
                takeovers += 1
                self.taken_over += 1
                self._trouble = (
                    f"{self._broker.address}: another client took over the session of {self._host!r}"
                    " (session taken over, MQTT reason 0x8E): a second host has this name, or a second"
                    " `mace run --publish` runs here; give each its own name with [run] host (docs/mqtt.md)"
                )
                _LOG.warning("%s; retrying in %g s, records wait in the spool", self._trouble, pause_s)
                attempt = 0
            else:
                attempt = 0 if lasted_s > _STEADY_S else attempt
                # One warning per outage, not per attempt: an outage can last for days.
                level = logging.WARNING if attempt == 0 else logging.DEBUG
                _LOG.log(level, "%s; records wait in the spool", self._trouble)
                attempt += 1
                pause_s = retry_after_s(attempt, random.random())
            await asyncio.sleep(pause_s)

    async def _is_another_online(self) -> bool:
        """Return whether the retained status of this host is another run's, which has taken over the session.

        A broker need not say why it ends a session (mosquitto 2.0.11 does not). It then publishes our last will, and
        the other client's status follows. The query uses another client identifier, so that it does not disconnect the
        present client.
        """
        with contextlib.suppress(MqttError, TimeoutError, ValueError, AttributeError):
            async with asyncio.timeout(_LOOK_S) as limit, self._broker.connection(f"mace-{self._host}-look") as client:
                (answer,) = await client.subscribe(status_topic(self._host))
                if is_failure(answer):
                    return False
                async for message in client.messages:
                    status = json.loads(payload_of(message))
                    if status.get("state") == "online" and status.get("run") != self._run:
                        return True
                    if message.retain:
                        limit.reschedule(asyncio.get_running_loop().time() + _LOOK_ON_S)
        return False

    def _will(self) -> Will:
        return Will(status_topic(self._host), self._status("offline"))

    def _status(self, state: str) -> bytes:
        return json.dumps({"state": state, "host": self._host, "run": self._run}).encode()

    async def _serve(self, client: Connection) -> None:
        """Send and receive until the connection breaks (`MqttError`) or the task is cancelled."""
        self._way = _InFlight()
        refused = self.refused
        await client.subscribe(ack_topic(self._host), qos=0)
        await client.publish(status_topic(self._host), self._status("online"), qos=1, retain=True)
        hearing = asyncio.create_task(self._hear(client))
        sending = asyncio.create_task(self._send(client))
        try:
            done, _ = await asyncio.wait((hearing, sending), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.refused = refused + client.refused
            await cancelled(hearing, sending)
            with contextlib.suppress(MqttError, TimeoutError):
                # Possible on a working connection only; otherwise the broker publishes the last will.
                async with asyncio.timeout(1):
                    await client.publish(status_topic(self._host), self._status("offline"), qos=1, retain=True)

    async def _hear(self, client: Connection) -> None:
        async for message in client.messages:
            try:
                ack = Ack.parse(payload_of(message))
            except WireError as error:
                _LOG.warning("%s: %s", message.topic, error)
                continue
            await self._do(partial(self._take, ack))
            self._news.set()
            self._emptier.set()

    def _take(self, ack: Ack) -> None:
        """Process an acknowledgement: remove acknowledged frames from the spool, and send missing ones again."""
        way = self._way
        gone = 0
        upto = self._believed(ack)
        while (oldest := self._oldest()) is not None:
            frame, head = oldest
            if head.stream != ack.stream or head.sequence >= upto:
                break
            self._spool.first()
            self._spool.acknowledge()
            self.arrived += frame.rows
            way.bytes = max(way.bytes - len(frame.payload), 0)
            gone += 1
        if oldest is not None:
            _, head = oldest
            self._contexts.needed_from(head.stream, head.sequence)
            if gone and head.stream != ack.stream:
                self._contexts.forget(ack.stream)
                self._sent.pop(ack.stream, None)
        if ack.refused is not None:
            gone += self._take_refusal(ack.stream, ack.refused)
        self._acknowledged += gone
        way.window = min(way.window + gone, _WINDOW_MOST)
        if ack.again and (ack.stream == way.stream or ack.next == 0):
            way.restart = True

    def _take_refusal(self, stream: int, refusal: Refusal) -> int:
        """Set the oldest frames aside if the ingest refuses them; returns how many.

        Frames refused because their times are ahead of the ingest's clock wait while the two machines' clocks
        disagree: one of the clocks is wrong, and will be corrected.
        """
        oldest = self._oldest()
        if oldest is None or oldest[1].stream != stream or not refusal.first <= oldest[1].sequence <= refusal.last:
            return 0
        if refusal.clock_utc_ns is not None and abs(refusal.clock_utc_ns - time.time_ns()) > _CLOCKS_AGREE_NS:
            self._say(
                f"the ingest refuses frames ({refusal.why}) and its clock differs from this machine's: set both clocks;"
                " records wait in the spool"
            )
            return 0
        last = min(refusal.last, self._sent.get(stream, 0) - 1)
        gone = 0
        while oldest is not None and oldest[1].stream == stream and oldest[1].sequence <= last:
            frame, head = oldest
            if head.message is FrameKind.TOPOLOGY:
                self._contexts.leave_out(stream, head.sequence)
            self._put_aside(frame, f"the ingest refuses it: {refusal.why}")
            gone += 1
            oldest = self._oldest()
        if oldest is not None and oldest[1].stream != stream:
            self._contexts.forget(stream)
            self._sent.pop(stream, None)
        # The following frames were sent with these announced as still to come.
        self._way.restart |= gone > 0
        return gone

    def _say(self, trouble: str) -> None:
        """Log a problem, unless it is the one logged last."""
        if trouble != self._trouble:
            _LOG.warning("%s: %s", self._broker.address, trouble)
        self._trouble = trouble

    def _believed(self, ack: Ack) -> int:
        """Return the frame up to which an acknowledgement is credible.

        For an earlier run's stream, more may have been sent than this process knows; those frames are sent again. For
        our own stream such an acknowledgement is false, and frames that were not sent must stay in the spool.
        """
        sent = self._sent.get(ack.stream, 0)
        if ack.next > sent and ack.stream == self._stream:
            self.disbelieved += 1
            if self.disbelieved == 1:
                _LOG.warning(
                    "%s: frame %d is acknowledged, but %d is the next to be sent: a client other than the ingest may"
                    " write to %s (docs/mqtt.md, Who may do what); only sent frames count as acknowledged",
                    self._broker.address, ack.next, sent, ack_topic(self._host),
                )  # fmt: skip
        return min(ack.next, sent)

    def _oldest(self) -> tuple[Frame, Head] | None:
        """Return the oldest frame in the spool that can be sent, which may still be dropped; None if there is none.

        Frames before it that cannot be sent are set aside.
        """
        # If the oldest is damaged, `first` counts and removes it.
        while (frame := self._spool.ahead(0) or self._spool.first()) is not None:
            try:
                head = whole_head(frame.payload)
            except WireError as error:
                self._put_aside(frame, str(error))
                continue
            if self._contexts.of(head.stream) is not None:
                return frame, head
            self._put_aside(frame, "the HEADER of its stream is missing, without which it cannot be read")
        return None

    def _put_aside(self, frame: Frame, why: str) -> None:
        """Move the oldest frame, which cannot be delivered, from the spool to `set-aside`, and count it.

        The log reports the 1st, 2nd, 4th, 8th, ..., because a line for each would fill it.
        """
        count = self.set_aside_frames + 1
        if count & (count - 1) == 0:
            told = f"{self._aside}: a frame of {frame.rows} records cannot be sent and is set aside"
            _LOG.warning("%s: %s (%d frames so far)", told, why, count)
        try:
            self._aside.mkdir(mode=0o700, exist_ok=True)
            kept = [path.stat().st_size for path in self._aside.iterdir()]
            if sum(kept) + len(frame.payload) <= _SET_ASIDE_BYTES:
                (self._aside / f"{self._run}-{count}.frame").write_bytes(frame.payload)
        except OSError as error:
            _LOG.warning("%s: cannot keep a frame that was set aside: %s", self._aside, error.strerror)
        # Together, and last: until then the counts show the frame among the waiting ones.
        self._spool.first()
        self._spool.acknowledge()
        self.set_aside += frame.rows
        self.set_aside_frames = count

    async def _send(self, client: Connection) -> None:
        topic = stream_topic(self._host)
        heard = asyncio.get_running_loop().time()
        acknowledged = -1
        while True:
            self._news.clear()
            parts = await self._do(self._next_frames)
            if parts:
                await asyncio.gather(
                    *(client.publish(topic, data, qos=1, properties=properties(oldest=str(o))) for data, o in parts)
                )
                self.sent_bytes += sum(len(data) for data, _ in parts)
                if self.refused != client.refused:
                    self.refused = client.refused
                continue
            now = asyncio.get_running_loop().time()
            waiting = self._spool.frames > 0
            if self._acknowledged != acknowledged or not waiting:
                acknowledged, heard = self._acknowledged, now
            if waiting and now - heard >= RESEND_S:
                self._way.restart, heard = True, now
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESEND_S / 4):
                    await self._news.wait()

    def _next_frames(self) -> list[tuple[bytes, int]]:
        """Return frames to send now, each with the number of the oldest frame that may still arrive before it."""
        oldest = self._oldest()
        if oldest is None:
            return []
        _, head = oldest
        context = self._contexts.of(head.stream)
        assert context is not None
        parts: list[tuple[bytes, int]] = []
        way = self._way
        if way.restart or way.stream != head.stream:
            self.restarts += way.restart
            self._way = way = _InFlight(head.stream, head.sequence, head.sequence, restart=False)
            topology = context.before(head.sequence)
            parts = [(frame, head.sequence) for frame in (context.header, topology) if frame is not None]
        index = self._index(way.next, head.sequence)
        while len(parts) < IN_FLIGHT and index < way.window and way.bytes < _WINDOW_BYTES:
            frame = self._spool.ahead(index)
            found = _sendable(frame)
            if frame is None or found is None or found.stream != way.stream:
                # The next stream, or a frame to set aside, follows when all frames before it are acknowledged.
                break
            if found.sequence != way.next:
                way.run_from = found.sequence
            parts.append((frame.payload, way.run_from))
            way.bytes += len(frame.payload)
            way.next = found.sequence + 1
            index += 1
        self._sent[way.stream] = max(self._sent.get(way.stream, 0), way.next)
        return parts

    def _index(self, sequence: int, oldest: int) -> int:
        """Return the index in the spool of the current stream's first frame with this number or a later one."""
        index = max(sequence - oldest, 0)
        # The index is smaller if frames between were removed.
        while index and not self._is_before(index - 1, sequence):
            index -= 1
        return index

    def _is_before(self, index: int, sequence: int) -> bool:
        head = _sendable(self._spool.ahead(index))
        if head is None:
            return index < self._spool.frames  # a damaged frame is handled when it is the oldest
        return head.stream == self._way.stream and head.sequence < sequence


def _sendable(frame: Frame | None) -> Head | None:
    """Return the head of a valid frame; None for any other."""
    try:
        return whole_head(frame.payload) if frame is not None else None
    except WireError:
        return None
