"""Writer of the embedded store for many runs: the same directory and tables, with rows of many hosts in a segment.

A store per host would write some thousand files a second for a thousand hosts. Here one flush has the results of all
hosts since the last flush. A flush counts as stored when the caller has called `settled`; later flushes are removed at
the next start, so that a crash leaves whole flushes only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import StoreError
from contracts.figures import ranks
from contracts.interfaces import StreamHeader
from contracts.results import Rows, Totals
from contracts.schema import Delays
from contracts.windowtable import WindowTable
from storage import segments, tables
from storage.checksum import mismatch
from storage.embedded import EmbeddedStore
from storage.segments import MAINTENANCE_INTERVAL_S, NO_HOUR, RETENTION_INTERVAL_S, by_hour, partition

_LOG: Final = logging.getLogger(__name__)
_DEVICES: Final = 30_000
"""Most devices of all hosts in a segment, whose columns can number 2^15 names."""


@dataclass(frozen=True, slots=True)
class RunPart:
    """The results of one run in a flush."""

    header: StreamHeader
    rows: Rows
    totals: Totals | None
    """The latest totals; None if there are no results yet."""
    rows_stored: int
    """Number of rows of `delays` that the run has stored, including this part's."""
    begins: bool = False
    closed: bool = False
    """Whether the run's END has arrived."""
    ended: bool = False
    """Whether the run has ended, with or without an END."""


@dataclass(frozen=True, slots=True)
class Unstorable:
    """A part that cannot be converted to tables, and the reason."""

    part: RunPart
    why: str


_HourRows = tuple[str, int, pa.Table]
"""Table, hour, and the rows that become one segment."""


