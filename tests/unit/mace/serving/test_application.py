"""The page's server over a made store, asked over real connections."""

import asyncio
import csv
import http.client
import io
import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from urllib.parse import urlencode

import pyarrow.parquet as pq
import pytest

from contracts.cpus import Measure, StagePlace
from contracts.errors import StoreError, Unavailable
from contracts.schema import Direction
from mace.serving import reading as reading_module
from mace.serving.access import Access
from mace.serving.application import MOST_CONNECTIONS, POLICY
from mace.serving.reading import Busy, Reading
from mace.serving.server import serving
from mace.shown import views
from mace.shown.page.assets import ASSETS
from mace.shown.views import Asked
from storage import segments
from storage.query import StoreReader
from tests.made_results import START_NS, make_delays, make_results, make_stages, make_windows, with_rows
from tests.made_trips import kept, made_trips
from tests.measuring import wait_for
from tests.unit.storage.stored import BEGIN_NS, fill, write_run

ANYWHERE = ("127.0.0.1", 0)
OPEN = Access(frozenset({"localhost"}))
TOKEN = "0123456789abcdef"
PAGE_BYTES = 300_000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("store")
    delays = make_delays(400, containers=2)
    results = make_results(delays, containers=2, windows=make_windows(delays))
    stages, places = make_stages([(StagePlace(0, 0, 0, 0), Direction.EGRESS, Measure.RUN, [5, 9])])
    fill(made, [with_rows(results, stages=stages, places=places)])
    kept(made, made_trips(container="c0"))
    return made


@pytest.fixture
def reader(path):
    with closing(Reading(path)) as reading:
        yield reading


@pytest.fixture(scope="module")
def port(path):
    with serving(path, ANYWHERE, OPEN) as page:
        yield page.port


def ask(port, target, method="GET", body=None, **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def said(port, target, **headers):
    status, _, body = ask(port, target, **headers)
    return status, json.loads(body)["error"]


def test_the_page_and_its_parts_forbid_everything_else(port):
    total = 0
    for target in ["/", *(f"/static/{name}" for name in ASSETS)]:
        status, headers, body = ask(port, target)
        assert (status, headers["content-security-policy"]) == (200, POLICY)
        assert headers["x-content-type-options"] == "nosniff"
        total += len(body)
    assert "unsafe" not in POLICY
    assert total <= PAGE_BYTES


@pytest.mark.parametrize("target", ["/", "/static/page.js", "/api/", "/api/overview", "/api/nosuch", "/nosuch"])
def test_no_answer_may_be_read_by_another_site(port, target):
    _, headers, _ = ask(port, target, Origin="https://evil.example")
    assert not [name for name in headers if name.startswith("access-control")]
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_views_are_only_read(port, method):
    assert ask(port, "/api/overview", method)[0] == 405


def test_a_foreign_name_is_refused(port):
    status, headers, body = ask(port, "/api/overview", Host="evil.example")
    assert status == 421
    assert b"--allow-host" in body
    assert headers["content-security-policy"] == POLICY


@pytest.mark.slow
def test_every_view_is_listed_and_is_the_same_in_every_format(port, reader):
    assert json.loads(ask(port, "/api/")[2]).keys() == views.VIEWS.keys()
    slowest = json.loads(ask(port, "/api/packets?limit=1")[2])["columns"]
    for name in views.VIEWS:
        asked = {"packet": slowest["packet"][0]} if name == "packet" else {"container": "c0"}
        asked = {} if name == "runs" else asked
        query = urlencode(asked)
        found = reader.view(name, Asked.of(asked))
        assert json.loads(ask(port, f"/api/{name}?{query}")[2]) == json.loads(json.dumps(found.as_dict()))
        _, headers, text = ask(port, f"/api/{name}?{query}&format=csv")
        assert headers["content-disposition"] == f'attachment; filename="mace-{name}.csv"'
        lines = list(csv.DictReader(io.StringIO(text.decode())))
        parquet = pq.read_table(io.BytesIO(ask(port, f"/api/{name}?{query}&format=parquet")[2]))
        assert parquet.equals(found.table())
        assert [list(line) for line in lines[:1]] == [list(found.columns)]
        assert len(lines) == len(parquet) > 0
        if "count" in found.columns:
            assert [int(line["count"]) for line in lines] == found.columns["count"]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("/api/nosuch", "no view 'nosuch'"),
        ("/api/time?points=315360000", "points 315,360,000: expected 1 to 2,000"),
        ("/api/time?format=xml", "format 'xml': expected json, csv, parquet"),
        ("/api/packet?packet=99", "no rows of a packet 99"),
        ("/api/trace?packet=99", "no rows of a packet 99"),
    ],
)
def test_wrong_questions_get_a_sentence(port, target, told):
    status, error = said(port, target)
    assert status == 400
    assert told in error


