"""The page of `mace serve` and of `mace report --html` in a real browser, over a real recording and a live run."""

import contextlib
import http.server
import json
import queue
import re
import signal
import socket
import threading
from dataclasses import replace
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from urllib.request import urlopen

import pytest

from contracts.cpus import Measure, StagePlace
from contracts.names import printable
from contracts.schema import Direction
from mace import cli
from mace.lab import Spec, running
from mace.serving.access import Access
from mace.serving.server import serving
from storage import sql
from storage.query import Filter, StoreReader
from tests.browser import LIMIT_S
from tests.made_results import header, make_delays, make_results, make_stages, make_windows, topology, with_rows
from tests.made_trips import kept, made_trips
from tests.measuring import ROOT, mace, start, wait_for
from tests.nasty_names import NASTY, named_devices
from tests.unit.storage.stored import fill

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow]

ANYWHERE = ("127.0.0.1", 0)
OPEN = Access(frozenset({"localhost"}))
TOKEN = "0123456789abcdef"
CELLS = """[...document.querySelectorAll({table})].map(tr => [...tr.children].map(td => td.textContent))"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A real run: two containers in a lab, recorded by ftrace."""
    made = tmp_path_factory.mktemp("page") / "store"
    assert cli.main(["replay", str(ROOT / "docs/example.mace"), "--store", str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def url(store):
    with serving(store, ANYWHERE, OPEN) as page:
        yield page.url


@pytest.fixture(scope="module")
def host(store):
    return StoreReader(store).runs()[0].host


def table(page, view):
    """Return the cells of a section's table, row by row."""
    return page.js(CELLS.format(table=json.dumps(f"section[data-view={view}] tbody tr")))


def us(ns):
    return f"{ns / 1000:,.1f}"


def figures(entry):
    return [f"{entry['count']:,}", *(us(entry[f"{name}_ns"]) for name in ("p50", "p90", "p99", "max"))]


def quiet(page, url):
    """Assert that the page said nothing on the console and asked nobody but its server."""
    assert page.said == []
    # Pictures in `data:` addresses are the browser's own and ours; they ask nobody.
    assert [address for address in page.requests if not address.startswith((url, "data:"))] == []


def report(store, *options):
    return json.loads(mace("report", "--store", store, "--json", *options).stdout)


def test_the_overview_shows_the_reports_figures(browser, url, store):
    with browser.page() as page:
        page.shown(f"{url}#/")
        shown = table(page, "overview")
        expected = report(store)
        assert [[row[0], row[1], *row[3:8]] for row in shown] == [
            [entry["container"], entry["direction"], *figures(entry)] for entry in expected["overhead"]
        ]
        counted = sql.table(
            StoreReader(store),
            "SELECT container, direction, count(*) AS n, max(delay_ns) AS most FROM delays"
            " WHERE segment = 'overhead' AND NOT waited GROUP BY ALL ORDER BY ALL",
        ).to_pylist()
        assert [[row[0], row[1], row[3], row[7]] for row in shown] == [
            [row["container"], row["direction"], f"{row['n']:,}", us(row["most"])] for row in counted
        ]
        ledger = " · ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in expected["ledger"].items())
        footer = page.js("document.querySelector('footer').innerText")
        assert f"packets {expected['packets']:,} · ledger: {ledger}" in footer
        quiet(page, url)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True), (1200, True)])
