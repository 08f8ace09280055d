"""JSON that every parser reads: RFC 8259 has no NaN and no Infinity, Unicode text has no lone surrogates.

NaN and infinities become null. The text is ASCII, so that no name in it can act as a terminal's control sequence.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

from contracts.names import text


def dumps(value: Any, *, spaced: bool = False) -> str:
    """Return the value as one line of JSON, with spaces for people if `spaced`.

    Raises `TypeError` for a type that JSON cannot represent, like `json.dumps`.
    """
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
        # A subclass of float, such as numpy.float64.
        return float(value) if isfinite(value) else None
    return value