def test_a_trace_is_a_download(port):
    slowest = json.loads(ask(port, "/api/packets?limit=1")[2])["columns"]
    query = urlencode({"packet": slowest["packet"][0], "run": "run-1", "near_ns": slowest["utc_ns"][0]})
    status, headers, body = ask(port, f"/api/trace?{query}")
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert headers["content-disposition"].endswith(f'{slowest["packet"][0]}.pftrace"')
    assert len(body) > 1000


@pytest.fixture
def locked(path):
    with serving(path, ANYWHERE, Access(frozenset(), TOKEN)) as page:
        yield page.port


def test_a_token_opens_the_page(locked):
    assert said(locked, "/api/overview") == (401, "a token is needed: Authorization: Bearer TOKEN")
    assert said(locked, "/api/events", Authorization="Bearer wrong")[0] == 401
    assert ask(locked, "/api/overview", Authorization=f"Bearer {TOKEN}")[0] == 200
    status, _, form = ask(locked, "/")
    assert status == 401
    assert b'<form method="post" action="token">' in form
    status, _, form = ask(locked, "/token", "POST", "token=wrong")
    assert (status, b"not the token" in form) == (401, True)
    status, headers, _ = ask(locked, "/token", "POST", urlencode({"token": TOKEN}))
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert ask(locked, "/", Cookie=cookie.partition(";")[0])[0] == 200


def test_a_long_form_is_refused(locked):
    assert ask(locked, "/token", "POST", "token=" + "x" * 100_000)[0] == 413


def test_without_a_token_there_is_none_to_give(port):
    assert ask(port, "/token", "POST", "token=")[0] == 401


def test_a_taken_port_is_said(path):
    with (
        socket.create_server(ANYWHERE) as taken,
        pytest.raises(Unavailable, match="in use; choose another address"),
        serving(path, taken.getsockname(), OPEN),
    ):
        pass


def test_no_store_and_a_store_that_comes_later(tmp_path):
    later = tmp_path / "later"
    with pytest.raises(StoreError, match="no such directory"), serving(later, ANYWHERE, OPEN):
        pass
    with serving(later, ANYWHERE, OPEN, made_later=True) as page:
        assert said(page.port, "/api/overview") == (500, f"{later}: no such directory")
        fill(later, [make_results(make_delays(20))])
        assert json.loads(ask(page.port, "/api/overview")[2])["packets"] == 20


def test_a_damaged_store_is_said_and_can_be_skipped(path, tmp_path):
    made = tmp_path / "store"
    shutil.copytree(path, made)
    [segment] = (made / "delays").rglob("*.parquet")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with serving(made, ANYWHERE, OPEN) as page:
        status, error = said(page.port, "/api/overview")
        assert status == 500
        assert f"{segment}: damaged" in error
    with serving(made, ANYWHERE, OPEN, skip_damaged=True) as page:
        assert "1 damaged segments" in json.loads(ask(page.port, "/api/overview")[2])["note"]


def test_another_version_is_said(path, tmp_path):
    made = tmp_path / "store"
    shutil.copytree(path, made)
    (made / "store.json").write_text(json.dumps({"format": "mace-store", "schema": 999}))
    with pytest.raises(StoreError), serving(made, ANYWHERE, OPEN):
        pass


