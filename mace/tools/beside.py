"""What runs beside a tool for its host RTT: the probes, and the tracer's cost that is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from contracts.config import CaptureConfig
from contracts.schema import HookCost
from correlator.correction import Corrections
from correlator.samples import Samples
from mace.live.first import name_of
from mace.tools.corrected import Corrected
from mace.tools.host_probes import HostProbes
from mace.tools.host_rtt import Cost, ToolTimes, added_ns
from mace.tools.tracer_cost import TracerCost, counted, kept

_LATEST: Final = 512
"""Samples to which the probes are compared for a line; the figures at the end use all."""


class Beside:
    """The probes beside one run of a tool, and the tracer's cost if it is kept; otherwise `no_cost` says why not."""

    def __init__(self, probes: HostProbes, cost: TracerCost | None = None, no_cost: str = "") -> None:
        self.probes = probes
        self._cost, self._no_cost = cost, no_cost
        self._times: deque[ToolTimes] = deque()

    @classmethod
    def of(cls, netns_fd: int, capture: CaptureConfig, *, probes: bool = True) -> Beside:
        """Return what runs beside a tool in the namespace of `netns_fd`, under a capture with that configuration.

        With `probes` false no probes are sent, and no cost is needed.
        """
        beside = HostProbes(netns_fd, capture.host_netns)
        if not probes:
            beside.why_not = "--no-probes"
            return cls(beside)
        return cls(beside, *kept(name_of(capture)))

    def added_ns(self, samples: Samples, corrections: Corrections, costs: Sequence[HookCost]) -> float | None:
        """Return what turns the lower bound of further samples into the host RTT, ns; None if that is not known yet.

        `costs`: what the source has counted so far.
        """
        times = ToolTimes.of(samples, corrections)[-_LATEST:]
        if len(times):
            self._times.append(times)
        if not self._times:
            return None
        while len(self._times) > 1 and sum(map(len, self._times)) - len(self._times[0]) >= _LATEST:
            self._times.popleft()
        return added_ns(
            ToolTimes.concatenate(self._times), self.probes.probes, self._cost_now(costs), alone=self.probes.rarer
        )

    def finished(self, found: Corrected) -> Corrected:
        """Return the result of the tool, which has ended, with the host RTT."""
        self.probes.harvest()
        cost = self._cost_now(found.summary.cost)
        warm = self._cost.at(0) if self._cost else cost
        no_cost = "" if cost else f"{self._no_cost}; mace calibrate measures it"
        return found.probed_by(self.probes, cost, warm, no_cost)

    def _cost_now(self, costs: Sequence[HookCost]) -> Cost | None:
        return self._cost.at(self.probes.pace_s) if self._cost else counted(costs)
