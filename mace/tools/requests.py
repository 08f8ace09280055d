"""Reading what request and response tools print: dig over UDP, and the connect times of curl."""

from __future__ import annotations

import json
import re
from collections import Counter
from ipaddress import ip_address
from typing import Any, Final

from contracts.errors import UsageError
from contracts.protocols import TCP, UDP
from correlator.samples import Samples
from correlator.stamps import CURL, DIG
from mace.tools.samples import DECIMAL, IP_HEADER, GrowingSamples, Unknown, decimal_ns, with_unanswered

_UDP_HEADER: Final = 8
_DIG_BEGINS: Final = re.compile(
    r"; <<>> DiG \S+ <<>> |; \(\d+ servers? found\)$|;; (?:global options: |Got answer:$|Truncated, retrying in TCP|"
    r"->>HEADER<<- opcode: \w+, status: |Query time: \d|communications error to |connection timed out; |Sending:$)"
)
_DIG_TIME: Final = re.compile(r";; Query time: (\d{1,9}) ([mu]sec)$")
_DIG_SERVER: Final = re.compile(r";; SERVER: (?P<address>[0-9A-Fa-f.:]+)(?:%\S+)?#\d+\(.*?\)(?: \((?P<over>\w+)\))?$")
_DIG_SIZE: Final = re.compile(r";; MSG SIZE\s+rcvd: (\d{1,5})$")
_DIG_OVER_TCP: Final = re.compile(r";; .*retrying (?:in|over) TCP")
_DIG_BANNER: Final = re.compile(r"; <<>> DiG \S+ <<>>(?P<tcp>.*\s\+(?:tcp|vc)\b)?")
_DIG_AGAIN: Final = re.compile(r";; (?:BADCOOKIE|BADVERS), retrying|;; Got .+, trying next server$|;; Got bad packet: ")
_DIG_ERROR: Final = re.compile(r";; communications error to \S+: (?P<why>.+)$")
_DIG_NONE: Final = re.compile(r";; (?:connection timed out; )?no servers could be reached$")
_DIG_OTHER: Final = re.compile(
    r";?$|;[^;]|;; (?:global options: |->>HEADER<<- |flags: |Sending:$|QUERY SIZE: \d|WHEN: |WARNING: |Warning: |"
    r"(?:OPT|TSIG|SIG0) PSEUDOSECTION:$|(?:QUESTION|ANSWER|AUTHORITY|ADDITIONAL) SECTION:$)|"
    # Records, and what goes on of them with +multiline.
    r"[^;\s]\S*\s+\d+\w*\s+[A-Z]+\s+[A-Z0-9]+\s|\s+[^;\s]"
)
_DIG_TCP: Final = "over TCP: what dig measures can be corrected over UDP alone"
_SYN_LEN: Final = {4: 60, 6: 80}
"""Of Linux's SYN and SYN-ACK: 20 bytes of header and as many of options (MSS, SACK, time stamps, window scale)."""


class DigOutput:
    """dig 9 over UDP, with `-u`. Of each response: `Query time`, `SERVER` and `MSG SIZE`; records are passed over."""

    def __init__(self) -> None:
        self.stamps = DIG
        self.unknown = Unknown()
        self.left_out: Counter[str] = Counter()
        self._replies = GrowingSamples()
        self._asked = 0
        self._missing: list[int] = []
        self._errors = 0
        """Of the question that dig is at."""
        self._got = False
        """An answer came, and its time has not been told yet."""
        self._time: tuple[int, str] | None = None
        """Of an answer whose other lines are still to come: how long it took, in what."""
        self._server = 0
        """And its server's IP version."""
        self._over = "UDP"
        self._always_tcp = self._over_tcp = False
        """All answers, or the next, come over TCP: older versions do not say so beside the server."""

    @staticmethod
    def begins(line: str) -> bool:
        """Whether dig prints such a line, and no other tool does."""
        return bool(_DIG_BEGINS.match(line))

    def line(self, text: str) -> int | None:
        if _DIG_OVER_TCP.match(text):
            self._over_tcp = True
        elif banner := _DIG_BANNER.match(text):
            self._always_tcp = bool(banner["tcp"])
        elif text == ";; Got answer:":
            self._cut()
            self._got = True
        elif time := _DIG_TIME.match(text):
            self._got = False
            self._cut()
            self._time = (int(time[1]), time[2])
        elif server := _DIG_SERVER.match(text):
            self._answered_by(server, text)
        elif size := _DIG_SIZE.match(text):
            return self._answer(int(size[1]), text)
        elif error := _DIG_ERROR.match(text):
            self._error(error["why"])
        elif _DIG_NONE.match(text):
            if not self._errors:
                self._error("timed out")
            self._errors, self._over_tcp = 0, False
        elif _DIG_AGAIN.match(text):
            self._leave_out("an answer that dig did not take, without a time")
        elif not _DIG_OTHER.match(text):
            self.unknown.add(text)
        return None

    def _answered_by(self, server: re.Match[str], text: str) -> None:
        try:
            self._server = ip_address(server["address"]).version
        except ValueError:
            self.unknown.add(text)
        self._over = server["over"] or ("TCP" if self._over_tcp or self._always_tcp else "UDP")

    def _answer(self, size: int, text: str) -> int | None:
        if self._time is None or not self._server:
            self.unknown.add(text)
            return None
        (time, unit), header, over = self._time, IP_HEADER[self._server], self._over
        self._time, self._server, self._errors, self._over_tcp = None, 0, 0, False
        if over != "UDP":
            self._leave_out(_DIG_TCP.replace("TCP", over, 1))
            return None
        if unit == "msec":
            self._leave_out("in milliseconds, which is too coarse to correct: `dig -u` counts in µs")
            return None
        row = self._replies.add(
            seq=self._asked,
            rtt_ns=time * 1_000,
            resolution_ns=1_000,
            reply_len=size + _UDP_HEADER + header,
            l4_proto=UDP,
        )
        self._asked += 1
        return row

    def _error(self, why: str) -> None:
        self._cut()
        self._errors += 1
        if self._over_tcp or self._always_tcp or why == "end of file":
            self._leave_out(_DIG_TCP)
            return
        self._missing.append(self._asked)
        self._asked += 1

    def _cut(self) -> None:
        """An answer came, and where its time ought to be there is something else."""
        if self._got or self._time is not None:
            self._leave_out("an answer without all of dig's statistics (+stats)")
        self._got, self._time, self._server = False, None, 0

    def _leave_out(self, why: str) -> None:
        self.left_out[why] += 1
        self._asked += 1

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        self._cut()
        return with_unanswered(self.samples(), self._missing)


