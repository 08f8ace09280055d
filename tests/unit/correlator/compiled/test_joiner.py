"""The compiled type by itself: its checks, its errors, and that the C and the Python agree about numbers."""

import re
import threading

import numpy as np
import pytest

from contracts.histogram import BINS, MAX_NS, SUB_BITS
from contracts.hooks import Hook
from contracts.schema import Grade, Outcome
from correlator import answers, identity, lives
from correlator.answers import HookBit, ShapeBit
from correlator.compiled.joiner import Joiner
from tests.places import ROOT

NOTHING = np.zeros(0, np.int64)
Q, X, END = int(Hook.NET_DEV_QUEUE), int(Hook.NET_DEV_START_XMIT), int(Hook.CONSUME_SKB)
ROW = (0, 1, 5, 1, 1, 0)
ENTRIES = np.arange(0, 60, 10, dtype=np.int32)


def answer(*numbers):
    return np.array(numbers, np.uint32).tobytes()


def one_row(codes):
    return answer(0, 0, 1, 0, 1, 0, *ROW)


def joiner(
    *, judge=lambda a, b: (identity.JOIN, -1, -1, 0), start=lambda dev: -1, passes=lambda a, b: False, shape=one_row
):
    made = Joiner(answers.TABLES, (1_000, 100, 0), (True, True), (judge, start, passes, shape))
    made.forget(np.array([-1, 3]))
    made.begin(NOTHING, NOTHING, NOTHING, NOTHING)
    return made


def columns(*records, **changed):
    """Return columns of (ts, skb, hook, dev) records."""
    ts, skb, hook, dev = zip(*records, strict=True)
    count = len(records)
    given = {
        "ts": np.array(ts, np.int64),
        "skb": np.array(skb, np.uint64),
        "hook": np.array(hook, np.uint8),
        "dev": np.array(dev, np.uint32),
        "length": np.zeros(count, np.uint32),
        "reason": np.zeros(count, np.uint16),
    } | dict.fromkeys(("key", "trait", "flow", "proto", "cpu"))
    return tuple((given | changed).values())


LIFE = columns((1, 7, Q, 1), (3, 7, X, 1), (4, 7, END, 0))


def numbers(told):
    return lives.Numbers(*np.frombuffer(told, np.int64).tolist())


