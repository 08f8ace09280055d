"""Converts an engine's state to JSON and back, for a resumed replay. JSON, because reading it never runs code."""

from __future__ import annotations

import base64
from dataclasses import fields
from typing import Any

import numpy as np

from contracts.topology import Device, Role, Sighting
from correlator.identity import ResolverState
from correlator.links import LooseEnds
from correlator.neighbours import Asked
from correlator.records import Open, Records
from correlator.state import EngineState

_COLUMNS = {
    "ts": "<i8",
    "skb": "<u8",
    "place": "<i8",
    "length": "<u4",
    "key": "<u8",
    "trait": "u1",
    "flow": "<u8",
    "proto": "u1",
    "cpu": "<u2",
}

_DEVICE = tuple(each.name for each in fields(Device))
_WAITING = {
    "number": "<i8",
    "cross": "?",
    "size": "<i8",
    "key": "<u8",
    "at_ns": "<i8",
    "first_ns": "<i8",
    "head": "?",
    "end": "<i8",
    "freed": "?",
    "grade": "u1",
}


def state_to_json(state: EngineState) -> dict[str, Any]:
    """Return the state as plain values; arrays are base64 of their little-endian bytes."""
    resolver, waiting = state.resolver, state.waiting
    return {
        "devices": [device_to_json(device) for device in resolver.devices],
        "serves": list(resolver.serves),
        "live": sorted(resolver.live),
        "gone": [list(pair) for pair in resolver.gone],
        "sightings": [[s.name, s.netns, s.ifindex, s.netns_cookie] for s in resolver.sightings],
        "records": _records_to_json(state.open.records),
        "number": packed(state.open.number, "<i8"),
        "cross": packed(state.open.cross, "?"),
        "waiting": {name: packed(getattr(waiting, name), dtype) for name, dtype in _WAITING.items()},
        "waiting_records": _records_to_json(waiting.records),
        "gaps": [list(gap) for gap in state.gaps],
        "asked": [packed(state.asked.dev, "<i8"), packed(state.asked.ts, "<i8")],
        "latest_ns": state.latest_ns,
        "began_ns": state.began_ns,
    }


def state_from_json(given: dict[str, Any]) -> EngineState:
    """Return the state that `state_to_json` has converted. Raises KeyError, TypeError or ValueError for other input."""
    asked = Asked()
    asked.dev, asked.ts = (unpacked(text, "<i8") for text in given["asked"])
    waiting = {name: unpacked(given["waiting"][name], dtype) for name, dtype in _WAITING.items()}
    return EngineState(
        ResolverState(
            devices=tuple(device_from_json(device) for device in given["devices"]),
            serves=tuple(given["serves"]),
            live=frozenset(given["live"]),
            gone=tuple((number, since) for number, since in given["gone"]),
            sightings=tuple(Sighting(*each) for each in given["sightings"]),
        ),
        Open(_records_from_json(given["records"]), unpacked(given["number"], "<i8"), unpacked(given["cross"], "?")),
        LooseEnds(_records_from_json(given["waiting_records"]), **waiting),
        [(start, end) for start, end in given["gaps"]],
        asked,
        given["latest_ns"],
        given["began_ns"],
    )


def _records_to_json(records: Records) -> dict[str, str]:
    columns = {name: getattr(records, name) for name in _COLUMNS}
    return {name: packed(column, _COLUMNS[name]) for name, column in columns.items() if column is not None}


def _records_from_json(given: dict[str, str]) -> Records:
    return Records(**{name: unpacked(text, _COLUMNS[name]) for name, text in given.items()})


def device_to_json(device: Device) -> dict[str, Any]:
    """Return all fields of a device as plain values."""
    return {name: getattr(device, name) for name in _DEVICE} | {"role": device.role.value}


def device_from_json(given: dict[str, Any]) -> Device:
    """Return the device that `device_to_json` has converted."""
    return Device(**given | {"role": Role(given["role"])})


def packed(column: Any, dtype: str) -> str:
    """Return an array, converted to `dtype`, as base64 of its bytes."""
    return base64.b64encode(np.ascontiguousarray(column, dtype).tobytes()).decode()


def unpacked(text: str, dtype: str) -> Any:
    """Return the array that `packed` has converted. Raises TypeError or ValueError for other input."""
    return np.frombuffer(base64.b64decode(text), dtype).copy()
