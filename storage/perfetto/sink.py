"""Writes Perfetto traces: packets as a timeline, for ui.perfetto.dev and for SQL in its trace processor.

    host
    ├── container c1
    │   ├── whole path      the container's overhead on a packet: one slice each
    │   ├── eth0            one slice for each crossing of the device
    │   └── delays          quantiles of windows of 1 s, a counter each
    ├── vethc1, br0, out0   devices of the host, in the order of the path out
    ├── remote: rem0        beyond the outer device
    ├── lost records        times in which the ring has lost records
    ├── ledger              counters of the ledger's categories
    └── records, CPU 0      every record

A flow joins the slices of one packet, and those of its reply if the caller knows the reply. The file is written as rows
arrive; only a few numbers per track are kept in memory. docs/design/018-perfetto.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Ints
from contracts.figures import COUNTS_AS, ranks
from contracts.hooks import BY_HOOK, Hook
from contracts.interfaces import StreamHeader
from contracts.ledger import Ledger
from contracts.records import Batch, Flag
from contracts.schema import Delays, Direction, Grade, Outcome, Segment, Window
from contracts.topology import Device, Role, Sighting
from storage.perfetto import events as perfetto_events
from storage.perfetto.file import UNIT_COUNT, UNIT_NS, PerfettoTrace
from storage.perfetto.lanes import Lanes

_ROWS: Final = 4096
"""Number of slices encoded at once: less than a megabyte, which stays in the CPU's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class HopFacts:
    """Further columns of hops, as arrays as long as the rows."""

    flow: U64
    """Arrows join the hops with the same flow, in time order."""
    request: U64
    """The packet that the hop's packet replies to; 0 if none is known."""
    told_by: npt.NDArray[np.int64]
    """Index into `TOLD_BY`: the evidence for the reply."""
    drop_reason: npt.NDArray[np.int64]
    """The kernel's drop reason; 0 if the packet was not dropped."""


TOLD_BY: Final = ("", "echo", "ports", "turns")
"""Evidence for a reply: echo identifier and number; ports, in alternation; lengths only, in alternation."""


@dataclass(slots=True)
class _DeviceTracks:
    """The numbers that are written for one entry of `Rows.devices`."""

    group: int
    """Group of lanes of the device; the whole path's group is the next number."""
    container: int
    """Number of the container's name as an argument."""
    names: tuple[int, ...]
    """Numbers of the slices' names by direction, followed by those of the whole path."""