class FleetStore(EmbeddedStore):
    """Writer of many runs. Call `hold` and `put_back`, then `flush` and `settled` in turn, and `let_go` at the end."""

    def __init__(
        self,
        path: Path,
        *,
        fsync: bool = True,
        max_age_s: float | None = None,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(path, fsync=fsync, max_age_s=max_age_s, max_bytes=max_bytes)
        # Flushes that are not settled must not be merged: `put_back` could not remove them.
        self._settled = 0
        self._known: dict[str, set[bytes]] = {}
        """Digests of each host's stored runs; digests, because a run's name may be long."""
        self._maintained = self._retained = 0.0

    async def hold(self, who: str) -> int:
        """Lock the store and remove leftovers of a crash; returns the newest flush. Raises `StoreError`."""
        self._encoder = ThreadPoolExecutor(1, "mace-store")
        self._merger = ThreadPoolExecutor(1, "mace-merge")
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._encoder, self._take_hold, who)
        except BaseException:
            self._release()
            raise
        self._maintained = self._retained = loop.time()
        self._settled = self._flush - 1
        return self._settled

    def put_back(self, flush: int) -> int:
        """Remove the segments of flushes after this one; returns their number. Call it before the first `flush`."""
        gone = 0
        for table in segments.TABLES:
            for each in segments.listing(self.path, table):
                if each.last > flush:
                    each.path.unlink()
                    gone += 1
        self._flush, self._settled = flush + 1, flush
        self._known = self._stored_runs()
        return gone

    def knows(self, header: StreamHeader) -> bool:
        """Return whether the store has this run."""
        return _digest(header.run) in self._known.get(header.host, ())

    def runs_of(self, host: str) -> int:
        """Return how many runs of a host the store has."""
        return len(self._known.get(host, ()))

    async def flush(self, parts: Sequence[RunPart]) -> tuple[int, list[Unstorable]]:
        """Write the parts; returns the flush's number, and the parts that cannot be stored (none of their rows is).

        Raises `StoreError`; segments written before the error do not count.
        """
        assert self._encoder is not None
        for part in parts:
            if part.begins:
                self._known.setdefault(part.header.host, set()).add(_digest(part.header.run))
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self._write_flush, parts)

    def settled(self, flush: int) -> None:
        """Mark a flush as stored, after the caller's journal has noted it: it may then be merged."""
        self._settled = flush
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._retained >= RETENTION_INTERVAL_S and self._encoder is not None:
            self._retained = now
            loop.run_in_executor(self._encoder, self._retain_quietly)
        if now - self._maintained >= MAINTENANCE_INTERVAL_S and (self._merging is None or self._merging.done()):
            self._maintained = now
            self._merging = loop.run_in_executor(self._merger, self.merge)

    async def let_go(self) -> None:
        """Wait for the threads and unlock the store."""
        self._closing.set()
        try:
            if self._merging is not None:
                await self._merging
        finally:
            self._release()

    def _write_flush(self, parts: Sequence[RunPart]) -> tuple[int, list[Unstorable]]:
        unstorable: list[Unstorable] = []
        try:
            for some in _few_enough(parts):
                for made in self._made(some, unstorable):
                    for table, hour, rows in made:
                        self._put(table, hour, rows)
                    self._flush += 1
        except OSError as error:
            raise self._cannot("write a flush", error) from error
        self.rows_stored += sum(len(part.rows.delays) for part in parts) - sum(
            len(each.part.rows.delays) for each in unstorable
        )
        return self._flush - 1, unstorable

    def _made(self, parts: Sequence[RunPart], unstorable: list[Unstorable]) -> list[list[_HourRows]]:
        """Convert the parts to tables, in the order of writing; several lists if some part cannot be converted."""
        try:
            return [list(self._tables(parts))]
        except Exception as error:  # noqa: BLE001 (an error of one host's rows must not affect the other hosts)
            if len(parts) == 1:
                unstorable.append(Unstorable(parts[0], f"{type(error).__name__}: {error}"))
                return []
        return [made for part in parts for made in self._made([part], unstorable)]

    def _tables(self, parts: Sequence[RunPart]) -> Iterator[_HourRows]:
        begun = [tables.runs_table(part.header) for part in parts if part.begins]
        if begun:
            yield ("runs", NO_HOUR, pa.concat_tables(begun).unify_dictionaries().combine_chunks())
        told = [part for part in parts if part.totals is not None]
        if not told:
            return
        rows = [
            tables.LedgerRow.of(part.header, totals, rows_stored=part.rows_stored, closed=part.closed)
            for part in told
            if (totals := part.totals) is not None
        ]
        yield from _by_hour("ledger", tables.ledger_table(rows, self._flush))
        # One table for all runs, because twenty columns for each would cost a millisecond per run.
        of_run = [part.rows.devices for part in told]
        devices = [device for some in of_run for device in some]
        rank = [number for some in of_run for number in ranks(some)]
        first = np.cumsum([0, *map(len, of_run)])[:-1]
        windows = WindowTable.concatenate([part.rows.windows for part in told])
        if len(windows):
            counts = [len(part.rows.windows) for part in told]
            device = windows.column("device") + np.repeat(first, counts)
            runs = [(part.header, count) for part, count in zip(told, counts, strict=True)]
            yield from _by_hour("windows", tables.windows_table(runs, windows, devices, rank, device))
        stages = [
            tables.stages_table(part.header, tables.StageRows(part.rows.stages, part.rows.places, part.rows.devices))
            for part in told
            if len(part.rows.stages)
        ]
        if stages:
            yield from _by_hour("stages", pa.concat_tables(stages).unify_dictionaries().combine_chunks())
        delays = Delays.concatenate([part.rows.delays for part in told])
        if len(delays):
            counts = [len(part.rows.delays) for part in told]
            delays = replace(delays, device=(delays.device + np.repeat(first, counts)).astype(np.int32))
            runs = [(part.header, count) for part, count in zip(told, counts, strict=True)]
            yield from _by_hour("delays", tables.delays_table(runs, delays, devices, rank))

    def _stored_runs(self) -> dict[str, set[bytes]]:
        found: dict[str, set[bytes]] = {}
        for each in segments.listing(self.path, "runs"):
            try:
                if why := mismatch(each.path):
                    raise pa.ArrowInvalid(why)
                rows = pq.read_table(each.path, columns=["host", "run"], partitioning=None).to_pylist()
            except (pa.ArrowInvalid, OSError) as error:
                raise StoreError(f"{each.path}: cannot be read: {error}") from error
            for row in rows:
                found.setdefault(row["host"], set()).add(_digest(row["run"]))
        return found


def _by_hour(table: str, rows: pa.Table) -> Iterator[_HourRows]:
    for hour, chosen in by_hour(rows["time"].cast(pa.int64()).to_numpy()):
        partition(Path(), table, hour)  # raises for an hour outside the calendar
        yield table, hour, rows if chosen is None else rows.take(chosen)


def _digest(run: str) -> bytes:
    return blake2b(run.encode(), digest_size=16).digest()


def _few_enough(parts: Sequence[RunPart]) -> list[Sequence[RunPart]]:
    """Divide the parts so that each piece has at most `_DEVICES` devices: name columns number them with 16 bits."""
    pieces: list[Sequence[RunPart]] = []
    start = devices = 0
    for index, part in enumerate(parts):
        of_part = len(part.rows.devices)
        devices += of_part
        if devices > _DEVICES and index > start:
            pieces.append(parts[start:index])
            start, devices = index, of_part
    return [*pieces, parts[start:]] if parts else []
