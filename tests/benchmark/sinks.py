"""Rates of encoding rows as line protocol and writing them into databases, against influxdb-client, in turns.

encode              rows/s to line protocol, on one core; the peer is influxdb-client's Point.to_line_protocol
encode_compressed   the same with gzip level 1, as it is spooled and sent
influx_write        rows/s end to end into InfluxDB 1.6.7: encoded, compressed, spooled, sent, acknowledged
influx_write_v2     the same by influxdb-client's v2 API through the proxy of the tests, as the two peers have to
victoria_write      the same into VictoriaMetrics, which has the v2 API itself
victoria_server     what a row costs the server, us of CPU time, by our sink and by influxdb-client's raw bytes

A row of `device_delay` has three fields, which are three samples to VictoriaMetrics. It takes 3.7 to 4.5 us of CPU time
for them, whoever sends them: two cores of such a machine are full at 450,000 to 540,000 rows/s, with nobody there to
encode any. 500,000 rows/s from end to end need a third core; more requests under way (`senders`) change nothing.

The peers of the last three are influxdb-client's synchronous `write` of lines that are encoded already (raw bytes, no
spool, no compression) and of its Point objects.
"""

import os
import tempfile
import time
import zlib
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from influxdb_client import InfluxDBClient, Point
from influxdb_client.client.write_api import SYNCHRONOUS

from contracts.schema import Direction, Grade, Segment
from storage.lines import Budget, StreamLines
from tests import servers
from tests.benchmark.figures import cpu_s, figure, one_core
from tests.database_proxy import proxied
from tests.fed import feed, influx
from tests.made_results import HEADER, make_delays, make_results, topology

CONTAINERS = 4
BATCH = 65_536
LINES = 20_000
"""Rows per request."""
ENCODED = 1_000_000
STORED = 500_000
POINTS = 30_000
ROUNDS = 5


