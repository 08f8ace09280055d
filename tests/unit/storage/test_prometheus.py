"""The Prometheus endpoint: its metrics, read by prometheus_client's own parser, and its health pages."""

import asyncio
import http.client
import json
import multiprocessing
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from contracts.config import Config, PrometheusConfig, SinksConfig
from contracts.cpus import Measure, StagePlace
from contracts.errors import ConfigError, Unavailable
from contracts.hooks import Hook
from contracts.ledger import Ledger
from contracts.schema import Delays, Direction, HookCost, Segment, Window
from contracts.topology import Device, Role, Sharer
from contracts.vitals import Publishing, Vitals
from contracts.windowtable import WindowTable
from storage import SINKS
from storage import prometheus as endpoint
from tests.made_results import (
    HEADER,
    make_delays,
    make_results,
    make_stages,
    make_windows,
    topology,
    with_rows,
    with_totals,
)

DELAYS = make_delays(400, containers=2)
LEDGER = Ledger(records=120, matched=100, unmatched=10, in_flight=10, lost=7)


def serving(**changes):
    settings = PrometheusConfig(**({"listen": "127.0.0.1:0"} | changes))
    return endpoint.make(Config(sinks=SinksConfig(prometheus=settings)), Vitals())


def get(server, path, accept="text/plain"):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def during(server, work, *streams):
    """Open the endpoint, write each stream's results, call `work` in a thread, and close the endpoint."""

    async def run():
        await server.open()
        try:
            for of, results in streams:
                stream = server.stream()
                await stream.open(of)
                for each in results:
                    await stream.write(each)
                await stream.aclose()
            return await asyncio.to_thread(work)
        finally:
            await server.aclose()

    return asyncio.run(run())


def results():
    windows = [w for width in (1, 10) for w in make_windows(DELAYS, width)]
    cost = (HookCost(Hook.NET_DEV_QUEUE, 1000, 100, 25_000),)
    half = len(windows) // 2
    made = make_results(DELAYS, containers=2, ledger=LEDGER)
    made = with_totals(made, grades=replace(made.totals.grades, ambiguous=7), several_devices=3)
    first, second = (with_rows(made, windows=WindowTable.of(some)) for some in (windows[:half], windows[half:]))
    return [first, with_totals(second, cost=cost)]


def samples(text):
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_histograms_are_exact():
    """Counts up to each bucket's end, sum and count, by a naive computation from the delays."""
    server = serving()
    _, _, text = during(server, lambda: get(server, "/metrics"), (HEADER, results()))
    found = samples(text)
    groups = {}
    for device, direction, segment, delay in zip(
        DELAYS.device, DELAYS.direction, DELAYS.segment, DELAYS.delay_ns, strict=True
    ):
        groups.setdefault((int(device), int(direction), int(segment)), []).append(int(delay))
    name = "mace_device_delay_seconds"
    seen = 0
    for (number, direction, segment), delays in groups.items():
        device = topology(2)[number]
        labels = {
            "host": HEADER.host, "container": device.container, "netns": device.netns_name, "device": device.name,
            "kind": device.kind, "direction": Direction(direction).name.lower(),
            "segment": Segment(segment).name.lower(), "source": HEADER.source,
        }  # fmt: skip

        def value(suffix, labels=labels, **more):
            return found[name + suffix, tuple(sorted((labels | more).items()))]

        assert value("_count") == len(delays)
        assert value("_sum") == pytest.approx(sum(delays) / 1e9)
        assert value("_bucket", le="+Inf") == len(delays)
        for octave in range(8, 35):
            edge_ns = 2**octave - 1
            assert value("_bucket", le=f"{edge_ns / 1e9:.9g}") == sum(d <= edge_ns for d in delays), octave
        seen += 1
    assert seen == sum(key[0] == f"{name}_count" for key in found)


