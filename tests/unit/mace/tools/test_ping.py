"""The parts of `mace ping` that need no packets: ping's arguments, the namespace, and the printed lines."""

import asyncio
import io
import os

import numpy as np
import pytest
from rich.console import Console

from collector.ftrace.scheduling import TaskTrace
from collector.machine.netns import inode_of
from contracts.config import CaptureConfig
from contracts.errors import Unavailable, UsageError
from contracts.ledger import Ledger
from contracts.results import Results, Rows, Totals
from contracts.scheduling import TaskChange, TaskChanges
from contracts.schema import NOT_TOLD, Crossings, Delays
from contracts.topology import Device, Role
from contracts.windowtable import WindowTable
from correlator.correction import REASONS, Reason
from mace.tools.beside import Beside
from mace.tools.following import Following
from mace.tools.namespaces import open_namespace
from mace.tools.ping import Ping, arguments, user_clock
from tests.made_exchanges import START, Path

HOST = "203.0.113.2"
OFFSET_NS = 1_000_000_000_000_000_000


@pytest.mark.parametrize(
    ("given", "passed", "user_clock", "stamps"),
    [
        ([HOST], ["-D", HOST], False, False),
        (["--", "-c", "5", HOST], ["-D", "-c", "5", HOST], False, False),
        (["-nDc5", HOST], ["-nDc5", HOST], False, True),
        ([HOST, "-U", "-i", "0.01"], ["-D", HOST, "-U", "-i", "0.01"], True, False),
        # The value of an option is not a flag.
        (["-p", "ff", "-I", "qf", HOST], ["-D", "-p", "ff", "-I", "qf", HOST], False, False),
    ],
)
def test_arguments(given, passed, user_clock, stamps):
    assert arguments(given) == (passed, user_clock, stamps)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["-f", HOST], "-i 0"),
        (["-nfc5", HOST], "-i 0"),
        (["-q", HOST], "-q prints no line"),
        (["-s", "8", HOST], "-s 8 measures no time"),
        (["-c", "5"], "no destination"),
        (["-k", HOST], "option -k"),
        (["--flood", HOST], "option --flood"),
    ],
)
def test_arguments_that_leave_nothing_to_correct(given, why):
    with pytest.raises(UsageError, match=why):
        arguments(given)


@pytest.mark.parametrize(
    ("command", "by_user"),
    [
        (["ping", "-U", HOST], True),
        (["taskset", "-c", "0", "/usr/bin/ping", HOST, "-c5", "-U"], True),
        (["ping", "-nUc5", HOST], True),
        (["ping", HOST], False),
        (["ping", "-p", "-U", HOST], False),  # an option's value
        (["ping", "--nonsense", "-U", HOST], False),
        (["fping", "-U", HOST], False),
        (["sudo", "-U", "ping"], False),
    ],
)
def test_pings_clock_by_its_command_line(command, by_user):
    assert user_clock(command) == by_user


def test_a_namespace_by_process_and_by_path():
    for given in ({"pid": os.getpid()}, {"netns": "/proc/self/ns/net"}):
        fd = open_namespace(CaptureConfig(), **given)
        assert os.fstat(fd).st_ino == inode_of("/proc/self/ns/net")
        os.close(fd)


def test_other_files_are_no_namespace():
    with pytest.raises(Unavailable, match="no-such-namespace"):
        open_namespace(CaptureConfig(), netns="no-such-namespace")
    with pytest.raises(UsageError, match="is no network namespace"):
        open_namespace(CaptureConfig(), netns="/dev/null")


def unfollowed():
    return Following(TaskTrace())


def unprobed(netns_fd):
    return Beside(netns_fd, CaptureConfig(), probes=False)


# Lines -----------------------------------------------------------------------------------------------------


class MadeSession:
    """A session whose capture is a list of events: lines of ping, and results of the correlator."""

    utc_offset_ns = OFFSET_NS

    def __init__(self, ping, events):
        self.ping, self.events, self.said = ping, events, []

    def say(self, text):
        self.said.append(text)

    def observe(self, until, on_results, *, tee):
        async def feed():
            for event in self.events:
                if isinstance(event, str):
                    lines = asyncio.StreamReader()
                    lines.feed_data(event.encode() + b"\n")
                    lines.feed_eof()
                    await self.ping._read(lines)
                else:
                    on_results(event)

        asyncio.run(feed())


