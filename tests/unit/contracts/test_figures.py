import io
import json
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from contracts.figures import DevicePlace, Distribution, Summary, ranks
from contracts.histogram import bins_of, quantiles
from contracts.hooks import TRACEPOINTS, Hook
from contracts.ledger import Ledger
from contracts.schema import Direction, HookCost, Segment
from contracts.topology import Device, Role, Sharer
from contracts.windowtable import WindowTable
from mace.shown import tables
from tests.made_results import START_NS, make_delays, make_results, make_windows, topology, with_rows, with_totals


def live(delays, *, containers=1, widths=(1,), **changes):
    windows = [w for width in widths for w in make_windows(delays, width)]
    summary = Summary()
    summary.add(make_results(delays, containers=containers, windows=windows, **changes))
    return summary


def printed(summary, width=80):
    console = Console(file=io.StringIO(), width=width)
    tables.show(summary, console)
    return console.file.getvalue()


def test_ranks_follow_the_way_out():
    devices = topology(2)
    by_name = dict(zip((f"{d.container}{d.name}" for d in devices), ranks(devices), strict=True))
    assert by_name == {"c0eth0": 0, "vethc0": 1, "c1eth0": 0, "vethc1": 1, "br0": 2, "out0": 4, "rem0": 5}


def test_an_unrelated_host_device_ranks_between_bridge_and_outer():
    assert ranks([Device(1, 9, "tun0", "tun", role=Role.HOST), Device(1, 1, "lo", "loopback")]) == [3, 6]


def test_a_distribution_counts_the_added_windows():
    values = np.random.default_rng(1).integers(0, 10**7, 5000)
    delays = Distribution()
    for part in np.array_split(values, 300):
        bins, counts = np.unique(bins_of(part), return_counts=True)
        delays.add(len(part), int(part.sum()), int(part.min()), int(part.max()), bins, counts)
    bins, counts = np.unique(bins_of(values), return_counts=True)
    assert (delays.count, delays.sum_ns, delays.min_ns, delays.max_ns) == (
        5000,
        values.sum(),
        values.min(),
        values.max(),
    )
    assert delays.quantiles() == quantiles(bins, counts).tolist()
    assert delays.as_dict()["mean_ns"] == round(values.mean(), 1)


@pytest.mark.slow
def test_a_distribution_of_a_long_run_takes_bounded_memory():
    """A distribution does not keep the windows that it adds, which are views into arrays of many windows."""
    delays, all_windows = Distribution(), np.arange(1000)
    kept = weakref.ref(all_windows)
    delays.add(10, 45, 0, 9, all_windows[:10], np.ones(10, np.int64))
    del all_windows
    assert kept() is None
    tracemalloc.start()
    try:
        for n in range(20_000):
            delays.add(1, 5, 5, 5, np.array([n % 50]), np.array([1]))
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    assert delays.histogram()[1].sum() == delays.count == 20_010


def test_an_empty_distribution_is_all_zero():
    assert set(Distribution().as_dict().values()) == {0}


def test_windows_of_two_widths_count_once():
    delays = make_delays(300, containers=2)
    both, one = live(delays, containers=2, widths=(1, 10)), live(delays, containers=2)
    assert both.as_dict() == one.as_dict()


def test_figures_do_not_wait_for_open_wide_windows():
    delays = make_delays(100)
    summary = live(delays, widths=(10,))
    later = make_delays(100, seed=1, start_ns=START_NS + 10**9)
    summary.add(make_results(later, windows=[*make_windows(delays), *make_windows(later)]))
    assert sum(d.count for _, d in summary.rows()) == 2 * len(delays)


def test_as_dict_has_the_documented_keys():
    delays = make_delays(400, containers=2)
    found = json.loads(json.dumps(live(delays, containers=2).as_dict()))
    assert list(found["ledger"]) == [
        "records",
        "matched",
        "unmatched",
        "ambiguous",
        "expired",
        "dropped",
        "in_flight",
        "lost",
        "discarded",
    ]
    assert found["packets"] == 400
    assert [(o["container"], o["direction"]) for o in found["overhead"]] == [
        ("c0", "egress"),
        ("c0", "ingress"),
        ("c1", "egress"),
        ("c1", "ingress"),
    ]
    figures = {"count", "min_ns", "mean_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"}
    names = {"container", "netns", "netns_id", "device", "ifindex", "kind", "role", "direction", "segment"}
    assert all(set(d) == figures | names for d in found["devices"] + found["delivery"])
    assert {d["segment"] for d in found["devices"]} == {"device", "outside"}
    assert {d["segment"] for d in found["delivery"]} == {"delivery"}
    assert "rows_not_stored" not in found


