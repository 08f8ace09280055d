"""The host RTT: what a process on the host would have measured with nothing tracing, estimated with probes.

    host RTT = lower bound + host path term - tracer's cost

The *lower bound* of a sample is the tool's RTT less the time in the container's devices (`correlator.correction`). The
*host path term* (`mace.tools.host_path`) is what a host's packet takes longer on the rest of the way; the *tracer's
cost* (`mace.tools.calibration`) is what the records within a host's round trip have added to it. Both are one number
for a run. The stretches of the term come from here:

    stretch        host                  container
    send           probes of the host    probes of the container: the tool's clock is read outside the kernel
    device, far    probes of the host    the tool's own packets, which have the same records

Below a pace of 20 ms probes are many times rarer than the tool's packets, and find caches that are as warm as the
tool's only in part. There the container's side of each stretch is its probes.

The interval of the median is a bootstrap of all three: each draw draws samples (in blocks, `correlator.intervals`),
probes of the host, probes of the container, and the cost. It is widened by Student's t for few probes, and by the
method's own error: where packets are rare, a probe finds colder caches than a host's tool does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from contracts.arrays import Floats, Mask
from contracts.schema import NOT_TOLD
from correlator import intervals
from correlator.correction import Corrections, Reason
from correlator.samples import Samples
from mace.tools.host_path import Probe

FEWEST: Final = 3
"""Fewest probes of each side for a term."""
RARE_ERROR_NS: Final = 8_000.0
"""Standard error of the method itself where packets are rare, as `host_rtt_bias` found it (docs/design/011)."""
PROBER, CALIBRATION = "prober", "calibration"
_DRAWS: Final = 1000
_MOST_SAMPLES: Final = 400
"""Samples in a draw. More are thinned evenly, and the deviations of their medians divided by the root of the ratio."""
_SEED: Final = 20190722


@dataclass(frozen=True, slots=True)
class Cost:
    """What tracing adds to a round trip for the records within it."""

    per_record_ns: Mapping[int, float]
    """By hook; a hook that is missing costs as much as the others on average."""
    error_ns: float
    """Standard error of these times, which all share it."""
    measured: bool
    """Whether it is the difference of round trips with and without tracing; otherwise the source has counted it."""

    def of(self, records: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """Return the mean cost of round trips with records of these hooks, and its standard error, ns."""
        average = float(np.mean(list(self.per_record_ns.values())))
        counts = Counter(hook for each in records for hook in each)
        total = sum(count * self.per_record_ns.get(hook, average) for hook, count in counts.items())
        return total / len(records), self.error_ns * sum(counts.values()) / len(records)


@dataclass(frozen=True, slots=True)
class ToolTimes:
    """Columns of a tool's paired samples without duplicates, in the order of sending, ns."""

    lower_bound: Floats
    device: Floats
    """Of the request, at the outer device: from the queue to the driver."""
    nic: Floats

    @classmethod
    def of(cls, samples: Samples, corrections: Corrections) -> ToolTimes:
        """Return the columns. RTTs in whole units of the tool's resolution are spread evenly over that unit."""
        rows = paired(samples, corrections)
        rows = rows[np.argsort(corrections.sent_utc_ns[rows], kind="stable")]
        found = corrections[rows]
        # What the two overheads and the NIC RTT leave of the time from the request's to the reply's record.
        device = found.arrived_utc_ns - found.sent_utc_ns - found.egress_ns - found.ingress_ns - found.nic_rtt_ns
        spread = spread_evenly(samples.resolution_ns[rows])
        return cls(found.host_rtt_lower_bound_ns + spread, device.astype(np.float64), found.nic_rtt_ns.astype(float))

    def __len__(self) -> int:
        return len(self.lower_bound)

    @classmethod
    def concatenate(cls, parts: Iterable[ToolTimes]) -> ToolTimes:
        """Return the rows of all parts, of which there is at least one."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def __getitem__(self, rows: Any) -> ToolTimes:
        return ToolTimes(self.lower_bound[rows], self.device[rows], self.nic[rows])


def paired(samples: Samples, corrections: Corrections) -> Any:
    """Return the rows of paired samples without duplicate replies, int64."""
    chosen: Mask = (corrections.reason == Reason.PAIRED) & ~samples.duplicate
    return np.flatnonzero(chosen)


def spread_evenly(resolution_ns: Any) -> Floats:
    """Return moves by less than half a unit each, as many up as down: medians of whole units jump by one unit.

    They are multiples of the golden ratio, modulo one, and not random.
    """
    moves = (np.arange(1, len(resolution_ns) + 1) * ((5**0.5 - 1) / 2)) % 1.0 - 0.5
    found: Floats = moves * resolution_ns
    return found


@dataclass(frozen=True, slots=True)
class HostRtt:
    """The host path term and the tracer's cost of one run."""

    send_ns: float
    """Stretches of the term: host less container."""
    device_ns: float
    far_ns: float
    """0 if the far end is on another machine."""
    probes: tuple[int, int]
    """Probes of the host and of the container with records on their whole way."""
    probed_by: str
    """"prober" for a term by the probes beside the tool, "calibration" for one that was kept."""
    cost_ns: float | None
    """The tracer's cost in a host's round trip; None if it is not known, and then not subtracted."""
    median: intervals.Interval
    """The samples' median host RTT."""
    term: intervals.Interval
    cost: intervals.Interval | None
    cost_measured: bool
    """Whether the cost was measured; otherwise the source has counted it, which leaves out a part."""
    in_devices_ns: tuple[float, float] | None
    """What the records within egress and ingress have added to these at least; None if that is not known."""

    @property
    def term_ns(self) -> float:
        """The whole term."""
        return self.send_ns + self.device_ns + self.far_ns

    @property
    def added_ns(self) -> float:
        """What is added to each sample's lower bound."""
        return self.term_ns - (self.cost_ns or 0.0)

    @property
    def cost_and_error_ns(self) -> tuple[int, int]:
        """The tracer's cost, and the half width of its interval; `NOT_TOLD` twice if it is not known."""
        if self.cost_ns is None or self.cost is None:
            return NOT_TOLD, NOT_TOLD
        return round(self.cost_ns), round((self.cost.high - self.cost.low) / 2)

    def around(self, mean: intervals.Interval) -> intervals.Interval:
        """Return a figure of host RTTs with the errors of term and cost in its interval, which has the samples' alone.

        These errors are independent, so that the width is the root of the sum of squares.
        """
        low, high = self.term.estimate - self.term.low, self.term.high - self.term.estimate
        if self.cost is not None:
            low = np.hypot(low, self.cost.high - self.cost.estimate)
            high = np.hypot(high, self.cost.estimate - self.cost.low)
        low, high = np.hypot(low, mean.estimate - mean.low), np.hypot(high, mean.high - mean.estimate)
        return intervals.Interval(mean.estimate, mean.estimate - float(low), mean.estimate + float(high), mean.block)

    def as_dict(self) -> dict[str, Any]:
        """Return term and cost for JSON.

        The keys are term_ns, term_ci95_ns, send_ns, device_ns, far_end_ns, tracer_cost_ns, tracer_cost_ci95_ns and
        tracer_cost_by ("calibration" or "source"; None if the cost is unknown), added_ns (host RTT less lower bound),
        probes (of host and container), probed_by ("prober" or "calibration"), and egress_tracer_cost_ns and
        ingress_tracer_cost_ns (contained in these overheads at least; None if unknown).
        """
        ends = intervals.bounds(self.cost)
        return {
            "term_ns": round(self.term_ns),
            "term_ci95_ns": [round(end) for end in (self.term.low, self.term.high)],
            "send_ns": round(self.send_ns),
            "device_ns": round(self.device_ns),
            "far_end_ns": round(self.far_ns),
            "tracer_cost_ns": None if self.cost_ns is None else round(self.cost_ns),
            "tracer_cost_ci95_ns": ends and [round(end) for end in ends],
            "tracer_cost_by": None if self.cost is None else "calibration" if self.cost_measured else "source",
            "added_ns": round(self.added_ns),
            "probes": list(self.probes),
            "probed_by": self.probed_by,
            "egress_tracer_cost_ns": self.in_devices_ns and round(self.in_devices_ns[0]),
            "ingress_tracer_cost_ns": self.in_devices_ns and round(self.in_devices_ns[1]),
        }

    def line(self) -> str:
        """Return term and cost as one line for people."""
        far = f" far end={_signed(self.far_ns)}" if self.far_ns else ""
        parts = f"send={_signed(self.send_ns)} device={_signed(self.device_ns)}{far}"
        probes = f"{self.probes[0]} host and {self.probes[1]} container probes"
        if self.probed_by == CALIBRATION:
            parts, probes = "by mace calibrate", "a far end on this machine would add to it"
        cost = "the tracer's own cost is not known and not subtracted"
        if self.cost_ns is not None and self.cost is not None:
            by = "measured" if self.cost_measured else "as the source counts it"
            cost = f"tracer's cost, {by}, {self.cost_ns / 1000:.1f} µs ({_ends(self.cost)}) subtracted"
        if self.in_devices_ns is not None:
            out, back = (f"{ns / 1000:.1f}" for ns in self.in_devices_ns)
            cost += f"; egress and ingress contain {out} and {back} µs of tracing at least"
        return (
            f"host RTT = lower bound {_signed(self.added_ns)} µs: host path term {_signed(self.term_ns)} µs "
            f"({_ends(self.term)}; {parts}; {probes}), {cost}"
        )


