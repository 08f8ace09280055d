"""Measures in a thread of its own for `mace top`, and answers what its screen asks.

    thread of the screen:       look() worst() record() trace()
                                  │ lock, for a moment    │ run in the other event loop
    thread of the measurement:  runs.measure ──► Recent, WorstPackets     KeptStream (the tee)

Drawing and reading have an event loop each. A terminal that takes nothing more stops the first one only, and what the
two share is bounded.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from collector.machine.softnet import counters
from collector.memory import keep_freed_memory
from contracts.config import Config, SinksConfig
from contracts.cpu_figures import CpuReport
from contracts.errors import SourceError, StoreError, Unavailable, UsageError
from contracts.figures import Summary
from contracts.hooks import silent_on
from contracts.interfaces import StreamHeader
from contracts.ledger import Ledger
from contracts.recent import Recent
from contracts.results import Results
from mace.live import first, runs
from mace.live.keeping import KeptStream
from mace.live.pipeline import Stop
from mace.live.recent_stages import RecentStages
from mace.live.runs import Until
from mace.shown.top.feed import Look
from mace.shown.worst import WorstPackets
from storage.capture import CaptureSink
from storage.query import PacketPath

T = TypeVar("T")

_SLACK_NS: Final = 2_000_000_000
"""Records are processed at most so long after they were made, besides the correlator's timeout: a source yields within
250 ms, and channels hold a second at most. On a host that is slower a second may appear late."""
_LOSSES_EVERY: Final = 5
"""All losses are looked for with every fifth window: what a source cannot see changes slowly."""


class Watched:
    """A live measurement that is looked at; a `Feed`. Call `begin`, then the feed's methods, then `end`."""

    is_live: Final = True

    def __init__(self, config: Config, until: Until) -> None:
        """Prepare to measure with `config` until `until` ends; no sink of the configuration is written to.

        Raises `Unavailable` if the source cannot choose the configured packets.
        """
        rows = replace(config.correlate, rows=True, softirqs=False)
        self._config = replace(config, sinks=SinksConfig(), correlate=rows)
        self._until = until
        # What may be written to a file has to be chosen in the kernel, as for `mace record`.
        self._kept = None if first.chooses_after_reading(config.capture) else KeptStream()
        self._lag_ns = _SLACK_NS + config.correlate.timeout_ms * 1_000_000
        self._lock = threading.Lock()
        self._recent = Recent()
        self._worst: WorstPackets | None = None
        self._stages = RecentStages() if config.correlate.cpus else None
        self._ledger = Ledger()
        self._losses: tuple[str, ...] = ()
        self._unseen: tuple[str, ...] = ()
        self._sharers: tuple[str, ...] = ()
        self._windows = 0
        self._header: StreamHeader | None = None
        self._stop = Stop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened = threading.Event()
        self._ended = threading.Event()
        self._asked = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="measurement", daemon=True)
        self.chosen = ""
        """Names the source, and why it was chosen."""
        self.summary = Summary()
        self._traces: list[str] = []

    # The thread of the screen -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Start to measure, and return when the source is open, or when it has failed or been stopped before."""
        keep_freed_memory()
        self._thread.start()
        while not (self._opened.is_set() or self._ended.is_set()):
            # With a timeout, because a signal's handler runs between two waits only.
            self._opened.wait(0.1)

    def interrupt(self) -> None:
        """Handle a signal: the first one ends the measurement, the second one cuts it off. Callable from a handler."""
        self._asked = True
        self._in_loop(self._stop.interrupt)

    def end(self) -> None:
        """End the measurement after the records captured so far, and wait for that. Raises what made it fail."""
        self._asked = True
        self._in_loop(self._stop.request)
        while self._thread.is_alive():
            self._thread.join(0.1)
        if self._error is not None:
            raise self._error

    @property
    def title(self) -> str:
        """Host and source."""
        return f"{self._header.host} · {self._header.source}" if self._header else ""

    @property
    def remarks(self) -> list[str]:
        """What a user should know about the source."""
        if self._header is None:
            return []
        told = f"measuring {self._header.host}, Linux {self._header.kernel}, {self.chosen}"
        return [told, *filter(None, [silent_on(self._header.kernel)])]

    @property
    def is_over(self) -> bool:
        """Whether the measurement has ended or was asked to."""
        return self._asked or self._ended.is_set()

    async def look(self) -> Look:
        """Return the newest look."""
        kept = self._kept
        sink = kept.recording if kept is not None else None
        with self._lock:
            if self._header is not None:
                now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + self._header.clock.offset_ns
                self._recent.advance(now_ns - self._lag_ns)
            return Look(
                self._recent.moment(),
                self._ledger,
                self._losses,
                self._unseen,
                self._sharers,
                kept.seconds if kept is not None else None,
                f"{sink.records:,} records, {sink.path.name}" if sink is not None else "",
            )

    async def worst(self, limit: int, look: Look, chosen: Callable[[str], bool] | None) -> Sequence[PacketPath]:
        """Return the packets with the largest overhead in the last minute."""
        with self._lock:
            if self._worst is None:
                return []
            return self._worst.worst(limit, look.moment.since_utc_ns, chosen or (lambda _: True))

    async def cpus(self, look: Look) -> CpuReport:
        """Return which CPU worked on the packets of the look's minute, in the intervals that have ended."""
        if self._stages is None:
            raise UsageError("which CPU works on packets is not counted: start `mace top --cpus`")
        with self._lock:
            chosen = self._stages.chosen(look.moment.since_utc_ns)
        return await asyncio.to_thread(chosen.report)

    def move(self, seconds: int | None, *, to_end: bool = False) -> None:
        """Time goes on by itself."""

    async def record(self) -> str:
        """Begin a recording in the working directory, or end the one that runs."""
        kept = self._keeping()
        if kept.recording is not None:
            return _told(await self._there(kept.end_recording()))
        path = _new_file("mace")
        await self._there(kept.begin_recording(path))
        return f"recording to {_located(path)}; r ends it"

    async def trace(self) -> str:
        """Write the kept seconds as a Perfetto trace in the working directory."""
        kept = self._keeping()
        seconds = kept.seconds
        header, items = await self._there(_kept(kept))
        path = _new_file("pftrace")
        with tempfile.TemporaryDirectory(prefix="mace-top-") as folder:
            sink = CaptureSink(Path(folder) / "kept.mace", sync="never")
            try:
                await sink.open(header)
                for item in items:
                    await sink.write(item)
            finally:
                await sink.aclose()
            await _exported(sink.path, path)
        told = f"wrote the last {seconds:.1f} s to {_located(path)}"
        self._traces.append(told)
        return told

    @property
    def written(self) -> list[str]:
        """A sentence for each file that is complete."""
        return [*map(_told, self._kept.finished if self._kept is not None else ()), *self._traces]

    def _keeping(self) -> KeptStream:
        if self._kept is None:
            assert self._header is not None, "keys are pressed once the source is open"
            source = self._header.source
            raise Unavailable(
                source,
                f"{source} records every packet, so that a file cannot be limited to the chosen packets",
                "choose them with / in the table instead of --container and --device, or use --source bpf or kmod",
            )
        return self._kept

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the measurement's event loop. Raises `StoreError` if the measurement has ended."""
        if self._loop is None or self._ended.is_set():
            work.close()
            raise StoreError("the measurement has ended")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _in_loop(self, call: Callable[[], None]) -> None:
        if self._loop is None:
            call()  # before the loop runs: `Stop` remembers the request
            return
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            pass  # the loop is closed: the measurement has ended

    # The thread of the measurement ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._measure())
        except BaseException as error:  # noqa: BLE001 (raised in the other thread, by `end`)
            self._error = error
        finally:
            self._ended.set()

    async def _measure(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.summary = await runs.measure(
            self._config, self._until, stop=self._stop, tee=self._kept, on_open=self._begun, on_results=self._take
        )

    def _begun(self, header: StreamHeader, chosen: str) -> None:
        with self._lock:
            self._header, self.chosen = header, chosen
            self._worst = WorstPackets(header.host, header.run)
            if self._stages is not None:
                self._stages.begin(header, counters())
        self._opened.set()

    def _take(self, results: Results, summary: Summary) -> None:
        losses, unseen, before, now = self._losses, self._unseen, self._ledger, summary.ledger
        due = len(results.rows.windows) > 0 and self._windows % _LOSSES_EVERY == 0
        self._windows += len(results.rows.windows) > 0
        if due or (before.lost, before.discarded, before.imbalance) != (now.lost, now.discarded, now.imbalance):
            unseen = tuple(summary.unseen())
            losses = tuple(told for told in summary.losses() if told not in unseen)
        with self._lock:
            self._recent.add(results)
            assert self._worst is not None, "the source is open"
            self._worst.add(results)
            if self._stages is not None and len(results.rows.stages):
                self._stages.add(results.rows, counters())
            self._ledger, self._losses, self._unseen = now, losses, unseen
            self._sharers = tuple(summary.on_host_network)


async def _kept(kept: KeptStream) -> tuple[StreamHeader, tuple[Any, ...]]:
    return kept.kept()


def _told(sink: CaptureSink) -> str:
    return f"recorded {sink.records:,} records to {_located(sink.path)}"


def _located(path: Path) -> str:
    """Return a file's name and folder; the name first, because a narrow screen cuts the folder."""
    return f"{path.name} in {path.resolve().parent}"


def _new_file(suffix: str) -> Path:
    return Path(f"mace-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.{suffix}")


async def _exported(capture: Path, trace: Path) -> None:
    """Export a capture in a process of its own, which takes no time from the measurement. Raises `SourceError`."""
    argv = (sys.executable, "-P", "-m", "mace", "export", "perfetto", str(capture), "-o", str(trace))
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = said.decode("utf-8", "replace").strip().splitlines()
        raise SourceError(f"the trace could not be written: {lines[-1] if lines else f'status {process.returncode}'}")
