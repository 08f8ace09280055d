"""Figures of which CPU works on packets: per stage and pair of CPUs, per CPU, and per container and direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from contracts.cpus import Measure
from contracts.figures import DevicePlace, Distribution
from contracts.schema import Direction

_S: float = 1e9


@dataclass(frozen=True, slots=True)
class StageCount:
    """What was counted of one measure at one device, in one direction, for one pair of CPUs."""

    place: DevicePlace
    owner_netns: str
    """Name of the network namespace of the container's own device."""
    direction: Direction
    measure: Measure
    cpu_queued: int
    cpu: int
    """-1 where the measure is of whole packets."""
    durations: Distribution


@dataclass(frozen=True, slots=True)
class CpuGrowth:
    """By how much a CPU's counters grew, between readings `span_ns` apart (several runs: summed)."""

    host: str
    cpu: int
    span_ns: int
    processed: int
    dropped: int
    squeezed: int


@dataclass(frozen=True, slots=True)
class SoftirqFigures:
    """The receive softirqs of one CPU."""

    host: str
    cpu: int
    count: int
    by_ksoftirqd: int
    """Of `count`, those in the task ksoftirqd."""
    run_ns: int
    """Sum of their runs."""
    lost: int
    """Events that the trace lost: some softirqs are in no count."""
    waits: Distribution
    """From raise to entry, where the raise was seen."""


@dataclass(slots=True)
class StageFigures:
    """One container's stages at one device in one direction, passed on by one CPU and run by one CPU."""

    owner: str
    """The container's name, or if it has none that of its network namespace."""
    place: DevicePlace
    direction: Direction
    cpu_queued: int
    cpu: int
    run: Distribution = field(default_factory=Distribution)
    wait: Distribution = field(default_factory=Distribution)
    packets: int = 0

    @property
    def moved(self) -> bool:
        """Whether another CPU ran the stage than passed the packet on."""
        return self.cpu_queued != self.cpu


@dataclass(frozen=True, slots=True)
class CpuFigures:
    """One CPU's packet work. `growth` and `softirqs` are None where the machine's counters were not stored."""

    host: str
    cpu: int
    stages: int
    """Stages with a known run."""
    busy_ns: int
    """Sum of their runs."""
    growth: CpuGrowth | None
    softirqs: SoftirqFigures | None


