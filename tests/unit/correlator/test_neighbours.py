"""Packets that wait for a neighbour's address are flagged, and no window counts them."""

import numpy as np
import pytest

from contracts.records import Content, Flag
from contracts.schema import Delays, Segment
from correlator.engine import Engine, EngineConfig
from tests.traffic import Q, Tape, topology

STEPS = [0, 10, 20, 30, 40, 900_000, 900_010, 900_020, 900_030]
FIRST = "Q:eth0 X:eth0 r:veth1 R:veth1 R:br0 Q:out0 X:out0 r:rem0 R:rem0"


def correlate(tape, *, content=None, slice_ns=100_000_000):
    engine = Engine(0, EngineConfig(slice_ns=slice_ns))
    batch = tape.batch()
    if content is not None:
        batch = type(batch)(*(column for _, column in batch.columns()), content=content(batch))
    results = engine.feed(topology())
    for i in range(len(batch)):
        results += engine.feed(batch[i : i + 1])
    results.append(engine.finish())
    assert results[-1].totals.ledger.imbalance == 0
    windows = [w for r in results for w in r.rows.windows]
    return Delays.concatenate([r.rows.delays for r in results]), results[-1], windows


def a_first_packet_and_another(length=28, device="out0", at=500, answer="out0", answer_at=800_000, answer_length=None):
    tape = Tape()
    tape.packet(FIRST, 0, skb=1, step=STEPS)
    tape.packet(f"Q:{device} X:{device}", at, skb=2, step=1, length=length)
    tape.packet(f"r:{answer} R:{answer}", answer_at, skb=4, step=1, length=answer_length or length)
    tape.packet(FIRST, 2_000_000, skb=3, step=10)
    return tape


@pytest.mark.parametrize("length", [28, 72])
@pytest.mark.parametrize("slice_ns", [300, 100_000_000])
def test_the_first_packet_is_flagged_and_in_no_window(length, slice_ns):
    rows, last, windows = correlate(a_first_packet_and_another(length), slice_ns=slice_ns)
    whole = rows[rows.segment == Segment.OVERHEAD]
    assert sorted(zip(whole.delay_ns.tolist(), whole.waited.tolist(), strict=True)) == [(50, False), (900_000, True)]
    assert len({tuple(rows.waited[rows.packet == packet]) for packet in set(rows.packet.tolist())}) == 2
    assert {w.max_ns for w in windows if w.segment is Segment.OVERHEAD} == {50}
    assert (last.totals.grades.waited, last.totals.packets) == (1, 2)


@pytest.mark.parametrize(
    ("why", "changed"),
    [
        ("asked on another device", {"device": "veth2"}),
        ("asked before", {"at": 35}),
        ("asked after", {"at": 950_000}),
        ("no request", {"length": 29, "answer_length": 28}),
        ("no answer", {"answer_length": 29}),
        ("answered before it was asked", {"at": 700_000, "answer_at": 600_000}),
        ("answered after", {"answer_at": 950_000}),
        ("answered on another device", {"answer": "rem0"}),
    ],
)
def test_packets_that_did_not_wait(why, changed):
    _, last, windows = correlate(a_first_packet_and_another(**changed))
    assert last.totals.grades.waited == 0, why
    assert max(w.max_ns for w in windows if w.segment is Segment.OVERHEAD) == 900_000


@pytest.mark.parametrize(
    ("told", "length", "waited"),
    [
        ({"ip_version": 0}, 28, 1),
        ({"ip_version": 4, "l4_proto": 17}, 28, 0),
        ({"ip_version": 6, "l4_proto": 58, "l4_bits": 135}, 72, 1),
        ({"ip_version": 6, "l4_proto": 58, "l4_bits": 128}, 72, 0),
    ],
    ids=["arp", "udp without payload", "solicitation", "echo request"],
)
def test_content_distinguishes_requests_from_packets_of_equal_length(told, length, waited):
    def content(batch):
        mine = batch.l3_len == length
        columns = {name: np.where(mine, value, 4) for name, value in told.items()}
        if columns.get("l4_bits") is not None and told["l4_bits"] == 135:
            columns["l4_bits"] = np.where(mine & (batch.hook != Q), 136, columns["l4_bits"])
        return Content.of(len(batch), packet_key=batch.skb_id, flags=np.full(len(batch), Flag.KEY), **columns)

    _, last, _ = correlate(a_first_packet_and_another(length), content=content)
    assert last.totals.grades.waited == waited


def test_an_answer_from_a_wire_is_padded():
    _, last, _ = correlate(a_first_packet_and_another(answer_length=46))
    assert last.totals.grades.waited == 1
