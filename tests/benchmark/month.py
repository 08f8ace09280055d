"""The page of `mace serve` over a month of windows of fifty containers, with wide windows and without.

month_overview      s from the address to the drawn overview in a browser, with nothing kept; peer: without wide windows
month_view          s of the slowest view of a container, as the server answers it, with nothing kept; peer: likewise
month_view_NAME     s of the view NAME alone; peer: likewise
month_size          GB of windows; peer: of wide windows
month_folding       s of CPU time that making the wide windows takes for each hour

The store has no rows, as one of a month has on most disks. It has no windows of a second: nobody reads them over such a
range, and they would be 30 GB. Without wide windows a view takes a minute: `PEER_DAYS` are measured, and scaled.

The hours of every day, the first day and the last are real. The files of the other days with windows of ten seconds, a
minute and ten minutes are the first day's under other names: no view of the whole month reads them, and to write 90
million windows would take longer than all measurements.
"""

import asyncio
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.ledger import Ledger
from contracts.schema import Grades
from correlator.windows import Windows
from mace.serving.access import Access
from mace.serving.server import serving
from storage import folding, segments, tables, wide
from storage.embedded import EmbeddedStore
from storage.segments import HOUR_NS
from tests.benchmark.figures import figure, folder
from tests.browser import Browser
from tests.made_results import HEADER, START_NS, make_delays, topology

DAYS = 30
PEER_DAYS = 1
CONTAINERS = 50
PACKETS_PER_S = 100
"""Of all containers: a window of ten seconds has some ten delays, of an hour some thousands, in hundreds of bins."""
ROUNDS = 3
BEGIN_NS = START_NS // (24 * HOUR_NS) * 24 * HOUR_NS
VIEWS = ("overview", "time", "heat", "devices", "distributions", "sources")
_S = 1_000_000_000


def run(days: int = DAYS) -> list[dict[str, Any]]:
    with folder() as place:
        store = place / "store"
        asyncio.run(_opened(store))
        folding_s = _fill(store, days)
        sizes = [
            sum(each.path.stat().st_size for each in segments.listing(store, table)) / 1e9
            for table in ("windows", *segments.DAILY)
        ]
        browser = Browser(place / "browser")
        try:
            painted = [_painted(browser, store) for _ in range(ROUNDS)]
            answered = [{name: _answered(store, name) for name in VIEWS} for _ in range(ROUNDS)]
            short = _without(store, place / "short", PEER_DAYS)
            scale = days / PEER_DAYS
            old = _painted(browser, short) * scale
            old_views = {name: _answered(short, name) * scale for name in VIEWS}
        finally:
            browser.close()
    return [
        figure("month_overview", "s", painted, "without wide windows", old),
        figure(
            "month_view",
            "s",
            [max(each.values()) for each in answered],
            "without wide windows",
            max(old_views.values()),
        ),
        *(
            figure(
                f"month_view_{name}", "s", [each[name] for each in answered], "without wide windows", old_views[name]
            )
            for name in VIEWS
        ),
        figure("month_size", "GB", [sizes[0]], "wide windows", sum(sizes[1:])),
        figure("month_folding", "s", [folding_s]),
    ]


async def _opened(path: Path) -> None:
    sink = EmbeddedStore(path, fsync=False, rows=False)
    await sink.open(HEADER)
    sink._release()


def _fill(store: Path, days: int) -> float:
    """Write a store, and return how many s of CPU time it took to make an hour's wide windows.

    Windows and ledger of each hour are those of one hour, shifted in time; the wide windows of each day those of the
    first.
    """
    devices = topology(CONTAINERS)
    delays = make_delays(
        3600 * PACKETS_PER_S,
        containers=CONTAINERS,
        start_ns=BEGIN_NS,
        gap_ns=_S * 4 // 5 // PACKETS_PER_S,
    )
    delays = delays[delays.utc_ns < BEGIN_NS + HOUR_NS]
    windows = Windows()
    windows.add(delays.utc_ns, delays.device, delays.direction, delays.segment, delays.delay_ns)
    closed = windows.close(None)
    rows = tables.windows_table(HEADER, closed[closed.column("width_s") == wide.FROM_S], devices)
    times = rows["time"].cast(pa.int64()).to_numpy()

    def write(hour: int, like: segments.SegmentFile | None = None) -> None:
        number = hour + 2
        at = BEGIN_NS // HOUR_NS + hour
        ledger = tables.ledger_table([_entry(hour, second, hour + 1 == 24 * days) for second in (1800, 3600)], number)
        _put(store, ledger, "ledger", at, number)
        if like is not None:
            _linked(like, segments.segment(store, "windows", at, number, number, like.rows))
            return
        shifted = pa.array(times + hour * HOUR_NS).cast(rows.schema.field(0).type)
        _put(store, rows.set_column(0, rows.schema.field(0), shifted), "windows", at, number)

    last = 24 * (days - 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(25)))
        begin = time.process_time()
        folding.fold_windows(store, None, 1 << 40, fsync=False)
        folding_s = (time.process_time() - begin) / 24
        first = {table: segments.listing(store, table)[0] for table in wide.TABLES.values()}
        hours = segments.listing(store, "windows")[:24]
        between = range(25, last)
        list(pool.map(write, between, [hours[hour % 24] for hour in between]))
        list(pool.map(write, range(max(last, 25), 24 * days)))
        for day in range(1, days):
            list(pool.map(lambda each, day=day: _later(store, each, day, days), first.values()))
    return folding_s