@contextmanager
def events(port):
    """Yield the lines of the stream of changes."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/api/events")
        yield connection.getresponse()


def state(stream):
    while not (line := stream.readline()).startswith(b"data: "):
        assert line, "the stream has ended"
    return json.loads(line[6:])


@pytest.mark.slow
def test_a_change_of_the_store_is_an_event(tmp_path):
    fill(tmp_path, [make_results(make_delays(20))])
    with serving(tmp_path, ANYWHERE, OPEN) as page, events(page.port) as stream:
        first = state(stream)
        before = json.loads(ask(page.port, "/api/overview")[2])["packets"]
        fill(tmp_path, [make_results(make_delays(30, start_ns=START_NS + 10**9, first_packet=100))], "run-2")
        assert state(stream)["number"] > first["number"]
        assert (before, json.loads(ask(page.port, "/api/overview")[2])["packets"]) == (20, 50)


def test_ten_viewers_get_the_same_beside_some_that_do_not_read(port):
    stuck = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(10)]
    try:
        for number, each in enumerate(stuck):
            target = "/api/events" if number % 2 else "/api/distributions"
            each.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with ThreadPoolExecutor(10) as viewers:
            answers = list(viewers.map(lambda _: ask(port, "/api/time?container=c1&points=50"), range(10)))
    finally:
        for each in stuck:
            each.close()
    assert {status for status, _, _ in answers} == {200}
    assert len({body for _, _, body in answers}) == 1


def test_views_are_read_once_for_many_viewers(reader, monkeypatch):
    made = []
    monkeypatch.setattr(reading_module.views, "view", lambda *asked: made.append(asked) or views.View({"count": [1]}))
    for _ in range(10):
        reader.view("time", Asked(container="c0"))
    reader.view("time", Asked(container="c1"))
    assert len(made) == 2


@pytest.mark.parametrize(("most", "made"), [(10**9, ["overview"]), (0, [])])
def test_the_first_view_is_made_before_anybody_asks_unless_it_takes_long(reader, monkeypatch, most, made):
    found = []
    monkeypatch.setattr(reading_module.views, "view", lambda _, name, asked: found.append(name) or views.View({}))
    monkeypatch.setattr(reading_module, "_MOST_WARM", most)
    reader.warm()
    assert found == made
    reader.view("overview", Asked())
    assert found == ["overview"]


def test_one_thread_reads_for_all_viewers(reader, monkeypatch):
    """So that the memory which the C library keeps for a thread is kept once."""
    threads = set()

    def noted(*_):
        threads.add(threading.get_ident())
        return views.View({"count": [1]})

    monkeypatch.setattr(reading_module.views, "view", noted)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda points: reader.view("time", Asked(points=points)), range(1, 11)))
    assert len(threads) == 1


def test_what_is_kept_is_bounded(reader, monkeypatch):
    monkeypatch.setattr(reading_module.views, "view", lambda *_: views.View({"count": [1] * 1000}))
    monkeypatch.setattr(reading_module, "_MOST_VALUES", 5000)
    for points in range(1, 200):
        reader.view("time", Asked(points=points))
    assert sum(values for values, _ in reader._kept.values()) <= 5000


def test_too_many_requests_at_once_are_refused_at_once(reader):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with reader.reader():
            entered.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    waiting = [
        threading.Thread(target=reader.view, args=("runs", Asked())) for _ in range(reading_module._MOST_WAITING - 1)
    ]
    for each in waiting:
        each.start()
    try:
        wait_for(lambda: not reader._waiting._value, limit_s=120)
        with pytest.raises(Busy, match="try again"):
            reader.view("runs", Asked())
    finally:
        leave.set()
        for each in (holder, *waiting):
            each.join()
    assert reader.view("runs", Asked()).columns["run"] == ["ping-1", "run-1"]


@pytest.mark.slow
def test_a_thousand_connections_leave_the_page_working(port):
    opened = []
    try:
        for _ in range(1000):
            opened.append(socket.create_connection(("127.0.0.1", port), timeout=60))
            if len(opened) > MOST_CONNECTIONS + 100:
                opened.pop(0).close()
        assert ask(port, "/api/runs")[0] == 200
    finally:
        for each in opened:
            each.close()


def test_closing_waits_for_the_query_that_runs(reader):
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def hold():
        with reader.reader():
            entered.set()
            leave.wait()
        left.set()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    closer = threading.Thread(target=reader.close)
    closer.start()
    assert closer.is_alive()
    leave.set()
    closer.join()
    holder.join()
    assert left.is_set()
    with pytest.raises(Busy, match="closing"):
        reader.view("runs", Asked())


@pytest.mark.slow
def test_retention_may_remove_what_is_being_read(tmp_path):
    """Every answer is of hours that were there at one moment: none is an error, and none shows an hour twice."""
    asyncio.run(write_run(tmp_path / "store", "a", rows=True))
    path = tmp_path / "store"
    sizes = [each.stat().st_size for each in path.rglob("*.parquet")]
    before = StoreReader(path).grouped(by=("direction",))
    ended = threading.Event()
    answers = []

    def follow(port, name):
        while not ended.is_set() or len(answers) < 20:
            status, _, body = ask(port, f"/api/{name}")
            answers.append((name, status, json.loads(body)))

    with serving(path, ANYWHERE, OPEN) as page, ThreadPoolExecutor(3) as viewers:
        asked = [viewers.submit(follow, page.port, name) for name in ("overview", "heat", "devices")]
        wait_for(lambda: any(name == "overview" for name, *_ in answers), limit_s=60)
        for share in (90, 70, 50, 30, 10, 1):
            segments.retain(path, BEGIN_NS / 1e9 + 6 * 3600, None, sum(sizes) * share // 100)
            count = len(answers)
            wait_for(lambda count=count: len(answers) > count + 3, limit_s=60)
        ended.set()
        for each in asked:
            each.result()
    assert {status for _, status, _ in answers} == {200}
    counted = [sum(body["columns"]["count"]) for name, _, body in answers if name == "overview"]
    assert max(counted) == sum(each.count for each in before.values())
    assert sum(each.count for each in StoreReader(path).grouped().values()) < max(counted)
