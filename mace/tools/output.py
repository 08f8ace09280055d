"""Reading what measurement tools print: which tool it is, fping, and a CSV of anybody's samples.

`mace.tools.ping_output` reads ping, `mace.tools.requests` dig and curl.

Strict: a line that is not understood is kept and counted, never skipped in silence; whoever shows results says how
many there were. An exchange that is told of and cannot be corrected is left out with its reason, and costs no other
one. Times are parsed as decimals, not as floats, which would lose nanoseconds.

The CSV has a header with `rtt_ms` and any of `sent_utc_s`, `id`, `seq`, `protocol`, `request_bytes`, `reply_bytes`,
`duplicate`; docs/correction.md tells what they mean. An empty cell is not told; an empty `rtt_ms` is no reply.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from ipaddress import ip_address
from typing import Final

from contracts.errors import UsageError, nearest
from contracts.protocols import ANSWERED, ICMP, ICMPV6
from contracts.schema import NOT_TOLD
from correlator.samples import Samples
from correlator.stamps import FPING, PING_BUSYBOX, PING_INETUTILS, REQUEST_RESPONSE
from mace.tools import ping_output as pingoutput
from mace.tools.ping_output import PingOutput
from mace.tools.requests import CurlOutput, DigOutput
from mace.tools.samples import (
    DECIMAL,
    IP_HEADER,
    STAMP,
    GrowingSamples,
    Reader,
    Unknown,
    decimal_ns,
    shown,
    unanswered,
    with_unanswered,
)

# fping ----------------------------------------------------------------------------------------------------

_FPING_STAMP: Final = STAMP + r"(?:\[[^\]]*\d\d:\d\d:\d\d[^\]]*\] )?"
"""The second: whole seconds, as `--timestamp-format` prints them; too coarse to be of use."""
_FPING_HOST: Final = r"(?P<host>\S+)(?: \((?P<address>[^()\s]+)\))?\s+: "
"""With both a name and an address: -n or -d together with -A."""
_FPING_AVERAGE: Final = r" \(\S+ avg, \S+ (?:loss|return)\)"
_FPING_REPLY: Final = re.compile(
    _FPING_STAMP
    + _FPING_HOST
    + r"(?:\[|(?P<duplicate>duplicate for \[))(?P<index>\d{1,9})\], (?P<size>\d{1,6}) bytes, "
    r"(?P<time>" + DECIMAL + r") ms(?(duplicate)|" + _FPING_AVERAGE + r")(?P<rest>(?:[ ,].*)?)$"
)
_FPING_WITH_HEADER: Final = 84
"""What versions before 5 print of a packet as it is without `-b`: they count its IP header."""
_FPING_REST: Final = re.compile(r"(?: \(T(?:OS|TL|TO|TS) \S+\))*(?: \[<- \S+\])?$")
_FPING_TIMEOUT: Final = re.compile(
    _FPING_STAMP + _FPING_HOST + r"\[(?P<index>\d{1,9})\], timed out" + _FPING_AVERAGE + "$"
)
_FPING_COUNTS: Final = re.compile(
    _FPING_HOST + r"xmt/rcv/%(?:loss|return) = (?P<sent>\d{1,18})/(?P<received>\d{1,18})/"
)
_FPING_TIMES: Final = re.compile(r"(?!time_)" + _FPING_HOST + r"(?P<times>(?:[0-9.]+|-)(?: (?:[0-9.]+|-))*)$")
"""The summary of -C; of an own format of `curl -w` it is none."""
_FPING_INTERVAL: Final = re.compile(r"\[\d\d:\d\d:\d\d\]$")
"""Of -Q: a summary of an interval follows."""
_FPING_ALIVE: Final = re.compile(r"\S+(?: \(\S+\))? is (?:alive|unreachable)(?: \(.*\))?$")
_FPING_OTHER: Final = re.compile(
    r"$|ICMP .+ from \S+ for ICMP Echo sent to |\s+\d+ (?:targets|alive|unreachable|unknown addresses|timeouts .*|"
    r"ICMP .*|other ICMP received)$|\s+[0-9.]+ (?:ms|sec) \(.+\)$"
)


class FpingOutput:
    """fping 5 with `-c`, `-C` or `-l`, of one target, one run or several. `-D` gives it times."""

    def __init__(self) -> None:
        self.stamps = FPING
        self.unknown = Unknown()
        self.left_out: Counter[str] = Counter()
        self._replies = GrowingSamples()
        self._host = ""
        self._base = 0
        """Requests of earlier runs."""
        self._last = NOT_TOLD
        """The highest number that any line told of."""
        self._told: set[int] = set()
        """Numbers of this run that a line told of."""
        self._answered: set[int] = set()
        self._over = False
        """There was this run's summary."""
        self._interval = False
        self._hidden: list[range] = []
        """Numbers of requests some of which had a reply that has no line."""
        self._alive = False

    @staticmethod
    def begins(line: str) -> bool:
        """Whether fping prints such a line, and no other tool does."""
        known = (_FPING_REPLY, _FPING_TIMEOUT, _FPING_COUNTS, _FPING_TIMES, _FPING_ALIVE)
        return any(expression.match(line) for expression in known)

    def line(self, text: str) -> int | None:
        if reply := _FPING_REPLY.match(text):
            return self._reply(reply, text)
        if timeout := _FPING_TIMEOUT.match(text):
            self._one_host(timeout["host"])
            self._number(int(timeout["index"]), again=False)
        elif counts := _FPING_COUNTS.match(text):
            self._one_host(counts["host"])
            self._count(int(counts["sent"]), int(counts["received"]))
        elif times := _FPING_TIMES.match(text):
            self._one_host(times["host"])
            each = times["times"].split()
            self._count(len(each), len(each) - each.count("-"))
        elif _FPING_INTERVAL.match(text):
            self._interval = True
        elif _FPING_ALIVE.match(text):
            self._alive = True
        elif not _FPING_OTHER.match(text):
            self.unknown.add(text)
        return None

    def _reply(self, reply: re.Match[str], text: str) -> int:
        self._one_host(reply["host"])
        if not _FPING_REST.match(reply["rest"]):
            # What follows is not understood, and a reply it is.
            self.unknown.add(text)
        duplicate = bool(reply["duplicate"])
        seq = self._number(int(reply["index"]), again=duplicate)
        self._answered.add(seq)
        rtt_ns, unit_ns = decimal_ns(reply["time"], 1_000_000)
        headers = IP_HEADER.get(_family_of_address(reply["address"] or reply["host"]), 0)
        bytes_told = int(reply["size"])
        size = bytes_told + headers if headers and bytes_told != _FPING_WITH_HEADER else NOT_TOLD
        return self._replies.add(
            stamp_utc_ns=decimal_ns(reply["stamp"], 1_000_000_000)[0] if reply["stamp"] else NOT_TOLD,
            seq=seq,
            rtt_ns=rtt_ns,
            resolution_ns=unit_ns // 2,
            duplicate=int(duplicate),
            request_len=size,
            reply_len=size,
            l4_proto={20: ICMP, 40: ICMPV6}.get(headers, NOT_TOLD),
        )

    def _number(self, index: int, *, again: bool) -> int:
        """The request's number, counted on from run to run: one more begins after a summary, or where numbers recur."""
        seq = self._base + index
        if not again and (self._over or seq in self._answered):
            self._base, self._over, self._told = self._last + 1, False, set()
            seq = self._base + index
        self._told.add(seq)
        self._last = max(self._last, seq)
        return seq

    def _count(self, sent: int, received: int) -> None:
        if self._interval:
            self._interval = False
            if received:
                self._hidden.append(range(0))
            return
        if self._over:
            self._base, self._told = self._last + 1, set()
        self._last = max(self._last, self._base + sent - 1)
        if received > len(self._told & self._answered):
            self._hidden.append(range(self._base, self._last + 1))
        self._over = True

    def _one_host(self, host: str) -> None:
        if self._host not in ("", host):
            raise UsageError(
                f"fping measured {self._host} and {host}: correct them one by one, so that order means something"
            )
        self._host = host

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        if not len(self._replies):
            if self._alive:
                raise UsageError("fping without -c, -C or -l says who is alive, and has no line for a reply")
            if self._hidden:
                raise UsageError("fping -q and -Q print no line for a reply, so there is nothing to correct")
        answered = self._answered
        pingoutput.bounded(self._last + 1, len(answered))
        return with_unanswered(self.samples(), unanswered(0, self._last, answered), self._hidden)


