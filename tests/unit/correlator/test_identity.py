"""The rules of the essay in correlator/identity.py, one example each."""

from dataclasses import replace

import pytest

from contracts.figures import Summary
from contracts.schema import Delays, Direction, Outcome, Segment
from contracts.topology import Device, Role
from correlator.engine import Engine, EngineConfig
from mace.shown import tables
from tests.traffic import ACROSS, C1, CODE, DEVICES, HOST, REPLY, REQUEST, Tape, topology

TIMEOUT_NS = 10_000


def correlate(tape, *items, **config):
    engine = Engine(0, EngineConfig(timeout_ns=TIMEOUT_NS, **config))
    results = []
    for item in items or (topology(), tape.batch()):
        results += engine.feed(item)
    results.append(engine.finish())
    rows = Delays.concatenate([r.rows.delays for r in results])
    return rows, results[-1]


def told(rows, last, segment=None):
    """Return [(container, netns, device, direction, segment, delay)] in the order of time and path."""
    order = sorted(range(len(rows)), key=lambda i: (rows.utc_ns[i], rows.position[i]))
    found = []
    for i in order:
        d = last.rows.devices[rows.device[i]]
        way, part = Direction(int(rows.direction[i])).name, Segment(int(rows.segment[i])).name
        if segment in (None, part):
            found.append((d.container, d.netns, d.name, way, part, int(rows.delay_ns[i])))
    return found


def test_a_request_and_its_reply():
    tape = Tape()
    tape.packet(REQUEST, 1_000)
    tape.packet(REPLY + " c", 5_000, skb=2)
    rows, last = correlate(tape)
    assert [(row[2], *row[3:]) for row in told(rows, last)] == [
        ("eth0", "EGRESS", "DEVICE", 200),
        ("eth0", "EGRESS", "OVERHEAD", 500),
        ("veth1", "EGRESS", "DEVICE", 200),
        ("br0", "EGRESS", "DEVICE", 100),
        ("out0", "EGRESS", "OUTSIDE", 200),
        ("rem0", "EGRESS", "OUTSIDE", 100),
        ("rem0", "INGRESS", "OUTSIDE", 200),
        ("out0", "INGRESS", "DEVICE", 100),
        ("eth0", "INGRESS", "OVERHEAD", 600),
        ("br0", "INGRESS", "DEVICE", 200),
        ("veth1", "INGRESS", "DEVICE", 200),
        ("eth0", "INGRESS", "DEVICE", 100),
    ]
    assert last.totals.packets == 2
    assert last.totals.ledger.matched == last.totals.ledger.records == len(tape)


def test_two_containers_with_equal_device_names_are_distinguished():
    tape = Tape()
    tape.packet(REQUEST, 1_000, skb=1, n=1)
    tape.packet(REQUEST, 1_050, skb=2, n=2)
    tape.packet(REPLY, 5_000, skb=3, n=2)
    rows, last = correlate(tape)
    inner = [(row[0], row[1], row[3]) for row in told(rows, last, "OVERHEAD")]
    assert inner == [("c1", 11, "EGRESS"), ("c2", 12, "EGRESS"), ("c2", 12, "INGRESS")]


def test_the_bridge_counts_for_the_container_whose_packet_crosses_it():
    tape = Tape()
    tape.packet(REQUEST, 1_000, n=2)
    rows, last = correlate(tape)
    assert ("c2", HOST, "br0", "EGRESS", "DEVICE", 100) in told(rows, last)


def test_an_ambiguous_device_name_is_counted_and_not_resolved():
    tape = Tape()
    tape.packet("Q:eth0 X:eth0 k", 1_000)
    rows, last = correlate(tape)
    assert len(rows) == 0
    assert last.totals.ledger.dropped == 3
    tape = Tape()
    tape.packet("Q:eth0 X:eth0", 1_000)
    rows, last = correlate(tape)
    assert (len(rows), last.totals.ledger.ambiguous) == (0, 2)


def test_a_packet_freed_after_transmission_was_sent_by_hardware():
    tape = Tape()
    tape.packet("Q:eth0 X:eth0 c", 1_000)
    _, last = correlate(tape)
    assert (last.totals.ledger.ambiguous, last.totals.ledger.matched) == (0, 3)


