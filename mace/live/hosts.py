"""What an ingest knows of its hosts: their streams, an engine for each, and what came out since the last flush.

No connection, no journal, no clock: a frame goes in, results wait to be taken. A host can be put aside as bytes, and
goes on from them as if nothing had been.
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

from collector.remote import Counts, HostStream, Verdict
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
"""An engine works on what has come when it spans this much of the stream's own time: three frames of a second each, as
long as rows may wait and be in the store within five seconds ..."""
_SLICE_RECORDS: Final = 1 << 14
"""... or is so many records: where a slice's fixed cost of a millisecond or two no longer counts."""

_FORMAT: Final = f"{VERSION}/3"
"""Of what is put aside; the number is raised with what is pickled."""
_HELD_CELLS: Final = 1 << 22
"""Histogram cells of a host's open windows, 128 MiB: a hundred times what a host of fifty containers has."""
_HELD_DEVICES: Final = 1 << 16
"""Devices that a run has told of, those that are gone among them."""
_PASSED_DEVICES: Final = 30_000
"""Devices of a run that packets have passed, counted once for each container whose packets they were: a store's segment
numbers their names by 16 bits."""
_LARGEST: Final = 1 << 62
"""Of a run's counters: they are stored in 64 bits."""
_WAITING_ROWS: Final = 1 << 21
"""Rows, ..."""
_WAITING_HOURS: Final = 64
"""... hours, ..."""
_WAITING_RUNS: Final = 16
"""... and runs of a host that wait for the next flush; what would add to them waits too."""

RunKey = tuple[str, int]
"""Host, and tag of the stream."""


@dataclass(slots=True)
class _Host:
    """All that is known of one host. Pickled into snapshots, but for what is said to be of this process."""

    stream: HostStream
    feeder: Feeder | None = None
    """Of the run's engine. None before the first stream and after the end of the last."""
    rows: int = 0
    """Rows of `delays` of this run so far."""
    given_up: str = ""
    """Why nothing more of the stream is taken; empty as long as it is."""
    taken: int = 0
    """Frames of the stream that were worked through: one that made the engine fail is not among them."""


@dataclass(slots=True)
class _Waiting:
    """What a host's run adds to the next flush."""

    header: StreamHeader
    delays: list[Delays] = field(default_factory=list)
    windows: list[WindowTable] = field(default_factory=list)
    devices: tuple[Device, ...] = ()
    totals: Totals | None = None
    rows: int = 0
    size: int = 0
    """Rows in `delays`."""
    hours: set[int] = field(default_factory=set)
    begins: bool = False
    closed: bool = False
    ended: bool = False

    def part(self) -> RunPart:
        flags = {"begins": self.begins, "closed": self.closed, "ended": self.ended}
        rows = Rows(Delays.concatenate(self.delays), WindowTable.concatenate(self.windows), self.devices)
        return RunPart(self.header, rows, self.totals, self.rows, **flags)


