"""The last minute of a stream, for live views: figures of containers and of devices over its last seconds.

    results ──► Recent ──► Moment ──► containers(), paths(): figures over 1, 10 or 60 s, and p99 second by second

The one that measures adds windows to a `Recent`; a view takes a `Moment`, which never changes, and computes from it
what it shows. Adding therefore costs a few slices, however many rows a view has, and a view can be frozen. Quantiles
are those of `contracts.histogram`, over merged histograms, as in `contracts.figures`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np

from contracts.arrays import Ints
from contracts.figures import DevicePlace, Names, path_order, ranks
from contracts.histogram import BINS, middles
from contracts.results import Results
from contracts.schema import Direction, Segment
from contracts.topology import Device
from contracts.windowtable import WindowTable

SECONDS: Final = 60
"""Seconds that a `Recent` keeps."""
MOST_CELLS: Final = 1 << 22
"""Most histogram cells that a `Recent` keeps, 64 MiB. Fifty busy containers have half as many in a minute."""
_NS: Final = 1_000_000_000
_GROUPS: Final = 512
"""Number of rows whose histograms are merged at once: with a thousand different bins, 4 MiB."""
_UNKNOWN_P99: Final = -1
_LEFT_OUT: Final = -1
_WAYS: Final = (*Direction, Direction.UNKNOWN)
"""Directions by the two bits that a code has for them."""


class Owner(NamedTuple):
    """A container; or a network namespace, if it has packets and no container's name."""

    host: str
    name: str
    """The container's newest name, or the namespace's."""
    container_id: str = ""
    """As in `Device`; `""` if it is not known."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Delays of one row over a number of seconds."""

    count: int
    per_second: float
    p50_ns: int
    p99_ns: int
    max_ns: int
    p99s_ns: tuple[int, ...]
    """p99 of each of the last `SECONDS` seconds, oldest first; -1 for a second without delays. With several devices in
    one row, the largest of the devices' values."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a view: a container in one direction, or a device in the path of its packets."""

    owner: Owner
    direction: Direction
    segment: Segment
    """`OVERHEAD` for a container."""
    place: DevicePlace | None
    """The device; None for a container."""
    figures: Figures

    @property
    def key(self) -> tuple[Owner, Direction, Segment, DevicePlace | None]:
        """What stays equal while the figures change."""
        return self.owner, self.direction, self.segment, self.place


