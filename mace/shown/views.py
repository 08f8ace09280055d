"""The views of a store: the figures that the page in the browser, its report and their tests show.

A view is a table of columns, which a chart draws and which can be had as JSON, CSV and Parquet, and the ledger of the
runs that it covers. Every figure is read from merged histograms, as everywhere in MACE, so that a view shows the
numbers of `mace report --json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from contracts import cpu_figures
from contracts.errors import UsageError, nearest
from contracts.figures import COUNTS_AS, Distribution, FigureKey, Summary
from contracts.histogram import MAX_NS, SUB_BITS, lower_bounds, merge, middles, quantiles_of_each
from contracts.ledger import Ledger
from contracts.schema import Direction, Grades, Segment
from mace.shown.instants import instant_ns
from storage.query import ROUND_TRIP_FIGURES, Filter, From, OverTime, PacketPath, Run, StoreReader

MOST_POINTS: Final = 2_000
"""Most stretches of time in a view, more than a screen has columns."""
MOST_PACKETS: Final = 1_000
_HEAT_BITS: Final = 3
_COARSE_BITS: Final = SUB_BITS - _HEAT_BITS
"""Rows of the heat map per power of two, as a power of two: eight, merged from 16 bins each."""
_SPARK_POINTS: Final = 60
_FIGURES: Final = ("count", "min_ns", "mean_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns")
_PLACE: Final = ("host", "container", "netns", "netns_id", "device", "ifindex", "kind", "role", "direction", "segment")
_STAGE: Final = (
    *("host", "owner", "device", "direction", "cpu_queued", "cpu", "count", "moved"),
    *("run_p50_ns", "run_p99_ns", "wait_p50_ns", "wait_p99_ns"),
)
_NUMBERS: Final = re.compile(
    r"\w+_ns|count|cpu|cpu_queued|hop|position|netns_id|ifindex|l3_len|packets|rows_stored|records|matched|lost|discarded"
)
"""Columns of whole numbers; all others, unless `_KINDS` has them, are text."""
_KINDS: Final = {
    "packet": pa.uint64(),
    "mean_ns": pa.float64(),
    "rate_per_s": pa.float64(),
    "longer_share": pa.float64(),
    "moved": pa.bool_(),
    "waited": pa.bool_(),
    "closed": pa.bool_(),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a view is asked for; the fields are the parameters of its address."""

    since: str = ""
    """As `--since`, or UTC in ns."""
    until: str = ""
    last: str = ""
    """An age (`60s`): from so long before the newest data on. Excludes `since` and `until`."""
    host: str = ""
    container: str = ""
    device: str = ""
    direction: str = ""
    run: str = ""
    segment: str = ""
    """Name of a `Segment`; by default `overhead`, or with a device its crossings."""
    points: int = 240
    low_ns: int = 0
    high_ns: int = MAX_NS
    limit: int = 100
    figures: str = "auto"
    """`rows`, `windows` or `auto`: what the figures are computed from, as `--from`."""
    packet: int = 0
    near_ns: int = 0
    """UTC, ns: a time close to the packet, which makes it quicker to find."""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Asked:
        """Return what an address's parameters ask for. Raises `UsageError` for unknown names and wrong values."""
        kinds = {each.name: each.type for each in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in given.items():
            if name not in kinds:
                raise UsageError(f"no parameter {name!r}{nearest(name, kinds)}; there are {', '.join(kinds)}")
            values[name] = _whole(name, text) if kinds[name] == "int" else text
        asked = cls(**values)
        _within("points", asked.points, 1, MOST_POINTS)
        _within("limit", asked.limit, 1, MOST_PACKETS)
        asked.segments()
        if asked.direction and asked.direction.upper() not in Direction.__members__:
            raise UsageError(f"direction {asked.direction!r}: expected egress or ingress")
        if asked.figures not in get_args(From):
            raise UsageError(f"figures {asked.figures!r}: expected {', '.join(get_args(From))}")
        if asked.last and (asked.since or asked.until):
            raise UsageError("last excludes since and until")
        return asked

    def segments(self) -> tuple[Segment, ...]:
        """Return the segments asked for. Raises `UsageError` for a name that is none."""
        if not self.segment:
            return (Segment.DEVICE, Segment.OUTSIDE) if self.device else (Segment.OVERHEAD,)
        if self.segment.upper() not in Segment.__members__:
            raise UsageError(f"no segment {self.segment!r}; there are {', '.join(s.name.lower() for s in Segment)}")
        return (Segment[self.segment.upper()],)

    @property
    def source(self) -> From:
        """What the figures are computed from."""
        found: From = self.figures  # type: ignore[assignment] # `of` has checked the word
        return found

    @classmethod
    def like(cls, where: Filter, source: From = "auto") -> Asked:
        """Return what asks for a filter's rows."""
        return cls(
            since="" if where.since_ns is None else str(where.since_ns),
            until="" if where.until_ns is None else str(where.until_ns),
            host=where.host or "",
            container=where.container or "",
            device=where.device or "",
            direction=where.direction.name.lower() if where.direction is not None else "",
            run=where.run or "",
            figures=source,
        )

    def filter(self, newest_utc_ns: int) -> Filter:
        """Return the filter for the store; `newest_utc_ns` is the end of its data, from which `last` counts back."""
        since, until = _time(self.since), _time(self.until)
        if self.last:
            newest = datetime.fromtimestamp(newest_utc_ns / 1e9, UTC)
            if not re.fullmatch(r"\d+(\.\d+)?[smhdw]", self.last):
                raise UsageError(f"last {self.last!r}: expected an age like 60s, 5m, 2h, 1d")
            since = instant_ns(self.last, newest)
        return Filter(
            since,
            until,
            self.container or None,
            self.device or None,
            Direction[self.direction.upper()] if self.direction else None,
            self.run or None,
            self.host or None,
        )


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise UsageError(f"{name} {text!r}: expected a whole number")
    return int(text)


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} {value:,}: expected {low:,} to {high:,}")


