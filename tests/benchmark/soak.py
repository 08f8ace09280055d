"""`./dev soak`: half an hour of load with every kind of fault; the account of rows must stay exact.

    made-up results, 100,000 records/s ──► pipeline's sinks ──► faulty proxy ──► InfluxDB 1.6.7
                                                      └──► Prometheus endpoint

The time is divided into phases, each with one fault: none, the server away, killed by SIGKILL every 5 s, its disk full,
429, 500, lines that it refuses, silence, cut connections, lost answers. Memory, file descriptors, spool and account are
sampled once a second. At the end the rows in the database are counted and compared. The output is one JSON line per
phase, and one with the verdict. The exit status is 1 if a row is missing, twice in the database or in no category, or
if the sink had to drop any.

    ./dev soak                          30 minutes
    ./dev soak --minutes 5 --plot soak.png
    ./dev soak --minutes 20 --fault away    ten minutes of one fault, and ten to recover
    ./dev soak --of mqtt                transport over a broker instead: tests/benchmark/soak_mqtt.py

Not a test: no CI runs it. Needs root for the small disk, and influxd.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from contracts.config import Config, InfluxConfig, PrometheusConfig, SinksConfig
from contracts.errors import UsageError
from contracts.vitals import Account, Vitals, process_figures
from storage import wanted_sinks
from tests import servers
from tests.benchmark import soak_mqtt
from tests.benchmark.soaking import STEP_S, Pace, chosen, halves, plot
from tests.database_proxy import Proxy, proxied
from tests.made_results import HEADER, START_NS, make_delays, make_results, topology
from tests.places import PROGRAM_PATH

CONTAINERS = 2
DISK = "1500m"
ROWS_PER_RECORD = 0.5
"""Rows per record: a packet of 14 records gives 6 or 7 rows."""
BLOCKS = 64
"""Number of different batches made beforehand; each is used again and again at later times."""


class DatabaseFaults:
    """The faults of the phases. `work` runs until the phase ends; `plan` is the plan of the proxy."""

    def __init__(self, server: servers.Influx, proxy: Proxy, disk: Path) -> None:
        self.server, self.proxy, self.disk = server, proxy, disk
        self.chance = random.Random(1)
        self.phases: dict[str, Any] = {
            "none": self.none, "away": self.away, "killed": self.killed, "disk full": self.disk_full,
            "429": self.answers(429), "500": self.answers(500), "refused lines": self.refused,
            "silence": self.answers("hang"), "cut": self.answers("cut"), "lost answers": self.answers("lost"),
        }  # fmt: skip

    async def none(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def away(self, seconds: float) -> None:
        await asyncio.to_thread(self.server.stop)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.server.start)

    async def killed(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(self.chance.uniform(0, 5))
            self.server.kill()
            await asyncio.to_thread(self.server.start)

    async def disk_full(self, seconds: float) -> None:
        await asyncio.to_thread(fill, self.disk / "filler")
        await asyncio.sleep(seconds)
        (self.disk / "filler").unlink()
        # InfluxDB repairs its write-ahead log after a full disk only when it starts.
        await asyncio.to_thread(self.server.stop)
        await asyncio.to_thread(self.server.start)

    async def refused(self, seconds: float) -> None:
        self.proxy.spoiled = (b"777i,l3_len",)  # one row in a thousand
        await asyncio.sleep(seconds)
        self.proxy.spoiled = ()

    def answers(self, what: int | str) -> Any:
        async def work(seconds: float) -> None:
            # Three of four requests, so that some get through.
            self.proxy.plan = lambda number: what if number % 4 else None
            await asyncio.sleep(seconds)
            self.proxy.plan = lambda number: None
            self.proxy.release.set()
            self.proxy.release.clear()

        return work


def fill(path: Path) -> None:
    with path.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()


class ResultsFeed(Pace):
    """Feeds results at a given rate."""

    def __init__(self, records_per_s: int) -> None:
        packets = int(records_per_s * ROWS_PER_RECORD * STEP_S * 2 / 13)
        self.blocks = [
            make_delays(packets, containers=CONTAINERS, seed=n, gap_ns=int(STEP_S * 1e9 / packets / 1.6))
            for n in range(BLOCKS)
        ]
        self.devices = topology(CONTAINERS)
        self.rows = 0

    async def run(self, sinks: Any, vitals: Vitals, stop: asyncio.Event) -> None:
        def give(step: int) -> Any:
            shift = int(step * STEP_S * 1e9)
            block = self.blocks[step % BLOCKS]
            delays = type(block)(
                **{name: getattr(block, name) for name in block._DTYPES}
                | {"utc_ns": block.utc_ns + shift, "packet": block.packet + (step << 44)}
            )
            results = make_results(
                delays, devices=self.devices, packets=1, upto_utc_ns=START_NS + shift + int(STEP_S * 1e9)
            )
            vitals.got_on(items=1, results=1)

            async def write() -> None:
                for sink in sinks:
                    await sink.write(results)
                self.rows += len(delays)

            return write

        await self.keep(stop, give)


async def soak(args: argparse.Namespace, server: servers.Influx, proxy: Proxy, disk: Path, place: Path) -> Any:
    config = Config(
        sinks=SinksConfig(
            influxdb=InfluxConfig(
                url=proxy.url, spool=str(place / "spool"), spool_mib=2048, retry_max_s=2.0, timeout_s=5.0, close_s=300.0
            ),
            prometheus=PrometheusConfig(listen="127.0.0.1:0"),
        )
    )
    vitals = Vitals()
    sinks = wanted_sinks(config, vitals)
    for sink in sinks:
        await sink.open(HEADER)
    account = vitals.accounts["influxdb"]
    feed, stop, notes = ResultsFeed(args.records), asyncio.Event(), []
    faults = DatabaseFaults(server, proxy, disk)
    begin = time.monotonic()

    async def note() -> None:
        while not stop.is_set():
            assert account.imbalance == 0
            notes.append({"s": time.monotonic() - begin} | process_figures() | account.as_dict())
            await asyncio.sleep(1)

    feeding, noting = asyncio.create_task(feed.run(sinks, vitals, stop)), asyncio.create_task(note())
    phases = chosen(faults.phases, args.fault)
    each_s = args.minutes * 60 / (2 * len(phases))
    for name, fault in phases * args.turns:
        seconds = each_s * 2 / args.turns
        await fault(seconds / 2)
        await faults.none(seconds / 2)
        print(json.dumps(phase(name, account, notes[-1])), flush=True)
    stop.set()
    await asyncio.gather(feeding, noting)
    for sink in reversed(sinks):
        await sink.aclose()
    return account, feed, notes


def phase(name: str, account: Account, note: dict[str, float]) -> dict[str, Any]:
    told = ("taken", "stored", "waiting", "refused", "dropped_buffer", "dropped_spool", "retries", "spool_bytes")
    figures = {name: getattr(account, name) for name in told}
    memory = {"resident_mib": round(note["resident_bytes"] / 2**20, 1), "open_files": note["open_files"]}
    return {"phase": name, "s": round(note["s"]), **figures, **memory}


def verdict(server: servers.Influx, account: Account, feed: ResultsFeed, notes: list[Any]) -> dict[str, Any]:
    rows = server.rows()
    stored = sum(rows.values())
    return {
        "ok": stored == account.stored and account.imbalance == account.waiting == account.dropped_buffer == 0,
        "rows_in_database": stored,
        "stored": account.stored,
        "given": feed.rows,
        "refused": account.refused,
        "not_stored": account.not_stored,
        "waiting": account.waiting,
        "imbalance": account.imbalance,
        "retries": account.retries,
        **feed.told(),
        "spool_peak_mib": round(max(n["spool_bytes"] for n in notes) / 2**20, 1),
        "resident_mib": halves(notes, "resident_bytes", 2**20),
        "open_files": halves(notes, "open_files"),
    }


PANELS = {
    "memory, MiB": [("resident_bytes", "", 2**20)],
    "file descriptors": [("open_files", "", 1)],
    "spool, MiB": [("spool_bytes", "", 2**20)],
    "rows, millions": [(name, name, 1e6) for name in ("taken", "stored", "waiting")],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev soak", description="the remote sinks under every fault, for long")
    parser.add_argument("--of", choices=("influxdb", "mqtt"), default="influxdb", help="what is put to the test")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N")
    parser.add_argument("--records", type=int, default=100_000, metavar="N", help="records a second")
    parser.add_argument("--turns", type=int, default=1, metavar="N", help="times through all faults")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME", help="this one only (repeatable)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of it")
    args = parser.parse_args()
    if args.of == "mqtt":
        if os.geteuid() != 0 or shutil.which("mosquitto", path=PROGRAM_PATH) is None:
            print("soak: needs root and mosquitto", file=sys.stderr)
            return 2
        return soak_mqtt.run(args)
    if os.geteuid() != 0 or servers.influxd() is None:
        print("soak: needs root and influxd", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mace-soak-") as name, ExitStack() as leaving:
        place = Path(name)
        disk = place / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk], check=True)
        leaving.callback(subprocess.run, ["umount", disk], check=True)
        server = leaving.enter_context(servers.running(servers.Influx(disk / "influx")))
        proxy = leaving.enter_context(proxied(server))
        account, feed, notes = asyncio.run(soak(args, server, proxy, disk, place))
        found = verdict(server, account, feed, notes)
    print(json.dumps(found), flush=True)
    if args.plot:
        plot(notes, PANELS, args.plot)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UsageError as error:
        print(f"soak: {error}", file=sys.stderr)
        raise SystemExit(2) from None
