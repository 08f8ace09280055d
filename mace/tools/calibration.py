"""What `mace calibrate` measures once on a machine: the tracer's own cost, and the host path term, by pace.

A source's count of the time in its programs is not the whole cost: it leaves out the way into them, the caches that
they and the reader displace, and the reader's wake-ups. The cost is therefore the difference of round trips with the
whole of MACE running and with nothing tracing. Both are measured in a test network of our own, so that no other
network's changes are in it, in turns and at several paces, because cold programs cost several times as much as warm
ones:

    per record and pace = (median round trip, tracing - median round trip, not tracing) / records within a round trip

The term is that of `mace ping` in the same test network (`mace.tools.host_rtt`), without the far end's part. It serves
where no probe can be sent, as for a recording. Both are kept in a file, by source, with the host, the kernel and the
CPU for which they hold.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from platform import release
from typing import Any, Final

import numpy as np

from contracts.arrays import Ints
from contracts.errors import MaceError, Unavailable
from contracts.hooks import Hook
from contracts.interfaces import StreamHeader, StreamItem
from contracts.names import name_of_this_machine
from contracts.records import Batch
from contracts.schema import HookCost
from contracts.topology import Topology
from correlator import intervals
from mace.lab import HOST, REMOTE, Lab, Spec, running
from mace.live.session import Session
from mace.shown.terminal import PlainTable
from mace.tools.host_path import ProbeCollector
from mace.tools.host_probes import prober_command
from mace.tools.host_rtt import Cost

FILE: Final = Path("/var/lib/mace/calibration.json")
"""Where the calibrations are kept, by source."""
_VARIABLE: Final = "MACE_CALIBRATION"
"""Environment variable with another path."""
OLDEST_S: Final = 30 * 86_400
"""A calibration is not used for round trips that much later, or earlier."""
_COUNTED_ERROR: Final = 0.5
"""Standard error of a source's count, as a share of it: how much the count leaves out differs between machines."""
_PAYLOAD: Final = 48
_LENGTH: Final = 20 + 8 + _PAYLOAD
_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Pace:
    """A pace at which the cost is measured."""

    interval_s: float
    count: int
    """Round trips in a round."""


PACES: Final = (Pace(0, 400), Pace(0.01, 20), Pace(0.05, 12), Pace(0.2, 8))
TERM_PACES: Final = (Pace(0.01, 50), Pace(0.05, 20), Pace(0.2, 10))
"""Paces at which the host path term is measured, and the container's pings for each round. A flood has almost none."""
_SHORTEST_S: Final = 0.0001
"""Stands for the pace of a flood, in logarithms."""


@dataclass(frozen=True, slots=True)
class PaceCost:
    """The cost at one pace, ns per record."""

    interval_s: float
    per_event_ns: float
    low_ns: float
    """Ends of the 95 % interval."""
    high_ns: float
    events: float
    """Records within a round trip."""
    spread_ns: float = 0.0
    """Standard deviation between rounds: how far one run's cost is from the mean. Files of older versions lack it."""


