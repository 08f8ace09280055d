"""Reading what measurement tools print: ping, fping, and a CSV of anybody's samples; dig and curl are elsewhere.

Strict: a line that is not understood is kept and counted, never skipped in silence; whoever shows results says how
many there were. Times are parsed as decimals, not as floats, which would lose nanoseconds.

The CSV has a header with `rtt_ms` and any of `sent_utc_s`, `id`, `seq`, `protocol`, `request_bytes`, `reply_bytes`,
`duplicate`; docs/correction.md tells what they mean. An empty cell is not told; an empty `rtt_ms` is no reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from decimal import InvalidOperation
from ipaddress import ip_address
from typing import Final

from correlator.samples import Samples
from correlator.stamps import FPING, PING, PING_USER, REQUEST_RESPONSE
from mace.errors import UsageError, nearest
from mace.schema import NOT_TOLD
from mace.toolrequests import CurlOutput, DigOutput
from mace.toolsamples import ICMP, ICMPV6, IP_HEADER, TCP, UDP, Reader, Replies, Unknown, decimal_ns

PROTOCOLS: Final = {"icmp": ICMP, "tcp": TCP, "udp": UDP, "icmpv6": ICMPV6}

_ICMP_HEADER: Final = 8
_MOST_REQUESTS: Final = 10_000_000
"""More without a reply would be a mistake in the file, or a day of a flood into nowhere."""


# ping -----------------------------------------------------------------------------------------------------

_STAMP: Final = r"(?:\[(?P<stamp>\d+\.\d+)\] )?"
_PING_BEGINS: Final = re.compile(r"PING \S.*? (?P<payload>\d+)(?:\((?P<total>\d+)\))? (?:data bytes|bytes of data\.?)$")
_PING_REPLY: Final = re.compile(
    _STAMP + r"(?P<size>\d+) bytes from (?P<source>.+?): icmp_seq=(?P<seq>\d+)(?: ident=(?P<ident>\d+))?"
    r"(?: ttl=\d+)?(?: time=(?P<time>[0-9.]+) ms)?(?P<marks>(?: \([A-Z ]+!\))*)$"
)
_PING_NO_ANSWER: Final = re.compile(_STAMP + r"no answer yet for icmp_seq=\d+$")
_PING_ERROR: Final = re.compile(_STAMP + r"From .+? icmp_seq=\d+ \S.*$")
_PING_COUNTS: Final = re.compile(
    r"(?P<sent>\d+) packets transmitted, \d+ received(?:, \+\d+ (?:duplicates|corrupted|errors))*"
    r"(?:, [0-9.]+% packet loss)?(?:, time \d+ms)?$"
)
_PING_OTHER: Final = re.compile(
    r"$|--- .+ ping statistics ---$|rtt min/avg/max/mdev = [0-9./]+ ms|pipe \d+$|, (?:pipe|ipg/ewma) |"
    r"\d+/\d+ packets, \d+% loss"
)
_PING_FLOOD: Final = re.compile("[.EC]*\x08[.EC \x08]*$|\\.+$")


class PingOutput:
    """iputils ping, one run or several after one another. `-D` gives it times, `user_clock` says that it had `-U`."""

    def __init__(self, *, user_clock: bool = False) -> None:
        self.stamps = PING_USER if user_clock else PING
        self.unknown = Unknown()
        self._replies = Replies()
        self._began = False
        self._overhead = 0
        """Bytes of headers around the payload, as the first line tells; 0: not known."""
        self._payload = 0
        self._before = 0
        """Requests of earlier runs."""
        self._seq = NOT_TOLD
        """Of the last reply of this run, not wrapped, and counted on from those before."""
        self._last = 0
        """The highest number that a reply or ping's count of requests told of."""

    def line(self, text: str) -> int | None:
        if reply := _PING_REPLY.match(text):
            return self._reply(reply, text)
        if begins := _PING_BEGINS.match(text):
            # One more run, if there was one: its numbers go on where the last's ended.
            self._before, self._seq = self._last, NOT_TOLD
            self._began, self._payload = True, int(begins["payload"])
            self._overhead = int(begins["total"]) - self._payload if begins["total"] else 0
        elif counts := _PING_COUNTS.match(text):
            self._last = max(self._last, self._before + int(counts["sent"]))
        elif _PING_FLOOD.match(text):
            raise UsageError(
                "ping -f prints no line for a reply, so there is nothing to correct; `-i 0` is as fast and prints them"
            )
        elif not (_PING_NO_ANSWER.match(text) or _PING_ERROR.match(text) or _PING_OTHER.match(text)):
            self.unknown.add(text)
        return None

    def _reply(self, reply: re.Match[str], text: str) -> int | None:
        if reply["time"] is None:
            raise UsageError(
                f"{text!r} has no time: ping measures none with fewer than 16 bytes of payload (-s), or it was cut"
            )
        if "CHECKSUM" in reply["marks"]:
            # Not a reply to what was sent; ping does not count it either.
            self.unknown.add(text)
            return None
        family = _family(reply["source"])
        size, seq = int(reply["size"]), int(reply["seq"])
        if seq > 0xFFFF:
            self.unknown.add(text)
            return None
        ours = self._overhead or IP_HEADER[family] + _ICMP_HEADER
        rtt_ns, unit_ns = decimal_ns(reply["time"], 1_000_000)
        known = self._seq != NOT_TOLD
        self._seq = self._before + (continued(self._seq - self._before, seq) if known else seq)
        self._last = max(self._last, self._seq)
        return self._replies.add(
            stamp_utc_ns=decimal_ns(reply["stamp"], 1_000_000_000)[0] if reply["stamp"] else NOT_TOLD,
            seq=self._seq,
            rtt_ns=rtt_ns,
            # Two stamps cut to microseconds; and above a millisecond what is printed is rounded.
            resolution_ns=1_000 + (unit_ns // 2 if unit_ns > 1_000 else 0),
            duplicate=int("DUP" in reply["marks"]),
            request_len=(self._payload + ours) if self._began else size - _ICMP_HEADER + ours,
            reply_len=size - _ICMP_HEADER + ours,
            l4_proto=ICMP if family == 4 else ICMPV6,
            l4_id=int(reply["ident"]) if reply["ident"] else NOT_TOLD,
            l4_seq=seq,
        )

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        replies = self.samples()
        answered = set(replies.seq.tolist())
        first = 1 if self._began else min(answered, default=1)
        return _with_unanswered(replies, first, self._last, answered)


def continued(before: int, seq: int) -> int:
    """A 16-bit sequence number, continued beyond 65535: of all that it can be, the nearest to the one before it.

    So up to 32,767 lost in a row, or as much disorder, are told right.
    """
    return before + (seq - before + 32768) % 65536 - 32768


def _family(source: str) -> int:
    """4 or 6, of `name (address)` or `address`."""
    return 6 if ":" in source else 4


# fping ----------------------------------------------------------------------------------------------------

_FPING_REPLY: Final = re.compile(
    _STAMP + r"(?P<host>\S+)\s+: \[(?P<index>\d+)\], (?P<size>\d+) bytes, (?P<time>[0-9.]+) ms"
    r" \(\S+ avg, \d+% (?:loss|return)\)"
    r"(?: \(T[OT][SL] \S+\))*(?: \[<- \S+\])?$"
)
_FPING_TIMEOUT: Final = re.compile(
    _STAMP + r"(?P<host>\S+)\s+: \[(?P<index>\d+)\], timed out \(\S+ avg, \d+% (?:loss|return)\)$"
)
_FPING_OTHER: Final = re.compile(
    r"$|\S+\s+: xmt/rcv/%(?:loss|return) = |\S+\s+:(?: (?:[0-9.]+|-))+$|"
    r"\S+\s+: duplicate for \[\d+\]|\[\d\d:\d\d:\d\d\]$"
)


class FpingOutput:
    """fping 5 with `-c`, `-C` or `-l`, of one target. `-D` gives it times."""

    def __init__(self) -> None:
        self.stamps = FPING
        self.unknown = Unknown()
        self._replies = Replies()
        self._last = NOT_TOLD
        self._host = ""

    def line(self, text: str) -> int | None:
        if reply := _FPING_REPLY.match(text):
            self._one_host(reply["host"])
            self._last = max(self._last, int(reply["index"]))
            rtt_ns, unit_ns = decimal_ns(reply["time"], 1_000_000)
            headers = IP_HEADER.get(_family_of_address(reply["host"]), 0)
            size = int(reply["size"]) + headers if headers else NOT_TOLD
            return self._replies.add(
                stamp_utc_ns=decimal_ns(reply["stamp"], 1_000_000_000)[0] if reply["stamp"] else NOT_TOLD,
                seq=int(reply["index"]),
                rtt_ns=rtt_ns,
                resolution_ns=unit_ns // 2,
                request_len=size,
                reply_len=size,
                l4_proto={20: ICMP, 40: ICMPV6}.get(headers, NOT_TOLD),
            )
        if timeout := _FPING_TIMEOUT.match(text):
            self._one_host(timeout["host"])
            self._last = max(self._last, int(timeout["index"]))
        elif not _FPING_OTHER.match(text):
            self.unknown.add(text)
        return None

    def _one_host(self, host: str) -> None:
        if self._host not in ("", host):
            raise UsageError(
                f"fping measured {self._host} and {host}: correct them one by one, so that order means something"
            )
        self._host = host

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        replies = self.samples()
        return _with_unanswered(replies, 0, self._last, set(replies.seq.tolist()))


def _family_of_address(host: str) -> int:
    """4 or 6; 0 for a name."""
    try:
        return ip_address(host).version
    except ValueError:
        return 0


# CSV ------------------------------------------------------------------------------------------------------

_COLUMNS: Final = ("sent_utc_s", "id", "seq", "rtt_ms", "protocol", "request_bytes", "reply_bytes", "duplicate")


class CsvOutput:
    """Samples of any tool that tells when it sent and how long the answer took, both by the user's clock."""

    def __init__(self) -> None:
        self.stamps = REQUEST_RESPONSE
        self.unknown = Unknown()
        self._replies = Replies()
        self._columns: list[str] = []

    def line(self, text: str) -> int | None:
        cells = [cell.strip() for cell in text.split(",")]
        if not self._columns:
            self._header(cells)
            return None
        if not text.strip():
            return None
        try:
            if len(cells) != len(self._columns):
                raise ValueError(text)
            row = _csv_row({name: cell for name, cell in zip(self._columns, cells, strict=True) if cell})
        except (ValueError, KeyError, InvalidOperation, OverflowError):
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


def _csv_row(told: Mapping[str, str]) -> dict[str, int]:
    """Columns of `Samples`; raises what int() and Decimal() do, and KeyError for an unknown name."""
    protocol = told.get("protocol", "").lower()
    proto = NOT_TOLD if not protocol else int(protocol) if protocol.isdigit() else PROTOCOLS[protocol]
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
    return row


# What they share ------------------------------------------------------------------------------------------

READERS: Final[dict[str, Callable[[], Reader]]] = {
    "ping": PingOutput,
    "ping-U": lambda: PingOutput(user_clock=True),
    "fping": FpingOutput,
    "csv": CsvOutput,
    "dig": DigOutput,
    "curl": CurlOutput,
}
"""Tools by name; the name is what the user gives."""


def reader_for(first_line: str) -> Reader:
    """The reader of the tool that prints such a first line. Raises `UsageError`."""
    if _PING_BEGINS.match(first_line) or _PING_REPLY.match(first_line):
        return PingOutput()
    if _FPING_REPLY.match(first_line) or _FPING_TIMEOUT.match(first_line):
        return FpingOutput()
    if DigOutput.begins(first_line):
        return DigOutput()
    if CurlOutput.begins(first_line):
        return CurlOutput()
    if {cell.strip() for cell in first_line.split(",")} & set(_COLUMNS):
        return CsvOutput()
    raise UsageError(
        f"{first_line!r} is what no known tool prints first; --tool says which it is: {', '.join(READERS)}"
    )


def read(lines: Iterable[str], reader: Reader | None = None) -> tuple[Samples, Reader]:
    """All samples of a tool's output, those without a reply included, and the reader, which knows what it did not
    understand.

    Without a reader the first line that is not empty tells which tool it is. Raises `UsageError` where that fails, or
    where there is no sample at all.
    """
    for raw in lines:
        text = raw.rstrip("\r\n")
        if reader is None:
            if not text.strip():
                continue
            reader = reader_for(text)
        reader.line(text)
    if reader is None:
        raise UsageError("the tool's output is empty")
    samples = reader.finish()
    if not len(samples):
        told = f"; not understood: {reader.unknown.first[0]!r}" if reader.unknown.count else ""
        raise UsageError(f"the tool's output tells of no request{told}")
    return samples, reader


def _with_unanswered(replies: Samples, first: int, last: int, answered: set[int]) -> Samples:
    """The replies, then a row for each request (their numbers are `first` to `last`) that had none."""
    if last - first - len(answered) > _MOST_REQUESTS:
        raise UsageError(f"the tool says that it sent {last:,} requests, of which {len(answered):,} were answered")
    missing = [seq for seq in range(first, last + 1) if seq not in answered]
    if not missing:
        return replies
    return Samples.concatenate([replies, Samples.of(len(missing), seq=missing)])