def _family_of_address(host: str) -> int:
    """4 or 6; 0 for a name."""
    try:
        return ip_address(host.partition("%")[0]).version
    except ValueError:
        return 0


# CSV ------------------------------------------------------------------------------------------------------

_COLUMNS: Final = ("sent_utc_s", "id", "seq", "rtt_ms", "protocol", "request_bytes", "reply_bytes", "duplicate")


class CsvOutput:
    """Samples of any tool that tells when it sent and how long the answer took, both by the user's clock."""

    def __init__(self) -> None:
        self.stamps = REQUEST_RESPONSE
        self.unknown = Unknown()
        self.left_out: Counter[str] = Counter()
        self._replies = GrowingSamples()
        self._columns: list[str] = []

    @staticmethod
    def begins(line: str) -> bool:
        """Whether it names one of the columns."""
        return not set(_cells(line)).isdisjoint(_COLUMNS)

    def line(self, text: str) -> int | None:
        if not text.strip():
            return None
        cells = _cells(text)
        if not self._columns:
            if self.begins(text):
                self._header(cells)
            else:
                self.unknown.add(text)
            return None
        try:
            if len(cells) != len(self._columns):
                raise ValueError(text)
            row = _csv_row({name: cell for name, cell in zip(self._columns, cells, strict=True) if cell})
        except (ValueError, KeyError, ArithmeticError):
            self.unknown.add(text)
            return None
        return self._replies.add(**row)

    def _header(self, cells: list[str]) -> None:
        for name in cells:
            if name not in _COLUMNS:
                raise UsageError(f"CSV: no column {name!r}{nearest(name, _COLUMNS)}; known: {', '.join(_COLUMNS)}")
        if "rtt_ms" not in cells or len(set(cells)) != len(cells):
            raise UsageError("CSV: the first line names each column once, `rtt_ms` among them")
        self._columns = cells

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        return self.samples()