_CURL_OTHER: Final = re.compile(
    # Its progress meter, -v, and errors, all of which it prints on stderr.
    r"\s*$|\s*(?:% Total|Dload  Upload|\d+ +[0-9.kMGTP]+ +\d+ +[0-9.kMGTP]+ +\d+ )|[*<>] |[{}] \[\d+ bytes data\]|"
    r"curl: \(\d+\) |Warning: "
)
_CURL_PARALLEL: Final = re.compile(r"DL% UL%  Dled ")
_CURL_OBJECT: Final = re.compile(r'\{"')
_DECODER: Final = json.JSONDecoder(parse_float=str)
"""Decimals as they stand: a float would lose digits."""


class CurlOutput:
    """curl 7.70 and later with `-w '%{json}'` and a line's end: the time that a TCP connection took, an object each."""

    def __init__(self) -> None:
        self.stamps = CURL
        self.unknown = Unknown()
        self.left_out: Counter[str] = Counter()
        self._replies = GrowingSamples()
        self._asked = 0
        self._missing: list[int] = []

    @staticmethod
    def begins(line: str) -> bool:
        """Whether there is such an object in it."""
        return '{"' in line and '"time_connect":' in line

    def line(self, text: str) -> int | None:
        if _CURL_PARALLEL.match(text):
            raise UsageError(
                "curl -Z makes connections side by side and prints them in another order: correct it without -Z"
            )
        if not self.begins(text):
            if not _CURL_OTHER.match(text):
                self.unknown.add(text)
            return None
        # Pages, and further objects, are on the same line unless they end with one.
        row, at, strange = None, 0, False
        while found := _CURL_OBJECT.search(text, at):
            strange |= bool(text[at : found.start()].strip())
            try:
                told, at = _DECODER.raw_decode(text, found.start())
                row = self._transfer(told)
            except (ValueError, KeyError, TypeError, ArithmeticError):
                strange, at = True, max(at, found.end())
            except RecursionError:
                # No object of curl's, nor of a page's: what is behind is not worth one such failure for each brace.
                strange = True
                break
        if strange or text[at:].strip():
            self.unknown.add(text)
        return row

    def _transfer(self, told: dict[str, Any]) -> int | None:
        connected, resolved = (_seconds_ns(told[name]) for name in ("time_connect", "time_namelookup"))
        connections, failed = int(told["num_connects"]), bool(told.get("errormsg"))
        why = ""
        if int(told.get("num_redirects") or 0):
            # curl adds up the times of all requests, the look-ups of those that need no connection included.
            why = "with redirects (-L), of whose connections curl tells the sum"
        elif str(told.get("http_version")) == "3":
            why = "over QUIC: the time of its handshake is not that of a SYN"
        elif connections > 1:
            why = "with several connections, of which curl tells the sum"
        elif not failed and not (connected[0] and connections):
            why = "over a connection that was there already, so nothing was measured"
        elif failed and not resolved[0]:
            why = "that failed before there was an address, so nothing was sent"
        if why:
            self.left_out[f"a transfer {why}"] += 1
            return None
        if not connected[0]:
            self._missing.append(self._asked)
            self._asked += 1
            return None
        family = ip_address(str(told["remote_ip"])).version
        port = int(told["local_port"])
        rtt_ns = connected[0] - resolved[0]
        if rtt_ns < 0 or not 0 <= port <= 0xFFFF:
            raise ValueError(told)
        seq, self._asked = self._asked, self._asked + 1
        return self._replies.add(
            seq=seq,
            rtt_ns=rtt_ns,
            resolution_ns=connected[1],
            request_len=_SYN_LEN[family],
            reply_len=_SYN_LEN[family],
            l4_proto=TCP,
            l4_id=port,
        )

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        return with_unanswered(self.samples(), self._missing)


def _seconds_ns(told: object) -> tuple[int, int]:
    """A time of curl's and its last digit's unit, ns. Raises `ValueError`."""
    if not re.fullmatch(DECIMAL, str(told)):
        raise ValueError(told)
    return decimal_ns(str(told), 1_000_000_000)
