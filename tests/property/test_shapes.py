"""Measuring lives by their shape gives the same results as measuring each life alone."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.schema import Crossings, Delays
from correlator import shapes
from correlator.engine import Engine, EngineConfig
from tests.traffic import ACROSS, REPLY, REQUEST, Tape, topology

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
    """Draw packets of few kinds in reused buffers, some with a missing record or with equal times."""
    tape = Tape()
    for number in range(draw(st.integers(1, 40))):
        words = draw(st.sampled_from(PATHS)).format(n=1).split()
        if draw(st.booleans()):
            del words[draw(st.integers(0, len(words) - 1))]
        step = draw(st.sampled_from([0, 1, 7, 300]))
        tape.packet(" ".join(words), 1_000 * number, skb=number % draw(st.sampled_from([1, 5, 50])) + 1, step=step)
    return tape.batch()


def told(batch, few, monkeypatch, **config):
    monkeypatch.setattr(shapes, "_FEW", few)
    engine = Engine(0, EngineConfig(crossings=True, **config))
    results = [*engine.feed(topology()), *engine.feed(batch), engine.finish()]
    rows = Delays.concatenate([result.rows.delays for result in results])
    crossed = Crossings.concatenate([result.rows.crossings for result in results])
    columns = [getattr(part, f.name).tobytes() for part in (rows, crossed) for f in fields(part)]
    windows = [repr(window) for result in results for window in result.rows.windows]
    return columns, windows, results[-1].totals.ledger, results[-1].totals.grades, results[-1].rows.devices


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["as they are", "all the same", "none"])
@settings(max_examples=60)
@given(tapes(), st.sampled_from([2_500, 1 << 40]))
def test_shapes_give_the_results_of_single_lives(weights, batch, slice_ns):
    """With weights of 0 all lives have the same sum, so that only the comparison distinguishes them."""
    with pytest.MonkeyPatch.context() as patch:
        one_by_one = told(batch, 1 << 40, patch, slice_ns=slice_ns)
        if weights != "as they are":
            patch.setattr(shapes, "_weights", lambda: np.full(1, weights == "all the same", np.uint64))
        assert told(batch, 1, patch, slice_ns=slice_ns) == one_by_one


def test_each_shape_is_measured_once(monkeypatch):
    tape = Tape()
    for number in range(300):
        tape.packet(REQUEST, 1_000 * number, skb=number + 1, step=number % 90)
        tape.packet(REPLY + " c", 1_000 * number + 500, skb=number + 1_001, step=2)
    asked, measure = [], shapes.measure

    def counted(paths, which, resolver):
        asked.append(len(paths.starts))
        return measure(paths, which, resolver)

    monkeypatch.setattr(shapes, "measure", counted)
    engine = Engine(0, EngineConfig())
    engine.feed(topology())
    engine.feed(tape.batch())
    assert engine.finish().totals.packets == 600
    assert asked == [2]
