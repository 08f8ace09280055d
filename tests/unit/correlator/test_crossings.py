"""The correlator's crossings of packets over a container's whole path, and its gaps."""

from dataclasses import replace

import numpy as np
import pytest

from contracts.records import Content, Flag
from contracts.schema import Crossings, Delays, Direction, Segment
from correlator.engine import Engine, EngineConfig
from tests.traffic import REPLY, REQUEST, Tape, topology

OFFSET_NS = 1_000_000_000_000


def correlate(batch, *, size=0, **config):
    engine = Engine(OFFSET_NS, EngineConfig(**{"crossings": True, **config}))
    results = engine.feed(topology())
    for start in range(0, len(batch), size or len(batch)):
        results += engine.feed(batch[start : start + (size or len(batch))])
    return [*results, engine.finish()]


def crossings(results):
    return Crossings.concatenate([result.rows.crossings for result in results])


def one_exchange():
    tape = Tape()
    tape.packet(REQUEST, 10_000, skb=1, step=[0, 3, 10, 20, 30, 100, 140, 160, 170, 180])
    tape.packet(REPLY + " c", 20_000, skb=2, step=[0, 5, 50, 57, 80, 90, 100, 110, 120, 128, 130])
    return tape.batch()


def test_times_at_both_devices_and_where_the_kernel_stamps():
    found = crossings(correlate(one_exchange()))
    rows = {Direction(d): i for i, d in enumerate(found.direction)}
    request, reply = found[rows[Direction.EGRESS] :][:1], found[rows[Direction.INGRESS] :][:1]
    since = 10_000 + OFFSET_NS
    assert (request.inner_utc_ns - since, request.inner_stamp_utc_ns - since) == (0, 3)
    assert (request.outer_utc_ns - since, request.outer_stamp_utc_ns - since) == (100, 140)
    assert request.outer_edge_utc_ns - since == 140
    since = 20_000 + OFFSET_NS
    assert (reply.outer_stamp_utc_ns - since, reply.outer_utc_ns - since) == (50, 57)
    assert (reply.inner_stamp_utc_ns - since, reply.inner_utc_ns - since) == (120, 128)
    assert reply.outer_edge_utc_ns - since == 50
    assert set(found.l3_len) == {84}
    assert all((getattr(found, name) == -1).all() for name in ("l4_proto", "l4_src", "l4_dst", "l4_seq"))


def test_a_busy_driver_sends_at_its_last_call():
    tape = Tape()
    tape.packet("Q:eth0 X:eth0 r:veth1 R:veth1 R:br0 Q:out0 X:out0 X:out0 r:rem0 R:rem0 c", 0, step=10)
    found = crossings(correlate(tape.batch()))
    assert found.outer_edge_utc_ns - OFFSET_NS == 70


def test_devices_that_offer_packets_to_gro_have_them_stamped_afterwards():
    tape = Tape()
    tape.packet("G:out0 R:out0 Q:br0 X:br0 Q:veth1 X:veth1 G:eth0 R:eth0 c", 1_000, step=10)
    found = crossings(correlate(tape.batch()))
    assert found.outer_edge_utc_ns - OFFSET_NS == 1_000
    assert found.outer_stamp_utc_ns == found.outer_utc_ns == OFFSET_NS + 1_010
    assert found.inner_stamp_utc_ns == found.inner_utc_ns == OFFSET_NS + 1_070


def test_a_packet_that_never_reached_the_outer_driver_has_no_crossing():
    tape = Tape()
    tape.packet("Q:eth0 X:eth0 r:veth1 R:veth1 R:br0 Q:out0 k", 0)
    assert len(crossings(correlate(tape.batch()))) == 0


def test_the_times_of_a_crossing_differ_by_its_overhead():
    tape = Tape()
    for i in range(50):
        tape.packet(REQUEST, 1_000_000 * i, skb=i % 7 + 1, step=100 + i)
        tape.packet(REPLY + " c", 1_000_000 * i + 50_000, skb=i % 5 + 10, step=90 + i)
    results = correlate(tape.batch())
    rows = Delays.concatenate([result.rows.delays for result in results])
    rows = rows[rows.segment == Segment.OVERHEAD]
    found = crossings(results)
    assert len(found) == 100
    delay = np.abs(found.outer_utc_ns - found.inner_utc_ns)
    assert dict(zip(found.packet.tolist(), delay.tolist(), strict=True)) == dict(
        zip(rows.packet.tolist(), rows.delay_ns.tolist(), strict=True)
    )
    assert all(results[-1].rows.devices[number].name == "eth0" for number in found.device)


