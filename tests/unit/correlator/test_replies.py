"""Matching replies to requests, only where no other match is possible."""

import numpy as np
import pytest

from contracts.schema import NOT_TOLD, Direction
from correlator.replies import ExchangedPackets, Replies, ToldBy
from tests.durations import MS

OUT, IN = Direction.EGRESS, Direction.INGRESS


def seen(*packets):
    """Return packets of (time ms, direction, ...) with their properties."""
    rows = []
    for number, (at_ms, way, told) in enumerate(packets, 1):
        given = {
            "container": 1,
            "l3_len": 84,
            "dropped": False,
            "l4_proto": NOT_TOLD,
            "near": NOT_TOLD,
            "far": NOT_TOLD,
        }
        rows.append({"packet": number, "direction": way, "begin_ns": at_ms * MS, "l4_bits": NOT_TOLD, **given, **told})
    return ExchangedPackets(
        **{name: np.array([row[name] for row in rows], dtype) for name, dtype in ExchangedPackets._DTYPES.items()}
    )


def match(*packets, began_ms=0, replies=None):
    request, told_by = (replies or Replies(began_ms * MS)).match(seen(*packets))
    return request.tolist(), [ToldBy(one) for one in told_by.tolist()]


def echo(kind, number, **told):
    return {"l4_proto": 1, "near": 77, "far": number, "l4_bits": kind, **told}


def test_echo_replies_have_the_number_of_their_requests():
    request, told_by = match(
        (0, OUT, echo(8, 1)), (1, OUT, echo(8, 2)), (2, IN, echo(0, 2)), (3, IN, echo(0, 1)), (4, IN, echo(0, 1))
    )
    assert request == [0, 0, 2, 1, 0]  # a second reply to a request is not matched
    assert told_by[2:4] == [ToldBy.ECHO, ToldBy.ECHO]


def test_an_echo_of_another_container_or_direction_is_none():
    assert match((0, OUT, echo(8, 1)), (1, IN, echo(0, 1, container=2)))[0] == [0, 0]
    assert match((0, OUT, echo(8, 1)), (1, OUT, echo(0, 1)))[0] == [0, 0]


@pytest.mark.parametrize(
    ("told", "how"), [({}, ToldBy.TURNS), ({"l4_proto": 17, "near": 40_000, "far": 53}, ToldBy.PORTS)]
)
def test_turns_after_a_silence(told, how):
    request, told_by = match(
        (200, OUT, told), (201, IN, told), (202, OUT, told), (203, IN, told), (500, IN, told), (501, OUT, told)
    )
    assert request == [0, 1, 0, 3, 0, 5]  # after another silence the other side sends requests
    assert {told_by[1], told_by[3], told_by[5]} == {how}


def test_packets_within_a_conversation_are_not_matched():
    assert match((1, IN, {}), (2, OUT, {}), (3, IN, {}), (4, OUT, {}))[0] == [0, 0, 0, 0]


def test_two_waiting_requests_end_matching_until_the_next_silence():
    request, _ = match(
        (200, OUT, {}),
        (201, OUT, {}),
        (202, IN, {}),
        (203, IN, {}),
        (204, OUT, {}),
        (205, IN, {}),
        (400, OUT, {}),
        (401, IN, {}),
    )
    assert request == [0, 0, 0, 0, 0, 0, 0, 7]


def test_dropped_and_old_requests_do_not_wait():
    dropped = {"dropped": True}
    assert match((200, OUT, dropped), (210, OUT, {}), (211, IN, {}))[0] == [0, 0, 2]
    assert match((200, OUT, {}), (1_500, OUT, {}), (1_501, IN, {}))[0] == [0, 0, 2]


def test_other_lengths_containers_and_ports_are_other_conversations():
    request, _ = match(
        (200, OUT, {}),
        (201, OUT, {"l3_len": 60}),
        (202, OUT, {"container": 2}),
        (203, IN, {}),
        (204, IN, {"l3_len": 60}),
    )
    assert request == [0, 0, 0, 1, 2]
    assert match((200, OUT, {"container": NOT_TOLD}), (201, IN, {"container": NOT_TOLD}))[0] == [0, 0]


def test_after_a_loss_the_asking_side_is_determined_anew():
    replies = Replies(0)
    replies.lost(250 * MS, 260 * MS)
    packets = [(200, OUT), (201, IN), (210, OUT), (255, IN), (262, OUT), (263, IN), (400, OUT), (401, IN)]
    assert match(*((at, way, {}) for at, way in packets), replies=replies)[0] == [0, 1, 0, 0, 0, 0, 0, 7]


def test_batch_boundaries_change_nothing():
    rng = np.random.default_rng(3)
    packets = [
        (int(at), int(way), {"l3_len": int(length)})
        for at, way, length in zip(
            np.cumsum(rng.integers(1, 150, 300)), rng.integers(1, 3, 300), rng.choice([60, 84], 300), strict=True
        )
    ]
    whole = seen(*packets)
    expected = Replies(0).match(whole)[0].tolist()
    replies, found = Replies(0), []
    for start in range(0, 300, 7):
        found += replies.match(whole[start : start + 7])[0].tolist()
    assert found == expected
    assert sum(map(bool, expected)) > 10
