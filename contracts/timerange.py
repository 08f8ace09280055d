"""The range of times that MACE accepts: a file or a host may state any 64-bit number as a time."""

from __future__ import annotations

from typing import Final

from contracts.errors import WireError

LONGEST_NS: Final = 1 << 62
"""Largest distance of a monotonic time from 0: 146 years, so that the sum of two such times fits 64 bits. As UTC the
earliest such time is in the year 1824."""
LATEST_UTC_NS: Final = 7_258_118_400_000_000_000
"""Latest UTC time: the year 2200, 62 years before nanoseconds overflow 64 bits."""
LATEST_RECORDED_NS: Final = 1 << 62
"""Latest time of a recorded packet, on whatever clock: the year 2116 in UTC. The sum of two such times, such as a
window's start and its width, fits 64 bits. A later time is damage, or the clock was not set."""


def check_times(first_ns: int, last_ns: int, offset_ns: int) -> None:
    """Raise `WireError` unless the monotonic times, and the same times in UTC, are in the accepted range."""
    if not -LONGEST_NS <= first_ns <= last_ns <= LONGEST_NS:
        raise WireError(f"a time of {last_ns if last_ns > LONGEST_NS else first_ns} ns, which no clock can show")
    for time_ns in (first_ns, last_ns):
        if not -LONGEST_NS <= time_ns + offset_ns <= LATEST_UTC_NS:
            raise WireError(f"a time of {time_ns} ns, in UTC {time_ns + offset_ns} ns after 1970: is the clock wrong?")


def check_from(from_ns: int, offset_ns: int) -> None:
    """Raise `WireError` if the time from which a topology holds is too late; a time before 0 counts as 0."""
    check_times(max(from_ns, 0), max(from_ns, 0), offset_ns)