@pytest.fixture
def netns_fd():
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    yield fd
    os.close(fd)


def results(path, settled_utc_ns, netns_fd):
    inner = Device(os.fstat(netns_fd).st_ino, 2, "eth0", "veth", container="c1", role=Role.INNER)
    crossings = path.crossings() if path else Crossings.empty()
    rows = Rows(Delays.empty(), WindowTable.empty(), (inner,), crossings)
    return Results(rows, Totals(settled_utc_ns, Ledger(), 0, settled_utc_ns=settled_utc_ns))


def printed_at(ns):
    return f"[{ns // 10**9}.{ns % 10**9 // 1000:06d}]"


def run(netns_fd, *, stamps_shown=False, quiet=False):
    """Two pings 0.1 s apart, the second without a received packet; a third without a reply."""
    first, second = Path(), Path()
    first.egress(START + 5_000, overhead=20_000)
    first.ingress(START + 90_000, overhead=9_000)
    second.egress(START + 100_005_000)
    ping = Ping(
        [], netns_fd, unfollowed(), unprobed(netns_fd), user_clock=False, stamps_shown=stamps_shown, quiet=quiet
    )
    session = MadeSession(
        ping,
        [
            f"PING {HOST} ({HOST}) 56(84) bytes of data.",
            f"{printed_at(START + 150_000)} 64 bytes from {HOST}: icmp_seq=1 ttl=63 time=0.090 ms",
            f"{printed_at(START + 100_150_000)} 64 bytes from {HOST}: icmp_seq=2 ttl=63 time=0.090 ms",
            results(first, START + 100_000_000, netns_fd),
            "",
            f"--- {HOST} ping statistics ---",
            "3 packets transmitted, 2 received, 33.3% packet loss, time 2000ms",
            "what is this",
            results(second, START + 300_000_000, netns_fd),
        ],
    )
    return ping.measure(session, None), session


def test_lines_come_in_order_and_with_what_is_known(netns_fd, capsys):
    found, session = run(netns_fd)
    assert capsys.readouterr().out.splitlines() == [
        f"PING {HOST} ({HOST}) 56(84) bytes of data.",
        f"64 bytes from {HOST}: icmp_seq=1 ttl=63 time=0.090 ms · host≥61.1 nic=54.0 egress=20.0 ingress=8.9 µs buffer",
        f"64 bytes from {HOST}: icmp_seq=2 ttl=63 time=0.090 ms · not corrected · {REASONS[Reason.NO_RESPONSE]}",
        "",
        f"--- {HOST} ping statistics ---",
        "3 packets transmitted, 2 received, 33.3% packet loss, time 2000ms",
        "what is this",
    ]
    assert session.said == []
    assert found.container == "c1"
    told = found.as_dict()
    assert told["paired"] == 1
    assert told["unpaired"] == {"no_reply": 1, "no_response": 1}
    assert [(row["seq"], row["reason"]) for row in told["samples"]] == [
        (1, "paired"),
        (2, "no_response"),
        (3, "no_reply"),
    ]
    assert told["samples"][0]["host_rtt_lower_bound_ns"] == 61_100
    assert told["not_understood"] == 1
    assert found.statistics()["host_rtt_lower_bound_ns"] == {
        "count": 1,
        "min": 61_100,
        "median": None,
        "mean": None,
        "max": 61_100,
    }


def test_stamps_are_shown_with_option_d(netns_fd, capsys):
    run(netns_fd, stamps_shown=True)
    assert capsys.readouterr().out.splitlines()[1].startswith(printed_at(START + 150_000))


def test_json_output_has_no_lines(netns_fd, capsys):
    run(netns_fd, quiet=True)
    assert capsys.readouterr().out == ""


def test_a_ping_that_told_of_nothing_is_an_error(netns_fd):
    ping = Ping([], netns_fd, unfollowed(), unprobed(netns_fd), user_clock=False, stamps_shown=False, quiet=True)
    with pytest.raises(UsageError, match="its output has no request"):
        ping.measure(MadeSession(ping, []), None)


