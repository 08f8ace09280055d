"""Encodes rows and totals as InfluxDB line protocol by columns: six million lines a second, f-strings reach one.

    device_delay,host=h,container=c1,...,grade=buffer delay_ns=2210i,l3_len=84i,position=1i 1750000000000000000
    └────────── one of few prefixes ────────────────────────┘└──┘└──── one of few middles ┘└────── time ──────┘

A packet's line is four pieces: two are looked up, two are numbers. Names and order are those of `contracts.metrics`.

**No row replaces another.** A database knows a row by its tags and its time. Two packets that came to one device in the
same nanosecond would be one; the second gets the tag `slot=1`, a third `slot=2`. Such pairs are found in a batch by
sorting a hash of prefix and time, and across batches among those of the last seconds (`_RecentTimes`). Windows of a run
that began within them get the slot 100 and the seconds after their start, so that an earlier run's part of them stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from contracts.arrays import Ints
from contracts.interfaces import StreamHeader
from contracts.metrics import MEASUREMENTS
from contracts.names import spelt, text
from contracts.results import Rows, Totals
from contracts.schema import NOT_TOLD, Delays, Direction, Grade, Outcome, RoundTrips, Segment, Window
from contracts.topology import ContainerInfo, Device, containers_of
from storage.stage_sums import StageKey, StageSum, add_stages

Codes = npt.NDArray[np.int32]

_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio: multiplying by it spreads small numbers over all bits (Knuth, TAOCP 3, 6.4)."""
_SEEN_ROWS: Final = 1 << 21
"""Most rows whose hashes are remembered: 16 MiB."""
_SEEN_NS: Final = 10_000_000_000
"""Time for which hashes are remembered: a packet's rows are encoded when its life has ended."""
_RUN_SLOT: Final = 100
"""Slots from 100 on say where in the window its run began; smaller ones count devices with the same tags."""
_S: Final = 1_000_000_000
_INFO_NS: Final = 60 * _S
"""Interval of `container_info` rows: PromQL's instant queries (VictoriaMetrics) look back five minutes."""
_MOST_STAGES: Final = 1 << 16
"""Most sums of stages of one run."""
_RTT_FIELDS: Final = tuple(field.name for field in MEASUREMENTS["rtt"].fields)
_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f]|\\(?=[\\, =\x00-\x1f\x7f]|\Z)")
_UNKNOWN: Final = -1
_OVER_BUDGET: Final = -2


def _escaped(value: str) -> str:
    r"""Return a tag's value, escaped so that InfluxDB and VictoriaMetrics read it in the same way.

    Commas, spaces and equals signs are escaped by a backslash. A backslash in the value is then ambiguous before one of
    these, before another backslash and at the end: InfluxDB reads `\\,` as a backslash and a comma, VictoriaMetrics as
    a backslash that ends the value. Such a backslash is written as `\x5c`. Control characters, which end a line or move
    a terminal's cursor, are written in the same way.
    """
    clean = _UNSAFE.sub(lambda found: spelt(found[0]), text(value))
    return clean.replace(",", "\\,").replace(" ", "\\ ").replace("=", "\\=")


def key(measurement: str, tags: dict[str, str]) -> str:
    """Return the series, the beginning of a line: measurement and non-empty tags. KeyError for unknown tags."""
    known = MEASUREMENTS[measurement].tags
    text = measurement
    for name in known:
        value = tags.pop(name, "")
        if value:
            text += f",{name}={_escaped(value)}"
    if tags:
        raise KeyError(f"{measurement} has no tag {next(iter(tags))}")
    return text


def line(series: str, fields: dict[str, int | str], time_ns: int) -> str:
    """Return one line with its newline. Numbers are written as integers, text in quotes, which it must not contain."""
    told = ",".join(f'{name}="{v}"' if isinstance(v, str) else f"{name}={v}i" for name, v in fields.items())
    return f"{series} {told} {time_ns}\n"


