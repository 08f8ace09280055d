"""`./dev soak --of mqtt`: a host, a broker and an ingest under load, each away, killed, stuck or full in turn.

    made-up records, 100,000/s ──► publisher, spool ──► faulty link ──► mosquitto ──► `mace ingest` ──► store
                                        └── small disk                                       └── small disk

The time is divided into phases, each with one fault: none; the broker away, killed by SIGKILL every 5 s, suspended
(SIGSTOP); the ingest away, killed, suspended; both killed; connections cut in the middle of a message; the disk of the
ingest full, then the host's. The fault lasts for the first half of each phase. An ingest that ends is restarted a
second later, as systemd would.

Memory, files, spool and account are sampled once a second. At the end the store's ledger is compared with the records
given: every record is stored or counted as discarded, by host and store alike; the files have as many rows as the
ledger states, and the windows count each row once. There is no equivalent of HTTP's answers (429, 500, 400): a broker
either accepts a message or does not.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb

from contracts.config import MqttConfig
from contracts.records import Batch
from contracts.vitals import process_figures
from storage import segments
from storage.broker import Brokers
from storage.mqtt import StreamPublisher
from storage.query import StoreReader
from tests.benchmark.figures import MACE, resident_mib
from tests.benchmark.soaking import STEP_S, Pace, chosen, halves, plot
from tests.brokers import Mosquitto, mosquitto
from tests.made_capture import HEADER, TOPOLOGY, traffic
from tests.places import ROOT

BLOCK = 1_000_000
"""Number of records made beforehand; they are used again and again at later times."""
STORE_DISK, HOST_DISK = "3g", "512m"
HOST_FULL_S = 20.0
"""How long the host's disk is full: less than a minute, because a host keeps 16 MiB of records, a minute, in memory."""
EVERY_S = 5.0
CUT_BYTES = 400_000


