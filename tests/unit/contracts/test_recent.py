"""The last minute: its figures are those of the delays themselves, and what it keeps is bounded."""

from dataclasses import replace

import numpy as np
import pytest

from contracts import recent
from contracts.histogram import bins_of, quantiles
from contracts.recent import SECONDS, Owner, Recent, containers, moment_of, paths
from contracts.schema import Direction, Segment
from contracts.topology import Device
from tests.made_minutes import BEGIN_NS, NS, make_minute, moment_after, windows_of
from tests.made_results import make_results, topology, with_rows, with_totals

CONTAINERS = 3


@pytest.fixture(scope="module")
def minute():
    return make_minute(containers=CONTAINERS)


def delays_in(delays, moment, window_s):
    start = moment.until_utc_ns - window_s * NS
    return delays[(delays.utc_ns >= start) & (delays.utc_ns < moment.until_utc_ns)]


def expected(values, window_s):
    """Return the figures of delays, computed from the delays."""
    bins, counts = np.unique(bins_of(values), return_counts=True)
    p50, p99 = quantiles(bins, counts, (0.5, 0.99)).clip(values.min(), values.max()).tolist()
    return len(values), len(values) / window_s, p50, p99, int(values.max())


def figures(row):
    found = row.figures
    return found.count, found.per_second, found.p50_ns, found.p99_ns, found.max_ns


@pytest.mark.parametrize("window_s", [1, 10, 60])
def test_figures_of_containers_are_those_of_their_delays(minute, window_s):
    delays, devices, results = minute
    moment = moment_after(results)
    rows = containers(moment, window_s)
    assert [(row.owner.name, row.direction) for row in rows] == [
        (f"c{n}", way) for n in range(CONTAINERS) for way in (Direction.EGRESS, Direction.INGRESS)
    ]
    found = delays_in(delays, moment, window_s)
    of = np.array([device.container for device in devices])[found.device]
    for row in rows:
        mine = (of == row.owner.name) & (found.direction == row.direction) & (found.segment == Segment.OVERHEAD)
        assert figures(row) == expected(found.delay_ns[mine], window_s)


@pytest.mark.parametrize("window_s", [1, 10, 60])
def test_figures_of_a_path_are_those_of_its_devices(minute, window_s):
    delays, devices, results = minute
    moment = moment_after(results)
    wanted = {(Owner("", "c1"), Direction.INGRESS), (Owner("", "c2"), Direction.EGRESS)}
    found = paths(moment, window_s, wanted)
    assert found.keys() == wanted
    assert [row.place.device for row in found[Owner("", "c1"), Direction.INGRESS]] == [
        *("rem0", "out0", "br0", "vethc1", "eth0", "eth0")
    ]
    chosen = delays_in(delays, moment, window_s)
    of = np.array([device.container for device in devices])[chosen.device]
    name = np.array([device.name for device in devices])[chosen.device]
    for (owner, direction), rows in found.items():
        for row in rows:
            mine = (of == owner.name) & (chosen.direction == direction) & (chosen.segment == row.segment)
            mine &= name == row.place.device
            assert figures(row) == expected(chosen.delay_ns[mine], window_s)


