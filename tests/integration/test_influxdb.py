"""The InfluxDB sink with a real server: the stored rows equal the sink's account, whatever faults occur.

The long forms (ten minutes of each) are `./dev soak`.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from contracts.metrics import MEASUREMENTS
from contracts.schema import Delays, Segment
from storage import SINKS
from storage.lines import key
from tests import servers
from tests.database_proxy import proxied
from tests.fed import DEVICES, STEP_S, S, batches, feed, influx
from tests.made_results import START_NS, make_delays, make_results, make_windows, topology, with_rows, with_totals
from tests.nasty_names import NASTY, named_devices
from tests.places import GOLDEN, ROOT

pytestmark = [pytest.mark.needs("influxd"), pytest.mark.slow]
CAPTURE = GOLDEN / "wire-2" / "capture.mace"


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    with servers.running(servers.Influx(tmp_path_factory.mktemp("influx"))) as server:
        yield server


@pytest.fixture
def server(shared_server):
    shared_server.query('DROP DATABASE "mace"', post=True)
    shared_server.query('CREATE DATABASE "mace"', post=True)
    return shared_server


@pytest.fixture(params=["1.x /write", "v2 API"])
def address(request, server):
    """Provide the address of InfluxDB 1.6.7, directly or behind the proxy with the v2 API of influxdb-client."""
    with proxied(server) as proxy:
        yield server.url if request.param == "1.x /write" else proxy.url
        assert proxy.writes == 0 or request.param == "v2 API"


def delay_rows(results):
    return sum(int((each.rows.delays.segment != Segment.OVERHEAD).sum()) for each in results)


def check(server, account, results):
    """Check that the database has every row once, except the rows that the account counts as not stored."""
    rows = server.rows()
    assert account.imbalance == 0
    assert account.waiting == 0
    assert sum(rows.values()) == account.stored
    assert account.stored == account.taken - account.not_stored - account.left_out
    if not account.not_stored + account.left_out:
        assert rows["device_delay"] == delay_rows(results)
        assert rows["overhead"] == sum(len(each.rows.delays) for each in results) - rows["device_delay"]
        assert rows["device_window"] == sum(len(each.rows.windows) for each in results)
    return rows


def test_every_row_arrives_with_its_tags_fields_and_time(server, address, tmp_path):
    results = list(batches(30_000, 30))
    config = influx(address, tmp_path)
    account = feed(config, results, pace=False)["influxdb"]
    check(server, account, results)
    assert account.not_stored == 0
    delays = results[3].rows.delays
    row = int((delays.segment == Segment.DELIVERY).argmax())
    device = DEVICES[delays.device[row]]
    where = f"time = {delays.utc_ns[row]} AND device = '{device.name}'"
    (found,) = server.query(f"SELECT * FROM device_delay WHERE {where}")
    stored = dict(zip(found["columns"], found["values"][0], strict=True))
    assert stored.pop("slot", None) is None  # the column exists if any row has the field
    assert stored == {
        "time": int(delays.utc_ns[row]), "host": "testhost", "container": device.container, "netns": device.netns_name,
        "device": device.name, "kind": "veth", "direction": "ingress", "segment": "delivery", "source": "synthetic",
        "grade": "buffer", "delay_ns": int(delays.delay_ns[row]), "l3_len": int(delays.l3_len[row]),
        "position": int(delays.position[row]),
    }  # fmt: skip
    # The last row of the ledger is the final one.
    (ledger,) = server.query("SELECT last(records), matched, packets FROM mace_internal WHERE part = 'ledger'")
    last = results[-1]
    assert ledger["values"][0][1:] == [last.totals.ledger.records, last.totals.ledger.matched, last.totals.packets]


def test_stored_names_are_in_the_catalogue(server, tmp_path):
    feed(influx(server.url, tmp_path), batches(3000, 3), pace=False)
    for series in server.query("SHOW FIELD KEYS"):
        known = {f.name: f for f in MEASUREMENTS[series["name"]].fields}
        for name, kind in series["values"]:
            assert kind == ("string" if known[name].kind == "histogram" else "integer"), name
        missing = known.keys() - {name for name, _ in series["values"]}
        assert series["name"] == "mace_internal" or missing <= {"dropped"}
    for series in server.query("SHOW TAG KEYS"):
        assert {name for (name,) in series["values"]} <= set(MEASUREMENTS[series["name"]].tags)


def test_writing_again_changes_nothing(server, tmp_path):
    """Writing rows again changes nothing, as after a repeated replay or a crash that lost acknowledgements."""
    results = list(batches(20_000, 20))
    first = feed(influx(server.url, tmp_path / "a"), results, pace=False, live=False)["influxdb"]
    before = server.rows()
    again = feed(influx(server.url, tmp_path / "b", batch_rows=3000), results, pace=False, live=False)["influxdb"]
    assert again.stored == first.stored == sum(before.values())
    assert server.rows() == before


FAULTS = [None, 429, 500, None, "cut", "lost", 503, "hang", None, "lost", None, 502]


@pytest.mark.parametrize("api", ["v1", "v2"])
def test_all_faults_in_turn(server, tmp_path, api):
    """The faults are 429, 500, silence, cut connections, lost answers, and lines that the server refuses."""
    results = list(batches(60_000, 60))
    bad = [str(results[n].rows.delays.utc_ns[n]).encode() for n in (5, 30, 55)]
    with proxied(server, lambda number: FAULTS[number % len(FAULTS)] if number < 24 else None) as proxy:
        proxy.spoiled = tuple(b" " + time for time in bad)
        spoiled = sum(int((each.rows.delays.utc_ns == int(time)).sum()) for each in results for time in bad)
        account = feed(influx(proxy.url, tmp_path, timeout_s=0.7, batch_rows=2000, api=api), results)["influxdb"]
        assert {str(fault) for fault in FAULTS} == {str(what) for what in proxy.met}
    rows = check(server, account, results)
    assert (account.refused, account.not_stored) == (spoiled, spoiled)
    told = sum(count for reason, count in account.reasons.items() if reason.startswith("refused: 400 "))
    assert told == spoiled
    assert all("unable to parse '…': missing fields" in r for r in account.reasons if r.startswith("refused"))
    assert rows["device_delay"] + rows["overhead"] == sum(len(each.rows.delays) for each in results) - spoiled
    assert account.retries > 12
    assert "made up" in "".join(account.reasons)


def test_a_server_that_is_killed_again_and_again(tmp_path):
    """The server is killed at random moments while rows arrive; the account and the disk agree afterwards."""
    server = servers.Influx(tmp_path / "influx")
    results = list(batches(200_000, 160))
    chance = random.Random(5)

    async def kill_and_start():
        for _ in range(3):
            await asyncio.sleep(chance.uniform(0.7, 1.5))
            server.kill()
            await asyncio.sleep(chance.uniform(0, 0.5))
            await asyncio.to_thread(server.start)

    with servers.running(server):
        account = feed(influx(server.url, tmp_path / "spool"), results, during=kill_and_start)["influxdb"]
        check(server, account, results)
    assert account.not_stored == 0
    assert account.retries > 0


@pytest.mark.needs("root")
def test_a_disk_that_is_full(tmp_path):
    """The server's disk is full: it answers 500 until there is room again, and no row is lost."""
    place = tmp_path / "disk"
    place.mkdir()
    with tmpfs(place, "96m"):
        server = servers.Influx(place / "influx")
        results = list(batches(150_000, 80))

        async def fill():
            await asyncio.sleep(1)
            await asyncio.to_thread(until_full, place / "filler")
            await asyncio.sleep(80 * STEP_S)
            (place / "filler").unlink()
            # InfluxDB repairs its write-ahead log after a full disk only when it starts.
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)

        with servers.running(server):
            account = feed(influx(server.url, tmp_path / "spool"), results, during=fill)["influxdb"]
            check(server, account, results)
    assert account.retries > 0
    assert account.not_stored == 0