@pytest.mark.parametrize("size", [1, 3, 17])
def test_batch_and_slice_boundaries_change_nothing(size):
    tape = Tape()
    for i in range(20):
        tape.packet(REQUEST, 1_000_000 * i, skb=1)
        tape.packet(REPLY + " c", 1_000_000 * i + 50_000, skb=2)
    whole, cut = (
        crossings(correlate(tape.batch(), size=n, slice_ns=3_000_000, slice_records=s))
        for n, s in ((0, 1 << 17), (size, 7))
    )
    for name in Crossings._DTYPES:
        order, other = np.argsort(whole.packet), np.argsort(cut.packet)
        assert getattr(whole, name)[order].tolist() == getattr(cut, name)[other].tolist()


def test_no_crossing_is_older_than_the_settled_time():
    tape = Tape()
    for i in range(200):
        tape.packet(REQUEST, 7_000_000 * i, skb=i % 9 + 1, step=100 if i % 3 else 2_000_000)
    seen = OFFSET_NS
    for result in correlate(tape.batch(), slice_ns=20_000_000):
        assert (result.rows.crossings.inner_utc_ns >= seen).all()
        assert result.totals.settled_utc_ns >= seen or result.totals.settled_utc_ns == 0
        seen = result.totals.settled_utc_ns


def test_crossings_are_returned_on_request_only():
    assert len(crossings(correlate(one_exchange(), crossings=False))) == 0
    assert len(crossings(correlate(one_exchange(), rows=False))) == 2


def test_gaps_are_reported_once():
    tape = Tape()
    tape.packet(REQUEST, 1_000)
    tape.gap(5_000, 6_000, lost=3)
    tape.packet(REQUEST, 300_000_000)
    told = [gap for result in correlate(tape.batch()) for gap in result.rows.gaps_utc_ns]
    assert told == [(5_000 + OFFSET_NS, 6_000 + OFFSET_NS)]


@pytest.mark.parametrize("size", [0, 1])
def test_crossings_have_the_packets_fields_at_the_inner_device(size):
    tape = Tape()
    tape.packet(REQUEST, 10_000, skb=1, key=7, flags=Flag.FLOW)
    tape.packet(REPLY + " c", 20_000, skb=1, key=8, flags=Flag.FLOW)
    batch = tape.batch()
    n = np.arange(len(batch))
    # NAT changes the request's source port after its fourth record, and the reply's destination port before its ninth.
    ports = np.where((n < 4) | (n >= 18), 40_000, 1_024)
    told = Content.of(
        len(batch),
        packet_key=batch.content.packet_key,
        flags=batch.content.flags,
        l4_seq=np.full(len(n), 1 << 31),
        l4_proto=np.full(len(n), 6),
        l4_src=np.where(n < 10, ports, 53),
        l4_dst=np.where(n < 10, 53, ports),
    )
    found = crossings(correlate(replace(batch, content=told), size=size, slice_ns=300))
    rows = {Direction(d): found[i : i + 1] for i, d in enumerate(found.direction)}
    request, reply = rows[Direction.EGRESS], rows[Direction.INGRESS]
    assert (request.l4_proto, request.l4_src, request.l4_dst, request.l4_seq) == (6, 40_000, 53, 1 << 31)
    assert (reply.l4_proto, reply.l4_src, reply.l4_dst, reply.l4_seq) == (6, 53, 40_000, 1 << 31)


def test_fields_that_were_not_read_are_unknown():
    tape = Tape()
    tape.packet(REQUEST, 10_000, skb=1, key=7)
    batch = tape.batch()
    told = replace(batch.content, l4_proto=np.full(len(batch), 17, np.uint8), l4_seq=np.full(len(batch), 8, np.uint32))
    found = crossings(correlate(replace(batch, content=told)))
    assert (found.l4_proto, found.l4_src, found.l4_dst, found.l4_seq) == (17, -1, -1, -1)
