"""Reads a store: queries its live segments with DuckDB and returns typed results.

A reader needs no lock. It lists the live segments, and lists again if merging or retention has removed one before
DuckDB has read it. All quantiles are computed from bins of `contracts.histogram`, which SQL counts, and never by SQL's
own functions, so that a report shows the same numbers as the live run.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from pyarrow import compute

from contracts.arrays import Ints
from contracts.clock import ClockPair, KernelClock
from contracts.cpu_figures import CpuGrowth, SoftirqFigures, StageCount
from contracts.cpus import Measure
from contracts.errors import StoreError, nearest
from contracts.figures import DevicePlace, Distribution, Summary
from contracts.histogram import MAX_NS, SUB_BITS, middles
from contracts.hooks import HOOKS
from contracts.interfaces import StreamHeader
from contracts.ledger import Ledger
from contracts.schema import Direction, Grades, HookCost, Segment
from contracts.topology import Sharer, newest_names
from contracts.windowtable import FIGURES, NUMBERS, WindowTable
from storage import checksum, segments, tables, wide
from storage.embedded import check_schema
from storage.merging import Histograms, cells_of
from storage.naming import TABLES, Named, by_newest_name, named, newest_of
from storage.segments import SegmentFile
from storage.wide import FROM_S, STANDING, WIDTHS_S, About, Cover, cover, day_of, spans

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ATTEMPTS: Final = 10
_SUB: Final = 1 << SUB_BITS
_WIDTHS_S: Final = (*reversed(WIDTHS_S), 10, 1)
"""Widths of stored windows, the widest first."""
_S: Final = 1_000_000_000
_FEW_ROWS: Final = 32
"""A window costs a reader as much as so many rows: it has a histogram of some hundred numbers."""
_BATCH_WINDOWS: Final = 8_192
"""Windows that are merged at a time: 50 MB with the widest histograms."""
_FOREVER: Final = (1 << 63) - 1
_LONG_NS: Final = 3 * 3_600_000_000_000
"""Above this range of time the store's wide windows are read, which have a tenth of the rows and the same delays."""
_SEEN_BESIDE: Final = 1_024
"""Segments beside the live ones of which a reader remembers what they say: merged ones, or of another time."""
_LEDGERS: Final = 8
"""Segments of `ledger` that are read first, and how many times more next."""
_KEPT_RUNS: Final = 8
"""Results of `runs` that a reader keeps, by filter."""
_KEPT_FIGURES: Final = 4
"""Results that a reader keeps of each method: views of one page ask for the same ones."""
_KEPT_LISTINGS: Final = 32
"""Listings that a reader keeps, by table and time."""
_MOST_WHOLE: Final = 100_000
"""Segments that a reader remembers as whole: those of a store of years, in 30 MB. A server reads one for months."""
TYPICAL_ROWS: Final = 2_000_000
"""Typical paths are computed from so many of the newest rows (whole segments): enough for a p99, in a second."""
SPILL_GIB: Final = 16
"""Largest temporary file of a query whose memory does not suffice: a sort of some hundred million rows."""
_NEAR_NS: Final = 60_000_000_000
"""Longer than any packet's way through a host: what waits longer has expired."""
WINDOWS_FROM_ROWS: Final = 200_000_000
"""With more rows, `auto` reads windows instead: at once, and with the same numbers except for the last seconds."""

# The bin of `contracts.histogram.bins_of`. log2 of an integer below 2**40 is exact at powers of two, and off by far
# less than the distance to the next power everywhere else, so its floor is right; a test compares all boundaries.
_CLAMPED: Final = f"least(greatest(delay_ns, 0), {MAX_NS})"
_OCTAVE: Final = f"greatest(cast(floor(log2(greatest({_CLAMPED}, 1))) AS BIGINT) - {SUB_BITS}, 0)"
BIN_SQL: Final = f"({_OCTAVE} * {_SUB} + ({_CLAMPED} >> {_OCTAVE}))"

_STRETCH_SQL: Final = "(epoch_ns(time) - $first) // $width"
_ENDS_SQL: Final = "(SELECT unnest($hosts) AS host, unnest($names) AS run, unnest($ends) AS upto)"
"""Relation of `_Ends`."""
_SEEN_SQL: Final = """
    SELECT filename, host, run, width_s, container_id, if(container_id != '', container, ''), max(epoch_ns(time)),
           coalesce(arg_max(pod_containers, time), '')
    FROM (
        FROM {windows} UNION ALL BY NAME
        SELECT NULL::VARCHAR AS container_id, NULL::VARCHAR AS pod_containers WHERE false
    )
    GROUP BY ALL
    """
"""Query of the rows for `_seen_of`."""

_COUNTS: Final = ", ".join(
    [
        # Runs stored before grades existed: all packets were matched by the buffer.
        *(f"coalesce({column}, {'packets' if name == 'buffer' else 0}, 0)" for name, column in tables.GRADES.items()),
        *Ledger().as_dict(),
    ]
)
_LEDGER_SQL: Final = f"""
    SELECT host, run, max(flush),
           arg_max(
               row(filename, flush, epoch_ns(time), packets, rows_stored, rows_not_stored, closed, {_COUNTS}), flush
           )
    FROM {{ledger}} GROUP BY host, run
    """
"""Query of the rows for `_Ledgers.add`."""
_TIMES_SQL: Final = (
    "SELECT filename, min(epoch_ns(time)), max(epoch_ns(time)) FROM {ledger} WHERE time IS NOT NULL GROUP BY filename"
)
_SHARED_SQL: Final = """
    SELECT filename, host, run, each.container, each.container_id, max(told)
    FROM (
        SELECT filename, host, run, epoch_ns(time) AS told, unnest(on_host_network) AS each
        FROM {ledger} WHERE {condition}
    )
    GROUP BY ALL
    """
"""Queries of the rows for `_Shared`."""
_NO_LEDGER: Final = (None,) * 7 + (0,) * (len(tables.GRADES) + len(Ledger().as_dict()))
_STORED: Final = {"covered_windows": "windows"}
"""The table of the segments for which a name in `_query` stands, if the name is not the table's."""
_COUNTED: Final = "NOT coalesce(waited, false)"
"""Condition on rows of `delays` that count in figures; the column is null in files written before it existed."""
_CLOCK: Final = (
    *("r.monotonic_ns", "epoch_ns(r.time)", "r.uncertainty_ns"),
    *("coalesce(r.clock_state, '')", "coalesce(r.max_error_ns, 0)", "coalesce(r.est_error_ns, 0)"),
)
"""Expressions over `runs`, named r, from which `_pair` makes a clock pair."""
_NO_CLOCK: Final = ClockPair(0, 0, 0)
_PLACE: Final = "host, rank, container, netns, device, device_id, kind, role"
STAGE_GROUPS: Final = (*_PLACE.split(", "), "owner_netns", "direction", "measure", "cpu_queued", "cpu")
"""Columns of `stages` by which its counts are merged."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A selection of rows; by default all."""

    since_ns: int | None = None
    """UTC, ns. Rows that began before this time are left out."""
    until_ns: int | None = None
    """UTC, ns. Rows that began at this time or later are left out."""
    container: str | None = None
    """Packets of this container, at all devices."""
    device: str | None = None
    direction: Direction | None = None
    run: str | None = None
    host: str | None = None

    @property
    def narrows(self) -> bool:
        """Whether the filter leaves out parts of runs."""
        return any(v is not None for v in (self.since_ns, self.until_ns, self.container, self.device, self.direction))


@dataclass(frozen=True, slots=True)
class Run:
    """One capture run, with its newest counts."""

    host: str
    run: str
    source: str
    started_utc_ns: int
    kernel: str
    upto_utc_ns: int
    """The ledger counts records before this time; the start of the run, if nothing was written yet."""
    ledger: Ledger
    packets: int
    grades: Grades
    rows_stored: int
    rows_not_stored: int
    closed: bool
    """Whether the run has ended properly; otherwise it is running or was killed."""
    hooks: tuple[str, ...] = ()
    """The hooks that its source recorded, as in `StreamHeader`."""
    clock: ClockPair = _NO_CLOCK
    """The clock pair that gives its rows their UTC."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One row of a packet's path."""

    place: DevicePlace
    direction: Direction
    segment: Segment
    position: int
    start_ns: int
    """Time since the beginning of the packet's first hop."""
    delay_ns: int


@dataclass(frozen=True, slots=True)
class PacketPath:
    """All stored rows of one packet, as a path."""

    host: str
    run: str
    packet: int
    utc_ns: int
    """Beginning of the first hop."""
    container: str
    """Container of the packet's inner device."""
    l3_len: int
    grade: str
    outcome: str
    hops: tuple[Hop, ...]
    """Hops in path order, with segments `DEVICE`, `OUTSIDE`, `DELIVERY`, and `WAITING`, which is part of `DELIVERY`."""
    overhead_ns: dict[Direction, int]


@dataclass(slots=True)
class TypicalPath:
    """The devices that packets of one container cross in one direction, in order, each with its delays."""

    host: str
    container: str
    netns: str
    direction: Direction
    hops: list[tuple[DevicePlace, Segment, Distribution]]


@dataclass(slots=True)
class Series:
    """Overhead over time of one container and direction."""

    container: str
    direction: Direction
    utc_ns: list[int]
    """Starts of the stretches with packets, ascending."""
    p50_ns: list[int]
    p99_ns: list[int]
    width_ns: int


@dataclass(slots=True)
class OverTime:
    """Distributions per group and stretch of time."""

    first_utc_ns: int
    """Start of stretch 0."""
    width_ns: int
    """Width of each stretch; stretch i begins at `first_utc_ns + i * width_ns`."""
    groups: dict[tuple[str, ...], dict[int, Distribution]]
    """By group, sorted; then by stretch, of those that have delays."""
    whole: dict[tuple[str, ...], Distribution] = field(default_factory=dict)
    """By group, sorted: all of its delays, in bins of the usual width; empty if not asked for."""


ROUND_TRIP_FIGURES: Final = ("tool_rtt", "host_rtt", "host_rtt_lower_bound", "nic_rtt", "egress", "ingress")
"""Figures of a round trip: columns of `round_trips` without their unit, from the tool to the parts."""


@dataclass(slots=True)
class RoundTripsOverTime:
    """Distributions of round trips per tool, destination, figure and stretch of time."""

    first_utc_ns: int
    """Start of stretch 0."""
    width_ns: int
    groups: dict[tuple[str, str, str], dict[int, Distribution]]
    """By tool, destination and one of `ROUND_TRIP_FIGURES`; then by stretch, of those that have samples."""
    samples: dict[str, int]
    """Number of samples by reason; `paired` ones have the figures."""


