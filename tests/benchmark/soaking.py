"""Parts that both soaks share: the choice of faults, the pace of the feed, the test for growth, the plot."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from contracts.errors import UsageError, nearest

STEP_S = 0.05


def chosen(phases: dict[str, Any], names: list[str]) -> list[tuple[str, Any]]:
    """Return the chosen faults, or all; raises `UsageError` for an unknown one."""
    for name in names:
        if name not in phases:
            raise UsageError(f"no fault {name!r}{nearest(name, phases)}; there are {', '.join(phases)}")
    return [(name, fault) for name, fault in phases.items() if not names or name in names]


class Pace:
    """Paces a feed by a step every `STEP_S`, and records the duration and lateness of steps."""

    longest_write_s = 0.0
    late_s = 0.0

    async def keep(self, stop: asyncio.Event, give: Callable[[int], Callable[[], Awaitable[None]]]) -> None:
        """Run the steps. `give(step)` prepares the data that is due and returns a function that hands it over.

        Only that function is timed.
        """
        begin, step = time.monotonic(), 0
        while not stop.is_set():
            write = give(step)
            before = time.monotonic()
            await write()
            self.longest_write_s = max(self.longest_write_s, time.monotonic() - before)
            step += 1
            self.late_s = max(self.late_s, time.monotonic() - begin - step * STEP_S)
            await asyncio.sleep(max(begin + step * STEP_S - time.monotonic(), 0))

    def told(self) -> dict[str, float]:
        return {"longest_write_ms": round(self.longest_write_s * 1e3, 1), "feed_late_s": round(self.late_s, 2)}


def halves(notes: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> dict[str, float]:
    """Return the maxima of the first and the second half; equal maxima show that a quantity does not grow."""
    values = [each[name] / scale for each in notes]
    half = len(values) // 2
    return {"first half": round(max(values[:half]), 1), "second half": round(max(values[half:]), 1)}


def plot(notes: Sequence[dict[str, Any]], panels: dict[str, list[tuple[str, str, float]]], path: Path) -> None:
    """Plot samples over time; for each panel's label, the name, legend and scale of its lines are given."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [n["s"] / 60 for n in notes]
    figure, axes = plt.subplots(len(panels), 1, sharex=True, figsize=(9, 8))
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, legend, scale in lines:
            axis.plot(minutes, [n[name] / scale for n in notes], label=legend)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        if len(lines) > 1:
            axis.legend()
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