def test_the_cost_of_observing_is_shown():
    results = with_totals(make_results(make_delays(10)), cost=(HookCost(Hook.NETIF_RX, 1234, 10, 850),))
    first, second = Summary(), Summary()
    first.add(results)
    assert "cost: netif_rx 85 ns × 1,234" in tables.ledger_line(first).plain
    assert first.as_dict()["cost"] == [
        {"hook": "netif_rx", "calls": 1234, "timed": 10, "timed_ns": 850, "ns_per_call": 85.0}
    ]
    second.add(with_totals(results, cost=(HookCost(Hook.NET_DEV_QUEUE, 5, 1, 9), HookCost(Hook.NETIF_RX, 6, 0, 0))))
    first.merge(second)
    assert first.cost == (HookCost(Hook.NET_DEV_QUEUE, 5, 1, 9), HookCost(Hook.NETIF_RX, 1240, 10, 850))


def test_devices_come_in_the_order_of_the_path():
    found = live(make_delays(100)).as_dict()["devices"]
    names = [(d["direction"], d["device"]) for d in found]
    out = ["eth0", "vethc0", "br0", "out0", "rem0"]
    assert names == [*(("egress", n) for n in out), *(("ingress", n) for n in reversed(out))]


def test_summaries_of_several_runs_merge():
    delays = make_delays(200, containers=2)
    half = len(delays) // 2
    parts = [live(delays[:half], containers=2), live(delays[half:], containers=2)]
    whole = Summary()
    for part in parts:
        whole.merge(part)
    expected = live(delays, containers=2).as_dict()
    assert whole.as_dict() | {"packets": 0} == expected | {"packets": 0}
    assert whole.packets == sum(p.packets for p in parts)


def test_merging_leaves_the_merged_summary_unchanged():
    one, two = live(make_delays(50)), live(make_delays(70, seed=2))
    before = two.as_dict()
    one.merge(two)
    one.merge(two)
    assert two.as_dict() == before


def test_the_ledger_is_printed_even_when_all_is_zero():
    text = " ".join(printed(Summary()).split())
    for name in Ledger().as_dict():
        assert f"{name.replace('_', ' ')} 0" in text


def test_a_loss_is_in_the_first_line():
    quiet = printed(live(make_delays(10)))
    assert "not everything was seen" not in quiet
    for ledger in (Ledger(lost=5), Ledger(discarded=5)):
        loud = printed(live(make_delays(10), ledger=ledger))
        assert loud.splitlines()[0].count("not everything was seen") == 1
        assert "5 records were" in loud


def test_records_in_no_category_are_shown_as_a_defect():
    assert "defect" in printed(live(make_delays(10), ledger=Ledger(records=3, matched=1)))