@dataclass(slots=True)
class ContainerFigures:
    """The packets of one container in one direction. Means and sums are of packets seen over their whole path."""

    host: str
    container: str
    netns: str
    """Name of the network namespace of a container without a name; else empty."""
    direction: Direction
    work: Distribution = field(default_factory=Distribution)
    """Each packet's time in all stages."""
    serial_ns: int = 0
    partial: int = 0
    """Packets that were not seen over their whole path, and are in no other figure."""
    stages: list[StageFigures] = field(default_factory=list)

    @property
    def packets(self) -> int:
        """Packets seen over their whole path."""
        return self.work.count

    def longest(self) -> tuple[str, float] | None:
        """Return the device whose stages have the longest mean run, and that mean, ns; None without a known run."""
        sums: dict[DevicePlace, tuple[int, int]] = {}
        for stage in self.stages:
            count, total = sums.get(stage.place, (0, 0))
            sums[stage.place] = count + stage.run.count, total + stage.run.sum_ns
        means = [(total / count, place.device) for place, (count, total) in sums.items() if count]
        return max(means)[::-1] if means else None

    def mean_work_ns(self) -> float:
        """Return the mean of `work`, ns; 0 without packets."""
        return self.work.sum_ns / self.work.count if self.work.count else 0.0

    def serial_share(self) -> float | None:
        """Return the part of the work that was on each packet's most used CPU, from 0 to 1; None without work."""
        return self.serial_ns / self.work.sum_ns if self.work.sum_ns else None

    def busiest(self) -> tuple[int, float] | None:
        """Return the CPU with most of the work, and its part, from 0 to 1; None without work."""
        of_cpu: dict[int, int] = {}
        for stage in self.stages:
            of_cpu[stage.cpu] = of_cpu.get(stage.cpu, 0) + stage.run.sum_ns
        total = sum(of_cpu.values())
        if not total:
            return None
        cpu = max(of_cpu, key=lambda one: (of_cpu[one], -one))
        return cpu, of_cpu[cpu] / total

    def bound_now(self) -> float | None:
        """Return the packets a second for which one CPU has the time; None without work."""
        mean = self.mean_work_ns()
        return _S / mean if mean else None

    def bound_pipelined(self) -> float | None:
        """Return the packets a second if each stage had a CPU of its own; None without a known run."""
        longest = self.longest()
        return _S / longest[1] if longest and longest[1] else None

    def gain(self) -> float | None:
        """Return how many times the rate spreading the stages over CPUs could allow at most; None if not known."""
        now, pipelined = self.bound_now(), self.bound_pipelined()
        return max(pipelined / now, 1.0) if now and pipelined else None

    def moved_per_packet(self) -> float:
        """Return the mean number of a packet's stages that moved to another CPU."""
        return sum(stage.packets for stage in self.stages if stage.moved) / self.packets if self.packets else 0.0

    def moved_wait_ns(self) -> int | None:
        """Return the median wait of stages that moved, ns; None if no such wait is known."""
        waits = Distribution()
        for stage in self.stages:
            if stage.moved:
                waits += stage.wait
        return int(waits.quantiles((0.5,))[0]) if waits.count else None

    def price_ns(self) -> float | None:
        """Return what moving stages cost a packet: stages moved times their median wait, ns; None if not known."""
        moved, wait = self.moved_per_packet(), self.moved_wait_ns()
        if not moved:
            return 0.0
        return None if wait is None else moved * wait

    def sentence(self) -> str:
        """Return the finding as one sentence."""
        who = f"{self.container or self.netns} {self.direction.name.lower()}"
        busiest, gain = self.busiest(), self.gain()
        if busiest is None or gain is None:
            return f"{who}: no packet was seen over its whole path, so it is not known which CPU does the work."
        wait = self.moved_wait_ns()
        moved = self.moved_per_packet()
        price = (
            "no packet with a known wait changed CPUs, so what a change costs is not known"
            if wait is None
            else f"each change of CPU costs {wait / 1000:.1f} µs, and a packet has {moved:.2f} of them"
        )
        return (
            f"{who}: {_percent(busiest[1])} of the work for these packets runs on CPU {busiest[0]}; spreading it over"
            f" CPUs would allow at most {gain:.1f} times the rate; {price}."
        )


@dataclass(frozen=True, slots=True)
class CpuReport:
    """All figures of a selection of packets."""

    stages: list[StageFigures]
    cpus: list[CpuFigures]
    containers: list[ContainerFigures]
    span_ns: dict[str, int]
    """Time measured on each host."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON: lists `stages`, `cpus`, `containers`; times in ns, unknown values null."""
        return {
            "stages": [stage_dict(one) for one in self.stages],
            "cpus": [self._cpu_dict(one) for one in self.cpus],
            "containers": [_container_dict(one) for one in self.containers],
        }

    def per_second(self, one: CpuFigures) -> tuple[float | None, float | None]:
        """Return a CPU's stages a second, and the part of its time that it worked on them; None without a span."""
        span = self.span_ns.get(one.host, 0)
        return (one.stages * _S / span, one.busy_ns / span) if span > 0 else (None, None)

    def _cpu_dict(self, one: CpuFigures) -> dict[str, Any]:
        rate, busy = self.per_second(one)
        growth = one.growth
        return {
            "host": one.host,
            "cpu": one.cpu,
            "stages": one.stages,
            "stages_per_s": rate,
            "busy_ns": one.busy_ns,
            "busy_share": busy,
            "packets_per_s": packets_per_s(growth),
            "squeezed": None if growth is None else growth.squeezed,
            "dropped": None if growth is None else growth.dropped,
            "softirqs": _softirq_dict(one.softirqs),
        }