def _signed(ns: float) -> str:
    return f"{ns / 1000:+.1f}"


def _ends(found: intervals.Interval) -> str:
    return f"{_signed(found.low)} … {_signed(found.high)}"


def added_ns(tool: ToolTimes, probes: Sequence[Probe], cost: Cost | None, *, alone: bool = False) -> float | None:
    """Return what to add to lower bounds, ns, by what is known so far; None with fewer than `FEWEST` probes a side.

    `alone`: probes are compared with one another alone.
    """
    sides = _Sides.of(probes, alone=alone)
    if sides is None or not len(tool):
        return None
    return sum(sides.term(tool)) - (cost.of(sides.records)[0] if cost else 0.0)


def estimate(
    tool: ToolTimes,
    probes: Sequence[Probe],
    cost: Cost | None,
    warm: Cost | None = None,
    *,
    alone: bool = False,
    method_error_ns: float = 0.0,
) -> HostRtt | None:
    """Return term and cost; None with fewer than `FEWEST` probes a side, or fewer than `intervals.FEWEST` samples.

    `warm` is the cost of records that follow others, such as those within the overheads. `alone`: probes are compared
    with one another alone. `method_error_ns`: standard error of the method itself, which no draw of probes shows.
    """
    sides = _Sides.of(probes, alone=alone)
    if sides is None or len(tool) < intervals.FEWEST:
        return None
    send, device, far = sides.term(tool)
    cost_ns, cost_error_ns = cost.of(sides.records) if cost else (None, 0.0)
    random = np.random.default_rng(_SEED)
    host, container = (_medians(random, columns) for columns in (sides.host, sides.container))
    wider = _wider(min(len(sides.host), len(sides.container)))
    # Columns of the draws: send, device, far, as deviations from the medians.
    columns = np.array([1, 1, sides.far_here])
    probe_draws = (host @ columns - container @ (columns * [1, alone, alone])) * wider
    tool_draws, bound_draws = _tool_draws(random, tool, far_here=sides.far_here)
    if alone:
        tool_draws = np.zeros(_DRAWS)
    cost_draws = random.standard_normal(_DRAWS) * cost_error_ns
    probe_draws = probe_draws + random.standard_normal(_DRAWS) * method_error_ns
    term_ns = send + device + far
    middle = float(np.median(tool.lower_bound)) + term_ns - (cost_ns or 0.0)
    median = _interval(middle, probe_draws + tool_draws + bound_draws - cost_draws)
    term = _interval(term_ns, probe_draws + tool_draws)
    told = None if cost_ns is None else _interval(cost_ns, cost_draws)
    counts = (len(sides.host), len(sides.container))
    return HostRtt(
        send, device, far, counts, PROBER, cost_ns, median, term, told, bool(cost and cost.measured),
        _in_devices(probes, warm),
    )  # fmt: skip