def test_what_the_reader_refuses_ends_the_run(netns_fd):
    ping = Ping([], netns_fd, unfollowed(), unprobed(netns_fd), user_clock=False, stamps_shown=False, quiet=True)
    with pytest.raises(UsageError, match="has no time"):
        ping.measure(MadeSession(ping, [f"16 bytes from {HOST}: icmp_seq=1 ttl=63"]), None)


# Waiting ----------------------------------------------------------------------------------------------------


def late(netns_fd, *changes, gaps=()):
    """One ping that took 0.89 ms, of which 85 µs passed between its request at the inner device and its reply.

    `changes`: times in µs after it had read the clock, and what happened to ping's task then.
    """
    trace = TaskTrace()
    ts, kind = zip(*changes, strict=True)
    at = START - OFFSET_NS + np.array(ts) * 1000
    trace.changes.append(TaskChanges(at, np.full(len(at), 4711, np.int32), np.array(kind, np.uint8)))
    trace.gaps += [(START - OFFSET_NS + a * 1000, START - OFFSET_NS + b * 1000) for a, b in gaps]
    path = Path()
    path.egress(START + 805_000, overhead=20_000)
    path.ingress(START + 890_000, overhead=9_000)
    ping = Ping([], netns_fd, Following(trace), unprobed(netns_fd), user_clock=False, stamps_shown=False, quiet=False)
    line = f"{printed_at(START + 950_000)} 64 bytes from {HOST}: icmp_seq=1 ttl=63 time=0.890 ms"
    settled = results(path, START + 5_000_000_000, netns_fd)
    return ping.measure(MadeSession(ping, [line, "", f"--- {HOST} ping statistics ---", settled]), None)


ASLEEP = [(-400, TaskChange.WOKEN), (-100, TaskChange.RUNS)]
HELD_UP = [(10, TaskChange.PREEMPTED), (800, TaskChange.RUNS)]
READ = [(810, TaskChange.SLEEPS), (891, TaskChange.WOKEN), (921, TaskChange.RUNS)]


def test_a_line_says_how_long_ping_waited_for_a_cpu(netns_fd, capsys):
    found = late(netns_fd, *ASLEEP, *HELD_UP, *READ)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith("host≥861.1 nic=54.0 egress=20.0 ingress=8.9 µs buffer · waited for CPU 790.0 µs")
    (row,) = found.as_dict()["samples"]
    assert row["temporal_error_ns"] == 790_000
    assert row["host_rtt_lower_bound_without_waiting_ns"] == row["host_rtt_lower_bound_ns"] - 790_000
    assert row["waited_send_ns"] == 300_000 + 790_000
    assert row["waited_receive_ns"] == 30_000
    assert found.as_dict()["waiting"] == {
        "known": 1, "why_not": None, "throttled": None, "throttled_ns": None, "pressure_ns": None, "lasted_ns": None,
    }  # fmt: skip
    assert found.statistics()["temporal_error_ns"]["max"] == 790_000
    assert found.round_trips().rows.temporal_error_ns.tolist() == [790_000]


def test_a_wait_outside_the_round_trip_is_on_no_line(netns_fd, capsys):
    found = late(netns_fd, *ASLEEP, *READ)
    assert capsys.readouterr().out.splitlines()[0].endswith("µs buffer")
    (row,) = found.as_dict()["samples"]
    assert (row["temporal_error_ns"], row["waited_send_ns"], row["waited_receive_ns"]) == (0, 300_000, 30_000)


def test_what_is_not_known_has_no_figure_and_is_said(netns_fd, capsys):
    found = late(netns_fd, *ASLEEP, *HELD_UP, *READ, gaps=[(0, 5)])
    (row,) = found.as_dict()["samples"]
    assert row["reason"] == "paired"
    assert "temporal_error_ns" not in row
    assert found.round_trips().rows.temporal_error_ns.tolist() == [NOT_TOLD]
    assert "temporal_error_ns" not in found.statistics()
    assert "waited for CPU" not in capsys.readouterr().out
    shown = io.StringIO()
    found.tables(Console(file=shown, width=200))
    assert "waiting for a CPU is not known of 1 paired samples" in shown.getvalue()
    assert "temporal error" not in shown.getvalue()
