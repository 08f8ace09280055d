"""Delay that observing adds to a round trip: the module against ftrace and against no observer.

In one lab on one kernel a container sends pings, each as soon as the one before is answered, in rounds of random order:
without observer; with ftrace recording the eight events of the hook table; with the module recording the same. The
rings are not read meanwhile, so that the figure is the cost of the probes to the packet, on both sides. A round's
figure is the median of its round trips, to the nanosecond (ping itself prints microseconds). Where modules cannot be
loaded, the benchmark runs in a virtual machine, whose times are an emulator's: there only ratios are meaningful.
"""

import json
import os
import platform
import random
import statistics
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

from collector.ftrace import tracefs
from contracts.errors import Unavailable
from contracts.hooks import TRACEPOINTS, Hook
from mace.lab import Lab, Spec, running
from tests.benchmark.figures import figure
from tests.kernel import build, kernels, vm
from tests.kernel.guest.reader import Session
from tests.places import ROOT

ROUNDS = 16
PINGS = 3_000
WARM_UP = 500
"""Round trips of the warm-up, not measured: an emulator translates code anew after tracepoints are switched."""
CPU = 1
"""CPU of the client, and so of the whole round trip: the way to the remote and back runs in one softirq."""
KERNEL = "6.12"
"""Kernel of the virtual machine."""
SEED = 20
GUEST = ("tests.benchmark.kmod", "rounds.json")

CLIENT = """
import os, socket, statistics, sys, time
os.sched_setaffinity(0, {int(sys.argv[4])})
ping = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
ping.settimeout(5)
ping.connect((sys.argv[1], 0))
# RFC 792, with the identifier 1: type, code, checksum, identifier, sequence number.
requests = [
    bytes([8, 0, *(0xF7FE - n).to_bytes(2, "big"), 0, 1, *n.to_bytes(2, "big")]) + bytes(56)
    for n in range(int(sys.argv[2]))
]
times = []
for request in requests:
    begin = time.perf_counter_ns()
    ping.send(request)
    reply = ping.recv(200)
    times.append(time.perf_counter_ns() - begin)
    assert reply[20] == 0 and reply[24:28] == request[4:8], "not the reply"
print(statistics.median(times[int(sys.argv[3]):]))
"""
"""Client that sends echo requests to an address, and prints the median round trip in ns without the warm-up."""