def test_stages_are_counters_by_the_cpu_that_worked():
    egress = (Direction.EGRESS, Measure.RUN)
    stages, places = make_stages(
        [
            (StagePlace(1, 0, 0, 0), *egress, [5, 7_000]),
            (StagePlace(1, 0, 0, 1), *egress, [100]),
            (StagePlace(1, 0, 2, 1), *egress, [11]),
            (StagePlace(0, 0, -1, -1), Direction.EGRESS, Measure.WORK, [7_116]),
        ]
    )
    once = with_rows(make_results(make_delays(2)), stages=stages, places=places)
    server = serving()
    _, _, text = during(server, lambda: get(server, "/metrics"), (HEADER, [once, once]))
    found = samples(text)
    inner, veth = topology()[:2]

    def of(name, device, **labels):
        told = {
            "host": HEADER.host, "source": HEADER.source, "container": "c0", "netns": device.netns_name,
            "device": device.name, "kind": device.kind, "direction": "egress", "measure": "run",
        }  # fmt: skip
        return found[name, tuple(sorted((told | labels).items()))]

    assert of("mace_stages_total", veth, cpu="0", moved="no") == 4
    assert of("mace_stage_seconds_total", veth, cpu="0", moved="no") == pytest.approx(14_010 / 1e9)
    assert of("mace_stages_total", veth, cpu="1", moved="yes") == 4, "from CPU 0 and from CPU 2"
    assert of("mace_stages_total", inner, cpu="", moved="", measure="work") == 2
    assert found["mace_stages_not_shown_total", ()] == 0


def test_stages_beyond_the_limit_are_counted(monkeypatch):
    monkeypatch.setattr(endpoint, "_MOST_SERIES", 1)
    stages, places = make_stages(
        [(StagePlace(1, 0, 0, cpu), Direction.EGRESS, Measure.RUN, [5, 6]) for cpu in range(3)]
    )
    server = serving()
    told = with_rows(make_results(make_delays(2)), stages=stages, places=places)
    _, _, text = during(server, lambda: get(server, "/metrics"), (HEADER, [told]))
    found = samples(text)
    assert sum(value for (name, _), value in found.items() if name == "mace_stages_total") == 2
    assert found["mace_stages_not_shown_total", ()] == 4