def _time(text: str) -> int | None:
    if not text:
        return None
    if re.fullmatch(r"[0-9]{10,19}", text):
        return min(int(text), (1 << 63) - 1)
    return instant_ns(text, datetime.now(UTC))


@dataclass(slots=True)
class View:
    """A view's table and what belongs to it."""

    columns: dict[str, list[Any]]
    """Columns of equal length."""
    about: dict[str, Any] = field(default_factory=dict)
    """`ledger`, `packets`, `grades`, `losses` (sentences), `note`, `range` (UTC, ns, first and end of the runs), `live`
    (whether a run goes on), and more by view."""

    def as_dict(self) -> dict[str, Any]:
        """Return the view as values for JSON; numbers of packets are text, because JavaScript would round them."""
        columns = dict(self.columns)
        if "packet" in columns:
            columns["packet"] = [str(number) for number in columns["packet"]]
        return {"columns": columns, **self.about}

    def table(self) -> pa.Table:
        """Return the table as Arrow, with the same types whatever it holds."""
        return pa.table({name: pa.array(values, _kind(name)) for name, values in self.columns.items()})


def _kind(name: str) -> pa.DataType:
    return _KINDS.get(name, pa.int64() if _NUMBERS.fullmatch(name) else pa.string())


class Kind(NamedTuple):
    """A kind of view."""

    make: Callable[[StoreReader, Asked], View]
    meaning: str


def view(store: StoreReader, name: str, asked: Asked) -> View:
    """Return a view of a store. Raises `UsageError` for an unknown view and `StoreError`."""
    if name not in VIEWS:
        raise UsageError(f"no view {name!r}{nearest(name, VIEWS)}; there are {', '.join(VIEWS)}")
    return VIEWS[name].make(store, asked)


# What every view says ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Base:
    """The runs that a view covers, and its filter."""

    runs: list[Run]
    where: Filter

    def about(self, summary: Summary | None = None) -> dict[str, Any]:
        """Return what every view says about its figures."""
        if summary is None:
            summary = Summary(
                ledger=sum((r.ledger for r in self.runs), Ledger()),
                packets=sum(r.packets for r in self.runs),
                grades=sum((r.grades for r in self.runs), Grades()),
                several_devices=None,
                rows_not_stored=sum(r.rows_not_stored for r in self.runs),
                note="The ledger and the grades are of whole runs." if self.where.narrows else "",
            )
        return {
            "ledger": summary.ledger.as_dict(),
            "packets": summary.packets,
            "grades": summary.grades.as_dict(),
            "losses": summary.losses(),
            "note": summary.note,
            "on_host_network": summary.on_host_network,
            "range": [min(r.started_utc_ns for r in self.runs), max(r.upto_utc_ns for r in self.runs)]
            if self.runs
            else None,
            "live": any(not r.closed for r in self.runs),
            "hosts": sorted({r.host for r in self.runs}),
            "sources": sorted({r.source for r in self.runs}),
        }