@dataclass(frozen=True, slots=True)
class PaceTerm:
    """The host path term at one pace without the far end's part, ns."""

    interval_s: float
    term_ns: float
    low_ns: float
    """Ends of the 95 % interval."""
    high_ns: float
    pings: int
    """The host's pings that it comes from."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tracer's cost and host path term of one source on one machine."""

    source: str
    host: str
    kernel: str
    cpu: str
    utc_s: int
    """When it was measured."""
    paces: tuple[PaceCost, ...]
    """In ascending order of the interval."""
    terms: tuple[PaceTerm, ...] = ()
    """Likewise."""

    def at(self, interval_s: float) -> Cost:
        """Return the cost for requests at that distance: between two paces by the logarithm of the distance.

        Its error is that of one run, which finds the machine in one state of several, and not only that of the mean.
        """
        x = np.log([max(each.interval_s, _SHORTEST_S) for each in self.paces])
        where = np.log(max(interval_s, _SHORTEST_S))
        errors = [np.hypot((each.high_ns - each.low_ns) / 2 / _TWO_SIGMA, each.spread_ns) for each in self.paces]
        value = np.interp(where, x, [each.per_event_ns for each in self.paces])
        # A cost below zero is an error of the measurement.
        return Cost(
            dict.fromkeys(map(int, Hook), max(float(value), 0.0)), float(np.interp(where, x, errors)), measured=True
        )

    def of_round_trip(self, interval_s: float) -> intervals.Interval:
        """Return the cost in a whole round trip of the host at that distance, as it was in the test network, ns."""
        cost = self.at(interval_s)
        paces, counts = [each.interval_s for each in self.paces], [each.events for each in self.paces]
        events = float(np.interp(interval_s, paces, counts))
        middle, error = cost.of([(int(Hook.NETIF_RX),)])
        return _normal(middle * events, error * events)

    def term_at(self, interval_s: float) -> intervals.Interval | None:
        """Return the term for requests at that distance, ns, as `at` does; None below the shortest pace measured.

        Above the longest it is that of the longest, where all caches are cold.
        """
        if not self.terms or interval_s < self.terms[0].interval_s * _ABOUT:
            return None
        x = np.log([each.interval_s for each in self.terms])
        middle, low, high = (
            float(np.interp(np.log(interval_s), x, [getattr(each, name) for each in self.terms]))
            for name in ("term_ns", "low_ns", "high_ns")
        )
        return intervals.Interval(middle, low, high, 1)

    def added_ns(self, interval_s: float) -> float | None:
        """Return what term and cost add to lower bounds at that distance, ns; None below the shortest pace measured."""
        term = self.term_at(interval_s)
        return None if term is None else term.estimate - self.of_round_trip(interval_s).estimate

    def unusable(self, kernel: str, cpu: str, now_s: float) -> str:
        """Return why the calibration does not hold there and then; empty if it does."""
        if self.cpu != cpu:
            return f"it was measured on {self.cpu}, this is {cpu}"
        return self._elsewhere(kernel, now_s)

    def unusable_for(self, host: str, kernel: str, utc_s: float) -> str:
        """Return why the calibration does not hold for a recording of that host; empty if it does."""
        if self.host != host:
            return f"it was measured on {self.host}, and the recording is of {host}"
        return self._elsewhere(kernel, utc_s)

    def _elsewhere(self, kernel: str, utc_s: float) -> str:
        if self.kernel != kernel:
            return f"it was measured on Linux {self.kernel}, this is {kernel}"
        days = (utc_s - self.utc_s) / 86_400
        if not -OLDEST_S < utc_s - self.utc_s < OLDEST_S:
            when = "before" if days > 0 else "after"
            return f"it was measured {abs(days):.0f} days {when}, the limit is {OLDEST_S // 86_400}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Return the cost for JSON: the names of the fields."""
        return asdict(self)


_TWO_SIGMA: Final = 1.96
_ABOUT: Final = 0.8
"""ping's distances are a little shorter or longer than its option says."""


def _normal(middle: float, error: float) -> intervals.Interval:
    return intervals.Interval(middle, middle - _TWO_SIGMA * error, middle + _TWO_SIGMA * error, 1)