def test_the_ledger_and_the_cost_are_counters():
    server = serving()
    _, content_type, text = during(server, lambda: get(server, "/metrics"), (HEADER, results()))
    assert content_type.startswith("text/plain")
    found = samples(text)

    def of(name, **labels):
        return found[name, tuple(sorted(({"host": HEADER.host, "source": HEADER.source} | labels).items()))]

    for category, count in LEDGER.as_dict().items():
        if category not in {"records", "in_flight"}:
            assert of("mace_records_total", category=category) == count
    assert of("mace_records_in_flight") == 10
    assert of("mace_packets_total", grade="buffer") == 400
    assert of("mace_packets_ambiguous_total", cause="several_devices") == 3
    assert of("mace_packets_ambiguous_total", cause="several_packets") == 4
    assert of("mace_probe_calls_total", hook="net_dev_queue") == 1000
    assert of("mace_probe_seconds_total", hook="net_dev_queue") == pytest.approx(25e-6)
    assert found["mace_delays_not_shown_total", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 1 << 20


def test_openmetrics_is_served_on_request():
    server = serving()
    accept = "application/openmetrics-text; version=1.0.0"
    _, content_type, text = during(server, lambda: get(server, "/metrics", accept), (HEADER, results()))
    assert content_type.startswith("application/openmetrics-text")
    families = {f.name: f.type for f in openmetrics.text_string_to_metric_families(text)}
    assert families["mace_device_delay_seconds"] == "histogram"
    assert families["mace_records"] == "counter"


def test_hosts_have_separate_series_and_a_new_run_resets_its_own():
    server = serving()
    other = replace(HEADER, host="other", run="x")
    again = replace(HEADER, run="run-2")
    less = [make_results(DELAYS, containers=2, ledger=Ledger(records=5, matched=5))]
    streams = ((HEADER, results()), (other, results()), (again, less))
    _, _, text = during(server, lambda: get(server, "/metrics"), *streams)
    matched = {dict(k[1])["host"]: v for k, v in samples(text).items() if ("category", "matched") in k[1]}
    assert matched == {HEADER.host: 5, "other": 100}


def test_series_are_bounded(monkeypatch):
    monkeypatch.setattr(endpoint, "_MOST_SERIES", 3)
    server = serving()
    _, _, text = during(server, lambda: get(server, "/metrics"), (HEADER, results()))
    found = samples(text)
    counts = [v for k, v in found.items() if k[0] == "mace_device_delay_seconds_count"]
    assert len(counts) == 3
    assert sum(counts) + found["mace_delays_not_shown_total", ()] == len(DELAYS)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def own_device(number):
    return Device(
        1000 + int(number), 2, "eth0", "veth", 1, 10 + int(number), netns_name=f"net:[{number}]", container=f"c{number}"
    )


NOTHING = with_rows(make_results(DELAYS), delays=Delays.empty())
BRIDGE = Device(1, 5, "br0", "bridge", netns_name="host", role=Role.HOST)


def crossing(number, present):
    """Return results of one packet of a container at its own device and at the bridge, with the present devices."""
    devices = (own_device(number), replace(BRIDGE, container=f"c{number}"))
    ones = np.ones(1, np.int64)
    windows = [
        Window(0, 1, each, Direction.EGRESS, Segment.DEVICE, 1, 500, 500, 500, 500, 500, 500, 500, ones, ones)
        for each in range(2)
    ]
    listed = (BRIDGE, *(own_device(n) for n in present))
    return with_totals(with_rows(NOTHING, devices=devices, windows=WindowTable.of(windows)), present=listed)


def shown(server):
    found = samples(server.metrics("text/plain")[0].decode())
    return {(dict(k[1])["container"], dict(k[1])["device"]) for k in found if k[0] == "mace_device_delay_seconds_count"}


def test_series_of_removed_devices_are_dropped():
    clock = Clock()
    server = endpoint.Endpoint(PrometheusConfig("127.0.0.1:0", gone_s=60), Vitals(), clock)
    server.begin(HEADER)
    server.add(HEADER, crossing(1, [1, 2]))
    server.add(HEADER, crossing(2, [1, 2]))
    both = {(c, d) for c in ("c1", "c2") for d in ("eth0", "br0")}
    assert shown(server) == both
    clock.now_s += 10_000  # without packets, but present
    server.add(HEADER, crossing(2, [1, 2]))
    assert shown(server) == both
    server.add(HEADER, crossing(2, [2]))  # the first container is gone, from the bridge, too
    clock.now_s += 59
    server.add(HEADER, crossing(2, [2]))
    assert shown(server) == both
    clock.now_s += 3
    assert shown(server) == {("c2", "eth0"), ("c2", "br0")}
    assert samples(server.metrics("text/plain")[0].decode())["mace_series_dropped_total", ()] == 2
    server.end(HEADER)
    clock.now_s += 30
    server.begin(HEADER)  # the next run of the same host
    clock.now_s += 100
    assert shown(server) == {("c2", "eth0"), ("c2", "br0")}
    server.end(HEADER)
    clock.now_s += 62
    assert shown(server) == set()
    clock.now_s += 2
    assert "mace_records_total{" not in server.metrics("text/plain")[0].decode()


def calls_of(work):
    """Return the number of function calls of `work`, in Python and in C: a measure of work that other load does not
    change.
    """
    count = 0

    def profile(_frame, event, _argument):
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def info(server):
    found = samples(server.metrics("text/plain")[0].decode())
    labels = [dict(k[1]) for k in found if k[0] == "mace_container_info"]
    return {(one["host"], one["container"], one["container_id"], one["netns"]) for one in labels}


def test_a_containers_id_joins_its_names():
    clock = Clock()
    server = endpoint.Endpoint(PrometheusConfig("127.0.0.1:0", gone_s=60), Vitals(), clock)
    server.begin(HEADER)

    def seen(sharers=(), **names):
        clock.now_s += 2  # scrapes within a second get the same text
        listed = [replace(own_device(n), container=name, container_id=n * 8) for n, name in ids(names)]
        server.add(HEADER, with_totals(NOTHING, present=tuple(listed), on_host_network=sharers))
        return {(name, container_id) for _, name, container_id, _ in info(server)}

    def ids(names):
        return [(number[1:], name) for number, name in names.items()]

    assert seen() == set()
    assert seen(_1="web-tmp") == {("web-tmp", "1" * 8)}
    assert info(server) == {("testhost", "web-tmp", "1" * 8, "net:[1]")}
    # Series of the old name are still shown, with this container's id.
    assert seen(_1="web") == {("web-tmp", "1" * 8), ("web", "1" * 8)}
    clock.now_s += 62
    assert seen(_1="web") == {("web", "1" * 8)}
    # A join by name requires that a name belongs to one container.
    assert seen(_2="web") == {("web", "2" * 8)}
    assert seen((Sharer("agent", "f" * 8), Sharer("probe[7]")), _2="web") == {("web", "2" * 8), ("agent", "f" * 8)}
    assert ("testhost", "agent", "f" * 8, "host") in info(server)
    server.end(HEADER)
    clock.now_s += 62
    assert info(server) == set()


def test_a_pods_parts_are_labels_of_its_info_alone():
    server = endpoint.Endpoint(PrometheusConfig("127.0.0.1:0"), Vitals(), Clock())
    server.begin(HEADER)
    pod = replace(own_device("1"), container="default/db-0", container_id="u1", pod_containers="postgres")
    server.add(HEADER, with_totals(NOTHING, present=(pod, replace(own_device("2"), container_id="2"))))
    text = server.metrics("text/plain")[0].decode()
    parts = ("namespace", "pod", "workload", "pod_containers")
    told = {dict(k[1])["container"]: dict(k[1]) for k in samples(text) if k[0] == "mace_container_info"}
    assert [told["default/db-0"][part] for part in parts] == ["default", "db-0", "db", "postgres"]
    assert [told["c2"][part] for part in parts] == [""] * 4
    assert text.count('namespace="default"') == 1


def hours_of_churn():
    """Return, of two hours in which a container starts every two seconds and lives for four, at six moments: the series
    held and counted, the text's kilobytes, the process's memory in bytes, and the work of a result and of a scrape.
    """
    clock = Clock()
    server = endpoint.Endpoint(PrometheusConfig("127.0.0.1:0", gone_s=60), Vitals(), clock)
    server.begin(HEADER)
    found = []
    tracemalloc.start()
    try:
        for number in range(3600):
            clock.now_s += 2
            result = crossing(number, [number - 1, number])
            if number % 600 == 599:
                adding = calls_of(lambda result=result: server.add(HEADER, result))
                scraping = calls_of(lambda: server.metrics("text/plain"))
                held = sum(map(len, server._delays.values()))
                text_kb = len(server.metrics("text/plain")[0]) // 1000
                found.append((held, server._series, text_kb, tracemalloc.get_traced_memory()[0], adding, scraping))
            else:
                server.add(HEADER, result)
    finally:
        tracemalloc.stop()
    return found


@pytest.mark.slow
def test_hours_of_churn_take_bounded_memory_and_work():
    # A process of its own: memory is counted for the whole process, so a neighbour's thread would be counted too.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        held, counted, text_kb, memory, adding, scraping = zip(*other.submit(hours_of_churn).result(), strict=True)
    assert held == counted
    assert max(held) <= 2 * 35
    assert max(memory) <= 1.5 * memory[0]
    for each in (text_kb, adding, scraping):
        assert max(each) <= 1.2 * min(each)


def test_the_account_of_publishing_is_shown():
    server = serving()
    vitals = server._vitals
    state = Publishing(arrived=5, waiting=7, set_aside=2, discarded=1, trouble="mqtt://b:1883: refused")

    def look():
        vitals.running = True
        vitals.got_on(items=1)
        told = [get(server, "/readyz")]
        vitals.publishing = lambda: state
        told.append(get(server, "/readyz"))
        vitals.publishing = lambda: replace(state, answered=True)
        told += [get(server, "/readyz"), get(server, "/metrics")]
        vitals.waits_for = "the broker"
        return [*told, get(server, "/readyz")]

    plain, never, away, metrics, waits = during(server, look)
    assert [plain[0], never[0], away[0], waits[0]] == [200, 503, 200, 503]
    assert "publishing" not in json.loads(plain[2])
    assert json.loads(never[2])["why"] == "the broker has not answered yet: mqtt://b:1883: refused"
    told = json.loads(away[2])["publishing"]
    assert (told["waiting"], told["arrived"], told["set_aside"], told["connected"]) == (7, 5, 2, False)
    found = samples(metrics[2])
    assert found["mace_publish_records_waiting", ()] == 7
    assert found["mace_publish_records_total", (("fate", "set_aside"),)] == 2
    assert found["mace_publish_connected", ()] == 0


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/"])
def test_head_has_the_headers_of_get(path):
    server = serving()

    def ask(method):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], int(answer.headers["Content-Length"]), answer.read()
        finally:
            connection.close()

    (*whole, text), (*headers, nothing) = during(server, lambda: (ask("GET"), ask("HEAD")))
    assert headers[:2] == whole[:2]
    assert headers[2] > 0
    assert len(text) == whole[2]
    assert nothing == b""


