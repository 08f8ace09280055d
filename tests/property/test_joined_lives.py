"""The compiled loop: what it has learned, and where it was interrupted, changes nothing; nor does damage crash it."""

import itertools
import pickle
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.hooks import Hook
from contracts.records import Batch, Content
from contracts.schema import Crossings, Delays
from correlator import lives
from correlator.engine import Engine, EngineConfig
from tests.traffic import ACROSS, DEVICES, NAMES, REPLY, REQUEST, Tape, topology

PATHS = [
    REQUEST,
    REPLY,
    REPLY + " c",
    REPLY + " D c",
    ACROSS,
    REQUEST.rsplit(" ", 3)[0] + " k",
    "Q:eth0 X:eth0 r:veth1 R:veth1 R:br0 Q:out0 X:out0 X:out0 r:rem0 R:rem0",
    "r:out0 R:out0 D c",
    "R:veth1 R:br0 Q:br0 X:br0 Q:veth2 X:veth2",
    "X:gone0 r:gone0 R:gone0",
    "G:out0 R:out0 r:vx0 R:vx0 Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0 c",
]


@st.composite
def tapes(draw):
    """Draw packets of few kinds in reused buffers, some with a missing record, with equal times, or with keys."""
    tape = Tape()
    keyed = draw(st.booleans())
    for number in range(draw(st.integers(1, 40))):
        words = draw(st.sampled_from(PATHS)).format(n=1).split()
        if draw(st.booleans()):
            del words[draw(st.integers(0, len(words) - 1))]
        step = draw(st.sampled_from([0, 1, 7, 300]))
        content = {"key": [number // 2 + 1] * len(words)} if keyed else {}
        tape.packet(
            " ".join(words), 1_000 * number, skb=number % draw(st.sampled_from([1, 5, 50])) + 1, step=step, **content
        )
    return tape.batch()


def told(engine, results):
    rows = Delays.concatenate([result.rows.delays for result in results])
    crossed = Crossings.concatenate([result.rows.crossings for result in results])
    columns = [getattr(part, f.name).tobytes() for part in (rows, crossed) for f in fields(part)]
    windows = [repr(window) for result in results for window in result.rows.windows]
    return columns, windows, results[-1].totals.ledger, results[-1].totals.grades, results[-1].rows.devices


def correlate(batch, cuts=(), *, saved=False):
    engine = Engine(0, EngineConfig(crossings=True, slice_ns=2_500, timeout_ns=5_000, link_ns=2_000))
    results = engine.feed(topology())
    for a, b in itertools.pairwise([0, *sorted(min(cut, len(batch)) for cut in cuts), len(batch)]):
        results += engine.feed(batch[a:b])
        if saved:
            engine = pickle.loads(pickle.dumps(engine))
    results.append(engine.finish())
    return told(engine, results)


@settings(max_examples=60, deadline=None)
@given(tapes(), st.lists(st.integers(0, 300), max_size=4))
def test_a_saved_engine_continues(batch, cuts):
    assert correlate(batch, cuts, saved=True) == correlate(batch)


@settings(max_examples=60, deadline=None)
@given(tapes())
def test_forgetting_changes_nothing(batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lives, "_MOST_LEARNED", 0)
        forgetful = correlate(batch)
    assert forgetful == correlate(batch)


def test_each_shape_is_measured_once(monkeypatch):
    tape = Tape()
    for number in range(300):
        tape.packet(REQUEST, 1_000 * number, skb=number + 1, step=number % 90)
        tape.packet(REPLY + " c", 1_000 * number + 500, skb=number + 1_001, step=2)
    asked, measure = [], lives.Answers.shape
    monkeypatch.setattr(lives.Answers, "shape", lambda self, codes: asked.append(codes) or measure(self, codes))
    engine = Engine(0, EngineConfig())
    engine.feed(topology())
    engine.feed(tape.batch())
    assert engine.finish().totals.packets == 600
    assert len(asked) == len(set(asked)) == 2


@st.composite
def damaged(draw):
    """Draw records of any hook, device, traits, length and order."""
    count = draw(st.integers(1, 120))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    hooks = draw(st.sampled_from([[*Hook], [1, 2, 4, 7], range(256)]))
    spread = draw(st.sampled_from([3, 1_000, 1 << 40]))
    ts = random.integers(0, spread, count)
    ts[0], ts[-1] = ts.min(), ts.max()
    content = None
    if draw(st.booleans()):
        flags = random.integers(0, 256, count, np.uint8)
        content = Content.of(count, packet_key=random.integers(0, 4, count), flags=flags)
    return Batch.of(
        count,
        content,
        ts_ns=np.sort(ts) if draw(st.booleans()) else ts,
        skb_id=random.integers(0, draw(st.sampled_from([2, 1_000])), count),
        hook=random.choice(np.array(hooks, np.uint8), count),
        dev=random.integers(0, len(NAMES), count),
        l3_len=random.choice(np.array([0, 28, 64, 84, (1 << 32) - 1], np.uint32), count),
        gso_segs=random.integers(0, 3, count),
        drop_reason=random.integers(0, 1 << 16, count),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(damaged(), min_size=1, max_size=3), st.booleans(), st.sampled_from([1, 50, 1 << 22]))
def test_damaged_records_are_all_counted(batches, stages, open_records):
    config = EngineConfig(
        crossings=True, stages=stages, timeout_ns=500, link_ns=100, whole_batches=True, open_records=open_records
    )
    engine = Engine(0, config)
    results = engine.feed(topology(devices=DEVICES))
    for batch in batches:
        results += engine.feed(batch)
        results += engine.stop_at(engine._latest)
        engine.state(engine._latest).digest()
    results.append(engine.finish())
    ledger = results[-1].totals.ledger
    assert ledger.imbalance == 0
    assert ledger.records == sum(int((batch.hook != Hook.LOST).sum()) for batch in batches)
