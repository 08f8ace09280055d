"""The score of `mace verify` recognises rows that are wrong, missing, or of unnumbered packets."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.clock import ClockPair
from contracts.hooks import Hook
from contracts.interfaces import Progress, StreamHeader
from contracts.records import Batch
from contracts.schema import Direction
from correlator.engine import EngineConfig
from mace.trials.verify import bound, stream, truth
from mace.trials.verify.truth import PathRow, assigned, score
from tests.traffic import REPLY, REQUEST, Tape, topology

OUT, IN = Direction.EGRESS, Direction.INGRESS


def out_row(packet, inner, outer, length=124):
    """Return the row of a packet that left the inner device at `inner` and the outer one at `outer`, µs."""
    spans = [(at * 1000, at * 1000 + 2000) for at in (inner, outer)]
    return PathRow(packet, "c1", OUT, length, (outer - inner) * 1000, (inner * 1000, outer * 1000), *spans)


def seen(*sights):
    """Return sent packets, given as (µs, number)."""
    return [(at * 1000 + 700, True, number) for at, number in sights]


INNER = seen((100, "a"), (200, "b"), (300, "c"))
OUTER = seen((110, "a"), (210, "b"), (310, "c"))
RIGHT = [out_row(1, 100, 110), out_row(2, 200, 210), out_row(3, 300, 310)]


def test_right_rows():
    found = score(RIGHT, {"c1": INNER}, OUTER)
    assert (found.packets, found.right, found.wrong, found.others) == (3, 3, 0, 0)
    assert (found.precision, found.recall, found.error_ns(0.5)) == (1.0, 1.0, 0)
    assert found.matched == {1: ("a", 0), 2: ("b", 0), 3: ("c", 0)}


def test_two_swapped_packets_are_two_wrong_rows():
    crossed = [out_row(1, 100, 210), out_row(2, 200, 110), RIGHT[2]]
    found = score(crossed, {"c1": INNER}, OUTER)
    assert (found.right, found.wrong, found.packets) == (1, 2, 3)
    assert found.precision == pytest.approx(1 / 3)


def test_a_segment_that_is_sent_again_is_not_the_segment_that_was_cut_out_before():
    """The outer device sends `b` twice: cut out of the buffer that begins with `a`, and as a packet of its own."""
    inner = seen((100, "a"), (200, "b"))
    outer = seen((110, "a"), (112, "b"), (210, "b"))
    found = score(RIGHT[:2], {"c1": inner}, outer)
    assert (found.packets, found.right, found.wrong) == (2, 2, 0)
    assert found.errors_ns == [0, 0]


def test_a_number_that_is_lost_behind_the_inner_device_is_no_packet():
    found = score(RIGHT[:1], {"c1": seen((100, "a"), (200, "b"))}, seen((110, "a")))
    assert (found.packets, found.right, found.wrong) == (1, 1, 0)


def test_errors_of_a_request_and_its_echo_add_up():
    """10.2 µs on egress, in the row 10; 5.3 µs on ingress, in the row 5."""
    inner = [(100_700, True, "a"), (205_300, False, "a")]
    outer = [(110_900, True, "a"), (200_000, False, "a")]
    back = PathRow(2, "c1", IN, 124, 5_000, (200_000, 205_000), (204_000, 206_000), (199_000, 201_000))
    found = score([RIGHT[0], back], {"c1": inner}, outer)
    assert (found.right, sorted(found.errors_ns), found.trip_errors_ns) == (2, [-300, -200], [-500])
    assert score([RIGHT[0]], {"c1": inner}, outer).trip_errors_ns == []


def test_a_row_without_a_packet_at_its_time_is_wrong():
    assert score([*RIGHT, out_row(4, 250, 260)], {"c1": INNER}, OUTER).wrong == 1


def test_a_second_row_of_one_packet_is_wrong():
    found = score([*RIGHT, out_row(4, 100, 110)], {"c1": INNER}, OUTER)
    assert (found.right, found.wrong) == (3, 1)


def test_a_missing_row_is_counted():
    found = score(RIGHT[:2], {"c1": INNER}, OUTER)
    assert (found.precision, found.recall) == (1.0, pytest.approx(2 / 3))


def test_packets_too_short_for_a_number_are_ignored():
    found = score([*RIGHT, out_row(4, 250, 260, length=52)], {"c1": INNER}, OUTER)
    assert (found.others, found.wrong) == (1, 0)


def test_a_retransmission_is_another_packet_of_the_same_number():
    inner, outer = seen((100, "a"), (200, "a")), seen((110, "a"), (210, "a"))
    found = score([out_row(1, 100, 110), out_row(2, 200, 210)], {"c1": inner}, outer)
    assert (found.packets, found.right) == (2, 2)


def test_another_containers_packet_does_not_count():
    found = score(RIGHT, {"c2": INNER}, OUTER)
    assert (found.packets, found.right) == (3, 0)


def test_each_row_is_compared_with_its_own_packet():
    a, b, c = (("a", 0), ("b", 0), ("c", 0))
    assert assigned([{a}, {b, a}, {b, c}]) == [a, b, c]
    assert assigned([{a}, {a}]).count(None) == 1


# Removed records ------------------------------------------------------------------------------------------

HEADER = StreamHeader("ftrace", "h", "r", "6", "b", 2, ClockPair(0, 5_000, 0), (), "0")


def a_stream(round_trips, cut=64):
    tape = Tape()
    for i in range(round_trips):
        tape.packet(REQUEST, i * 20_000, skb=i % 7 + 1, step=100, cpu=i % 2)
        tape.packet(REPLY + " c", i * 20_000 + 5_000, skb=i % 7 + 1, step=100, cpu=i % 2)
    batch = tape.batch()
    made = stream.CollectedStream()

    async def fill():
        await made.open(HEADER)
        for item in (topology(), Progress(3), *(batch[i : i + cut] for i in range(0, len(batch), cut))):
            await made.write(item)

    asyncio.run(fill())
    return made


@settings(max_examples=30)
@given(st.integers(1, 60), st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]), st.integers(0, 99), st.integers(1, 200))
def test_removed_records_are_reported(round_trips, share, seed, cut):
    whole = a_stream(round_trips, cut)
    thin, gone = stream.thinned(whole, share, seed)
    batches = [item for item in thin.items if isinstance(item, Batch)]
    batch = Batch.concatenate(batches)
    lost = batch.hook == Hook.LOST
    assert (np.diff(batch.ts_ns) >= 0).all()
    assert int(batch.l3_len[lost].sum()) == gone.sum()
    assert (~lost).sum() == (~gone).sum()
    ledger = stream.worked(thin, EngineConfig()).ledger
    assert (ledger.lost, ledger.records, ledger.imbalance) == (gone.sum(), (~gone).sum(), 0)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(20, 60), st.sampled_from([0.05, 0.2]), st.integers(0, 99))
def test_the_engine_matches_exactly_what_the_remaining_records_allow(round_trips, share, seed):
    whole = a_stream(round_trips)
    before = stream.worked(whole, EngineConfig())
    rows = truth.rows(before.delays, before.devices)
    thin, gone = stream.thinned(whole, share, seed)
    after = stream.worked(thin, EngineConfig())
    left = truth.rows(after.delays, after.devices)
    assert {(r.between, r.direction) for r in left} <= {(r.between, r.direction) for r in rows}
    assert len(left) == bound.allowed(whole, gone, {row.packet for row in rows}, rows)


def test_times_are_utc():
    worked = stream.worked(a_stream(1), EngineConfig())
    rows = truth.rows(worked.delays, worked.devices)
    # The request's records are 100 ns apart, from 0: queued at eth0, then (sixth) at out0.
    assert [(r.direction, r.container, r.between, r.inner, r.outer) for r in rows[:1]] == [
        (OUT, "c1", (5_000, 5_500), (5_000, 5_200), (5_500, 5_700))
    ]
    # The reply's, from 5000: received at out0 (fourth) and eth0 (tenth); before that it was on rem0, and on veth1.
    assert [(r.direction, r.between, r.inner, r.outer) for r in rows[1:]] == [
        (IN, (10_300, 10_900), (10_600, 10_800), (10_000, 10_200))
    ]