def test_ready_while_results_arrive():
    server = serving(stalled_s=1.0)
    vitals = server._vitals

    def look():
        told = []
        told.append(get(server, "/readyz"))
        vitals.running = True
        vitals.got_on(items=1)
        told.append(get(server, "/readyz"))
        vitals.last_results_s -= 30
        told.append(get(server, "/readyz"))
        vitals.ended()
        told.append(get(server, "/readyz"))
        return told

    told = during(server, look)
    assert [status for status, _, _ in told] == [503, 200, 503, 503]
    why = [json.loads(text)["why"] for _, _, text in told]
    assert why == ["not measuring yet, or no longer", "", "no results", "not measuring yet, or no longer"]


@pytest.mark.slow
def test_alive_while_the_event_loop_runs():
    server, seen = serving(stalled_s=1.0), threading.Event()

    async def run():
        await server.open()
        try:
            first = await asyncio.to_thread(get, server, "/healthz")
            asked = asyncio.get_running_loop().run_in_executor(None, later)
            assert seen.wait(60)  # in the event loop: the simulated defect
            return first[0], await asked
        finally:
            await server.aclose()

    def later():
        while (answer := get(server, "/healthz"))[0] == 200:
            time.sleep(0.05)
        seen.set()
        return answer[0], json.loads(answer[2])["event_loop_silent_s"]

    first, (status, silent_s) = asyncio.run(run())
    assert first == 200
    assert status == 503
    assert silent_s >= 1


