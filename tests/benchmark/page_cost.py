"""What the page costs a measurement: `mace run --serve` with three viewers beside `mace run` alone, in turns.

serve_cost          cores above `mace run` alone, at 100,000 events/s
serve_cost_rss      MiB above `mace run` alone, at the peak
serve_cost_lost     events that the served runs lost
serve_cost_turns    turns of a viewer in which it read all views of its page, a second
serve_cost_rate     events/s of the served runs
"""

import http.client
import json
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from mace.lab import Spec, running
from tests.benchmark.figures import MACE, cpu_s, figure, folder, peak_mib
from tests.places import ROOT

RUN_S = 6.0
ROUNDS = 2
RATE_PPS = 5_600.0
"""Datagrams a second of each of two containers: at nine events each, somewhat more than 100,000 events/s."""
PAGES: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, ("overview", "sources", "runs")),
    ("c1", ("path", "time", "heat", "distributions", "devices", "round_trips", "packets", "sources")),
    ("c2", ("path", "time", "heat", "distributions", "devices", "round_trips", "packets", "sources")),
)
"""What three viewers have open: container and views, in the order in which `page.js` reads them."""


def run() -> list[dict[str, Any]]:
    alone, served = [], []
    for _ in range(ROUNDS):
        alone.append(_measured(viewed=False))
        served.append(_measured(viewed=True))
    base_cores, base_mib = (statistics.median(getattr(each, name) for each in alone) for name in ("cores", "mib"))
    return [
        figure("serve_cost", "cores", [each.cores - base_cores for each in served], "mace run alone", base_cores),
        figure("serve_cost_rss", "MiB", [each.mib - base_mib for each in served], "mace run alone", base_mib),
        figure(
            "serve_cost_lost",
            "events",
            [each.lost for each in served],
            "mace run alone",
            statistics.median(each.lost for each in alone),
        ),
        figure("serve_cost_turns", "turns/s", [each.turns / RUN_S / len(PAGES) for each in served]),
        figure("serve_cost_rate", "events/s", [each.records / RUN_S for each in served]),
    ]


@dataclass(slots=True)
class _Run:
    """What one `mace run` did in RUN_S seconds of packets."""

    cores: float
    mib: float
    records: int
    lost: int
    turns: int


def _measured(*, viewed: bool) -> _Run:
    with folder() as place, running(Spec(name="cost", containers=2)) as lab:
        options = ("--serve", "127.0.0.1:0") if viewed else ()
        argv = [*MACE, "run", "--lab", lab.name, "--source", "ftrace", "--store", str(place / "store"), "--json"]
        with subprocess.Popen(
            [*argv, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            try:
                assert process.stderr is not None
                port = int(re.findall(r":(\d+)/", process.stderr.readline())[0]) if viewed else 0
                while not (place / "store" / "runs").is_dir() and process.poll() is None:
                    time.sleep(0.05)
                time.sleep(0.5)
                before = cpu_s(process.pid)
                with _viewers(port) as viewers:
                    flows = [
                        lab.start_udp(name, count=100_000_000, rate_pps=RATE_PPS, duration_s=RUN_S, size=18)
                        for name in lab.containers
                    ]
                    for flow in flows:
                        flow.wait()
                    used, peak = cpu_s(process.pid) - before, peak_mib(process.pid)
                process.terminate()
                out, _ = process.communicate()
            finally:
                process.kill()
    ledger = json.loads(out)["ledger"]
    turns = sum(viewer.turns for viewer in viewers)
    return _Run(used / RUN_S, peak, ledger["records"], ledger["lost"] + ledger["discarded"], turns)


@contextmanager
def _viewers(port: int) -> Iterator[list["_Viewer"]]:
    viewers = [_Viewer(port, container, views) for container, views in PAGES] if port else []
    for viewer in viewers:
        viewer.start()
    try:
        yield viewers
    finally:
        for viewer in viewers:
            viewer.stop()


@dataclass(slots=True)
class _Viewer:
    """Reads as the page does: all views of the page, then again when an event says that the store has changed.

    It is no browser, whose own CPU time would take the measurement's from a machine of two cores.
    """

    port: int
    container: str | None
    views: tuple[str, ...]
    turns: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()

    def _follow(self) -> None:
        # When the run ends, it ends the connections.
        with (
            suppress(OSError, http.client.HTTPException),
            closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as stream,
        ):
            stream.request("GET", "/api/events")
            events = stream.getresponse()
            while not self._ended.is_set():
                if events.readline().startswith(b"data:"):
                    self._turn()

    def _turn(self) -> None:
        asked = urlencode({"container": self.container} if self.container else {})
        for view in self.views:
            if self._ended.is_set():
                return
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
                connection.request("GET", f"/api/{view}?{asked}")
                connection.getresponse().read()
        self.turns += 1
        # The page begins at most one turn a second.
        self._ended.wait(1.0)
