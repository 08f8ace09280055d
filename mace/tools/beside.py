"""What runs beside a tool for its host RTT: the probes, and the tracer's cost that is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from contracts.config import CaptureConfig
from contracts.interfaces import StreamHeader, StreamSink
from contracts.schema import HookCost
from correlator.correction import Corrections
from correlator.samples import Samples
from mace.tools.calibration import Calibration, counted, kept
from mace.tools.corrected import Corrected
from mace.tools.host_probes import HostProbes
from mace.tools.host_rtt import Cost, ToolTimes, added_ns

_LATEST: Final = 512
"""Samples to which the probes are compared for a line; the figures at the end use all."""


class Beside:
    """The probes beside one run of a tool in the namespace of `netns_fd`, and the tracer's cost.

    With `probes` false no probes are sent.
    """

    def __init__(self, netns_fd: int, capture: CaptureConfig, *, probes: bool = True) -> None:
        self.probes = HostProbes(netns_fd, capture.host_netns)
        if not probes:
            self.probes.why_not = "--no-probes"
        self._cost: Calibration | None = None
        self._no_cost = ""
        """Why there is no cost of the source that is kept; known once the source is open."""
        self._times: deque[ToolTimes] = deque()

    def tee(self, sink: StreamSink | None) -> StreamSink:
        """Return the sink that the tool's capture needs, which passes the stream on to `sink`."""
        return self.probes.tee(sink, self._opened)

    def _opened(self, header: StreamHeader) -> None:
        self._cost, self._no_cost = kept(header.source)

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
        times, probes = ToolTimes.concatenate(self._times), self.probes
        found = added_ns(times, probes.probes, self._cost_now(costs), alone=probes.rarer)
        if found is None and probes.why_not and self._cost is not None:
            return self._cost.added_ns(probes.pace_s)
        return found

    def finished(self, found: Corrected) -> Corrected:
        """Return the result of the tool, which has ended, with the host RTT."""
        self.probes.harvest()
        cost = self._cost_now(found.summary.cost)
        warm = self._cost.at(0) if self._cost else cost
        no_cost = "" if cost else f"{self._no_cost}; mace calibrate measures it"
        return found.probed_by(self.probes, cost, warm, no_cost).calibrated_by(self._cost, self._no_cost)

    def _cost_now(self, costs: Sequence[HookCost]) -> Cost | None:
        return self._cost.at(self.probes.pace_s) if self._cost else counted(costs)
