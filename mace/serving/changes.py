"""Whether a store has changed, for pages that follow a live run, without reading any row.

A store changes when a segment appears. The writer begins a flush with the ledger and ends it with the rows, so that a
look between the two is followed by another change. While nobody asks, nobody looks: a page that is stuck or closed
costs nothing.

Beside a measurement in the same process, following a store takes a bounded share of a CPU: the more the views of a
state cost, the later the next state is seen. Until then views are computed from the store as it is, and kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage import segments

_LOOK_S: Final = 1.0
"""Least time between two looks at the directory, however many pages ask; the writer flushes once a second."""
_MOST_LOOK_S: Final = 60.0
"""Most time between two looks, however much the views cost."""


@dataclass(frozen=True, slots=True)
class State:
    """The state of a store."""

    number: int
    """Grows with every change that was seen."""
    flush: int
    """Number of the newest flush."""


class Changes:
    """The newest state of a store; thread-safe."""

    def __init__(self, store: Path, share: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`share`: the CPUs that views of new states may take, on average; None sets no limit. `clock` is in s."""
        self._store, self._share, self._clock = store, share, clock
        self._spent_s = 0.0
        self._lock = threading.Lock()
        self._looked_s = float("-inf")
        self._seen: frozenset[str] = frozenset()
        self._state = State(0, 0)

    def spend(self, seconds: float) -> None:
        """Note that views of the present state took so much time of a CPU."""
        with self._lock:
            self._spent_s += seconds

    def state(self) -> State:
        """Return the present state; looks at the directory at most once a second. Raises `StoreError`."""
        with self._lock:
            rest_s = self._spent_s / self._share if self._share else 0.0
            if self._clock() - self._looked_s < min(max(_LOOK_S, rest_s), _MOST_LOOK_S):
                return self._state
            live = [each for table in ("ledger", "runs") for each in segments.listing(self._store, table)]
            # Rows are of the hours that the ledger was written in, or a little older; a replay's rows all come at once.
            newest = max((each.hour for each in live), default=0) - 1
            since_ns = max(newest, 0) * segments.HOUR_NS
            live += [
                each
                for table in ("windows", "delays", "round_trips")
                for each in segments.listing(self._store, table, since_ns)
            ]
            seen = frozenset(str(each.path) for each in live)
            if seen != self._seen:
                self._state = State(self._state.number + 1, max((each.last for each in live), default=0))
                self._seen = seen
            self._looked_s, self._spent_s = self._clock(), 0.0
            return self._state