def cpu_model() -> str:
    """Return the model of the machine's CPUs; "unknown" if the kernel does not say."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def place() -> Path:
    """Return the path of the file with the costs."""
    return Path(os.environ.get(_VARIABLE) or FILE)


def kept(source: str) -> tuple[Calibration | None, str]:
    """Return the kept calibration of a source on this machine, and why there is none or why it is not used."""
    found, why_not = _read(source)
    why_not = why_not or (found.unusable(release(), cpu_model(), time.time()) if found else "")
    return (None, why_not) if why_not else (found, "")


def kept_for(header: StreamHeader) -> tuple[Calibration | None, str]:
    """Return the kept calibration for a recording, and why there is none or why it is not used."""
    found, why_not = _read(header.source)
    began_s = header.clock.utc_ns / 1e9
    why_not = why_not or (found.unusable_for(header.host, header.kernel, began_s) if found else "")
    return (None, why_not) if why_not else (found, "")


def _read(source: str) -> tuple[Calibration | None, str]:
    path = place()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["version"] != _VERSION:
            return None, f"{path} has version {told['version']}, this MACE knows {_VERSION}"
        if source not in told["sources"]:
            return None, f"it has not been measured for the source {source}"
        return _from_dict(told["sources"][source]), ""
    except FileNotFoundError:
        return None, "it has not been measured"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path} is not readable ({error})"


def keep(found: Calibration) -> None:
    """Keep the calibration of a source, beside those of other sources. Raises `Unavailable`."""
    path = place()
    others: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["version"] == _VERSION:
            others = dict(told["sources"])
    text = json.dumps({"version": _VERSION, "sources": others | {found.source: found.as_dict()}}, indent=1)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Unavailable(str(path), error.strerror or str(error), f"name another file in ${_VARIABLE}") from error


def _from_dict(told: dict[str, Any]) -> Calibration:
    paces = tuple(PaceCost(**{name: float(value) for name, value in pace.items()}) for pace in told["paces"])
    if not paces:
        raise ValueError("no pace")
    terms = tuple(
        PaceTerm(
            interval_s=float(term["interval_s"]),
            term_ns=float(term["term_ns"]),
            low_ns=float(term["low_ns"]),
            high_ns=float(term["high_ns"]),
            pings=int(term["pings"]),
        )
        for term in told["terms"]
    )
    texts = {name: str(told[name]) for name in ("source", "host", "kernel", "cpu")}
    return Calibration(**texts, utc_s=int(told["utc_s"]), paces=paces, terms=terms)


def counted(costs: Sequence[HookCost]) -> Cost | None:
    """Return the cost that a source has counted so far; None if it has not."""
    by_hook = {int(cost.hook): cost.ns_per_call for cost in costs if cost.timed}
    if not by_hook:
        return None
    return Cost(by_hook, _COUNTED_ERROR * float(np.mean(list(by_hook.values()))), measured=False)


def measured(
    source: str,
    session: Session,
    paces: Sequence[Pace],
    rounds: int,
    ping: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure cost and term of `source`, which `session` uses, in a test network of its own.

    `ping`: the command line of `mace ping` with this source, without lab, container and ping's arguments.

    Raises `MaceError` if the source cannot run, records nothing of the network, or the measurement is interrupted.
    """
    with running(Spec(name=f"cost-{os.getpid()}")) as lab:
        blocks = _Blocks(lab, paces)
        order = random.Random(1)
        for number in range(rounds):
            say(f"the tracer's cost: round {number + 1} of {rounds}")
            for tracing in order.sample((True, False), 2):
                if not tracing:
                    asyncio.run(blocks.run(tracing=False))
                    continue
                session.observe(lambda: blocks.run(tracing=True), lambda _: None, tee=blocks)
                if len(blocks.traced) <= number:
                    raise MaceError("interrupted while the tracer's cost was measured")
        terms = []
        for pace in TERM_PACES:
            count = rounds * pace.count
            say(f"the host path term: {count} pings every {pace.interval_s * 1000:g} ms")
            terms.append(_term(lab, pace.interval_s, count, ping))
    return Calibration(
        source, name_of_this_machine(), release(), cpu_model(), int(time.time()), blocks.costs(), tuple(terms)
    )


def _term(lab: Lab, interval_s: float, count: int, ping: Sequence[str]) -> PaceTerm:
    """Return the term that `mace ping` finds with so many pings at that interval."""
    options = ("--lab", lab.name, "--container", lab.containers[0], "--json")
    argv = (*ping, *options, "-n", "-c", str(count), "-i", f"{interval_s:g}", lab.address(REMOTE))
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise MaceError(f"mace ping failed in the test network: {last}")
    found = json.loads(done.stdout)
    path = found["host_path"]
    if path is None:
        raise MaceError(f"mace ping found no host path term in the test network: {found['no_host_rtt']}")
    far = path["far_end_ns"]
    low, high = path["term_ci95_ns"]
    return PaceTerm(interval_s, path["term_ns"] - far, low - far, high - far, path["probes"][0])


