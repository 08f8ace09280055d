"""Packets that continue in another buffer: which lives are joined by content, and which are not."""

from dataclasses import replace

import numpy as np
import pytest

from contracts.protocols import ESP, GRE, ICMPV6, IGMP, TCP, UDP
from contracts.records import Content, Flag
from contracts.schema import Delays, Direction, Grade, Outcome, Segment
from correlator.engine import Engine, EngineConfig
from tests.traffic import Tape, topology

LINK_NS = 10_000
OUT = "Q:eth0 X:eth0 r:veth1 R:veth1"
ON = "Q:out0 X:out0 r:rem0 R:rem0 c"
IN = "Q:rem0 X:rem0 r:out0 R:out0"
HOME = "Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0"


def correlate(tape, **config):
    engine = Engine(0, EngineConfig(**{"link_ns": LINK_NS, "timeout_ns": 100_000, **config}))
    batch = tape.batch()
    results = engine.feed(topology())
    for i in range(len(batch)):
        results += engine.feed(batch[i : i + 1])
    results.append(engine.finish())
    assert all(result.totals.ledger.imbalance == 0 for result in results)
    return Delays.concatenate([result.rows.delays for result in results]), results[-1]


def path(rows, devices, packet):
    mine = rows[rows.packet == packet]
    return [devices[d].name for d in mine[np.argsort(mine.position, kind="stable")].device]


def wholes(rows):
    return rows[rows.segment == Segment.OVERHEAD]


def test_a_fragment_that_was_cut_again_has_its_whole_path():
    tape = Tape()
    tape.packet(OUT, 0, skb=1, key=7)
    tape.packet(ON, 2_000, skb=2, key=7)
    rows, last = correlate(tape)
    whole = wholes(rows)
    assert (whole.delay_ns.tolist(), whole.grade.tolist()) == ([2_000], [Grade.CONTENT])
    assert path(rows, last.rows.devices, whole.packet[0]) == ["eth0", "veth1", "out0", "rem0", "eth0"]
    parts = rows[rows.segment == Segment.DEVICE]
    assert parts.delay_ns.sum() == 2_000
    assert set(rows.outcome) == {Outcome.CONSUMED}
    assert (last.totals.grades.content, last.totals.packets, last.totals.ledger.matched) == (1, 1, 9)


def test_a_fragment_cut_again_on_ingress_has_its_whole_path():
    tape = Tape()
    tape.packet(IN + " c", 0, skb=1, key=7)
    tape.packet(HOME, 2_000, skb=2, key=7)
    rows, last = correlate(tape)
    whole = wholes(rows)
    assert whole.direction.tolist() == [Direction.INGRESS]
    assert whole.delay_ns.tolist() == [2_500 - 300]
    assert last.totals.grades.content == 1
    assert last.totals.ledger.matched == 11  # also the end of the first buffer


def test_three_fragments_in_each_others_buffers():
    """Connection tracking reassembles: the last fragment's buffer continues with the first one's content."""
    tape = Tape()
    for i, (key, length) in enumerate(((7, 1500), (8, 1500), (9, 1500))):
        tape.packet(OUT, i * 1_000, skb=i + 1, key=key, length=length)
    for i, (skb, key, length) in enumerate(((3, 7, 1500), (2, 8, 1500), (4, 9, 1500))):
        tape.packet(ON, 10_000 + i * 1_000, skb=skb, key=key, length=length)
    rows, last = correlate(tape)
    whole = wholes(rows)
    assert sorted(whole.delay_ns.tolist()) == [10_000] * 3
    # The second fragment stayed in its buffer.
    assert sorted(whole.grade.tolist()) == [Grade.CONTENT, Grade.CONTENT, Grade.EXACT]
    assert last.totals.grades.told_apart == 1


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_two_possible_continuations_are_not_linked(order):
    """When a bridge floods, one packet arrives and two copies leave; neither is chosen."""
    tape = Tape()
    tape.packet(OUT, 0, skb=5, key=7)
    for n in order:
        tape.packet(f"Q:veth{n} X:veth{n} r:eth0 R:eth0", 1_000 * n, skb=n, key=7)
    rows, last = correlate(tape)
    assert Grade.CONTENT not in rows.grade
    assert (last.totals.grades.content, last.totals.grades.ambiguous) == (0, 1)


def test_two_possible_predecessors_are_not_linked():
    """Two containers' packets of equal content at the same time."""
    tape = Tape()
    tape.packet(OUT, 0, skb=1, key=7)
    tape.packet(OUT.replace("veth1", "veth2"), 500, skb=2, key=7)
    tape.packet(ON, 2_000, skb=3, key=7)
    _, last = correlate(tape)
    assert (last.totals.grades.content, last.totals.grades.ambiguous) == (0, 2)
    assert last.totals.several_devices == 0


@pytest.mark.parametrize(
    ("what", "path", "key", "after"),
    [
        ("another packet", ON, 8, 2_000),
        ("too late", ON, 7, 300 + LINK_NS + 1),
        ("before it", ON, 7, -2_000),
        ("from another namespace", IN, 7, 2_000),
    ],
)
def test_lives_that_are_no_continuation(what, path, key, after):
    tape = Tape()
    tape.packet(OUT, 10_000, skb=1, key=7)
    tape.packet(path, 10_000 + after, skb=2, key=key)
    assert Grade.CONTENT not in correlate(tape)[0].grade, what