@dataclass(frozen=True, slots=True)
class Second:
    """Windows of one second; a second may have several of these."""

    start_utc_ns: int
    whole: WindowTable
    """Windows of the segment `OVERHEAD`."""
    parts: WindowTable
    """Windows of the other segments."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The seconds before a time, as a view shows them."""

    seconds: tuple[Second, ...]
    """Ascending. Columns `device` are indices of `places`."""
    places: tuple[DevicePlace, ...]
    """Under the containers' newest names, with their ids."""
    since_utc_ns: int
    """Earlier seconds are not kept, or were not observed."""
    until_utc_ns: int
    """End of the last second whose windows are final."""

    def covered_s(self, window_s: int) -> int:
        """Return how many of the last `window_s` seconds are known; at least 1."""
        return max(min(window_s, (self.until_utc_ns - self.since_utc_ns) // _NS), 1)


NOTHING: Final = Moment((), (), 0, 0)
"""The moment before the first results."""


@dataclass(slots=True)
class Recent:
    """Collects the windows of one run's last minute. Not thread-safe; the moments that it returns are."""

    _seconds: deque[Second] = field(default_factory=deque)
    _cells: int = 0
    _devices: tuple[Device, ...] = ()
    _places: list[DevicePlace] = field(default_factory=list)
    _present: tuple[Device, ...] | None = None
    _names: Names = field(default_factory=Names)
    _since_ns: int = 0
    _until_ns: int = 0
    _moment: Moment | None = None

    def add(self, results: Results) -> None:
        """Add the correlator's next results."""
        totals, devices = results.totals, results.rows.devices
        self._name(devices, totals.present, totals.upto_utc_ns)
        windows = results.rows.windows
        if len(windows):
            windows = windows[windows.column("width_s") == 1]
        starts = windows.column("start_utc_ns")
        if not self._until_ns:
            self._since_ns = self._until_ns = int(starts[0]) if len(starts) else _second(totals.upto_utc_ns)
        if len(windows):
            self._moment = None
        for start in np.unique(starts).tolist():
            self._append(start, windows[starts == start])
        self.advance(totals.settled_utc_ns)

    def advance(self, utc_ns: int) -> None:
        """State that all windows that end before a time have been added; a quiet stream has none to say so."""
        until_ns = _second(utc_ns)
        if until_ns <= self._until_ns or not self._until_ns:
            return
        self._until_ns = until_ns
        self._moment = None
        while self._seconds and (self._seconds[0].start_utc_ns < until_ns - SECONDS * _NS or self._cells > MOST_CELLS):
            self._forget()
        self._since_ns = max(self._since_ns, until_ns - SECONDS * _NS)

    def moment(self) -> Moment:
        """Return the minute as it is now."""
        if self._moment is None:
            places = tuple(_under(self._names, place) for place in self._places)
            self._moment = Moment(tuple(self._seconds), places, self._since_ns, self._until_ns)
        return self._moment

    def _append(self, start_ns: int, windows: WindowTable) -> None:
        whole = windows.column("segment") == Segment.OVERHEAD
        self._seconds.append(Second(start_ns, windows[whole], windows[~whole]))
        self._cells += len(windows.bins)
        if len(self._seconds) > 1 and start_ns < self._seconds[-2].start_utc_ns:
            self._seconds = deque(sorted(self._seconds, key=lambda each: each.start_utc_ns))

    def _forget(self) -> None:
        gone = self._seconds.popleft()
        self._cells -= len(gone.whole.bins) + len(gone.parts.bins)
        self._since_ns = max(self._since_ns, gone.start_utc_ns + _NS)

    def _name(self, devices: tuple[Device, ...], present: tuple[Device, ...] | None, utc_ns: int) -> None:
        if devices is not self._devices and devices != self._devices:
            for device in devices[len(self._devices) :]:
                self._names.note(device.container_id, device.container, utc_ns)
            self._devices = devices
            self._places = [DevicePlace.of(d, r) for d, r in zip(devices, ranks(devices), strict=True)]
            self._moment = None
        if present is not None and present is not self._present:
            self._present = present
            for device in present:
                self._names.note(device.container_id, device.container, utc_ns)
            self._moment = None


def moment_of(windows: WindowTable, places: Sequence[DevicePlace], since_utc_ns: int, until_utc_ns: int) -> Moment:
    """Return the moment of stored windows: those of 1 s that lie between two times, both multiples of a second."""
    starts = windows.column("start_utc_ns")
    inside = (windows.column("width_s") == 1) & (starts >= since_utc_ns) & (starts < until_utc_ns)
    windows, starts = windows[inside], starts[inside]
    whole = windows.column("segment") == Segment.OVERHEAD
    seconds = tuple(
        Second(start, windows[(starts == start) & whole], windows[(starts == start) & ~whole])
        for start in np.unique(starts).tolist()
    )
    return Moment(seconds, tuple(places), since_utc_ns, until_utc_ns)


def containers(moment: Moment, window_s: int) -> list[Row]:
    """Return the overhead of each container and direction over the last `window_s` seconds, in order of their names.

    A container whose packets crossed devices in the last minute has a row, also without an overhead: of macvlan, for
    instance, ingress is not seen as a whole. `window_s` is at most `SECONDS`.
    """
    owners = _owners(moment.places)
    known = sorted(set(owners))
    number = {owner: n for n, owner in enumerate(known)}
    of_place = np.array([number[owner] for owner in owners], np.int64)
    seen = np.zeros(len(known) << 2, np.bool_)
    tables: list[tuple[int, WindowTable, Ints]] = []
    for second in moment.seconds:
        codes, others = (
            of_place[table.column("device")] << 2 | table.column("direction") for table in (second.whole, second.parts)
        )
        seen[codes] = seen[others] = True
        tables.append((second.start_utc_ns, second.whole, codes))
    keys = sorted(np.flatnonzero(seen).tolist(), key=lambda key: (key >> 2, key & 3 == Direction.UNKNOWN, key & 3))
    return [
        Row(known[key >> 2], Direction(key & 3), Segment.OVERHEAD, None, figures)
        for key, figures in zip(keys, _figures(moment, window_s, tables, keys), strict=True)
    ]


def paths(
    moment: Moment, window_s: int, wanted: Collection[tuple[Owner, Direction]]
) -> dict[tuple[Owner, Direction], list[Row]]:
    """Return the devices that packets crossed in the last minute, in path order, by container and direction."""
    if not wanted:
        return {}
    # The rows of a renamed container, and those from before its id was known, are rows of one device.
    named = [
        (owner, replace(place, container=owner.name, container_id=""))
        for owner, place in zip(_owners(moment.places), moment.places, strict=True)
    ]
    shown = list(dict.fromkeys(named))
    number = {place: n for n, place in enumerate(shown)}
    of_place = np.array([number[place] for place in named], np.int64)
    chosen = np.array([[(owner, way) in wanted for way in _WAYS] for owner, _ in shown], np.bool_).reshape(-1)
    seen = np.zeros(len(shown) << 5, np.bool_)
    tables: list[tuple[int, WindowTable, Ints]] = []
    for second in moment.seconds:
        codes = of_place[second.parts.column("device")] << 2 | second.parts.column("direction")
        inside = chosen[codes]
        codes = codes << 3 | second.parts.column("segment")
        seen[codes[inside]] = True
        tables.append((second.start_utc_ns, second.parts, np.where(inside, codes, _LEFT_OUT)))
    keys = np.flatnonzero(seen).tolist()
    found: dict[tuple[Owner, Direction], list[Row]] = {}
    for key, figures in zip(keys, _figures(moment, window_s, tables, keys), strict=True):
        (owner, place), direction = shown[key >> 5], _WAYS[key >> 3 & 3]
        row = Row(owner, direction, Segment(key & 7), place, figures)
        found.setdefault((owner, direction), []).append(row)
    for rows in found.values():
        rows.sort(key=_path_order)
    return found


def _path_order(row: Row) -> tuple[Any, ...]:
    assert row.place is not None, "a row of a device"
    return path_order((row.place, row.direction, row.segment))


def _figures(
    moment: Moment, window_s: int, tables: Iterable[tuple[int, WindowTable, Ints]], keys: Sequence[int]
) -> list[Figures]:
    """Return the figures of each key.

    Each table has the start of its second, and the key of each window, which is `_LEFT_OUT` for a window of none.
    """
    groups = len(keys)
    of_key = np.zeros(max(keys, default=0) + 1, np.int64)
    of_key[list(keys)] = np.arange(groups)
    p99s = np.full((groups, SECONDS), _UNKNOWN_P99, np.int64)
    first_ns = moment.until_utc_ns - SECONDS * _NS
    chosen: list[WindowTable] = []
    of_window: list[Ints] = []
    for start, table, codes in tables:
        column = (start - first_ns) // _NS
        if not 0 <= column < SECONDS or not len(table):
            continue
        inside = codes != _LEFT_OUT
        group = of_key[codes[inside]]
        np.maximum.at(p99s[:, column], group, table.column("p99_ns")[inside])
        if column >= SECONDS - window_s:
            chosen.append(table if inside.all() else table[inside])
            of_window.append(group)
    whole = WindowTable.concatenate(chosen)
    group = np.concatenate([np.zeros(0, np.int64), *of_window])
    count = np.bincount(group, weights=whole.column("count"), minlength=groups)
    low = np.full(groups, np.iinfo(np.int64).max)
    high = np.zeros(groups, np.int64)
    np.minimum.at(low, group, whole.column("min_ns"))
    np.maximum.at(high, group, whole.column("max_ns"))
    p50, p99 = _quantiles(whole, group, groups)
    covered_s = moment.covered_s(window_s)
    return [
        Figures(
            int(count[n]),
            float(count[n]) / covered_s,
            min(max(int(p50[n]), int(low[n])), int(high[n])),
            min(max(int(p99[n]), int(low[n])), int(high[n])),
            int(high[n]),
            tuple(p99s[n].tolist()),
        )
        for n in range(groups)
    ]


def _quantiles(windows: WindowTable, group: Ints, groups: int) -> tuple[Ints, Ints]:
    """Return the middles of the bins of p50 and p99 of each group, as `contracts.histogram.quantiles` defines them."""
    p50, p99 = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    if not len(windows):
        return p50, p99
    used = np.flatnonzero(np.bincount(windows.bins, minlength=BINS))
    narrow = np.zeros(BINS, np.int64)
    narrow[used] = np.arange(len(used))
    of_cell = np.repeat(group, np.diff(windows.edges))
    column = narrow[windows.bins]
    for begin in range(0, groups, _GROUPS):
        rows = min(_GROUPS, groups - begin)
        here = slice(None) if groups <= _GROUPS else (of_cell >= begin) & (of_cell < begin + rows)
        cells = (of_cell[here] - begin) * len(used) + column[here]
        counts = np.bincount(cells, weights=windows.counts[here], minlength=rows * len(used))
        totals = np.cumsum(counts.reshape(rows, len(used)), axis=1)
        for found, q in ((p50, 0.5), (p99, 0.99)):
            wanted = np.maximum(np.ceil(q * totals[:, -1]), 1)
            at = np.minimum((totals < wanted[:, None]).sum(axis=1), len(used) - 1)
            found[begin : begin + rows] = middles(used[at])
    return p50, p99


def _owners(places: Sequence[DevicePlace]) -> list[Owner]:
    """Return the owner of each place.

    A place from before a container's id was known belongs to the container of that name, if there is but one.
    """
    ids: dict[tuple[str, str], set[str]] = {}
    for place in places:
        if place.container_id:
            ids.setdefault((place.host, place.container), set()).add(place.container_id)
    found = []
    for place in places:
        name = place.container or place.netns or f"namespace {place.netns_id}"
        known = ids.get((place.host, place.container), set())
        container_id = place.container_id or (next(iter(known)) if len(known) == 1 else "")
        found.append(Owner(place.host, name, container_id if place.container else ""))
    return found


def _under(names: Names, place: DevicePlace) -> DevicePlace:
    """Return the place under its container's newest name, with the container's id."""
    if not place.container_id:
        return place
    shown = names.shown(place)
    return place if shown.container == place.container else replace(place, container=shown.container)


def _second(utc_ns: int) -> int:
    return utc_ns - utc_ns % _NS