def tables(found: Calibration) -> tuple[PlainTable, PlainTable]:
    """Return cost and term as tables for people."""
    cost = PlainTable(f"What tracing with {found.source} adds, by the distance of requests, µs")
    term = PlainTable("Host path term without the far end's part, µs")
    for made, names in (
        (cost, ("per record", "95 %", "records", "round trip", "between rounds")),
        (term, ("term", "95 %", "pings")),
    ):
        made.add_column("every")
        for name in names:
            made.add_column(name, justify="right", no_wrap=True)
    for each in found.paces:
        cost.add_row(
            f"{each.interval_s * 1000:g} ms" if each.interval_s else "flood",
            f"{each.per_event_ns / 1000:.2f}",
            f"{each.low_ns / 1000:.2f} … {each.high_ns / 1000:.2f}",
            f"{each.events:.0f}",
            f"{each.per_event_ns * each.events / 1000:.1f}",
            f"±{each.spread_ns * each.events / 1000:.1f}",
        )
    for at in found.terms:
        ends = f"{at.low_ns / 1000:.1f} … {at.high_ns / 1000:.1f}"
        term.add_row(f"{at.interval_s * 1000:g} ms", f"{at.term_ns / 1000:.1f}", ends, str(at.pings))
    return cost, term


class _Blocks:
    """The round trips of all rounds. It is a sink of the stream, in which it counts the records within a round trip."""

    def __init__(self, lab: Lab, paces: Sequence[Pace]) -> None:
        self._lab, self._paces = lab, paces
        self._records = ProbeCollector()
        self.traced: list[list[float]] = []
        """Median round trips of each pace, ns, by round."""
        self._untraced: list[list[float]] = []
        self._trips: list[list[tuple[int, int]]] = [[] for _ in paces]
        """(time of sending, round trip) of the traced round trips by pace, until their records are counted."""
        self._events: list[list[int]] = [[] for _ in paces]
        self._busy = False

    async def run(self, *, tracing: bool) -> None:
        """Measure round trips at each pace."""
        # As in a run of ping: the first request resolves the address and is left out.
        found = []
        argv = self._lab.command(HOST, prober_command(self._lab.address(REMOTE), _PAYLOAD))
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for at, pace in enumerate(self._paces):
                # All lines are written before the first request, so that nothing of MACE wakes up for one.
                begin_ns = time.monotonic_ns() + 20_000_000
                step_ns = int(pace.interval_s * 1e9)
                dues = [begin_ns + n * step_ns for n in range(pace.count)] if step_ns else [begin_ns]
                count = 1 if step_ns else pace.count
                process.stdin.write("".join(f"{due} {count}\n" for due in dues).encode())
                trips: list[tuple[int, int]] = []
                for _ in dues:
                    told = json.loads(await process.stdout.readline())
                    if isinstance(told, str):
                        raise MaceError(f"a round trip in the test network failed: {told}")
                    trips += [(sent, rtt) for sent, rtt in told if rtt >= 0]
                if len(trips) < pace.count // 2:
                    raise MaceError("the test network's far end does not answer")
                found.append(float(np.median([rtt for _, rtt in trips[1:]])))
                if tracing:
                    self._trips[at] += trips
        finally:
            process.stdin.close()
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
        (self.traced if tracing else self._untraced).append(found)

    async def open(self, header: StreamHeader) -> None:
        """Nothing to do."""

    async def write(self, item: StreamItem) -> None:
        """Keep the records of the round trips' length."""
        if isinstance(item, Topology | Batch):
            self._records.add(item, _LENGTH)

    async def aclose(self) -> None:
        """Count the records within the round trips of this round."""
        whole = self._records.whole()
        for trips, events in zip(self._trips, self._events, strict=True):
            events += [len(whole.between(sent, sent + rtt).ts_ns) for sent, rtt in trips]
            trips.clear()
        self._records = ProbeCollector()

    def costs(self) -> tuple[PaceCost, ...]:
        """Return the cost at each pace. Raises `MaceError` if the source recorded none of the round trips."""
        found = []
        for at, pace in enumerate(self._paces):
            events = float(np.median(self._events[at]))
            if not events:
                raise MaceError("the source recorded none of the round trips in the test network")
            pairs = zip(self.traced, self._untraced, strict=True)
            differences = np.array([traced[at] - untraced[at] for traced, untraced in pairs]) / events
            interval = intervals.of_rounds(partial(_mean, differences), len(differences))
            assert interval is not None
            spread = float(np.std(differences, ddof=1))
            found.append(PaceCost(pace.interval_s, interval.estimate, interval.low, interval.high, events, spread))
        return tuple(found)


def _mean(differences: Any, drawn: Ints) -> float:
    return float(np.mean(differences[drawn]))
