"""Events of a Perfetto trace as templates: slices of hops, instants of records, counters; rows of them in one go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from contracts.arrays import Bytes, Ints
from storage.perfetto.protobuf import Template, TemplatePart, field, fixed64, hole, interleaved, message

HoleColumns: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""By the names of a template's holes: integers, one for each row."""

# Field numbers of protos/perfetto/trace/perfetto_trace.proto, by the names that they have there.
TRACE_PACKET: Final = 1
SEQUENCE_ID, SEQUENCE_FLAGS = 10, 13
STATE_CLEARED, NEEDS_STATE = 1, 2
_TIMESTAMP, _TRACK_EVENT = 8, 11
_SLICE_BEGIN, _SLICE_END, _INSTANT, _COUNTER = 1, 2, 3, 4

SEQUENCE: Final = 1
"""All packets of a trace are of one sequence, whose interned texts they share."""

ANNOTATIONS: Final = (
    "packet",
    "delay_ns",
    "direction",
    "container",
    "counts_as",
    "hop",
    "grade",
    "l3_len",
    "outcome",
    "drop_reason",
    "request",
    "told_by",
    "device",
    "skb_id",
    "l4_proto",
    "l4_src",
    "l4_dst",
    "l4_seq",
)
"""Names of arguments; `debug.` before each in SQL."""
_ARGUMENT: Final = {name: number for number, name in enumerate(ANNOTATIONS, 1)}


def _number(name: str, bits: int = 64) -> list[TemplatePart]:
    return message(4, [field(1, _ARGUMENT[name]), *hole(3, name, bits)])


def _signed(name: str, bits: int = 63) -> list[TemplatePart]:
    return message(4, [field(1, _ARGUMENT[name]), *hole(4, name, bits)])


def _text(name: str) -> list[TemplatePart]:
    return message(4, [field(1, _ARGUMENT[name]), *hole(17, name, 21)])


def _identity(name: str) -> list[TemplatePart]:
    """As a pointer: people see it in hexadecimal."""
    return message(4, [field(1, _ARGUMENT[name]), *hole(7, name)])


def _event(kind: int, time: str, parts: list[TemplatePart]) -> Template:
    event = message(_TRACK_EVENT, [field(9, kind), *hole(11, "track", 63), *parts])
    head: list[TemplatePart] = [field(SEQUENCE_ID, SEQUENCE), field(SEQUENCE_FLAGS, NEEDS_STATE)]
    return Template(message(TRACE_PACKET, [*hole(_TIMESTAMP, time, 63), *head, *event]))


_NAMED: Final[list[TemplatePart]] = [*hole(3, "category", 7), *hole(10, "name", 21)]
_HOP: Final[list[TemplatePart]] = [
    *_NAMED,
    *_identity("packet"),
    *_signed("delay_ns"),
    *_text("direction"),
    *_text("container"),
    *_text("counts_as"),
    *_number("hop", 8),
    *_text("grade"),
    *_number("l3_len", 32),
    *_text("outcome"),
]
_ARROW: Final = fixed64(47, "flow")
_DROP: Final = _number("drop_reason", 16)
_REPLY: Final = [*_identity("request"), *_text("told_by")]
_RECORD: Final[list[TemplatePart]] = [*_NAMED, *_text("device"), *_identity("skb_id"), *_number("l3_len", 32)]
_OWNED: Final = _identity("packet")
_FLOW: Final = [
    *_number("l4_proto", 8),
    *_number("l4_src", 16),
    *_number("l4_dst", 16),
    *_number("l4_seq", 32),
]
_HOPS: Final = {
    (dropped, reply, whole): _event(
        _SLICE_BEGIN,
        "begin",
        # The whole path is beside the hops, and no step of the way from one to the next.
        [*_HOP, *(_DROP if dropped else []), *(_REPLY if reply else []), *([] if whole else _ARROW)],
    )
    for dropped in (False, True)
    for reply in (False, True)
    for whole in (False, True)
}
_RECORDS: Final = {
    (owned, flow, dropped): _event(
        _INSTANT,
        "begin",
        [*_RECORD, *(_OWNED if owned else []), *(_FLOW if flow else []), *(_DROP if dropped else [])],
    )
    for owned in (False, True)
    for flow in (False, True)
    for dropped in (False, True)
}
_END: Final = _event(_SLICE_END, "end", [])
_PLAIN: Final = _event(_SLICE_BEGIN, "begin", _NAMED)
_COUNT: Final = _event(_COUNTER, "begin", hole(30, "value", 63))


def slices(variant: Ints, columns: HoleColumns) -> bytes:
    """Begin and end of each slice; `variant` is the number of its template."""
    parts: list[tuple[Ints, list[Bytes]]] = []
    for number in np.unique(variant).tolist():
        at = np.flatnonzero(variant == number)
        of = {name: column[at] for name, column in columns.items()}
        template = _HOPS[bool(number & 1), bool(number & 2), bool(number & 4)]
        parts.append((at, [template.rows(len(at), of), _END.rows(len(at), of)]))
    return interleaved(parts, len(variant))


def instants(variant: Ints, columns: HoleColumns) -> bytes:
    """One for each record; `variant` is the number of its template."""
    parts: list[tuple[Ints, list[Bytes]]] = []
    for number in np.unique(variant).tolist():
        at = np.flatnonzero(variant == number)
        template = _RECORDS[bool(number & 1), bool(number & 2), bool(number & 4)]
        parts.append((at, [template.rows(len(at), {name: column[at] for name, column in columns.items()})]))
    return interleaved(parts, len(variant))


def plain(columns: HoleColumns) -> bytes:
    """Slices without arguments."""
    count = len(columns["begin"])
    pieces = [_PLAIN.rows(count, columns), _END.rows(count, columns)]
    return interleaved([(np.arange(count), pieces)], count)


def counts(columns: HoleColumns) -> bytes:
    """Values of counters."""
    return _COUNT.rows(len(columns["begin"]), columns).tobytes()