def calibrated(tool: ToolTimes, term: intervals.Interval, cost: intervals.Interval) -> HostRtt | None:
    """Return a term and a cost that were measured before; None with fewer than `intervals.FEWEST` samples."""
    if len(tool) < intervals.FEWEST:
        return None
    random = np.random.default_rng(_SEED)
    _, bound_draws = _tool_draws(random, tool, far_here=False)
    term_draws, cost_draws = (
        random.standard_normal(_DRAWS) * (each.high - each.low) / 2 / NormalDist().inv_cdf(0.5 + intervals.LEVEL / 2)
        for each in (term, cost)
    )
    middle = float(np.median(tool.lower_bound)) + term.estimate - cost.estimate
    median = _interval(middle, bound_draws + term_draws - cost_draws)
    return HostRtt(term.estimate, 0.0, 0.0, (0, 0), CALIBRATION, cost.estimate, median, term, cost, True, None)


def _in_devices(probes: Sequence[Probe], warm: Cost | None) -> tuple[float, float] | None:
    """Return what tracing adds to egress and ingress, by the container's probes; None if there are none."""
    inside = [p for p in probes if p.inside]
    if warm is None or not inside:
        return None
    return warm.of([p.egress for p in inside])[0], warm.of([p.ingress for p in inside])[0]


