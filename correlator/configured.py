"""Makes the engine's settings from the configuration, for a live stream and for a recording."""

from dataclasses import replace
from typing import Final

from contracts.config import CorrelateConfig
from correlator.engine import EngineConfig

REPLAY_SLICE_NS: Final = 1_000_000_000
"""Slice of a replay: nobody waits for its next row, and a slice of few records costs as much as one of many."""


def live(config: CorrelateConfig) -> EngineConfig:
    """Return the settings for a live stream, in which each batch is processed when it arrives."""
    return EngineConfig(
        timeout_ns=config.timeout_ms * 1_000_000,
        whole_batches=True,
        open_records=config.open_records,
        rows=config.rows,
        stages=config.cpus,
        waiting=config.waiting,
    )


def replayed(config: CorrelateConfig) -> EngineConfig:
    """Return the settings for a recording, which is processed in slices of `REPLAY_SLICE_NS`."""
    return replace(live(config), slice_ns=REPLAY_SLICE_NS, whole_batches=False, waiting=False)
