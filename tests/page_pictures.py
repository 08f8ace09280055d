"""Writes the pictures of docs/serve.md from a real run: `python -m tests.page_pictures` (root).

A lab with two containers sends pings, UDP and TCP for ten seconds; `mace run` measures them; a browser shows the page.
"""

import sys
import tempfile
from pathlib import Path

from mace.lab import Spec, running
from mace.serving.access import Access
from mace.serving.server import serving
from storage.query import StoreReader
from tests.browser import Browser
from tests.measuring import mace, start, wait_for
from tests.places import DOCS

SECONDS = 10


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mace-pictures-") as name:
        folder = Path(name)
        store = folder / "first"
        measure(store)
        browser = Browser(folder / "browser")
        try:
            with serving(store, ("127.0.0.1", 0), Access(frozenset())) as page:
                host = StoreReader(store).runs()[0].host
                draw(browser, f"{page.url}#/", DOCS / "serve-overview.png", 480)
                draw(browser, f"{page.url}#/container?container=c1&host={host}", DOCS / "serve-container.png", 1470)
        finally:
            browser.close()


def measure(store: Path) -> None:
    with running(Spec(name="lab", containers=2)) as lab:
        for container in lab.containers:
            lab.ping(container, count=2)
        process = start("run", "--lab", lab.name, "--source", "ftrace", "--store", store, "--json")
        try:
            wait_for(lambda: list(store.glob("runs/*.parquet")) or process.poll() is not None, limit_s=120)
            if process.poll() is not None:
                sys.exit(f"mace run has ended: {process.stderr.read()}")
            beside = lab.start_udp("c2", count=1_000 * SECONDS, size=200, rate_pps=1_000, duration_s=SECONDS)
            lab.ping("c1", count=100 * SECONDS, interval_s=0.01)
            beside.stop()
        finally:
            process.terminate()
            process.communicate(timeout=120)
    assert mace("report", "--store", store, "--json").returncode == 0


def draw(browser: Browser, address: str, file: Path, height: int) -> None:
    with browser.page(width=1100, height=height) as page:
        page.shown(address)
        file.write_bytes(page.picture())


if __name__ == "__main__":
    main()
