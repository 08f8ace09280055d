"""What an ingest knows of its hosts: their streams, an engine for each, and what came out since the last flush.

No connection, no journal, no clock: a frame goes in, results wait to be taken. A host can be put aside as bytes, and
goes on from them as if nothing had been.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import zstandard

from collector.remote import Counts, HostStream, Verdict
from correlator.engine import Engine, EngineConfig
from mace import __version__
from mace.errors import StoreError, WireError
from mace.interfaces import Progress, StreamHeader
from mace.records import Batch
from mace.schema import Delays, Results
from mace.topology import Topology
from mace.windowtable import WindowTable
from mace.wire import Head, parse_head
from storage.fleet import RunPart

SLICE_NS: Final = 2_900_000_000
"""An engine works on what has come when it spans this much of the stream's own time: three frames of a second each, as
long as rows may wait and be in the store within five seconds ..."""
_SLICE_RECORDS: Final = 1 << 14
"""... or is so many records: where a slice's fixed cost of a millisecond or two no longer counts."""

RunKey = tuple[str, int]
"""Host, and tag of the stream."""


@dataclass(slots=True)
class _Host:
    """All that is known of one host. Pickled into snapshots, but for what is said to be of this process."""

    stream: HostStream
    engine: Engine | None = None
    """None before the first stream and after the end of the last."""
    sliced_ns: int = 0
    """Up to here (the stream's time) the engine has worked."""
    waiting: int = 0
    """Records since then."""
    rows: int = 0
    """Rows of `delays` of this run so far."""


@dataclass(slots=True)
class _Waiting:
    """What a host's run adds to the next flush."""

    header: StreamHeader
    delays: list[Delays] = field(default_factory=list)
    windows: list[WindowTable] = field(default_factory=list)
    latest: Results | None = None
    rows: int = 0
    begins: bool = False
    closed: bool = False
    ended: bool = False

    def part(self) -> RunPart:
        flags = {"begins": self.begins, "closed": self.closed, "ended": self.ended}
        delays = Delays.concatenate(self.delays)
        return RunPart(self.header, delays, WindowTable.concatenate(self.windows), self.latest, self.rows, **flags)


class Hosts:
    """All of one ingest. `is_stored` tells whether the store has a run already."""

    def __init__(self, engine: EngineConfig, is_stored: Callable[[StreamHeader], bool]) -> None:
        # Slices are cut here, by `slice_ns` and _SLICE_RECORDS.
        self._engine = replace(engine, slice_ns=1 << 60)
        self._is_stored = is_stored
        self._known: dict[str, _Host] = {}
        self._parts: dict[RunKey, _Waiting] = {}
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
        """What a frame with this head is (`HostStream.judge`)."""
        known = self._known.get(host)
        return (known.stream if known is not None else HostStream(host)).judge(head, oldest)

    def next_of(self, host: str, stream: int) -> int:
        """The frame that is expected next of a host's stream; 0 if it is unknown."""
        known = self._known.get(host)
        return known.stream.next_of(stream) if known is not None else 0

    def take_parts(self) -> dict[RunKey, RunPart]:
        """What came out since the last call, for the store."""
        parts = {key: waiting.part() for key, waiting in self._parts.items()}
        self._parts = {}
        return parts

    def forget_results(self, host: str) -> None:
        """What came out of a host so far is in the store already."""
        for key in [key for key in self._parts if key[0] == host]:
            del self._parts[key]

    def put_aside(self, host: str) -> bytes:
        """All of a host, to go on from."""
        packed = self._zstd.compress(pickle.dumps(self._known[host], pickle.HIGHEST_PROTOCOL))
        return __version__.encode() + b"\n" + packed

    def restore(self, host: str, aside: bytes) -> None:
        """Go on from there; raises `StoreError` if another version wrote it, and this one cannot."""
        self._known[host] = _restored(aside)

    def work(self, host: str, frame: bytes, *, again: bool = False) -> None:
        """A frame that is the host's next: engine and results. Raises `WireError` for one that cannot be.

        `again` where what comes of it is in the store already.
        """
        known = self._known.get(host)
        if known is None:
            known = _Host(HostStream(host))
        stream = known.stream
        if parse_head(frame).stream != stream.tag:
            header = stream.look(frame)
            if not again and self._is_stored(header):
                raise WireError(f"run {header.run} is in the store already, and the journal does not know it")
            self._finish(known, closed=False)
            stream.begin(frame)
            self._known[host] = known
            known.engine = Engine(header.clock.offset_ns, self._engine)
            known.sliced_ns = known.waiting = known.rows = 0
            self._part(known).begins = True
            return
        missing = stream.missing
        item = stream.take(frame)
        self.counts.frames += 1
        if stream.missing != missing:
            self.counts.gaps += 1
            self.counts.missing += stream.missing - missing
        if item is None:
            self._finish(known, closed=True)
        elif known.engine is not None:
            self.counts.records += len(item) if isinstance(item, Batch) else 0
            for results in _fed(known, known.engine, item, self.slice_ns):
                self._add(known, results)

    def _finish(self, known: _Host, *, closed: bool) -> None:
        if known.engine is not None:
            self._add(known, known.engine.finish())
            self._part(known).closed = closed
            self._part(known).ended = True
            known.engine = None

    def _part(self, known: _Host) -> _Waiting:
        assert known.stream.tag is not None
        assert known.stream.header is not None
        return self._parts.setdefault((known.stream.host, known.stream.tag), _Waiting(known.stream.header))

    def _add(self, known: _Host, results: Results) -> None:
        part = self._part(known)
        known.rows += len(results.delays)
        part.rows = known.rows
        if len(results.delays):
            part.delays.append(results.delays)
        if len(results.windows):
            part.windows.append(WindowTable.of(results.windows))
        # An engine that never saw a record does not know of any time.
        upto_ns = results.upto_utc_ns if results.upto_utc_ns > 0 else part.header.clock.utc_ns
        ledger = replace(results.ledger, discarded=known.stream.missing)
        part.latest = replace(results, upto_utc_ns=upto_ns, delays=Delays.empty(), windows=(), ledger=ledger)


def _fed(known: _Host, engine: Engine, item: Topology | Batch | Progress, slice_ns: int) -> list[Results]:
    """What comes out of an item. The engine works when enough has come: a slice has a fixed cost."""
    if isinstance(item, Topology):
        return engine.feed(item)
    results: list[Results] = []
    upto_ns = known.sliced_ns
    if isinstance(item, Progress):
        upto_ns = item.upto_ns
    elif len(item):
        if not known.sliced_ns:
            known.sliced_ns = int(item.ts_ns[0])
        results = engine.feed(item)
        known.waiting += len(item)
        upto_ns = int(item.ts_ns[-1])
    if upto_ns - known.sliced_ns >= slice_ns or known.waiting >= _SLICE_RECORDS:
        results += engine.advance(upto_ns, at_once=True)
        known.sliced_ns, known.waiting = upto_ns, 0
    return results


def _restored(aside: bytes) -> _Host:
    version, _, packed = aside.partition(b"\n")
    try:
        known = pickle.loads(zstandard.decompress(packed))  # noqa: S301 (our own journal, readable for its owner only)
    except Exception as error:
        raise StoreError(
            f"the journal was written by MACE {version.decode(errors='replace')} and cannot be read by {__version__}"
            f" ({error}): let that version run until the hosts' runs have ended, or move the journal (ingest/) away"
            " and begin those runs anew"
        ) from error
    assert isinstance(known, _Host)
    return known
