"""Looks at a minute of a store, for `mace top --store` and for recordings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from contracts.cpu_figures import CpuReport
from contracts.errors import StoreError, UsageError
from contracts.figures import Summary
from contracts.ledger import Ledger
from contracts.recent import SECONDS, moment_of
from mace.shown import cpus
from mace.shown.top.feed import Look
from storage.query import Filter, PacketPath, StoreReader

_NS: Final = 1_000_000_000
_MOST_CONTAINERS: Final = 20
"""Most containers whose worst packets are searched one by one, each in a tenth of a second."""


class StoredFeed:
    """A `Feed` of a store. It begins with the minute before `until_utc_ns`, or with the last one."""

    is_live: Final = False

    def __init__(self, store: StoreReader, title: str, until_utc_ns: int | None = None) -> None:
        """Find the first and the last second. Raises `StoreError` for a store without a run."""
        runs = store.runs()
        if not runs:
            raise StoreError(f"{store.path}: the store has no run yet")
        self._store = store
        self.title = title
        self._first_ns = min(run.started_utc_ns for run in runs) // _NS * _NS
        self._last_ns = max(self._first_ns + _NS, -(-max(run.upto_utc_ns for run in runs) // _NS) * _NS)
        self._until_ns = self._last_ns
        if until_utc_ns is not None:
            self._until_ns = self._within(until_utc_ns // _NS * _NS)
        self._asked = False

    @property
    def is_over(self) -> bool:
        """Whether a signal asked for the end."""
        return self._asked

    def interrupt(self) -> None:
        """Handle a signal."""
        self._asked = True

    async def look(self) -> Look:
        """Read the minute before the present time of the view."""
        return await asyncio.to_thread(self._look)

    async def worst(self, limit: int, look: Look, chosen: Callable[[str], bool] | None) -> Sequence[PacketPath]:
        """Return the packets with the largest overhead of the minute."""
        return await asyncio.to_thread(self._worst, limit, look, chosen)

    async def cpus(self, look: Look) -> CpuReport:
        """Return which CPU worked on the minute's packets, as `mace report --cpus` computes it."""
        return await asyncio.to_thread(self._cpus, look)

    def move(self, seconds: int | None, *, to_end: bool = False) -> None:
        """Go to another second of the store."""
        if to_end:
            self._until_ns = self._last_ns
        elif seconds is None:
            self._until_ns = self._first_ns + _NS
        else:
            self._until_ns = self._within(self._until_ns + seconds * _NS)

    async def record(self) -> str:
        """Refuse: a store has rows, and no records."""
        raise UsageError("a store has no records to write to a capture: r works while `mace top` measures")

    async def trace(self) -> str:
        """Refuse: a trace needs the records."""
        raise UsageError("a trace is made of a recording: mace export perfetto FILE -o OUT")

    def _within(self, until_ns: int) -> int:
        return min(max(until_ns, self._first_ns + _NS), self._last_ns)

    def _look(self) -> Look:
        until_ns = self._until_ns
        where = Filter(max(until_ns - SECONDS * _NS, self._first_ns), until_ns)
        windows, places = self._store.windows(where)
        runs = self._store.runs(where)
        summary = Summary(
            ledger=sum((run.ledger for run in runs), Ledger()), rows_not_stored=sum(run.rows_not_stored for run in runs)
        )
        losses = summary.losses()
        if self._store.damaged:
            losses.append(
                f"{len(self._store.damaged)} damaged segments ({self._store.rows_damaged():,} rows) were skipped."
            )
        assert where.since_ns is not None
        return Look(
            moment_of(windows, places, where.since_ns, until_ns),
            summary.ledger,
            tuple(losses),
            tuple(sorted({sharer.container for sharer in self._store.sharers(where)})),
            whole_runs=True,
        )

    def _cpus(self, look: Look) -> CpuReport:
        # Stages are counted in intervals, whose first and last one reach beyond the store's rows.
        since_ns, until_ns = look.moment.since_utc_ns, look.moment.until_utc_ns
        whole = Filter(
            None if since_ns <= self._first_ns else since_ns, None if until_ns >= self._last_ns else until_ns
        )
        return cpus.figures(self._store, whole)

    def _worst(self, limit: int, look: Look, chosen: Callable[[str], bool] | None) -> list[PacketPath]:
        where = Filter(look.moment.since_utc_ns, look.moment.until_utc_ns)
        if chosen is None:
            return self._store.worst(limit, where)
        names = sorted({place.container for place in look.moment.places if place.container and chosen(place.container)})
        if len(names) > _MOST_CONTAINERS:
            raise UsageError(f"the filter matches {len(names)} containers: narrow it to {_MOST_CONTAINERS} or fewer")
        found: dict[tuple[str, str, int], PacketPath] = {}
        for name in names:
            for path in self._store.worst(limit, replace(where, container=name)):
                found[path.host, path.run, path.packet] = path
        return sorted(found.values(), key=lambda path: -max(path.overhead_ns.values(), default=0))[:limit]
