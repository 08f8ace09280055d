"""The hosts of an ingest: for each its stream, its engine, and the results since the last flush.

This module has no connection, journal or clock: frames go in, and results wait until they are fetched. A host's state
can be saved as bytes and restored, after which the host gives the same results as without the interruption.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from collector.remote import Arrival, Counts, HostStream
from contracts.cpus import StagePlace
from contracts.errors import MaceError, NotNowError, StoreError, WireError
from contracts.interfaces import StreamHeader
from contracts.records import Batch
from contracts.results import Results, Rows, Totals
from contracts.schema import Delays
from contracts.topology import Device, newest_names
from contracts.version import VERSION
from contracts.windowtable import WindowTable
from contracts.wire import Head, parse_head
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder, SliceLimit
from storage.fleet import RunPart
from storage.segments import HOUR_NS

SLICE_NS: Final = 2_900_000_000
"""An engine processes the waiting records when they span this much of the stream's own time: three frames of a second
each. Rows that wait so long are still in the store within five seconds."""
_SLICE_RECORDS: Final = 1 << 14
"""An engine also processes the waiting records when there are so many: a slice's fixed cost of a millisecond or two is
then negligible."""

_FORMAT: Final = f"{VERSION}/5"
"""Format of a saved host; the number is raised whenever the pickled classes change."""
_HELD_CELLS: Final = 1 << 22
"""Most histogram cells of a host's open windows, 128 MiB: a hundred times what a host of fifty containers has."""
_HELD_DEVICES: Final = 1 << 16
"""Most devices that a run may announce, including devices that are gone."""
_PASSED_DEVICES: Final = 30_000
"""Most devices of a run that packets have passed, counted once for each container whose packets they were: a store's
segment numbers their names with 16 bits."""
_LARGEST: Final = 1 << 62
"""Largest value of a run's counters, which are stored in 64 bits."""
_WAITING_ROWS: Final = 1 << 21
"""Most rows of a host that wait for the next flush; with so many, the host's frames wait too."""
_WAITING_HOURS: Final = 64
"""Most hours with rows or windows of a host that wait for the next flush; with so many, the host's frames wait too."""
_WAITING_RUNS: Final = 16
"""Most runs of a host that wait for the next flush; with so many, the host's frames wait too."""

RunKey = tuple[str, int]
"""Host, and tag of the run's stream."""


@dataclass(slots=True)
class _Host:
    """The state of one host, which snapshots pickle."""

    stream: HostStream
    feeder: Feeder | None = None
    """Feeds the engine of the current run; None before the first stream and after the end of the last."""
    rows: int = 0
    """Rows of `delays` of this run so far."""
    given_up: str = ""
    """Why the rest of the stream is refused; empty while the stream is accepted."""
    taken: int = 0
    """Frames of the stream that were processed; a frame that made the engine fail is not counted."""


@dataclass(slots=True)
class _Waiting:
    """The results of a host's run since the last flush."""

    header: StreamHeader
    delays: list[Delays] = field(default_factory=list)
    windows: list[WindowTable] = field(default_factory=list)
    stages: list[WindowTable] = field(default_factory=list)
    places: tuple[StagePlace, ...] = ()
    devices: tuple[Device, ...] = ()
    totals: Totals | None = None
    rows: int = 0
    size: int = 0
    """Number of rows in `delays`."""
    hours: set[int] = field(default_factory=set)
    begins: bool = False
    closed: bool = False
    ended: bool = False

    def part(self) -> RunPart:
        flags = {"begins": self.begins, "closed": self.closed, "ended": self.ended}
        rows = Rows(
            Delays.concatenate(self.delays),
            WindowTable.concatenate(self.windows),
            self.devices,
            stages=WindowTable.concatenate(self.stages),
            places=self.places,
        )
        return RunPart(self.header, rows, self.totals, self.rows, **flags)