def until_full(path):
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
            file.flush()


@contextmanager
def tmpfs(place, size):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_absent_server_loses_no_row_and_delays_no_run(server, tmp_path):
    """The run ends while the server is away; the next run delivers what is in the spool, then its own."""
    results = list(batches(20_000, 20))
    dead = f"http://127.0.0.1:{servers.free_port()}"
    first = feed(influx(dead, tmp_path, close_s=0.2), results[:10], pace=False, live=False)["influxdb"]
    assert (first.stored, first.waiting, first.not_stored) == (0, first.taken, 0)
    second = feed(influx(server.url, tmp_path), results[10:], pace=False, live=False)["influxdb"]
    check(server, first + second, results)


def test_the_budget_holds_in_the_database(server, tmp_path):
    results = list(batches(5000, 5))
    config = influx(server.url, tmp_path, series_budget=7)
    account = feed(config, results, pace=False, live=False)["influxdb"]
    check(server, account, results)
    assert account.over_budget > 0
    assert account.series == 7
    found = server.query("SHOW SERIES FROM device_delay, overhead, device_window")
    assert len([name for (name,) in found[0]["values"] if ",slot=" not in name]) == 7
    assert any(reason.startswith("the series budget of 7 is used up; first refused: ") for reason in account.reasons)


def test_a_wrong_token_can_be_put_right_later(server, tmp_path):
    results = list(batches(2000, 2))
    with proxied(server, token="right") as proxy:
        wrong = influx(proxy.url, tmp_path, token="wrong", close_s=0.3)
        status = SINKS["influxdb"].check(wrong)
        assert not status.ok
        assert "401 unauthorized access; check the token" in status.detail
        first = feed(wrong, results, pace=False, live=False)["influxdb"]
        assert first.waiting == first.taken > 0
        second = feed(influx(proxy.url, tmp_path, token="right"), [], pace=False, live=False)["influxdb"]
        check(server, first + second, results)


