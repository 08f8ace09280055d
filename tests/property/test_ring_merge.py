"""However rings are filled, taken and released, the stream is ordered by time, CPU, place, without duplicates."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from collector.kmod.ring import CpuRing
from collector.live.record_merge import RingMerger, SeenPlaces
from contracts.hooks import HOOKS, Hook
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Flag
from tests.made_rings import MadeRing, record

NETNS = 4026531840
DEVICES = [(NETNS, 2), (NETNS, 3), (NETNS + 1, 2), (0, 0)]


@st.composite
def rings(draw):
    """Draw records per CPU in order of time; few distinct times make many equal."""
    made = []
    for cpu in range(draw(st.integers(1, 4))):
        times = sorted(draw(st.lists(st.integers(0, 40), max_size=60)))
        kinds = draw(
            st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=len(times), max_size=len(times))
        )
        made.append(
            [
                record(
                    ts,
                    Hook(hook),
                    *DEVICES[device],
                    skb_id=1000 * cpu + i,
                    l3_len=i,
                    cpu=cpu,
                    gso_segs=i % 3,
                    drop_reason=(i % 7) << (16 if hook == Hook.KFREE_SKB and i % 2 else 0),
                    **{
                        name: (i + n) * 0x9E3779B97F4A7C15 & int(np.iinfo(dtype).max)
                        for n, (name, dtype) in enumerate(CONTENT_DTYPES.items())
                    },
                )
                for i, (ts, (hook, device)) in enumerate(zip(times, kinds, strict=True))
            ]
        )
    return made


def naive(rings_):
    """Return one row per record with the columns of a batch; places are not encoded."""
    with_device = {info.hook for info in HOOKS if info.has_device}
    rows = []
    for cpu, ring in enumerate(rings_):
        for i, r in enumerate(ring):
            placed = int(r["hook"]) in with_device or int(r["flags"]) & Flag.RECALLED
            place = (int(r["netns"]), int(r["ifindex"])) if placed else (0, 0)
            names = ("skb_id", "l3_len", "cpu", "drop_reason", "gso_segs", "hook", *CONTENT_DTYPES)
            values = [int(r[name]) for name in names]
            values[3] = min(values[3], 65535)
            rows.append((int(r["ts_ns"]), cpu, i, place, values))
    return [(ts, place, values) for ts, _, _, place, values in sorted(rows)]


@given(rings(), st.integers(0, 2**32), st.integers(0, 15), st.integers(1, 40))
def test_the_merge_equals_the_naive_one_for_any_boundaries(rings_, seed, hold_back_ns, round_records):
    rng = random.Random(seed)
    places = SeenPlaces()
    merger = RingMerger(hold_back_ns, places, round_records)
    kernels = [MadeRing(cpu, subbuf_bytes=512, subbufs=4) for cpu in range(len(rings_))]  # 7 records each
    readers = [CpuRing(k.cpu, k.memory, k.subbuf_bytes, k.subbufs, k.take) for k in kernels]
    for cpu in range(len(rings_)):
        merger.add_cpu(cpu, 0)
    waiting = [list(ring) for ring in rings_]
    batches = []

    def tick():
        for cpu, (kernel, reader) in enumerate(zip(kernels, readers, strict=True)):
            for subbuf in reader.take(flush=rng.random() < 0.6)[0]:
                merger.push(cpu, subbuf)
            unread = kernel.subbuf(kernel.head)[1][: kernel.fill] if kernel.filling else []
            later = [*unread, *waiting[cpu]]
            merger.complete(cpu, int(later[0]["ts_ns"]) if later else 1000)
        if rng.random() < 0.8:
            until = merger.watermark_ns
            for batch in merger.take(until):
                assert (batch.ts_ns < until).all()
                batches.append(batch)
        if rng.random() < 0.3:
            rng.choice(readers).copy_out()

    while any(waiting):
        for cpu, kernel in enumerate(kernels):
            for _ in range(rng.randrange(10)):
                full = kernel.head - kernel.tail == kernel.subbufs and not kernel.filling
                if waiting[cpu] and not full:
                    assert kernel.write(waiting[cpu].pop(0))
        tick()
        if rng.random() < 0.2:
            readers[0].copy_out()
        # Records that cannot be released must not fill the rings for ever.
        for reader in readers:
            if reader.fill > 0.5:
                reader.copy_out()
    for cpu, reader in enumerate(readers):
        for subbuf in reader.take(flush=True)[0]:
            merger.push(cpu, subbuf)
    batches.extend(merger.flush())
    whole = Batch.concatenate(batches)
    for name, dtype in DTYPES.items():
        assert getattr(whole, name).dtype == dtype
    content = {} if whole.content is None else dict(whole.content.columns())
    assert {name: column.dtype for name, column in content.items()} == (CONTENT_DTYPES if batches else {})
    sightings = places.snapshot()
    columns = [getattr(whole, name).tolist() for name in ("skb_id", "l3_len", "cpu", "drop_reason", "gso_segs", "hook")]
    columns += [column.tolist() for column in content.values()]
    where = [(sightings[dev].netns, sightings[dev].ifindex) for dev in whole.dev]
    got = [(ts, at, list(row)) for ts, at, *row in zip(whole.ts_ns.tolist(), where, *columns, strict=True)]
    assert got == naive(rings_)
    assert merger.late == 0
    assert len(merger) == 0
    assert sum(reader.seen for reader in readers) == len(got)
    # Codes follow the order of appearance in the merged stream, whatever the boundaries.
    seen = whole.dev[whole.dev > 0]
    _, first = np.unique(seen, return_index=True)
    assert seen[np.sort(first)].tolist() == list(range(1, len(sightings)))
