"""However records are divided into batches and CPUs are read, the stream is ordered by time, CPU, place in the ring."""

import random

from hypothesis import given
from hypothesis import strategies as st

from collector.merge import Merger
from contracts.records import Batch


@st.composite
def rings(draw):
    """Draw the times of records per CPU, ascending except for some swapped neighbours."""
    made = []
    for _ in range(draw(st.integers(1, 5))):
        ring = sorted(draw(st.lists(st.integers(0, 60), max_size=25)))
        for i in draw(st.lists(st.integers(0, 24), max_size=5)):
            if i + 1 < len(ring):
                ring[i], ring[i + 1] = ring[i + 1], ring[i]
        made.append(ring)
    return made


@given(rings(), st.integers(0, 2**32), st.integers(0, 20))
def test_the_merge_is_sorted_for_any_boundaries(rings_, seed, hold_back_ns):
    rng = random.Random(seed)
    expected = sorted((ts, cpu, i) for cpu, ring in enumerate(rings_) for i, ts in enumerate(ring))
    merger = Merger(hold_back_ns)
    for cpu in range(len(rings_)):
        merger.add_cpu(cpu, 0)
    done = [0] * len(rings_)
    given_ = []
    while any(d < len(r) for d, r in zip(done, rings_, strict=True)):
        for cpu in rng.sample(range(len(rings_)), len(rings_)):
            ring, start = rings_[cpu], done[cpu]
            end = done[cpu] = min(start + rng.randrange(6), len(ring))
            merger.push(
                cpu, Batch.of(end - start, ts_ns=ring[start:end], cpu=[cpu] * (end - start), skb_id=range(start, end))
            )
            merger.complete(cpu, min(ring[end:], default=1000))
        until = merger.watermark_ns
        if rng.random() < 0.7:
            batch = merger.take(until)
            assert (batch.ts_ns < until).all()
            given_.append(batch)
    given_.append(merger.flush())
    whole = Batch.concatenate(given_)
    got = list(zip(whole.ts_ns.tolist(), whole.cpu.tolist(), whole.skb_id.tolist(), strict=True))
    assert got == expected
    assert merger.late == 0
    assert len(merger) == 0