def report(**told):
    """Return the wholes of a packet that came in and of one that a bridge copies to a container 96 ms later."""
    tape = Tape()
    tape.packet(IN, 0, skb=1, key=7, length=96)
    tape.packet("Q:veth1 X:veth1 r:eth0 R:eth0", 96_000, skb=2, key=7, length=96)
    batch = tape.batch()
    told = {"flags": Flag.KEY, **told}
    columns = {name: np.full(len(batch), value) for name, value in told.items()}
    content = Content.of(len(batch), packet_key=batch.content.packet_key, **columns)
    engine = Engine(0, EngineConfig(link_ns=200_000, timeout_ns=100_000))
    results = [*engine.feed(topology()), *engine.feed(replace(batch, content=content)), engine.finish()]
    assert results[-1].totals.ledger.imbalance == 0
    return wholes(Delays.concatenate([result.rows.delays for result in results]))


FLOW = Flag.KEY | Flag.FLOW
MDNS = {"l4_proto": UDP, "flags": FLOW, "l4_src": 5353, "l4_dst": 5353}


@pytest.mark.parametrize(
    ("told", "linked"),
    [
        pytest.param({"ip_version": 6, "l4_proto": ICMPV6, "l4_bits": 143}, False, id="a report of multicast groups"),
        pytest.param({"ip_version": 4, "l4_proto": IGMP}, False, id="one of IPv4"),
        pytest.param({"ip_version": 4, "l4_proto": IGMP, "ip_id": 9}, True, id="one with an identification"),
        pytest.param({"ip_version": 6, **MDNS}, False, id="a question of mDNS"),
        pytest.param({"ip_version": 4, **MDNS}, False, id="one of IPv4, without identification"),
        pytest.param({"ip_version": 6, **MDNS, "l4_src": 40_000}, True, id="a datagram"),
        pytest.param({"ip_version": 6, "l4_proto": TCP, "flags": FLOW}, True, id="a segment"),
        pytest.param({"ip_version": 6, "l4_proto": ICMPV6, "l4_bits": 128, "flags": FLOW}, True, id="an echo"),
        pytest.param({"ip_version": 6, "l4_proto": ESP}, True, id="an encrypted packet"),
        pytest.param({"ip_version": 6, "l4_proto": GRE, "flags": Flag.KEY | Flag.TUNNEL}, True, id="a tunnel"),
        pytest.param({"ip_version": 6, "l4_proto": UDP, "flags": Flag.KEY | Flag.FRAGMENT}, True, id="a fragment"),
        pytest.param({}, True, id="not IP"),
    ],
)
def test_what_any_sender_may_send_alike_is_not_linked(told, linked):
    assert report(**told).delay_ns.tolist() == [96_000] * linked


def test_nothing_is_linked_across_lost_records():
    tape = Tape()
    tape.packet(OUT, 0, skb=1, key=7)
    tape.gap(400, 900)
    tape.packet(ON, 2_000, skb=2, key=7)
    assert Grade.CONTENT not in correlate(tape)[0].grade


def test_a_dropped_packet_has_no_continuation():
    tape = Tape()
    tape.packet(OUT + " k", 0, skb=1, key=7, reason=3)
    tape.packet(ON, 2_000, skb=2, key=7)
    rows, last = correlate(tape)
    assert Grade.CONTENT not in rows.grade
    assert last.totals.ledger.dropped == 5


def test_a_continuation_that_is_dropped_is_counted_as_dropped():
    tape = Tape()
    tape.packet(OUT, 0, skb=1, key=7)
    tape.packet("Q:out0 k", 2_000, skb=2, key=7, reason=3)
    rows, last = correlate(tape)
    assert set(rows.outcome) == {Outcome.DROPPED}
    assert set(rows.drop_reason) == {3}
    assert last.totals.ledger.dropped == 6


def test_without_content_nothing_is_linked():
    tape = Tape()
    tape.packet(OUT, 0, skb=1)
    tape.packet(ON, 2_000, skb=2)
    assert len(wholes(correlate(tape)[0])) == 0


def test_waiting_lives_are_bounded():
    """With endless packets that end on the host, the oldest waiting ones are measured and removed."""
    tape = Tape()
    for i in range(4_000):
        tape.packet(OUT + " c", i * 1_000, skb=i + 1, key=i + 1)
    engine = Engine(0, EngineConfig(link_ns=1 << 40, timeout_ns=10_000, slice_ns=50_000, open_records=2_000))
    waiting = []
    for item in (topology(), tape.batch()):
        waiting += [result.totals.ledger.in_flight for result in engine.feed(item)]
    last = engine.finish()
    assert max(waiting) <= 2_000 // 4 + 300
    assert (last.totals.ledger.matched, last.totals.ledger.in_flight, last.totals.ledger.imbalance) == (20_000, 0, 0)