def _cells(line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True, strict=True), [])]
    except csv.Error:
        return []


_MOST: Final = dict.fromkeys(("request_len", "reply_len"), 0x7FFF_FFFF)
_MOST_NS: Final = 1 << 62
"""Of a time, or a number: sums of two fit into 64 bits."""


def _csv_row(told: Mapping[str, str]) -> dict[str, int]:
    """Columns of `Samples`; raises what int() and `decimal_ns` do, and KeyError for an unknown name."""
    protocol = told.get("protocol", "").lower()
    proto = NOT_TOLD if not protocol else int(protocol) if protocol.isdigit() else ANSWERED[protocol]
    seq = int(told.get("seq", NOT_TOLD))
    rtt_ns, unit_ns = decimal_ns(told["rtt_ms"], 1_000_000) if "rtt_ms" in told else (NOT_TOLD, 0)
    row = {
        "stamp_utc_ns": decimal_ns(told["sent_utc_s"], 1_000_000_000)[0] if "sent_utc_s" in told else NOT_TOLD,
        "seq": seq,
        "rtt_ns": rtt_ns,
        "resolution_ns": unit_ns,
        "duplicate": {"0": 0, "1": 1}[told.get("duplicate", "0")],
        "request_len": int(told.get("request_bytes", NOT_TOLD)),
        "reply_len": int(told.get("reply_bytes", NOT_TOLD)),
        "l4_proto": proto,
        "l4_id": int(told.get("id", NOT_TOLD)),
        "l4_seq": seq % 65536 if proto in (ICMP, ICMPV6) and seq != NOT_TOLD else NOT_TOLD,
    }
    if any(value < NOT_TOLD for value in row.values()) or row["l4_id"] > 0xFFFF or proto > 0xFF:
        raise ValueError(told)
    if any(value > _MOST.get(name, _MOST_NS) for name, value in row.items()):
        raise OverflowError(told)
    return row


# What they share ------------------------------------------------------------------------------------------

READERS: Final[dict[str, Callable[[], Reader]]] = {
    "ping": PingOutput,
    "ping-U": partial(PingOutput, user_clock=True),
    "ping-inetutils": partial(PingOutput, stamps=PING_INETUTILS),
    "ping-busybox": partial(PingOutput, stamps=PING_BUSYBOX),
    "fping": FpingOutput,
    "csv": CsvOutput,
    "dig": DigOutput,
    "curl": CurlOutput,
}
"""Tools by name; the name is what the user gives."""

