"""Reads this machine's counters of packet work, and follows its softirqs, while a run lasts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from collector.ftrace.softirqs import SoftirqTrace
from collector.machine import softnet
from contracts.config import CorrelateConfig
from contracts.cpus import CpuReadings

_INTERVAL_S: Final = 0.2
"""Interval at which the softirqs' rings are emptied; they hold a second of 70,000 softirqs."""


@asynccontextmanager
async def cpu_readings(config: CorrelateConfig) -> AsyncIterator[Callable[[], CpuReadings] | None]:
    """Yield a function that reads the CPUs, as the configuration asks for it; None if it does not.

    Raises `Unavailable` or `SourceError` if the softirqs cannot be followed.
    """
    if not config.cpus:
        yield None
    elif not config.softirqs:
        yield lambda: CpuReadings(softnet.counters())
    else:
        trace = SoftirqTrace()
        trace.open()
        following = asyncio.create_task(_follow(trace))
        try:
            yield lambda: CpuReadings(softnet.counters(), trace.taken())
        finally:
            following.cancel()
            try:
                with suppress(asyncio.CancelledError):
                    await following
            finally:
                trace.close()


async def _follow(trace: SoftirqTrace) -> None:
    while True:
        await asyncio.sleep(_INTERVAL_S)
        trace.read()
