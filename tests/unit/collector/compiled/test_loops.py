"""The compiled functions by themselves: what they compute, and that no argument leads them outside their arrays."""

import random

import numpy as np
import pytest

from collector.compiled import loops
from collector.pages.decoding import FORMAT
from contracts.records import DTYPES
from tests.ring_pages import FORMS, Page, layout, payload

HOOK = 7
PLACES = (4096, 0, 8, 16)


def columns(room):
    return tuple(np.empty(room, dtype) for dtype in DTYPES.values())


def formats(**fields):
    none = (-1, 0, 0)
    made = np.full(256, np.array((0, -1, -1, 8, 0, none, none, none), FORMAT))
    for name, value in fields.items():
        made[name][HOOK] = value
    return made


def pages(*, events=2, count=1):
    made = []
    for _ in range(count):
        page = Page(layout(), 1000)
        for _ in range(events):
            page.event(payload(FORMS["skb:consume_skb"], skbaddr=5), 1)
        made.append(page.bytes())
    return np.frombuffer(b"".join(made), np.uint8)


def decode(room=2, **changed):
    """Call `decode` on one page of two events, with some arguments replaced."""
    hooks = np.zeros(65536, np.uint8)
    hooks[FORMS["skb:consume_skb"].id] = HOOK
    given = {
        "pages": pages(),
        "layout": PLACES,
        "stretches": np.array([(3, 1, 0)]),
        "first": np.zeros(2, np.int64),
        "hook_of_id": hooks,
        "formats": formats(skb=2, size=16),
        "key": (0, 1, 1),
        "columns": columns(room),
    } | changed
    return loops.decode(*given.values()), given


def test_records_and_their_pages():
    made = columns(9)
    (records, skipped, names), given = decode(
        pages=pages(count=3),
        stretches=np.array([(3, 1, 0), (4, 0, 0), (5, 2, 24)]),
        first=np.zeros(4, np.int64),
        columns=made,
    )
    assert (records, skipped, names) == (5, 0, bytes(16))
    assert given["first"].tolist() == [0, 2, 3, 5]
    assert made[0][:5].tolist() == [1001, 1002, 1002, 1001, 1002]
    assert made[4][:5].tolist() == [3, 3, 5, 5, 5]
    assert made[7][:5].tolist() == [HOOK] * 5


@pytest.mark.parametrize(
    "changed",
    [
        {"columns": columns(1)},
        {"columns": (*columns(2)[:-1], np.empty(3, np.uint8))},
        {"first": np.zeros(1, np.int64)},
        {"hook_of_id": np.zeros(65535, np.uint8)},
        {"formats": formats()[:255]},
        {"formats": formats(skb=2, size=15, name=4)},
        {"formats": formats(skb=-1, size=16)},
        {"formats": formats(skb=3, size=16)},
        {"formats": formats(skb=2, size=16, len=2**31 - 1)},
        {"formats": formats(skb=2, size=2**32 - 1)},
        {"formats": formats(skb=2, size=16, reason=(4, 0, 1))},
        {"formats": formats(skb=2, size=16, reason=(3, 32, 1))},
        {"stretches": np.array([(3, 2, 0)])},
        {"stretches": np.array([(3, -1, 0)])},
        {"stretches": np.array([(3, 2**62, 0), (3, 2**62, 0)])},
        {"stretches": np.array([(3, 1, -1)])},
        {"stretches": np.array([(3, 1, 4081)])},
        {"stretches": np.array([(65536, 1, 0)])},
        {"stretches": np.array([3, 1])},
        {"layout": (4, 0, 0, 0)},
        {"layout": (4096, 4089, 8, 16)},
        {"layout": (4096, 0, 4093, 16)},
        {"layout": (4096, 0, -1, 16)},
        {"layout": (4096, 0, 8, 4097)},
        {"layout": (-4096, 0, 8, 16)},
        {"pages": pages()[:4095]},
    ],
)
def test_arguments_that_do_not_agree_are_refused(changed):
    with pytest.raises(IndexError):
        decode(**changed)


@pytest.mark.parametrize("room", [0, 1])
def test_more_events_than_their_columns_have_room_for(room):
    first = np.zeros(2, np.int64)
    at, ts, size = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.uint32)
    with pytest.raises(IndexError, match="room"):
        loops.locate(pages(), PLACES, np.array([(3, 1, 0)]), first, (at, ts, size))
    with pytest.raises(IndexError, match="room"):
        decode(room)


def test_arrays_that_cannot_be_written():
    first = np.zeros(2, np.int64)
    first.flags.writeable = False
    with pytest.raises(TypeError, match="read-write"):
        decode(first=first)


# --- names --------------------------------------------------------------------------------------


def distinct(low, high):
    index = np.empty(len(low), np.uint32)
    names = loops.distinct(np.array(low, np.uint64), np.array(high, np.uint64), index)
    return [tuple(pair) for pair in np.frombuffer(names, np.uint64).reshape(-1, 2).tolist()], index.tolist()


def test_names_are_numbered_in_order_of_appearance():
    rng = random.Random(1)
    for kinds in (1, 2, 31, 32, 33, 5000):
        # Names that differ in one half alone, and the empty name.
        pool = [(0, 0), *((rng.randrange(4), rng.getrandbits(64)) for _ in range(kinds))]
        drawn = rng.choices(pool, k=10_000)
        names, index = distinct(*zip(*drawn, strict=True))
        assert names == list(dict.fromkeys([(0, 0), *drawn]))
        assert [names[i] for i in index] == drawn


def test_no_names():
    assert distinct([], []) == ([(0, 0)], [])


def test_names_of_different_lengths():
    with pytest.raises(IndexError):
        loops.distinct(np.zeros(2, np.uint64), np.zeros(1, np.uint64), np.zeros(2, np.uint32))
    with pytest.raises(IndexError):
        loops.distinct(np.zeros(2, np.uint64), np.zeros(2, np.uint64), np.zeros(1, np.uint32))