_OTHERS: Final = {
    r"HPING |--- .+ hping statistic ---$|len=\d+ ip=": "hping",
    r"Starting Nping |SENT \(|RCVD \(": "nping",
    r"Starting Nmap |Nmap scan report": "nmap",
    r"ARPING |Unicast reply from |\d+ bytes from [0-9a-fA-F:]{11,17} \(": "arping (it sends no IP packets)",
    r"Pinging \S+ .*with \d+ bytes of data:|Reply from \S+: bytes=\d+ ": "ping of Windows",
    r"PING6\(|\d+ bytes from \S+, icmp_seq=": "ping6 of BSD or macOS",
    r"Request timeout for icmp_seq ": "ping of macOS",
    r"PING \S+ \(\S+\) \d+ bytes of data\.$|RTT\[ms\]: min = ": "oping",
    r"PING \S+:\d+ \(|connected to \S+ \(\d+ bytes\), seq=": "httping",
    r"Ping \S+ \(\S+\).*: \d+\(\d+\) bytes\.$": "ping of toybox (it counts in milliseconds)",
    r"PING .+: sending (?:timestamp|address mask) request": "ping --timestamp or --address (they are no echo requests)",
    r"PING ": "a ping in another language or form (with LC_ALL=C iputils prints English)",
    r"Start: \d{4}-\d\d-\d\dT|HOST: \S+ +Loss% |Mtr_Version,|My traceroute ": "mtr",
    r"traceroute6? to |tracepath|\s*1\??: +\[LOCALHOST\]": "traceroute",
    r";; ->>HEADER<<- opcode: QUERY, rcode: ": "drill",
    r";; ->>HEADER<<- opcode: QUERY; status: ": "kdig",
    r"-\s+type: MESSAGE$": "dig +yaml (without +yaml it is read)",
    r"\{\"(?:resp|timeout|intSum|summary|vSum|stats|alive|unreach)\": ?\{": "fping --json (without --json it is read)",
    r'\s*"?time_(?:appconnect|connect|namelookup|pretransfer|redirect|starttransfer|total)\b': (
        "curl -w in another form (with -w '%{json}\\n' it is read)"
    ),
    r"iperf|Connecting to host \S+, port |Client connecting to \S+, ": "iperf",
    r"sockperf: |qperf|MIGRATED (?:TCP|UDP) ": "a benchmark of throughput or latency",
}
"""How lines of tools begin that are known and not read -> which tool it is."""


_AS_CSV: Final = "the samples of any other tool can be given as a CSV (docs/correction.md)"
_BEHIND: Final = re.compile(
    r".+?(?:PING \S+ \(|\b\d{1,6} bytes from \S.*?[ :](?:icmp_[rs]eq|seq)=\d|"
    r" : \[\d+\], (?:\d+ bytes, |timed out)|;; Query time: \d)"
)
"""A line of a tool with something in front of it."""
_COLOURS: Final = re.compile(r"\x1b\[[0-9;:?]*[ -/]*[@-~]")
"""ECMA-48's control sequences, as colouring wrappers of tools print them."""


def recognised(line: str, *, first: bool = True) -> Reader | None:
    """The reader of the tool that prints such a line; None if it tells of none. A header of CSV is the `first` line.

    Raises `UsageError` where it is another tool's.
    """
    if pingoutput.begins(line):
        return PingOutput()
    if FpingOutput.begins(line):
        return FpingOutput()
    if DigOutput.begins(line):
        return DigOutput()
    if CurlOutput.begins(line):
        return CurlOutput()
    if CsvOutput.begins(line) and (first or "rtt_ms" in line):
        return CsvOutput()
    for begins, tool in _OTHERS.items():
        if re.match(begins, line):
            raise UsageError(
                f"{shown(line)} is of {tool}, whose output is not read. Known are {', '.join(READERS)}; {_AS_CSV}"
            )
    return None


def read(lines: Iterable[str], reader: Reader | None = None) -> tuple[Samples, Reader]:
    """All samples of a tool's output, those without a reply included, and the reader, which knows what it did not
    understand and what it left out.

    Without a reader the first line that one tool alone prints tells which it is; those before it are that tool's too.
    Raises `UsageError` where that fails, or where there is no sample at all.
    """
    before: list[str] = []
    for raw in lines:
        text = raw.rstrip("\r\n")
        if "\x1b" in text:
            text = _COLOURS.sub("", text)
        if reader is None:
            reader = recognised(text, first=not any(line.strip() for line in before))
            before.append(text)
            if reader is not None:
                for earlier in before:
                    reader.line(earlier)
        else:
            reader.line(text)
    if reader is None:
        first = next((line for line in before if line.strip()), None)
        if first is None:
            raise UsageError("the tool's output is empty")
        if behind := next((line for line in before if _BEHIND.match(line)), None):
            raise UsageError(
                f"{shown(behind)} has something in front of what the tool printed, as a time or a name: give its "
                "lines alone"
            )
        raise UsageError(
            f"{shown(first)} is what no known tool prints first, nor is there any line that only one of them prints; "
            f"--tool says which it is: {', '.join(READERS)}; {_AS_CSV}"
        )
    samples = reader.finish()
    if not len(samples):
        told = "".join(f"; {count:,} left out, {why}" for why, count in reader.left_out.items())
        told += f"; not understood: {shown(reader.unknown.first[0])}" if reader.unknown.count else ""
        raise UsageError(f"the tool's output tells of no request{told}")
    return samples, reader