def test_a_life_is_measured_by_its_shape():
    made = joiner()
    made.add(LIFE)
    counts = numbers(made.end(10, False, 100, 100))
    assert (counts.records, counts.matched, counts.buffer, counts.open_records, counts.cells) == (3, 3, 1, 0, 1)
    utc, _, entry, *_ = made.rows(ENTRIES)
    assert (np.frombuffer(utc, np.int64).tolist(), np.frombuffer(entry, np.int32).tolist()) == ([1], [50])
    (_, windows), ((records, *_), (shape, *_)) = made.windows(None), made.measured()
    assert np.frombuffer(windows, np.int64).tolist() == [0, 5 << 5 | 1 << 3 | 1, 2, 1]
    assert (len(records) // 8, len(shape) // 4) == (3, 1)


def test_an_entry_without_an_index_raises_and_the_rows_stay():
    made = joiner()
    made.add(LIFE)
    made.end(10, False, 100, 100)
    for entries in (ENTRIES[:5], ENTRIES.astype(np.int64)):
        with pytest.raises(IndexError):
            made.rows(entries)
    assert [len(column) for column in made.rows(ENTRIES)[:3]] == [8, 8, 4]
    assert not any(map(len, made.rows(ENTRIES)))


@pytest.mark.parametrize("apart_ns", [10, 1 << 22, 1 << 31, 1 << 32, 1 << 40])
def test_rows_are_in_order_of_time_and_equal_times_as_lives_ended(apart_ns):
    # Lives begin in one order and end in the opposite one; the last two begin at one time.
    starts = [number * apart_ns for number in range(30)] + [29 * apart_ns]
    records = [(at, 1 + skb, Q, 1) for skb, at in enumerate(starts)]
    records += [(starts[-1] + 1 + n, 1 + skb, hook, 1) for n, skb in enumerate(range(30, -1, -1)) for hook in (X, END)]
    made = Joiner(
        answers.TABLES,
        (1 << 50, 100, 0),
        (True, False),
        (lambda a, b: (identity.JOIN, -1, -1, 0), lambda dev: -1, lambda a, b: False, one_row),
    )
    made.forget(np.array([-1, 3]))
    made.begin(NOTHING, NOTHING, NOTHING, NOTHING)
    made.add(columns(*records))
    made.end(starts[-1] + 100, False, 100, 100)
    utc, _, _, _, _, _, delay, *_ = made.rows(ENTRIES)
    assert np.frombuffer(utc, np.int64).tolist() == starts
    ends = [starts[-1] + 31 - skb for skb in range(31)]
    # Of equal times the life that ended first is first.
    expected = [end - start for start, end in zip(starts, ends, strict=True)]
    expected[-2:] = expected[:-3:-1]
    assert np.frombuffer(delay, np.int64).tolist() == expected


def test_each_case_is_asked_once():
    asked = []

    def judge(source, target):
        asked.append((source, target))
        return identity.JOIN, -1, -1, 0

    def shape(codes):
        asked.append(codes)
        return one_row(codes)

    made = joiner(judge=judge, shape=shape)
    for number in range(50):
        made.add(columns(*((100 * number + ts, 7, hook, dev) for ts, hook, dev in ((1, Q, 1), (2, X, 1), (3, END, 0)))))
    assert len(asked) == len(set(asked)) == 3
    made.forget(np.array([-1, 3]))
    made.add(LIFE)
    assert len(asked) == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"hook": None},
        {"reason": None},
        {"ts": np.zeros(2, np.int64)},
        {"length": np.zeros(3, np.uint64)},
        {"key": np.zeros(4, np.uint64)},
        {"dev": np.array([2, 0, 0], np.uint32)},
    ],
)
def test_wrong_columns_raise(changed):
    names = ("ts", "skb", "hook", "dev", "length", "reason", "key")
    given = list(LIFE)
    for name, column in changed.items():
        given[names.index(name)] = column
    with pytest.raises(IndexError):
        joiner().add(tuple(given))


def test_a_number_at_a_hook_without_a_device_may_be_anything():
    made = joiner()
    made.add(columns((1, 7, Q, 1), (4, 7, END, 1 << 31)))
    assert numbers(made.end(10, False, 100, 100)).matched == 2


@pytest.mark.parametrize(
    "told",
    [
        answer(),
        answer(0, 0, 0, 0, 1, 0),
        answer(0, 0, 0, 3, 0, 0),
        answer(0, 0, 0, 0, 1, 0, 0, 3, 0, 0, 0, 0),
        answer(0, 0, 0, 0, 1, 0, 0, 0, 1 << 27, 0, 0, 0),
        answer(0, 0, 0, 0, 0, 1, 0),
        answer(0, 0, 0, 0, 0, 1, 3),
        answer(0, 0, 0, 0, (1 << 32) - 1, 1),
    ],
)
def test_an_invalid_answer_about_a_shape_raises(told):
    made = joiner(shape=lambda codes: told)
    with pytest.raises(ValueError, match="shape"):
        made.add(LIFE)
    with pytest.raises(RuntimeError, match="has failed"):
        made.add(LIFE)


@pytest.mark.parametrize(
    ("name", "wrong"), [("judge", 5), ("judge", (1, 2, 3)), ("judge", (1 << 8, 0, 0, 0)), ("shape", "text")]
)
def test_an_answer_of_another_kind_raises(name, wrong):
    made = joiner(**{name: lambda *_: wrong})
    with pytest.raises((TypeError, OverflowError)):
        made.add(LIFE)


def test_what_an_asked_function_raises_is_raised():
    def judge(source, target):
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        joiner(judge=judge).add(LIFE)


def test_an_asked_function_cannot_use_the_joiner():
    def judge(source, target):
        made.add(LIFE)

    made = joiner(judge=judge)
    with pytest.raises(RuntimeError, match="in use"):
        made.add(LIFE)