class Hosts:
    """The hosts of one ingest. `is_stored` returns whether the store already has a run."""

    def __init__(
        self,
        engine: EngineConfig,
        is_stored: Callable[[StreamHeader], bool],
        most: int = 10_000,
        now_utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`most` is the largest number of hosts; frames of further hosts are refused."""
        # The engine's own slices are switched off: `_fed` ends them by `slice_ns` and _SLICE_RECORDS.
        self._engine = replace(engine, slice_ns=1 << 60)
        self._is_stored = is_stored
        self._most, self._now_utc_ns = most, now_utc_ns
        self._known: dict[str, _Host] = {}
        self._parts: dict[RunKey, _Waiting] = {}
        self._of_host: dict[str, list[_Waiting]] = {}
        """The values of `_parts`, by host."""
        self._zstd = zstandard.ZstdCompressor(level=1)
        self.counts = Counts()
        self.slice_ns = SLICE_NS
        """Length of a slice. Set it before the first frame only: after a crash the same frames must give the same
        results."""

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, host: str) -> bool:
        return host in self._known

    def streams(self) -> dict[str, int]:
        """Return the tag of each host's current stream."""
        return {host: known.stream.tag or 0 for host, known in self._known.items()}

    def judge(self, host: str, head: Head, oldest: int) -> Arrival:
        """Return what a frame with this head is (`HostStream.judge`). Raises `WireError` if the run is given up."""
        known = self._known.get(host)
        if known is None and len(self._known) >= self._most:
            raise NotNowError(
                f"host {host[:80]} is refused: the limit of {self._most} hosts is reached ([ingest] hosts)"
            )
        if known is not None and known.given_up and head.stream == known.stream.tag:
            raise WireError(f"this run was given up: {known.given_up}")
        return (known.stream if known is not None else HostStream(host)).judge(head, oldest)

    def next_of(self, host: str, stream: int) -> int:
        """Return the number of the frame that is expected next in a host's stream; 0 if the stream is unknown."""
        known = self._known.get(host)
        if known is None:
            return 0
        return known.taken if known.given_up and stream == known.stream.tag else known.stream.next_of(stream)

    def is_held(self, host: str) -> bool:
        """Return whether the host has reached a limit on what waits for the next flush; its frames must then wait."""
        parts = self._of_host.get(host, ())
        return (
            len(parts) >= _WAITING_RUNS
            or sum(part.size for part in parts) >= _WAITING_ROWS
            or sum(len(part.hours) for part in parts) >= _WAITING_HOURS
        )

    def take_parts(self) -> dict[RunKey, RunPart]:
        """Return the results since the last call, for the store, and forget them."""
        parts = {key: waiting.part() for key, waiting in self._parts.items()}
        self._parts = {}
        self._of_host = {}
        return parts

    def forget_results(self, host: str) -> None:
        """Forget a host's results so far, because the store already has them."""
        if self._of_host.pop(host, None):
            for key in [key for key in self._parts if key[0] == host]:
                del self._parts[key]

    def put_aside(self, host: str) -> bytes:
        """Return a host's state as bytes, for `restore`."""
        packed = self._zstd.compress(pickle.dumps(self._known[host], pickle.HIGHEST_PROTOCOL))
        return _FORMAT.encode() + b"\n" + packed

    def restore(self, host: str, aside: bytes) -> None:
        """Restore a host from the bytes of `put_aside`. Raises `StoreError` if another version of MACE wrote them."""
        self._known[host] = _restored(aside)

    def work(self, host: str, frame: bytes, *, again: bool = False, before: bool = False) -> None:
        """Process the host's next frame: feed the engine and keep the results.

        Raises `WireError` for a frame that does not fit, and then nothing has changed. Any other error leaves the run
        unusable, and the caller has to give it up (`give_up`).

        `before`: the frame was accepted before a restart, so its time is not compared with the clock. `again`: the
        store also has its results already.
        """
        known = self._known.get(host)
        if known is None:
            known = _Host(HostStream(host))
        stream = known.stream
        now_utc_ns = None if before or again else self._now_utc_ns()
        if parse_head(frame).stream != stream.tag:
            header = stream.look(frame, now_utc_ns)
            if not again and self._is_stored(header):
                raise WireError(f"the store already has run {header.run}, and the journal does not have it")
            self._finish(known, closed=False)
            stream.begin(frame, now_utc_ns)
            self._known[host] = known
            engine = Engine(header.clock.offset_ns, self._engine)
            known.feeder = Feeder(engine, stream.count_missing, limit=SliceLimit(self.slice_ns, _SLICE_RECORDS))
            known.rows, known.taken, known.given_up = 0, stream.next, ""
            self._part(known).begins = True
            return
        missing = stream.count_missing()
        item = stream.take(frame, now_utc_ns)
        self.counts.frames += 1
        if stream.count_missing() != missing:
            self.counts.gaps += 1
            self.counts.missing += stream.count_missing() - missing
        if item is None:
            self._finish(known, closed=True)
        elif known.feeder is not None:
            self.counts.records += len(item) if isinstance(item, Batch) else 0
            found = list(known.feeder.take(item))
            _hold_to_limits(known.feeder.engine, found)
            for results in found:
                self._add(known, results)
        known.taken = stream.next

    def give_up(self, host: str, why: str, stream: int | None = None) -> None:
        """Refuse the rest of the host's run because of `why`. Its results so far stay, and another run may follow.

        `stream` is the tag of the run; None is the current one.
        """
        known = self._known.get(host)
        if known is None or known.stream.tag is None or stream not in (None, known.stream.tag):
            return
        self.counts.given_up += 1
        known.feeder, known.given_up = None, why or "no reason is known"
        part = self._part(known)
        part.ended = True

    def _finish(self, known: _Host, *, closed: bool) -> None:
        if known.feeder is not None:
            results = known.feeder.finish()
            _hold_to_limits(known.feeder.engine, [results])
            self._add(known, results)
            self._part(known).closed = closed
            self._part(known).ended = True
            known.feeder = None

    def _part(self, known: _Host) -> _Waiting:
        assert known.stream.tag is not None
        assert known.stream.header is not None
        key = known.stream.host, known.stream.tag
        if key not in self._parts:
            self._parts[key] = _Waiting(known.stream.header)
            self._of_host.setdefault(key[0], []).append(self._parts[key])
        return self._parts[key]

    def _add(self, known: _Host, results: Results) -> None:
        part, rows, totals = self._part(known), results.rows, results.totals
        known.rows += len(rows.delays)
        part.rows, part.devices = known.rows, rows.devices
        if len(rows.delays):
            part.delays.append(rows.delays)
            part.size += len(rows.delays)
            _note_hours(part.hours, rows.delays.utc_ns)
        if len(rows.windows):
            part.windows.append(rows.windows)
            _note_hours(part.hours, rows.windows.column("start_utc_ns"))
        if len(rows.stages):
            part.stages.append(rows.stages)
            part.places = rows.places
            _note_hours(part.hours, rows.stages.column("start_utc_ns"))
        # An engine without records knows no time.
        upto_ns = totals.upto_utc_ns if totals.upto_utc_ns > 0 else part.header.clock.utc_ns
        before = part.totals.on_host_network if part.totals is not None else ()
        sharers = newest_names((*before, *totals.on_host_network))
        part.totals = replace(totals, upto_utc_ns=upto_ns, on_host_network=sharers)


class _TooMuchError(MaceError):
    """A run exceeds a limit of what is kept for one run."""


def _hold_to_limits(engine: Engine, found: list[Results]) -> None:
    cells, devices = engine.held
    if cells > _HELD_CELLS:
        raise _TooMuchError(f"its open windows have {cells} histogram cells, more than the limit of {_HELD_CELLS}")
    if devices > _HELD_DEVICES:
        raise _TooMuchError(
            f"it has announced {devices} devices, more than the limit of {_HELD_DEVICES}: begin a new run"
        )
    for results in found[-1:]:
        if len(results.rows.devices) > _PASSED_DEVICES:
            raise _TooMuchError(
                f"its packets have passed {len(results.rows.devices)} devices, more than the limit of {_PASSED_DEVICES}"
                " for one run: begin a new run"
            )
        if max(results.totals.ledger.as_dict().values()) > _LARGEST:
            raise _TooMuchError("a counter exceeds 2**62")


def _note_hours(hours: set[int], utc_ns: npt.NDArray[np.int64]) -> None:
    """Add the hours of these times, which are nearly in order, to `hours`."""
    first, last = int(utc_ns.min()) // HOUR_NS, int(utc_ns.max()) // HOUR_NS
    hours.update((first,) if first == last else np.unique(utc_ns // HOUR_NS).tolist())


def _restored(aside: bytes) -> _Host:
    """Return the host saved in `aside`. Raises `StoreError` for another version's, and pickle's errors for damage."""
    written, _, packed = aside.partition(b"\n")
    if written.decode(errors="replace") != _FORMAT:
        raise StoreError(
            f"the journal was written by MACE {written[:40].decode(errors='replace')} and {_FORMAT} cannot read it:"
            " let that version run until the hosts' runs have ended, or move the journal (ingest/) away and restart"
            " those runs"
        )
    known = pickle.loads(zstandard.decompress(packed))  # noqa: S301 (our own journal, readable for its owner only)
    assert isinstance(known, _Host)
    return known