@dataclass(frozen=True, slots=True)
class PacketRow:
    """One row of `delays`, as a table of packets shows it."""

    host: str
    run: str
    packet: int
    utc_ns: int
    container: str
    device: str
    direction: str
    delay_ns: int
    l3_len: int
    grade: str
    outcome: str
    waited: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one table, as SQL that stands in a FROM, with its parameters."""

    table: str
    rows_sql: str
    values: dict[str, Any]
    unit_ns: int
    """Stretches of time are multiples of it, so that they have whole windows; 1 for rows."""
    where: Filter
    """Its time says which segments have the rows."""
    named_in: Filter
    """Its time says which name of a container is the newest."""
    wide: _Wide | None = None
    """Which wide windows are among the rows."""


@dataclass(frozen=True, slots=True)
class _Wide:
    """Wide windows of a query: `{minutes}`, `{ten_minutes}` and `{hours}` in its SQL.

    `{windows}` then stands for windows without a wide one, and `{covered_windows}` for the others of the hours in which
    the spans of `FROM_S` are.
    """

    known: frozenset[Path]
    """Segments of `STANDING` that may stand for others."""
    spans: tuple[tuple[int, int, int], ...]
    """Width in s and UTC, ns, from and to, as `storage.wide.spans`."""


@dataclass(frozen=True, slots=True)
class _Grouping:
    """How distributions are grouped: by columns of `GROUPED_BY` and `stretch`."""

    by: tuple[str, ...]
    coarse_bits: int = 0
    """2**n neighbouring bins count as the one in their middle."""


@dataclass(frozen=True, slots=True)
class _Ends:
    """A time of each run, UTC, ns, by host and run."""

    ends: dict[tuple[str, str], int]

    def values(self) -> dict[str, Any]:
        """Return the parameters of `_ENDS_SQL`."""
        return {
            "hosts": [host for host, _ in self.ends],
            "names": [run for _, run in self.ends],
            "ends": list(self.ends.values()),
        }


@dataclass(slots=True)
class _Ledgers:
    """What the segments of `ledger` that were read say: the newest row of each run."""

    newest: dict[tuple[str, str], tuple[int, tuple[Any, ...]]] = field(default_factory=dict)
    """By host and run: the hour of its segment, and the row."""
    read: set[Path] = field(default_factory=set)

    def add(self, some: Sequence[SegmentFile], rows: Sequence[tuple[Any, ...]]) -> None:
        """Note segments and the rows of `_LEDGER_SQL` in them."""
        hours = {str(each.path): each.hour for each in some}
        for host, run, flush, row in rows:
            before = self.newest.get((host, run))
            if before is None or before[1][1] < flush:
                self.newest[host, run] = hours[row[0]], row
        self.read |= {each.path for each in some}

    def oldest(self, runs: AbstractSet[tuple[str, str]]) -> int:
        """Return the flush before which no segment has a newer row of any of these runs."""
        return min((self.newest[key][1][1] if key in self.newest else -1 for key in runs), default=_FOREVER)

    def forget(self, live: Sequence[SegmentFile]) -> None:
        """Forget the segments that are gone, and all rows if retention has removed one of them."""
        self.read &= {each.path for each in live}
        hours: dict[int, list[SegmentFile]] = {}
        for each in live:
            hours.setdefault(each.hour, []).append(each)
        for hour, row in self.newest.values():
            if not any(each.first <= row[1] <= each.last for each in hours.get(hour, ())):
                self.newest.clear()
                self.read.clear()
                return


@dataclass(frozen=True, slots=True)
class _Shared:
    """What a segment of `ledger` says of containers on the host's network."""

    first_ns: int
    last_ns: int
    """UTC, ns: its oldest and its newest row."""
    found: list[tuple[Any, ...]]
    """Host, run, container, id, and the newest row with it, UTC, ns."""

    def within(self, since_ns: int, until_ns: int) -> bool:
        """Return whether all of its rows are of a time."""
        return since_ns <= self.first_ns and self.last_ns < until_ns


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the segments of windows of some time say of the whole."""

    found: list[About]
    whole: bool
    """Whether all of them could be read."""
    wide: frozenset[Path]
    """Segments of wide windows that stood for others then."""


From = Literal["auto", "rows", "windows"]
GROUPED_BY: Final = (
    "host",
    "container",
    "netns",
    "device",
    "device_id",
    "kind",
    "role",
    "source",
    "direction",
    "segment",
)
"""Columns by which `StoreReader.grouped` groups rows."""


def _pair(values: Sequence[Any]) -> ClockPair:
    monotonic_ns, utc_ns, uncertainty_ns, state, max_error_ns, est_error_ns = values
    kernel = KernelClock(state, int(max_error_ns), int(est_error_ns)) if state else None
    return ClockPair(int(monotonic_ns), int(utc_ns), int(uncertainty_ns), kernel)


def _written_by_mace(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """A reader's method that raises `StoreError` for rows that MACE does not write: nulls, names it does not know."""

    @wraps(method)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(*args, **kwargs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            store = args[0]
            assert isinstance(store, StoreReader)
            raise StoreError(
                f"{store.path}: the store has rows that MACE does not write ({type(error).__name__}: {error}): it is"
                " damaged, or another program has made them"
            ) from error

    return checked


@dataclass(slots=True)
class StoreReader:
    """A reader of a store. Raises `StoreError` if `path` is no store, has an unknown schema, or is damaged.

    `skip_damaged` leaves out damaged segments and notes them in `damaged`.
    """

    path: Path
    skip_damaged: bool = False
    threads: int | None = None
    memory_mib: int | None = None
    """Memory limit of a query; by default DuckDB's own."""
    most_rows: int | None = None
    """Rows of `delays`, about, that single packets are looked for in: of more, `packets` reads the newest."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Skipped segments, with a description of the damage."""
    _whole: set[tuple[Path, int, int]] = field(default_factory=set, init=False, repr=False)
    """Segments with a verified checksum: path, size and time of modification, ns."""
    _seen: dict[Path, About] = field(default_factory=dict, init=False, repr=False)
    """What each segment of windows and of wide windows says of the whole."""
    _ledgers: _Ledgers = field(default_factory=_Ledgers, init=False, repr=False)
    _shared: dict[Path, _Shared] = field(default_factory=dict, init=False, repr=False)
    """What each segment of `ledger` says of containers on the host's network."""
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """Results since `keep`, by the name of the method and its arguments."""
    _keeps: Any = field(default=None, init=False, repr=False)
    """What `keep` was given; None if nothing is kept."""
    _connection: duckdb.DuckDBPyConnection | None = field(default=None, init=False, repr=False)
    """The connection that `keep` has opened."""
    _open: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        try:
            there = self.path.is_dir()
        except OSError as e:
            raise StoreError(f"{self.path}: {e.strerror}") from e
        if not there:
            raise StoreError(f"{self.path}: no such directory")
        if not check_schema(self.path):
            raise StoreError(f"{self.path}: not a MACE store (it has no store.json)")

    def keep(self, state: object) -> None:
        """Keep the connection open from now on, and results for whoever asks the same in the same state of the store.

        It is for one thread at a time. `close` closes the connection.
        """
        if self._connection is None:
            self._connection = self._open.enter_context(connected(self.threads, self.memory_mib))
        if state != self._keeps:
            self._kept.clear()
            self._keeps = state

    def close(self) -> None:
        """Close the connection that `keep` has opened."""
        self._connection, self._keeps = None, None
        self._kept.clear()
        self._open.close()

    @contextmanager
    def _connected(self) -> Iterator[duckdb.DuckDBPyConnection]:
        if self._connection is not None:
            yield self._connection
            return
        with connected(self.threads, self.memory_mib) as connection:
            yield connection

    def _once(self, key: tuple[Any, ...], make: Callable[[], _T], most: int) -> _T:
        """Return the result that was kept under `key`, or make it; of each method at most `most` are kept."""
        if self._keeps is None:
            return make()
        if key not in self._kept:
            same = [each for each in self._kept if each[0] == key[0]]
            for each in same[: max(len(same) + 1 - most, 0)]:
                del self._kept[each]
            self._kept[key] = make()
        found: _T = self._kept[key]
        return found

    def segments(self, table: str, where: Filter = Filter()) -> list[SegmentFile]:
        """Return the live segments, which an outside reader should open while a writer is running."""
        found = self._listing(table, where.since_ns, where.until_ns)
        return [s for s in found if s.path not in self.damaged]

    def _listing(self, table: str, since_ns: int | None, until_ns: int | None) -> list[SegmentFile]:
        """Return the live segments, damaged ones too; after `keep` those of the state that it was given.

        A store of a month has a thousand directories, and a view asks for them a dozen times.
        """
        key = ("listing", table, since_ns, until_ns)
        if key not in self._kept and sum(each[0] == "listing" for each in self._kept) >= _KEPT_LISTINGS:
            self._list_again()  # all of them: no listing of windows may be older than that of their wide ones
        return self._once(key, lambda: segments.listing(self.path, table, since_ns, until_ns), _KEPT_LISTINGS)

    def _list_again(self) -> None:
        """Forget listings, because a segment in one of them is gone."""
        for key in [key for key in self._kept if key[0] == "listing"]:
            del self._kept[key]

    def whole_segments(self, table: str, where: Filter = Filter(), newest_rows: int | None = None) -> list[SegmentFile]:
        """Return the live segments (the newest with `newest_rows` rows), after verifying their checksums.

        DuckDB verifies no checksum. Raises `StoreError` for a damaged segment, or with `skip_damaged` leaves it out.
        """
        found = self.segments(table, where)
        if newest_rows is not None:
            found = _newest(found, newest_rows)
        bad = self._damaged_of(found)
        if not bad:
            return found
        self._refuse(bad, None)
        return self.whole_segments(table, where, newest_rows)

    def _damaged_of(self, found: Sequence[SegmentFile]) -> dict[Path, str]:
        new = {}
        for each in found:
            try:
                status = each.path.stat()
            except OSError:
                continue  # merged meanwhile, or not readable: reading it reports that
            key = (each.path, status.st_size, status.st_mtime_ns)
            if key not in self._whole:
                new[each.path] = key
        # The checksum releases the GIL, so as many threads as CPUs read files.
        with ThreadPoolExecutor(self.threads or os.cpu_count()) as pool:
            bad = {path: why for path, why in zip(new, pool.map(_changed, new), strict=True) if why}
        if len(self._whole) > _MOST_WHOLE:
            self._whole.clear()
        self._whole.update(key for path, key in new.items() if path not in bad)
        return bad

    def rows_damaged(self) -> int:
        """Return the number of rows of all tables in the skipped segments, by the segments' names."""
        return sum(int(p.name.split(".")[1]) for p in self.damaged)

    # Whole runs.

    def runs(self, where: Filter = Filter()) -> list[Run]:
        """Return the runs that overlap with the filter's time, oldest first, each with its newest ledger."""
        given = Filter(where.since_ns, where.until_ns, run=where.run, host=where.host)
        return list(self._once(("runs", given), lambda: self._runs(given), _KEPT_RUNS))

    @_written_by_mace
    def _runs(self, where: Filter) -> list[Run]:
        rows = self._fetch(
            f"""
            SELECT r.host, r.run, r.source, {", ".join(_CLOCK)}, r.kernel, r.hooks
            FROM {{runs}} r
            WHERE ($run IS NULL OR r.run = $run) AND ($host IS NULL OR r.host = $host)
            ORDER BY r.time, r.host, r.run
            """,
            Filter(),
            {"run": where.run, "host": where.host},
        )
        newest = self._newest_ledgers({(host, run) for host, run, *_ in rows})
        found = []
        for host, run, source, *others in rows:
            clock = _pair(others[: len(_CLOCK)])
            kernel, hooks = others[len(_CLOCK) :]
            start = clock.utc_ns
            _, _, upto, packets, stored, not_stored, closed, *counts = newest.get((host, run), _NO_LEDGER)
            upto = start if upto is None else int(upto)
            if where.until_ns is not None and start >= where.until_ns:
                continue
            if where.since_ns is not None and upto < where.since_ns:
                continue
            grades, ledger = Grades(*counts[: len(tables.GRADES)]), counts[len(tables.GRADES) :]
            found.append(
                Run(
                    host,
                    run,
                    source,
                    start,
                    kernel,
                    upto,
                    Ledger(*(n or 0 for n in ledger)),
                    packets or 0,
                    grades,
                    stored or 0,
                    not_stored or 0,
                    bool(closed),
                    tuple(hooks or ()),
                    clock,
                )
            )
        return found

    def _newest_ledgers(self, runs: AbstractSet[tuple[str, str]]) -> dict[tuple[str, str], tuple[Any, ...]]:
        """Return the newest row of `ledger` of each run that has one, with the columns of `_LEDGER_SQL`.

        Segments are read from the newest flush back, until no older one can have a newer row of any of these runs. A
        reader remembers what it has read: a store of years has 90,000 segments, which say the same for ever.
        """
        for _ in range(_ATTEMPTS):
            live = self.segments("ledger")
            self._ledgers.forget(live)
            rest = [each for each in live if each.path not in self._ledgers.read]
            rest.sort(key=lambda each: each.last, reverse=True)
            most = _LEDGERS
            while rest and rest[0].last > self._ledgers.oldest(runs):
                some, rest, most = rest[:most], rest[most:], most * _LEDGERS
                if bad := self._damaged_of(some):
                    self._refuse(bad, None)
                if not self._read_ledgers([each for each in some if each.path not in bad]):
                    break
            else:
                return {key: row for key, (_, row) in self._ledgers.newest.items()}
        raise StoreError(f"{self.path}: segments vanished {_ATTEMPTS} times while they were read; try again")

    def _read_ledgers(self, some: Sequence[SegmentFile]) -> bool:
        """Note the newest rows in these segments; returns whether all of them were still there."""
        if not some:
            return True
        with self._connected() as connection:
            try:
                rows = connection.execute(
                    _LEDGER_SQL.format(ledger=relation(connection, "ledger", some, filename=True))
                ).fetchall()
            except duckdb.Error as e:
                if not self.blame([each.path for each in some], e):
                    raise StoreError(f"{self.path}: query failed: {' '.join(str(e).split())}") from e
                return False
        self._ledgers.add(some, rows)
        return True

    def ledger(self, where: Filter = Filter()) -> Ledger:
        """Return the sum of the ledgers of `runs`. They are of whole runs, because a ledger has no times or devices."""
        return sum((r.ledger for r in self.runs(where)), Ledger())

    @_written_by_mace
    def cost(self, where: Filter = Filter()) -> tuple[HookCost, ...]:
        """Return the cost of observing per hook, summed over the runs of `runs` that have ended."""
        rows = self._fetch(
            """
            SELECT hook, sum(calls), sum(timed), sum(timed_ns) FROM {cost}
            WHERE list_contains($runs, host || '/' || run) GROUP BY hook
            """,
            Filter(),
            {"runs": [f"{r.host}/{r.run}" for r in self.runs(where)]},
        )
        by_name = {info.name: info.hook for info in HOOKS}
        found = [HookCost(by_name[hook], *map(int, numbers)) for hook, *numbers in rows if hook in by_name]
        return tuple(sorted(found, key=lambda c: c.hook))

    @_written_by_mace
    def sharers(self, where: Filter = Filter()) -> tuple[Sharer, ...]:
        """Return the containers seen on the host's network in the filter's runs and time, each by its newest name."""
        for _ in range(_ATTEMPTS):
            live = self.whole_segments("ledger", where)
            try:
                found = self._sharers(live, where)
            except duckdb.Error as e:
                if not self.blame([each.path for each in live], e):
                    raise StoreError(f"{self.path}: query failed: {' '.join(str(e).split())}") from e
                continue
            told: dict[tuple[str, str], int] = {}
            for container, container_id, last in found:
                told[container, container_id] = max(told.get((container, container_id), last), last)
            return newest_names(Sharer(*key) for key, _ in sorted(sorted(told.items()), key=lambda each: each[1]))
        raise StoreError(f"{self.path}: segments vanished {_ATTEMPTS} times while they were read; try again")

    def _sharers(self, live: Sequence[SegmentFile], where: Filter) -> list[tuple[str, str, int]]:
        """Return container, id and the newest time, UTC, ns, of those on the host's network, from these segments.

        What a segment says is remembered; one that is partly outside the filter's time is read again.
        """
        new = [each for each in live if each.path not in self._shared]
        with self._connected() as connection:
            if new:
                rows = relation(connection, "ledger", new, filename=True)
                self._shared |= {each.path: _Shared(_FOREVER, -1, []) for each in new}
                for path, first, last in connection.execute(_TIMES_SQL.format(ledger=rows)).fetchall():
                    self._shared[Path(path)] = _Shared(first, last, [])
                for path, *one in connection.execute(_SHARED_SQL.format(ledger=rows, condition="true")).fetchall():
                    self._shared[Path(path)].found.append(tuple(one))
            if len(self._shared) > 2 * len(live) + _SEEN_BESIDE:
                self._shared = {each.path: self._shared[each.path] for each in live}
            since, until = where.since_ns or 0, _FOREVER if where.until_ns is None else where.until_ns
            whole = [each for each in live if self._shared[each.path].within(since, until)]
            found = [row for each in whole for row in self._shared[each.path].found]
            if part := [each for each in live if each not in whole]:
                condition, values = _condition(Filter(where.since_ns, where.until_ns), [])
                rows = relation(connection, "ledger", part, filename=True)
                sql = _SHARED_SQL.format(ledger=rows, condition=condition)
                found += [
                    (row[1], row[2], row[3], row[4], row[5]) for row in connection.execute(sql, values).fetchall()
                ]
        return [
            (container, container_id, last)
            for host, run, container, container_id, last in found
            if where.host in {None, host} and where.run in {None, run}
        ]

    def containers(self, where: Filter = Filter()) -> list[Named]:
        """Return the containers with an id and their names in the filter's time (whole hours); the newest is last.

        Damaged windows are left out without an error, because names are not worth refusing a query.
        """
        newest: dict[tuple[str, str, str], tuple[int, str]] = {}
        for each in self._windows_seen(where).found:
            for key, last in each.names.items():
                newest[key] = max(newest.get(key, last), last)
        return named((*key, *last) for key, last in newest.items())

    def _windows_seen(self, where: Filter) -> _Seen:
        """Return what the live segments of windows say of the whole.

        A segment of wide windows whose hours are all within the filter's time speaks for those that it stands for.
        """
        return self._once(("seen", where.since_ns, where.until_ns), lambda: self._read_seen(where), _KEPT_RUNS)

    def _read_seen(self, where: Filter) -> _Seen:
        for _ in range(_ATTEMPTS):
            found = self._cover(where)
            wide_ones = [each for each in found.wide if self._about(each, where) is not None]
            live = [*found.others, *(each for each, by in found.covered.items() if by not in wide_ones)]
            live = [each for each in live if _within(each.hour, where)]
            bad = self._damaged_of(live)
            live = [each for each in live if each.path not in bad]
            if new := [each for each in live if each.path not in self._seen]:
                with self._connected() as connection:
                    try:
                        rows = connection.execute(_SEEN_SQL.format(windows=_read(new, filename=True))).fetchall()
                    except duckdb.Error:
                        if not all(each.path.exists() for each in new):
                            self._list_again()
                            continue  # merged meanwhile
                        return _Seen([], False, frozenset())
                self._seen |= _seen_of(new, rows)
            live += wide_ones
            if len(self._seen) > 2 * len(live) + _SEEN_BESIDE:
                self._seen = {each.path: self._seen[each.path] for each in live}
            whole = not bad and not self.damaged
            return _Seen([self._seen[each.path] for each in live], whole, frozenset(each.path for each in found.wide))
        return _Seen([], False, frozenset())

    def _cover(self, where: Filter, known: frozenset[Path] | None = None) -> Cover:
        """Return which segments of windows of the filter's days have a wide one, if it is one of `known`."""
        days = _whole_days(where)
        # First the wide ones: the windows of those that are made meanwhile are then listed too.
        wide_ones = [each for each in self.segments(STANDING, days) if known is None or each.path in known]
        bad = self._damaged_of(wide_ones)
        wide_ones = [each for each in wide_ones if each.path not in bad and self._about(each, Filter()) is not None]
        return cover(self.segments("windows", days), wide_ones)

    def windows_without_wide(self) -> int:
        """Return the number of windows for which no wide ones stand: a view of all times reads these."""
        return sum(each.rows for each in self._cover(Filter()).others)

    def _about(self, wide_one: SegmentFile, where: Filter) -> About | None:
        """Return what a segment of wide windows says; None if not all of its hours are within the filter's time."""
        if wide_one.path not in self._seen:
            try:
                self._seen[wide_one.path] = About.of(wide_one.path)
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
                return None
        about = self._seen[wide_one.path]
        return about if all(_within(hour, where) for hour in about.hours) else None

    def _by_newest_name(self, where: Filter) -> Filter:
        """Return the filter with the container's newest name, which rows are shown with."""
        if where.container is None:
            return where
        return replace(where, container=newest_of(where.container, self.containers(where)))

    # Figures.

    def summary(self, where: Filter = Filter(), source: From = "auto") -> Summary:
        """Return the distributions per device, direction and segment, and the ledger.

        They are computed from rows, and for runs without rows from windows that are wholly within the filter's time.
        Windows do not distinguish packets, so there a container has the figures of its own devices only.
        """
        return self._once(("summary", where, source), lambda: self._summary(where, source), _KEPT_FIGURES)

    @_written_by_mace
    def _summary(self, where: Filter, source: From) -> Summary:
        runs = self.runs(where)
        where = self._by_newest_name(where)
        from_rows, from_windows = self._split(runs, source, where)
        found = Summary(
            ledger=sum((r.ledger for r in runs), Ledger()),
            packets=sum(r.packets for r in runs),
            grades=sum((r.grades for r in runs), Grades()),
            several_devices=None,
            rows_not_stored=sum(r.rows_not_stored for r in runs),
            cost=self.cost(where),
            sharers=self.sharers(where),
        )
        for run in runs:
            found.observed(run.hooks)
        containers = self.containers(where)
        ids = {(one.host, one.container): one.container_id for one in containers}
        found.pods = {one.container_id: one.pod_containers for one in containers if one.pod_containers}
        parts: list[tuple[Any, ...]] = []
        if from_rows:
            parts += self._fetch(*self._rows_query(where, from_rows))
        if from_windows:
            parts += self._windows_by_place(where, from_windows, part=bool(from_rows))
        for row in parts:
            place = _place(row[:8])
            place = replace(place, container_id=ids.get((place.host, place.container), ""))
            direction, segment = Direction[row[8].upper()], Segment[row[9].upper()]
            count, sum_ns, min_ns, max_ns, bins, counts = row[10:]
            found.distribution(place, direction, segment).add(
                int(count), int(sum_ns), int(min_ns), int(max_ns), np.array(bins, np.int64), np.array(counts, np.int64)
            )
        if where.narrows and from_rows:
            found.packets = self._count_packets(where, from_rows)
        found.note = self._note(where, from_windows)
        return found

    @_written_by_mace
    def windows(self, where: Filter = Filter()) -> tuple[WindowTable, tuple[DevicePlace, ...]]:
        """Return the windows of 1 s that lie within the filter, in time order, as columns.

        The column `device` has indices of the places returned, which have the containers' newest names and ids.
        """
        where = self._by_newest_name(where)
        condition, values = _condition(where, self.runs(where), windows=True)
        figures = ", ".join(FIGURES)
        found: pa.Table = self._query(
            f"""
            SELECT {_PLACE}, coalesce(container_id, '') AS container_id, direction, segment, epoch_ns(time) AS start,
                   {figures}, bins, counts
            FROM {{windows}} WHERE {condition} AND width_s = 1 ORDER BY time
            """,
            where,
            values,
            None,
            lambda connection, sql, values: connection.sql(sql, params=values).to_arrow_table(),
        )
        return _window_table(found)

    def _split(self, runs: Sequence[Run], source: From, where: Filter) -> tuple[list[Run], list[Run]]:
        if source == "rows":
            return list(runs), []
        if source == "windows":
            return [], list(runs)
        if sum(s.rows for s in self.segments("delays", where)) > WINDOWS_FROM_ROWS and where.container is None:
            return [], list(runs)
        return [r for r in runs if r.rows_stored], [r for r in runs if not r.rows_stored]

    def _note(self, where: Filter, from_windows: Sequence[Run]) -> str:
        told = []
        if where.narrows:
            told.append("The ledger and the grades are of whole runs.")
        # A run of `mace ping` has neither rows nor windows.
        counted = {key[:2] for each in self._windows_seen(where).found for key in each.ends} if from_windows else set()
        from_windows = [r for r in from_windows if (r.host, r.run) in counted]
        if from_windows:
            names = ", ".join(r.run for r in from_windows[:5]) + (", ..." if len(from_windows) > 5 else "")
            told.append(f"From windows, not rows: run {names}.")
        if self.damaged:
            told.append(f"{len(self.damaged)} damaged segments ({self.rows_damaged():,} rows) were skipped.")
        return " ".join(told)

    def _rows_query(self, where: Filter, runs: Sequence[Run]) -> tuple[str, Filter, dict[str, Any]]:
        condition, values = _condition(where, runs)
        return (
            f"""
            WITH b AS (
                SELECT {_PLACE}, direction, segment, {BIN_SQL} AS bin, count(*) AS n, sum(delay_ns) AS s,
                       min(delay_ns) AS lo, max(delay_ns) AS hi
                FROM {{delays}} WHERE {condition} AND {_COUNTED} GROUP BY ALL
            )
            SELECT {_PLACE}, direction, segment, sum(n), sum(s), min(lo), max(hi),
                   list(bin ORDER BY bin), list(n ORDER BY bin)
            FROM b GROUP BY {_PLACE}, direction, segment
            """,
            where,
            values,
        )

    def _windows_by_place(self, where: Filter, runs: Sequence[Run], *, part: bool) -> list[tuple[Any, ...]]:
        """Return place, direction, segment, count, sum, extremes, bins and counts of windows, by place."""
        found = self._of_windows(where, list(runs), tuple(Segment), _FOREVER, part=part)
        by = (*_PLACE.split(", "), "direction", "segment")
        [merged] = self._grouped(found, [_Grouping(by)])
        return [
            (*key, each.count, each.sum_ns, each.min_ns, each.max_ns, *each.histogram()) for key, each in merged.items()
        ]

    @_written_by_mace
    def unseen(self, where: Filter = Filter(), source: From = "auto") -> list[str]:
        """Return the sentences of `Summary.unseen`, from counts alone: without reading a histogram."""
        runs = self.runs(where)
        found = Summary(ledger=Ledger(), packets=0, grades=Grades(), several_devices=None)
        for run in runs:
            found.observed(run.hooks)
        if found.sees_past_tracepoints:
            return []
        containers = self.containers(where)
        ids = {(one.host, one.container): one.container_id for one in containers}
        found.pods = {one.container_id: one.pod_containers for one in containers if one.pod_containers}
        for part in self._parts(where, (Segment.DEVICE, Segment.DELIVERY), source):
            counted = "count(*)" if part.table == "delays" else "sum(count)"
            columns = f"{_PLACE}, direction, segment, {counted}"
            rows = self._query(
                f"SELECT {columns} FROM {part.rows_sql} WHERE role = 'inner' GROUP BY ALL",
                part.where,
                part.values,
                None,
                lambda connection, sql, values: connection.execute(sql, values).fetchall(),
                named_in=part.named_in,
                wide_ones=part.wide,
            )
            for *row, direction, segment, count in rows:
                place = _place(row)
                place = replace(place, container_id=ids.get((place.host, place.container), ""))
                nothing = np.zeros(0, np.int64)
                delays = found.distribution(place, Direction[direction.upper()], Segment[segment.upper()])
                delays.add(int(count), 0, 0, 0, nothing, nothing)
        return found.unseen()

    def _count_packets(self, where: Filter, runs: Sequence[Run]) -> int:
        condition, values = _condition(where, runs)
        if where == Filter(container=where.container, run=where.run, host=where.host) and where.container is not None:
            # Each of a container's packets has an overhead row: no need to look for its other rows.
            condition, values = _condition(replace(where, container=None), runs)
            condition = f"segment = 'overhead' AND container = $container AND {condition}"
            values |= {"container": where.container}
        key = "packet" if len(runs) == 1 else "(host, run, packet)"
        [(count,)] = self._fetch(f"SELECT count(DISTINCT {key}) FROM {{delays}} WHERE {condition}", where, values)
        return int(count)

    # CPUs.

    @_written_by_mace
    def stages(self, where: Filter = Filter()) -> list[StageCount]:
        """Return what was counted of stages and packets, in intervals wholly within the filter's time, in path order.

        The filter's device is ignored, because packets are counted at one device and their stages at others.
        """
        where = replace(self._by_newest_name(where), device=None)
        condition, values = _condition(where, [], windows=True)
        by = STAGE_GROUPS

        def take(connection: duckdb.DuckDBPyConnection, sql: str, values: dict[str, Any]) -> Histograms:
            merged = Histograms(by)
            for batch in connection.sql(sql, params=values).to_arrow_reader(_BATCH_WINDOWS) or ():
                merged.add(batch)
            return merged

        sql = f"SELECT {', '.join(by)}, count, sum_ns, min_ns, max_ns, bins, counts FROM {{stages}} WHERE {condition}"
        return stage_counts(self._query(sql, where, values, None, take))

    @_written_by_mace
    def cpu_growth(self, where: Filter = Filter()) -> list[CpuGrowth]:
        """Return by how much each CPU's counters grew in the filter's runs and time, by host and CPU.

        A CPU with fewer than two readings of a run is left out.
        """
        condition, values = _condition(Filter(where.since_ns, where.until_ns, run=where.run), [])
        # The kernel's counters have 32 bits.
        grown = ", ".join(
            f"({name} - lag({name}) OVER w + {1 << 32}) % {1 << 32} AS {name}"
            for name in ("processed", "dropped", "squeezed")
        )
        rows = self._fetch(
            f"""
            WITH d AS (
                SELECT host, cpu, epoch_ns(time) - lag(epoch_ns(time)) OVER w AS span, {grown}
                FROM {{cpus}} WHERE {condition}
                WINDOW w AS (PARTITION BY host, run, cpu ORDER BY time)
            )
            SELECT host, cpu, sum(span), sum(processed), sum(dropped), sum(squeezed)
            FROM d WHERE span IS NOT NULL GROUP BY ALL ORDER BY ALL
            """,
            where,
            values,
        )
        return [CpuGrowth(host, cpu, *map(int, numbers)) for host, cpu, *numbers in rows]

    @_written_by_mace
    def softirqs(self, where: Filter = Filter()) -> list[SoftirqFigures]:
        """Return each CPU's receive softirqs in the filter's runs and time, by host and CPU; none if not stored."""
        condition, values = _condition(Filter(where.since_ns, where.until_ns, run=where.run), [])
        rows = self._fetch(
            f"""
            WITH s AS (SELECT * FROM {{softirqs}} WHERE {condition}),
            u AS (SELECT host, cpu, unnest(bins) AS bin, unnest(counts) AS n FROM s),
            b AS (SELECT host, cpu, bin, sum(n) AS n FROM u GROUP BY ALL),
            h AS (SELECT host, cpu, list(bin ORDER BY bin) AS bins, list(n ORDER BY bin) AS counts FROM b GROUP BY ALL),
            a AS (
                SELECT host, cpu, sum(count) AS runs, sum(by_ksoftirqd) AS by_ksoftirqd, sum(run_ns) AS run_ns,
                       sum(lost) AS lost, sum(wait_ns) AS wait_ns, max(wait_max_ns) AS longest
                FROM s GROUP BY ALL
            )
            SELECT host, cpu, runs, by_ksoftirqd, run_ns, lost, wait_ns, longest, bins, counts
            FROM a LEFT JOIN h USING (host, cpu) ORDER BY host, cpu
            """,
            where,
            values,
        )
        found = []
        for host, cpu, runs, by_ksoftirqd, run_ns, lost, wait_ns, longest, bins, counts in rows:
            waits = Distribution()
            if bins:
                # The smallest wait is not stored: its bin's middle stands for it.
                low = int(middles(np.array(bins[:1], np.int64))[0])
                waits.add(
                    int(sum(counts)), int(wait_ns), low, longest, np.array(bins, np.int64), np.array(counts, np.int64)
                )
            found.append(SoftirqFigures(host, cpu, int(runs), int(by_ksoftirqd), int(run_ns), int(lost), waits))
        return found

    # Round trips of tools.

    @_written_by_mace
    def round_trips(self, where: Filter = Filter(), points: int = 240) -> RoundTripsOverTime:
        """Return the round trips of tools per stretch of time, in about `points` stretches of equal width.

        Figures are of the paired samples, so that all of them are of the same exchanges. The filter's device and
        direction are ignored.
        """
        where = self._by_newest_name(where)
        condition, values = _condition(Filter(where.since_ns, where.until_ns, run=where.run, host=where.host), [])
        if where.container is not None:
            condition, values = f"{condition} AND container = $container", values | {"container": where.container}
        counts = self._fetch(
            f"""
            SELECT reason, count(*), epoch_ns(min(time)), epoch_ns(max(time))
            FROM {{round_trips}} WHERE {condition} GROUP BY reason ORDER BY reason
            """,
            where,
            values,
        )
        samples = {reason: int(count) for reason, count, _, _ in counts}
        spans = [(first, last) for reason, _, first, last in counts if reason == "paired"]
        if not spans:
            return RoundTripsOverTime(where.since_ns or 0, 1, {}, samples)
        [(first, last)] = spans
        width_ns = (last - first) // points + 1
        named = ", ".join(f"'{name}'" for name in ROUND_TRIP_FIGURES)
        figures = ", ".join(f"{name}_ns" for name in ROUND_TRIP_FIGURES)
        by = ("tool", "destination", "figure", "stretch")
        keys = ", ".join(by)
        cells = self._query(
            f"""
            SELECT {keys}, {BIN_SQL} AS bin, count(*) AS n, sum(delay_ns) AS s, min(delay_ns) AS lo, max(delay_ns) AS hi
            FROM (
                SELECT tool, destination, {_STRETCH_SQL} AS stretch, unnest([{named}]) AS figure,
                       unnest([{figures}]) AS delay_ns
                FROM {{round_trips}} WHERE {condition} AND reason = 'paired'
            )
            WHERE delay_ns IS NOT NULL GROUP BY ALL ORDER BY {keys}, bin
            """,
            where,
            values | {"first": first, "width": width_ns},
            None,
            lambda connection, sql, values: connection.sql(sql, params=values).to_arrow_table(),
        )
        found: dict[tuple[str, str, str], dict[int, Distribution]] = {}
        for (*group, at), numbers in _groups(cells, by):
            found.setdefault((group[0], group[1], group[2]), {}).setdefault(int(at), Distribution()).add(*numbers)
        return RoundTripsOverTime(first, width_ns, found, samples)

    # Single packets.

    def packet(self, number: int, where: Filter = Filter(), near_utc_ns: int | None = None) -> list[PacketPath]:
        """Return the packets with this number: none, one, or one per run that has the number.

        With `near_utc_ns` only the hours around that time are searched.
        """
        near = None if near_utc_ns is None else Filter(near_utc_ns - _NEAR_NS, near_utc_ns + _NEAR_NS)
        return self._paths("packet = $packet", {"packet": number}, where, near)

    def worst(self, limit: int, where: Filter = Filter()) -> list[PacketPath]:
        """Return the packets with the largest overhead, worst first; a packet with two overheads counts once."""
        where = self._by_newest_name(where)
        condition, values = _condition(where, self.runs(where))
        worst = self._fetch(
            f"""
            SELECT host, run, packet FROM {{delays}} WHERE segment = 'overhead' AND {condition}
            ORDER BY delay_ns DESC, host, run, packet LIMIT 2 * $limit
            """,
            where,
            values | {"limit": limit},
        )
        worst = list(dict.fromkeys(worst))[:limit]
        if not worst:
            return []
        keys = ", ".join(f"(${i}a, ${i}b, ${i}c)".replace("$", "$k") for i in range(len(worst)))
        named = {f"k{i}{c}": v for i, row in enumerate(worst) for c, v in zip("abc", row, strict=True)}
        found = self._paths(f"(host, run, packet) IN ({keys})", named, where)
        order = {tuple(row): i for i, row in enumerate(worst)}
        return sorted(found, key=lambda p: order[p.host, p.run, p.packet])

    @_written_by_mace
    def _paths(
        self, condition: str, values: dict[str, Any], where: Filter, near: Filter | None = None
    ) -> list[PacketPath]:
        # No filter by time, so that a packet at its edge is shown whole; `near` only chooses the hours that are read.
        rows = self._fetch(
            f"""
            SELECT {_PLACE}, run, packet, epoch_ns(time), direction, segment, position, delay_ns, l3_len, grade, outcome
            FROM {{delays}} WHERE {condition} AND ($run IS NULL OR run = $run) AND ($host IS NULL OR host = $host)
            ORDER BY host, run, packet, position, epoch_ns(time)
            """,
            near or Filter(),
            values | {"run": where.run, "host": where.host},
        )
        grouped: dict[tuple[str, str, int], list[tuple[Any, ...]]] = {}
        for row in rows:
            grouped.setdefault((row[0], row[8], row[9]), []).append(row)
        return [_packet_path(key, group) for key, group in grouped.items()]

    @_written_by_mace
    def typical_paths(self, where: Filter = Filter()) -> list[TypicalPath]:
        """Return the devices that each container's packets cross, in path order, per direction.

        They are computed from the newest `TYPICAL_ROWS` rows.
        """
        where = self._by_newest_name(where)
        runs = [r for r in self.runs(where) if r.rows_stored]
        if not runs:
            return []
        # A packet's overhead rows say whose path it is. DuckDB holds one entry for each packet: the shorter, the less.
        own = "true" if where.container is None else "container = $container"
        key, of_runs = "host, run, packet", where
        if len(runs) == 1:
            key, of_runs = "packet", replace(where, host=runs[0].host, run=runs[0].run)
        condition, values = _condition(replace(of_runs, container=None), runs)
        rows = self._fetch(
            f"""
            WITH d AS NOT MATERIALIZED (SELECT * FROM {{delays}} WHERE {condition} AND {_COUNTED}),
            p AS (
                SELECT {key}, direction, min(container) AS owner, min(netns) AS owner_netns
                FROM d WHERE segment = 'overhead' AND {own} GROUP BY ALL
            ), b AS (
                SELECT p.owner, p.owner_netns, d.*, {BIN_SQL} AS bin
                FROM d JOIN p USING ({key}, direction) WHERE segment NOT IN ('overhead', 'waiting')
            ), g AS (
                SELECT owner, owner_netns, {_PLACE}, direction, segment, bin, count(*) AS n, sum(delay_ns) AS s,
                       min(delay_ns) AS lo, max(delay_ns) AS hi, sum(position) AS hop
                FROM b GROUP BY ALL
            )
            SELECT {_PLACE}, direction, segment, sum(n), sum(s), min(lo), max(hi),
                   list(bin ORDER BY bin), list(n ORDER BY bin), owner, owner_netns, sum(hop) / sum(n)
            FROM g GROUP BY owner, owner_netns, {_PLACE}, direction, segment
            ORDER BY host, owner, owner_netns, direction, sum(hop) / sum(n), device_id
            """,
            where,
            values | {"container": where.container},
            newest_rows=min(TYPICAL_ROWS, self.most_rows or TYPICAL_ROWS),
        )
        found: dict[tuple[str, str, str, str], TypicalPath] = {}
        for row in rows:
            place, direction, segment = _place(row[:8]), Direction[row[8].upper()], Segment[row[9].upper()]
            count, sum_ns, min_ns, max_ns, bins, counts, owner, netns, _ = row[10:]
            path = found.setdefault((row[0], owner, netns, row[8]), TypicalPath(row[0], owner, netns, direction, []))
            delays = Distribution()
            delays.add(
                int(count), int(sum_ns), int(min_ns), int(max_ns), np.array(bins, np.int64), np.array(counts, np.int64)
            )
            path.hops.append((place, segment, delays))
        return list(found.values())

    def series(self, where: Filter = Filter(), points: int = 240, source: From = "auto") -> list[Series]:
        """Return the overhead over time per container and direction, in about `points` stretches of equal width."""
        found = []
        over = self.over_time(where, ("container", "direction"), points=points, source=source)
        for (container, direction), stretches in over.groups.items():
            ats = sorted(stretches)
            quantiles_of = [stretches[at].quantiles((0.5, 0.99)) for at in ats]
            found.append(
                Series(
                    container,
                    Direction[direction.upper()],
                    [over.first_utc_ns + at * over.width_ns for at in ats],
                    [q[0] for q in quantiles_of],
                    [q[1] for q in quantiles_of],
                    over.width_ns,
                )
            )
        return found

    def over_time(
        self,
        where: Filter = Filter(),
        by: tuple[str, ...] = ("host", "container", "direction"),
        *,
        segments: tuple[Segment, ...] = (Segment.OVERHEAD,),
        points: int = 240,
        source: From = "auto",
        coarse_bits: int = 0,
        whole: bool = False,
    ) -> OverTime:
        """Return the distributions per group and stretch of time, in about `points` stretches of equal width.

        `by` are columns of `GROUPED_BY`. With `coarse_bits` n, 2**n neighbouring bins count as the one in their middle,
        which is quicker where a picture shows no more. The stretches together have exactly the delays of `grouped`.
        With `whole`, the distribution of each whole group is read along with it.
        Where figures come from windows, stretches are whole seconds, or, of more than `_LONG_NS`, tens of seconds.
        """

        def make() -> OverTime:
            return self._over_time(where, by, segments, points, source, coarse_bits, whole)

        # One view alone asks for the whole, of all containers: its distributions would take more memory than they save.
        key = ("over_time", where, by, segments, points, source, coarse_bits)
        return make() if whole else self._once(key, make, _KEPT_FIGURES)

    def _over_time(
        self,
        where: Filter,
        by: tuple[str, ...],
        of: tuple[Segment, ...],
        points: int,
        source: From,
        coarse_bits: int,
        whole: bool,
    ) -> OverTime:
        parts = self._parts(where, of, source, points)
        spans = [
            self._query(
                f"SELECT epoch_ns(min(time)), epoch_ns(max(time)) FROM {part.rows_sql}",
                part.where,
                part.values,
                None,
                lambda connection, sql, values: connection.execute(sql, values).fetchall()[0],
                named_in=part.named_in,
                wide_ones=part.wide,
            )
            for part in parts
        ]
        known = [span for span in spans if span[0] is not None]
        if not known:
            return OverTime(where.since_ns or 0, 1, {})
        first = min(a for a, _ in known)
        width_ns = (max(b for _, b in known) - first) // points + 1
        unit_ns = max(part.unit_ns for part in parts)
        width_ns = -(-width_ns // unit_ns) * unit_ns
        first -= first % unit_ns
        found: dict[tuple[str, ...], dict[int, Distribution]] = {}
        wanted = [_Grouping((*by, "stretch"), coarse_bits), *([_Grouping(by)] if whole else [])]
        stretches, *groups = self._grouped(parts, wanted, first, width_ns)
        for (*group, at), delays in stretches.items():
            found.setdefault(tuple(group), {})[int(at)] = delays
        return OverTime(first, width_ns, dict(sorted(found.items())), *(dict(sorted(each.items())) for each in groups))

    def grouped(
        self,
        where: Filter = Filter(),
        by: tuple[str, ...] = ("host", "container", "direction"),
        *,
        segments: tuple[Segment, ...] = (Segment.OVERHEAD,),
        source: From = "auto",
    ) -> dict[tuple[str, ...], Distribution]:
        """Return the distribution of each group of rows; `by` are columns of `GROUPED_BY`. Sorted by group."""
        [found] = self._grouped(self._parts(where, segments, source), [_Grouping(by)])
        return dict(sorted(found.items()))

    @_written_by_mace
    def _parts(self, where: Filter, of: tuple[Segment, ...], source: From, points: int | None = None) -> list[_Part]:
        """Return what `grouped` reads: rows, and windows where they have the same delays.

        These are the windows of the runs without rows, and of the others those that are complete. With `points`, the
        windows are so narrow that about as many stretches of time are left.
        """
        where = self._by_newest_name(where)
        runs = self.runs(where)
        rows, windows = self._split(runs, source, where)
        found = []
        stretch_ns = _FOREVER if points is None or not runs else _span_ns(where, runs) // points
        # Windows do not tell packets apart: those of a container are its own devices', as its overhead rows are.
        if source == "auto" and rows and (where.container is None or of == (Segment.OVERHEAD,)):
            found = self._complete(where, rows, of, stretch_ns, "delays")
        if rows and not found:
            found = [self._rows(where, rows, of, where, part=len(rows) < len(runs))]
        if windows:
            found += self._of_windows(where, windows, of, stretch_ns, part=len(windows) < len(runs))
        return found

    def _of_windows(
        self, where: Filter, runs: list[Run], of: tuple[Segment, ...], stretch_ns: int, *, part: bool
    ) -> list[_Part]:
        """Return the windows of runs without rows: the widest ones, and windows of a second beside them."""
        counted = {key[:2] for each in self._windows_seen(where).found for key in each.ends}
        runs = [run for run in runs if (run.host, run.run) in counted]
        if not runs:
            return []
        if found := self._complete(where, runs, of, stretch_ns, "windows"):
            return found
        condition, values = self._where(where, runs, of, windows=True, part=part)
        long = stretch_ns != _FOREVER and _span_ns(where, runs) > _LONG_NS
        sql = (
            f"(SELECT * FROM {{windows}} WHERE {condition}"
            f" QUALIFY width_s = {'max' if long else 'min'}(width_s) OVER (PARTITION BY host, run))"
        )
        return [_Part("windows", sql, values, (10 if long else 1) * _S, where, where)]

    def _where(
        self, where: Filter, runs: Sequence[Run], of: tuple[Segment, ...], *, windows: bool, part: bool
    ) -> tuple[str, dict[str, Any]]:
        """Return SQL for the rows of these segments that a filter admits, and its parameters."""
        names = ", ".join(f"'{segment.name.lower()}'" for segment in of)
        # Overhead rows have their packet's container: no need to look for the packets of a container.
        direct = of == (Segment.OVERHEAD,) and not windows and where.container is not None
        given = replace(where, container=None) if direct else where
        condition, values = _condition(given, runs, windows=windows, part=part)
        if direct:
            condition, values = f"{condition} AND container = $container", values | {"container": where.container}
        return f"segment IN ({names}) AND {condition}", values

    def _rows(
        self,
        where: Filter,
        runs: Sequence[Run],
        of: tuple[Segment, ...],
        named_in: Filter,
        table: str = "delays",
        *,
        part: bool = False,
        since: _Ends | None = None,
    ) -> _Part:
        """Return the rows of these runs, or their windows of a second; with `since` those from each run's time on."""
        windows = table == "windows"
        condition, values = self._where(where, runs, of, windows=windows, part=part)
        condition, unit_ns = f"{condition} AND {'width_s = 1' if windows else _COUNTED}", _S if windows else 1
        if since is None:
            return _Part(table, f"(SELECT * FROM {{{table}}} WHERE {condition})", values, unit_ns, where, named_in)
        sql = (
            f"(SELECT d.* FROM {{{table}}} AS d JOIN {_ENDS_SQL} USING (host, run)"
            f" WHERE {condition} AND epoch_ns(time) >= upto)"
        )
        return _Part(table, sql, values | since.values(), unit_ns, where, named_in)

    def _complete(
        self, where: Filter, runs: list[Run], of: tuple[Segment, ...], stretch_ns: int, narrow: str
    ) -> list[_Part]:
        """Return the widest windows that lie within the filter, and the rows of the table `narrow` beside them.

        These are rows of `delays`, or windows of a second. Returns nothing if reading these alone is quicker.

        A window is stored when no further delay can belong to it, and in the order of their ends: up to the end of the
        newest one, windows and rows have the same delays. A run that has ended has all of its windows.
        """
        seen = self._windows_seen(where)
        if not seen.whole or any(run.rows_not_stored for run in runs):
            return []
        for width_s in _WIDTHS_S:
            unit_ns, stored_s = width_s * _S, min(width_s, FROM_S)
            ends = {
                (r.host, r.run): max((each.ends.get((r.host, r.run, stored_s), 0) for each in seen.found), default=0)
                for r in runs
            }
            if 2 * unit_ns > stretch_ns or (width_s > FROM_S and not seen.wide):
                continue
            if narrow == "windows" and width_s == 1:
                return []
            if narrow == "delays" and not all(ends.values()):
                continue
            if width_s == 1 and self._rows_of("delays", where) < _FEW_ROWS * self._rows_of("windows", where):
                return []
            low = None if where.since_ns is None else -(-where.since_ns // unit_ns) * unit_ns
            high = None if where.until_ns is None else where.until_ns // unit_ns * unit_ns
            if low is not None and high is not None and low >= high:
                continue
            step_ns = stored_s * _S
            low = None if where.since_ns is None else -(-where.since_ns // step_ns) * step_ns
            high = None if where.until_ns is None else where.until_ns // step_ns * step_ns
            inner = replace(where, since_ns=low, until_ns=high)
            upto = _Ends(
                {key: _FOREVER if r.closed and end else end for r, (key, end) in zip(runs, ends.items(), strict=True)}
            )
            found = [self._windows(inner, runs, of, where, width_s, upto, seen.wide)]
            if low is not None and low > (where.since_ns or 0):
                found.append(self._rows(replace(where, until_ns=low), runs, of, where, narrow, part=True))
            if high is not None and high < (where.until_ns or 0):
                found.append(self._rows(replace(where, since_ns=high), runs, of, where, narrow, part=True))
            for rest, of_runs in _unended(inner, runs, ends):
                since = _Ends({(r.host, r.run): ends[r.host, r.run] for r in of_runs})
                found.append(self._rows(rest, runs, of, where, narrow, since=since))
            return found
        return []

    def _windows(
        self,
        where: Filter,
        runs: Sequence[Run],
        of: tuple[Segment, ...],
        named_in: Filter,
        width_s: int,
        upto: _Ends,
        known: frozenset[Path],
    ) -> _Part:
        """Return windows of up to `width_s` that lie within the filter and begin before a time of each run."""
        condition, values = self._where(where, runs, of, windows=True, part=False)
        values |= upto.values()
        stored = f"width_s = {min(width_s, FROM_S)} AND epoch_ns(time) < upto"
        sql = f"SELECT w.* FROM {{windows}} AS w JOIN {_ENDS_SQL} USING (host, run) WHERE {condition} AND {stored}"
        if width_s <= FROM_S:
            return _Part("windows", f"({sql})", values, width_s * _S, where, named_in)
        last = _FOREVER // segments.HOUR_NS * segments.HOUR_NS
        within = spans(where.since_ns or 0, last if where.until_ns is None else where.until_ns, width_s)
        joined = f"AS w JOIN {_ENDS_SQL} USING (host, run) WHERE {condition}"
        for width, begin, end in within:
            named = "covered_windows" if width == FROM_S else wide.TABLES[width]
            also = f" AND {stored}" if width == FROM_S else ""
            sql += (
                f" UNION ALL BY NAME SELECT w.* FROM {{{named}}} {joined}"
                f" AND epoch_ns(time) >= {begin} AND epoch_ns(time) < {end}{also}"
            )
        return _Part("windows", f"({sql})", values, width_s * _S, where, named_in, _Wide(known, tuple(within)))

    @_written_by_mace
    def too_many(self, where: Filter) -> bool:
        """Return whether a filter's time has more than `most_rows` rows, about: an hour's rows have no times here."""
        runs = self.runs(where)
        if self.most_rows is None or not runs:
            return False
        since, until = where.since_ns, where.until_ns
        hours = replace(
            where,
            since_ns=None if since is None else since // segments.HOUR_NS * segments.HOUR_NS,
            until_ns=None if until is None else -(-until // segments.HOUR_NS) * segments.HOUR_NS,
        )
        share = max(_span_ns(where, runs), 0) / max(_span_ns(hours, runs), 1)
        return self._rows_of("delays", where) * min(share, 1) > self.most_rows

    def _rows_of(self, table: str, where: Filter) -> int:
        return sum(each.rows for each in self.segments(table, where))

    @_written_by_mace
    def _grouped(
        self, parts: Sequence[_Part], wanted: Sequence[_Grouping], first_ns: int = 0, width_ns: int = 1
    ) -> list[dict[tuple[Any, ...], Distribution]]:
        """Return the distributions by group of each grouping; windows are read once for all of them."""
        merged: list[dict[tuple[Any, ...], Distribution]] = [{} for _ in wanted]
        for part in parts:
            values = part.values | {"first": first_ns, "width": width_ns}
            if part.table == "windows":
                for mine, found in zip(merged, self._merged(part, wanted, values), strict=True):
                    for key, delays in found.distributions():
                        mine[key] = mine[key] + delays if key in mine else delays
                continue
            for mine, each in zip(merged, wanted, strict=True):
                cells = self._query(
                    _grouped_query(part, each),
                    part.where,
                    values,
                    None,
                    lambda connection, sql, values: connection.sql(sql, params=values).to_arrow_table(),
                    named_in=part.named_in,
                )
                for key, figures in _groups(cells, each.by):
                    mine.setdefault(key, Distribution()).add(*figures)
        return merged

    def _merged(self, part: _Part, wanted: Sequence[_Grouping], values: dict[str, Any]) -> list[Histograms]:
        """Return a part's windows, merged by the groups of each grouping."""

        def take(connection: duckdb.DuckDBPyConnection, sql: str, values: dict[str, Any]) -> list[Histograms]:
            found = [Histograms(each.by, each.coarse_bits) for each in wanted]
            for batch in connection.sql(sql, params=values).to_arrow_reader(_BATCH_WINDOWS) or ():
                cells = cells_of(batch)
                for each in found:
                    each.add(batch, cells)
            return found

        columns = dict.fromkeys(name for each in wanted for name in each.by)
        names = ", ".join(f"{_STRETCH_SQL} AS stretch" if name == "stretch" else name for name in columns)
        sql = f"SELECT {names}, count, sum_ns, min_ns, max_ns, bins, counts FROM {part.rows_sql}"
        return self._query(sql, part.where, values, None, take, named_in=part.named_in, wide_ones=part.wide)

    @_written_by_mace
    def packets(
        self,
        where: Filter = Filter(),
        *,
        low_ns: int = 0,
        high_ns: int | None = None,
        segment: Segment = Segment.OVERHEAD,
        limit: int = 100,
    ) -> tuple[int, list[PacketRow]]:
        """Return how many rows of `segment` have a delay from `low_ns` to `high_ns`, and the slowest `limit` of them.

        Packets that waited for a neighbour, which no figure counts, are among them. Of `too_many` rows, the newest are
        read.
        """
        where = self._by_newest_name(where)
        runs = self.runs(where)
        condition, values = _condition(replace(where, container=None), runs)
        if where.container is not None:
            if segment is Segment.OVERHEAD:
                condition, values = f"{condition} AND container = $container", values | {"container": where.container}
            else:
                condition, values = _condition(where, runs)
        condition = f"""
            segment = $segment AND {condition} AND delay_ns >= $low AND ($high IS NULL OR delay_ns <= $high)
            """
        values |= {"segment": segment.name.lower(), "low": low_ns, "high": high_ns, "limit": limit}
        newest = self.most_rows if self.too_many(where) else None
        [(found,)] = self._fetch(f"SELECT count(*) FROM {{delays}} WHERE {condition}", where, values, newest)
        rows = self._fetch(
            f"""
            SELECT host, run, packet, epoch_ns(time), container, device, direction, delay_ns, l3_len, grade, outcome,
                   coalesce(waited, false)
            FROM {{delays}} WHERE {condition} ORDER BY delay_ns DESC, host, run, packet LIMIT $limit
            """,
            where,
            values,
            newest,
        )
        return int(found), [PacketRow(*row) for row in rows]

    @_written_by_mace
    def header(self, host: str, run: str) -> StreamHeader:
        """Return the header of a run's stream. Raises `StoreError` for an unknown run."""
        rows = self._fetch(
            f"""
            SELECT r.source, r.kernel, r.boot_id, r.cpus, {", ".join(_CLOCK)}, r.hooks, r.mace_version, r.command
            FROM {{runs}} r WHERE r.host = $host AND r.run = $run
            """,
            Filter(),
            {"host": host, "run": run},
        )
        if not rows:
            raise StoreError(f"{self.path}: no run {run!r} of {host!r}")
        source, kernel, boot_id, cpus, *clock, hooks, version, command = rows[0]
        return StreamHeader(
            source,
            host,
            run,
            kernel,
            boot_id,
            int(cpus),
            _pair(clock),
            tuple(hooks or ()),
            version,
            tuple(command or ()),
        )

    def delays(self, where: Filter = Filter(), columns: Sequence[str] = ()) -> pa.Table:
        """Return rows of `delays` as they are stored, with the named columns or all (`storage.tables.DELAYS`).

        Raises `StoreError` for an unknown column.
        """
        known = [c.name for c in tables.DELAYS]
        for name in columns:
            if name not in known:
                raise StoreError(f"no column {name!r} in delays{nearest(name, known)}; there are {', '.join(known)}")
        condition, values = _condition(where, self.runs(where))
        return self._query(
            f"SELECT {', '.join(columns) or '*'} FROM {{delays}} WHERE {condition}",
            where,
            values,
            None,
            lambda connection, sql, values: connection.sql(sql, params=values).to_arrow_table(),
            as_stored=True,
        )

    # DuckDB.

    def _fetch(
        self, sql: str, where: Filter, values: dict[str, Any], newest_rows: int | None = None
    ) -> list[tuple[Any, ...]]:
        return self._query(
            sql, where, values, newest_rows, lambda connection, sql, values: connection.execute(sql, values).fetchall()
        )

    def _query(
        self,
        sql: str,
        where: Filter,
        values: dict[str, Any],
        newest_rows: int | None,
        take: Callable[[duckdb.DuckDBPyConnection, str, dict[str, Any]], _T],
        *,
        as_stored: bool = False,
        named_in: Filter | None = None,
        wide_ones: _Wide | None = None,
    ) -> _T:
        """Run `sql`, in which `{TABLE}` stands for the table's live segments (the newest with `newest_rows` rows).

        Rows have the newest names of containers in the filter's time (or that of `named_in`), or with `as_stored` the
        stored names.
        """
        used = [table for table in segments.TABLES if "{" + table + "}" in sql]
        naming = [] if as_stored else [table for table in used if table in TABLES]
        containers = self.containers(named_in or where) if naming else []
        for _ in range(_ATTEMPTS):
            missing: set[int] = set()
            if wide_ones is None:
                live = {table: self.whole_segments(table, where, newest_rows) for table in used}
            else:
                live, missing = self._live_and_wide(where, wide_ones)
            with self._connected() as connection:
                names = {table: relation(connection, _STORED.get(table, table), found) for table, found in live.items()}
                names |= {
                    table: by_newest_name(names[table], containers) for table in (*naming, *_STORED) if table in names
                }
                if missing:
                    names |= {table: _without_hours(names[table], missing) for table in segments.DAILY}
                try:
                    return take(connection, sql.format(**names), _used(sql, values))
                except duckdb.Error as e:
                    if not self.blame([s.path for found in live.values() for s in found], e):
                        raise StoreError(f"{self.path}: query failed: {' '.join(str(e).split())}") from e
        raise StoreError(f"{self.path}: segments vanished {_ATTEMPTS} times while they were read; try again")

    def _live_and_wide(self, where: Filter, asked: _Wide) -> tuple[dict[str, list[SegmentFile]], set[int]]:
        """Return the live segments by table, and the hours that retention has removed from the wide windows' days."""
        known = asked.known
        while True:
            found = self._cover(where, known)
            chosen = {table: self._of_spans(table, width, found.wide, asked) for width, table in wide.TABLES.items()}
            lacking = {path for pairs in chosen.values() for path, each in pairs.items() if each is None}
            if not lacking:
                break
            known -= lacking
        missing = set[int]()
        for one in found.wide:
            missing |= self._seen[one.path].hours - {each.hour for each, by in found.covered.items() if by == one}
        edges = {
            hour
            for width, begin, end in asked.spans
            if width == FROM_S
            for hour in range(begin // segments.HOUR_NS, -(-end // segments.HOUR_NS))
        }
        live = {
            "windows": [each for each in found.others if _within(each.hour, where)],
            "covered_windows": [each for each in found.covered if each.hour in edges],
        }
        if bad := self._damaged_of([each for listed in live.values() for each in listed]):
            self._refuse(bad, None)
        live = {table: [each for each in listed if each.path not in self.damaged] for table, listed in live.items()}
        return live | {
            table: [each for each in pairs.values() if each is not None] for table, pairs in chosen.items()
        }, missing

    def _of_spans(
        self, table: str, width_s: int, standing: Sequence[SegmentFile], asked: _Wide
    ) -> dict[Path, SegmentFile | None]:
        """Return a table's segments in the spans, by the path of the one of `STANDING`; None if damaged or gone."""
        day_ns = segments.DAY_HOURS * segments.HOUR_NS
        within = [(begin, end) for width, begin, end in asked.spans if width == width_s]
        wanted = [
            each
            for each in standing
            if any(
                begin < day_of(each) * segments.HOUR_NS + day_ns and day_of(each) * segments.HOUR_NS < end
                for begin, end in within
            )
        ]
        if table == STANDING:
            return {each.path: each for each in wanted}
        here: dict[tuple[int, int, int], SegmentFile] = {}
        for day in dict.fromkeys(map(day_of, wanted)):
            begin = day * segments.HOUR_NS
            here |= {(day, each.first, each.last): each for each in self._listing(table, begin, begin + day_ns)}
        bad = self._damaged_of([here[key] for each in wanted if (key := (each.hour, each.first, each.last)) in here])
        found = {each.path: here.get((each.hour, each.first, each.last)) for each in wanted}
        return {path: None if each is None or each.path in bad else each for path, each in found.items()}

    def blame(self, paths: Sequence[Path], e: Exception) -> bool:
        """Return whether a failed query of these segments should be tried again.

        That is so if a segment was merged or removed meanwhile, or if damaged segments are skipped from now on. Raises
        `StoreError` for damaged segments that are not to be skipped.
        """
        if not all(path.exists() for path in paths):
            self._list_again()
            return True
        found = {path: why for path in paths if (why := _damage(path))}
        if not found:
            return False
        self._refuse(found, e)
        return True

    def _refuse(self, found: dict[Path, str], cause: Exception | None) -> None:
        """Raise `StoreError` for damaged segments; with `skip_damaged` note them instead."""
        if not self.skip_damaged:
            path, why = next(iter(found.items()))
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            rows = sum(int(p.name.split(".")[1]) for p in found)
            raise StoreError(
                f"{path}: damaged: {why}{more}; skip damaged segments with --skip-damaged ({rows:,} rows), or remove"
                " the file"
            ) from cause
        self.damaged.update(found)


def _without_hours(relation: str, hours: set[int]) -> str:
    """Return SQL for the rows of a relation that begin in other hours than these."""
    told = ", ".join(map(str, sorted(hours)))
    return f"(FROM {relation} WHERE NOT list_contains([{told}], epoch_ns(time) // {segments.HOUR_NS}))"


def _used(sql: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return only the parameters that the statement names, because DuckDB refuses others."""
    return {name: value for name, value in values.items() if re.search(rf"\${name}\b", sql)}


@contextmanager
def connected(threads: int | None, memory_mib: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection to an in-memory database for the block, in UTC for any time zone of the machine.

    `memory_mib` limits its memory; the default is DuckDB's own limit, 80 % of the machine. Data beyond it goes to a
    private temporary directory of at most `SPILL_GIB`; by default DuckDB would fill the disk of the working directory.
    """
    with tempfile.TemporaryDirectory(prefix="mace-spill-") as spill:
        config: dict[str, str | bool | int | float | list[str]] = {
            "temp_directory": spill,
            "max_temp_directory_size": f"{SPILL_GIB}GiB",
        }
        if threads:
            config["threads"] = threads
        if memory_mib:
            config["memory_limit"] = f"{memory_mib}MiB"
        with duckdb.connect(config=config) as connection:
            # Days begin, and times are printed, in UTC.
            connection.execute("SET TimeZone = 'UTC'")
            # After two seconds DuckDB's progress bar would be drawn to standard output, into a table or JSON. Where
            # there is none (in Jupyter without widgets) setting it is an error.
            if connection.execute("SELECT current_setting('enable_progress_bar')").fetchall() != [(False,)]:
                connection.execute("SET enable_progress_bar = false")
            yield connection


def relation(
    connection: duckdb.DuckDBPyConnection, table: str, found: Sequence[SegmentFile], *, filename: bool = False
) -> str:
    """Return SQL for the rows of these segments, with all columns of the table, and `time` in nanoseconds.

    With `filename` each row has its segment's path.
    """
    if not found:
        return _nothing(connection, table)
    # Files of older versions lack newer columns, or have nanoseconds in `time`: DuckDB then reads all times as those.
    nothing = _nothing(connection, table, with_remainder=True)
    stored = f"FROM {_read(found, filename=filename)} UNION ALL BY NAME FROM {nothing}"
    time = f"make_timestamp_ns(epoch_ns(time) + coalesce({tables.REMAINDER}, 0))"
    return f"(SELECT * EXCLUDE ({tables.REMAINDER}) REPLACE ({time}::{_time_type(connection)} AS time) FROM ({stored}))"


def _read(found: Sequence[SegmentFile], *, filename: bool = False) -> str:
    """Return SQL for the rows of these segments as they are stored, with `filename` each with its segment's path."""
    quoted = ", ".join("'" + str(s.path).replace("'", "''") + "'" for s in found)
    named = ", filename=true" if filename else ""
    return f"read_parquet([{quoted}], union_by_name=true, hive_partitioning=false{named})"


def _seen_of(found: Sequence[SegmentFile], rows: Sequence[tuple[Any, ...]]) -> dict[Path, About]:
    """Return the rows of `_SEEN_SQL` by segment."""
    seen = {str(each.path): About(hours={each.hour}) for each in found}
    for path, host, run, width_s, container_id, container, utc_ns, pod_containers in rows:
        seen[path].add(host, run, int(width_s), container_id, container, utc_ns, pod_containers)
    return {Path(path): each for path, each in seen.items()}


def _whole_days(where: Filter) -> Filter:
    """Return a filter for all days of a filter's time."""
    day_ns = segments.DAY_HOURS * segments.HOUR_NS
    since = None if where.since_ns is None else where.since_ns // day_ns * day_ns
    until = None if where.until_ns is None else -(-where.until_ns // day_ns) * day_ns
    return Filter(since, until)


def _within(hour: int, where: Filter) -> bool:
    """Return whether an hour can have rows of a filter's time, as `storage.segments.listing` chooses hours."""
    begin = hour * segments.HOUR_NS
    after = where.since_ns is None or where.since_ns < begin + segments.HOUR_NS
    return after and (where.until_ns is None or begin < where.until_ns)


def _nothing(connection: duckdb.DuckDBPyConnection, table: str, *, with_remainder: bool = False) -> str:
    """Return SQL for no rows with all columns of the table; it has no name, so that no list of tables shows it."""
    types = {"time": _time_type(connection)} | ({tables.REMAINDER: "USMALLINT"} if with_remainder else {})
    types |= {each.name: _sql_type(each.type) for each in tables.SCHEMAS[table] if each.name != "time"}
    return f"(SELECT {', '.join(f'CAST(NULL AS {kind}) AS {name}' for name, kind in types.items())} WHERE false)"


def _time_type(connection: duckdb.DuckDBPyConnection) -> str:
    """Return DuckDB's type for times in nanoseconds: that with a time zone, if this DuckDB has it."""
    kind = "TIMESTAMPTZ_NS"
    try:
        connection.execute(f"SELECT NULL::{kind}").fetchall()
    except duckdb.Error:
        return "TIMESTAMP_NS"
    return kind


_SQL_TYPES: Final = {
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
    pa.uint8(): "UTINYINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.uint64(): "UBIGINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
}


def _sql_type(kind: pa.DataType) -> str:
    """Return DuckDB's name of a column's type. DuckDB itself would import pandas to tell it, 40 MiB."""
    if pa.types.is_dictionary(kind):
        return _sql_type(kind.value_type)
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{each.name} {_sql_type(each.type)}' for each in kind)})"
    return _SQL_TYPES[kind]


def _newest(found: Sequence[SegmentFile], rows: int) -> list[SegmentFile]:
    chosen: list[SegmentFile] = []
    for each in reversed(found):
        chosen.append(each)
        rows -= each.rows
        if rows <= 0:
            break
    return chosen


def _changed(path: Path) -> str:
    """Return how a segment differs from its checksum; "" if it does not, or cannot be opened (reading reports that)."""
    try:
        return checksum.mismatch(path)
    except OSError:
        return ""


def _damage(path: Path) -> str:
    """Read a whole segment; returns a description of its damage, "" if there is none or the segment is gone."""
    try:
        return checksum.damage(path)
    except FileNotFoundError:
        return ""


def _condition(
    where: Filter, runs: Sequence[Run], *, windows: bool = False, part: bool = False
) -> tuple[str, dict[str, Any]]:
    """Return SQL for a filter, and its parameters. Windows count only if they are wholly within the filter's time.

    `runs` are all runs that the filter admits, or with `part` those of them whose windows are wanted.
    """
    told: list[str] = []
    values: dict[str, Any] = {}
    if where.since_ns is not None:
        told.append("epoch_ns(time) >= $since")
        values["since"] = where.since_ns
    if where.until_ns is not None:
        end = "epoch_ns(time) + width_s::BIGINT * 1000000000 <= $until" if windows else "epoch_ns(time) < $until"
        told.append(end)
        values["until"] = where.until_ns
    if where.container is not None:
        values["container"] = where.container
        # Packet numbers are unique within a run only; with one run the shorter key is four times as fast.
        key, of_run = "(host, run, packet)", ""
        if len(runs) == 1:
            key, of_run = "packet", " AND host = $of_host AND run = $of_run"
            values |= {"of_host": runs[0].host, "of_run": runs[0].run}
        own = f"container = $container AND segment = 'overhead'{of_run}"
        of_packet = f"{key} IN (SELECT {key} FROM {{delays}} WHERE {own})"
        told.append("container = $container" if windows else of_packet)
    if where.device is not None:
        told.append("device = $device")
        values["device"] = where.device
    if where.direction is not None:
        told.append("direction = $direction")
        values["direction"] = where.direction.name.lower()
    if where.run is not None:
        told.append("run = $run")
        values["run"] = where.run
    if where.host is not None:
        told.append("host = $host")
        values["host"] = where.host
    if windows and part:
        told.append("list_contains($runs, host || '/' || run)")
        values["runs"] = [f"{r.host}/{r.run}" for r in runs]
    return " AND ".join(told) or "true", values


def _unended(
    where: Filter, runs: Sequence[Run], ends: dict[tuple[str, str], int]
) -> Iterator[tuple[Filter, list[Run]]]:
    """Yield runs without windows of their whole time, with a filter for what a filter admits after their `ends`.

    Such a run goes on, or was killed: then it has no rows long after its newest ledger. Runs of the same time are
    together.
    """
    rests = []
    for run in runs:
        begin = max(ends[run.host, run.run] or run.started_utc_ns - segments.HOUR_NS, where.since_ns or 0)
        end = min(run.upto_utc_ns + segments.HOUR_NS, _FOREVER if where.until_ns is None else where.until_ns)
        if begin < end and not (run.closed and ends[run.host, run.run]):
            rests.append((begin, end, run))
    rests.sort(key=lambda each: each[:2])
    while rests:
        begin, end, run = rests.pop(0)
        together = [run]
        while rests and rests[0][0] < end:
            _, other, run = rests.pop(0)
            end = max(end, other)
            together.append(run)
        yield replace(where, since_ns=begin, until_ns=end), together


def _span_ns(where: Filter, runs: Sequence[Run]) -> int:
    since, until = min(r.started_utc_ns for r in runs), max(r.upto_utc_ns for r in runs)
    if where.since_ns is not None:
        since = max(since, where.since_ns)
    if where.until_ns is not None:
        until = min(until, where.until_ns)
    return until - since


def _grouped_query(part: _Part, grouping: _Grouping) -> str:
    """Return SQL for a row per group and bin of rows of `delays`, sorted: the columns of `by`, bin, n, s, lo, hi.

    n are the delays in the bin; s, lo and hi are their sum and extremes.
    """
    by, coarse_bits = grouping.by, grouping.coarse_bits
    unknown = set(by) - {*GROUPED_BY, "stretch"}
    assert not unknown, unknown
    at = f", {_STRETCH_SQL} AS stretch" if "stretch" in by else ""
    keys = ", ".join(by)
    coarse = f"(({BIN_SQL} >> {coarse_bits} << {coarse_bits}) + {1 << coarse_bits >> 1})" if coarse_bits else BIN_SQL
    return f"""
        SELECT {keys}, {coarse} AS bin, count(*) AS n, sum(delay_ns) AS s, min(delay_ns) AS lo, max(delay_ns) AS hi
        FROM (SELECT *{at} FROM {part.rows_sql}) GROUP BY ALL ORDER BY {keys}, bin
        """


def _groups(
    cells: pa.Table, by: tuple[str, ...]
) -> Iterator[tuple[tuple[Any, ...], tuple[int, int, int, int, Ints, Ints]]]:
    """Yield (key, arguments of `Distribution.add`) of each group in the result of `_grouped_query`."""
    if not len(cells):
        return
    bins, counts, sums, low, high = (
        cells[name].cast(pa.int64()).to_numpy().astype(np.int64) for name in ("bin", "n", "s", "lo", "hi")
    )
    codes = [cells[name].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False) for name in by]
    begins = np.flatnonzero(np.r_[True, np.any([code[1:] != code[:-1] for code in codes], axis=0)])
    keys = zip(*(cells[name].take(begins).to_pylist() for name in by), strict=True)
    figures = (
        np.add.reduceat(counts, begins),
        np.add.reduceat(sums, begins),
        np.minimum.reduceat(low, begins),
        np.maximum.reduceat(high, begins),
    )
    edges = [*begins.tolist(), len(bins)]
    for i, (key, *numbers) in enumerate(zip(keys, *(each.tolist() for each in figures), strict=True)):
        piece = slice(edges[i], edges[i + 1])
        yield key, (*numbers, bins[piece], counts[piece])


def stage_counts(merged: Histograms) -> list[StageCount]:
    """Return what rows of `stages`, merged by `STAGE_GROUPS`, have counted, in path order."""
    found = []
    for key, durations in merged.distributions():
        netns, direction, measure, cpu_queued, cpu = key[8:]
        way = Direction[direction.upper()]
        found.append(StageCount(_place(key[:8]), netns, way, Measure[measure.upper()], cpu_queued, cpu, durations))
    found.sort(key=_along_the_path)
    return found


def _along_the_path(one: StageCount) -> tuple[Any, ...]:
    place, way = one.place, one.direction
    rank = -place.rank if way is Direction.INGRESS else place.rank
    whose = place.host, place.container, one.owner_netns, way.name
    return *whose, rank, place.netns, f"{place.netns_id}:{place.ifindex}", one.measure.name, one.cpu_queued, one.cpu


def _place(row: Sequence[Any]) -> DevicePlace:
    """Return the place in the columns of `_PLACE`."""
    host, rank, container, netns, device, device_id, kind, role = row
    inode, _, ifindex = device_id.partition(":")
    return DevicePlace(int(rank), container, netns, int(inode), device, int(ifindex), kind, role, host)


def _window_table(found: pa.Table) -> tuple[WindowTable, tuple[DevicePlace, ...]]:
    """Return the windows in these columns: `_PLACE`, container_id, direction, segment, start, figures, bins, counts."""
    listed = {name: found.column(name).to_pylist() for name in [*_PLACE.split(", "), "container_id"]}
    number: dict[tuple[Any, ...], int] = {}
    device = [number.setdefault(row, len(number)) for row in zip(*listed.values(), strict=True)]
    columns = {
        "start_utc_ns": found.column("start").to_pylist(),
        "width_s": np.ones(len(found), np.int64),
        "device": device,
        "direction": [Direction[name.upper()] for name in found.column("direction").to_pylist()],
        "segment": [Segment[name.upper()] for name in found.column("segment").to_pylist()],
    } | {name: found.column(name).to_numpy() for name in FIGURES}
    numbers = np.array([np.asarray(columns[name], np.int64) for name in NUMBERS], np.int64).reshape(len(NUMBERS), -1)
    bins, counts = found.column("bins").combine_chunks(), found.column("counts").combine_chunks()
    edges = np.append(0, np.cumsum(compute.list_value_length(bins).to_numpy(zero_copy_only=False))).astype(np.int64)
    flat = [compute.list_flatten(each).to_numpy(zero_copy_only=False).astype(np.int64) for each in (bins, counts)]
    places = tuple(replace(_place(row[:-1]), container_id=row[-1]) for row in number)
    return WindowTable(numbers, edges, *flat), places


def _packet_path(key: tuple[str, str, int], rows: Sequence[tuple[Any, ...]]) -> PacketPath:
    """Return the path in rows of one packet.

    Columns: `_PLACE`, run, packet, time, direction, segment, position, delay_ns, l3_len, grade, outcome.
    """
    host, run, packet = key
    start = min(r[10] for r in rows)
    hops: list[Hop] = []
    overhead: dict[Direction, int] = {}
    container = ""
    for r in rows:
        place, direction, segment = _place(r[:8]), Direction[r[11].upper()], Segment[r[12].upper()]
        container = container or place.container
        if segment is Segment.OVERHEAD:
            overhead[direction] = overhead.get(direction, 0) + r[14]
        else:
            hops.append(Hop(place, direction, segment, r[13], r[10] - start, r[14]))
    *_, l3_len, grade, outcome = rows[0]
    return PacketPath(host, run, packet, start, container, l3_len, grade, outcome, tuple(hops), overhead)
