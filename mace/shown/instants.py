"""Times that people write: ISO 8601, or an age."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from contracts.errors import UsageError

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def instant_ns(text: str, now: datetime) -> int:
    """Parse an ISO 8601 time (UTC if it has no zone) or an age (`90s`, `5m`, `2h`, `1d`, `1w`); returns UTC, ns.

    Raises `UsageError`.
    """
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        when = now - timedelta(seconds=float(age[1]) * _UNITS_S[age[2]])
    else:
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(
                f"{text!r} is no time: expected a time like 2025-06-15T15:04:05, or an age like 90s, 5m, 2h, 1d"
            ) from None
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
    since_epoch = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (since_epoch // timedelta(microseconds=1)) * 1000