class BrokerLink:
    """Link between host and broker: passes bytes on and, while `cutting`, closes each connection after some bytes."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.cutting = False
        self.cuts = 0
        self._chance = random.Random(3)
        self._server: asyncio.Server | None = None

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
            ways = [
                asyncio.create_task(self._copy(reader, far_writer)),
                asyncio.create_task(self._copy(far_reader, writer)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.close()
        writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._chance.randrange(CUT_BYTES)
        while data := await reader.read(1 << 16):
            if self.cutting and left < len(data):
                writer.write(data[:left])
                await writer.drain()
                self.cuts += 1
                return
            left -= len(data) if self.cutting else 0
            writer.write(data)
            await writer.drain()


class Served:
    """Runs `mace ingest` as a process, and restarts it when it ends, until it is stopped."""

    def __init__(self, broker: Mosquitto, store: Path, log: Path) -> None:
        self._argv = [*MACE, "ingest", "--broker", broker.url, "--store", str(store)]
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = True
        self.starts = 0

    async def supervise(self) -> None:
        while True:
            if self.wanted and (self.process is None or self.process.poll() is not None):
                self._start()
            await asyncio.sleep(1)

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._argv, cwd=ROOT, stdout=log, stderr=log)
        self.starts += 1

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def end(self) -> int:
        """End the ingest with SIGTERM, and return its exit status."""
        self.wanted = False
        self.signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, 120) if self.process is not None else 0

    def resident_mib(self) -> float:
        if self.process is None or self.process.poll() is not None:
            return 0.0
        # A process that has just ended has no memory.
        with contextlib.suppress(OSError, StopIteration):
            return resident_mib(self.process.pid)
        return 0.0


class BrokerFaults:
    """The faults of the phases; each restores everything at its end."""

    def __init__(self, broker: Mosquitto, served: Served, link: BrokerLink, disks: tuple[Path, Path]) -> None:
        self.broker, self.served, self.link = broker, served, link
        self.store_disk, self.host_disk = disks
        self.chance = random.Random(1)
        self.phases: dict[str, Any] = {
            "none": asyncio.sleep, "broker away": self.broker_away, "broker killed": self.killing(broker=True),
            "broker stuck": self.broker_stuck, "ingest away": self.ingest_away,
            "ingest killed": self.killing(ingest=True), "ingest stuck": self.ingest_stuck,
            "both killed": self.killing(broker=True, ingest=True), "connections cut": self.cut,
            "disk of the ingest full": self.store_full, "disk of the host full": self.host_full,
        }  # fmt: skip

    async def broker_away(self, seconds: float) -> None:
        await asyncio.to_thread(self.broker.stop)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.broker.start)

    async def broker_stuck(self, seconds: float) -> None:
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.broker.process.send_signal(signal.SIGCONT)

    async def ingest_away(self, seconds: float) -> None:
        await self.served.end()
        await asyncio.sleep(seconds)
        self.served.wanted = True

    async def ingest_stuck(self, seconds: float) -> None:
        self.served.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.served.signal(signal.SIGCONT)

    def killing(self, *, broker: bool = False, ingest: bool = False) -> Any:
        async def work(seconds: float) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await asyncio.sleep(self.chance.uniform(0, EVERY_S))
                if ingest:
                    self.served.signal(signal.SIGKILL)
                if broker:
                    await asyncio.to_thread(self.broker.kill)
                    await asyncio.to_thread(self.broker.start)

        return work

    async def cut(self, seconds: float) -> None:
        self.link.cutting = True
        await asyncio.sleep(seconds)
        self.link.cutting = False

    async def store_full(self, seconds: float) -> None:
        await full(self.store_disk, seconds)

    async def host_full(self, seconds: float) -> None:
        await full(self.host_disk, min(seconds, HOST_FULL_S))


async def full(disk: Path, seconds: float) -> None:
    """Keep a disk full for some seconds, including space that is freed meanwhile."""
    await asyncio.to_thread(keep_full, disk / "filler", seconds)


def keep_full(filler: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                while time.monotonic() < until:
                    file.write(bytes(1 << 20))
            time.sleep(0.2)
    filler.unlink()


class RecordsFeed(Pace):
    """Feeds records at a given rate."""

    def __init__(self, records_per_s: int) -> None:
        self.whole = traffic(BLOCK)
        self.step = int(records_per_s * STEP_S)
        # As long as the records of a block take at this rate.
        stretch = BLOCK / records_per_s * 1e9 / int(self.whole.ts_ns[-1] - self.whole.ts_ns[0])
        ts_ns = self.whole.ts_ns[0] + ((self.whole.ts_ns - self.whole.ts_ns[0]) * stretch).astype("i8")
        self.whole = replace(self.whole, ts_ns=ts_ns)
        self.span_ns = int(ts_ns[-1] - ts_ns[0]) + 1_000_000
        self.given = 0

    async def run(self, sink: StreamPublisher, stop: asyncio.Event) -> None:
        def give(step: int) -> Any:
            turn, first = divmod(step * self.step, BLOCK - BLOCK % self.step)
            batch = self.batch(turn, first)

            async def write() -> None:
                await sink.write(batch)
                self.given += len(batch)

            return write

        await self.keep(stop, give)

    def batch(self, turn: int, first: int) -> Batch:
        part = self.whole[first : first + self.step]
        return replace(part, ts_ns=part.ts_ns + turn * self.span_ns)


async def soak(args: argparse.Namespace, broker: Mosquitto, place: Path, disks: tuple[Path, Path]) -> Any:
    store, spool = disks[0] / "store", disks[1] / "spool"
    served, link, feed = Served(broker, store, place / "ingest.log"), BrokerLink(broker.port), RecordsFeed(args.records)
    port = await link.open()
    sink = StreamPublisher(
        Brokers(MqttConfig(broker=f"mqtt://127.0.0.1:{port}")), spool, max_bytes=384 << 20, drain_s=300.0
    )
    supervising = asyncio.create_task(served.supervise())
    stop, notes, begin = asyncio.Event(), [], time.monotonic()

    async def note() -> None:
        while not stop.is_set():
            told = {name: getattr(sink, name) for name in ("records", "arrived", "waiting", "discarded", "restarts")}
            kept = sum(each.stat().st_size for each in spool.rglob("*") if each.is_file())
            at = {"s": time.monotonic() - begin, "spool_bytes": kept, "ingest_mib": served.resident_mib()}
            notes.append(at | process_figures() | told | {"ingest_starts": served.starts})
            await asyncio.sleep(1)

    try:
        await sink.open(HEADER)
        await sink.write(TOPOLOGY)
        feeding, noting = asyncio.create_task(feed.run(sink, stop)), asyncio.create_task(note())
        faults = BrokerFaults(broker, served, link, disks)
        phases = chosen(faults.phases, args.fault)
        half_s = args.minutes * 60 / (2 * len(phases) * args.turns)
        for name, fault in phases * args.turns:
            await fault(half_s)
            await asyncio.sleep(half_s)
            print(json.dumps(phase(name, notes[-1])), flush=True)
        stop.set()
        await asyncio.gather(feeding, noting)
        await sink.aclose()
        # The ingest may be between two starts; acknowledged frames are in the store once it has ended in order.
        status = await served.end()
    finally:
        supervising.cancel()
        served.signal(signal.SIGCONT)
        served.signal(signal.SIGKILL)
        link.close()
    return verdict(store, sink, feed, notes, status, link), notes


def phase(name: str, note: dict[str, Any]) -> dict[str, Any]:
    told = ("records", "arrived", "waiting", "discarded", "restarts", "spool_bytes", "open_files", "ingest_starts")
    memory = {"resident_mib": round(note["resident_bytes"] / 2**20, 1), "ingest_mib": round(note["ingest_mib"], 1)}
    return {"phase": name, "s": round(note["s"])} | {key: note[key] for key in told} | memory


def verdict(
    store: Path, sink: StreamPublisher, feed: RecordsFeed, notes: list[Any], status: int, link: BrokerLink
) -> dict[str, Any]:
    (run,) = StoreReader(store).runs()
    ledger = run.ledger
    rows = sum(each.rows for each in segments.listing(store, "delays"))
    counted = in_windows(store)
    exact = {
        "given": feed.given, "records_in_ledger": ledger.records, "discarded_in_ledger": ledger.discarded,
        "discarded_by_host": sink.discarded, "waiting": sink.waiting, "imbalance": ledger.imbalance,
        "rows_in_ledger": run.rows_stored, "rows_in_files": rows, "rows_in_windows": counted, "closed": run.closed,
    }  # fmt: skip
    ok = (
        feed.given == ledger.records + ledger.discarded
        and ledger.discarded == sink.discarded
        and (sink.waiting, ledger.imbalance, status) == (0, 0, 0)
        and run.rows_stored == rows == counted
        and run.closed
    )
    return (
        {"ok": ok}
        | exact
        | {
            "resident_mib": halves(notes, "resident_bytes", 2**20),
            "ingest_mib": halves(notes, "ingest_mib"),
            "open_files": halves(notes, "open_files"),
            "restarts": sink.restarts,
            "cuts": link.cuts,
            "ingest_starts": notes[-1]["ingest_starts"],
            "spool_peak_mib": round(max(each["spool_bytes"] for each in notes) / 2**20, 1),
        }
        | feed.told()
    )


def in_windows(store: Path) -> int:
    """Return the delays counted by windows of a second, and those in no window because they waited for an address."""
    windows, delays = ([str(e.path) for e in segments.listing(store, table)] for table in ("windows", "delays"))
    found = 0
    for sql, paths in (
        ("SELECT coalesce(sum(count), 0) FROM read_parquet($p, hive_partitioning = false) WHERE width_s = 1", windows),
        ("SELECT count(*) FROM read_parquet($p, hive_partitioning = false) WHERE waited", delays),
    ):
        row = duckdb.execute(sql, {"p": paths}).fetchone()
        assert row is not None
        found += int(row[0])
    return found


PANELS = {
    "memory, MiB": [("resident_bytes", "host", 2**20), ("ingest_mib", "ingest", 1)],
    "file descriptors": [("open_files", "", 1)],
    "spool, MiB": [("spool_bytes", "", 2**20)],
    "records, millions": [(name, name, 1e6) for name in ("records", "arrived", "waiting", "discarded")],
}


def run(args: argparse.Namespace) -> int:
    """Run the whole soak, and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="mace-soak-") as name, ExitStack() as leaving:
        place = Path(name)
        disks = (place / "ingest", place / "host")
        for disk, size in zip(disks, (STORE_DISK, HOST_DISK), strict=True):
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
            leaving.callback(subprocess.run, ["umount", "-l", disk], check=True)
        broker = leaving.enter_context(
            mosquitto(place / "broker", "allow_anonymous true", "max_queued_messages 0", "max_queued_bytes 67108864")
        )
        found, notes = asyncio.run(soak(args, broker, place, disks))
        if not found["ok"]:
            sys.stderr.write((place / "ingest.log").read_text()[-4000:])
    print(json.dumps(found), flush=True)
    if args.plot:
        plot(notes, PANELS, args.plot)
    return 0 if found["ok"] else 1