def report(
    counts: Iterable[StageCount],
    growth: Sequence[CpuGrowth],
    softirqs: Sequence[SoftirqFigures],
    span_ns: dict[str, int],
) -> CpuReport:
    """Compute the figures from counts in path order. `span_ns` is the time measured on each host."""
    stages: dict[tuple[str, DevicePlace, Direction, int, int], StageFigures] = {}
    containers: dict[tuple[str, str, str, Direction], ContainerFigures] = {}
    for one in counts:
        place, durations = one.place, one.durations
        owner = (place.host, place.container, "" if place.container else one.owner_netns, one.direction)
        of = containers.setdefault(owner, ContainerFigures(*owner))
        if one.measure is Measure.WORK:
            of.work += durations
        elif one.measure is Measure.SERIAL:
            of.serial_ns += durations.sum_ns
        elif one.measure is Measure.PARTIAL:
            of.partial += durations.count
        else:
            key = (place.container or one.owner_netns, place, one.direction, one.cpu_queued, one.cpu)
            if key not in stages:
                stages[key] = StageFigures(*key)
                of.stages.append(stages[key])
            _count(stages[key], one.measure, durations)
    cpus = _cpus(stages.values(), growth, softirqs)
    return CpuReport(list(stages.values()), cpus, list(containers.values()), span_ns)


def _count(stage: StageFigures, measure: Measure, durations: Distribution) -> None:
    if measure is Measure.RUN:
        stage.run += durations
    else:
        stage.wait += durations
    if measure is not Measure.WAIT:
        stage.packets += durations.count


def _cpus(
    stages: Iterable[StageFigures], growth: Sequence[CpuGrowth], softirqs: Sequence[SoftirqFigures]
) -> list[CpuFigures]:
    grown = {(one.host, one.cpu): one for one in growth}
    softirqs_of = {(one.host, one.cpu): one for one in softirqs}
    busy: dict[tuple[str, int], tuple[int, int]] = dict.fromkeys([*grown, *softirqs_of], (0, 0))
    for stage in stages:
        key = (stage.place.host, stage.cpu)
        count, total = busy.get(key, (0, 0))
        busy[key] = count + stage.run.count, total + stage.run.sum_ns
    return [CpuFigures(*key, *busy[key], grown.get(key), softirqs_of.get(key)) for key in sorted(busy) if key[1] >= 0]


def packets_per_s(growth: CpuGrowth | None) -> float | None:
    """Return the packets a second that the kernel counted on a CPU; None if its counters are not known."""
    return growth.processed * _S / growth.span_ns if growth is not None and growth.span_ns else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _softirq_dict(one: SoftirqFigures | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "count": one.count,
        "by_ksoftirqd": one.by_ksoftirqd,
        "run_ns": one.run_ns,
        "lost": one.lost,
        "wait": _durations(one.waits),
    }


def stage_dict(one: StageFigures) -> dict[str, Any]:
    """Return the figures of a stage for JSON: an element of `stages` (`CpuReport.as_dict`)."""
    return {
        "host": one.place.host,
        "owner": one.owner,
        "container": one.place.container,
        "netns": one.place.netns,
        "device": one.place.device,
        "kind": one.place.kind,
        "direction": one.direction.name.lower(),
        "cpu_queued": one.cpu_queued,
        "cpu": one.cpu,
        "moved": one.moved,
        "packets": one.packets,
        "wait": _durations(one.wait),
        "run": _durations(one.run),
    }


def _durations(found: Distribution) -> dict[str, int] | None:
    if not found.count:
        return None
    p50, p99 = (int(each) for each in found.quantiles((0.5, 0.99)))
    return {"count": found.count, "sum_ns": found.sum_ns, "p50_ns": p50, "p99_ns": p99, "max_ns": found.max_ns}


def _container_dict(one: ContainerFigures) -> dict[str, Any]:
    longest, busiest = one.longest(), one.busiest()
    return {
        "host": one.host,
        "container": one.container,
        "netns": one.netns,
        "direction": one.direction.name.lower(),
        "packets": one.packets,
        "packets_partial": one.partial,
        "work_mean_ns": one.mean_work_ns(),
        "longest_stage": longest[0] if longest else None,
        "longest_stage_mean_ns": longest[1] if longest else None,
        "serial_share": one.serial_share(),
        "busiest_cpu": busiest[0] if busiest else None,
        "busiest_share": busiest[1] if busiest else None,
        "bound_now_per_s": one.bound_now(),
        "bound_pipelined_per_s": one.bound_pipelined(),
        "gain": one.gain(),
        "moved_per_packet": one.moved_per_packet(),
        "moved_wait_p50_ns": one.moved_wait_ns(),
        "price_ns": one.price_ns(),
        "sentence": one.sentence(),
    }
