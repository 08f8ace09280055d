"""Is it the same packet? Packet sockets on the inner and the outer device know it by a number in its payload.

The rows of a measurement say when a packet was at each device, but not which packet it was. The kernel's order says it:
a packet socket's stamp is taken after `net_dev_queue` and before the packet is at the next device on the way out, and
after the packet left the device before and before this one's first record on the way in. So each row says between which
times the observer's stamp of its packet lies, at either end, to a few microseconds; a row is right if the same packet
fits both, and no two rows share one. Nothing depends on the order of what two CPUs did at once.
"""

import json
import statistics
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mace.lab import Spec, running
from tests.measuring import measured

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow, pytest.mark.timeout(180)]

OBSERVER = Path(__file__).parents[1] / "observer.py"
COUNT = 2000
RATE_PPS = 1500
SIZES = (96, 104)
"""Payload of each container's datagrams: whose they are."""
CLOCKS_NS = 500
"""How exactly the two clocks (monotonic, UTC) are known from one another, with room: far less than a packet's pace."""


@contextmanager
def observed(lab, places):
    """Packet sockets on (member, device) each; afterwards `seen` there has what each of them saw."""
    seen = {}
    with ExitStack() as stack:
        sockets = {}
        for place in places:
            process = lab.popen(place[0], [sys.executable, "-I", "-S", str(OBSERVER), place[1]])
            stack.callback(process.kill)
            sockets[place] = process
            assert process.stdout.readline() == "ready\n"
        yield seen
        for place, process in sockets.items():
            found = json.loads(process.communicate(timeout=30)[0])
            assert found["dropped"] == 0
            seen[place] = found["seen"]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("containers", [1, 2])
def test_every_row_is_of_one_packet_and_every_packet_has_its_row(tmp_path, family, containers):
    names = [f"c{n + 1}" for n in range(containers)]
    with running(Spec(name="tru", containers=containers)) as lab:
        for name in names:
            lab.ping(name, count=2, family=family)
        outer = ("host", lab.outer_device)
        with measured(lab, tmp_path) as measurement, observed(lab, [outer, *((n, "eth0") for n in names)]) as seen:
            flows = [
                lab.start_udp(name, count=COUNT, size=size, rate_pps=RATE_PPS, family=family, echo=True)
                for name, size in zip(names, SIZES, strict=False)
            ]
            assert [flow.wait().received for flow in flows] == [COUNT] * containers
            time.sleep(0.3)
    header = 28 if family == 4 else 48
    hops = defaultdict(dict)
    for row in measurement.rows():
        if row["segment"] in ("device", "outside"):
            hops[row["packet"], row["direction"]][row["position"]] = row
    for direction in ("egress", "ingress"):
        rows = [
            row
            for row in measurement.rows(segment="overhead", direction=direction)
            if row["l3_len"] - header in SIZES[:containers]
        ]
        assert len(rows) == COUNT * containers
        sent = direction == "egress"
        differences = []
        for name, size in zip(names, SIZES, strict=False):
            inner, outer_seen = (
                sorted(each for each in seen[place] if each[1] == sent and each[3] == size)
                for place in ((name, "eth0"), outer)
            )
            mine = [row for row in rows if row["container"] == name]
            assert len(mine) == len(inner) == len(outer_seen) == COUNT
            assert {row["l3_len"] - header for row in mine} == {size}, "packets of another container"
            fitting = [
                fits(inner, stamped(hops[row["packet"], direction], "eth0", sent))
                & fits(outer_seen, stamped(hops[row["packet"], direction], lab.outer_device, sent))
                for row in mine
            ]
            assert all(fitting), f"{direction} of {name}: {fitting.count(set())} rows are of no one packet"
            packets = assigned(fitting)
            assert None not in packets, f"{direction} of {name}: {packets.count(None)} rows are of others' packets"
            inner_ns, outer_ns = ({number: at_ns for at_ns, _, number, _ in each} for each in (inner, outer_seen))
            for row, number in zip(mine, packets, strict=True):
                delay_ns = (outer_ns[number] - inner_ns[number]) * (1 if sent else -1)
                differences.append(row["delay_ns"] - delay_ns)
        print(f"{direction}: ours less the observer's: median {statistics.median(differences):,.0f} ns")


def stamped(hops, device, sent):
    """Between which times the packet socket's stamp at `device` must be, of a packet with these rows by position."""
    position = next(at for at, row in hops.items() if row["device"] == device)
    row = hops[position if sent else position - 1]
    return row["utc_ns"] - CLOCKS_NS, row["utc_ns"] + row["delay_ns"] + CLOCKS_NS


def fits(seen, between):
    """Numbers of the packets whose stamps are between two times; `seen` is sorted."""
    return {number for _, _, number, _ in seen[bisect_left(seen, [between[0]]) : bisect_left(seen, [between[1] + 1])]}


def assigned(fitting):
    """One packet for each row, of those that fit it, no two the same; None for a row that there is none left for."""
    rows = {}

    def take(row, tried):
        for number in fitting[row] - tried:
            tried.add(number)
            if number not in rows or take(rows[number], tried):
                rows[number] = row
                return True
        return False

    for row in range(len(fitting)):
        take(row, set())
    packets = {row: number for number, row in rows.items()}
    return [packets.get(row) for row in range(len(fitting))]


def test_the_pairing_tells_when_two_packets_are_taken_for_one_another():
    assert assigned([{1}, {2, 1}, {2, 3}]) == [1, 2, 3]
    assert assigned([{1}, {1}]).count(None) == 1
    inner = [[100, True, 1, 96], [200, True, 2, 96]]
    outer = [[110, True, 1, 96], [210, True, 2, 96]]
    right, crossed = ((90, 105), (105, 120)), ((90, 105), (205, 220))
    assert fits(inner, right[0]) & fits(outer, right[1]) == {1}
    assert not fits(inner, crossed[0]) & fits(outer, crossed[1])