def test_a_path_that_begins_with_a_reception_began_at_hardware():
    tape = Tape()
    tape.add(0, 7)  # the capture's first moments do not count, because earlier records are unknown
    tape.packet("G:eth0 R:eth0", 50_000)
    _, last = correlate(tape)
    assert (last.totals.ledger.ambiguous, last.totals.ledger.matched) == (0, 2)


def test_a_path_whose_beginning_may_be_lost_is_ambiguous():
    tape = Tape()
    tape.add(0, 7)
    tape.gap(49_000, 49_500)
    tape.packet("G:eth0 R:eth0", 50_000)
    _, last = correlate(tape)
    assert last.totals.ledger.ambiguous == 2


def test_a_buffer_reused_after_an_unseen_free_starts_a_new_life():
    tape = Tape()
    end = tape.packet(REPLY, 1_000, skb=5)
    tape.packet(REQUEST, end + 10, skb=5)
    rows, last = correlate(tape)
    assert last.totals.packets == 2
    assert [row[3] for row in told(rows, last, "OVERHEAD")] == ["INGRESS", "EGRESS"]


def test_a_forwarded_packet_keeps_its_length():
    tape = Tape()
    tape.packet("r:out0 R:out0", 1_000, length=84)
    tape.packet("Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0", 1_300, length=52)
    rows, last = correlate(tape)
    assert told(rows, last, "OVERHEAD") == []
    assert last.totals.packets == 1


@pytest.mark.parametrize(("late_ns", "joined"), [(TIMEOUT_NS, True), (TIMEOUT_NS + 1, False)])
def test_a_late_record_is_no_partner(late_ns, joined):
    tape = Tape()
    tape.packet("Q:br0 X:br0", 1_000, step=late_ns)
    _, last = correlate(tape)
    if joined:
        assert last.totals.ledger.matched == 2
    else:
        assert (last.totals.ledger.expired, last.totals.ledger.in_flight) == (1, 1)


def test_nothing_is_matched_across_a_gap_of_any_cpu():
    tape = Tape()
    tape.packet(REQUEST, 1_000, step=100, cpu=0)
    tape.gap(1_450, 1_480, lost=7, cpu=1)
    rows, last = correlate(tape)
    assert told(rows, last, "OVERHEAD") == []
    assert last.totals.ledger.lost == 7
    assert last.totals.ledger.imbalance == 0


def test_a_drop_on_the_way_and_a_refusal_after_arrival():
    tape = Tape()
    tape.packet("Q:eth0 X:eth0 r:veth1 R:veth1 R:br0 k", 1_000, skb=1)
    tape.packet(REPLY + " k", 5_000, skb=2)
    rows, last = correlate(tape)
    assert last.totals.ledger.dropped == 6
    assert set(rows.outcome[rows.direction == Direction.EGRESS]) == {Outcome.DROPPED}
    assert set(rows.outcome[rows.direction == Direction.INGRESS]) == {Outcome.CONSUMED}


def test_delivery_is_a_copy_of_the_whole_packet():
    tape = Tape()
    tape.packet(REPLY + " D c", 1_000)
    assert [row[-1] for row in told(*correlate(tape), "DELIVERY")] == [100]
    tape = Tape()
    end = tape.packet(REPLY, 1_000)
    tape.add(end + 100, 6, "", 1, 17)
    assert told(*correlate(tape), "DELIVERY") == []


def test_from_one_container_to_another():
    tape = Tape()
    tape.packet(ACROSS, 1_000)
    assert [(row[0], row[1], row[2], row[3]) for row in told(*correlate(tape))] == [
        ("c1", 11, "eth0", "EGRESS"),
        ("c1", HOST, "veth1", "EGRESS"),
        ("c2", HOST, "veth2", "INGRESS"),
        ("c2", 12, "eth0", "INGRESS"),
    ]


def test_a_device_missing_from_the_topology_is_unknown():
    tape = Tape()
    tape.packet("Q:gone0 X:gone0", 1_000)
    rows, last = correlate(tape)
    assert (len(rows), last.totals.ledger.matched) == (0, 2)


