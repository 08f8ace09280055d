"""How much longer: an estimate that is honest about what it knows.

The pace is that of the last minute, so that a slower stretch (denser traffic, a busy machine) shows; before any of a
minute's worth is known it is that of all so far, and before `KNOWN_AFTER_S` there is none. What was done before this
process began (a replay that is resumed) says nothing about pace.
"""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 60.0
KNOWN_AFTER_S: Final = 2.0
"""Starting up takes part of the first second or two; a pace from it would promise too much time, or too little."""
_STEP_S: Final = 0.25
"""Points kept are at least as far apart: 240 for the window."""


class Remaining:
    """Fed with how much is done at what time; the clock is the caller's."""

    def __init__(self, total: int, done: int, now_s: float) -> None:
        self._total = total
        self._points: deque[tuple[float, int]] = deque([(now_s, done)])

    def update(self, done: int, now_s: float) -> None:
        """So much is done by now; never less than before."""
        if now_s - self._points[-1][0] >= _STEP_S or done >= self._total:
            self._points.append((now_s, done))
        while len(self._points) > 2 and self._points[1][0] <= now_s - WINDOW_S:
            self._points.popleft()

    def seconds(self, now_s: float) -> float | None:
        """From `now_s` to the end at the pace of late; None where that is not known."""
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        if last >= self._total:
            return 0.0
        elapsed = last_s - first_s
        if elapsed < KNOWN_AFTER_S or last <= first:
            return None
        # What has gone by since the last point was work as well, at the same pace as far as anyone knows.
        return max((self._total - last) * elapsed / (last - first) - (now_s - last_s), 0.0)


def told(seconds: float | None) -> str:
    """For people: `1:02:03`, `4:05`, or `-:--` where it is not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