class Ftrace:
    """Observes with ftrace: the events of the hook table, into rings that hold a whole round."""

    def __enter__(self) -> Self:
        self._instance = tracefs.Instance.create(tracefs.find())
        self._instance.set_clock("mono")
        self._instance.set_ring_size(16 * 1024, None)
        for info in TRACEPOINTS:
            self._instance.enable(info.tracepoint)
        self._instance.record(on=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._instance.record(on=False)
        self._instance.remove()


class Module:
    """Observes with the module: every packet at every hook; afterwards it has the records written and their cost."""

    records = 0
    timed = 0
    timed_ns = 0
    by_hook: ClassVar[dict[str, tuple[int, int]]] = {}
    """Hook -> (calls, mean ns of a timed call), by the module's own count."""

    def __enter__(self) -> Self:
        self._session = Session().setup(subbufs=256, watermark=256, flush_ms=10_000)
        self._before = self._session.cost()
        self._session.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._session.stop()
        stats, cost = self._session.stats(), self._session.cost()
        self._session.close()
        if stats["lost"].any():
            raise RuntimeError("the ring is too small for a round")
        self.records = int(stats["written"].sum())
        self.timed = int(cost["timed"].sum() - self._before["timed"].sum())
        self.timed_ns = int(cost["timed_ns"].sum() - self._before["timed_ns"].sum())
        of_hook = {name: cost[name] - self._before[name] for name in ("calls", "timed", "timed_ns")}
        self.by_hook = {
            Hook(hook).name: (int(of_hook["calls"][hook]), round(float(of_hook["timed_ns"][hook] / timed)))
            for hook, timed in enumerate(of_hook["timed"])
            if timed
        }


def round_trip_ns(lab: Lab, count: int) -> float:
    """Return the median of `count` round trips from the container, after a warm-up."""
    numbers = map(str, (WARM_UP + count, WARM_UP, CPU))
    client = lab.popen("c1", [sys.executable, "-c", CLIENT, lab.address("remote"), *numbers])
    output, errors = client.communicate()
    if client.returncode:
        raise RuntimeError(errors)
    return float(output)


def rounds() -> dict[str, Any]:
    """Return observer -> median round trip of each round, ns, and the module's own count of its cost."""
    kinds: dict[str, type[Ftrace | Module | nullcontext[None]]] = {
        "none": nullcontext,
        "ftrace": Ftrace,
        "module": Module,
    }
    order = random.Random(SEED)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    records, timed, own_ns = 0, 0, 0
    with running(Spec(name="rounds")) as lab:
        round_trip_ns(lab, 100)
        for _ in range(ROUNDS):
            for kind in order.sample(list(kinds), len(kinds)):
                observed: AbstractContextManager[Any] = kinds[kind]()
                with observed:
                    found[kind].append(round_trip_ns(lab, PINGS))
                if isinstance(observed, Module):
                    records += observed.records
                    timed += observed.timed
                    own_ns += observed.timed_ns
    return {
        "rtt_ns": found,
        "kernel": platform.release(),
        "records_per_ping": records / ROUNDS / (WARM_UP + PINGS),
        "own_ns": own_ns / timed,
    }


def in_guest(module: str, result: str, release: str = KERNEL, *, counted: bool) -> dict[str, Any]:
    """Run `python -m module` in a virtual machine and return its file `result`; `counted`: 1 ns is one instruction."""
    kernel = kernels.fetch(release)
    built = build.build(kernel)
    with tempfile.TemporaryDirectory(prefix="mace-bench-") as place:
        script = f"insmod {built.module} && exec {sys.executable} -m {module}"
        done = vm.boot(kernel, ["sh", "-c", script], cwd=ROOT, timeout_s=900, results=Path(place), counted=counted)
        if not done.good:
            raise RuntimeError(done.report())
        found: dict[str, Any] = json.loads((Path(place) / result).read_text())
        return found


def versus_ftrace() -> list[dict[str, Any]]:
    """Target: the module adds at most half of what ftrace adds."""
    if Path("/proc/modules").exists():
        if not Path("/dev/mace").exists():
            raise Unavailable("kmod", "the module is not loaded", "mace module build, mace module load")
        return _figures("kmod", "ns", "this machine", rounds())
    if (why := vm.missing()) is not None:
        raise Unavailable("kmod", why, "./dev test-kernel installs it")
    return [
        *_figures("kmod", "ns", "emulated", in_guest(*GUEST, counted=False)),
        # The emulator's clock counts instructions: there is no noise, but no cost of caches and branches either.
        *_figures("kmod_counted", "instructions", "emulated", in_guest(*GUEST, counted=True)),
    ]


def _figures(name: str, unit: str, machine: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    rtt = found["rtt_ns"]
    bare = statistics.median(rtt["none"])
    module = [value - bare for value in rtt["module"]]
    ftrace = statistics.median(rtt["ftrace"]) - bare
    a_record = found["records_per_ping"]
    figures = [
        figure(f"{name}_vs_ftrace", f"{unit} added to a round trip", module, "ftrace", ftrace),
        figure(f"{name}_bare", f"{unit} of a round trip", rtt["none"]),
        figure(f"{name}_record", f"{unit} per record", [m / a_record for m in module], "ftrace", ftrace / a_record),
        figure(f"{name}_record_by_its_own_count", f"{unit} per record", [found["own_ns"]]),
    ]
    return [each | {"kernel": found["kernel"], "machine": machine} for each in figures]


if __name__ == "__main__":
    results = Path(os.environ.get("MACE_GUEST_RESULTS", "."))
    (results / "rounds.json").write_text(json.dumps(rounds()))
