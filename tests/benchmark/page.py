"""The page of `mace serve` over a store of ten million rows in a real browser.

serve_overview      s from the address to the drawn overview, the browser's start excluded, with nothing kept
serve_view          s of the slowest view of a container, as the server answers it, with nothing kept
serve_page          kB of the page with all of its parts
"""

import asyncio
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from contracts.ledger import Ledger
from correlator.windows import Windows
from mace.serving.access import PERFETTO_UI, Access
from mace.serving.server import serving
from mace.shown.page.assets import ASSETS, page
from storage.embedded import EmbeddedStore
from tests.benchmark.figures import figure, folder
from tests.browser import Browser
from tests.made_results import HEADER, START_NS, make_delays, make_results, topology, with_rows

ROWS = 10_000_000
CONTAINERS = 50
PIECE_PACKETS = 150_000
GAP_NS = 800_000
"""Ten million rows are 20 minutes of 1,250 packets a second in 50 containers."""
ROUNDS = 5
VIEWS = ("path", "time", "heat", "distributions", "devices", "packets", "sources")


def run() -> list[dict[str, Any]]:
    with folder() as place:
        store = place / "store"
        asyncio.run(_fill(store))
        browser = Browser(place / "browser")
        try:
            painted = [_painted(browser, store) for _ in range(ROUNDS)]
        finally:
            browser.close()
        slowest = [max(_answered(store, name) for name in VIEWS) for _ in range(ROUNDS)]
    size = len(page("x", PERFETTO_UI).encode()) + sum(len(asset.read()) for asset in ASSETS.values())
    return [
        figure("serve_overview", "s", painted),
        figure("serve_view", "s", slowest),
        figure("serve_page", "kB", [size / 1000]),
    ]


def _painted(browser: Browser, store: Path) -> float:
    with serving(store, ("127.0.0.1", 0), Access(frozenset())) as served, browser.page() as shown:
        begin = time.perf_counter()
        shown.open(served.url)
        shown.until("document.querySelectorAll('section[data-view=overview] tbody tr').length")
        return time.perf_counter() - begin


def _answered(store: Path, name: str) -> float:
    with serving(store, ("127.0.0.1", 0), Access(frozenset())) as served:
        asked = urlencode({"container": "c7", "host": HEADER.host})
        begin = time.perf_counter()
        with urllib.request.urlopen(f"{served.url}api/{name}?{asked}") as answer:
            answer.read()
        return time.perf_counter() - begin


async def _fill(path: Path) -> None:
    sink = EmbeddedStore(path, fsync=False, flush_interval_s=60.0)
    await sink.open(HEADER)
    start, packets, rows = START_NS, 0, 0
    devices, windows = topology(CONTAINERS), Windows()
    while rows < ROWS:
        delays = make_delays(
            PIECE_PACKETS, containers=CONTAINERS, seed=packets, start_ns=start, first_packet=packets, gap_ns=GAP_NS
        )
        start = (int(delays.utc_ns.max()) // 10**9 + 1) * 10**9
        packets, rows = packets + PIECE_PACKETS, rows + len(delays)
        ledger = Ledger(records=2 * rows, matched=2 * rows)
        results = make_results(delays, devices=devices, packets=packets, ledger=ledger)
        windows.add(delays.utc_ns, delays.device, delays.direction, delays.segment, delays.delay_ns)
        # The last piece closes all windows, as a run's end does.
        await sink.write(with_rows(results, windows=windows.close(start if rows < ROWS else None)))
    await sink.aclose()