def test_a_container_in_light_and_dark_wide_and_narrow(browser, url, store, host, width, dark):
    with browser.page(width=width, dark=dark) as page:
        page.shown(f"{url}#/container?container=c1&host={host}")
        expected = report(store, "--container", "c1")
        entries = expected["devices"] + expected["delivery"] + expected["overhead"]
        assert [[row[0], row[3], *row[5:]] for row in table(page, "devices")] == [
            [entry.get("device", "whole path"), entry["direction"], *figures(entry)] for entry in entries
        ]
        assert page.js("document.querySelectorAll('section[data-view=time] canvas').length") == 2
        # The path is drawn as namespaces and devices, in the order of the path, with the medians of the devices.
        path = page.js("[...document.querySelectorAll('section[data-view=path] svg')][0].textContent")
        order = [entry for entry in entries if entry["direction"] == "egress" and entry.get("segment") != "delivery"]
        assert re.search(".*".join(re.escape(entry["device"]) for entry in order if "device" in entry), path)
        for canvas in ("time", "heat", "distributions"):
            drawn = f"""(() => {{
                const canvas = document.querySelector('section[data-view={canvas}] canvas');
                const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
                return new Set(new Uint32Array(pixels.buffer)).size;
            }})()"""
            assert page.js(drawn) > 3, canvas
        assert page.js("document.documentElement.scrollWidth <= window.innerWidth")
        background = page.js("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is not dark
        quiet(page, url)


@pytest.mark.parametrize("dark", [False, True])
def test_every_page_fits_a_phone(browser, url, store, host, dark):
    worst = StoreReader(store).worst(1, Filter(container="c1"))[0]
    packet = urlencode({"packet": worst.packet, "run": worst.run, "host": host})
    with browser.page(width=390, dark=dark) as page:
        for route in ("", f"packets?container=c1&host={host}", f"packet?{packet}"):
            page.shown(f"{url}#/{route}")
            assert page.js("document.documentElement.scrollWidth <= window.innerWidth"), route
        quiet(page, url)


def test_ten_browsers_show_the_same(browser, url):
    with contextlib.ExitStack() as opened:
        pages = [opened.enter_context(browser.page()) for _ in range(10)]
        for page in pages:
            page.open(f"{url}#/")
        shown = []
        for page in pages:
            page.until("document.body.dataset.shown !== undefined")
            shown.append(table(page, "overview"))
            quiet(page, url)
    assert shown == [shown[0]] * 10
    assert len(shown[0]) == 4


def test_the_hosts_of_a_fleet_stand_apart(browser, tmp_path):
    """A store as an ingest writes it: several hosts, whose containers have the same names."""
    for number, name in enumerate(("testhost", "far")):
        delays = make_delays(100 * (number + 1), containers=2, seed=number)
        results = make_results(delays, containers=2, windows=make_windows(delays))
        fill(tmp_path, [results], f"run-{number}", head=header(f"run-{number}", host=name))
    with serving(tmp_path, ANYWHERE, OPEN) as served, browser.page() as page:
        page.shown(f"{served.url}#/")
        counted = sql.table(
            StoreReader(tmp_path),
            "SELECT host || '/' || container AS name, direction, count(*) AS n FROM delays WHERE segment = 'overhead'"
            " AND NOT waited GROUP BY ALL ORDER BY ALL",
        ).to_pylist()
        assert {row["name"] for row in counted} == {"testhost/c0", "testhost/c1", "far/c0", "far/c1"}
        assert sorted(row[:2] + row[3:4] for row in table(page, "overview")) == [
            [row["name"], row["direction"], f"{row['n']:,}"] for row in counted
        ]
        page.js("[...document.querySelectorAll('td a')].find(each => each.textContent === 'far/c1').click()")
        page.until("document.body.dataset.shown?.includes('host=far')")
        whole = [row for row in table(page, "devices") if row[0] == "whole path"]
        assert [row[5] for row in whole] == [f"{row['n']:,}" for row in counted if row["name"] == "far/c1"]
        quiet(page, served.url)


def test_from_a_region_to_a_packet_and_its_trace(browser, url, store, host):
    with browser.page() as page:
        page.shown(f"{url}#/container?container=c1&host={host}")
        page.js("document.querySelector('section[data-view=heat]').scrollIntoView({block: 'center'})")
        box = page.js(
            "(() => { const r = document.querySelector('section[data-view=heat] .u-over').getBoundingClientRect();"
            " return [r.left, r.top, r.width, r.height]; })()"
        )
        left, top, width, height = box
        page.drag((left + 0.1 * width, top + 0.1 * height), (left + 0.8 * width, top + 0.9 * height))
        page.until("document.body.dataset.shown?.startsWith('#/packets')")
        asked = {name: values[0] for name, values in parse_qs(page.js("location.hash").partition("?")[2]).items()}
        assert int(asked["since"]) < int(asked["until"])
        assert 0 < int(asked["low_ns"]) < int(asked["high_ns"])
        inside = sql.table(
            StoreReader(store),
            "SELECT packet, delay_ns FROM delays WHERE container = 'c1' AND segment = 'overhead' AND epoch_ns(time) >="
            f" {asked['since']} AND epoch_ns(time) < {asked['until']} AND delay_ns BETWEEN {asked['low_ns']} AND"
            f" {asked['high_ns']} ORDER BY delay_ns DESC, packet",
        ).to_pylist()
        shown = table(page, "packets")
        assert page.js("document.querySelector('main p').textContent").startswith(f"{len(inside)} packets")
        expected = [(str(r["packet"]), us(r["delay_ns"])) for r in inside[: len(shown)]]
        assert [(row[0], row[4]) for row in shown] == expected
        page.js("document.querySelector('tbody a').click()")
        page.until("document.body.dataset.shown?.startsWith('#/packet?')")
        [expected] = report(store, "--packet", shown[0][0])["packet_paths"]
        assert [[row[0], row[5], row[6]] for row in table(page, "packet")] == [
            [hop["device"], us(hop["start_ns"]), us(hop["delay_ns"])] for hop in expected["hops"]
        ]
        trace = "fetch(document.querySelector('.trace a').href).then(r => r.arrayBuffer()).then(b => b.byteLength)"
        assert page.js(trace) > 1000
        # The address alone shows the packet again, in another browser.
        with browser.page() as other:
            other.shown(page.js("location.href"))
            assert table(other, "packet") == table(page, "packet")
        quiet(page, url)


@pytest.fixture
def perfetto():
    """A stand-in for the Perfetto UI, on an origin of its own: yields its address and what was handed to it.

    It speaks the documented protocol (perfetto.dev/docs/visualization/deep-linking-to-perfetto-ui): it lets the first
    messages pass, as the UI does while it loads, then answers PING with PONG, and takes `{perfetto: {buffer, title}}`.
    """
    handed = queue.SimpleQueue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(200 if self.path == "/" else 404, STAND_IN.encode() if self.path == "/" else b"")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            handed.put((unquote(self.headers["x-origin"]), unquote(self.headers["x-title"]), body))
            self._answer(200, b"")

        def _answer(self, status, body):
            self.send_response(status)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving_thread = threading.Thread(target=server.serve_forever)
        serving_thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", handed
        finally:
            server.shutdown()
            serving_thread.join()


STAND_IN = """<!doctype html><title>stand-in</title><script>
let early = 3;
window.addEventListener("message", (event) => {
  if (event.source !== window.opener) return;
  if (event.data === "PING") {
    if (early-- <= 0) event.source.postMessage("PONG", event.origin);
  } else if (event.data.perfetto) {
    const { buffer, title } = event.data.perfetto;
    const headers = { "x-origin": encodeURIComponent(event.origin), "x-title": encodeURIComponent(title) };
    fetch("/handed", { method: "POST", headers, body: buffer });
  }
});
</script>"""


def test_the_button_hands_the_trace_to_the_perfetto_ui(browser, store, host, perfetto):
    address, handed = perfetto
    worst = StoreReader(store).worst(1, Filter(container="c1"))[0]
    asked = {"packet": worst.packet, "run": worst.run, "host": host}
    with serving(store, ANYWHERE, OPEN, perfetto=address) as served, browser.page() as page:
        page.shown(f"{served.url}#/packet?{urlencode(asked)}")
        button = "document.querySelector('.trace button')"
        assert page.js(f"{button}.textContent") == f"open in {address.removeprefix('http://').removesuffix('/')}"
        page.js(f"{button}.focus()")
        page.press("Enter")
        origin, title, trace = handed.get(timeout=LIMIT_S)
        assert origin == served.url.removesuffix("/")
        assert title == f"MACE packet {worst.packet}"
        with urlopen(f"{served.url}api/trace?{urlencode(asked)}") as answer:
            assert trace == answer.read()
        assert len(trace) > 1000
        page.until("document.querySelector('.trace [role=status]').textContent.includes('has the trace')")
        assert handed.empty(), "it is handed over once, however often the UI answers"
        quiet(page, served.url)


def test_a_part_of_the_time_is_drawn_from_its_own_histograms(browser, url, store, host):
    times = sql.table(StoreReader(store), "SELECT min(epoch_ns(time)) AS a, max(epoch_ns(time)) AS b FROM delays")
    [(first, last)] = [(row["a"], row["b"]) for row in times.to_pylist()]
    middle = (first + last) // 2 // 1000 * 1000
    with browser.page() as page:
        asked = {"container": "c2", "host": host, "since": middle, "until": last}
        page.shown(f"{url}#/container?{urlencode(asked)}")
        [found] = sql.table(
            StoreReader(store),
            "SELECT count(*) AS n FROM delays WHERE container = 'c2' AND segment = 'overhead' AND NOT waited"
            f" AND epoch_ns(time) >= {middle} AND epoch_ns(time) < {last}",
        ).to_pylist()
        whole = [row for row in table(page, "devices") if row[0] == "whole path"]
        assert sum(int(row[5].replace(",", "")) for row in whole) == found["n"] > 0
        page.js("document.querySelector('#range button[aria-label=\"zoom out\"]').click()")
        page.until(f"document.body.dataset.shown && !document.body.dataset.shown.includes('{middle}')")
        quiet(page, url)


def test_round_trips_are_drawn_where_there_are_any(browser, tmp_path):
    delays = make_delays(400, containers=2)
    fill(tmp_path, [make_results(delays, containers=2, windows=make_windows(delays))])
    kept(tmp_path, made_trips())
    with serving(tmp_path, ANYWHERE, OPEN) as served, browser.page() as page:
        page.shown(f"{served.url}#/container?container=c1&host=testhost")
        section = "document.querySelector('section[data-view=round_trips]')"
        rows = sql.table(StoreReader(tmp_path), "SELECT * FROM round_trips WHERE reason = 'paired'")
        # The chart's legend is a table, too.
        shown = {row[2]: row for row in table(page, "round_trips") if len(row) == 8}
        assert list(shown) == ["tool RTT", "host RTT", "host RTT, lower bound", "NIC RTT", "egress", "ingress"]
        for name, column in (("tool RTT", "tool_rtt_ns"), ("NIC RTT", "nic_rtt_ns")):
            expected = ["ping", "203.0.113.2", f"{len(rows)}", us(max(rows[column].to_pylist()))]
            assert [*shown[name][:2], shown[name][3], shown[name][7]] == expected
        assert page.js(f"{section}.querySelectorAll('canvas').length") == 1
        legend = page.js(f"[...{section}.querySelectorAll('.u-label')].map(each => each.textContent)")
        assert legend[1:] == ["tool RTT", "host RTT", "host RTT, lower bound", "NIC RTT"]
        assert "samples: no reply 2 · paired 398" in page.js(f"{section}.innerText")
        assert "lost 3" in page.js("document.querySelector('footer').innerText")
        page.shown(f"{served.url}#/container?container=c0&host=testhost")
        assert page.js(f"{section}.hidden")
        quiet(page, served.url)


def test_which_cpu_does_the_work_is_shown_where_it_is_known(browser, tmp_path):
    delays = make_delays(40)
    stages, places = make_stages(
        [
            (StagePlace(1, 0, 0, 0), Direction.EGRESS, Measure.RUN, [200] * 3),
            (StagePlace(1, 0, 0, 3), Direction.EGRESS, Measure.RUN, [7_000]),
            (StagePlace(1, 0, 0, 3), Direction.EGRESS, Measure.WAIT, [90_000]),
            (StagePlace(0, 0, -1, -1), Direction.EGRESS, Measure.WORK, [7_600]),
        ]
    )
    results = make_results(delays, windows=make_windows(delays))
    devices = tuple(replace(device, container="c0") for device in results.rows.devices)
    fill(tmp_path, [with_rows(results, stages=stages, places=places, devices=devices)])
    with serving(tmp_path, ANYWHERE, OPEN) as served, browser.page() as page:
        page.shown(f"{served.url}#/container?container=c0&host=testhost")
        assert table(page, "cpus") == [
            ["vethc0", "egress", "0", "0", "3", "0.2", "0.2", "", ""],
            ["vethc0", "egress", "0", "3", "1", "7.0", "7.0", "90.0", "90.0"],
        ]
        section = "document.querySelector('section[data-view=cpus]')"
        assert "c0 egress: 92 % of the work for these packets runs on CPU 3" in page.js(f"{section}.innerText")
        quiet(page, served.url)


def test_the_keyboard_alone(browser, url):
    with browser.page() as page:
        page.shown(f"{url}#/")

        def tab_to(selector):
            for _ in range(200):
                if page.js(f"document.activeElement.matches({json.dumps(selector)})"):
                    return
                page.press("Tab")
            raise AssertionError(f"no way to {selector}")

        tab_to("section[data-view=overview] th:nth-child(7) button")
        page.press("Enter")
        p99 = [float(row[6].replace(",", "")) for row in table(page, "overview")]
        assert p99 == sorted(p99, reverse=True)
        assert page.js("document.querySelector('th[aria-sort]').textContent") == "p99, µs"
        tab_to("section[data-view=overview] td a")
        page.press("Enter")
        page.until("document.body.dataset.shown?.includes('container=')")
        tab_to("form.region button")
        page.press("Enter")
        page.until("document.body.dataset.shown?.startsWith('#/packets')")
        assert table(page, "packets")
        tab_to("section[data-view=packets] td a")
        page.press("Enter")
        page.until("document.body.dataset.shown?.startsWith('#/packet?')")
        assert table(page, "packet")


def test_names_are_text_and_never_markup(browser, tmp_path):
    names = [name for name in NASTY if name]
    delays = make_delays(40 * len(names), containers=len(names))
    devices = named_devices(names)
    assert len(devices) == len(topology(len(names)))
    fill(tmp_path, [make_results(delays, devices=devices, windows=make_windows(delays))])
    stored = sql.table(StoreReader(tmp_path), "SELECT DISTINCT container FROM windows").to_pylist()
    known = {row["container"] for row in stored}
    with serving(tmp_path, ANYWHERE, OPEN) as served, browser.page() as page:
        page.shown(f"{served.url}#/")
        assert {row[0] for row in table(page, "overview")} == {printable(name) for name in known if name}
        assert page.js("document.querySelectorAll('main script, main img, main pre').length") == 0
        for name in ("<script>alert(1)</script>", "\u202eevil", 'a"b', "a b=1i 1\\"):
            page.js(f"location.hash = mace.hash('container', {{container: {json.dumps(name)}, host: 'testhost'}})")
            page.until("document.body.dataset.shown === location.hash")
            assert page.js("document.querySelector('h1').textContent") == printable(name)
            assert printable(name) in {row[0] for row in table(page, "devices")}
        quiet(page, served.url)


def test_an_error_is_a_sentence_on_the_page(browser, url):
    with browser.page() as page:
        page.open(f"{url}#/container?container=c1&segment=wire")
        page.until("document.getElementById('failure').textContent.includes(\"no segment 'wire'\")")
        page.open(f"{url}#/nosuch")
        page.until("document.getElementById('failure').textContent === 'There is no such page.'")


def test_the_token_is_asked_for_once(browser, store):
    with serving(store, ANYWHERE, Access(frozenset(), TOKEN)) as served, browser.page() as page:
        page.open(served.url)
        page.until("document.querySelector('input[name=token]')")
        for text in ("wrong", TOKEN):
            page.js(f"document.querySelector('input').value = {json.dumps(text)}")
            page.js("document.querySelector('button').click()")
            if text == "wrong":
                page.until("document.querySelector('[role=alert]')?.textContent === 'That is not the token.'")
        page.until("document.body.dataset.shown !== undefined")
        assert len(table(page, "overview")) == 4


def test_the_report_is_the_page_with_its_data_inside(browser, store, tmp_path, host):
    file = tmp_path / "report.html"
    mace("report", "--store", store, "--html", file)
    address = file.as_uri()
    with browser.page() as page:
        page.shown(f"{address}#/")
        expected = report(store)
        assert [[row[0], row[1], *row[3:8]] for row in table(page, "overview")] == [
            [entry["container"], entry["direction"], *figures(entry)] for entry in expected["overhead"]
        ]
        page.js("document.querySelector('section[data-view=overview] td a').click()")
        page.until("document.body.dataset.shown?.includes('container=')")
        assert page.js("document.querySelectorAll('section').length") == 7
        page.js("document.querySelector('section[data-view=packets] td a').click()")
        page.until("document.body.dataset.shown?.startsWith('#/packet?')")
        [worst] = report(store, "--container", "c1", "--worst", "1")["packet_paths"]
        assert [row[0] for row in table(page, "packet")] == [hop["device"] for hop in worst["hops"]]
        assert [each for each in page.requests if not each.startswith((address, "data:"))] == []
        assert page.said == []


@pytest.mark.needs("root", "tracefs", "netns")
def test_numbers_of_a_live_run_move(browser, tmp_path):
    """`mace run --serve`: the open page shows new packets by itself, and the run's own figures at its end.

    Other viewers ask and read no answer: the run loses nothing by them.
    """
    with running(Spec(name="page")) as lab, contextlib.ExitStack() as stuck:
        process = start(
            "run", "--lab", lab.name, "--source", "ftrace", "--store", tmp_path / "store", "--json",
            "--serve", "127.0.0.1:0",
        )  # fmt: skip
        try:
            address = re.search(r"http://\S+/", process.stderr.readline())[0]
            wait_for(lambda: list((tmp_path / "store").glob("runs/*.parquet")), limit_s=120)
            where = urlsplit(address)
            for target in ("events", "heat", "devices") * 3:
                viewer = stuck.enter_context(socket.create_connection((where.hostname, where.port), timeout=60))
                viewer.sendall(f"GET /api/{target} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
            with browser.page() as page:
                page.open(f"{address}#/")
                told = "(document.querySelector('footer').innerText.match(/^packets ([0-9,]+)/) || ['', '0'])[1]"
                packets = f"Number({told}.replaceAll(',', ''))"
                lab.ping("c1", count=200, flood=True)
                page.until(f"{packets} >= 300")
                assert page.js("document.getElementById('live').textContent") == "live"
                lab.ping("c1", count=300, flood=True)
                page.until(f"{packets} >= 800")
                assert page.said == []
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out)["ledger"]["lost"] == 0
        assert json.loads(out)["packets"] >= 800
