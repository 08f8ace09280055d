"""The meaning of a change of key within a buffer's life, hook by hook: examples for correlator/identity.py."""

import pytest

from contracts.records import Flag
from contracts.schema import Delays, Direction, Grade, Outcome, Segment
from correlator.engine import Engine, EngineConfig
from tests.traffic import DEVICES, NAMES, REPLY, REQUEST, Tape, topology

TIMEOUT_NS = 10_000
PLAIN = tuple(d for d in DEVICES if d.name != "eth0" or d.container == "c1")
A, B = 0x1111, 0x2222


def correlate(*batches, devices=PLAIN, **config):
    engine = Engine(0, EngineConfig(timeout_ns=TIMEOUT_NS, **config))
    results = engine.feed(topology(devices=devices))
    for batch in batches:
        results += engine.feed(batch)
    results.append(engine.finish())
    rows = Delays.concatenate([r.rows.delays for r in results])
    assert all(r.totals.ledger.imbalance == 0 for r in results)
    assert all(r.totals.packets == r.totals.grades.packets for r in results)
    return rows, results[-1]


def of(path, ts=1_000, **how):
    tape = Tape()
    tape.packet(path, ts, **how)
    return tape.batch()


def overheads(rows):
    of_whole = rows[rows.segment == Segment.OVERHEAD]
    return [Direction(int(way)).name for way in of_whole.direction]


def test_one_key_along_the_path_is_exact():
    rows, last = correlate(of(REQUEST, key=A))
    assert set(rows.grade) == {Grade.EXACT}
    assert last.totals.grades.as_dict() == {
        "ambiguous": 0,
        "buffer": 0,
        "content": 0,
        "exact": 1,
        "told_apart": 0,
        "waited": 0,
    }


def test_two_keyed_records_are_needed_and_enough():
    count = len(REQUEST.split())
    for keyed, grade in ((1, Grade.BUFFER), (2, Grade.EXACT)):
        rows, _ = correlate(of(REQUEST, key=[0] * (count - keyed) + [A] * keyed))
        assert set(rows.grade) == {grade}


def test_without_keys_the_buffer_alone_identifies_a_packet():
    rows, last = correlate(of(REQUEST))
    assert set(rows.grade) == {Grade.BUFFER}
    assert (last.totals.grades.buffer, last.totals.packets) == (1, 1)


def test_an_ambiguous_device_name_is_counted():
    _, last = correlate(of("Q:eth0 X:eth0", key=A), devices=DEVICES)
    assert (last.totals.grades.ambiguous, last.totals.grades.packets, last.totals.ledger.ambiguous) == (1, 0, 2)
    assert last.totals.several_devices == 1


def test_a_reused_buffer_on_a_possible_path():
    """A proxy consumes the container's packet; its own segment of equal length leaves in the freed buffer."""
    here, there = "Q:eth0 X:eth0 r:veth1 R:veth1", "Q:out0 X:out0 r:rem0 R:rem0"
    plain, _ = correlate(of(f"{here} {there}"))
    assert overheads(plain) == ["EGRESS"]  # according to the buffer alone
    rows, last = correlate(of(f"{here} {there}", key=[A] * 4 + [B] * 4))
    assert overheads(rows) == []
    assert last.totals.grades.as_dict() == {
        "ambiguous": 0,
        "buffer": 0,
        "content": 0,
        "exact": 1,
        "told_apart": 1,
        "waited": 0,
    }
    assert last.totals.ledger.matched == 8
    # The first packet's crossings are measured up to its last record.
    assert {last.rows.devices[d].name for d in rows.device} == {"eth0", "veth1"}


def test_records_without_a_key_do_not_hide_the_change():
    path = "Q:eth0 X:eth0 r:veth1 R:veth1 Q:out0 X:out0"
    for keys in ([A, A, A, 0, B, B], [A, A, 0, 0, B, B], [A, 0, 0, 0, 0, B]):
        _, last = correlate(of(path, key=keys))
        assert last.totals.grades.told_apart == 1, keys
    _, last = correlate(of(path, key=[A, 0, A, 0, 0, A]))
    assert (last.totals.grades.told_apart, last.totals.grades.exact) == (0, 1)
    # Nor do records without a key of an earlier life.
    before, after = of("Q:eth0 X:eth0 k", key=A), of("Q:eth0 X:eth0 r:veth1", 2_000, key=[0, 0, B])
    _, last = correlate(before, after)
    assert (last.totals.grades.told_apart, last.totals.ledger.matched, last.totals.ledger.dropped) == (0, 3, 3)


def test_an_end_with_another_key_belongs_to_another_packet():
    rows, last = correlate(of("Q:eth0 X:eth0 r:veth1 R:veth1 k", key=[A] * 4 + [B], reason=5))
    assert set(rows.outcome) == {Outcome.OPEN}
    assert (last.totals.ledger.matched, last.totals.ledger.unmatched, last.totals.ledger.dropped) == (4, 1, 0)