def test_another_thread_cannot_use_the_joiner():
    asked, go_on, found = threading.Event(), threading.Event(), []

    def judge(source, target):
        asked.set()
        go_on.wait(20)
        return identity.JOIN, -1, -1, 0

    def add():
        asked.wait(20)
        try:
            made.end(10, False, 1, 1)
        except RuntimeError as error:
            found.append(str(error))
        go_on.set()

    made = joiner(judge=judge)
    thread = threading.Thread(target=add)
    thread.start()
    made.add(LIFE)
    thread.join()
    assert found == ["the joiner is in use"]


def test_extreme_times_wrap():
    ends = (-(1 << 63), (1 << 63) - 1)
    made = joiner()
    made.add(columns(*((ts, 7, hook, 1) for ts in ends for hook in (Q, X, X)), (0, 7, END, 0)))
    made.end(ends[1], True, 100, 100)
    made.rows(ENTRIES)
    made.windows(ends[0])
    assert len(made.windows(None)[0])


def test_a_start_that_a_later_topology_does_not_list():
    made = joiner(start=lambda dev: 3)
    made.forget(np.full(5, -1))
    made.add(columns((1, 7, int(Hook.NETIF_RECEIVE_SKB), 4), (2, 7, Q, 4)))
    made.forget(np.full(1, -1))
    assert numbers(made.end(10, True, 100, 100)).matched == 2


def test_a_long_life():
    made = joiner()
    made.add(columns(*((ts, 7, X, 1) for ts in range(5_000)), (5_000, 7, END, 0)))
    assert numbers(made.end(6_000, False, 100, 100)).matched == 5_001


def test_restored_lives_continue():
    made, later = joiner(), joiner()
    made.add(columns((1, 7, Q, 1), (2, 8, Q, 1), (3, 7, X, 1)))
    made.end(3, False, 100, 100)
    records, (skb, size) = made.open()
    ts, place, length, *_, number, cross = (
        np.frombuffer(column, dtype) for column, dtype in zip(records, "qqIHBBQQqB", strict=True)
    )
    owner = np.repeat(np.frombuffer(skb, np.uint64), np.frombuffer(size, np.int64))
    hook = (place >> identity.CODE_BITS).astype(np.uint8)
    later.restore((ts, owner, hook, np.ones(3, np.uint32), length, None, None, None, None, None, None, number, cross))
    later.add(columns((4, 7, END, 0), (5, 8, X, 1), (6, 8, END, 0)))
    assert numbers(later.end(10, False, 100, 100)).matched == 6


@pytest.mark.parametrize("given", [(7, 0, False, 1), (8, 5, False, 1), (8, 0, False, 0), (8, 0, True, 4)])
def test_only_an_open_life_waits(given):
    made = joiner()
    made.add(columns((2, 8, Q, 1)))
    with pytest.raises(ValueError, match="no such"):
        made.loosen(*given)


def test_the_c_and_the_python_agree():
    header = (ROOT / "correlator/compiled/joiner.h").read_text()
    shapes = (ROOT / "correlator/compiled/shapes.c").read_text()

    def number(name):
        return int(re.search(rf"^#define {name} (\d+)", header, re.MULTILINE)[1])

    for name in ("JOIN", "CROSS", "SAME_LENGTH", "WHOLE_COPY"):
        assert number(name) == getattr(identity, name)
    for bit in HookBit:
        assert number(f"HOOK_{bit.name}") == bit
    for bit in ShapeBit:
        assert number(f"SHAPE_{bit.name}") == bit
    for grade in (Grade.BUFFER, Grade.CONTENT, Grade.EXACT):
        assert number(f"GRADE_{grade.name}") == grade
    assert number("OUTCOME_DROPPED") == Outcome.DROPPED
    assert number("SIGHTING_BITS") == identity.CODE_BITS
    assert (number("SUB_BITS"), ((1 << 40) - 1, (40 - SUB_BITS + 1) << SUB_BITS)) == (SUB_BITS, (MAX_NS, BINS))
    assert int(re.search(r"^#define ROW (\d+)", shapes, re.MULTILINE)[1]) == len(ROW)
    enum = re.search(r"^enum \{\n(.*?)\};", header, re.MULTILINE | re.DOTALL)[1]
    assert len([line for line in enum.splitlines() if "=" not in line]) == len(lives.Numbers._fields) + 2 - 1