def _told(fields: dict[str, int]) -> dict[str, int | str]:
    """Return the fields without unknown values; at least one field, because a line needs one."""
    return {name: value for name, value in fields.items() if value != NOT_TOLD} or {"seq": NOT_TOLD}


class Budget:
    """Bounds the number of series of a sink, over all of its streams."""

    def __init__(self, most: int, on_full: Callable[[str], None] = lambda _: None) -> None:
        self._most = most
        self._known: set[str] = set()
        self._on_full = on_full
        self._told = False

    def __len__(self) -> int:
        return len(self._known)

    def admits(self, series: str) -> bool:
        """Return whether rows of this series may be written; adds a new series if the budget has room."""
        if series in self._known:
            return True
        if len(self._known) >= self._most:
            if not self._told:
                self._told = True
                self._on_full(series)
            return False
        self._known.add(series)
        return True


class _RecentTimes:
    """Remembers recent (series, time) pairs as hashes, and gives a repeated pair its next free slot.

    A collision of hashes (once in 2**64 pairs) only causes a slot that is not needed.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, Any]] = []
        """Latest time and sorted hashes of each batch."""
        self._rows = 0
        self._next_slot: dict[int, int] = {}
        """The next slot of each hash that has occurred more than once."""

    def slots(self, hashes: npt.NDArray[np.uint64], utc_ns: Ints, packet: npt.NDArray[np.uint64]) -> dict[int, int]:
        """Return the slot by row, for the rows whose slot is not 0."""
        ordered = np.sort(hashes)
        again = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        latest = max((newest for newest, _ in self._batches), default=0)
        late = np.flatnonzero(utc_ns <= latest)
        if len(late):
            mine = hashes[late]
            earliest = int(utc_ns[late].min())
            for newest, before in self._batches:
                if newest >= earliest:
                    at = np.minimum(np.searchsorted(before, mine), len(before) - 1)
                    found = mine[before[at] == mine].tolist()
                    again.update(found)
                    for value in found:
                        self._next_slot.setdefault(value, 1)
        found_slots: dict[int, int] = {}
        if again:
            rows = np.flatnonzero(np.isin(hashes, np.fromiter(again, np.uint64, len(again))))
            # In the order of packet numbers, so that other batch boundaries mostly give the same slots.
            for row in rows[np.argsort(packet[rows], kind="stable")].tolist():
                value = int(hashes[row])
                slot = self._next_slot.get(value, 0)
                self._next_slot[value] = slot + 1
                if slot:
                    found_slots[row] = slot
        self._remember(ordered, int(utc_ns.max()))
        return found_slots

    def _remember(self, ordered: npt.NDArray[np.uint64], newest: int) -> None:
        self._batches.append((newest, ordered))
        self._rows += len(ordered)
        since = max(at for at, _ in self._batches) - _SEEN_NS
        while len(self._batches) > 1 and (self._rows > _SEEN_ROWS or self._batches[0][0] < since):
            self._rows -= len(self._batches.pop(0)[1])
        if len(self._next_slot) > _SEEN_ROWS:
            self._next_slot.clear()


@dataclass(slots=True)
class Lines:
    """Encoded rows: whole lines with their newlines."""

    data: pa.Buffer | bytes
    rows: int


class StreamLines:
    """Encodes the lines of one stream (one run of one host). Not thread-safe."""

    def __init__(self, header: StreamHeader, budget: Budget, *, sample: int = 1) -> None:
        """`sample`: one packet in so many gets lines; 0 is none."""
        self._header = header
        self._budget = budget
        self._sample = sample
        self._devices: tuple[Device, ...] = ()
        self._prefixes: list[str] = []
        self._prefix_array: pa.Array | None = None
        self._prefix_of = np.zeros(0, np.int32)
        """Code of device, direction, segment and grade → index of its prefix."""
        self._middles: list[str] = []
        self._middle_array: pa.Array | None = None
        self._length_rank = np.full(1 << 16, _UNKNOWN, np.int32)
        self._lengths = 0
        self._middle_of = np.zeros(0, np.int32)
        """Code of length (its rank), dropped and position → index of its middle."""
        self._seen = _RecentTimes()
        self._ranks: tuple[int, ...] = ()
        self._window_series: dict[tuple[int, int, int, int, int], str | None] = {}
        self._began_utc_ns = header.clock.utc_ns
        self._present: tuple[Device, ...] | None = None
        self._containers: frozenset[ContainerInfo] = frozenset()
        self._stages: dict[StageKey, StageSum] = {}
        self._minute = -1
        """Minute of the last results for which all containers were written."""
        self.left_out = 0
        """Number of rows that sampling has left out."""
        self.over_budget = 0
        """Number of rows refused because their series would exceed the budget."""

    def packets(self, delays: Delays, devices: Sequence[Device], most: int) -> Iterator[Lines]:
        """Yield `device_delay` and `overhead` lines, at most `most` at a time."""
        self._devices = tuple(devices)
        if self._sample != 1:
            before = len(delays)
            delays = delays[self._sampled(delays.packet)]
            self.left_out += before - len(delays)
        if not len(delays):
            return
        prefix = self._prefix_index(delays)
        if prefix.min() < 0:
            kept = prefix >= 0
            self.over_budget += int(len(kept) - np.count_nonzero(kept))
            delays, prefix = delays[kept], prefix[kept]
            if not len(delays):
                return
        prefix = self._apart(prefix, delays)
        middle = self._middle_index(delays)
        for at in range(0, len(delays), most):
            part = slice(at, at + most)
            yield self._joined(prefix[part], delays.delay_ns[part], middle[part], delays.utc_ns[part])

    def _sampled(self, packet: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return a mask of all rows of the sampled packets, chosen by a hash of the number, so equal in a replay."""
        if not self._sample:
            return np.zeros(len(packet), np.bool_)
        chosen: npt.NDArray[np.bool_] = ((packet * _MIX) >> np.uint64(40)) % np.uint64(self._sample) == 0
        return chosen

    def _joined(self, prefix: Codes, delay_ns: Ints, middle: Codes, utc_ns: Ints) -> Lines:
        if self._prefix_array is None or len(self._prefix_array) != len(self._prefixes):
            self._prefix_array = pa.array(self._prefixes, pa.string())
        if self._middle_array is None or len(self._middle_array) != len(self._middles):
            self._middle_array = pa.array(self._middles, pa.string())
        joined = pc.binary_join_element_wise(
            self._prefix_array.take(pa.array(prefix)),
            pa.array(delay_ns).cast(pa.string()),
            self._middle_array.take(pa.array(middle)),
            pa.array(utc_ns).cast(pa.string()),
            "\n",  # comes last, with the separator "" before it
            "",
        )
        # Arrow stores the strings back to back, so their buffer is the text.
        offsets = np.frombuffer(joined.buffers()[1], np.int32, len(joined) + 1)
        return Lines(joined.buffers()[2].slice(int(offsets[0]), int(offsets[-1] - offsets[0])), len(joined))

    # Prefixes: measurement and tags, up to the first field's equals sign.

    def _prefix_index(self, delays: Delays) -> Codes:
        code = delays.device.astype(np.int64)
        code <<= 8
        code |= (delays.direction.astype(np.int64) << 6) | (delays.segment.astype(np.int64) << 3) | delays.grade
        room = len(self._devices) << 8
        if room > len(self._prefix_of):
            grown = np.full(room, _UNKNOWN, np.int32)
            grown[: len(self._prefix_of)] = self._prefix_of
            self._prefix_of = grown
        index: Codes = self._prefix_of[code]
        if index.min() < 0:
            for new in np.unique(code[index == _UNKNOWN]).tolist():
                self._prefix_of[new] = self._new_prefix(new)
            index = self._prefix_of[code]
        return index

    def _new_prefix(self, code: int, slot: int = 0) -> int:
        device = self._devices[code >> 8]
        segment = Segment((code >> 3) & 7)
        whole = segment is Segment.OVERHEAD
        tags = self._device_tags(device) | {
            "direction": Direction((code >> 6) & 3).name.lower(),
            "source": self._header.source,
            "grade": Grade(code & 7).name.lower(),
            "slot": str(slot) if slot else "",
        }
        if not whole:
            tags["segment"] = segment.name.lower()
        series = key("overhead" if whole else "device_delay", tags)
        if not self._budget.admits(series):
            return _OVER_BUDGET
        return self._prefix(series + (" overhead_ns=" if whole else " delay_ns="))

    def _prefix(self, text: str) -> int:
        """Return the index of a prefix. Devices with equal tags share one, and slots distinguish their rows."""
        if text in self._prefixes:
            return self._prefixes.index(text)
        self._prefixes.append(text)
        return len(self._prefixes) - 1

    def _device_tags(self, device: Device) -> dict[str, str]:
        return {
            "host": self._header.host,
            "container": device.container,
            "netns": device.netns_name,
            "device": device.name,
            "kind": device.kind,
        }

    def _apart(self, prefix: Codes, delays: Delays) -> Codes:
        """Return the prefixes, with a slot for rows that would replace an earlier row."""
        hashes = delays.utc_ns.astype(np.uint64) ^ (prefix.astype(np.uint64) * _MIX)
        slots = self._seen.slots(hashes, delays.utc_ns, delays.packet)
        if slots:
            prefix = prefix.copy()
            for row, slot in slots.items():
                series, _, field = self._prefixes[prefix[row]].rpartition(" ")
                # Not counted for the budget: there are few, and a replaced row would be lost without being counted.
                prefix[row] = self._prefix(f"{series},slot={slot} {field}")
        return prefix

    # Middles: the fields after the delay, whose number follows the prefix.

    def _middle_index(self, delays: Delays) -> Codes:
        # GSO and GRO packets are at most 64 KiB, but IPv6 jumbograms (BIG TCP, Linux 5.19) are not.
        length = delays.l3_len
        if int(length.max()) >= len(self._length_rank):
            grown = np.full(1 << int(length.max()).bit_length(), _UNKNOWN, np.int32)
            grown[: len(self._length_rank)] = self._length_rank
            self._length_rank = grown
        rank: Codes = self._length_rank[length]
        if rank.min() < 0:
            for new in np.unique(length[rank == _UNKNOWN]).tolist():
                self._length_rank[new] = self._lengths
                self._lengths += 1
            rank = self._length_rank[length]
            grown = np.full(self._lengths << 9, _UNKNOWN, np.int32)
            grown[: len(self._middle_of)] = self._middle_of
            self._middle_of = grown
        dropped = delays.outcome == Outcome.DROPPED
        code = (rank << 9) | (dropped.astype(np.int32) << 8) | delays.position
        index: Codes = self._middle_of[code]
        if index.min() < 0:
            for new in np.unique(code[index == _UNKNOWN]).tolist():
                row = int(np.flatnonzero(code == new)[0])
                text = f"i,l3_len={int(length[row])}i" + (",dropped=1i" if dropped[row] else "")
                # Position 255 is the overhead, which is not a hop.
                text += " " if int(delays.position[row]) == 255 else f",position={int(delays.position[row])}i "
                self._middle_of[new] = len(self._middles)
                self._middles.append(text)
            index = self._middle_of[code]
        return index

    # Containers.

    def containers(self, totals: Totals) -> Iterator[str]:
        """Yield `container_info` lines for new and renamed containers, and once a minute for all."""
        minute = totals.upto_utc_ns // _INFO_NS
        if totals.present is None or (totals.present is self._present and minute == self._minute):
            return
        here = containers_of(totals.present, totals.on_host_network)
        new = here if minute != self._minute else here - self._containers
        self._present, self._minute, self._containers = totals.present, minute, here
        for info in sorted(new):
            tags = info._asdict() | {"host": self._header.host, "source": self._header.source}
            series = key("container_info", tags)
            if self._budget.admits(series):
                yield line(series, {"present": 1}, totals.upto_utc_ns)
            else:
                self.over_budget += 1

    # Stages.

    def stages(self, rows: Rows, totals: Totals) -> Iterator[str]:
        """Yield `cpu_stage` lines for the sums that these rows make grow."""
        grown, beyond = add_stages(self._stages, rows, _MOST_STAGES)
        self.over_budget += beyond > 0
        for each in sorted(grown):
            series = key("cpu_stage", each._asdict() | {"host": self._header.host, "source": self._header.source})
            if self._budget.admits(series):
                found = self._stages[each]
                yield line(series, {"count": found.count, "sum_ns": found.sum_ns}, totals.upto_utc_ns)
            else:
                self.over_budget += 1

    # Round trips.

    def round_trips(self, trips: RoundTrips) -> Iterator[str]:
        """Yield `rtt` lines for the samples that have a time."""
        rows = trips.rows
        taken: dict[tuple[str, int], int] = {}
        for i in range(len(rows)):
            time_ns, reason = int(rows.utc_ns[i]), int(rows.reason[i])
            if time_ns == NOT_TOLD:
                self.left_out += 1
                continue
            tags = {
                "host": self._header.host,
                "container": trips.container,
                "netns": trips.netns,
                "tool": trips.tool,
                "source": self._header.source,
                "grade": "" if reason else Grade(int(rows.grade[i])).name.lower(),
                "reason": trips.reasons[reason],
            }
            series = key("rtt", tags)
            if not self._budget.admits(series):
                self.over_budget += 1
                continue
            # Duplicate replies to a request have the request's time.
            slot = taken.get((series, time_ns), 0)
            taken[series, time_ns] = slot + 1
            told = ("seq", "tool_rtt_ns") if reason else _RTT_FIELDS
            fields = {name: int(getattr(rows, name)[i]) for name in told}
            yield line(series + (f",slot={slot}" if slot else ""), _told(fields), time_ns)

    # Windows.

    def windows(self, windows: Iterable[Window], devices: Sequence[Device], ranks: Sequence[int]) -> Iterator[str]:
        """Yield `device_window` lines."""
        if len(devices) != len(self._devices) or tuple(ranks) != self._ranks:
            self._devices, self._ranks = tuple(devices), tuple(ranks)
            self._window_series.clear()
        taken: dict[tuple[str, int], int] = {}
        for w in windows:
            series = self._series_of(w)
            if series is None:
                self.over_budget += 1
                continue
            alike = taken.get((series, w.start_utc_ns), 0)
            taken[series, w.start_utc_ns] = alike + 1
            began = self._began_utc_ns - w.start_utc_ns
            slot = alike + (_RUN_SLOT * (1 + began // _S) if 0 < began < w.width_s * _S else 0)
            if slot:
                series += f",slot={slot}"
            fields: dict[str, int | str] = {
                "count": w.count,
                "sum_ns": w.sum_ns,
                "min_ns": w.min_ns,
                "max_ns": w.max_ns,
                "p50_ns": w.p50_ns,
                "p90_ns": w.p90_ns,
                "p99_ns": w.p99_ns,
                "p999_ns": w.p999_ns,
                "histogram": " ".join(f"{b}:{n}" for b, n in zip(w.bins.tolist(), w.counts.tolist(), strict=True)),
            }
            yield line(series, fields, w.start_utc_ns)

    def _series_of(self, w: Window) -> str | None:
        known = (w.device, int(w.direction), int(w.segment), w.width_s, 0)
        if known not in self._window_series:
            device = self._devices[w.device]
            tags = self._device_tags(device) | {
                "role": device.role.value,
                "rank": str(self._ranks[w.device]),
                "direction": w.direction.name.lower(),
                "segment": w.segment.name.lower(),
                "source": self._header.source,
                "width_s": str(w.width_s),
            }
            series = key("device_window", tags)
            self._window_series[known] = series if self._budget.admits(series) else None
        return self._window_series[known]