def test_other_pages():
    server = serving()
    status, _, text = during(server, lambda: get(server, "/"))
    assert (status, text) == (404, "there are /metrics, /healthz and /readyz\n")


@pytest.mark.parametrize("listen", ["9464", ":9464", "host:", "host:http", "h:70000"])
def test_invalid_addresses(listen):
    with pytest.raises(ConfigError, match="expected ADDRESS:PORT such as"):
        endpoint.address(listen)
    assert endpoint.address("[::1]:80") == ("::1", 80)
    status = SINKS["prometheus"].check(Config(sinks=SinksConfig(prometheus=PrometheusConfig(listen=listen))))
    assert not status.ok


def test_an_address_in_use():
    server = serving()

    def other():
        return f"127.0.0.1:{server.port}"

    async def run():
        await server.open()
        listen = other()
        with pytest.raises(Unavailable, match=f"{listen}: Address already in use"):
            await serving(listen=listen).open()
        config = Config(sinks=SinksConfig(prometheus=PrometheusConfig(listen=listen)))
        assert not SINKS["prometheus"].check(config).ok
        await server.aclose()
        assert SINKS["prometheus"].check(config).ok

    asyncio.run(run())


def test_buckets_hold_every_bin():
    bins = np.array([0, 127, 128, 255, 256, 4351])
    assert endpoint._bucketed(bins, np.ones(6, np.int64)).sum() == 6
