"""When probes are sent beside a tool, to whom, and what is said where there are none."""

import asyncio
import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path as File

import pytest

from contracts.ledger import Ledger
from contracts.results import Results, Rows, Totals
from contracts.schema import Crossings, Delays
from contracts.topology import Device, Role
from contracts.windowtable import WindowTable
from mace.tools import host_probes, wrap
from mace.tools.host_probes import HostProbes, payload_beside, prober_command
from mace.tools.ping import _DESTINATION
from tests.made_exchanges import START, Path

MS = 1_000_000


class Prober:
    """Stands for a prober: keeps what it is asked for."""

    def __init__(self):
        self.asked = []
        self.stdin = self

    def write(self, line):
        self.asked.append(tuple(map(int, line.split())))


@pytest.fixture
def probes(monkeypatch):
    """Probes with a clock that `run` sets, and probers that do not answer by themselves."""
    monkeypatch.setattr(host_probes.time, "monotonic_ns", lambda: made.now_ns)
    made = HostProbes(0, "")
    made.now_ns = 0
    made._probers = {False: Prober(), True: Prober()}
    return made


def run(probes, *times_ns):
    """The tool's requests at these times; each probe is answered before the next request."""
    for at in times_ns:
        probes.now_ns = at
        probes.requested([at])
        probes._due_ns.clear()


def asked(probes):
    return sorted((due, inside, count) for inside, one in probes._probers.items() for due, count in one.asked)


def test_probes_stand_in_the_middle_between_two_requests_and_alternate(probes):
    run(probes, *(n * 200 * MS for n in range(100)))
    found = asked(probes)
    assert len(found) == 100 // 5
    assert all(due % (200 * MS) == 100 * MS for due, _, _ in found)
    assert [inside for _, inside, _ in found] == [bool(n % 2) for n in range(len(found))]


@pytest.mark.parametrize("pace_ns", [2_500_000, 10 * MS, 50 * MS, 1000 * MS, 137 * MS + 1])
def test_there_are_at_most_ten_a_second_and_one_per_five_samples(probes, pace_ns):
    times = range(0, 1000 * pace_ns, pace_ns)
    run(probes, *times)
    found = [due for due, _, count in asked(probes) for _ in range(count)]
    assert 0 < len(found) <= 1000 // 5
    assert all(b - a >= 1000 * MS for a, b in zip(found, found[10:], strict=False))


def test_a_flood_has_bursts(probes):
    run(probes, *range(0, 5_000 * MS, 100_000))
    found = asked(probes)
    assert {count for _, _, count in found} == {5}
    assert 8 <= len(found) <= 10
    assert all(b[0] - a[0] >= 500 * MS for a, b in pairwise(found))


def test_a_tool_that_changes_its_pace_is_followed(probes):
    run(probes, *range(0, 1000 * MS, 20 * MS))
    run(probes, *range(1000 * MS, 20_000 * MS, 500 * MS))
    late = [due for due, _, _ in asked(probes) if due > 10_000 * MS]
    assert late
    assert all(due % (500 * MS) == 250 * MS for due in late)


def test_no_second_probe_before_the_first_has_ended(probes):
    for n in range(100):
        probes.now_ns = n * 200 * MS
        probes.requested([n * 200 * MS])
    assert len(asked(probes)) == 1


def test_one_request_asks_for_no_probe(probes):
    run(probes, 5)
    assert asked(probes) == []
    assert probes.pace_s == 0


def test_a_destination_that_answers_no_probe_gets_no_more(probes):
    for n in range(5):
        assert probes.why_not == ""
        probes._take([(n, -1)], inside=False)
    run(probes, *(n * 200 * MS for n in range(100)))
    assert asked(probes) == []
    assert probes.remark() == "no probes: the destination answers no probe"


def test_a_route_that_is_missing_for_a_while_stops_no_probes(probes):
    for _ in range(4):
        probes._unanswered("probes cannot be sent: Network is unreachable")
    probes._take([(1, 50_000)], inside=False)
    assert probes.why_not == ""
    for _ in range(5):
        probes._unanswered("probes cannot be sent: Network is unreachable")
    assert probes.remark() == "no probes any more: probes cannot be sent: Network is unreachable"


def test_a_destination_that_drops_some_probes_is_probed_on(probes):
    for n in range(40):
        probes._take([(n, -1 if n % 2 else 50_000)], inside=False)
    assert probes.why_not == ""
    assert probes.remark() == "none of 20 probes has records on its whole way out of the outer device"


def test_too_few_probes_and_an_unknown_destination_are_said(probes):
    assert probes.remark().startswith("too few probes: 0 of the host, 0 of the container")
    probes._probers.clear()
    assert probes.remark() == "no probes: the tool's destination is not known"