def test_a_container_that_takes_a_dead_ones_name():
    """A new container with a dead one's name has other devices; packets in flight belong to the old one."""
    tape = Tape()
    tape.packet(REQUEST, 1_000, skb=1)
    before = tape.batch()
    new = [d for d in DEVICES if d.netns != C1 and d.name != "veth1"]
    new += [
        Device(77, 2, "eth0", "veth", HOST, 30, netns_name="c1", container="c1"),
        Device(HOST, 30, "veth1", "veth", 77, 2, 2, netns_name="host"),
    ]
    later = Tape()
    later.packet(REQUEST, 500_000, skb=1)
    rows, last = correlate(None, topology(), before, topology(400_000, tuple(new)), later.batch(), linger_ns=50_000)
    assert [(row[0], row[1]) for row in told(rows, last, "OVERHEAD")] == [("c1", 11), ("c1", 77)]


def test_a_path_that_began_before_the_device_vanished():
    tape = Tape()
    tape.packet(REQUEST, 1_000, step=100)
    batch = tape.batch()
    gone = topology(1_350, tuple(d for d in DEVICES if d.container != "c1" and d.name != "veth1"))
    rows, last = correlate(None, topology(), batch[batch.ts_ns < 1_350], gone, batch[batch.ts_ns >= 1_350])
    assert [row[:2] for row in told(rows, last, "OVERHEAD")] == [("c1", 11)]
    assert last.totals.ledger.matched == len(batch)


def test_sightings_that_name_the_namespace_need_no_path():
    from contracts.topology import NO_DEVICE, Sighting, Topology, assign_roles

    exact = next(d for d in DEVICES if d.container == "c2")
    sightings = (NO_DEVICE, Sighting("eth0", exact.netns, exact.ifindex))
    place = Topology(-(1 << 60), HOST, assign_roles(DEVICES, HOST), sightings)
    tape = Tape()
    tape.packet("Q:eth0 X:eth0", 1_000)
    assert CODE["eth0"] == 1
    rows, last = correlate(None, place, tape.batch())
    assert [row[:3] for row in told(rows, last)] == [("c2", 12, "eth0")]


def test_a_reused_inode_is_another_namespace():
    """Records of a namespace that died, handed over after its successor was listed, are not the successor's."""
    from dataclasses import replace

    from contracts.topology import NO_DEVICE, Sighting, Topology, assign_roles

    exact = next(d for d in DEVICES if d.container == "c2")
    here = tuple(replace(d, netns_cookie=9) if d.netns == exact.netns else d for d in DEVICES)
    sightings = (NO_DEVICE, Sighting("eth0", exact.netns, exact.ifindex, 8), Sighting("", 0, exact.ifindex, 9))
    place = Topology(-(1 << 60), HOST, assign_roles(here, HOST), sightings)
    tape = Tape()
    tape.add(1_000, 1, "eth0", key=1, skb=1)
    rows, last = correlate(None, place, tape.batch())
    assert {row[0] for row in told(rows, last)} <= {""}
    assert place.candidates(sightings[1]) == ()
    assert [d.container for d in place.candidates(sightings[2])] == ["c2"]


def test_a_namespace_that_imitates_the_hosts_devices_is_reported():
    """Any user may make a namespace with a bridge and a veth pair of the same names, connected in the same way."""
    of_host = [replace(d, role=Role.HOST if d.netns == HOST else d.role) for d in DEVICES]
    twins = [replace(d, netns=d.netns + 1_000, peer_netns=d.peer_netns and d.peer_netns + 1_000) for d in DEVICES]
    plain = [replace(d, container="") for d in twins]
    tape = Tape()
    tape.packet(REQUEST, 1_000)
    rows, last = correlate(tape, replace(topology(), devices=(*of_host, *plain)), tape.batch())
    assert (len(rows), last.totals.grades.ambiguous, last.totals.several_devices) == (0, 1, 1)
    summary = Summary()
    summary.add(last)
    assert "br0" in summary.imitated
    told = summary.as_dict()["ambiguous"]
    assert (told["several_devices"], told["several_packets"]) == (1, 0)
    assert "br0" in told["imitated"]
    assert last.totals.ambiguous_by_cause() == {"several_devices": 1, "several_packets": 0}
    line = str(tables.ledger_line(summary))
    assert "1 packets fit several devices, 0 fit several packets" in line
    assert "br0" in line
    summary = Summary()
    rows, last = correlate(tape)
    summary.add(last)
    assert "fit several" not in str(tables.ledger_line(summary))
    assert "ambiguous" not in summary.as_dict()
