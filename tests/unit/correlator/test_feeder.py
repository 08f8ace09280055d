"""Feeding an engine: the end of a stream, the contents of totals, and how much an engine gathers."""

import pickle

import numpy as np

from contracts.hooks import Hook
from contracts.interfaces import Progress
from contracts.scheduling import Copies, TaskChange, TaskChanges, TaskReading
from contracts.schema import Delays, HookCost, Segment
from contracts.windowtable import WindowTable
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder, SliceLimit
from tests.durations import MS
from tests.traffic import REPLY, REQUEST, Tape, topology

PACKETS, CUT = 40, 60
NO_SLICES = EngineConfig(slice_ns=1 << 60)
"""An engine that works only on request and at the end."""


class Broken:
    """A source that discards one more record each time it is queried."""

    def __init__(self):
        self.count = 0

    def discarded(self):
        self.count += 1
        return self.count

    def cost(self):
        return (HookCost(Hook.NETIF_RX, 100 + self.count, 0, 0),)


def stream():
    """Return a packet every 10 ms, several in each batch."""
    tape = Tape()
    for number in range(PACKETS):
        tape.packet(REQUEST, 1_000 * MS + 10 * MS * number, skb=number + 1)
    batch = tape.batch()
    return [topology(), *(batch[at : at + CUT] for at in range(0, len(batch), CUT))]


def rows(results):
    found = np.concatenate([each.rows.delays.utc_ns for each in results])
    return sorted(found.tolist())


def test_a_whole_stream_ends_with_what_is_left():
    fed = list(Feeder(Engine(0, NO_SLICES)).run(stream()))
    assert len(fed) == 1
    assert fed[-1].totals.packets == PACKETS
    engine = Engine(0, NO_SLICES)
    by_hand = [*(one for item in stream() for one in engine.feed(item)), engine.finish()]
    assert rows(fed) == rows(by_hand) != []


def test_totals_carry_the_sources_counts():
    source = Broken()
    feeder = Feeder(Engine(0, EngineConfig(slice_ns=100 * MS)), source.discarded, source.cost)
    fed = list(feeder.run(stream()))
    assert len(fed) > 2
    assert [one.totals.ledger.discarded for one in fed] == list(range(1, len(fed) + 1))
    assert [one.totals.cost[0].calls for one in fed] == list(range(101, len(fed) + 101))
    assert feeder.totals(0).ledger.discarded == len(fed) + 1


def test_an_engine_is_told_of_progress():
    feeder = Feeder(Engine(0, EngineConfig(whole_batches=True)))
    head, first, *_ = stream()
    assert [*feeder.take(head), *feeder.take(first)] == []
    assert len(list(feeder.take(Progress(int(first.ts_ns[-1]) + 1)))) == 1


def test_an_engine_works_once_the_items_span_the_limit():
    feeder = Feeder(Engine(0, NO_SLICES), limit=SliceLimit(100 * MS, 1 << 20))
    head, *batches = stream()
    assert list(feeder.take(head)) == []
    began, worked = int(batches[0].ts_ns[0]), []
    for batch in batches:
        upto = int(batch.ts_ns[-1])
        found = list(feeder.take(batch))
        assert bool(found) == (upto - began >= 100 * MS)
        if found:
            worked += found
            began = upto
    assert 1 < len(worked) < len(batches)
    assert list(feeder.take(Progress(began + 99 * MS))) == []
    (left,) = feeder.take(Progress(began + 100 * MS))
    assert rows([*worked, left, feeder.finish()]) == rows(Feeder(Engine(0, NO_SLICES)).run(stream()))


def test_an_engine_works_once_as_many_records_wait_as_the_limit():
    feeder = Feeder(Engine(0, NO_SLICES), limit=SliceLimit(1 << 60, 2 * CUT))
    head, *batches = stream()
    assert list(feeder.take(head)) == []
    assert [len(list(feeder.take(batch))) for batch in batches] == [number % 2 for number in range(len(batches))]


def test_an_unpickled_feeder_continues():
    feeder = Feeder(Engine(0, NO_SLICES), Broken().discarded, limit=SliceLimit(1 << 60, 2 * CUT))
    fed = []
    for item in stream():
        feeder = pickle.loads(pickle.dumps(feeder))
        fed += feeder.take(item)
    assert [one.totals.ledger.discarded for one in fed] == list(range(1, len(fed) + 1)) != []
    assert rows([*fed, feeder.finish()]) == rows(Feeder(Engine(0, NO_SLICES)).run(stream()))


READER, INODE = 4711, 11
"""A task of the first container."""


def delivered():
    """Return a stream of delivered packets, when each was copied, and the reader's changes: it waits 1 µs, 2, 3, ..."""
    tape, copied, changes = Tape(), [], []
    steps = [*(100 * n for n in range(len(REPLY.split()))), 1 * MS, 1 * MS + 100]
    for n in range(PACKETS):
        copied.append(1_000 * MS + 100 * MS * n + 1 * MS)
        tape.packet(f"{REPLY} D c", 1_000 * MS + 100 * MS * n, step=steps, skb=n + 1)
        changes += [(copied[-1] - 1000 * (n + 1) - 500, TaskChange.WOKEN), (copied[-1] - 500, TaskChange.RUNS)]
        changes.append((copied[-1] + 500, TaskChange.SLEEPS))
    return [topology(), tape.batch()], copied, changes


class Tracer:
    """Reads the tasks once: all of it, with the first reading that asks for the container's namespace."""

    def __init__(self, copied, changes):
        self.asked, self.left = (
            [],
            TaskReading(
                TaskChanges(
                    np.array([at for at, _ in changes]),
                    np.full(len(changes), READER, np.int32),
                    np.array([change for _, change in changes], np.uint8),
                ),
                Copies(
                    np.array(copied), np.full(len(copied), READER, np.int32), np.full(len(copied), INODE, np.uint64)
                ),
                (),
            ),
        )

    def read(self, netns):
        self.asked.append(netns)
        found = self.left
        self.left = TaskReading(TaskChanges.empty(), Copies.empty(), ())
        return found


def waits(**config):
    items, copied, changes = delivered()
    tracer = Tracer(copied, changes)
    fed = list(Feeder(Engine(0, EngineConfig(**config)), tasks=tracer.read).run(items))
    rows = Delays.concatenate([each.rows.delays for each in fed])
    windows = WindowTable.concatenate([each.rows.windows for each in fed])
    return rows, [w for w in windows if w.width_s == 1 and w.segment is Segment.WAITING], tracer


def test_the_readers_waits_are_rows_and_windows():
    rows, windows, tracer = waits(waiting=True)
    assert set(tracer.asked) == {frozenset({11, 12})}
    whole, waited = (rows[rows.segment == each] for each in (Segment.DELIVERY, Segment.WAITING))
    assert waited.delay_ns.tolist() == [1000 * n for n in range(1, PACKETS + 1)]
    for name in ("utc_ns", "packet", "device", "direction", "position"):
        assert getattr(waited, name).tolist() == getattr(whole, name).tolist()
    assert [w.sum_ns for w in windows] == [
        sum(1000 * n for n in range(first, first + 10)) for first in range(1, PACKETS, 10)
    ]


def test_windows_have_the_waits_where_rows_are_not_wanted():
    rows, windows, _ = waits(waiting=True, rows=False)
    assert len(rows) == 0
    assert sum(w.count for w in windows) == PACKETS


def test_without_being_asked_an_engine_reads_no_tasks():
    rows, windows, tracer = waits()
    assert tracer.asked == windows == []
    assert Segment.WAITING not in rows.segment
