"""Counts of stages equal those of a naive computation, packet by packet, for any CPUs, times and cuts of the stream."""

from collections import Counter, defaultdict
from itertools import chain, groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.cpus import Measure
from contracts.schema import Direction
from contracts.topology import Topology
from correlator import stages
from correlator.engine import Engine, EngineConfig
from correlator.neighbours import ARP_BYTES
from tests.traffic import ACROSS, LETTERS, REPLY, REQUEST, Tape, topology

NESTED = "Q:eth0 X:eth0 r:veth1 R:veth1 R:br0 Q:out0 X:out0 X:out0 r:rem0 R:rem0"
OFFLOADED = "r:out0 G:out0 R:out0 Q:br0 X:br0 Q:veth1 X:veth1 G:eth0 R:eth0 c"
PATHS = {REQUEST: "c1", REPLY: "c1", ACROSS: "c1", NESTED: "c1", OFFLOADED: "c1"}
OUTWARDS, INWARDS = Direction.EGRESS, Direction.INGRESS


def naive(packet):
    """Return the stages of one packet, a list of (ts, letter, device, cpu), as (device, cpus, run, wait)."""
    hops = [list(records) for _, records in groupby([one for one in packet if one[2]], lambda one: one[2])]
    found = []
    for number, hop in enumerate(hops):
        at = next((i for i, one in enumerate(hop) if one[1] == "R"), 0)
        begin, before = hop[at], [*chain(*hops[:number]), *hop[:at]]
        queue = next((one for one in hop[:at] if one[1] == "r"), None)
        passed = queue or next((one for one in reversed(before) if one not in hop), begin)
        end = hops[number + 1][0] if number + 1 < len(hops) else None
        run, wait = end and end[0] - begin[0], queue and begin[0] - queue[0]
        if begin[2] != "rem0" and (run is not None or wait is not None):
            found.append((begin[2], (passed[3], begin[3]), run, wait))
    return found


def sides(path, found):
    """Return the stages by direction and container."""
    if path == ACROSS:
        turn = [stage[0] for stage in found].index("veth2")
        return {(OUTWARDS, "c1"): found[:turn], (INWARDS, "c2"): found[turn:]}
    return {(OUTWARDS if path.startswith("Q:eth0") else INWARDS, "c1"): found}


def expected(packets):
    counts = defaultdict(Counter)
    for path, packet in packets:
        for (direction, container), found in sides(path, naive(packet)).items():
            by_cpu = Counter()
            for device, cpus, run, wait in found:
                key = (device, container, direction, *cpus)
                if run is not None:
                    counts[Measure.RUN, *key][run] += 1
                    by_cpu[cpus[1]] += run
                if wait is not None:
                    counts[Measure.LAST_WAIT if run is None else Measure.WAIT, *key][wait] += 1
            whole = ("eth0", container, direction, -1, -1)
            counts[Measure.WORK, *whole][by_cpu.total()] += 1
            counts[Measure.SERIAL, *whole][max(by_cpu.values())] += 1
    return {key: (counter.total(), sum(ns * n for ns, n in counter.items())) for key, counter in counts.items()}


def counted(items, **config):
    """Return the engine's counts, summed by measure, device, container, direction and CPUs."""
    engine = Engine(0, EngineConfig(stages=True, **config))
    results = [result for item in items for result in engine.feed(item)]
    results.append(engine.finish())
    found = Counter(), Counter()
    for result in results:
        table, devices = result.rows.stages, result.rows.devices
        for window in range(len(table)):
            place = result.rows.places[table.column("device")[window]]
            device = devices[place.device]
            assert (devices[place.owner].name, devices[place.owner].container) == ("eth0", device.container)
            measure, direction = Measure(table.column("segment")[window]), Direction(table.column("direction")[window])
            key = (measure, device.name, device.container, direction, place.cpu_queued, place.cpu)
            found[0][key] += int(table.column("count")[window])
            found[1][key] += int(table.column("sum_ns")[window])
    return {key: (count, found[1][key]) for key, count in found[0].items()}


