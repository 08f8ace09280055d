"""Judging a host's frames: new, known, missing, or another host's."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from collector.remote import Arrival, HostStream
from contracts.clock import ClockPair
from contracts.errors import WireError
from contracts.hooks import Hook
from contracts.wire import parse_head
from tests.made_capture import HEADER, TOPOLOGY, batches, encode, same, traffic

HOST = HEADER.host
RECORDS = 3_000
ITEMS = [TOPOLOGY, *batches(traffic(RECORDS), 500)]
FRAMES = encode(ITEMS)


def verdict(stream, frame, oldest=0):
    return stream.judge(parse_head(frame), oldest)


def begun(upto):
    stream = HostStream(HOST)
    stream.begin(FRAMES[0])
    for frame in FRAMES[1:upto]:
        stream.take(frame)
    return stream


def test_a_stream_in_order():
    stream = HostStream(HOST)
    assert verdict(stream, FRAMES[0]) is Arrival.BEGIN
    assert stream.begin(FRAMES[0]) == HEADER
    for frame, item in zip(FRAMES[1:-1], ITEMS, strict=True):
        assert verdict(stream, frame) is Arrival.NEW
        assert same(stream.take(frame), item)
    assert not stream.ended
    assert stream.take(FRAMES[-1]) is None
    assert stream.ended
    assert {verdict(stream, frame) for frame in FRAMES} == {Arrival.KNOWN}


def test_a_frame_before_its_header_has_an_unknown_stream():
    assert verdict(HostStream(HOST), FRAMES[1]) is Arrival.UNKNOWN


def test_missing_frames_are_requested_while_the_host_has_them():
    stream = begun(3)
    assert verdict(stream, FRAMES[2]) is Arrival.KNOWN
    assert verdict(stream, FRAMES[5], oldest=3) is Arrival.GAP
    assert verdict(stream, FRAMES[5], oldest=4) is Arrival.NEW


def test_frames_given_up_are_counted_and_marked():
    stream = begun(3)
    batch = stream.take(FRAMES[5])
    assert stream.count_missing() == 1_000
    assert int((batch.hook == Hook.LOST).sum()) == HEADER.cpus
    assert batch.lost == 0


def test_a_new_run_follows_and_the_old_one_is_remembered():
    stream = begun(4)
    following = encode(ITEMS, replace(HEADER, run="another"))
    assert verdict(stream, following[0]) is Arrival.BEGIN
    stream.begin(following[0])
    assert verdict(stream, FRAMES[0]) is Arrival.KNOWN
    assert (stream.next_of(parse_head(FRAMES[0]).stream), stream.next, stream.next_of(7)) == (4, 1, 0)


def test_a_suspended_stream_continues():
    stream = pickle.loads(pickle.dumps(begun(4)))
    assert same(stream.take(FRAMES[4]), ITEMS[3])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (replace(HEADER, host="another"), "a stream of host 'another' on the topic of"),
        (replace(HEADER, clock=ClockPair(1, 0, 0)), "is it wrong"),
        (replace(HEADER, clock=ClockPair(1, (1 << 63) - 1, 0)), "is it wrong"),
    ],
)
def test_a_header_that_cannot_be_this_hosts_is_refused_and_changes_nothing(header, message):
    stream = begun(4)
    with pytest.raises(WireError, match=message):
        stream.begin(encode([], header)[0])
    assert (stream.header, stream.next) == (HEADER, 4)


def test_times_outside_the_calendar_are_refused():
    """Segments have an hour of the calendar, which such records exceed."""
    stream = begun(2)
    late = traffic(10)
    late = replace(late, ts_ns=late.ts_ns + np.int64(1 << 62))
    with pytest.raises(WireError, match="years away"):
        stream.take(encode([TOPOLOGY, late])[2])
