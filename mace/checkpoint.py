"""An engine's state as JSON, for a replay that is to go on later. Data alone: nothing in it is ever run."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any

import numpy as np

from correlator.identity import ResolverState
from correlator.lives import Open, Records
from correlator.state import EngineState
from mace.topology import Device, Role, Sighting

_COLUMNS = {"ts": "<i8", "skb": "<u8", "place": "<i8", "length": "<u4", "key": "<u8", "trait": "u1"}


def state_to_json(state: EngineState) -> dict[str, Any]:
    """Plain values; arrays as base64 of their little-endian bytes."""
    records, resolver = state.open.records, state.resolver
    columns = {name: getattr(records, name) for name in _COLUMNS}
    return {
        "devices": [device_to_json(device) for device in resolver.devices],
        "serves": list(resolver.serves),
        "live": sorted(resolver.live),
        "gone": [list(pair) for pair in resolver.gone],
        "sightings": [[s.name, s.netns, s.ifindex] for s in resolver.sightings],
        "records": {n: _packed(c, _COLUMNS[n]) for n, c in columns.items() if c is not None},
        "number": _packed(state.open.number, "<i8"),
        "cross": _packed(state.open.cross, "?"),
        "gaps": [list(gap) for gap in state.gaps],
        "latest_ns": state.latest_ns,
    }


def state_from_json(given: dict[str, Any]) -> EngineState:
    """The state again. KeyError, TypeError or ValueError where it is none."""
    columns = {name: _unpacked(text, _COLUMNS[name]) for name, text in given["records"].items()}
    return EngineState(
        ResolverState(
            devices=tuple(device_from_json(device) for device in given["devices"]),
            serves=tuple(given["serves"]),
            live=frozenset(given["live"]),
            gone=tuple((number, since) for number, since in given["gone"]),
            sightings=tuple(Sighting(*each) for each in given["sightings"]),
        ),
        Open(Records(**columns), _unpacked(given["number"], "<i8"), _unpacked(given["cross"], "?")),
        [(start, end) for start, end in given["gaps"]],
        given["latest_ns"],
    )


def device_to_json(device: Device) -> dict[str, Any]:
    """All fields."""
    return asdict(device) | {"role": device.role.value}


def device_from_json(given: dict[str, Any]) -> Device:
    """The device again."""
    return Device(**given | {"role": Role(given["role"])})


def _packed(column: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(column, dtype).tobytes()).decode()


def _unpacked(text: str, dtype: str) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
