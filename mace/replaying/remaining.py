"""Estimates the remaining time of a replay.

The pace is that of the last minute, so that a slower stretch (denser traffic, a busy machine) shows. In the first
minute it is the pace since the start, and before `KNOWN_AFTER_S` there is no estimate. The bytes that a process before
the resume has done do not count for the pace.
"""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 60.0
KNOWN_AFTER_S: Final = 2.0
"""No estimate before this time: the start-up takes part of the first second or two and would distort the pace."""
_STEP_S: Final = 0.25
"""Minimum distance of the points that are kept: 240 for the window."""


class Remaining:
    """The estimate, from amounts done at times of the caller's clock."""

    def __init__(self, total: int, done: int, now_s: float) -> None:
        self._total = total
        self._points: deque[tuple[float, int]] = deque([(now_s, done)])

    def update(self, done: int, now_s: float) -> None:
        """Note the amount done at `now_s`, which never decreases."""
        if now_s - self._points[-1][0] >= _STEP_S or done >= self._total:
            self._points.append((now_s, done))
        while len(self._points) > 2 and self._points[1][0] <= now_s - WINDOW_S:
            self._points.popleft()

    def seconds(self, now_s: float) -> float | None:
        """Return the seconds from `now_s` to the end at the recent pace; None if the pace is not known."""
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        if last >= self._total:
            return 0.0
        elapsed = last_s - first_s
        if elapsed < KNOWN_AFTER_S or last <= first:
            return None
        # The time since the last point was spent on work too, at the same pace for all that is known.
        return max((self._total - last) * elapsed / (last - first) - (now_s - last_s), 0.0)


def told(seconds: float | None) -> str:
    """Format seconds for people: `1:02:03`, `4:05`, or `-:--` for None."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
