"""Chooses the results of some containers, for a source that yields the records of all packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from collector.live.places import is_called
from contracts.config import CaptureConfig
from contracts.results import Results
from contracts.topology import Device


class OfContainers:
    """Keeps the delays of the configured containers' packets, at all devices.

    A container that matched once is known by its id from then on, under any name. Totals stay those of all packets: a
    delay that is left out is neither lost nor unmatched.
    """

    def __init__(self, config: CaptureConfig) -> None:
        self._names = config.containers
        self._ids: set[str] = set()
        self._kept: list[bool] = []
        """For each of a result's devices: whether its delays are kept."""

    def __call__(self, results: Results) -> Results:
        """Return the results with the rows of the chosen packets only. A run's results have to come in order."""
        rows = results.rows
        kept = self._mask(rows.devices)
        delays, windows, crossings = rows.delays, rows.windows, rows.crossings
        of_place = np.array([kept[place.device] for place in rows.places], np.bool_)
        chosen = replace(
            rows,
            stages=rows.stages[of_place[rows.stages.column("device")]] if len(rows.stages) else rows.stages,
            delays=delays[kept[delays.device]],
            windows=windows[kept[windows.column("device")]],
            crossings=crossings[kept[crossings.device]],
        )
        return replace(results, rows=chosen)

    def _mask(self, devices: Sequence[Device]) -> npt.NDArray[np.bool_]:
        self._kept += map(self._keeps, devices[len(self._kept) :])
        return np.array(self._kept, np.bool_)

    def _keeps(self, device: Device) -> bool:
        kept = device.container_id in self._ids or any(is_called(name, device) for name in self._names)
        if kept and device.container_id:
            self._ids.add(device.container_id)
        return kept


def everything(results: Results) -> Results:
    """Return the results unchanged."""
    return results


def chooser(config: CaptureConfig, *, after_reading: bool) -> Callable[[Results], Results]:
    """Return the function that chooses results: `everything`, unless packets are chosen `after_reading`."""
    return OfContainers(config) if after_reading else everything