class Hosts:
    """All of one ingest. `is_stored` tells whether the store has a run already."""

    def __init__(
        self,
        engine: EngineConfig,
        is_stored: Callable[[StreamHeader], bool],
        most: int = 10_000,
        now_utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`most` is how many hosts there may be."""
        # Slices are cut here, by `slice_ns` and _SLICE_RECORDS.
        self._engine = replace(engine, slice_ns=1 << 60)
        self._is_stored = is_stored
        self._most, self._now_utc_ns = most, now_utc_ns
        self._known: dict[str, _Host] = {}
        self._parts: dict[RunKey, _Waiting] = {}
        self._of_host: dict[str, list[_Waiting]] = {}
        """The same by host."""
        self._zstd = zstandard.ZstdCompressor(level=1)
        self.counts = Counts()
        self.slice_ns = SLICE_NS
        """To be changed before the first frame only: after a crash the same frames must give the same results."""

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, host: str) -> bool:
        return host in self._known

    def streams(self) -> dict[str, int]:
        """Each host's stream, by its tag."""
        return {host: known.stream.tag or 0 for host, known in self._known.items()}

    def judge(self, host: str, head: Head, oldest: int) -> Verdict:
        """What a frame with this head is (`HostStream.judge`); raises `WireError` where nothing more is taken."""
        known = self._known.get(host)
        if known is None and len(self._known) >= self._most:
            raise NotNowError(f"there are {self._most} hosts already ([ingest] hosts): {host[:80]} is not taken")
        if known is not None and known.given_up and head.stream == known.stream.tag:
            raise WireError(f"nothing more of this run is taken: {known.given_up}")
        return (known.stream if known is not None else HostStream(host)).judge(head, oldest)

    def next_of(self, host: str, stream: int) -> int:
        """The frame that is expected next of a host's stream; 0 if it is unknown."""
        known = self._known.get(host)
        if known is None:
            return 0
        return known.taken if known.given_up and stream == known.stream.tag else known.stream.next_of(stream)

    def is_held(self, host: str) -> bool:
        """Whether so much of the host waits for the next flush that nothing may be added."""
        parts = self._of_host.get(host, ())
        return (
            len(parts) >= _WAITING_RUNS
            or sum(part.size for part in parts) >= _WAITING_ROWS
            or sum(len(part.hours) for part in parts) >= _WAITING_HOURS
        )

    def take_parts(self) -> dict[RunKey, RunPart]:
        """What came out since the last call, for the store."""
        parts = {key: waiting.part() for key, waiting in self._parts.items()}
        self._parts = {}
        self._of_host = {}
        return parts

    def forget_results(self, host: str) -> None:
        """What came out of a host so far is in the store already."""
        if self._of_host.pop(host, None):
            for key in [key for key in self._parts if key[0] == host]:
                del self._parts[key]

    def put_aside(self, host: str) -> bytes:
        """All of a host, to go on from."""
        packed = self._zstd.compress(pickle.dumps(self._known[host], pickle.HIGHEST_PROTOCOL))
        return _FORMAT.encode() + b"\n" + packed

    def restore(self, host: str, aside: bytes) -> None:
        """Go on from there; raises `StoreError` if another version wrote it, and this one cannot."""
        self._known[host] = _restored(aside)

    def work(self, host: str, frame: bytes, *, again: bool = False, before: bool = False) -> None:
        """A frame that is the host's next: engine and results.

        Raises `WireError` for a frame that cannot be taken, and then nothing has changed. After any other error nothing
        can be made of the run any more (`give_up`).

        `before` where the frame was taken before, by whatever the clock was; `again` where also what comes of it is in
        the store already.
        """
        known = self._known.get(host)
        if known is None:
            known = _Host(HostStream(host))
        stream = known.stream
        now_utc_ns = None if before or again else self._now_utc_ns()
        if parse_head(frame).stream != stream.tag:
            header = stream.look(frame, now_utc_ns)
            if not again and self._is_stored(header):
                raise WireError(f"run {header.run} is in the store already, and the journal does not know it")
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
        """Take nothing more of the host's run; what came out of it so far stays. Another run may follow.

        `stream` is the run that is meant; None for the one that is coming in.
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
        # An engine that never saw a record does not know of any time.
        upto_ns = totals.upto_utc_ns if totals.upto_utc_ns > 0 else part.header.clock.utc_ns
        before = part.totals.on_host_network if part.totals is not None else ()
        sharers = newest_names((*before, *totals.on_host_network))
        part.totals = replace(totals, upto_utc_ns=upto_ns, on_host_network=sharers)


class _TooMuchError(MaceError):
    """A run that grows beyond what is kept of one."""


def _hold_to_limits(engine: Engine, found: list[Results]) -> None:
    cells, devices = engine.held
    if cells > _HELD_CELLS:
        raise _TooMuchError(f"its windows that cannot be closed have {cells} cells, at most {_HELD_CELLS} are kept")
    if devices > _HELD_DEVICES:
        raise _TooMuchError(f"it has told of {devices} devices, at most {_HELD_DEVICES} are kept: begin a new run")
    for results in found[-1:]:
        if len(results.rows.devices) > _PASSED_DEVICES:
            raise _TooMuchError(
                f"its packets have passed {len(results.rows.devices)} devices, at most {_PASSED_DEVICES} are stored of"
                " one run: begin a new one"
            )
        if max(results.totals.ledger.as_dict().values()) > _LARGEST:
            raise _TooMuchError("its counters are beyond what 64 bits hold")


def _note_hours(hours: set[int], utc_ns: npt.NDArray[np.int64]) -> None:
    """Of these times, which are nearly in order."""
    first, last = int(utc_ns.min()) // HOUR_NS, int(utc_ns.max()) // HOUR_NS
    hours.update((first,) if first == last else np.unique(utc_ns // HOUR_NS).tolist())


def _restored(aside: bytes) -> _Host:
    """Raises `StoreError` for what another version has put aside, and whatever pickle does for what is damaged."""
    written, _, packed = aside.partition(b"\n")
    if written.decode(errors="replace") != _FORMAT:
        raise StoreError(
            f"the journal was written by MACE {written[:40].decode(errors='replace')} and cannot be read by {_FORMAT}:"
            " let that version run until the hosts' runs have ended, or move the journal (ingest/) away and begin those"
            " runs anew"
        )
    known = pickle.loads(zstandard.decompress(packed))  # noqa: S301 (our own journal, readable for its owner only)
    assert isinstance(known, _Host)
    return known