def _base(store: StoreReader, asked: Asked) -> _Base:
    newest = 0
    if asked.last:
        newest = max((r.upto_utc_ns for r in store.runs()), default=0)
    where = asked.filter(newest)
    runs = store.runs(where)
    return _Base(runs, where)


def _noted(store: StoreReader, about: dict[str, Any]) -> dict[str, Any]:
    """Add what was found while the store was read."""
    if store.damaged:
        said = f"{len(store.damaged)} damaged segments ({store.rows_damaged():,} rows) were skipped."
        if said not in about["note"]:
            about["note"] = " ".join(filter(None, (about["note"], said)))
    return about


# Views ---------------------------------------------------------------------------------------------------


def overview(store: StoreReader, asked: Asked) -> View:
    """Return one row per container and direction with its overhead.

    `spark` has for each row a list of [stretch, p50, p99], of the stretches of time with packets. They are for drawing
    only: their quantiles are those of coarse bins, 6 % wide.
    """
    base = _base(store, asked)
    by = ("host", "container", "netns", "direction")
    over = store.over_time(
        base.where, by, points=_SPARK_POINTS, source=asked.source, coarse_bits=_COARSE_BITS, whole=True
    )
    columns: dict[str, list[Any]] = {name: [] for name in (*by, "rate_per_s", *_FIGURES)}
    spark = []
    filled = {at for stretches in over.groups.values() for at in stretches}
    seconds = (max(filled, default=0) - min(filled, default=0) + 1) * over.width_ns / 1e9
    for group, whole in over.whole.items():
        stretches = over.groups.get(group, {})
        values = dict(zip(by, group, strict=True))
        _append(columns, values | {"rate_per_s": round(whole.count / seconds, 1)} | whole.as_dict())
        spark.append(_spark(stretches))
    about = base.about()
    about["losses"] += store.unseen(base.where, asked.source)
    return View(columns, _noted(store, about) | {"spark": spark, "width_ns": over.width_ns})


def _spark(stretches: Mapping[int, Distribution]) -> list[list[int]]:
    """Return [stretch, p50, p99] of each stretch: `Distribution.quantiles` of all of them at once."""
    ats = sorted(stretches)
    if not ats:
        return []
    bins, counts = zip(*(stretches[at].histogram() for at in ats), strict=True)
    edges = np.append(0, np.cumsum([len(each) for each in bins]))
    found = quantiles_of_each(np.concatenate(bins), np.concatenate(counts), edges, (0.5, 0.99))
    found = found.clip([stretches[at].min_ns for at in ats], [stretches[at].max_ns for at in ats])
    points: list[list[int]] = np.stack([ats, *found], axis=1).tolist()
    return points


def devices(store: StoreReader, asked: Asked) -> View:
    """Return the rows of `mace report --json`: devices in the order of the path, delivery, overhead."""
    base = _base(store, asked)
    source, bound = _bounded(store, asked, base)
    summary = store.summary(base.where, source)
    summary.note = " ".join(filter(None, (summary.note, bound)))
    columns: dict[str, list[Any]] = {name: [] for name in (*_PLACE, "counts_as", *_FIGURES)}
    curves = []
    shown = summary.rows(Segment.DEVICE, Segment.OUTSIDE, Segment.DELIVERY, Segment.WAITING)
    for key, delays in (*shown, *summary.overhead()):
        _append(columns, _place(key) | delays.as_dict())
        curves.append(curve(delays))
    return View(columns, _noted(store, base.about(summary)) | {"curves": curves})


