"""The command line of `prober.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

_SCRIPT: Final = Path(__file__).with_name("prober.py")
_MARGIN_S: Final = 30
_SLOWEST_NS: Final = 10_000_000
"""Upper bound on the time for one request and its reply on a busy machine, for the time limit."""


def command(address: str, count: int, interval_ns: int, payload_bytes: int) -> list[str]:
    """Return the command line that runs `prober.py`, which prints one JSON list of `count` round trips in ns.

    The command is to be run in a member's namespace.
    """
    limit_s = int(count * (interval_ns + _SLOWEST_NS) / 1e9) + _MARGIN_S
    words = (address, count, interval_ns, payload_bytes, limit_s)
    return [sys.executable, "-I", "-S", str(_SCRIPT), *map(str, words)]