def encode() -> list[dict[str, Any]]:
    delays = make_delays(ENCODED * 2 // 13, containers=CONTAINERS)
    devices = topology(CONTAINERS)
    few = delays[:POINTS]
    before = pa.cpu_count()
    pa.set_cpu_count(1)

    def ours(compressed: bool) -> float:
        lines = StreamLines(HEADER, Budget(10_000))
        begin = time.perf_counter()
        rows = 0
        for at in range(0, len(delays), BATCH):
            for piece in lines.packets(delays[at : at + BATCH], devices, LINES):
                rows += piece.rows
                if compressed:
                    zlib.compress(piece.data, 1, wbits=31)
        return rows / (time.perf_counter() - begin)

    def theirs() -> float:
        begin = time.perf_counter()
        for point in points(few):
            point.to_line_protocol()
        return len(few) / (time.perf_counter() - begin)

    try:
        with one_core():
            plain, packed, peer = in_turn(lambda: ours(False), lambda: ours(True), theirs)
    finally:
        pa.set_cpu_count(before)
    name = "influxdb-client Point"
    return [
        figure("encode", "rows/s", plain, name, median(peer)),
        figure("encode_compressed", "rows/s", packed, name, median(peer)),
    ]


def influx_write() -> list[dict[str, Any]]:
    with place() as folder, servers.running(servers.Influx(folder / "influx")) as server, proxied(server) as proxy:

        def emptied(work: Any) -> float:
            server.query('DROP DATABASE "mace"', post=True)
            server.query('CREATE DATABASE "mace"', post=True)
            rows, seconds = work()
            stored = sum(server.rows().values())
            assert stored == rows, (stored, rows)
            return rows / seconds

        turn = count()
        direct, v2, raw, point = in_turn(
            lambda: emptied(lambda: ours(server.url, folder / f"spool{next(turn)}")),
            lambda: emptied(lambda: ours(proxy.url, folder / f"spool{next(turn)}")),
            lambda: emptied(lambda: raw_bytes(proxy.url)),
            lambda: emptied(lambda: point_objects(proxy.url)),
        )
    return [
        *both("influx_write", direct, raw, point),
        *both("influx_write_v2", v2, raw, point),
    ]


def victoria_write() -> list[dict[str, Any]]:
    turn = count()
    server_us: dict[str, list[float]] = {"ours": [], "raw": [], "point": []}

    def fresh(who: str, work: Any) -> float:
        with place() as folder, servers.running(servers.Victoria(folder / "victoria")) as server:
            before_s = cpu_s(server.process.pid)
            rows, seconds = work(server.url, folder)
            server_us[who].append((cpu_s(server.process.pid) - before_s) / rows * 1e6)
            samples = sum(server.samples(name) for name in ("device_delay_delay_ns", "overhead_overhead_ns"))
            # None of the sink's own measurements has these names.
            assert rows - 100 < samples <= rows, (samples, rows)
            return rows / seconds

    sink, raw, point = in_turn(
        lambda: fresh("ours", lambda url, folder: ours(url, folder / f"spool{next(turn)}")),
        lambda: fresh("raw", lambda url, _: raw_bytes(url)),
        lambda: fresh("point", lambda url, _: point_objects(url)),
    )
    name = "influxdb-client raw bytes"
    cost = figure("victoria_server", "us of CPU time a row", server_us["ours"], name, median(server_us["raw"]))
    return [*both("victoria_write", sink, raw, point), cost]


def both(name: str, ours: list[float], raw: list[float], point: list[float]) -> list[dict[str, Any]]:
    return [
        figure(name, "rows/s", ours, "influxdb-client raw bytes", median(raw)),
        figure(f"{name}_vs_points", "rows/s", ours, "influxdb-client Point", median(point)),
    ]


def in_turn(*works: Any) -> list[list[float]]:
    """Run all functions in turn, ROUNDS times, so that a slow minute of the machine affects all of them."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for values, work in zip(found, works, strict=True):
            values.append(work())
    return found


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def ours(url: str, spool: Path) -> tuple[int, float]:
    """Return the rows that the server has acknowledged, and the time from the first to the last."""
    delays = make_delays(STORED * 2 // 13, containers=CONTAINERS)
    results = [
        make_results(delays[at : at + BATCH], containers=CONTAINERS, packets=1) for at in range(0, len(delays), BATCH)
    ]
    begin = time.perf_counter()
    account = feed(influx(url, spool, batch_rows=LINES, timeout_s=60.0), results, pace=False, live=False)["influxdb"]
    seconds = time.perf_counter() - begin
    assert account.stored == account.taken >= len(delays), account
    return account.stored, seconds


def raw_bytes(url: str) -> tuple[int, float]:
    delays = make_delays(STORED * 2 // 13, containers=CONTAINERS)
    lines = StreamLines(HEADER, Budget(10_000))
    pieces = [bytes(piece.data) for piece in lines.packets(delays, topology(CONTAINERS), LINES)]
    with InfluxDBClient(url, "", org="-", timeout=60_000) as client, client.write_api(SYNCHRONOUS) as api:
        begin = time.perf_counter()
        for piece in pieces:
            api.write("mace", record=piece)
        return len(delays), time.perf_counter() - begin


def point_objects(url: str) -> tuple[int, float]:
    delays = make_delays(POINTS * 2 // 13, containers=CONTAINERS, gap_ns=2_000_000)  # no two rows have equal times
    with InfluxDBClient(url, "", org="-", timeout=60_000) as client, client.write_api(SYNCHRONOUS) as api:
        begin = time.perf_counter()
        for at in range(0, len(delays), LINES):
            api.write("mace", record=points(delays[at : at + LINES]))
        return len(delays), time.perf_counter() - begin


def points(delays: Any) -> list[Point]:
    devices = topology(CONTAINERS)
    made = []
    columns = (
        delays.utc_ns, delays.device, delays.direction, delays.segment, delays.position, delays.delay_ns,
        delays.l3_len, delays.grade,
    )  # fmt: skip
    for utc_ns, number, direction, segment, position, delay_ns, l3_len, grade in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        device = devices[number]
        whole = segment == Segment.OVERHEAD
        point = (
            Point("overhead" if whole else "device_delay")
            .tag("host", HEADER.host)
            .tag("container", device.container)
            .tag("netns", device.netns_name)
            .tag("device", device.name)
            .tag("kind", device.kind)
            .tag("direction", Direction(direction).name.lower())
            .tag("source", HEADER.source)
            .tag("grade", Grade(grade).name.lower())
            .field("overhead_ns" if whole else "delay_ns", delay_ns)
            .field("l3_len", l3_len)
            .time(utc_ns)
        )
        if not whole:
            point.tag("segment", Segment(segment).name.lower()).field("position", position)
        made.append(point)
    return made


@contextmanager
def place() -> Any:
    with tempfile.TemporaryDirectory(prefix="mace-bench-", dir=os.environ.get("TMPDIR")) as name:
        yield Path(name)
