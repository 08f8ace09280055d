"""The correlator agrees with `tests.reference`, however the records are divided."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from collector.merge import Merger
from contracts.protocols import ESP, ICMPV6, UDP
from contracts.records import Batch, Content, Flag
from contracts.results import Results, Rows
from contracts.schema import Delays, Direction, Grade, Segment
from contracts.topology import Device
from contracts.windowtable import WindowTable
from correlator.engine import Engine, EngineConfig
from correlator.windows import joined
from mace.replaying.checkpoint import state_from_json, state_to_json
from tests.reference import Reference
from tests.traffic import ACROSS, DEVICES, ELSEWHERE, NAMES, REPLY, REQUEST, Tape, topology

# Each name belongs to one device: only c1 has an eth0.
PLAIN = tuple(d for d in DEVICES if d.name != "eth0" or d.container == "c1")
TIMEOUT_NS = 10_000
LINK_NS = 4_000
GRADES = [grade.name.lower() for grade in Grade]
PATHS = [
    REQUEST,
    REPLY + " c",
    REPLY,
    REPLY + " D c",
    REPLY + " k",
    REQUEST.rsplit(" ", 3)[0] + " k",
    ACROSS.replace(" r:eth0 R:eth0", ""),
    "Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0 c",
    "Q:out0 X:out0 X:out0 r:rem0 R:rem0",
    "r:out0 R:out0 D c",
    "R:veth1 R:br0 Q:br0 X:br0 Q:veth2 X:veth2",
    "X:gone0 r:gone0 R:gone0",
    "Q:vx0 X:vx0 Q:out0 X:out0 r:rem0",
    "G:out0 R:out0 r:vx0 R:vx0 Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0 c",
    "r:out0 R:out0 i:eth0 D c",
    "R:out0 i:br0 Q:veth1 X:veth1 r:eth0 R:eth0 i:eth0 c",
    "Q:rem0 X:rem0 r:out0 R:out0 i:out0 Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0 i:eth0 D c",
    "c",
    "k",
    "D",
]
PARTS = [
    "Q:eth0 X:eth0 r:veth1 R:veth1",
    "Q:eth0 X:eth0 r:veth1 R:veth1 c",
    "Q:eth0 X:eth0 r:veth1 R:veth1 k",
    "R:veth1 R:br0",
    "Q:out0 X:out0 r:rem0 R:rem0 c",
    "Q:out0 k",
    "Q:rem0 X:rem0 r:out0 R:out0",
    "Q:rem0 X:rem0 r:out0 R:out0 D c",
    "Q:br0 X:br0 Q:veth1 X:veth1 r:eth0 R:eth0 D c",
    "r:out0 R:out0 i:br0 c",
]
"""Paths of packets that continue in another buffer."""


def resolved():
    by_name = {d.name: d for d in topology(devices=PLAIN).devices}
    return {code: by_name.get(name, Device(0, 0, name, "unknown")) for code, name in enumerate(NAMES)}


PROTOCOLS = st.sampled_from([0, 0, 0, ICMPV6, UDP, ESP])


@st.composite
def tapes(draw):
    """Draw overlapping packets in few buffers, some of them cut short or with missing records, and gaps.

    Some have content. Keys are few; on the way some change for good, some for a record, and some are missing.
    """
    tape = Tape()
    read = draw(st.booleans())
    flags = st.sampled_from([0, 0, Flag.TUNNEL, Flag.FRAGMENT])

    def content(count):
        if not read:
            return {}
        key = draw(st.integers(1, 3))
        keys = [key] * count
        if draw(st.booleans()):
            change = draw(st.integers(0, count))
            keys[change:] = [key + 1] * (count - change)
        if draw(st.booleans()):
            keys[draw(st.integers(0, count - 1))] = draw(st.sampled_from([0, key + 1]))
        several = draw(st.integers(0, count))
        segs = [2] * several + [0] * (count - several)
        told = draw(st.lists(flags, min_size=count, max_size=count)) if draw(st.booleans()) else [0] * count
        segs = segs if draw(st.booleans()) else segs[::-1]
        return {"key": keys, "flags": told, "segs": segs, "proto": draw(PROTOCOLS)}

    for _ in range(draw(st.integers(0, 12))):
        words = draw(st.sampled_from(PATHS)).format(n=1).split()
        words = words[draw(st.integers(0, 2)) :] if draw(st.booleans()) else words
        words = [w for w in words if draw(st.integers(0, 15))]
        if words:
            tape.packet(
                " ".join(words),
                draw(st.integers(0, 60_000)),
                skb=draw(st.integers(1, 4)),
                step=draw(st.sampled_from([0, 1, 7, 100, 3_000, TIMEOUT_NS, TIMEOUT_NS + 1])),
                length=draw(st.sampled_from([84, 84, 52])),
                **content(len(words)),
            )
    for _ in range(draw(st.integers(0, 30)) if draw(st.booleans()) else 0):
        tape.add(
            draw(st.integers(0, 60_000)),
            draw(st.integers(1, 9)),
            draw(st.sampled_from(NAMES[1:])),
            draw(st.integers(1, 4)),
            draw(st.sampled_from([0, 52, 56, 84])),
            **{name: values if name == "proto" else values[0] for name, values in content(1).items()},
        )
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, 60_000))
        tape.gap(start, start + draw(st.integers(0, 5_000)), lost=draw(st.integers(0, 9)))
    return tape.batch()


@st.composite
def continued(draw):
    """Draw packets that end or begin on the host, each in its own buffer, with few keys and close in time."""
    tape = Tape()
    for skb in range(1, draw(st.integers(2, 9))):
        words = draw(st.sampled_from(PARTS)).split()
        key = draw(st.integers(1, 8))
        keys = [key if draw(st.integers(0, 15)) else 0 for _ in words]
        tape.packet(
            " ".join(words),
            draw(st.integers(0, 60)) * 500,
            skb=skb,
            step=draw(st.sampled_from([1, 100])),
            key=keys,
            proto=draw(PROTOCOLS),
        )
    if draw(st.booleans()):
        start = draw(st.integers(0, 30_000))
        tape.gap(start, start + draw(st.integers(0, 2_000)))
    return tape.batch()


def correlate(batch, cuts=(), *, devices=PLAIN, **config):
    engine = Engine(0, EngineConfig(timeout_ns=TIMEOUT_NS, link_ns=LINK_NS, **config))
    results = engine.feed(topology(devices=devices))
    edges = [0, *sorted(cut % (len(batch) + 1) for cut in cuts), len(batch)]
    for a, b in itertools.pairwise(edges):
        results += engine.feed(batch[a:b])
        if config.get("whole_batches") and b < len(batch):
            results += engine.advance(int(batch.ts_ns[b]))
    results.append(engine.finish())
    assert all(result.totals.ledger.imbalance == 0 for result in results)
    return results


def all_rows(results):
    """Count all rows as tuples that do not depend on device numbers."""
    rows = Delays.concatenate([result.rows.delays for result in results])
    devices = results[-1].rows.devices
    columns = [
        getattr(rows, name).tolist()
        for name in ("utc_ns", "packet", "direction", "segment", "position", "delay_ns", "l3_len", "outcome", "grade")
    ]
    return Counter(zip([devices[d] for d in rows.device], *columns, strict=True))


def all_windows(results):
    devices = results[-1].rows.devices
    return Counter(
        (
            devices[w.device],
            w.start_utc_ns,
            w.width_s,
            w.direction,
            w.segment,
            w.count,
            w.sum_ns,
            w.min_ns,
            w.max_ns,
            w.p50_ns,
            w.p90_ns,
            w.p99_ns,
            w.p999_ns,
            tuple(w.bins),
            tuple(w.counts),
        )
        for result in results
        for w in result.rows.windows
    )


@settings(max_examples=200)
@given(st.one_of(tapes(), continued()))
def test_the_engine_agrees_with_the_reference(batch):
    results = correlate(batch)
    wanted = Reference(resolved(), TIMEOUT_NS, LINK_NS).run(batch)
    ways = {Direction.EGRESS: "out", Direction.INGRESS: "in"}
    rows, devices = Delays.concatenate([r.rows.delays for r in results]), results[-1].rows.devices
    found = Counter(
        (devices[d].name, devices[d].container, ways[way], Segment(segment).name.lower(), begin, delay, GRADES[grade])
        for d, way, segment, begin, delay, grade in zip(
            *(rows.device, rows.direction, rows.segment, rows.utc_ns.tolist(), rows.delay_ns.tolist(), rows.grade),
            strict=True,
        )
    )
    assert found == Counter(row[1:] for row in wanted.rows)
    ledger = results[-1].totals.ledger.as_dict()
    assert ledger == wanted.ledger | {"discarded": 0}
    assert results[-1].totals.grades.as_dict() == wanted.grades
    assert results[-1].totals.packets == results[-1].totals.grades.packets


@pytest.mark.slow
@settings(max_examples=80)
@given(
    st.one_of(tapes(), continued()),
    st.lists(st.integers(0, 10_000), max_size=6),
    st.sampled_from([1, 100, 7_777, 1 << 40]),
    st.integers(1, 64),
    st.booleans(),
    st.booleans(),
)
def test_batch_and_slice_boundaries_change_nothing(batch, cuts, slice_ns, slice_records, whole_batches, ambiguous):
    devices = DEVICES if ambiguous else PLAIN
    whole = correlate(batch, devices=devices, slice_ns=1 << 40)
    cut = correlate(
        batch, cuts, devices=devices, slice_ns=slice_ns, slice_records=slice_records, whole_batches=whole_batches
    )
    assert all_rows(cut) == all_rows(whole)
    assert all_windows(cut) == all_windows(whole)
    assert cut[-1].totals.ledger == whole[-1].totals.ledger
    assert cut[-1].totals.packets == whole[-1].totals.packets
    assert cut[-1].totals.grades == whole[-1].totals.grades


@pytest.mark.slow
@settings(max_examples=80)
@given(st.one_of(tapes(), continued()), st.integers(0, 2**32), st.booleans())
def test_the_division_over_rings_changes_nothing(batch, seed, ambiguous):
    """The records may come from up to four rings, read in any order and in pieces of any size."""
    devices = DEVICES if ambiguous else PLAIN
    rng = np.random.default_rng(seed)
    # Records of equal times keep their order on one CPU only.
    instants, instant = np.unique(batch.ts_ns, return_inverse=True)
    spread = replace(batch, cpu=rng.integers(0, 4, len(instants)).astype(batch.cpu.dtype)[instant])
    rings = [spread[spread.cpu == cpu] for cpu in range(4)]
    merger, read, merged = Merger(int(rng.integers(0, 2_000))), [0] * 4, []
    for cpu in range(4):
        merger.add_cpu(cpu, -(1 << 62))
    while any(n < len(ring) for n, ring in zip(read, rings, strict=True)):
        for cpu in rng.permutation(4).tolist():
            start, end = read[cpu], min(read[cpu] + int(rng.integers(0, 9)), len(rings[cpu]))
            merger.push(cpu, rings[cpu][start:end])
            read[cpu] = end
            merger.complete(cpu, int(rings[cpu].ts_ns[end]) if end < len(rings[cpu]) else 1 << 62)
        merged.append(merger.take(merger.watermark_ns))
    merged.append(merger.flush())
    edges = np.cumsum([len(piece) for piece in merged]).tolist()
    found = correlate(Batch.concatenate(merged), edges, devices=devices)
    whole = correlate(batch, devices=devices)
    assert all_rows(found) == all_rows(whole)
    assert all_windows(found) == all_windows(whole)
    assert found[-1].totals.ledger == whole[-1].totals.ledger


@pytest.mark.slow
@settings(max_examples=60)
@given(tapes())
def test_device_delays_add_up_to_the_overhead(batch):
    # A packet is identified by the buffer and time of its first record; the test skips packets that share both.
    assume(len(set(zip(batch.skb_id.tolist(), batch.ts_ns.tolist(), strict=True))) == len(batch))
    parts, whole = Counter(), {}
    for result in correlate(batch):
        rows = result.rows.delays
        for packet, segment, delay in zip(rows.packet.tolist(), rows.segment, rows.delay_ns.tolist(), strict=True):
            if segment == Segment.DEVICE:
                parts[packet] += delay
            elif segment == Segment.OVERHEAD:
                whole[packet] = delay
    assert {packet: parts[packet] for packet in whole} == whole


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            *(st.integers(0, 40_000), st.integers(0, 10), st.integers(0, 8), st.integers(1, 5)),
            *(st.integers(0, 3), st.integers(0, 255), st.integers(0, 3)),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_no_stream_is_too_wild(rows, read):
    """Any hooks (0 and 10 do not exist) on any devices in any order, with every name doubtful and any content: all is
    accounted for.
    """
    rows = sorted(rows)
    columns = np.array(rows).reshape(-1, 7).T
    content = Content.of(len(rows), packet_key=columns[4], flags=columns[5]) if read else None
    names = dict(zip(("ts_ns", "hook", "dev", "skb_id"), columns, strict=False))
    batch = Batch.of(len(rows), content, **names, gso_segs=columns[6])
    results = correlate(batch, devices=(*DEVICES, Device(ELSEWHERE, 7, "veth1", "veth", ELSEWHERE, 8)), slice_ns=5_000)
    assert results[-1].totals.ledger.records == len(rows)


def test_the_bound_on_open_lives_holds_and_every_packet_is_counted():
    tape = Tape()
    for i in range(3_000):
        tape.packet("Q:eth0 X:eth0", i * 10, skb=i + 1, step=1)
    engine = Engine(0, EngineConfig(timeout_ns=1 << 40, slice_ns=1_000, open_records=500))
    engine.feed(topology(devices=PLAIN))
    results = engine.feed(tape.batch())
    assert engine.open_peak <= 500
    results.append(engine.finish())
    ledger = results[-1].totals.ledger
    assert (ledger.records, ledger.matched, ledger.imbalance) == (6_000, 6_000, 0)
    assert sum(len(result.rows.delays) for result in results) == 3_000


@pytest.mark.slow
@settings(max_examples=80)
@given(tapes(), st.lists(st.integers(0, 80_000), min_size=1, max_size=4), st.booleans())
def test_an_engine_resumes_from_the_state_of_another(batch, times, ambiguous):
    """A chain of engines, each resumed from the state before, gives the results and the final state of one engine."""
    devices = DEVICES if ambiguous else PLAIN
    config = EngineConfig(timeout_ns=TIMEOUT_NS)
    one = Engine(0, config)
    whole, state, parts, pieces, counts = one.feed(topology(devices=devices)), None, [], [], Counter()
    edges = [-(1 << 61), *sorted(t for t in times if len(batch) and batch.ts_ns[0] < t <= batch.ts_ns[-1]), 1 << 61]
    for begin, end in itertools.pairwise(edges):
        inside = batch[int(batch.ts_ns.searchsorted(begin)) : int(batch.ts_ns.searchsorted(end))]
        engine = Engine(0, config, state)
        results = [] if state is not None else engine.feed(topology(devices=devices))
        results += engine.feed(inside)
        whole += one.feed(inside)
        if end == edges[-1]:
            results.append(engine.finish())
            whole.append(one.finish())
        else:
            results += engine.stop_at(end)
            whole += one.stop_at(end)
            state = engine.state(end)
            rows = Rows(Delays.empty(), engine.close_windows(), engine.devices)
            results.append(Results(rows, engine.so_far(end)))
            assert state.digest() == one.state(end).digest()
            state = state_from_json(json.loads(json.dumps(state_to_json(state))))
        parts.append(all_rows(results))
        devices_of = results[-1].rows.devices
        pieces += [(devices_of[w.device], w) for r in results for w in r.rows.windows]
        ledger = results[-1].totals.ledger.as_dict()
        if end != edges[-1]:
            ledger.pop("in_flight")
        counts.update(ledger | results[-1].totals.grades.as_dict())
    assert sum(parts, Counter()) == all_rows(whole)
    assert dict(counts) == whole[-1].totals.ledger.as_dict() | whole[-1].totals.grades.as_dict()
    numbered = list(dict.fromkeys(device for device, _ in pieces))
    merged = joined(WindowTable.of([replace(w, device=numbered.index(device)) for device, w in pieces]))
    assert all_windows([Results(Rows(Delays.empty(), merged, tuple(numbered)), whole[-1].totals)]) == all_windows(whole)
