"""A ring that wraps around: what is read, what is released, and what is refused."""

import numpy as np
import pytest

from collector.kmod.device import TakenSubBuffers
from collector.kmod.ring import CpuRing
from contracts.errors import SourceError
from tests.made_rings import MadeRing, record


def pair(**options):
    made = MadeRing(**options)
    return made, CpuRing(made.cpu, made.memory, made.subbuf_bytes, made.subbufs, made.take)


def times(subbufs):
    return [subbuf.records["ts_ns"].tolist() for subbuf in subbufs]


def test_records_are_views_of_the_rings_memory():
    made, ring = pair()
    made.write(record(5, l3_len=84))
    made.now_ns = 9
    (subbuf,), now_ns = ring.take(flush=True)
    assert (times([subbuf]), now_ns) == ([[5]], 9)
    assert np.shares_memory(subbuf.records, np.frombuffer(made.memory, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        subbuf.records["l3_len"] = 1


def test_only_flush_returns_the_sub_buffer_being_filled():
    made, ring = pair()
    for ts in range(made.capacity + 3):
        made.write(record(ts))
    assert times(ring.take(flush=False)[0]) == [list(range(made.capacity))]
    assert times(ring.take(flush=True)[0]) == [list(range(made.capacity, made.capacity + 3))]
    assert ring.take(flush=True)[0] == []
    assert ring.seen == made.capacity + 3


def test_only_whole_sub_buffers_are_released_and_in_order():
    made, ring = pair()
    for ts in range(2 * made.capacity):
        made.write(record(ts))
    first, second = ring.take(flush=True)[0]
    second.given(made.capacity)
    first.given(made.capacity - 1)
    ring.take(flush=True)
    assert made.tail == 0
    assert first.records["ts_ns"].tolist() == [made.capacity - 1]
    first.given(1)
    ring.take(flush=True)
    assert made.tail == 2
    assert ring.fill == 0


def test_records_survive_many_rounds_of_the_ring():
    made, ring = pair()
    rng = np.random.default_rng(1)
    written, got, held = [], [], []
    for ts in range(3000):
        if made.write(record(ts)):
            written.append(ts)
        if rng.random() < 0.02:
            fresh, _ = ring.take(flush=bool(rng.random() < 0.5))
            held.extend(fresh)
            while held and rng.random() < 0.7:
                one = held.pop(0)
                got.extend(one.records["ts_ns"].tolist())
                one.given(len(one.records))
    held.extend(ring.take(flush=True)[0])
    got.extend(ts for one in held for ts in one.records["ts_ns"].tolist())
    assert got == written
    assert made.head > 4 * made.subbufs
    assert 0 < made.lost.sum() == 3000 - len(written)


def test_the_next_sub_buffer_reports_lost_records():
    made, ring = pair(subbufs=2)
    for ts in range(2 * made.capacity + 5):
        made.write(record(ts))
    subbufs, _ = ring.take(flush=True)
    assert ring.was_full
    assert [s.lost for s in subbufs] == [0, 0]
    for subbuf in subbufs:
        subbuf.given(made.capacity)
    assert ring.take(flush=True)[0] == []
    made.write(record(1000))
    (after,), _ = ring.take(flush=True)
    assert (after.lost, after.lost_from_ns) == (5, 2 * made.capacity)
    assert not ring.was_full


def test_copies_free_the_ring():
    made, ring = pair()
    for ts in range(made.capacity + 1):
        made.write(record(ts, skb_id=ts * 7))
    subbufs, _ = ring.take(flush=True)
    subbufs[0].given(10)
    assert ring.fill == 0.5
    ring.copy_out()
    assert ring.fill == 0
    assert ring.take(flush=True)[0] == []
    assert made.tail == 2  # MadeRing has overwritten both
    assert times(subbufs) == [list(range(10, made.capacity)), [made.capacity]]
    assert subbufs[1].records["skb_id"].tolist() == [made.capacity * 7]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("records", 10**6, "holds 1000000 records, and has room for 63"),
        ("records", 64, "holds 64 records"),
        ("cpu", 3, "says that it is of CPU 3"),
        ("sequence", 4, "holds filling 4, expected 0"),
    ],
)
def test_impossible_heads_are_refused(field, value, told):
    made, ring = pair()
    made.write(record(1))
    made.close()
    made.subbuf(0)[0][field] = value
    with pytest.raises(SourceError, match=told):
        ring.take(flush=True)


@pytest.mark.parametrize("taken", [TakenSubBuffers(0, 5, 0), TakenSubBuffers(1, 1, 0), TakenSubBuffers(7, 0, 0)])
def test_impossible_answers_are_refused(taken):
    made = MadeRing()
    ring = CpuRing(0, made.memory, made.subbuf_bytes, made.subbufs, lambda **_: taken)
    with pytest.raises(SourceError, match=f"{taken.ready} sub-buffers are ready from {taken.first} on"):
        ring.take(flush=True)


def test_a_shrinking_count_of_handed_over_sub_buffers_is_refused():
    made, ring = pair()
    made.write(record(1))
    ring.take(flush=True)
    made.head = made.handed = 0
    with pytest.raises(SourceError, match="0 sub-buffers are ready"):
        ring.take(flush=False)
