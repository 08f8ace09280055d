"""Reading what ping prints: the one of iputils, of inetutils and of busybox.

They look alike and are not: iputils numbers its requests from 1 and has replies stamped by the kernel; the other two
number from 0 and read the clock themselves (`correlator.stamps`). The first line tells iputils from the two, the word
before a reply's number tells these apart, and where the first line is missing the summary does.

A reply of which there is no time (`-q`, `-s` below 16, cut or damaged on its way) is a sample all the same: it is not
"no reply", and those around it keep their places. What the summary counts and no line tells of is found the same way.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from contracts.errors import UsageError
from contracts.protocols import ICMP, ICMPV6
from contracts.schema import NOT_TOLD
from correlator.samples import Samples
from correlator.stamps import PING, PING_BUSYBOX, PING_INETUTILS, PING_USER, StampModel
from mace.tools.samples import (
    IP_HEADER,
    STAMP,
    GrowingSamples,
    Unknown,
    decimal_ns,
    shown,
    unanswered,
    with_unanswered,
)

_ICMP_HEADER: Final = 8
_MOST_REQUESTS: Final = 10_000_000
"""More without a reply would be a mistake in the file, or a day of a flood into nowhere."""

_BEGINS: Final = re.compile(
    r"PING \S.*?[ :](?P<payload>\d{1,6})(?:\((?P<total>\d{1,6})\) bytes of data\.?| data bytes)$"
)
_BEGINS_FROM_ZERO: Final = re.compile(
    r"PING \S.*?\)(?: from \S+)?: (?P<payload>\d{1,6}) data bytes(?:, id 0x[0-9a-f]+ = (?P<ident>\d{1,5}))?$"
)
"""inetutils and busybox: the colon right behind the address. With IPv6 iputils has one too, behind a device's name."""
_TIME: Final = r"\d{1,9}(?:[.,]\d{1,9})?"
"""inetutils writes it as the locale does."""
_REPLY: Final = re.compile(
    STAMP + r"(?P<size>\d{1,6}) bytes from (?P<source>\S.*?): (?P<word>icmp_[rs]eq|seq)=(?P<seq>\d{1,9})(?=\s)"
    r"(?: ident=(?P<ident>\d{1,5}))?(?: ttl=\d+)?(?: time=(?P<time>" + _TIME + r") ms)?(?P<rest>(?:[\s\a].*)?)$"
)
"""A number is whole when something follows it: the last line of a killed run may be cut anywhere."""
_MARKS: Final = re.compile(r"\((?:DUP!|DIFFERENT ADDRESS!|BAD CHECKSUM!|truncated|same route)\)|[\s\a]+")
"""What may follow. `\\a`: of ping -a."""
_COUNTS: Final = re.compile(
    r"(?P<sent>\d{1,18}) packets transmitted, (?P<received>\d{1,18}) (?P<packets>packets )?received(?:,|$)"
)
"""No more is needed of this line: how a percentage is written is a matter of places and of versions."""
_COUNTS_SO_FAR: Final = re.compile(r"(?P<received>\d{1,18})/(?P<sent>\d{1,18}) packets, ")
"""iputils when asked by SIGQUIT."""
_SENT: Final = re.compile(STAMP + r"(?:no answer yet for icmp_seq=|From .+? icmp_seq=)(?P<seq>\d{1,9})(?: \S.*)?$")
"""No reply, but so many requests."""
_CLOCK_WENT_BACK: Final = re.compile(r"(?:ping: )?Warning: time of day goes back ")
_OTHER: Final = re.compile(
    # `^C`: of the terminal.
    r"(?:\^C)?(?:--- .+ ping statistics ---)?$|(?:rtt|round-trip) min/avg/max|pipe \d+$|, (?:pipe|ipg/ewma) |"
    r"PATTERN: 0x|WARNING: |(?:ping: )?Warning: |ping: sock4\.fd: |ai->ai_family: |"
    r"ping: local error: [Mm]essage too long, |wrong data byte #|#\d+\t[0-9a-f ]+$|Unrecorded hops: \d+$|"
    r"(?:RR|TS): ?\t|(?:NOP|LSRR: |SSRR: |\t\S.*|EOL)$|"
    # Errors of inetutils' ping, which have no number.
    r"\d{1,6} bytes from [^=]+: [A-Z][^=]*$"
)
_IP_OPTIONS: Final = re.compile(r"(?:RR|TS):")
_FLOOD: Final = re.compile(r"(?=.*[.\x08])[.EC \x08]+(?:--- .+ ping statistics ---)?$")
_BSD: Final = re.compile(
    r"Request timeout for icmp_seq \d+$|----.+PING Statistics----$|round-trip .*/std-dev = |"
    # inetutils and busybox have whole percents.
    r"\d+ packets transmitted, \d+ packets received, .*\d\.\d% packet loss$"
)


