"""The times that can be reckoned with: what a file or a host tells may be anything that 64 bits hold."""

from __future__ import annotations

from typing import Final

from mace.errors import WireError

LONGEST_NS: Final = 1 << 62
"""146 years, the furthest from 0 that a monotonic time may be: sums of two such fit 64 bits. UTC is then 1824 at the
earliest ..."""
LATEST_UTC_NS: Final = 7_258_118_400_000_000_000
"""... and at the latest 2200, 62 years before 64 bits of nanoseconds are full."""
LATEST_RECORDED_NS: Final = 1 << 62
"""The latest time of a recorded packet, whatever its clock: in UTC that is the year 2116. Sums of two such fit 64 bits,
as of a window's beginning and its length; later ones are of a clock that was not set, or of damage."""


def check_times(first_ns: int, last_ns: int, offset_ns: int) -> None:
    """Raises `WireError` unless monotonic times, and what they are in UTC, are times that 64 bits can reckon with."""
    if not -LONGEST_NS <= first_ns <= last_ns <= LONGEST_NS:
        raise WireError(f"a time of {last_ns if last_ns > LONGEST_NS else first_ns} ns, beyond what any clock tells")
    for time_ns in (first_ns, last_ns):
        if not -LONGEST_NS <= time_ns + offset_ns <= LATEST_UTC_NS:
            raise WireError(f"a time of {time_ns} ns, in UTC {time_ns + offset_ns} ns after 1970: is the clock wrong?")


def check_from(from_ns: int, offset_ns: int) -> None:
    """The same of a time from which something holds: however early that is, it makes no difference."""
    check_times(max(from_ns, 0), max(from_ns, 0), offset_ns)
