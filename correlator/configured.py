"""The engine's settings out of the configuration, for a live stream and for a recording."""

from dataclasses import replace
from typing import Final

from contracts.config import CorrelateConfig
from correlator.engine import EngineConfig

REPLAY_SLICE_NS: Final = 1_000_000_000
"""Nobody waits for a replay's next row, and a slice costs the same with few records in it as with many."""


def live(config: CorrelateConfig) -> EngineConfig:
    """For a live stream: each batch is worked on as it comes."""
    return EngineConfig(
        timeout_ns=config.timeout_ms * 1_000_000,
        whole_batches=True,
        open_records=config.open_records,
        rows=config.rows,
    )


def replayed(config: CorrelateConfig) -> EngineConfig:
    """For a recording: in slices of `REPLAY_SLICE_NS`."""
    return replace(live(config), slice_ns=REPLAY_SLICE_NS, whole_batches=False)