def test_names_and_passwords_of_a_1x_server(tmp_path):
    server = servers.Influx(tmp_path / "influx", auth=True)
    with servers.running(server, database=""):
        server.query("CREATE USER admin WITH PASSWORD 'p:w' WITH ALL PRIVILEGES", post=True)
        server.credentials = ("admin", "p:w")
        server.query('CREATE DATABASE "mace"', post=True)
        results = list(batches(2000, 2))
        (tmp_path / "token").write_text("admin:p:w\n")
        config = influx(server.url, tmp_path / "spool", token_file=str(tmp_path / "token"))
        assert SINKS["influxdb"].check(config).ok
        check(server, feed(config, results, pace=False)["influxdb"], results)
        none = influx(server.url, "", close_s=0.2)
        assert "401" in SINKS["influxdb"].check(none).detail


def test_the_output_of_check(server, tmp_path):
    def said(url, **changes):
        status = SINKS["influxdb"].check(influx(url, tmp_path, **changes))
        return status.ok, status.detail

    assert said("") == (True, "not configured")
    assert said(server.url) == (True, f"{server.url} accepts rows for mace")
    ok, detail = said(server.url, bucket="other")
    assert not ok
    assert detail.endswith('404 database not found: "other"; create the database: CREATE DATABASE "other"')
    ok, detail = said("127.0.0.1:8086")
    assert (ok, detail) == (
        False, "[sinks.influxdb] url = '127.0.0.1:8086', expected http://HOST:PORT or https://HOST:PORT",
    )  # fmt: skip
    ok, detail = said(f"http://127.0.0.1:{servers.free_port()}")
    assert not ok
    assert "Cannot connect" in detail


