"""Is it the same packet? Packet sockets on the inner and the outer device know it by a number in its payload.

The rows of a measurement say when a packet was at the inner and when at the outer device, but not which packet it was.
On each device packets come one after the other, so the row whose time there is the n-th belongs to the n-th packet that
the observer saw there. A row is right if that is the same packet at both ends. What is wrong would be seen: two packets
taken for one another have each other's numbers, and what is missing or too much moves all that follow.
"""

import json
import statistics
import sys
import time
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
    for direction in ("egress", "ingress"):
        # In the order of their times at the outer device, packets of all containers mixed.
        rows = [
            row
            for row in measurement.rows(segment="overhead", direction=direction)
            if row["l3_len"] - header in SIZES[:containers]
        ]
        assert len(rows) == COUNT * containers
        sent = direction == "egress"
        inner_ns = {id(row): row["utc_ns"] + (0 if sent else row["delay_ns"]) for row in rows}
        outer_ns = {id(row): row["utc_ns"] + (row["delay_ns"] if sent else 0) for row in rows}
        at_outer = dict(
            zip(
                (id(row) for row in sorted(rows, key=lambda row: outer_ns[id(row)])),
                sorted(each for each in seen[outer] if each[1] == sent),
                strict=True,
            )
        )
        differences = []
        for name, size in zip(names, SIZES, strict=False):
            mine = sorted((row for row in rows if row["container"] == name), key=lambda row: inner_ns[id(row)])
            there = sorted(each for each in seen[name, "eth0"] if each[1] == sent)
            for row, at_inner in zip(mine, there, strict=True):
                assert at_inner[2:] == at_outer[id(row)][2:], f"{direction} of {name}: not the same packet"
                assert at_inner[3] == size
                delay_ns = at_outer[id(row)][0] - at_inner[0] if sent else at_inner[0] - at_outer[id(row)][0]
                differences.append(row["delay_ns"] - delay_ns)
        print(f"{direction}: ours less the observer's: median {statistics.median(differences):,.0f} ns")
