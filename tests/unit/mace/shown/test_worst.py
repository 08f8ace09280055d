"""The worst packets of a live stream are those with the largest overhead in the rows, with all their hops."""

import pytest

from contracts.schema import Segment
from mace.shown.worst import KEPT, SLOTS, WorstPackets
from storage.query import Filter, StoreReader
from tests.made_minutes import BEGIN_NS, NS, make_minute
from tests.unit.storage.stored import fill


@pytest.fixture(scope="module")
def minute():
    return make_minute(seconds=75, containers=3)


def fed(results):
    worst = WorstPackets("testhost", "run-1")
    for each in results:
        worst.add(each)
    return worst


def naive(delays, devices, limit, since_ns, names):
    whole = (delays.segment == Segment.OVERHEAD) & (delays.utc_ns >= since_ns)
    rows = [
        (-int(delay), int(packet))
        for delay, packet, device in zip(
            delays.delay_ns[whole], delays.packet[whole], delays.device[whole], strict=True
        )
        if devices[device].container in names
    ]
    return [packet for _, packet in sorted(rows)[:limit]]


@pytest.mark.parametrize("names", [{"c0", "c1", "c2"}, {"c1"}, {"c0", "c2"}, set()])
@pytest.mark.parametrize("since_s", [15, 42])
def test_the_worst_are_those_of_the_rows(minute, names, since_s):
    delays, devices, results = minute
    since_ns = BEGIN_NS + since_s * NS
    # A packet that began just before may have its overhead just after.
    found = fed(results).worst(KEPT, since_ns, lambda name: name in names)
    assert [path.packet for path in found] == naive(delays, devices, KEPT, since_ns, names)


def test_a_packet_is_shown_as_the_store_shows_it(minute, tmp_path):
    _, _, results = minute
    fill(tmp_path / "store", results)
    stored = StoreReader(tmp_path / "store").worst(3, Filter(since_ns=BEGIN_NS + 20 * NS))
    assert fed(results).worst(3, BEGIN_NS + 20 * NS) == [path_without_host(path) for path in stored]


def path_without_host(path):
    """Return a stored path as live: its places name no host."""
    from dataclasses import replace

    hops = tuple(replace(hop, place=replace(hop.place, host="")) for hop in path.hops)
    return replace(path, hops=hops)


def test_memory_is_bounded(minute):
    worst = fed(minute[2])
    assert len(worst._slots) <= SLOTS
    assert all(len(kept) <= KEPT for of_slot in worst._slots.values() for kept in of_slot.values())
    assert sum(len(p.rows) for s in worst._slots.values() for kept in s.values() for p in kept) < 7 * 3 * KEPT * 8