def mace(*argv, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "mace", *map(str, argv)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_the_command_line_replays_into_it(server, tmp_path):
    """Windows in the database add up to the replay's figures, also after a second replay."""
    config = tmp_path / "mace.toml"
    config.write_text(f'[sinks.influxdb]\nspool = "{tmp_path}/spool"\n')
    argv = ("replay", CAPTURE, "--influxdb", server.url, "--config", config, "--json")
    said = json.loads(mace(*argv).stdout)
    account = said["sinks"]["influxdb"]
    before = server.rows()
    assert sum(before.values()) == account["stored"] == account["taken"] > 0
    packets = server.query("SELECT sum(count) FROM device_window WHERE segment = 'overhead' AND width_s = '1'")
    assert packets[0]["values"][0][1] == sum(each["count"] for each in said["overhead"])
    assert before["overhead"] == sum(each["count"] for each in said["overhead"])
    # The number of frames depends on the speed of encoding.
    of_the_moment = dict.fromkeys(("delivery_ns", "spool_bytes", "buffer_peak", "attempts"), 0)
    assert json.loads(mace(*argv).stdout)["sinks"]["influxdb"] | of_the_moment == account | of_the_moment
    assert server.rows() == before
    assert "influxdb: taken" in mace(*argv[:-1]).stdout


@pytest.mark.needs("victoria-metrics")
def test_victoria_metrics_has_the_v2_api(tmp_path):
    """influxdb-client writes all rows; VictoriaMetrics truncates times to milliseconds."""
    with servers.running(servers.Victoria(tmp_path / "victoria")) as server:
        results = list(batches(20_000, 20))
        account = feed(influx(server.url, tmp_path / "spool"), results, pace=False)["influxdb"]
        assert (account.waiting, account.not_stored, account.retries) == (0, 0, 0)
        assert server.samples("device_delay_delay_ns") == delay_rows(results)
        rows = sum(len(each.rows.delays) for each in results)
        assert server.samples("overhead_overhead_ns") == rows - delay_rows(results)
        server.kill()
        account = feed(influx(server.url, tmp_path / "spool", close_s=0.2), results[:2], pace=False)["influxdb"]
        assert account.waiting == account.taken > 0


@pytest.mark.needs("victoria-metrics")
@pytest.mark.parametrize("database", [servers.Influx, servers.Victoria, servers.OldVictoria])
def test_names_that_would_be_lines_or_tags(database, tmp_path):
    """Databases store every row and read the same names, for any names of containers and devices."""
    delays = make_delays(12 * len(NASTY), containers=len(NASTY))
    odd = named_devices(NASTY)
    results = make_results(delays, devices=odd, windows=make_windows(delays))
    with servers.running(database(tmp_path / "server")) as server:
        account = feed(influx(server.url, tmp_path / "spool"), [results], pace=False)["influxdb"]
        assert account.not_stored == 0
        if database is servers.Influx:
            check(server, account, [results])
            tags = server.query("SHOW TAG KEYS FROM device_delay")[0]["values"]
            labels = {tag for (tag,) in tags}
            values = server.query("SHOW TAG VALUES FROM device_delay WITH KEY = container")[0]["values"]
            containers = {value for _, value in values}
        else:
            assert server.samples("device_delay_delay_ns") + server.samples("overhead_overhead_ns") == len(delays)
            series = server.series("device_delay_delay_ns")
            labels = set().union(*series) - {"__name__"}
            containers = {one["container"] for one in series if "container" in one}
    expected = {"host", "container", "netns", "device", "kind", "direction", "segment", "source", "grade"}
    assert labels - {"slot"} == expected
    assert containers == {as_stored(name) for name in NASTY}


def as_stored(name):
    """Return a name as a database shows it: the inverse of `storage.lines`."""
    escaped = key("rtt", {"container": name or "none"}).partition("container=")[2]
    return re.sub(r"\\([,= ])", r"\1", escaped)


@pytest.mark.needs("victoria-metrics")
def test_a_renamed_container_s_series_are_one_by_its_id(tmp_path):
    """The PromQL query of docs/metrics.md joins a renamed container's series by its id."""
    results = []
    for number, name in enumerate(("web-tmp", "web")):
        delays = make_delays(40, start_ns=START_NS + number * 10 * S)
        devices = tuple(replace(d, container=name, container_id="a" * 64) for d in topology())
        windows = [replace(w, device=w.device + number * len(devices)) for w in make_windows(delays)]
        results.append(with_totals(make_results(delays, devices=devices, windows=windows), present=devices))
    results[1] = with_rows(results[1], delays=Delays.empty(), devices=results[0].rows.devices + results[1].rows.devices)
    whole = sum(w.count for each in results for w in each.rows.windows)
    with servers.running(servers.Victoria(tmp_path / "victoria")) as server:
        feed(influx(server.url, tmp_path / "spool"), results, pace=False)
        assert {each["container"] for each in server.series("container_info_present")} == {"web-tmp", "web"}
        join = (
            "sum by (container_id) (sum_over_time(device_window_count[1m])"
            " * on (host, container) group_left (container_id)"
            " max by (host, container, container_id) (last_over_time(container_info_present[1m])))"
        )
        _, text = servers.get(f"{server.url}/api/v1/query", query=join, time=START_NS // S + 15)
        (one,) = json.loads(text)["data"]["result"]
    assert (one["metric"], int(one["value"][1])) == ({"container_id": "a" * 64}, whole)


@pytest.mark.needs("victoria-metrics")
@pytest.mark.parametrize("database", [servers.Influx, servers.Victoria])
def test_pods_are_chosen_by_namespace_and_workload(database, tmp_path):
    """The queries of docs/metrics.md: conditions on `container` in InfluxQL, a join with `container_info` in PromQL."""
    pods = ["default/web-6d4cf56db6-8xk2p", "default/web-6d4cf56db6-9zs2x", "default/db-0", "team/web-0"]
    delays = make_delays(40 * len(pods), containers=len(pods))
    names = {f"c{number}": pod for number, pod in enumerate(pods)}
    devices = tuple(
        replace(d, container=names.get(d.container, ""), container_id=names.get(d.container, "")[::-1])
        for d in topology(len(pods))
    )
    windows = make_windows(delays)
    results = with_totals(make_results(delays, devices=devices, windows=windows), present=devices)
    whole = {}
    for window in windows:
        pod = devices[window.device].container
        whole[pod] = whole.get(pod, 0) + window.count
    of_web = whole[pods[0]] + whole[pods[1]]
    with servers.running(database(tmp_path / "server")) as server:
        feed(influx(server.url, tmp_path / "spool"), [results], pace=False)
        if database is servers.Influx:
            for condition, count in ((r"/^default\//", of_web + whole["default/db-0"]), (r"/^default\/web-/", of_web)):
                (found,) = server.query(f'SELECT sum("count") FROM "device_window" WHERE "container" =~ {condition}')
                assert found["values"][0][1] == count
            return
        assert {one["pod"] for one in server.series("container_info_present")} == {pod.split("/")[1] for pod in pods}
        join = (
            "sum by (namespace, workload) (sum_over_time(device_window_count[1m])"
            " * on (host, container) group_left (namespace, workload)"
            " max by (host, container, namespace, workload) (last_over_time(container_info_present[1m])))"
        )
        _, text = servers.get(f"{server.url}/api/v1/query", query=join, time=START_NS // S + 15)
        found = json.loads(text)["data"]["result"]
    counts = {(one["metric"]["namespace"], one["metric"]["workload"]): int(one["value"][1]) for one in found}
    expected = {
        ("default", "web"): of_web,
        ("default", "db"): whole["default/db-0"],
        ("team", "web"): whole["team/web-0"],
    }
    assert counts == expected
