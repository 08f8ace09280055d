"""Writer of the embedded store: writes results as Parquet segments in one directory; needs no server.

    write() ──→ buffer ──→ encoding thread ──→ segment (temporary name, fsync, rename)
                  ↑ at most 2 × `flush_rows`        ↓ now and then, at low priority
                                             merging of small segments, retention

Rows in a segment are acknowledged: no crash loses them, and no reader sees half of a segment. Rows in the buffer are at
most `flush_interval_s` old. `storage.segments` explains the directory and the segments' names, `storage.tables` the
columns, docs/design/006-store.md the reasons.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.cpus import CpuCounters, CpuReadings, SoftirqCounts, StagePlace
from contracts.errors import StoreError
from contracts.interfaces import StreamHeader
from contracts.results import Results, Totals
from contracts.schema import SCHEMA_VERSION, Delays, RoundTrips
from contracts.topology import Device, newest_names
from contracts.windowtable import WindowTable
from storage import segments, tables, wide
from storage.checksum import has_sum, mapped, mismatch_of
from storage.folding import fold_windows
from storage.joining import Joiner, NotAlike
from storage.ownership import NO_LINK, open_new, refuse_foreign
from storage.sealing.places import has_seal
from storage.segments import (
    HOUR_NS,
    MAINTENANCE_INTERVAL_S,
    NO_HOUR,
    RETENTION_INTERVAL_S,
    Removed,
    SegmentFile,
    by_hour,
)

if TYPE_CHECKING:  # sealing needs an extra
    from storage.sealing.keys import SealKey
    from storage.sealing.segments import StoreSeal

_LOG = logging.getLogger(__name__)
CPUS_INTERVAL_S: Final = 10.0
"""Interval at which the CPUs' counters are stored: 1,000 rows a CPU in three hours."""


FOLDING_S: Final = 0.5
"""Time after which making wide windows goes on in the next round of maintenance: an older store has months of them to
make, which must not take a core from the measurement."""
ABOUT: Final = json.dumps({"format": "mace-store", "schema": SCHEMA_VERSION}).encode()
"""Content of `store.json`."""


def check_schema(root: Path) -> int:
    """Return the schema version of a store, 0 if there is none. Raises `StoreError` if this MACE cannot read it.

    Whoever adds segments to a store of an older version first writes `ABOUT`, so that no older MACE misreads them.
    """
    path = root / "store.json"
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as e:
        raise StoreError(f"{path}: {e.strerror}") from e
    return schema_of(data, str(path))


