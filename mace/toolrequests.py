"""Reading what request and response tools print: dig over UDP, and the connect times of curl."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from ipaddress import ip_address
from typing import Any, Final

from correlator.samples import Samples
from correlator.stamps import CURL, DIG
from mace.errors import UsageError
from mace.schema import NOT_TOLD
from mace.toolsamples import IP_HEADER, TCP, UDP, Replies, Unknown, decimal_ns

_UDP_HEADER: Final = 8
_DIG_BEGINS: Final = re.compile(r"; <<>> DiG \S+ <<>> ")
_DIG_TIME: Final = re.compile(r";; Query time: (\d+) ([mu]sec)$")
_DIG_SERVER: Final = re.compile(r";; SERVER: (?P<address>[^#\s]+)#\d+\(.*?\)(?: \((?P<over>\w+)\))?$")
_DIG_SIZE: Final = re.compile(r";; MSG SIZE\s+rcvd: (\d+)$")
_DIG_NONE: Final = re.compile(r";; (?:communications error to \S+: timed out|no servers could be reached)")
_DIG_OTHER: Final = re.compile(r"$|;|[^;\s]\S*\s+\d+\s+[A-Z]+\s+[A-Z0-9]+\s")
_SYN_LEN: Final = {4: 60, 6: 80}
"""Of Linux's SYN and SYN-ACK: 20 bytes of header and as many of options (MSS, SACK, time stamps, window scale)."""


class DigOutput:
    """dig 9 over UDP, with `-u`. Of each response: `Query time`, `SERVER` and `MSG SIZE`; records are passed over."""

    def __init__(self) -> None:
        self.stamps = DIG
        self.unknown = Unknown()
        self._replies = Replies()
        self._rtt_ns = NOT_TOLD
        self._header = 0
        """Bytes of the IP header of the server's family."""
        self._asked = 0
        self._missing: list[int] = []

    @staticmethod
    def begins(line: str) -> bool:
        """Whether dig prints such a first line."""
        return bool(_DIG_BEGINS.match(line))

    def line(self, text: str) -> int | None:
        if time := _DIG_TIME.match(text):
            if time[2] == "msec":
                raise UsageError("dig counted in milliseconds, which is too coarse to correct; `dig -u` counts in µs")
            self._rtt_ns = int(time[1]) * 1_000
        elif server := _DIG_SERVER.match(text):
            if server["over"] not in (None, "UDP"):
                raise UsageError(f"dig asked over {server['over']}; what it measures can be corrected over UDP alone")
            self._header = IP_HEADER[ip_address(server["address"].partition("%")[0]).version]
        elif size := _DIG_SIZE.match(text):
            return self._reply(int(size[1]), text)
        elif _DIG_NONE.match(text):
            if "timed out" in text:
                self._missing.append(self._asked)
                self._asked += 1
        elif not _DIG_OTHER.match(text):
            self.unknown.add(text)
        return None

    def _reply(self, size: int, text: str) -> int | None:
        if self._rtt_ns == NOT_TOLD or not self._header:
            self.unknown.add(text)
            return None
        row = self._replies.add(
            seq=self._asked,
            rtt_ns=self._rtt_ns,
            resolution_ns=1_000,
            reply_len=size + _UDP_HEADER + self._header,
            l4_proto=UDP,
        )
        self._asked += 1
        self._rtt_ns, self._header = NOT_TOLD, 0
        return row

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        return with_missing(self.samples(), self._missing)


class CurlOutput:
    """curl 7.70 and later with `-w '%{json}'` and a line's end: the time that a TCP connection took, a line each."""

    def __init__(self) -> None:
        self.stamps = CURL
        self.unknown = Unknown()
        self._replies = Replies()
        self._asked = 0
        self._missing: list[int] = []

    @staticmethod
    def begins(line: str) -> bool:
        """Whether it is such a line."""
        return line.startswith("{") and '"time_connect":' in line

    def line(self, text: str) -> int | None:
        if not text.strip():
            return None
        try:
            # Decimals as they stand: a float would lose digits.
            told = json.loads(text, parse_float=str)
            return self._connection(told)
        except (ValueError, KeyError, TypeError, InvalidOperation):
            self.unknown.add(text)
            return None

    def _connection(self, told: dict[str, Any]) -> int | None:
        connected, resolved = (str(told[name]) for name in ("time_connect", "time_namelookup"))
        if int(told["num_connects"]) == 0 and Decimal(connected) == 0 and not told.get("errormsg"):
            return None  # an old connection was used again, and nothing was measured
        seq, self._asked = self._asked, self._asked + 1
        if Decimal(connected) == 0:
            self._missing.append(seq)
            return None
        family = ip_address(str(told["remote_ip"])).version
        end_ns, unit_ns = decimal_ns(connected, 1_000_000_000)
        return self._replies.add(
            seq=seq,
            rtt_ns=end_ns - decimal_ns(resolved, 1_000_000_000)[0],
            resolution_ns=unit_ns,
            request_len=_SYN_LEN[family],
            reply_len=_SYN_LEN[family],
            l4_proto=TCP,
            l4_id=int(told["local_port"]),
        )

    def samples(self, since: int = 0) -> Samples:
        return self._replies.samples(since)

    def finish(self) -> Samples:
        return with_missing(self.samples(), self._missing)


def with_missing(replies: Samples, missing: list[int]) -> Samples:
    """The replies, then a row for each request, by number, that had none."""
    if not missing:
        return replies
    return Samples.concatenate([replies, Samples.of(len(missing), seq=missing)])
