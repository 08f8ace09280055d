"""Feeds one stream to an engine, for live runs, replays, the ingest and the Python API.

    item ──► take() ──► engine ──► results, whose totals say what the source has counted by then

The feeder is synchronous, without I/O and without a clock, like the engine. The caller calls `take` for each item of
the stream, and reads all results of an item before the next item. `finish` ends a stream, `stop_at` a part of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from contracts.interfaces import Progress, StreamItem
from contracts.records import Batch
from contracts.results import Results, Totals
from contracts.scheduling import ReadTasks
from contracts.schema import HookCost
from contracts.topology import Role, Topology
from correlator.engine import Engine


@dataclass(frozen=True, slots=True)
class SliceLimit:
    """How much an engine gathers before it works, for a caller that chooses its own slices: each slice has a fixed
    cost.
    """

    span_ns: int
    """The engine works once the items span this time of the stream, ns, ..."""
    records: int
    """... or hold this number of records."""


def _nothing_discarded() -> int:
    return 0


def _no_cost() -> tuple[HookCost, ...]:
    return ()


class Feeder:
    """Feeds one stream to one engine. Can be pickled if the callables can."""

    def __init__(
        self,
        engine: Engine,
        discarded: Callable[[], int] = _nothing_discarded,
        cost: Callable[[], tuple[HookCost, ...]] = _no_cost,
        limit: SliceLimit | None = None,
        tasks: ReadTasks | None = None,
    ) -> None:
        """`discarded` returns the number of records that the source has discarded so far, `cost` the cost of observing.

        Without `limit` the engine works when its own slices end. `tasks` reads the tasks in the containers' network
        namespaces, if the engine's configuration asks for their waiting.
        """
        self._tasks = tasks if engine.waiting else None
        self._netns: frozenset[int] = frozenset()
        """Inodes of the containers' network namespaces, by the newest topology."""
        self.engine = engine
        self._discarded, self._cost = discarded, cost
        self._limit = limit
        self._sliced_ns = 0
        """With a limit: time of the stream up to which the engine has worked; 0 before the first record."""
        self._waiting = 0
        """Records gathered since then."""

    def run(self, items: Iterable[StreamItem]) -> Iterator[Results]:
        """Yield all results of a stream, in order. Raises `WireError` for impossible times."""
        for item in items:
            yield from self.take(item)
        yield self.finish()

    def take(self, item: StreamItem) -> Iterator[Results]:
        """Yield the results that the next item completes, one at a time: a batch can complete one per record.

        Raises `WireError` for impossible times.
        """
        if self._tasks is not None:
            if isinstance(item, Topology):
                self._netns = frozenset(d.netns for d in item.devices if d.role is Role.INNER)
            self.engine.follow(self._tasks(self._netns))
        if not isinstance(item, Progress):
            yield from map(self._completed, self.engine.pieces(item))
        elif self._limit is None:
            yield from map(self._completed, self.engine.advance(item.upto_ns))
        if self._limit is not None and not isinstance(item, Topology):
            yield from map(self._completed, self._gathered(item, self._limit))

    def stop_at(self, upto_ns: int) -> Iterator[Results]:
        """Yield the results of all waiting records before a cut, from which another engine continues with this one's
        state.
        """
        yield from map(self._completed, self.engine.stop_at(upto_ns))

    def finish(self) -> Results:
        """Return the remaining results at the end of the stream."""
        if self._tasks is not None:
            self.engine.follow(self._tasks(self._netns))
        return self._completed(self.engine.finish())

    def totals(self, upto_ns: int) -> Totals:
        """Return the totals of the run so far, for counts that are newer than the last results."""
        return self._counted(self.engine.so_far(upto_ns))

    def _gathered(self, item: Batch | Progress, limit: SliceLimit) -> list[Results]:
        if isinstance(item, Progress):
            upto_ns = item.upto_ns
        elif len(item):
            self._sliced_ns = self._sliced_ns or int(item.ts_ns[0])
            self._waiting += len(item)
            upto_ns = int(item.ts_ns[-1])
        else:
            upto_ns = self._sliced_ns
        if upto_ns - self._sliced_ns < limit.span_ns and self._waiting < limit.records:
            return []
        self._sliced_ns, self._waiting = upto_ns, 0
        return self.engine.advance(upto_ns, at_once=True)

    def _completed(self, results: Results) -> Results:
        return replace(results, totals=self._counted(results.totals))

    def _counted(self, totals: Totals) -> Totals:
        return replace(totals, ledger=replace(totals.ledger, discarded=self._discarded()), cost=self._cost())