class HostTracks:
    """Writes the tracks of one stream. Rows may arrive in any order; device numbers are indices of `devices`."""

    def __init__(self, trace: PerfettoTrace, header: StreamHeader) -> None:
        self._trace = trace
        self._key = f"{header.boot_id}/{header.host}/{header.run}"
        self.offset_ns = header.clock.offset_ns
        self._root = trace.track(self._key, f"host {header.host}", rank=trace.add_host(header))
        self._devices: tuple[Device, ...] = ()
        self._entries: list[_DeviceTracks] = []
        self._tracks: dict[str, int] = {}
        self._groups: dict[tuple[int, int, bool], int] = {}
        self._lane_of: list[tuple[str, str, int, int]] = []
        """By group, key, name, parent and rank of the lanes' tracks."""
        self._lanes = Lanes()
        self._uuids: list[list[int]] = []
        """By group, the uuids of the lanes."""
        self._windows: dict[tuple[int, int, int], tuple[int, tuple[int, ...]]] = {}
        self._ledger: dict[str, int] = {}
        self._lost: list[tuple[int, int]] = []
        self._categories = {
            name: trace.category(name) for name in ("device", "outside", "delivery", "overhead", "record", "lost")
        }
        self._directions = [trace.text(d.name.lower()) for d in Direction]
        self._grades = np.array([trace.text(g.name.lower()) for g in Grade])
        self._outcomes = np.array([trace.text(o.name.lower()) for o in Outcome])
        self._told_by = np.array([trace.text(text) for text in TOLD_BY])
        self._counts_as = np.zeros(len(Segment) + 1, np.int64)
        self._segment_category = np.zeros(len(Segment) + 1, np.int64)
        for segment in (each for each in Segment if each is not Segment.WAITING):
            self._counts_as[segment] = trace.text(COUNTS_AS[segment])
            self._segment_category[segment] = self._categories[segment.name.lower()]

    def devices(self, devices: Sequence[Device], ranked: Sequence[int] | None = None) -> None:
        """Set the devices that later rows refer to. As in `Rows`, devices are only ever appended.

        `ranked` are their places on the way out, where `contracts.figures.ranks` cannot tell them: a store keeps them.
        """
        if len(devices) > len(self._entries):
            self._devices = tuple(devices)
            known = len(self._entries)
            for device, rank in list(zip(devices, ranked or ranks(devices), strict=True))[known:]:
                self._entries.append(self._entry(device, rank))

    def hops(self, rows: Delays, told: HopFacts) -> None:
        """Write a slice for each row. Rows must be in time order, and at equal times in path order."""
        slices = rows.segment != Segment.WAITING  # it is within the slice of the delivery
        if not slices.all():
            rows, told = rows[slices], HopFacts(*(getattr(told, f.name)[slices] for f in fields(HopFacts)))
        if not len(rows):
            return
        groups = np.array([entry.group for entry in self._entries], np.int64)
        containers = np.array([entry.container for entry in self._entries], np.int64)
        names = np.array([entry.names for entry in self._entries], np.int64)
        whole = (rows.segment == Segment.OVERHEAD).astype(np.int64)
        group = groups[rows.device] + whole
        end = rows.utc_ns + rows.delay_ns
        track = self._track_of(group, self._lanes.place(group, rows.utc_ns, end))
        columns: dict[str, npt.NDArray[Any]] = {
            "begin": rows.utc_ns,
            "end": end,
            "track": track,
            "category": self._segment_category[rows.segment],
            "name": names[rows.device, rows.direction + len(Direction) * whole],
            "flow": told.flow,
            "packet": rows.packet,
            "delay_ns": rows.delay_ns,
            "direction": np.array(self._directions)[rows.direction],
            "container": containers[rows.device],
            "counts_as": self._counts_as[rows.segment],
            "hop": rows.position,
            "grade": self._grades[rows.grade],
            "l3_len": rows.l3_len,
            "outcome": self._outcomes[rows.outcome],
            "drop_reason": told.drop_reason,
            "request": told.request,
            "told_by": self._told_by[told.told_by],
        }
        variant = (told.drop_reason > 0) + 2 * (told.told_by > 0) + 4 * whole
        self._trace.slices += len(rows)
        for start in range(0, len(rows), _ROWS):
            piece = slice(start, start + _ROWS)
            self._trace.put(
                perfetto_events.slices(variant[piece], {name: column[piece] for name, column in columns.items()})
            )

    def records(self, batch: Batch, packet: U64, sightings: Sequence[Sighting]) -> None:
        """Write an instant for each record; `packet` is the record's packet, 0 if that is not known."""
        if not len(batch):
            return
        present = np.unique(batch.cpu).tolist()
        tracks = np.zeros(max(present) + 1, np.int64)
        for cpu in present:
            tracks[cpu] = self._named(f"records/{cpu}", f"CPU {cpu}", self._folder("records", 900), cpu)
        names = np.zeros(256, np.int64)
        for hook in np.unique(batch.hook).tolist():
            names[hook] = self._trace.name("lost" if hook == Hook.LOST else BY_HOOK[Hook(hook)].name)
        texts = np.zeros(int(batch.dev.max()) + 1, np.int64)
        for code in np.unique(batch.dev).tolist():
            texts[code] = self._trace.text(_sighted(sightings[code], self._devices))
        columns: dict[str, npt.NDArray[Any]] = {
            "begin": batch.ts_ns + self.offset_ns,
            "track": tracks[batch.cpu],
            "category": np.full(len(batch), self._categories["record"]),
            "name": names[batch.hook],
            "device": texts[batch.dev],
            "skb_id": batch.skb_id,
            "l3_len": batch.l3_len,
            "packet": packet,
            "drop_reason": batch.drop_reason,
        }
        variant = (packet > 0).astype(np.int64) + 4 * (batch.drop_reason > 0)
        if batch.content is not None:
            variant += 2 * ((batch.content.flags & Flag.FLOW) > 0)
            for name in ("l4_proto", "l4_src", "l4_dst", "l4_seq"):
                columns[name] = getattr(batch.content, name)
        for start in range(0, len(batch), _ROWS):
            piece = slice(start, start + _ROWS)
            self._trace.put(
                perfetto_events.instants(variant[piece], {name: column[piece] for name, column in columns.items()})
            )
        self._trace.instants += len(batch)

    def windows(self, windows: Iterable[Window]) -> None:
        """Write quantiles and numbers of packets of windows of 1 s, and 0 where there is no window."""
        points: list[tuple[int, int, int]] = []
        for window in windows:
            if window.width_s != 1:
                continue
            key = (window.device, int(window.direction), int(window.segment))
            until, tracks = self._windows.get(key) or (window.start_utc_ns, self._counters(*key))
            if until < window.start_utc_ns:
                points += [(until, track, 0) for track in tracks]
            values = (window.p50_ns, window.p99_ns, window.count)
            points += [(window.start_utc_ns, track, value) for track, value in zip(tracks, values, strict=True)]
            self._windows[key] = (window.start_utc_ns + window.width_s * 1_000_000_000, tracks)
        self._points(points)

    def ledger(self, upto_utc_ns: int, ledger: Ledger) -> None:
        """Write the ledger's counts that have changed, at a time."""
        points = []
        for rank, (name, count) in enumerate(ledger.as_dict().items()):
            if self._ledger.get(name) != count:
                self._ledger[name] = count
                folder = self._folder("ledger", 800)
                points.append(
                    (
                        upto_utc_ns,
                        self._named(f"ledger/{name}", name.replace("_", " "), folder, rank, UNIT_COUNT),
                        count,
                    )
                )
        self._points(points)

    def gaps(self, gaps_utc_ns: Sequence[tuple[int, int]]) -> None:
        """Write the times in which a ring has lost records."""
        if not gaps_utc_ns:
            return
        group = self._group((0, 0, False), "lost records", self._root, 700)
        begin, end = (np.array(times, np.int64) for times in zip(*sorted(gaps_utc_ns), strict=True))
        end = np.maximum(begin, end)
        groups = np.full(len(begin), group)
        columns: dict[str, npt.NDArray[Any]] = {
            "begin": begin,
            "end": end,
            "track": self._track_of(groups, self._lanes.place(groups, begin, end)),
            "category": np.full(len(begin), self._categories["lost"]),
            "name": np.full(len(begin), self._trace.name("records lost")),
        }
        self._trace.put(perfetto_events.plain(columns))

    def finish(self) -> None:
        """Reset the counters to 0 after the last windows."""
        self._points([(until, track, 0) for until, tracks in self._windows.values() for track in tracks])
        self._windows.clear()

    # Tracks -------------------------------------------------------------------------------------------------

    def _entry(self, device: Device, rank: int) -> _DeviceTracks:
        who = device.container or device.netns_name or "container"
        if device.role is Role.INNER:
            parent = self._container(device)
            group = self._group((*device.key, False), device.name, parent, 100 + device.ifindex)
            self._group((*device.key, True), "whole path", parent, 1)
        elif device.role is Role.HOST or device.role is Role.OUTER:
            group = self._group((*device.key, False), device.name, self._root, 200 + rank)
            self._group((*device.key, True), f"{device.name}, whole path", self._root, 200 + rank)
        else:
            place = device.netns_name or f"namespace {device.netns}"
            group = self._group((*device.key, False), f"{place}: {device.name}", self._root, 200 + rank)
            self._group((*device.key, True), f"{place}: {device.name}, whole path", self._root, 200 + rank)
        slices = [self._trace.name(f"{who} {d.name.lower()}") for d in Direction]
        paths = [self._trace.name(f"{who} {d.name.lower()} overhead") for d in Direction]
        return _DeviceTracks(group, self._trace.text(who), (*slices, *paths))

    def _container(self, device: Device) -> int:
        name = f"container {device.container or device.netns_name or device.netns}"
        return self._named(f"container/{device.container or device.netns}", name, self._root, 100)

    def _group(self, key: tuple[int, int, bool], name: str, parent: int, rank: int) -> int:
        """Return the number of a group of lanes, whose tracks are made when they are needed."""
        found = self._groups.get(key)
        if found is None:
            found = self._groups[key] = len(self._lane_of)
            self._lane_of.append((f"{self._key}/lanes/{key[0]}/{key[1]}/{key[2]:d}", name, parent, rank))
            self._uuids.append([])
        return found

    def _track_of(self, group: Ints, lane: Ints) -> Ints:
        """Return the track of each lane."""
        found = np.zeros(len(group), np.int64)
        codes, member = np.unique(group << 32 | lane, return_inverse=True)
        uuids = np.zeros(len(codes), np.int64)
        for i, code in enumerate(codes.tolist()):
            number, wanted = code >> 32, code & 0xFFFFFFFF
            known = self._uuids[number]
            key, name, parent, rank = self._lane_of[number]
            while len(known) <= wanted:
                known.append(self._trace.track(f"{key}/{len(known)}", name, parent=parent, rank=rank))
            uuids[i] = known[wanted]
        found[:] = uuids[member]
        return found

    def _named(self, key: str, name: str, parent: int, rank: int, unit: int = 0) -> int:
        found = self._tracks.get(key)
        if found is None:
            found = self._trace.track(f"{self._key}/{key}", name, parent=parent, rank=rank, unit=unit)
            self._tracks[key] = found
        return found

    def _folder(self, name: str, rank: int) -> int:
        return self._named(name, name, self._root, rank)

    def _counters(self, number: int, direction: int, segment: int) -> tuple[int, ...]:
        device = self._devices[number]
        parent = self._root
        if device.container:
            parent = self._named(f"container/{device.container}", f"container {device.container}", self._root, 100)
        folder = self._named(f"delays/{device.container}", "delays", parent, 500)
        way = Direction(direction).name.lower()
        reading = {each: f"{device.name} {each.name.lower()}" for each in (Segment.DELIVERY, Segment.WAITING)}
        what = {Segment.OVERHEAD: "overhead", **reading}.get(Segment(segment), device.name)
        found = []
        rank = 1000 * (segment != Segment.OVERHEAD) + 100 * direction + 3 * min(number, 30)
        for place, (name, unit) in enumerate((("p50", UNIT_NS), ("p99", UNIT_NS), ("packets", UNIT_COUNT))):
            key = f"delays/{number}/{direction}/{segment}/{name}"
            found.append(self._named(key, f"{what} {way} {name}", folder, rank + place, unit))
        return tuple(found)

    def _points(self, points: Sequence[tuple[int, int, int]]) -> None:
        if points:
            begin, track, value = (np.array(column, np.int64) for column in zip(*points, strict=True))
            self._trace.put(perfetto_events.counts({"begin": begin, "track": track, "value": value}))


def _sighted(sighting: Sighting, devices: Iterable[Device]) -> str:
    """Return a record's device as text."""
    if sighting.name or not sighting.ifindex:
        return sighting.name
    known = next((d for d in devices if sighting.is_of(d)), None)
    return known.name if known else f"{sighting.netns_cookie or sighting.netns}:{sighting.ifindex}"