def distributions(store: StoreReader, asked: Asked) -> View:
    """Return for each row of `devices` which share of its packets took longer than a delay."""
    found = devices(store, asked)
    curves = found.about.pop("curves")
    named = ("host", "container", "netns", "device", "direction", "segment")
    columns: dict[str, list[Any]] = {name: [] for name in (*named, "delay_ns", "longer_share")}
    for row, points in enumerate(curves):
        for delay_ns, share in zip(*points, strict=True):
            _append(
                columns,
                {name: found.columns[name][row] for name in named} | {"delay_ns": delay_ns, "longer_share": share},
            )
    return View(columns, found.about)


def curve(delays: Distribution, most: int = 120) -> tuple[list[int], list[float]]:
    """Return delays, ns, ascending, and the share of packets that took longer than each; at most `most` points."""
    bins, counts = delays.histogram()
    if len(bins) > most:
        coarse, counts = merge(bins >> _COARSE_BITS, counts)
        bins = coarse << _COARSE_BITS
    longer = 1 - np.cumsum(counts) / max(int(counts.sum()), 1)
    at = middles(bins).clip(delays.min_ns, delays.max_ns)
    return at.tolist(), [round(share, 9) for share in longer.tolist()]


def path(store: StoreReader, asked: Asked) -> View:
    """Return the typical paths: the devices that packets cross, in order, with medians one after the other."""
    base = _base(store, asked)
    names = ("host", "container", "netns", "direction", "hop", "device", "of", "device_netns", "kind", "role")
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "segment", "counts_as", "start_ns", *_FIGURES)}
    for each in store.typical_paths(base.where):
        at = 0
        for hop, (place, segment, delays) in enumerate(each.hops):
            _append(
                columns,
                {
                    "host": each.host,
                    "container": each.container,
                    "netns": each.netns,
                    "direction": each.direction.name.lower(),
                    "hop": hop,
                    "device": place.device,
                    "of": place.container or place.netns,
                    "device_netns": place.netns,
                    "kind": place.kind,
                    "role": place.role,
                    "segment": segment.name.lower(),
                    "counts_as": COUNTS_AS[segment],
                    "start_ns": at,
                }
                | delays.as_dict(),
            )
            at += columns["p50_ns"][-1]
    return View(columns, _noted(store, base.about()))


def time(store: StoreReader, asked: Asked) -> View:
    """Return quantiles per stretch of time and direction."""
    base = _base(store, asked)
    over, note = _over_time(store, asked, base)
    columns: dict[str, list[Any]] = {name: [] for name in ("utc_ns", "direction", *_FIGURES)}
    for (direction,), stretches in over.groups.items():
        for at in sorted(stretches):
            start = over.first_utc_ns + at * over.width_ns
            _append(columns, {"utc_ns": start, "direction": direction} | stretches[at].as_dict())
    return View(columns, _noted(store, base.about() | {"note": note}) | {"width_ns": over.width_ns})


def heat(store: StoreReader, asked: Asked) -> View:
    """Return the merged histograms per stretch of time, with eight rows per power of two."""
    base = _base(store, asked)
    over, note = _over_time(store, asked, base)
    columns: dict[str, list[Any]] = {name: [] for name in ("utc_ns", "direction", "low_ns", "high_ns", "count")}
    for (direction,), stretches in over.groups.items():
        for at in sorted(stretches):
            low, high, counts = heat_rows(stretches[at])
            columns["utc_ns"] += [over.first_utc_ns + at * over.width_ns] * len(low)
            columns["direction"] += [direction] * len(low)
            columns["low_ns"] += low
            columns["high_ns"] += high
            columns["count"] += counts
    return View(columns, _noted(store, base.about() | {"note": note}) | {"width_ns": over.width_ns})


def heat_rows(delays: Distribution) -> tuple[list[int], list[int], list[int]]:
    """Return lower and upper bounds, ns, and counts of the heat map's rows that hold a distribution."""
    bins, counts = delays.histogram()
    rows, counts = merge(bins >> _COARSE_BITS, counts)
    low = lower_bounds(rows << _COARSE_BITS)
    high = lower_bounds((rows + 1) << _COARSE_BITS)
    return low.tolist(), high.tolist(), counts.tolist()