def test_tables_fit_into_eighty_columns():
    text = printed(live(make_delays(3000, containers=3), containers=3), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_devices_of_equal_names_are_distinguished():
    before = topology()
    after = (Device(77, 2, "eth0", "veth", 1, 1, 0, True, "c0", "c0", Role.INNER), *before[1:])
    delays, later = make_delays(20), make_delays(20)
    later.device[:] += len(before)
    summary = Summary()
    both = before + after
    summary.add(make_results(delays, devices=both, windows=make_windows(delays) + make_windows(later)))
    assert "eth0 (77:2)" in printed(summary, 120)
    assert "eth0 (4026532000:2)" in printed(summary, 120)
    egress = [k[0].netns_id for k, _ in summary.overhead() if k[1] is Direction.EGRESS]
    assert sorted(egress) == [77, 4026532000]
    assert len(summary.rows(Segment.OVERHEAD)) == 4


def test_a_device_without_recorded_receptions_is_named():
    """100 packets leave per received packet: only ARP passes the tracepoint, all other packets bypass it."""

    def told(sent, received, kind="veth", hooks=None):
        summary = Summary()
        if hooks is not None:
            summary.observed(hooks)
        place = DevicePlace(0, "c0", "net:[7]", 7, "eth0", 2, kind, Role.INNER.value)
        for direction, count in ((Direction.EGRESS, sent), (Direction.INGRESS, received)):
            if count:
                of = summary.distribution(place, direction, Segment.DEVICE)
                of.add(count, count, 1, 1, np.ones(1, np.int64), np.array([count]))
        return summary.unseen()

    assert told(99, 0) == []
    assert told(1000, 10) == []
    (one,) = told(480, 1)
    assert one.startswith("eth0 of c0 sent 480 packets and was seen to receive 1: ")
    assert "bpf_redirect_peer" in one
    assert len(told(100, 0)) == 1
    (other,) = told(480, 0, "macvlan")
    assert other.startswith("eth0 of c0 is a macvlan")
    assert "kernel module" in other
    tracepoints = [info.tracepoint for info in TRACEPOINTS]
    for kind in ("veth", "macvlan"):
        assert len(told(480, 0, kind, tracepoints)) == 1
        assert told(480, 0, kind, [*tracepoints, "function:ip_rcv"]) == []


def test_one_run_without_the_hook_is_enough_to_name_devices():
    seeing, blind, unknown = Summary(), Summary(), Summary()
    seeing.observed(["function:ip_rcv"])
    blind.observed([])
    whole = Summary()
    for one, known in ((unknown, None), (seeing, True), (unknown, True), (blind, False), (seeing, False)):
        whole.merge(one)
        assert whole.sees_past_tracepoints is known


def test_a_pod_s_rows_have_its_parts_and_its_containers():
    names = {"container": "default/web-6d4cf56db6-8xk2p", "container_id": "u1", "pod_containers": "app,sidecar"}
    devices = tuple(replace(d, **names) if d.container == "c0" else d for d in topology(2))
    summary = Summary()
    delays = make_delays(40, containers=2)
    results = make_results(delays, containers=2, windows=make_windows(delays), devices=devices)
    summary.add(with_totals(results, present=devices))
    other = Summary()
    other.merge(summary)
    for each in (summary, other):
        found = {row["container"]: row for row in each.as_dict()["overhead"]}
        parts = ("namespace", "pod", "workload", "pod_containers")
        pod = found["default/web-6d4cf56db6-8xk2p"]
        assert [pod[part] for part in parts] == ["default", "web-6d4cf56db6-8xk2p", "web", ["app", "sidecar"]]
        assert not found["c1"].keys() & set(parts)
    shown = printed(summary, 160)
    assert "containers that share a pod's devices: default/web-6d4cf56db6-8xk2p: app, sidecar\n" in shown


def test_containers_on_the_host_s_network_are_named():
    summary = live(make_delays(10))
    assert "on_host_network" not in summary.as_dict()
    assert "host's own network" not in printed(summary)
    summary.sharers = (Sharer("db"), Sharer("web-tmp", "a" * 64))
    summary.add(with_totals(make_results(make_delays(0)), on_host_network=(Sharer("web", "a" * 64),)))
    assert summary.as_dict()["on_host_network"] == ["db", "web"]
    assert "on the host's own network, with no device to cross: db, web" in printed(summary)
    other = Summary(sharers=(Sharer("cache"), Sharer("db")))
    other.merge(summary)
    assert other.on_host_network == ["cache", "db", "web"]


def called(name, container_id, results, containers=1):
    """Return the results with another name and id of the first container, whose device numbers follow the old ones."""
    devices = tuple(
        replace(d, container=name, container_id=container_id) if d.role is Role.INNER and d.container == "c0" else d
        for d in topology(containers)
    )
    return with_rows(results, devices=devices)


def renamed(*names, containers=1, listed=None):
    """Return a summary of a container that had these (name, id) in turn, a second each."""
    summary, devices = Summary(), ()
    for number, (name, container_id) in enumerate(names):
        delays = make_delays(20, containers=containers, start_ns=START_NS + number * 10**9)
        results = called(name, container_id, make_results(delays, containers=containers), containers)
        windows = [replace(w, device=w.device + len(devices)) for w in make_windows(delays)]
        devices = (*devices, *results.rows.devices)
        changed = with_rows(results, devices=devices, windows=WindowTable.of(windows))
        summary.add(with_totals(changed, present=listed or results.rows.devices))
    return summary


ID, OTHER_ID = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([("web-tmp", ID), ("web", ID)], [("web", ID)]),
        ([("a", ID), ("b", ID), ("a", ID)], [("a", ID)]),
        ([("web", ""), ("web", ID)], [("web", ID)]),  # it ran before the runtime was queried
        ([("web", ID), ("web", OTHER_ID)], [("web", OTHER_ID)]),  # a container without id
        ([("web-tmp", ""), ("web", "")], [("web", ""), ("web-tmp", "")]),
        ([("web-tmp", ID), ("web", OTHER_ID)], [("web", OTHER_ID), ("web-tmp", ID)]),
    ],
)
def test_a_container_that_was_renamed_is_one_row_by_its_newest_name(names, shown):
    summary = renamed(*names)
    egress = [(k, d) for k, d in summary.overhead() if k[1] is Direction.EGRESS]
    assert [(k[0].container, k[0].container_id) for k, _ in egress] == shown
    assert sum(d.count for _, d in egress) == 10 * len(names)
    entries = [e for e in summary.as_dict()["overhead"] if e["direction"] == "egress"]
    assert [(e["container"], e.get("container_id", "")) for e in entries] == shown
    again = Summary()
    again.merge(summary)
    assert again.as_dict()["overhead"] == summary.as_dict()["overhead"]


def test_a_renamed_container_without_packets_has_its_new_name():
    listed = tuple(replace(d, container="web", container_id=ID) for d in topology()[:1])
    summary = renamed(("web-tmp", ID), listed=listed)
    assert {k[0].container for k, _ in summary.overhead()} == {"web"}
    assert "web-tmp" not in printed(summary)


def test_merged_names_leave_the_original_summary_unchanged():
    summary = renamed(("web-tmp", ID), ("web", ID))
    assert summary.as_dict() == summary.as_dict()