def _put(store: Path, rows: pa.Table, table: str, hour: int, number: int) -> None:
    target = segments.segment(store, table, hour, number, number, len(rows)).path
    data = memoryview(tables.encode(rows, table, segments.MERGE_BATCH_ROWS // segments.ROW_WEIGHT[table]))
    segments.write_whole(target, segments.write_bytes(data), fsync=False)


def _linked(of: segments.SegmentFile, target: segments.SegmentFile) -> None:
    target.path.parent.mkdir(parents=True, exist_ok=True)
    target.path.hardlink_to(of.path)


def _later(store: Path, of: segments.SegmentFile, day: int, days: int) -> None:
    """Write a segment of wide windows some days later, or link it if no view of the whole month reads it."""
    later = 24 * day
    if of.table == wide.STANDING or day == days - 1:
        _shifted(store, of, day)
    else:
        _linked(of, segments.segment(store, of.table, of.hour + later, of.first + later, of.last + later, of.rows))


def _shifted(store: Path, of: segments.SegmentFile, day: int) -> None:
    """Write a segment of wide windows some days later."""
    later_ns, later = day * 24 * HOUR_NS, day * 24
    about = wide.About.of(of.path)
    about.names = {key: (utc_ns + later_ns, pod) for key, (utc_ns, pod) in about.names.items()}
    about.ends = {key: utc_ns + later_ns for key, utc_ns in about.ends.items()}
    about.hours = {hour + later for hour in about.hours}
    rows = pq.read_table(of.path, read_dictionary=["container"], partitioning=None)
    rows = tables.grown(rows, "hours")
    times = pa.array(rows["time"].cast(pa.int64()).to_numpy() + later_ns).cast(rows.schema.field(0).type)
    target = segments.segment(store, of.table, of.hour + later, of.first + later, of.last + later, of.rows)
    rows = rows.set_column(0, rows.schema.field(0), times)
    segments.write_whole(target.path, lambda temporary: wide.write(rows, about, temporary, of.table), fsync=False)


def _entry(hour: int, second: int, last: bool) -> tables.LedgerRow:
    records = (hour * 3600 + second) * PACKETS_PER_S
    return tables.LedgerRow(
        HEADER,
        BEGIN_NS + hour * HOUR_NS + second * _S,
        Ledger(records=records, matched=records),
        packets=records,
        grades=Grades(exact=records),
        rows_stored=0,
        rows_not_stored=0,
        closed=last and second == 3600,
    )


def _without(store: Path, target: Path, days: int) -> Path:
    """Copy the newest days of a store, without wide windows."""
    target.mkdir()
    shutil.copy(store / "store.json", target)
    shutil.copytree(store / "runs", target / "runs")
    for table in ("windows", "ledger"):
        for day in sorted((store / table).iterdir())[-days:]:
            shutil.copytree(day, target / table / day.name, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return target


def _painted(browser: Browser, store: Path) -> float:
    with serving(store, ("127.0.0.1", 0), Access(frozenset())) as served, browser.page() as shown:
        begin = time.perf_counter()
        shown.open(served.url)
        shown.until("document.querySelectorAll('section[data-view=overview] tbody tr').length", limit_s=600)
        return time.perf_counter() - begin


def _answered(store: Path, name: str) -> float:
    with serving(store, ("127.0.0.1", 0), Access(frozenset())) as served:
        asked = urlencode({} if name == "overview" else {"container": "c7", "host": HEADER.host})
        begin = time.perf_counter()
        with urllib.request.urlopen(f"{served.url}api/{name}?{asked}") as answer:
            answer.read()
        return time.perf_counter() - begin