def begins(line: str) -> bool:
    """Whether ping prints such a line, and no other tool does."""
    return any(known.match(line) for known in (_BEGINS, _BEGINS_FROM_ZERO, _REPLY))


@dataclass(slots=True)
class _PingRun:
    """One run of ping. Numbers of requests go on from run to run; `base` is what makes them of those in the packets."""

    base: int = 0
    first: int = 1
    """Number of the first request, as in its packet."""
    begun: bool = False
    """Its first line was there."""
    payload: int = 0
    overhead: int = 0
    """Bytes of headers around the payload, as the first line tells; 0: not known."""
    ident: int = NOT_TOLD
    at: int = NOT_TOLD
    """Number in the packet of the last that was told of, not wrapped."""
    last: int = 0
    """The highest number that any line told of."""
    received: int = 0
    """Replies by ping's own count."""
    came: set[int] = field(default_factory=set)
    """Numbers of the requests whose reply has a line and is in that count."""
    rows: int = 0
    """Samples before it."""
    lengths_told: bool = True
    """False: its packets have IP options of which the first line does not tell."""


class PingOutput:
    """ping, one run or several after one another. `-D` gives it times, `user_clock` says that it had `-U`.

    `stamps` says which ping it was where nothing in the output does.
    """

    def __init__(self, *, user_clock: bool = False, stamps: StampModel | None = None) -> None:
        self._iputils = PING_USER if user_clock else PING
        self._told = self._iputils if user_clock else stamps
        """Which ping it is, as far as that is known."""
        self.unknown = Unknown()
        self.left_out: Counter[str] = Counter()
        self._replies = GrowingSamples()
        self._run = _PingRun()
        self._first: int | None = None
        """The first request's number, if a first line told it."""
        self._answered: set[int] = set()
        self._timed = 0
        self._hidden: list[range] = []
        """Numbers of requests some of which had a reply that has no line."""
        self._flood = False
        self._timeless = ""
        """The first line of a reply without a time."""
        self._clock_went_back = False

    @property
    def stamps(self) -> StampModel:
        """iputils' until something tells of another."""
        return self._told or self._iputils

    def line(self, text: str) -> int | None:
        if reply := _REPLY.match(text):
            return self._reply(reply, text)
        if begins := _BEGINS_FROM_ZERO.match(text):
            self._begin(0, begins, int(begins["ident"] or NOT_TOLD))
        elif begins := _BEGINS.match(text):
            self._it_is(self._iputils)
            self._begin(1, begins, NOT_TOLD)
        elif _BSD.match(text):
            raise UsageError(
                f"{shown(text)} is what ping prints on macOS or BSD, which no container of this kernel runs; those of "
                "iputils, inetutils and busybox can be corrected"
            )
        elif counts := _COUNTS.match(text):
            if not self._run.begun:
                self._it_is((self._told or PING_INETUTILS) if counts["packets"] else self._iputils)
            self._count(counts)
        elif counts := _COUNTS_SO_FAR.match(text):
            self._count(counts)
        elif sent := _SENT.match(text):
            self._number(int(sent["seq"]) % 65536)
        elif _FLOOD.match(text):
            self._flood = True
        elif _CLOCK_WENT_BACK.match(text):
            self._clock_went_back = True
        elif not _OTHER.match(text):
            self.unknown.add(text)
        elif _IP_OPTIONS.match(text) and not self._run.overhead:
            self._forget_lengths()
        return None

    def _it_is(self, stamps: StampModel) -> None:
        if self._told not in (None, stamps):
            raise UsageError(
                f"the output is of {self.stamps.name} and of {stamps.name}, which look at the clock at different "
                "moments: correct them one by one"
            )
        self._told = stamps

    def _begin(self, first: int, begins: re.Match[str], ident: int) -> None:
        """One more run, if there was one: its numbers go on where the last's ended."""
        self._end()
        begun = self._first is not None or self._answered
        base = self._run.last + 1 - first if begun else 0
        if self._first is None:
            self._first = min(self._answered, default=first)
        payload, total = int(begins["payload"]), begins.groupdict().get("total")
        self._run = _PingRun(
            base, first, True, payload, int(total) - payload if total else 0, ident,
            last=base + first - 1, rows=len(self._replies),
        )  # fmt: skip

    def _count(self, counts: re.Match[str]) -> None:
        run = self._run
        run.received = max(run.received, int(counts["received"]))
        run.last = max(run.last, run.base + run.first + int(counts["sent"]) - 1)

    def _number(self, seq: int) -> int:
        """The number that a packet's stands for, counted on from run to run."""
        run = self._run
        at = seq if run.at == NOT_TOLD else continued(run.at, seq)
        # None comes before the first: rather have more been lost than the half of 65,536.
        run.at = at if at >= run.first or not run.begun else at + 65536
        number = run.base + run.at
        run.last = max(run.last, number)
        return number

    def _reply(self, reply: re.Match[str], text: str) -> int | None:
        if int(reply["seq"]) > 0xFFFF:
            self.unknown.add(text)
            return None
        run = self._run
        if reply["word"] == "seq":
            self._it_is(PING_BUSYBOX)
        elif run.begun and run.first == 0:
            self._it_is(PING_INETUTILS)
        if _MARKS.sub("", reply["rest"]):
            # What follows is not understood, and a reply it is.
            self.unknown.add(text)
        seq = self._number(int(reply["seq"]))
        damaged = "CHECKSUM" in reply["rest"]
        rtt_ns, unit_ns = decimal_ns((reply["time"] or "0").replace(",", "."), 1_000_000)
        # iputils makes 0 of a time that comes out negative because the clock was set back, and warns on stderr.
        timed = bool(rtt_ns) and not damaged and not self._clock_went_back
        self._clock_went_back = False
        again = seq in run.came
        if again and not damaged and "DUP" not in reply["rest"]:
            raise UsageError(
                f"{shown(text)} is a second reply to its request, and ping would have marked it with (DUP!): outputs "
                "of several runs are mixed here, lines are there twice, or more than 32,767 replies in a row were "
                "lost; correct each run by itself"
            )
        self._answered.add(seq)
        if not damaged:
            # iputils does not count it: not a reply to what was sent.
            run.came.add(seq)
        self._timed += timed
        if not timed and not self._timeless:
            self._timeless = text
        family = 6 if ":" in reply["source"] else 4
        ours = run.overhead or IP_HEADER[family] + _ICMP_HEADER
        reply_len = int(reply["size"]) - _ICMP_HEADER + ours if run.lengths_told else NOT_TOLD
        return self._replies.add(
            stamp_utc_ns=decimal_ns(reply["stamp"], 1_000_000_000)[0] if reply["stamp"] else NOT_TOLD,
            seq=seq,
            rtt_ns=rtt_ns if timed else NOT_TOLD,
            # Two stamps cut to microseconds; and above a millisecond what iputils prints is rounded.
            resolution_ns=1_000 + (unit_ns // 2 if unit_ns > 1_000 else 0),
            duplicate=int(again or "DUP" in reply["rest"]),
            untimed=int(not timed),
            request_len=run.payload + ours if run.begun and run.lengths_told else reply_len,
            reply_len=reply_len,
            l4_proto=ICMP if family == 4 else ICMPV6,
            l4_id=int(reply["ident"]) if reply["ident"] else run.ident,
            l4_seq=int(reply["seq"]),
        )

    def _forget_lengths(self) -> None:
        """The packets of this run have IP options, and nothing tells how many bytes these are."""
        self._run.lengths_told = False
        for name in ("request_len", "reply_len"):
            column = self._replies.columns.get(name, [])
            column[self._run.rows :] = [NOT_TOLD] * (len(column) - self._run.rows)

    def _end(self) -> None:
        """The run is over: are there replies that ping counted and that no line told of?"""
        run = self._run
        if run.received > len(run.came):
            self._hidden.append(range(run.base + run.first, run.last + 1))

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        self._end()
        if not self._timed:
            self._why_no_time()
        first, last = self._first, self._run.last
        if first is None:
            first = min(self._answered, default=self._run.first)
        bounded(last + 1 - first, len(self._answered))
        return with_unanswered(self.samples(), unanswered(first, last, self._answered), self._hidden)

    def _why_no_time(self) -> None:
        """Raises `UsageError` if replies came, and there is no round trip time of any."""
        if self._flood:
            raise UsageError(
                "ping -f prints no line for a reply, so there is nothing to correct; `-i 0` is as fast and prints them"
            )
        if re.search(r" time[=<]", self._timeless) and self.unknown.count:
            raise UsageError(f"the time of {shown(self._timeless)} is not understood, nor that of any other reply")
        if self._timeless:
            raise UsageError(
                f"{shown(self._timeless)} has no time, and no other reply has one: ping measures none with fewer than "
                "16 bytes of payload (-s), and prints none of a reply that was cut or damaged"
            )
        if self._hidden:
            if self.unknown.count:
                raise UsageError(f"replies came, and none of their lines is understood: {shown(self.unknown.first[0])}")
            raise UsageError("ping -q prints no line for a reply, so there is nothing to correct")


def bounded(sent: int, answered: int) -> None:
    """Raises `UsageError` if so many were not answered that they are no measurement."""
    if sent - answered > _MOST_REQUESTS:
        raise UsageError(f"the tool says that it sent {sent:,} requests, of which {answered:,} were answered")


def continued(before: int, seq: int) -> int:
    """A 16-bit sequence number, continued beyond 65535: of all that it can be, the nearest to the one before it.

    So up to 32,767 lost in a row, or as much disorder, are told right.
    """
    return before + (seq - before + 32768) % 65536 - 32768