@st.composite
def streams(draw):
    """Draw packets on random CPUs; returns the batch and each packet's records."""
    tape, packets = Tape(), []
    for number in range(draw(st.integers(1, 25))):
        path = draw(st.sampled_from(list(PATHS)))
        ts, cpu, packet = 50_000 * number, draw(st.integers(0, 3)), []
        for word in path.format(n=1).split():
            letter, _, device = word.partition(":")
            if letter in "rRG" and draw(st.booleans()):
                cpu = draw(st.sampled_from([0, 1, 2, 65_535]))
            tape.add(ts, LETTERS[letter], device, skb=number + 1, cpu=cpu)
            packet.append((ts, letter, device, cpu))
            ts += draw(st.sampled_from([0, 1, 30, 4_000]))
        packets.append((path, packet))
    return tape.batch(), packets


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(streams(), st.lists(st.integers(0, 200), max_size=4), st.sampled_from([60_000, 1 << 40]))
def test_counts_equal_naive_counts(stream, cuts, slice_ns):
    batch, packets = stream
    edges = [0, *sorted(min(cut, len(batch)) for cut in cuts), len(batch)]
    pieces = [topology(), *(batch[a:b] for a, b in pairwise(edges))]
    assert counted(pieces, slice_ns=slice_ns) == expected(packets)


@pytest.mark.parametrize("missing", [0, 1, 3, 5])
def test_a_packet_whose_path_is_not_whole_is_counted_apart(missing):
    """Without this record the packet's records are not of one life, or not of the whole path."""
    tape = Tape()
    for step, word in enumerate(REQUEST.format(n=1).split()):
        if step != missing:
            letter, _, device = word.partition(":")
            tape.add(1_000 * step, LETTERS[letter], device)
    assert {(key[0], count) for key, (count, _) in counted([topology(), tape.batch()]).items()} == {
        (Measure.PARTIAL, 1)
    }


def test_a_packet_that_waited_for_an_address_is_in_no_count():
    tape = Tape()
    words = REQUEST.format(n=1).split()
    queued = words.index("Q:out0")
    tape.packet(" ".join(words[:queued]), 0, skb=1, step=10)
    tape.packet("Q:out0 X:out0", 1_000, skb=2, length=ARP_BYTES)
    tape.packet("R:out0", 2_000, skb=3, length=ARP_BYTES)
    tape.packet(" ".join(words[queued:]), 3_000, skb=1, step=10)
    assert counted([topology(), tape.batch()]) == {}


def test_places_beyond_the_bound_are_counted_without_cpus(monkeypatch):
    monkeypatch.setattr(stages, "MOST_PLACES", 3)
    tape = Tape()
    for number in range(20):
        for step, word in enumerate(REQUEST.format(n=1).split()):
            letter, _, device = word.partition(":")
            tape.add(100_000 * number + 1_000 * step, LETTERS[letter], device, skb=number + 1, cpu=number)
    found = counted([topology(), tape.batch()])
    assert sum(count for (measure, *_), (count, _) in found.items() if measure is Measure.RUN) == 20 * 4
    assert {(queued, cpu) for *_, queued, cpu in found} > {(-1, -1)}
    assert len(found) < 20


def test_a_topology_change_keeps_the_counts():
    tape, later = Tape(), Tape()
    tape.packet(REQUEST.format(n=1), 0, skb=1)
    later.packet(REQUEST.format(n=1), 1_000_000, skb=2)
    items: list[Topology | object] = [topology(), tape.batch(), topology(500_000), later.batch()]
    found = counted(items)
    assert {count for (measure, *_), (count, _) in found.items() if measure is Measure.WORK} == {2}
    assert np.sum([count for (measure, *_), (count, _) in found.items() if measure is Measure.RUN]) == 8