def schema_of(data: bytes, path: str) -> int:
    """Return the schema version in the content of a `store.json`. Raises `StoreError` for one that is not readable."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise StoreError(f"{path}: not a description of a MACE store: byte {e.start} is not UTF-8") from e
    try:
        version = json.loads(text)["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise StoreError(f"{path}: not a description of a MACE store: {text[:80]!r}") from e
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise StoreError(
            f"{path}: the store has schema version {version}, this MACE knows 1 to {SCHEMA_VERSION};"
            " upgrade MACE, or name another directory"
        )
    return version


def lock_store(root: Path, who: str, *, seals: bool = False) -> int:
    """Lock a store for writing and note the writer in the lock file; returns the file descriptor that holds the lock.

    The lock is a flock, which the kernel releases when the process ends in any way. Raises `StoreError` if another
    writer holds the lock, for a directory of another user, and for a sealed store if the writer does not seal.
    """
    refuse_foreign(root)
    if not seals and has_seal(root):
        raise StoreError(
            f"{root}: the store is sealed, and what another writer adds would not be: add to it by"
            " `mace run --seal KEY`, or name another directory"
        )
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()} ({who})\n".encode(), 0)
    except BlockingIOError:
        held = os.pread(fd, 4096, 0).decode("utf-8", "replace").strip() or "an unknown process"
        os.close(fd)
        raise StoreError(
            f"{root}: {held} is writing to this store, which can have one writer at a time;"
            " stop that writer, or name another directory"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_unwritable(root: Path, who: str) -> None:
    """Raise `StoreError` if another writer holds the store now, or if this version cannot write it."""
    if check_schema(root):
        os.close(lock_store(root, who))


_Reading = TypeVar("_Reading", CpuCounters, SoftirqCounts)


def _each_hour(readings: Sequence[_Reading]) -> Iterator[tuple[int, Sequence[_Reading]]]:
    for hour, chosen in by_hour(np.array([each.utc_ns for each in readings], np.int64)):
        yield hour, readings if chosen is None else [readings[i] for i in chosen]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """What one flush writes."""

    delays: list[Delays]
    windows: list[WindowTable]
    stages: list[WindowTable]
    cpus: list[CpuReadings]
    trips: list[RoundTrips]
    places: tuple[StagePlace, ...]
    """What the `device` of `stages` points to."""
    devices: tuple[Device, ...]
    """What the rows' and places' `device` points to."""
    totals: Totals

    @property
    def rows(self) -> int:
        """Number of rows of all tables."""
        return (
            sum(map(len, self.delays))
            + sum(map(len, (*self.windows, *self.stages)))
            + sum(len(each.counters) + len(each.softirqs) for each in self.cpus)
            + sum(len(each.rows) for each in self.trips)
        )


class EmbeddedStore:
    """A `contracts.interfaces.Sink` that writes Parquet segments to a directory.

    Raises `StoreError` if another writer holds the store, if the store has an unknown schema, if it already has the
    run, and when rows cannot be written (the message has their number; acknowledged rows stay).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        rows: bool = True,
        flush_interval_s: float = 1.0,
        flush_rows: int = tables.ROW_GROUP_ROWS,
        fsync: bool = True,
        max_age_s: float | None = None,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
        cpus: Callable[[], CpuReadings] | None = None,
        seal: SealKey | None = None,
    ) -> None:
        """`rows=False` keeps windows and ledger only. `clock` gives UTC seconds, for retention.

        With `seal`, `STORE/seal` states each segment, signed by this key (`storage.sealing.segments`).

        `cpus` reads the machine's CPUs; readings are stored when a run begins, each `CPUS_INTERVAL_S`, and at its end.
        """
        self.path = Path(path)
        self._rows, self._flush_interval_s, self._flush_rows, self._fsync = rows, flush_interval_s, flush_rows, fsync
        self._max_age_s, self._max_bytes, self._clock = max_age_s, max_bytes, clock
        self._lock_fd = -1
        self._key = seal
        self._seal: StoreSeal | None = None
        self._closed_in_order = False
        self._header: StreamHeader | None = None
        self._flush = 1
        # The buffer: write() fills it, _submit() empties it.
        self._delays: list[Delays] = []
        self._windows: list[WindowTable] = []
        self._stages: list[WindowTable] = []
        self._places: tuple[StagePlace, ...] = ()
        self._read_cpus, self._cpus = cpus, list[CpuReadings]()
        self._trips: list[RoundTrips] = []
        self._devices: tuple[Device, ...] = ()
        self._totals: Totals | None = None
        self._buffered = 0
        self._dirty = False
        # One worker, so that segments appear in the order of writing.
        self._encoder: ThreadPoolExecutor | None = None
        self._encoding: asyncio.Future[None] | None = None
        self._merger: ThreadPoolExecutor | None = None
        self._merging: asyncio.Future[int] | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._closing = threading.Event()
        self._failure: StoreError | None = None
        self._damaged: set[Path] = set()
        # For merging: hours with new segments, hours to examine, and the newest flush that may be merged.
        self._put_in: deque[tuple[str, int]] = deque()
        self._unmerged = {table: {NO_HOUR} for table in segments.TABLES}
        self._settled = sys.maxsize
        # Days whose windows are to be folded, and the newest hour of windows when they were last examined.
        self._unfolded: set[int] | None = None
        self._folded_hour = NO_HOUR
        self.rows_stored = 0
        """Number of rows of `delays` that are in segments."""
        self.rows_not_stored = 0
        """Number of rows of all tables that could not be written."""
        self.merged = 0
        """Number of segments that merging has replaced."""
        self.removed = Removed()
        """Segments and bytes that retention has removed."""

    # Lifecycle: _release releases everything that _acquire acquires.

    async def open(self, header: StreamHeader) -> None:
        """Lock the store, remove leftovers of a crash, and write the run's row."""
        self._header = header
        self._encoder = ThreadPoolExecutor(1, "mace-store")
        self._merger = ThreadPoolExecutor(1, "mace-merge")
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._encoder, self._acquire, header)
        except BaseException:
            self._release()
            raise
        self._note_cpus()
        self._ticker = asyncio.create_task(self._tick(), name="store-flush")

    async def write(self, results: Results) -> None:
        """Buffer results; waits only if the buffer is full and the previous flush is still being written."""
        self._raise_failure()
        rows, totals = results.rows, results.totals
        if self._rows and len(rows.delays):
            self._delays.append(rows.delays)
            self._buffered += len(rows.delays)
        if len(rows.windows):
            self._windows.append(rows.windows)
        if len(rows.stages):
            self._stages.append(rows.stages)
            self._places = rows.places
        self._devices = rows.devices
        before = self._totals.on_host_network if self._totals is not None and self._dirty else ()
        sharers = newest_names((*before, *totals.on_host_network))
        self._totals = replace(totals, on_host_network=sharers)
        self._dirty = True
        while self._buffered >= self._flush_rows:
            await self._submit()
            self._raise_failure()

    def add_round_trips(self, trips: RoundTrips) -> None:
        """Buffer round trips of the run, which the next flush writes; `write` has given the run's totals before."""
        self._trips.append(trips)
        self._dirty = True

    async def aclose(self) -> None:
        """Flush, mark the run as ended, and unlock. Raises `StoreError` if rows could not be stored."""
        if self._lock_fd < 0:
            return
        self._closing.set()
        try:
            if self._ticker is not None:
                self._ticker.cancel()
                await asyncio.gather(self._ticker, return_exceptions=True)
            await self._submit(closed=True)
            if self._encoding is not None:
                await self._encoding
            if self._merging is not None:
                await self._merging
            self._raise_failure()
            self._closed_in_order = True
        finally:
            self._release()

    def _acquire(self, header: StreamHeader) -> None:
        self._take_hold(f"run {header.run}", header)
        try:
            self._refuse_known_run(header)
            run = tables.runs_table(header)
            self._put("runs", NO_HOUR, run)
            self._flush += 1
            self._retain()
        except OSError as e:
            raise self._cannot("open the store", e) from e

    def _take_hold(self, who: str, header: StreamHeader | None = None) -> None:
        """Make the store if there is none, lock it, and remove leftovers of a crash."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            known = check_schema(self.path)
            strange = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(("lock", "store.json")))
            if not known and strange:
                raise StoreError(f"{self.path}: not a MACE store, and not empty (found {strange[0]!r})")
            self._lock_fd = lock_store(self.path, who, seals=self._key is not None)
            if (self.path / segments.UNFINISHED / "plan.json").exists():
                raise StoreError(
                    f"{self.path}: a replay was stopped here; finish it with `mace replay --resume`, or name another"
                    " directory"
                )
            if known < SCHEMA_VERSION:
                about = segments.write_bytes(memoryview(ABOUT))
                segments.write_whole(self.path / "store.json", about, fsync=self._fsync)
            if self._key is not None and header is not None:
                from storage.sealing.segments import StoreSeal  # noqa: PLC0415 (needs an extra)

                self._seal = StoreSeal.open(self.path, self._key, header, sync=self._fsync)
            segments.remove_leftovers(self.path)
            self._flush = segments.next_flush(self.path)
        except OSError as e:
            raise self._cannot("open the store", e) from e

    def _release(self) -> None:
        for executor in (self._encoder, self._merger):
            if executor is not None:
                executor.shutdown(wait=True)
        self._encoder = self._merger = None
        try:
            if self._seal is not None:
                self._seal.close(self._header if self._closed_in_order else None)
        except OSError as e:
            raise self._cannot("close the seal", e) from e
        finally:
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def _refuse_known_run(self, header: StreamHeader) -> None:
        """Raise `StoreError` for a run that the store has, because its packets would count twice."""
        for each in segments.listing(self.path, "runs"):
            try:
                # `read_table` would load Arrow's datasets.
                with pq.ParquetFile(each.path, page_checksum_verification=True) as file:
                    known = file.read(["host", "run"]).to_pylist()
            except (pa.ArrowInvalid, OSError):
                continue  # a damaged segment, which readers report, must not prevent storing new runs
            if {"host": header.host, "run": header.run} in known:
                raise StoreError(
                    f"{self.path}: already holds run {header.run} of host {header.host}; its packets would count"
                    " twice: name another directory"
                )

    # Flushing.

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        maintained = retained = told = loop.time()
        while True:
            await asyncio.sleep(self._flush_interval_s)
            if loop.time() - told >= CPUS_INTERVAL_S:
                told = loop.time()
                self._note_cpus()
            await self._submit()
            now = loop.time()
            if now - retained >= RETENTION_INTERVAL_S and self._encoder is not None:
                retained = now
                # In the encoding thread, so that it removes no directory to which that thread is about to write.
                await loop.run_in_executor(self._encoder, self._retain_quietly)
            if now - maintained >= MAINTENANCE_INTERVAL_S and (self._merging is None or self._merging.done()):
                maintained = now
                self._merging = loop.run_in_executor(self._merger, self.merge)

    async def _submit(self, *, closed: bool = False) -> None:
        """Pass the buffer to the encoding thread, after that has finished the flush before."""
        while (busy := self._encoding) is not None:
            # Shielded, so that a cancelled caller does not cancel a write. `_store` never raises.
            await asyncio.shield(busy)
            if self._encoding is busy:
                self._encoding = None
        if self._totals is None or not (self._dirty or closed) or self._encoder is None:
            return
        if closed:
            self._note_cpus()
        buffer = _Buffer(
            self._delays,
            self._windows,
            self._stages,
            self._cpus,
            self._trips,
            self._places,
            self._devices,
            self._totals,
        )
        self._delays, self._windows, self._stages, self._cpus, self._trips = [], [], [], [], []
        self._buffered, self._dirty = 0, False
        loop = asyncio.get_running_loop()
        self._encoding = loop.run_in_executor(self._encoder, self._store, buffer, closed)

    def _note_cpus(self) -> None:
        if self._read_cpus is not None:
            self._cpus.append(self._read_cpus())

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _store(self, buffer: _Buffer, closed: bool) -> None:
        """Write one flush: ledger, windows, delays. Runs in the encoding thread and leaves errors in `_failure`."""
        header = self._header
        assert header is not None
        try:
            delays, windows = Delays.concatenate(buffer.delays), WindowTable.concatenate(buffer.windows)
            devices, totals = buffer.devices, buffer.totals
            not_stored: list[tuple[str, int, OSError | StoreError]] = []

            def put(table: str, hour: int, rows: pa.Table) -> bool:
                try:
                    self._put(table, hour, rows)
                except (OSError, StoreError) as e:
                    not_stored.append((table, len(rows), e))
                    if table != "ledger":
                        self.rows_not_stored += len(rows)
                    return False
                return True

            rows_stored = self.rows_stored
            ledger_hour = totals.upto_utc_ns // HOUR_NS

            def put_ledger() -> None:
                # The ledger counts the rows of this flush, which follow; if they fail, it is written again.
                stored = self.rows_stored if not_stored else rows_stored + len(delays)
                put("ledger", ledger_hour, self._ledger_row(header, totals, stored, closed))

            put_ledger()
            if closed and totals.cost:
                put("cost", NO_HOUR, tables.cost_table(header, totals.upto_utc_ns, totals.cost))
            for hour, chosen in by_hour(windows.column("start_utc_ns")):
                here = windows if chosen is None else windows[chosen]
                put("windows", hour, tables.windows_table(header, here, devices))
            stages = WindowTable.concatenate(buffer.stages)
            for hour, chosen in by_hour(stages.column("start_utc_ns")):
                here = stages if chosen is None else stages[chosen]
                put("stages", hour, tables.stages_table(header, tables.StageRows(here, buffer.places, devices)))
            for hour, counters in _each_hour([one for each in buffer.cpus for one in each.counters]):
                put("cpus", hour, tables.cpus_table(header, counters))
            for hour, softirqs in _each_hour([one for each in buffer.cpus for one in each.softirqs]):
                put("softirqs", hour, tables.softirqs_table(header, softirqs))
            for trips in buffer.trips:
                table = tables.round_trips_table(header, trips)
                for hour, chosen in by_hour(tables.trip_times(header, trips)):
                    put("round_trips", hour, table if chosen is None else table.take(chosen))
            for hour, chosen in by_hour(delays.utc_ns):
                part = delays if chosen is None else delays[chosen]
                if put("delays", hour, tables.delays_table(header, part, devices)):
                    self.rows_stored += len(part)
            if not_stored:
                put_ledger()
                raise self._cannot(
                    "write " + ", ".join(f"{rows:,} rows of {table}" for table, rows, _ in not_stored), not_stored[0][2]
                ) from not_stored[0][2]
        except StoreError as e:
            self._failure = e
        except Exception as e:  # noqa: BLE001 (a defect in this thread must stop the run, like one elsewhere)
            self.rows_not_stored += buffer.rows
            self._failure = StoreError(f"{self.path}: cannot encode a flush: {type(e).__name__}: {e}")
            self._failure.__cause__ = e
        finally:
            self._flush += 1

    def _ledger_row(self, header: StreamHeader, totals: Totals, rows_stored: int, closed: bool) -> pa.Table:
        row = tables.LedgerRow.of(
            header, totals, rows_stored=rows_stored, rows_not_stored=self.rows_not_stored, closed=closed
        )
        return tables.ledger_table([row], self._flush)

    def _put(self, table: str, hour: int, rows: pa.Table) -> None:
        """Write one segment. OSErrors pass."""
        target = segments.segment(self.path, table, hour, self._flush, self._flush, len(rows))
        data = memoryview(tables.encode(rows, table))
        segments.write_whole(target.path, segments.write_bytes(data), fsync=self._fsync)
        if self._seal is not None:
            self._seal.put(target, data)
        # After the segment is complete: merging, in another thread, examines an announced hour once.
        self._put_in.append((table, hour))

    def _cannot(self, what: str, e: OSError | StoreError) -> StoreError:
        why = (e.strerror if isinstance(e, OSError) else None) or str(e)
        lost = f" ({self.rows_not_stored:,} rows not stored so far)" if self.rows_not_stored else ""
        return StoreError(
            f"{self.path}: cannot {what}: {why}{lost}; all earlier segments stay readable;"
            " free space, or limit the store by age or size"
        )

    # Maintenance.

    def _retain(self) -> None:
        if self._max_age_s is not None or self._max_bytes is not None:
            before = self._seal.removed if self._seal is not None else None
            self.removed += segments.retain(self.path, self._clock(), self._max_age_s, self._max_bytes, before=before)
        if self._seal is not None:
            self._seal.shorten()

    def _retain_quietly(self) -> None:
        try:
            self._retain()
        except OSError as e:
            _LOG.warning("%s: retention: %s", self.path, e)

    def merge(self) -> int:
        """Merge small segments; returns the decrease in their number. Never raises, because no row depends on merging.

        The first call examines all hours, later calls only from the earliest hour that may have segments to merge: a
        store of months has thousands of hours. Memory is bounded by `MERGE_BATCH_ROWS` rows and the last batch read;
        windows weigh more (`ROW_WEIGHT`), so fewer of them are held.
        """
        gone, upto = 0, self._settled
        while self._put_in:
            table, hour = self._put_in.popleft()
            self._unmerged[table].add(hour)
            if table == "windows" and self._unfolded is not None:
                self._unfolded.add(segments.first_hour_of_day(hour))
        for table, hours in self._unmerged.items():
            if not hours:
                continue
            found = segments.listing(self.path, table, min(hours) * HOUR_NS)
            settled = [each for each in found if each.last <= upto]
            # The newest hour is merged as it grows, or once there is a newer one.
            hours.clear()
            hours.update(each.hour for each in settled[-1:])
            hours.update(each.hour for each in found if each.last > upto)
            ends: list[int] = []
            if table == "windows" and settled:
                day_ns = wide.day_of(settled[0]) * HOUR_NS
                ends = [
                    n
                    for each in segments.listing(self.path, wide.STANDING, day_ns)
                    for n in (each.first - 1, each.last)
                ]
            for group in segments.mergeable(settled, self._damaged, ends):
                if self._closing.is_set():
                    return gone
                try:
                    self._merge(group)
                except FileNotFoundError:
                    continue  # retention has removed a segment meanwhile
                except (OSError, pa.ArrowInvalid, StoreError) as e:
                    _LOG.warning("%s: merging %d segments: %s", self.path, len(group), e)
                    hours.add(group[0].hour)
                    continue
                finally:
                    # Arrow's allocator keeps a thread's freed memory for that thread, and this thread rarely runs.
                    pa.default_memory_pool().release_unused()
                gone += len(group) - 1
        self.merged += gone
        self._fold(upto)
        return gone

    def _fold(self, upto: int) -> None:
        """Make wide windows of the hours that have ended, up to the flush `upto`. Never raises: no row depends on them.

        It begins with all days, then examines only those with new windows, once an hour has ended.
        """
        newest = max((hour for hour in self._unmerged["windows"]), default=NO_HOUR)
        if self._unfolded is not None and newest <= self._folded_hour:
            return
        days, end_s, early = self._unfolded, time.monotonic() + FOLDING_S, False

        def stopped() -> bool:
            nonlocal early
            early = self._closing.is_set() or time.monotonic() > end_s
            return early

        fold_windows(self.path, days, upto, seal=self._seal, damaged=self._damaged, stopped=stopped, fsync=self._fsync)
        if early:
            return
        self._unfolded, self._folded_hour = set(), newest
        # The newest day grows on, and is joined when it has ended.
        self._unfolded |= {day for day in (days or ()) if day + segments.DAY_HOURS > newest}
        if newest != NO_HOUR:
            self._unfolded.add(segments.first_hour_of_day(newest))

    def _merge(self, group: list[SegmentFile]) -> None:
        first, last = group[0], group[-1]
        merged = segments.segment(
            self.path, first.table, first.hour, first.first, last.last, sum(s.rows for s in group)
        )
        seal = self._seal

        def write(temporary: Path) -> None:
            if seal is not None:
                self._check_sealed(seal, group)
            self._copy(group, temporary, merged.rows)

        def written() -> None:
            if seal is not None:
                seal.merged(merged, group)

        segments.replace_covered(merged, group, write, fsync=self._fsync, written=written)

    def _check_sealed(self, seal: StoreSeal, group: list[SegmentFile]) -> None:
        for each in group:
            try:
                seal.check(each)
            except StoreError:
                self._damaged.add(each.path)
                raise

    def _copy(self, group: list[SegmentFile], target: Path, rows: int) -> None:
        """Write the rows of a group to `target`. Notes a damaged segment in `_damaged` and raises `StoreError`.

        Pages of large segments are moved. Rows of small segments are decoded, and encoded in larger row groups.
        """
        table = group[0].table
        most = segments.MERGE_BATCH_ROWS // segments.ROW_WEIGHT[table]
        waiting: list[pa.Table] = []
        waits = 0

        def write_out(joiner: Joiner) -> None:
            nonlocal waits
            if waits:
                # One dictionary per row group: with several, Parquet falls back to plain strings.
                whole = pa.concat_tables(waiting).unify_dictionaries().combine_chunks()
                waiting.clear()
                waits = 0
                joiner.add(tables.encode(whole, table, most).to_pybytes())

        with open_new(target) as sink, Joiner(sink, tables.nothing_encoded(table)) as joiner:
            for each in group:
                try:
                    with closing(mapped(each.path)) as data:
                        # Verified before its rows get a new checksum.
                        if why := mismatch_of(data):
                            raise pa.ArrowInvalid(why)
                        # Without a checksum, only decoding can find damage.
                        if segments.movable(each) and has_sum(data):
                            write_out(joiner)
                            with suppress(NotAlike):
                                joiner.add(data)
                                continue
                    for batch in self._decoded(each, most):
                        waiting.append(batch)
                        waits += len(batch)
                        if waits >= most:
                            write_out(joiner)
                except FileNotFoundError:
                    raise
                except (pa.ArrowInvalid, OSError) as e:
                    if not isinstance(e, OSError) or e.errno is None:
                        self._damaged.add(each.path)
                        raise StoreError(f"{each.path}: damaged: {e}") from e
                    raise
            write_out(joiner)
        if joiner.rows != rows:
            raise StoreError(f"{target}: {joiner.rows} rows where the segments' names promise {rows}")

    def _decoded(self, segment: SegmentFile, most: int) -> Iterator[pa.Table]:
        """Yield a segment's rows, at most `most` at a time, with the columns of today."""
        names = [f.name for f in tables.SCHEMAS[segment.table] if pa.types.is_dictionary(f.type)]
        with pq.ParquetFile(segment.path, read_dictionary=names) as file:
            for batch in file.iter_batches(batch_size=most, use_threads=False):
                yield tables.grown(pa.Table.from_batches([batch]), segment.table)