@dataclass(frozen=True, slots=True)
class _Sides:
    """The probes of both sides."""

    host: Floats
    """One row per probe: send, device, far."""
    container: Floats
    far_here: bool
    """Whether the far end is on this machine."""
    alone: bool
    """Whether probes are compared with one another alone, on every stretch."""
    records: list[tuple[int, ...]]
    """Hooks of the records within each host probe's round trip."""

    @classmethod
    def of(cls, probes: Sequence[Probe], *, alone: bool) -> _Sides | None:
        outside = [p for p in probes if not p.inside]
        inside = [p for p in probes if p.inside]
        if min(len(outside), len(inside)) < FEWEST:
            return None
        far_here = sum(p.far_ns >= 0 for p in outside) > len(outside) // 2
        if far_here:
            outside, inside = ([p for p in side if p.far_ns >= 0] for side in (outside, inside))
        host, container = (
            np.array([(p.send_ns, p.device_ns, p.far_ns) for p in side], np.float64) for side in (outside, inside)
        )
        if min(len(host), len(container)) < FEWEST:
            return None
        return cls(host, container, far_here, alone, [p.hooks for p in outside])

    def term(self, tool: ToolTimes) -> tuple[float, float, float]:
        """Return the stretches of the term: send, device, far."""
        container = np.median(self.container, axis=0)
        if not self.alone:
            container[1:] = np.median(tool.device), np.median(tool.nic)
        send, device, far = (np.median(self.host, axis=0) - container).tolist()
        return send, device, far if self.far_here else 0.0


def _medians(random: np.random.Generator, rows: Floats) -> Floats:
    """Return the columns' medians of draws of the rows, less the medians of the rows: shape (draws, columns)."""
    drawn = random.integers(0, len(rows), (_DRAWS, len(rows)))
    found: Floats = np.median(rows[drawn], axis=1) - np.median(rows, axis=0)
    return found


def _tool_draws(random: np.random.Generator, tool: ToolTimes, *, far_here: bool) -> tuple[Floats, Floats]:
    """Return deviations of draws of blocks of samples: of the tool's part of the term, and of the lower bound."""
    step = -(-len(tool) // _MOST_SAMPLES)
    thin = tool[::step]
    block = intervals.block_length(thin.lower_bound)
    count = len(thin)
    begins = random.integers(0, count, (_DRAWS, -(-count // block)))
    rows = ((begins[:, :, None] + np.arange(block)) % count).reshape(_DRAWS, -1)

    def deviations(values: Floats) -> Floats:
        found: Floats = (np.median(values[rows], axis=1) - np.median(values)) / np.sqrt(step)
        return found

    rest = -deviations(thin.device)
    if far_here:
        rest = rest - deviations(thin.nic)
    return rest, deviations(thin.lower_bound)


def _wider(count: int) -> float:
    """Return by how much the percentiles of drawn medians of few values are too narrow."""
    tail = 0.5 + intervals.LEVEL / 2
    return intervals.student_t(tail, count - 1) / NormalDist().inv_cdf(tail) * float(np.sqrt(count / (count - 1)))


def _interval(middle: float, deviations: Floats) -> intervals.Interval:
    tail = (1 - intervals.LEVEL) / 2
    low, high = np.quantile(deviations, [tail, 1 - tail])
    return intervals.Interval(middle, min(middle, middle + float(low)), max(middle, middle + float(high)), 1)
