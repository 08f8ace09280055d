"""Follows the tasks that read packets in containers, while a run lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from collector.ftrace.readers import ReaderTrace
from contracts.config import CorrelateConfig
from contracts.scheduling import ReadTasks


@asynccontextmanager
async def readers(config: CorrelateConfig) -> AsyncIterator[ReadTasks | None]:
    """Yield a function that reads the containers' tasks, if the configuration asks for it; otherwise None.

    Raises `Unavailable` or `SourceError` if tasks cannot be followed.
    """
    if not config.waiting:
        yield None
        return
    trace = ReaderTrace()
    trace.open()
    try:
        yield trace.reading
    finally:
        trace.close()
