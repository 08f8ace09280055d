"""JSON that every parser reads: RFC 8259 knows no NaN and no Infinity, and Unicode no lone surrogates.

A number that is none becomes null. The text is ASCII: nothing in it can be a terminal's command, whatever the names in
it are.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

from contracts.names import text


def dumps(value: Any, *, spaced: bool = False) -> str:
    """The value on one line, `spaced` for people. TypeError for what JSON has no form for, as from `json.dumps`."""
    return json.dumps(_strict(value), separators=(", ", ": ") if spaced else (",", ":"), allow_nan=False)


def _strict(value: Any) -> Any:
    kind = type(value)
    if kind is str:
        return text(value)
    if kind is float:
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {text(k) if isinstance(k, str) else k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float):
        # A subclass, as numpy's are.
        return float(value) if isfinite(value) else None
    return value
