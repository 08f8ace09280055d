"""The command line of `prober.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, Literal

_SCRIPT: Final = Path(__file__).with_name("prober.py")
_MARGIN_S: Final = 30
_SLOWEST_NS: Final = 10_000_000
"""Of a request with its reply, on a machine that has other things to do."""


def command(
    mode: Literal["probes", "trips"], address: str, count: int, interval_ns: int, payload_bytes: int
) -> list[str]:
    """To be run in a member's namespace; ends with one JSON list of `count` numbers, as `prober.py` says."""
    limit_s = int(count * (interval_ns + _SLOWEST_NS) / 1e9) + _MARGIN_S
    words = (mode, address, count, interval_ns, payload_bytes, limit_s)
    return [sys.executable, "-I", "-S", str(_SCRIPT), *map(str, words)]