def test_each_second_has_its_p99(minute):
    delays, devices, results = minute
    moment = moment_after(results[:5])
    [row] = [row for row in containers(moment, 1) if row.owner.name == "c0" and row.direction is Direction.EGRESS]
    assert row.figures.p99s_ns[: SECONDS - 5] == (-1,) * (SECONDS - 5)
    own = [n for n, device in enumerate(devices) if device.container == "c0"]
    for second in range(5):
        begin = BEGIN_NS + second * NS
        mine = (delays.segment == Segment.OVERHEAD) & np.isin(delays.device, own) & (delays.utc_ns // NS == begin // NS)
        values = delays.delay_ns[mine & (delays.direction == Direction.EGRESS)]
        assert row.figures.p99s_ns[SECONDS - 5 + second] == expected(values, 1)[3]


def test_at_the_beginning_the_rate_is_of_the_seconds_so_far(minute):
    moment = moment_after(minute[2][:3])
    assert [moment.covered_s(window) for window in (1, 10, 60)] == [1, 3, 3]
    row = containers(moment, 60)[0]
    assert row.figures.per_second == row.figures.count / 3


def test_without_packets_time_goes_on(minute):
    kept = Recent()
    for each in minute[2][:5]:
        kept.add(each)
    before = containers(kept.moment(), 10)
    assert all(row.figures.count for row in before)
    kept.advance(BEGIN_NS + 25 * NS)
    after = containers(kept.moment(), 10)
    # The rows stay for a minute, so that a table does not jump.
    assert [row.key for row in after] == [row.key for row in before]
    assert not any(row.figures.count or row.figures.max_ns or row.figures.p50_ns for row in after)
    kept.advance(BEGIN_NS + 66 * NS)
    assert containers(kept.moment(), 60) == []


def test_a_moment_does_not_change(minute):
    kept = Recent()
    for each in minute[2][:5]:
        kept.add(each)
    moment = kept.moment()
    rows = containers(moment, 10)
    for each in minute[2][5:]:
        kept.add(each)
    assert containers(moment, 10) == rows
    assert kept.moment() is not moment


def test_a_late_second_takes_its_place(minute):
    _, _, results = minute
    assert containers(moment_after([results[0], results[2], results[1], *results[3:8]]), 10) == containers(
        moment_after(results[:8]), 10
    )


def test_stored_windows_make_the_same_moment(minute):
    _, _, results = minute
    live = moment_after(results)
    stored = moment_of(windows_of(results), live.places, live.since_utc_ns, live.until_utc_ns)
    for window_s in (1, 10, 60):
        assert containers(stored, window_s) == containers(live, window_s)


def test_memory_is_bounded_and_what_is_left_is_said(minute, monkeypatch):
    _, _, results = minute
    cells = [len(each.rows.windows.bins) for each in results]
    monkeypatch.setattr(recent, "MOST_CELLS", sum(cells[-4:]))
    moment = moment_after(results)
    assert len(moment.seconds) == 4
    assert moment.covered_s(60) == 4
    row = containers(moment, 60)[0]
    assert row.figures.per_second == row.figures.count / 4


def test_of_other_widths_nothing_is_counted_twice(minute):
    _, _, results = minute
    wide = [
        with_rows(each, windows=each.rows.windows.with_column("width_s", each.rows.windows.column("width_s") * 10))
        for each in results
    ]
    assert containers(moment_after(wide), 60) == []


def with_ids(devices, names):
    """Return devices whose containers have an id each, and new names."""
    return tuple(
        replace(device, container=names[int(device.container[1:])], container_id=f"id-{device.container}")
        if device.container
        else device
        for device in devices
    )


def test_a_renamed_container_is_one_row_under_its_newest_name(minute):
    _, devices, results = minute
    before, after = with_ids(devices, ["a", "b", "c"]), with_ids(devices, ["a", "new", "c"])
    both = before + after
    first = [with_rows(each, devices=before) for each in results[:30]]
    moved = [
        with_rows(
            each,
            devices=both,
            windows=each.rows.windows.with_column("device", each.rows.windows.column("device") + len(before)),
        )
        for each in results[30:]
    ]
    moment = moment_after([*first, *moved])
    rows = containers(moment, 60)
    assert [row.owner for row in rows][::2] == [
        Owner("", "a", "id-c0"),
        Owner("", "c", "id-c2"),
        Owner("", "new", "id-c1"),
    ]
    plain = {row.owner.name: figures(row) for row in containers(moment_after(results), 60) if row.direction == 1}
    assert {row.owner.container_id[3:]: figures(row) for row in rows if row.direction == 1} == plain
    path = paths(moment, 60, {(Owner("", "new", "id-c1"), Direction.EGRESS)})
    [found] = path.values()
    assert [row.place.device for row in found] == ["eth0", "vethc1", "br0", "out0", "rem0"]


def test_two_containers_of_one_name_are_two_rows(minute):
    _, devices, results = minute
    same = with_ids(devices, ["twin", "twin", "c"])
    rows = containers(moment_after([with_rows(each, devices=same) for each in results]), 60)
    assert [row.owner for row in rows if row.owner.name == "twin"][::2] == [
        Owner("", "twin", "id-c0"),
        Owner("", "twin", "id-c1"),
    ]


def test_a_container_without_an_overhead_has_a_row(minute):
    """Of macvlan, ingress is not seen as a whole."""
    _, _, results = minute

    def without(each):
        windows = each.rows.windows
        return with_rows(each, windows=windows[windows.column("segment") != Segment.OVERHEAD])

    rows = containers(moment_after([without(each) for each in results]), 60)
    assert len(rows) == 2 * CONTAINERS
    assert not any(row.figures.count for row in rows)


def test_before_the_first_results_there_is_nothing():
    assert containers(Recent().moment(), 60) == []
    quiet = Recent()
    quiet.add(with_totals(make_results(make_results_rows()), settled_utc_ns=BEGIN_NS))
    assert containers(quiet.moment(), 10) == []


def make_results_rows():
    from contracts.schema import Delays

    return Delays.empty()


def test_a_namespace_without_a_name_is_named_by_its_number():
    delays, _, results = make_minute(seconds=3, containers=1)
    del delays
    bare = tuple(
        Device(d.netns, d.ifindex, d.name, d.kind, role=d.role) if d.role.value == "inner" else d for d in topology(1)
    )
    listed = (bare[0], *results[0].rows.devices[1:])
    rows = containers(moment_after([with_rows(each, devices=listed) for each in results]), 10)
    assert f"namespace {bare[0].netns}" in {row.owner.name for row in rows}
