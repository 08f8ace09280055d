"""When the host's pings are sent beside ping, by which command, and what is taken from their output."""

import asyncio
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mace.tools import host_pings, host_probes
from mace.tools.host_pings import HostPings
from tests.measuring import wait_for

MS = 1_000_000
SAID = """\
PING 203.0.113.2 (203.0.113.2) 48(76) bytes of data.
[1700000000.000100] 56 bytes from 203.0.113.2: icmp_seq=1 ttl=63 time=0.090 ms
[1700000000.200100] 56 bytes from 203.0.113.2: icmp_seq=2 ttl=63 time=0.060 ms
[1700000000.600100] 56 bytes from 203.0.113.2: icmp_seq=4 ttl=63 time=0.061 ms

--- 203.0.113.2 ping statistics ---
4 packets transmitted, 3 received, 25% packet loss, time 603ms
"""


@pytest.fixture
def pings(monkeypatch):
    """Pings every 200 ms with a clock that `run` sets; `sent` has what would be sent."""
    monkeypatch.setattr(host_probes.time, "monotonic_ns", lambda: made.now_ns)
    made = HostPings(0, "", "0.2", [])
    asyncio.run(made.start("203.0.113.2", 48))
    made.now_ns, made.sent = 0, []
    monkeypatch.setattr(made, "_send", lambda due, count, *, inside: made.sent.append((due, count, inside)))
    return made


def run(pings, *times_ns):
    for at in times_ns:
        pings.now_ns = at
        pings.requested([at])
        pings._due_ns.clear()


def test_bursts_begin_in_the_middle_between_two_requests(pings):
    run(pings, *(n * 200 * MS for n in range(400)))
    assert {count for _, count, _ in pings.sent} == {4}
    assert 15 < len(pings.sent) <= 400 // 5 // 4
    assert all(due % (200 * MS) == 100 * MS for due, _, _ in pings.sent)
    assert [n for n, (_, _, inside) in enumerate(pings.sent) if inside] == [2, 10, 18]


@pytest.mark.parametrize("interval", ["0.002", "0.01", "0.05", "1"])
def test_there_are_at_most_ten_a_second_and_one_per_five_samples(monkeypatch, interval):
    made = HostPings(0, "", interval, [])
    asyncio.run(made.start("203.0.113.2", 48))
    sent = []
    monkeypatch.setattr(made, "_send", lambda due, count, *, inside: sent.append((due, count)))
    monkeypatch.setattr(host_probes.time, "monotonic_ns", lambda: made.now_ns)
    step = round(float(interval) * 1000) * MS
    run(made, *range(0, 1000 * step, step))
    assert 0 < sum(count for _, count in sent) <= 1000 // 5
    assert all(b - a >= count * 100 * MS for (a, count), (b, _) in pairwise(sent))


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("203.0.113.2", "ping -D -n -W 1 -c 4 -i 1 -s 48 192.0.2.7"),
        ("-i 0.01 203.0.113.2", "ping -D -n -W 1 -c 10 -i 0.01 -s 48 192.0.2.7"),
        ("-i .2 -U -Q 16 -c 9 203.0.113.2 -M do", "ping -D -n -W 1 -c 4 -i .2 -s 48 -U -Q 16 -M do 192.0.2.7"),
    ],
)
def test_the_hosts_pings_are_as_the_containers(given, command):
    made = host_pings.probes(given.split(), 0, "")
    asyncio.run(made.start("192.0.2.7", 48))
    assert made._argv == command.split()


@pytest.mark.parametrize("given", ["-i 0 203.0.113.2", "-i 0.001 203.0.113.2", "-A 203.0.113.2", "-i x 203.0.113.2"])
def test_a_ping_without_a_steady_slow_pace_has_other_probes(given):
    assert not isinstance(host_pings.probes(given.split(), 0, ""), HostPings)


def test_the_first_of_a_burst_does_not_count(pings):
    pings._note(SAID, "", inside=False)
    assert [each.rtt_ns for each in pings._sent] == [60_000, 61_000]
    assert pings._sent[1].sent_ns - pings._sent[0].sent_ns == 400 * MS - 1_000
    assert (pings._answered, pings._silent) == (3, 0)


def test_a_destination_that_answers_no_ping_gets_no_more(pings):
    silent = SAID.splitlines()
    nothing = "\n".join([silent[0], "", silent[5], "4 packets transmitted, 0 received, 100% packet loss, time 603ms"])
    pings._note(nothing, "", inside=False)
    assert pings.why_not == ""
    pings._note(nothing, "", inside=False)
    assert pings.remark() == "no probes: the destination answers no probe"
    run(pings, *(n * 200 * MS for n in range(100)))
    assert pings.sent == []


def test_a_host_without_a_route_is_said(pings):
    for _ in range(5):
        pings._note("", "ping: connect: Network is unreachable\n", inside=False)
    assert pings.remark() == "no probes: probes cannot be sent: ping: connect: Network is unreachable"


@pytest.mark.needs("root")
def test_real_pings_end_with_the_tool():
    """The second burst is cut off."""

    async def beside(made):
        async with made.running():
            await made.start("127.0.0.1", 48)
            for n in range(20):
                made.requested([time.monotonic_ns() - (20 - n) * 20 * MS])
            await asyncio.gather(*made._readers)
            (first, *_) = made._sent
            made.requested([time.monotonic_ns() + n * MS for n in range(100)])
            await asyncio.to_thread(wait_for, children)
            return first

    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        made = HostPings(fd, "", "0.1", [])
        first = asyncio.run(beside(made))
    finally:
        os.close(fd)
    assert first.rtt_ns > 0
    assert time.monotonic_ns() - first.sent_ns < 60_000 * MS
    assert children() == []
    assert made.why_not == ""


def children():
    """Return the pings that this process has started and that still run."""
    pids = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "ping\n"]
