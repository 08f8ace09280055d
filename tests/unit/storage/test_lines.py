"""Line protocol encoded by columns equals one formatted string per row; rows stay distinct; the series budget."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.clock import ClockPair
from contracts.cpus import Measure, StagePlace
from contracts.figures import ranks
from contracts.metrics import MEASUREMENTS
from contracts.schema import NOT_TOLD, Delays, Direction, Grade, Outcome, RoundTripRows, RoundTrips, Segment
from contracts.topology import Device, Role, Sharer
from storage.lines import Budget, StreamLines, key
from tests.durations import S
from tests.made_results import (
    HEADER,
    START_NS,
    delays_of,
    make_delays,
    make_results,
    make_stages,
    make_windows,
    topology,
    with_rows,
)

DEVICES = topology(2)


def naive(delays, devices):
    """Return the expected lines, without slots."""
    for row in range(len(delays)):
        device = devices[delays.device[row]]
        whole = delays.segment[row] == Segment.OVERHEAD
        tags = [
            ("host", HEADER.host), ("container", device.container), ("netns", device.netns_name),
            ("device", device.name), ("kind", device.kind),
            ("direction", Direction(delays.direction[row]).name.lower()),
            ("segment", "" if whole else Segment(delays.segment[row]).name.lower()),
            ("source", HEADER.source), ("grade", Grade(delays.grade[row]).name.lower()),
        ]  # fmt: skip
        fields = {
            "overhead_ns" if whole else "delay_ns": delays.delay_ns[row],
            "l3_len": delays.l3_len[row],
        }
        if delays.outcome[row] == Outcome.DROPPED:
            fields["dropped"] = 1
        if not whole:
            fields["position"] = delays.position[row]
        name = "overhead" if whole else "device_delay"
        told = ",".join(f"{k}={v}" for k, v in tags if v)
        yield f"{name},{told} {','.join(f'{k}={v}i' for k, v in fields.items())} {delays.utc_ns[row]}"


def encoded(lines, delays, devices=DEVICES, most=1000):
    text = b""
    for piece in lines.packets(delays, devices, most):
        assert bytes(piece.data).count(b"\n") == piece.rows <= most
        text += bytes(piece.data)
    return text.decode().splitlines()


def identities(text):
    """Return (measurement and tags, time) of each line, which identify a row in a database."""
    return Counter((line.split(" ")[0], line.rsplit(" ", 1)[1]) for line in text)


def stream(budget=10_000, **options):
    return StreamLines(HEADER, Budget(budget), **options)


@pytest.mark.parametrize("most", [1, 7, 100_000])
def test_lines_are_those_of_one_string_a_row(most):
    delays = make_delays(200, containers=2)
    assert encoded(stream(), delays, most=most) == list(naive(delays, DEVICES))


rows = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, len(DEVICES) - 1), st.sampled_from(Direction), st.sampled_from(Segment),
        st.integers(0, 254), st.integers(-(2**40), 2**62), st.integers(0, 2**20), st.sampled_from(Grade),
        st.sampled_from(Outcome),
    ),
    max_size=30,
)  # fmt: skip


@pytest.mark.slow
@given(st.lists(rows, min_size=1, max_size=4))
def test_any_rows_in_any_batches(batches):
    """Every row has a line, and no two lines have the same series and time, even with few distinct times."""
    lines = stream()
    text, expected = [], []
    for number, batch in enumerate(batches):
        time, device, direction, segment, position, delay, l3_len, grade, outcome = (
            map(np.array, zip(*batch, strict=True)) if batch else [np.zeros(0, np.int64)] * 9
        )
        delays = delays_of(
            len(batch), utc_ns=START_NS + time, packet=np.arange(len(batch)) + 100 * number,
            device=device, direction=direction, segment=segment, delay_ns=delay, l3_len=l3_len, grade=grade,
            position=np.where(segment == Segment.OVERHEAD, 255, position), outcome=outcome,
        )  # fmt: skip
        text += encoded(lines, delays, most=5)
        expected += naive(delays, DEVICES)
    assert [re.sub(r",slot=\d+ ", " ", line) for line in text] == expected
    assert all(n == 1 for n in identities(text).values())


def test_batch_boundaries_do_not_change_slots():
    delays = make_delays(500)
    delays = replace(delays, utc_ns=delays.utc_ns // 100_000 * 100_000)  # many rows share a time
    whole = encoded(stream(), delays)
    assert any(",slot=" in line for line in whole)
    lines = stream()
    cut = [line for at in range(0, len(delays), 17) for line in encoded(lines, delays[at : at + 17])]
    assert cut == whole


def test_devices_of_equal_names_keep_separate_rows():
    """A container restarts within a window: another namespace and device have the same names."""
    first = DEVICES[0]
    again = replace(first, netns=first.netns + 100, ifindex=9)
    devices = (*DEVICES, again)
    delays = make_delays(40)
    twin = replace(delays, device=np.where(delays.device == 0, len(DEVICES), delays.device).astype("<i4"))
    twin = replace(twin, packet=delays.packet + np.uint64(1))
    text = encoded(stream(), Delays.concatenate([delays, twin]), devices)
    assert all(n == 1 for n in identities(text).values())
    windows = [*make_windows(delays), *make_windows(twin)]
    text = list(stream().windows(windows, devices, ranks(devices)))
    assert len(text) == len(windows)
    assert all(n == 1 for n in identities(text).values())


def test_windows():
    delays = make_delays(300, containers=2)
    windows = [w for width in (1, 10) for w in make_windows(delays, width)]
    text = list(stream().windows(windows, DEVICES, ranks(DEVICES)))
    assert len(text) == len(windows)
    for line, w in zip(text, windows, strict=True):
        device = DEVICES[w.device]
        series, fields, time = re.fullmatch(r"(\S+) (.*) (\d+)\n", line).groups()
        assert int(time) == w.start_utc_ns
        tags = dict(t.split("=") for t in series.split(",")[1:])
        assert (tags["device"], tags["role"], tags["width_s"]) == (device.name, device.role.value, str(w.width_s))
        assert tags["rank"] == str(ranks(DEVICES)[w.device])
        told = dict(f.split("=") for f in fields.split(","))
        assert {n: int(v[:-1]) for n, v in told.items() if n != "histogram"} == {
            n: getattr(w, n) for n in told if n != "histogram"
        }
        bins = dict(map(int, pair.split(":")) for pair in told["histogram"].strip('"').split())
        assert list(bins) == w.bins.tolist()
        assert list(bins.values()) == w.counts.tolist()


def test_two_runs_share_a_window_and_keep_both_parts_of_it():
    windows = make_windows(make_delays(50), 10)
    start = windows[0].start_utc_ns
    series = set()
    for began in (start - 5 * S, start + 2 * S, start + 3 * S):
        header = replace(HEADER, clock=ClockPair(0, began, 0))
        lines = StreamLines(header, Budget(1000))
        text = list(lines.windows(windows, DEVICES, ranks(DEVICES)))
        assert text == list(lines.windows(windows, DEVICES, ranks(DEVICES))), "sent again it is the same"
        series |= set(identities(text))
    assert len(series) == 3 * len(windows)


@pytest.mark.slow
def test_sampling_takes_whole_packets():
    delays = make_delays(2000)
    lines = stream(sample=4)
    text = encoded(lines, delays)
    assert len(text) + lines.left_out == len(delays)
    kept = {int(p) for p in delays.packet if encoded(stream(sample=4), delays[delays.packet == p])}
    assert 350 < len(kept) < 650
    expected = delays[np.isin(delays.packet, np.array(sorted(kept), np.uint64))]
    assert text == list(naive(expected, DEVICES))
    none = stream(sample=0)
    assert encoded(none, delays) == []
    assert none.left_out == len(delays)


def test_the_budget_refuses_new_series_and_reports_it():
    said = []
    lines = StreamLines(HEADER, Budget(5, said.append))
    delays = make_delays(100, containers=2)
    text = encoded(lines, delays)
    assert len({line.split(" ")[0] for line in text}) == 5
    assert len(text) + lines.over_budget == len(delays)
    assert lines.over_budget > 0
    assert len(said) == 1
    again = lines.over_budget
    assert encoded(lines, delays) != []
    assert lines.over_budget == 2 * again, "those that are known go on, the others are counted each time"
    assert list(lines.windows(make_windows(delays), DEVICES, ranks(DEVICES))) == []


def test_stages_are_counters_of_the_run():
    stages, places = make_stages(
        [
            (StagePlace(1, 0, 0, 3), Direction.EGRESS, Measure.RUN, [5, 7_000]),
            (StagePlace(0, 0, -1, -1), Direction.INGRESS, Measure.WORK, [9]),
        ]
    )
    told = with_rows(make_results(make_delays(2)), stages=stages, places=places)
    inner, veth = told.rows.devices[:2]
    lines = stream()
    at = told.totals.upto_utc_ns
    of, source = f"cpu_stage,host={HEADER.host},container=c0", f"source={HEADER.source}"
    whole = f"{of},netns={inner.netns_name},device=eth0,kind=veth,direction=ingress,measure=work,{source}"
    stage = f"{of},netns=host,device={veth.name},kind=veth,direction=egress,measure=run,cpu=3,moved=yes,{source}"
    assert list(lines.stages(told.rows, told.totals)) == [
        f"{whole} count=1i,sum_ns=9i {at}\n",
        f"{stage} count=2i,sum_ns=7005i {at}\n",
    ]
    [_, again] = lines.stages(told.rows, told.totals)
    assert " count=4i,sum_ns=14010i " in again
    full = StreamLines(HEADER, Budget(1))
    assert len(list(full.stages(told.rows, told.totals))) == 1
    assert full.over_budget == 1


def test_round_trips():
    trips = RoundTrips(
        "ping -U", "c1", "c1", ("paired", "no_reply"),
        RoundTripRows(
            utc_ns=np.array([START_NS, START_NS, START_NS + 5, NOT_TOLD]), seq=np.array([1, 1, 2, 3]),
            tool_rtt_ns=np.array([90_000, 95_000, NOT_TOLD, NOT_TOLD]), host_rtt_ns=np.array([72_000, NOT_TOLD, 0, 0]),
            nic_rtt_ns=np.array([50_000, 55_000, 0, 0]), egress_ns=np.array([12_000, 12_000, 0, 0]),
            ingress_ns=np.array([8_000, 8_000, 0, 0]), grade=np.array([3, 3, 0, 0], "u1"),
            reason=np.array([0, 0, 1, 1], "u1"), temporal_error_ns=np.array([0, NOT_TOLD, NOT_TOLD, NOT_TOLD]),
            host_rtt_lower_bound_ns=np.array([70_000, 75_000, 0, 0]),
            tracer_cost_ns=np.array([2_000, NOT_TOLD, NOT_TOLD, NOT_TOLD]),
            tracer_cost_error_ns=np.array([700, NOT_TOLD, NOT_TOLD, NOT_TOLD]),
        ),
    )  # fmt: skip
    lines = stream()
    common = f"rtt,host={HEADER.host},container=c1,netns=c1,tool=ping\\ -U,source=synthetic"
    paired = f"{common},grade=exact,reason=paired"
    bound = "host_rtt_lower_bound_ns"
    rest = "egress_ns=12000i,ingress_ns=8000i"
    first = f"seq=1i,tool_rtt_ns=90000i,host_rtt_ns=72000i,{bound}=70000i,nic_rtt_ns=50000i,{rest}"
    cost = "tracer_cost_ns=2000i,tracer_cost_error_ns=700i"
    further = f"seq=1i,tool_rtt_ns=95000i,{bound}=75000i,nic_rtt_ns=55000i,{rest}"
    assert list(lines.round_trips(trips)) == [
        f"{paired} {first},temporal_error_ns=0i,{cost} {START_NS}\n",
        f"{paired},slot=1 {further} {START_NS}\n",
        f"{common},reason=no_reply seq=2i {START_NS + 5}\n",
    ]
    assert lines.left_out == 1


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a b", "a\\ b"),
        ("a,b=c", "a\\,b\\=c"),
        ("a\nb\x1b", "a\\nb\\x1b"),
        ("a\\b", "a\\b"),
        ("ü→", "ü→"),
        # VictoriaMetrics reads a backslash as an escape before an escaped character, before another backslash and at
        # the end.
        ("end\\", "end\\x5c"),
        ("a\\,host\\=b\\ \\\\", "a\\x5c\\,host\\x5c\\=b\\x5c\\ \\x5c\\x5c"),
        ("a\\\nb", "a\\x5c\\nb"),
    ],
)
def test_names_are_escaped(name, written):
    devices = (Device(1, 2, name, "veth", container=name, role=Role.INNER), *DEVICES[1:])
    text = encoded(stream(), make_delays(2), devices)
    assert f",container={written},device={written},kind=veth," in text[0]
    assert len(text) == len(make_delays(2))


def test_series_have_the_catalogues_tags():
    tags = MEASUREMENTS["rtt"].tags
    assert key("rtt", dict.fromkeys(reversed(tags), "x")) == "rtt," + ",".join(f"{tag}=x" for tag in tags)
    with pytest.raises(KeyError, match="rtt has no tag port"):
        key("rtt", {"port": "80"})


def test_containers_are_written_at_start_at_renaming_and_once_a_minute():
    lines = StreamLines(HEADER, Budget(3))
    minute = START_NS // 60_000_000_000 * 60_000_000_000

    def told(second, *names, sharers=()):
        devices = tuple(Device(n, 2, "eth0", "veth", container=c, container_id=i) for n, (c, i) in enumerate(names))
        totals = make_results(Delays.empty(), upto_utc_ns=minute + second * 10**9).totals
        return list(lines.containers(replace(totals, present=devices, on_host_network=sharers)))

    series = "container_info,host=testhost,container={},container_id={}{},source=synthetic present=1i {}\n"
    assert told(1, ("no id", "")) == []
    assert told(2, ("web-tmp", "a1")) == [series.format("web-tmp", "a1", "", minute + 2 * 10**9)]
    assert told(3, ("web-tmp", "a1")) == []
    assert told(4, ("web", "a1")) == [series.format("web", "a1", "", minute + 4 * 10**9)]
    agent = series.format("an\\ agent", "b2", ",netns=host", minute + 61 * 10**9)
    assert told(61, ("web", "a1"), sharers=(Sharer("an agent", "b2"),)) == [
        agent,
        series.format("web", "a1", "", minute + 61 * 10**9),
    ]
    assert told(62, ("db", "c3")) == []
    assert lines.over_budget == 1
    assert list(lines.containers(make_results(Delays.empty()).totals)) == []  # a source that lists no devices


def test_a_pod_is_one_container_in_every_series_and_its_parts_are_told_once():
    names = {"container": "default/web-6d4cf56db6-8xk2p", "container_id": "u1", "pod_containers": "app,sidecar"}
    device = Device(1, 2, "eth0", "veth", netns_name="cni-1", **names)
    lines = StreamLines(HEADER, Budget(100))
    totals = replace(make_results(Delays.empty()).totals, present=(device,))
    (told,) = lines.containers(totals)
    assert told.startswith(
        "container_info,host=testhost,container=default/web-6d4cf56db6-8xk2p,container_id=u1,netns=cni-1,"
        "namespace=default,pod=web-6d4cf56db6-8xk2p,workload=web,pod_containers=app\\,sidecar,"
        "source=synthetic present=1i "
    )
    assert lines._device_tags(device)["container"] == "default/web-6d4cf56db6-8xk2p"
    assert set(lines._device_tags(device)) == {"host", "container", "netns", "device", "kind"}
    # One more container starts in the pod: only its info is a new series.
    (more,) = lines.containers(replace(totals, present=(replace(device, pod_containers="app,extra,sidecar"),)))
    assert "extra" in more
    delays = make_delays(20)
    started = topology()
    windows = make_windows(delays)
    written = set()
    for containers in ("app", "app,sidecar"):
        now = tuple(replace(d, pod_containers=containers) for d in started)
        written.add(frozenset(row.partition(" ")[0] for row in lines.windows(windows, now, ranks(now))))
    assert len(written) == 1