def _over_time(store: StoreReader, asked: Asked, base: _Base) -> tuple[OverTime, str]:
    """Return what both `time` and `heat` show, so that a reader that keeps results reads it once for a page; a note."""
    of = asked.segments()
    # Overhead is in the windows of its container, and all containers' packets in all windows: these equal the rows.
    equal = of == (Segment.OVERHEAD,) or base.where.container is None
    source, bound = (asked.source, "") if equal else _bounded(store, asked, base)
    over = store.over_time(base.where, ("direction",), segments=of, points=asked.points, source=source)
    return over, " ".join(filter(None, (base.about()["note"], bound)))


def _bounded(store: StoreReader, asked: Asked, base: _Base) -> tuple[From, str]:
    """Return what figures device by device are computed from, and a note if these are windows for too many rows."""
    if asked.source != "auto" or not store.too_many(base.where):
        return asked.source, ""
    note = f"This time has more than {store.most_rows:,} rows: the devices are from windows"
    if base.where.container is None:
        return "windows", f"{note}."
    return "windows", (
        f"{note}, which tell of the container's own devices alone. A shorter time has the host's devices too."
    )


def round_trips(store: StoreReader, asked: Asked) -> View:
    """Return quantiles of round trips per stretch of time: of the tool, of a host process, and from the outer device.

    `whole` has the same columns of all samples together, without a time, and `samples` the samples by reason.
    """
    base = _base(store, asked)
    over = store.round_trips(base.where, asked.points)
    named = ("tool", "destination", "figure")
    columns: dict[str, list[Any]] = {name: [] for name in ("utc_ns", *named, *_FIGURES)}
    whole: dict[str, list[Any]] = {name: [] for name in (*named, *_FIGURES)}
    order = {name: number for number, name in enumerate(ROUND_TRIP_FIGURES)}
    for group, stretches in sorted(over.groups.items(), key=lambda each: (*each[0][:2], order[each[0][2]])):
        values = dict(zip(named, group, strict=True))
        for at in sorted(stretches):
            start = over.first_utc_ns + at * over.width_ns
            _append(columns, values | {"utc_ns": start} | stretches[at].as_dict())
        _append(whole, values | sum(stretches.values(), Distribution()).as_dict())
    about = {"whole": whole, "samples": over.samples, "width_ns": over.width_ns}
    return View(columns, _noted(store, base.about()) | about)


def sources(store: StoreReader, asked: Asked) -> View:
    """Return the figures by the source that recorded the packets, to compare with a baseline."""
    base = _base(store, asked)
    by = ("host", "container", "device", "direction", "segment", "source")
    found = store.grouped(base.where, by, segments=asked.segments(), source=asked.source)
    columns: dict[str, list[Any]] = {name: [] for name in (*by, *_FIGURES)}
    for group, delays in found.items():
        _append(columns, dict(zip(by, group, strict=True)) | delays.as_dict())
    return View(columns, _noted(store, base.about()))


def cpus(store: StoreReader, asked: Asked) -> View:
    """Return which CPU ran which part of the packets' paths, as `mace report --cpus`: a row per stage and CPUs.

    `sentences` has the finding for each container and direction. Without `--cpus` a store has no rows here.
    """
    base = _base(store, asked)
    found = cpu_figures.report(store.stages(base.where), (), (), {})
    columns: dict[str, list[Any]] = {name: [] for name in _STAGE}
    for one in found.stages:
        told = cpu_figures.stage_dict(one)
        for what in ("run", "wait"):
            for figure in ("p50_ns", "p99_ns"):
                told[f"{what}_{figure}"] = told[what] and told[what][figure]
        _append(columns, told | {"count": told["packets"]})
    return View(columns, _noted(store, base.about()) | {"sentences": [one.sentence() for one in found.containers]})


def runs(store: StoreReader, asked: Asked) -> View:
    """Return the runs, oldest first."""
    base = _base(store, asked)
    names = ("run", "host", "source", "kernel", "started_utc_ns", "upto_utc_ns", "packets", "rows_stored", "closed")
    columns: dict[str, list[Any]] = {name: [getattr(r, name) for r in base.runs] for name in names}
    for name in ("records", "matched", "lost", "discarded"):
        columns[name] = [getattr(r.ledger, name) for r in base.runs]
    return View(columns, base.about())


