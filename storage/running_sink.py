"""The shared part of all sinks with a server: buffer, batches, flush, spool, retries, partial writes, counters.

    write() ──► buffer ──► encode, in a thread ──► spool ──► deliver ──► acknowledged
                  │ full: newest dropped               │ full: oldest dropped
                  └── counted                          └── counted        ↺ again, later and later, with jitter

`write` waits neither for the server nor for the disk, so a dead database does not affect the ring. A `patient` sink,
for replays, waits instead, because a replay loses nothing by waiting. Encoded rows are in the spool before they are
sent, and stay there until the server has acknowledged them; the same bytes are sent again until then. At most
`flush_interval_s` of rows are in memory only.

A `Target` encodes rows for a server, delivers one frame, and decides which errors are worth another attempt.
docs/design/014-remote-sinks.md has the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from contracts.config import RunningConfig
from contracts.vitals import Account
from storage.spool import Frame, FrameInDelivery, Spool

_LOG: Final = logging.getLogger(__name__)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

_RETRY_MIN_S: Final = 0.5
_REMIND_S: Final = 60.0
"""A lasting problem is logged again after this time."""


class TryLaterError(Exception):
    """The server did not accept the frame for a reason that may pass: unreachable, busy, full, not authorised yet."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        self.why, self.after_s = why, after_s
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The frames of encoded items, and the numbers of rows that are in no frame."""

    frames: Sequence[Frame]
    left_out: int = 0
    over_budget: int = 0


@dataclass(frozen=True, slots=True)
class Delivered:
    """The server's answer to a frame. `refused` rows are refused for good, for the reason in `reason`."""

    refused: int = 0
    reason: str = ""


class Target(Protocol[T_contra]):
    """The server's side of a sink. `open` is called once, first, and must not need the server; `aclose` once, last.

    One thread calls `encode`, in the order of the items; `encode` must not use data that `deliver` uses. `deliver` is
    called for up to `senders` frames at a time, and may be cancelled. It raises `TryLaterError` for a passing problem
    and `TimeoutError` without an answer within `timeout_s`. It then gets the same frame again, possibly in another
    process, so delivering a frame twice must have the effect of delivering it once.
    """

    async def open(self) -> None: ...

    def rows(self, item: T_contra) -> int:
        """Return about how many rows the item will have, which bounds the buffer."""
        ...

    def encode(self, items: Sequence[T_contra], *, last: bool) -> Encoded:
        """Encode items, possibly none, as frames. `last`: no further items follow."""
        ...

    async def deliver(self, frame: Frame) -> Delivered: ...

    async def aclose(self) -> None: ...


