"""Feeding an engine: the end of a stream, the contents of totals, and how much an engine gathers."""

import pickle

import numpy as np

from contracts.hooks import Hook
from contracts.interfaces import Progress
from contracts.schema import HookCost
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder, SliceLimit
from tests.durations import MS
from tests.traffic import REQUEST, Tape, topology

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