def test_an_end_without_a_key_belongs_to_the_packet():
    rows, last = correlate(of("Q:eth0 X:eth0 r:veth1 R:veth1 k", key=[A] * 4 + [0], reason=5))
    assert set(rows.outcome) == {Outcome.DROPPED}
    assert set(rows.grade) == {Grade.EXACT}
    assert last.totals.ledger.dropped == 5


GRO = "G:out0 R:out0 Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0"
GSO = "Q:rem0 X:rem0 r:out0 R:out0 Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0"


@pytest.mark.parametrize(
    ("path", "changed", "segs", "joined"),
    [
        (GRO, 1, [0] + [3] * 7, True),  # receive offload has appended other packets
        (GRO, 1, [0] * 8, False),
        (GRO, 1, [3] + [0] * 7, False),
        (GRO, 3, [3] * 8, False),  # nothing merges packets between queue and driver
        (GSO, 1, [3] + [0] * 9, True),  # the first segment stays in the buffer
        (GSO, 1, [0] * 10, False),
        (GSO, 2, [3] * 10, False),  # a veth's peer receives the sent packet unchanged
    ],
)
def test_offloads_change_the_packet_in_its_buffer(path, changed, segs, joined):
    count = len(path.split())
    rows, last = correlate(of(path, key=[A] * changed + [B] * (count - changed), segs=segs))
    assert last.totals.grades.told_apart == (not joined)
    if joined:
        assert overheads(rows) == ["INGRESS"]
        assert set(rows.grade) == {Grade.BUFFER}


WRAPPED = "Q:eth0 X:eth0 r:veth1 R:veth1 Q:vx0 X:vx0 Q:out0 X:out0"
UNWRAPPED = "r:out0 R:out0 r:vx0 R:vx0 Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0"


@pytest.mark.parametrize(("path", "inside"), [(WRAPPED, [1] * 6 + [0] * 2), (UNWRAPPED, [0] * 2 + [1] * 8)])
def test_vxlan_keeps_the_inner_packets_key(path, inside):
    flags = [0 if within else Flag.TUNNEL for within in inside]
    rows, last = correlate(of(path, key=A, flags=flags))
    assert set(rows.grade) == {Grade.EXACT}
    # Another key of the inner packet belongs to another packet.
    _, last = correlate(of(path, key=[A if within else B for within in inside], flags=flags))
    assert last.totals.grades.told_apart == 1


@pytest.mark.parametrize(("path", "change"), [(WRAPPED, 6), (UNWRAPPED, 2)])
def test_other_tunnels_change_the_key_and_keep_the_buffer(path, change):
    keys = [A] * change + [B] * (len(path.split()) - change)
    for slice_ns in (1, 100, 250, 1 << 40):
        rows, last = correlate(of(path, key=keys), slice_ns=slice_ns)
        assert (last.totals.grades.told_apart, last.totals.grades.buffer) == (0, 1)
        assert set(rows.grade) == {Grade.BUFFER}
    # But a key must not change before the tunnel.
    keys = [A] * (change - 1) + [B] * (len(path.split()) - change + 1)
    _, last = correlate(of(path, key=keys))
    assert last.totals.grades.told_apart == 1


def test_a_reassembled_packet_has_another_key():
    path = "r:out0 R:out0 Q:br0 X:br0 Q:veth1 X:veth1"
    _, last = correlate(of(path, key=[A] * 2 + [B] * 4, flags=[Flag.FRAGMENT] * 2 + [0] * 4))
    assert (last.totals.grades.told_apart, last.totals.ledger.matched) == (1, 6)


def test_a_batch_without_content_among_others():
    whole = of(REQUEST, key=A)
    bare = of(REQUEST)
    for cut in range(len(whole) + 1):
        rows, last = correlate(whole[:cut], bare[cut:], slice_ns=100)
        assert last.totals.ledger.matched == len(whole)
        assert set(rows.grade) == {Grade.EXACT if cut > 1 else Grade.BUFFER}
        rows, _ = correlate(bare[:cut], whole[cut:], slice_ns=100)
        assert set(rows.grade) == {Grade.EXACT if cut < len(whole) - 1 else Grade.BUFFER}


def test_the_device_of_an_end_is_not_on_the_path():
    plain, _ = correlate(of(REPLY + " D c", key=A))
    tape = Tape()
    end = tape.packet(REPLY, 1_000, key=A)
    tape.add(end + 100, 6, "eth0", length=56, key=A, flags=Flag.RECALLED)
    tape.add(end + 200, 7, "eth0", key=A, flags=Flag.RECALLED)
    recalled, last = correlate(tape.batch())
    assert tape.batch().dev[-1] == NAMES.index("eth0")
    for name in Delays._DTYPES:
        assert getattr(plain, name).tolist() == getattr(recalled, name).tolist(), name
    assert last.totals.ledger.matched == len(tape)