class RunningSink(Generic[T]):
    """Delivers items to a `Target`. `storage.shared` makes a `Sink` for each stream from it.

    `open` raises `Unavailable` or `StoreError` if the spool cannot be used, and no error if the server is unreachable.
    `aclose` waits for the server to accept the waiting rows, until `close_s` after its last success. The rest stays in
    the spool, or without a spool is counted as dropped.
    """

    def __init__(
        self,
        name: str,
        target: Target[T],
        config: RunningConfig,
        account: Account,
        *,
        patient: bool = False,
        senders: int = 1,
    ) -> None:
        """`senders`: most frames in delivery at once; with more than one, frames can arrive out of order."""
        self.name: Final = name
        self.account: Final = account
        self._target = target
        self._config = config
        self._patient = patient
        self._senders = senders
        directory = Path(config.spool) / name if config.spool else None
        self._spool = Spool(
            directory,
            max_bytes=config.spool_mib << 20,
            memory_bytes=config.memory_mib << 20,
            sync=config.spool_sync,
        )
        self._buffer: deque[T] = deque()
        self._buffered = 0
        """Number of rows in the buffer or being encoded."""
        self._changed = asyncio.Condition()
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []
        self._acknowledging: set[asyncio.Future[None]] = set()
        self._disk = ThreadPoolExecutor(1, f"{name}-encode")
        self._given_up = 0
        """Number of rows given up by the spool that the account already has."""
        self._success_s = 0.0
        self._too_late = False
        """Whether the server's time at the end is over, so that no task waits for it."""
        self._told_s: dict[str, float] = {}
        """Time at which each kind of problem was last logged."""

    async def open(self) -> None:
        """Open the spool and begin to deliver its frames."""
        found = await asyncio.get_running_loop().run_in_executor(self._disk, self._spool.open)
        self.account.taken += found
        self.account.waiting += found
        self._count()
        if found:
            _LOG.warning(
                "sink %s: the spool has %d rows of an earlier run, which are delivered first", self.name, found
            )
        await self._target.open()
        self._tasks = [
            asyncio.create_task(self._encode(), name=f"{self.name}-encode"),
            *(asyncio.create_task(self._deliver(), name=f"{self.name}-deliver-{n}") for n in range(self._senders)),
        ]

    async def write(self, item: T) -> None:
        """Buffer an item; if the buffer is full, drop and count it (`patient`: wait)."""
        for task in self._tasks:
            if task.done():
                task.result()  # raises the traceback of a defect here
        rows = self._target.rows(item)
        if self._buffered and self._buffered + rows > self._config.buffer_rows:
            if not self._patient:
                self.account.taken += rows
                self.account.dropped_buffer += rows
                self.account.note("dropped: the buffer was full", rows)
                self._remind(
                    "buffer", f"the buffer of {self._config.buffer_rows:,} rows is full: newest rows are dropped"
                )
                return
            async with self._changed:
                await self._changed.wait_for(
                    lambda: not self._buffered or self._buffered + rows <= self._config.buffer_rows
                )
        self._buffer.append(item)
        self._buffered += rows
        self.account.buffer_peak = max(self.account.buffer_peak, self._buffered)
        await self._tell()

    async def aclose(self) -> None:
        """Encode the buffered items, wait up to `close_s` for the server, and release everything."""
        self._ending = True
        self._success_s = time.monotonic()
        try:
            if self._tasks:
                await self._tell()
                await self._until(self._tasks[0].done)
                self._too_late = not self._tasks[0].done()
                await self._tell()
                await self._tasks[0]
                await self._until(lambda: not self.account.waiting + self._spool.frames or self._stuck())
        finally:
            for task in self._tasks:
                task.cancel()
            ends = await asyncio.gather(*self._tasks, return_exceptions=True)
            self._tasks = []
            if self._acknowledging:
                await asyncio.wait(self._acknowledging)
            await self._target.aclose()
            lost = await asyncio.get_running_loop().run_in_executor(self._disk, self._spool.close)
            self._disk.shutdown(wait=True)
            self._count()
            self.account.dropped_spool += lost
            self.account.waiting -= lost
            if lost:
                self.account.note("not delivered at the end, and no spool to keep it", lost)
            if self.account.waiting:
                _LOG.warning(
                    "sink %s: %d rows are not delivered and stay in the spool: %s",
                    self.name,
                    self.account.waiting,
                    self.account.trouble,
                )
        for end in ends:
            if isinstance(end, Exception):
                raise end

    def _stuck(self) -> bool:
        """Return whether all delivering tasks have ended, by a defect that is raised at the end."""
        return all(task.done() for task in self._tasks[1:])

    async def _until(self, done: Callable[[], bool]) -> None:
        """Wait until `done`, or until the server has accepted nothing for `close_s`."""
        while not done():
            left = self._success_s + self._config.close_s - time.monotonic()
            if left <= 0:
                return
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), min(left, 0.2))
                except TimeoutError:
                    pass  # check again, because a failing server causes no notification

    # Buffer to spool.

    async def _encode(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._batch()
            items, rows = list(self._buffer), self._buffered
            self._buffer.clear()
            ending = self._ending
            encoded = await loop.run_in_executor(self._disk, lambda: self._target.encode(items, last=ending))  # noqa: B023
            self.account.left_out += encoded.left_out
            self.account.over_budget += encoded.over_budget
            self.account.taken += encoded.left_out + encoded.over_budget
            for frame in encoded.frames:
                await self._room(frame)
                self.account.taken += frame.rows
                self.account.waiting += frame.rows
                await loop.run_in_executor(self._disk, self._spool.append, frame)
                self._count()
                await self._tell()
            self._buffered -= rows
            await self._tell()
            if ending:
                return

    async def _batch(self) -> None:
        """Wait until there is a full batch, or items have waited for `flush_interval_s`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._buffer or self._ending)
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._ending or self._buffered >= self._config.batch_rows),
                    self._config.flush_interval_s,
                )
            except TimeoutError:
                pass  # items have waited long enough

    async def _room(self, frame: Frame) -> None:
        """Wait until the spool has room if the sink is patient; otherwise the spool drops old frames itself."""
        if self._patient:
            async with self._changed:
                await self._changed.wait_for(lambda: self._too_late or not self._spool.full(len(frame.payload)))

    # Spool to server.

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._spool.waiting)
            taken = await loop.run_in_executor(None, self._spool.take)
            self._count()
            if taken is None:
                continue
            await self._delivered(taken)

    async def _delivered(self, taken: FrameInDelivery) -> None:
        """Deliver one frame, with as many attempts as it needs."""
        loop, frame, failures = asyncio.get_running_loop(), taken.frame, 0
        while True:
            self.account.attempts += 1
            begin = time.monotonic()
            try:
                said = await self._target.deliver(frame)
            except TryLaterError as error:
                failures += 1
                await self._later(error.why, error.after_s, failures)
            except TimeoutError:
                failures += 1
                await self._later(f"no answer within {self._config.timeout_s:g} s", None, failures)
            except Exception as error:  # noqa: BLE001 - a defect here or in a library must not stop the measurement
                failures += 1
                _LOG.debug("sink %s", self.name, exc_info=error)
                await self._later(repr(error), None, failures)
            else:
                self.account.delivery_ns = int((time.monotonic() - begin) * 1e9)
                self._succeeded(frame, said)
                # Shielded from cancellation, because rows counted as stored must not stay in the spool.
                acknowledging = loop.run_in_executor(None, self._spool.acknowledge, taken)
                self._acknowledging.add(acknowledging)
                acknowledging.add_done_callback(self._acknowledging.discard)
                await asyncio.shield(acknowledging)
                self._count()
                await self._tell()
                return

    def _succeeded(self, frame: Frame, said: Delivered) -> None:
        account = self.account
        if not account.connected and account.trouble:
            _LOG.warning("sink %s: delivers again; %s rows wait", self.name, f"{account.waiting - frame.rows:,}")
        account.connected, account.trouble = 1, ""
        self._told_s.pop("failure", None)
        account.waiting -= frame.rows
        account.stored += frame.rows - said.refused
        account.refused += said.refused
        if said.refused and account.note(f"refused: {said.reason}", said.refused):
            _LOG.warning("sink %s: %d rows refused: %s", self.name, said.refused, said.reason)
        self._success_s = time.monotonic()

    async def _later(self, why: str, after_s: float | None, failures: int) -> None:
        """Wait before the next attempt: twice as long each time, or as long as the server says, with jitter."""
        account = self.account
        account.connected, account.trouble = 0, why
        account.retries += 1
        account.note(f"retried: {why}")
        self._remind("failure", f"{why}; {account.waiting:,} rows wait")
        longest = self._config.retry_max_s
        pause = min(_RETRY_MIN_S * 2.0 ** min(failures - 1, 16), longest) if after_s is None else min(after_s, longest)
        # Jitter over the upper half, so that many hosts that lost one server do not return at the same moment.
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    # Counters.

    def _count(self) -> None:
        """Update the account with the spool's figures.

        `waiting` is counted here and not read from the spool, which another thread changes, so that it always balances.
        """
        spool, account = self._spool, self.account
        given_up = spool.dropped_rows + spool.damaged_rows
        if given_up > self._given_up:
            new = given_up - self._given_up
            self._given_up = given_up
            account.dropped_spool += new
            account.waiting -= new
            account.note("given up: the spool was full, or damaged", new)
            self._remind("spool", spool.trouble or "the spool is full: oldest rows are dropped")
        account.spool_bytes = spool.bytes

    def _remind(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if now - self._told_s.get(kind, -_REMIND_S) >= _REMIND_S:
            self._told_s[kind] = now
            _LOG.warning("sink %s: %s", self.name, text)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