def packets(store: StoreReader, asked: Asked) -> View:
    """Return the slowest packets of a region of time and delay; `found` says how many packets the region has."""
    base = _base(store, asked)
    segments = asked.segments()
    found, listed = store.packets(
        base.where, low_ns=asked.low_ns, high_ns=asked.high_ns, segment=segments[0], limit=asked.limit
    )
    names = ("packet", "run", "host", "utc_ns", "container", "device", "direction", "delay_ns", "l3_len")
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in listed] for name in (*names, "grade", "outcome", "waited")
    }
    columns["time"] = [iso(row.utc_ns) for row in listed]
    about = base.about()
    if store.too_many(base.where):
        about["note"] = f"{about['note']} The packets are of the newest {store.most_rows:,} rows of this time.".strip()
    return View(columns, _noted(store, about) | {"found": found})


def packet(store: StoreReader, asked: Asked) -> View:
    """Return one packet hop by hop; `packet` has what belongs to the whole packet."""
    base = _base(store, replace(asked, since="", until="", last="", container="", device="", direction=""))
    paths = store.packet(asked.packet, base.where, asked.near_ns or None)
    if not paths:
        raise UsageError(f"the store has no rows of a packet {asked.packet}")
    found = packet_view(paths[0])
    found.about |= _noted(store, base.about())
    return found


def packet_view(found: PacketPath) -> View:
    """Return the view of one packet, without its ledger."""
    whole = path_dict(found)
    hops = whole.pop("hops")
    names = ("device", "netns", "container", "kind", "direction", "segment", "position", "start_ns", "delay_ns")
    columns: dict[str, list[Any]] = {name: [hop[name] for hop in hops] for name in names}
    columns["counts_as"] = [COUNTS_AS[Segment[name.upper()]] for name in columns["segment"]]
    whole |= {"packet": str(whole["packet"]), "time": iso(whole["utc_ns"])}
    return View(columns, {"packet": whole})


VIEWS: Final[dict[str, Kind]] = {
    "overview": Kind(overview, "overhead of every container"),
    "devices": Kind(devices, "delays device by device, as `mace report --json`"),
    "distributions": Kind(distributions, "share of packets that took longer than a delay, device by device"),
    "path": Kind(path, "typical path of each container's packets"),
    "time": Kind(time, "quantiles over time"),
    "heat": Kind(heat, "histograms over time"),
    "round_trips": Kind(round_trips, "round trips of tools, of a host process and of the outer device, over time"),
    "sources": Kind(sources, "figures by source"),
    "cpus": Kind(cpus, "which CPU ran which part of the packets' paths, with `--cpus`"),
    "runs": Kind(runs, "capture runs"),
    "packets": Kind(packets, "slowest packets of a region of time and delay"),
    "packet": Kind(packet, "one packet, hop by hop"),
}
"""Views by the name in their address."""


def _append(columns: dict[str, list[Any]], values: Mapping[str, Any]) -> None:
    for name, column in columns.items():
        column.append(values[name])


def _place(key: FigureKey) -> dict[str, Any]:
    place, direction, segment = key
    found = {name: getattr(place, name) for name in _PLACE[:-2]}
    return found | {
        "direction": direction.name.lower(),
        "segment": segment.name.lower(),
        "counts_as": COUNTS_AS[segment],
    }


def iso(utc_ns: int) -> str:
    """Return a time as ISO 8601 with nanoseconds, UTC."""
    return f"{datetime.fromtimestamp(utc_ns // 1_000_000_000, UTC):%Y-%m-%dT%H:%M:%S}.{utc_ns % 1_000_000_000:09d}Z"


def path_dict(path: PacketPath) -> dict[str, Any]:
    """Return a packet's path as values for JSON: the object of `packet_paths` (`report`)."""
    return {
        "host": path.host,
        "run": path.run,
        "packet": path.packet,
        "utc_ns": path.utc_ns,
        "container": path.container,
        "l3_len": path.l3_len,
        "grade": path.grade,
        "outcome": path.outcome,
        "overhead_ns": {d.name.lower(): ns for d, ns in path.overhead_ns.items()},
        "hops": [
            {
                "device": h.place.device,
                "netns": h.place.netns,
                "container": h.place.container,
                "kind": h.place.kind,
                "direction": h.direction.name.lower(),
                "segment": h.segment.name.lower(),
                "position": h.position,
                "start_ns": h.start_ns,
                "delay_ns": h.delay_ns,
            }
            for h in path.hops
        ],
    }