def test_a_name_is_no_destination():
    probes = HostProbes(0, "")
    asyncio.run(probes.start("far.example", 48))
    assert "'far.example' is no address" in probes.remark()


def test_probes_differ_from_the_tools_packets_by_their_length():
    assert [payload_beside(n) for n in (56, 1472, 24, 23, 0)] == [48, 1464, 16, 31, 8]


@pytest.mark.needs("root")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_prober_measures_real_round_trips(address):
    with subprocess.Popen(prober_command(address, 41), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        said, _ = one.communicate("0 3\n0 1\n", timeout=60)
    first, second = map(json.loads, said.splitlines())
    assert (len(first), len(second)) == (3, 1)
    sent = [at for at, _ in [*first, *second]]
    assert sent == sorted(sent)
    assert all(rtt > 0 for _, rtt in [*first, *second])


@pytest.mark.needs("root")
def test_probers_run_beside_a_tool_and_end_with_it():
    async def beside(probes):
        answered, take = asyncio.Event(), probes._take

        def took(told, *, inside):
            take(told, inside=inside)
            answered.set()

        probes._take = took
        async with probes.running():
            await probes.start("127.0.0.1", 48)
            pids = [process.pid for process in probes._probers.values()]
            for n in range(20):
                probes.requested([n * 10 * MS])
                if probes._due_ns:
                    await answered.wait()
                    answered.clear()
        return pids

    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        probes = HostProbes(fd, "")
        pids = asyncio.run(beside(probes))
    finally:
        os.close(fd)
    assert len(pids) == 2
    assert not any(File(f"/proc/{pid}").exists() for pid in pids)
    assert probes.why_not == ""
    assert probes._answered >= 1
    probes.requested(range(1000))  # after the end nothing is sent any more


@pytest.mark.parametrize(
    ("line", "address", "payload"),
    [
        ("PING 203.0.113.2 (203.0.113.2) 56(84) bytes of data.", "203.0.113.2", "56"),
        ("PING far.example (203.0.113.2) from 10.0.0.2 eth0: 100(128) bytes of data.", "203.0.113.2", "100"),
        ("PING 2001:db8::7(2001:db8::7) 56 data bytes", "2001:db8::7", "56"),
        ("PING far.example(far.example (2001:db8::7)) 56 data bytes", "2001:db8::7", "56"),
        ("PING fe80::1%eth0(fe80::1%eth0) 56 data bytes", None, None),
        ("64 bytes from 203.0.113.2: icmp_seq=1 ttl=63 time=0.090 ms", None, None),
    ],
)
def test_the_destination_is_on_pings_first_line(line, address, payload):
    found = _DESTINATION.match(line)
    assert (found and found["address"], found and found["payload"]) == (address, payload)


@pytest.mark.parametrize(
    ("command", "address"),
    [
        ("fping -D -c 100 -p 10 203.0.113.2", "203.0.113.2"),
        ("dig -u @192.0.2.53 a.example b.example", "192.0.2.53"),
        ("sh -c for n in 1 2; do curl -s http://192.0.2.7:8080/; done", "192.0.2.7"),
        ("fping 192.0.2.7 192.0.2.7", "192.0.2.7"),
        ("curl http://[2001:db8::7]/", "2001:db8::7"),
        ("fping 192.0.2.7 192.0.2.8", ""),
        ("fping far.example", ""),
        ("fping 1.2.3.4.5", ""),
        ("fping 999.0.2.7", ""),
    ],
)
def test_the_only_address_of_a_command_is_its_destination(command, address):
    assert wrap.destination(command.split()) == address


def test_a_link_is_one_exchange_however_many_packets_it_has():
    """Three packets of one connection are one exchange; a flood's packets are one each."""
    path = Path()
    for at in (0, 100_000, 300_000, 20 * MS, 20 * MS + 50_000, 40 * MS):
        path.egress(START + at, overhead=20_000)
    assert (exchanges(path) - START).tolist() == [0, 20 * MS, 40 * MS]
    flood = Path()
    for n in range(60):
        flood.egress(START + n * 100_000, overhead=20_000)
    assert len(exchanges(flood)) == 60
    assert len(exchanges(None)) == 0


def exchanges(path):
    inner = Device(7, 2, "eth0", "veth", container="c1", role=Role.INNER)
    rows = Rows(Delays.empty(), WindowTable.empty(), (inner,), path.crossings() if path else Crossings.empty())
    return wrap._exchanges(Results(rows, Totals(0, Ledger(), 0)), 7)
