"""How far the host RTT of `mace ping` is from ping on the host with nothing tracing, by pace.

Each round has, in random order, ping on the host and `mace ping` in a container of the same test network. The bias is
the median over all rounds of `mace ping`'s median less that of the host's pings of the round. Coverage is the share of
rounds whose printed interval contains the host's median. `mace calibrate` has to have run before, or the tracer's cost
is the source's own count.
"""

import json
import random
import re
import subprocess
from typing import Any, NamedTuple

import numpy as np

from mace.lab import HOST, REMOTE, Lab, Spec, running
from mace.trials.rounds import dithered, median_us
from tests.benchmark.figures import figure
from tests.measuring import mace


class Pace(NamedTuple):
    """One pace of ping, and how much is measured at it."""

    name: str
    interval_s: float
    count: int
    rounds: int
    goal_us: float


PACES = (
    Pace("flood", 0, 30_000, 15, 1),
    Pace("10ms", 0.01, 200, 14, 3),
    Pace("50ms", 0.05, 60, 14, 4),
    Pace("200ms", 0.2, 40, 10, 4),
    Pace("1s", 1, 40, 4, 4),
)
_TIME = re.compile(r" time=([0-9.]+) ms")


def host_median_us(lab: Lab, pace: Pace) -> float:
    """Return the median of ping on the host."""
    argv = ["ping", "-n", "-c", str(pace.count), "-i", f"{pace.interval_s:g}", lab.address(REMOTE)]
    said = subprocess.run(lab.command(HOST, argv), capture_output=True, text=True, check=True).stdout
    return median_us([dithered(np.array([round(float(ms) * 1e6) for ms in _TIME.findall(said)]))])


def container(lab: Lab, pace: Pace, source: str) -> dict[str, Any]:
    """Return the JSON of `mace ping` in the container."""
    where = ("--lab", lab.name, "--container", "c1", "--source", source, "--json")
    done = mace("ping", *where, "-n", "-c", pace.count, "-i", f"{pace.interval_s:g}", lab.address(REMOTE))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def at(pace: Pace, source: str = "bpf") -> list[dict[str, Any]]:
    """Return the figures at one pace: bias of host RTT and of its lower bound, width of the interval, and coverage."""
    order = random.Random(1)
    bias, bound, width, covered = [], [], [], []
    with running(Spec(name="hostrtt")) as lab:
        for member in (HOST, "c1"):
            lab.ping(member, count=3)
        for _ in range(pace.rounds):
            if order.random() < 0.5:
                host_us, found = host_median_us(lab, pace), container(lab, pace, source)
            else:
                found = container(lab, pace, source)
                host_us = host_median_us(lab, pace)
            told = {name: row["median"] for name, row in found["statistics"].items()}
            if "host_rtt_ns" not in told:
                raise RuntimeError(f"no host RTT: {found['no_host_rtt']}")
            low, high = (told["host_rtt_ns"][end] / 1000 for end in ("low", "high"))
            bias.append(told["host_rtt_ns"]["estimate"] / 1000 - host_us)
            bound.append(told["host_rtt_lower_bound_ns"]["estimate"] / 1000 - host_us)
            width.append(high - low)
            covered.append(float(low <= host_us <= high))
    coverage = figure(f"host_rtt_coverage {pace.name}", "of 1", [sum(covered) / len(covered)], "goal", 0.9)
    return [
        figure(f"host_rtt_bias {pace.name}", "µs", bias, "goal, at most ±", pace.goal_us),
        figure(f"host_rtt_lower_bound_bias {pace.name}", "µs", bound),
        figure(f"host_rtt_interval {pace.name}", "µs", width),
        coverage | {"n": len(covered)},
    ]


def run() -> list[dict[str, Any]]:
    """Return the figures at all paces."""
    return [row for pace in PACES for row in at(pace)]
