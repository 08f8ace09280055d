"""The progress of a replay with one recording: its committed parts, as a value and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from collector.capture.cuts import Cut
from collector.capture.source import Position
from contracts.figures import DevicePlace, Summary
from contracts.ledger import Ledger
from contracts.schema import Direction, Grades, Segment, Window
from contracts.topology import Device, Sharer
from contracts.windowtable import WindowTable
from correlator.state import EngineState
from correlator.windows import joined
from mace.replaying.checkpoint import device_from_json, device_to_json, packed, state_from_json, state_to_json, unpacked
from mace.replaying.part import PartDone

_HISTOGRAM: Final = "<i8"
"""Type of histogram bins and counts, which are stored packed: lists of numbers would be most of a commit's cost."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The sums over the parts of one recording that are in the store, and the state after the last one."""

    parts: int = 0
    ended_with: str = ""
    """Digest of the state at the end of the last committed part."""
    state: EngineState | None = None
    ledger: Ledger = field(default_factory=Ledger)
    grades: Grades = field(default_factory=Grades)
    rows: int = 0
    pending: WindowTable = field(default_factory=WindowTable.empty)
    """Windows to which the next part may add; they are not stored yet."""
    devices: tuple[Device, ...] = ()
    """The devices that the indices in `pending` refer to."""
    summary: Summary = field(default_factory=Summary)

    def with_part(self, done: PartDone, *, last: bool) -> tuple[Committed, WindowTable, list[Device]]:
        """Return the sums with one more part, the windows that are now final, and the devices they refer to."""
        devices = list(dict.fromkeys((*self.devices, *done.devices)))
        number = {device: n for n, device in enumerate(devices)}
        pieces = []
        for of, windows in ((self.devices, self.pending), (done.devices, done.edges)):
            if len(windows):
                new = np.array([number[device] for device in of], np.int64)
                pieces.append(windows.with_column("device", new[windows.column("device")]))
        whole = joined(WindowTable.concatenate(pieces))
        ends_utc_ns = whole.column("start_utc_ns") + whole.column("width_s") * 1_000_000_000
        settled = last | (ends_utc_ns <= done.settled_utc_ns)
        # Records that were in flight at the end of the part before are counted in another category by now.
        ledger = replace(self.ledger, in_flight=0) + done.ledger
        grades = self.grades + done.grades
        summary = Summary()
        summary.merge(self.summary)
        summary.merge(done.summary)
        summary.ledger, summary.grades, summary.packets = ledger, grades, grades.packets
        now = Committed(
            parts=self.parts + 1,
            ended_with=done.ended_with,
            state=done.state,
            ledger=ledger,
            grades=grades,
            rows=self.rows + done.rows,
            pending=whole[~settled],
            devices=tuple(devices),
            summary=summary,
        )
        return now, whole[settled], devices


def committed_to_json(committed: Committed) -> dict[str, Any]:
    """Return the sums as plain values for JSON."""
    return {
        "parts": committed.parts,
        "ended_with": committed.ended_with,
        "state": None if committed.state is None else state_to_json(committed.state),
        "ledger": committed.ledger.as_dict(),
        "grades": committed.grades.as_dict(),
        "rows": committed.rows,
        "pending": [_window_to_json(window) for window in committed.pending],
        "devices": [device_to_json(device) for device in committed.devices],
        "summary": _summary_to_json(committed.summary),
        "several_devices": committed.summary.several_devices,
        "imitated": committed.summary.imitated,
        "names": committed.summary.names.as_list(),
        "sharers": [[sharer.container, sharer.container_id] for sharer in committed.summary.sharers],
        "pods": committed.summary.pods,
    }


def committed_from_json(given: dict[str, Any]) -> Committed:
    """Return what `committed_to_json` has converted. Raises KeyError, TypeError or ValueError for other input."""
    ledger, grades = Ledger(**given["ledger"]), Grades(**given["grades"])
    summary = _summary_from_json(given["summary"])
    summary.ledger, summary.grades, summary.packets = ledger, grades, grades.packets
    summary.several_devices = int(given.get("several_devices", 0))
    summary.imitated = tuple(map(str, given.get("imitated", ())))
    for container_id, utc_ns, name in given.get("names", ()):
        summary.names.note(container_id, name, utc_ns)
    summary.sharers = tuple(Sharer(*each) for each in given.get("sharers", ()))
    summary.pods = dict(given.get("pods", {}))
    return Committed(
        parts=given["parts"],
        ended_with=given["ended_with"],
        state=None if given["state"] is None else state_from_json(given["state"]),
        ledger=ledger,
        grades=grades,
        rows=given["rows"],
        pending=WindowTable.of([_window_from_json(window) for window in given["pending"]]),
        devices=tuple(device_from_json(device) for device in given["devices"]),
        summary=summary,
    )


def cut_to_json(cut: Cut) -> dict[str, Any]:
    """Return a cut as plain values for JSON."""
    return {
        "at_ns": cut.at_ns,
        "position": _position_to_json(cut.position),
        "warm": _position_to_json(cut.warm),
    }


def cut_from_json(given: dict[str, Any]) -> Cut:
    """Return the cut that `cut_to_json` has converted."""
    return Cut(given["at_ns"], _position_from_json(given["position"]), _position_from_json(given["warm"]))


def _position_to_json(position: Position) -> list[Any]:
    return [position.offset, position.sequence, position.records, [list(pair) for pair in position.topologies]]


def _position_from_json(given: Sequence[Any]) -> Position:
    offset, sequence, records, topologies = given
    return Position(offset, sequence, records, tuple((at, number) for at, number in topologies))


def _window_to_json(window: Window) -> list[Any]:
    return [
        *(window.start_utc_ns, window.width_s, window.device, int(window.direction), int(window.segment)),
        *(window.count, window.sum_ns, window.min_ns, window.max_ns),
        *(window.p50_ns, window.p90_ns, window.p99_ns, window.p999_ns),
        *(packed(window.bins, _HISTOGRAM), packed(window.counts, _HISTOGRAM)),
    ]


def _window_from_json(given: Sequence[Any]) -> Window:
    start, width, device, direction, segment, *figures = given
    histogram = [unpacked(text, _HISTOGRAM) for text in figures[-2:]]
    return Window(start, width, device, Direction(direction), Segment(segment), *figures[:-2], *histogram)


def _summary_to_json(summary: Summary) -> list[Any]:
    """Return a summary's distributions as plain values; its other counts are fields of `Committed`."""
    return [
        [
            width,
            [getattr(place, name) for name in DevicePlace.__slots__],
            *(int(direction), int(segment)),
            *(one.count, one.sum_ns, one.min_ns, one.max_ns),
            *(packed(column, _HISTOGRAM) for column in one.histogram()),
        ]
        for width, (place, direction, segment), one in summary.distributions()
    ]


def _summary_from_json(given: Sequence[Any]) -> Summary:
    summary = Summary()
    for width, place, direction, segment, count, sum_ns, min_ns, max_ns, bins, counts in given:
        one = summary.distribution(DevicePlace(*place), Direction(direction), Segment(segment), width)
        one.add(count, sum_ns, min_ns, max_ns, unpacked(bins, _HISTOGRAM), unpacked(counts, _HISTOGRAM))
    return summary
