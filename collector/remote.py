"""A host's stream as it comes in over a broker: which frames are new, which were there already, which are missing.

No connection and no clock in here: a message comes in, and it is said what it is. All of it can be pickled, so that an
ingest that is started again goes on with the next frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import chain
from typing import Final

from contracts.errors import AheadError, WireError
from contracts.hooks import Hook
from contracts.interfaces import Progress, StreamHeader, StreamItem
from contracts.records import Batch
from contracts.timerange import LATEST_UTC_NS, check_times
from contracts.topology import Topology
from contracts.wire import Decoded, Decoder, End, Head, Message, parse_head

_EARLIEST_UTC_NS: Final = 946_684_800_000_000_000
"""The year 2000."""
_LONGEST_NS: Final = 10 * 366 * 86_400 * 1_000_000_000
"""From the clock pair to a record: ten years."""
AHEAD_NS: Final = 86_400 * 1_000_000_000
"""A host's clock may be this much ahead of ours, a day: time zones that were mistaken are within. What is further ahead
would take the place of everybody's rows where a store is bounded, and no time that will come could make it right."""
MAX_BYTES: Final = {
    Message.HEADER: 64 << 10,
    Message.TOPOLOGY: 2 << 20,
    Message.PROGRESS: 1 << 10,
    Message.END: 1 << 10,
}
"""Payload of a host's message, unpacked, by kind. A device takes some 200 bytes: ten thousand of them. JSON takes 26
times its size while it is read."""
MAX_RECORDS: Final = 1 << 17
"""Records of a host's message; `mace run` publishes half as many at most. A capture's batch may have eight times as
many, which can be seconds of work."""
MAX_TEXT: Final = 1 << 10
"""Characters of a device's names."""
MAX_SIGHTINGS: Final = 1 << 16
"""Sightings of a host's stream: a month of a hundred new containers an hour."""
_WIDEST_NS: Final = AHEAD_NS
"""From the first to the last record of a message; each hour is a file of its own in a store."""
_FORMER: Final = 8
"""Streams of a host that are remembered, for frames that come once more because the word of their arrival was lost."""


class Verdict(Enum):
    """What a message is to the stream."""

    NEW = "new"
    """The next frame: its item is to be worked on."""
    BEGIN = "begin"
    """The HEADER of another stream than the one before."""
    KNOWN = "known"
    """It was there already."""
    GAP = "gap"
    """Frames before it are missing, and the host still has them."""
    UNKNOWN = "unknown"
    """Of a stream whose HEADER never came."""


@dataclass(slots=True)
class Counts:
    """Of one host's messages, and of one ingest's."""

    frames: int = 0
    records: int = 0
    duplicates: int = 0
    """Messages that were there already."""
    gaps: int = 0
    """Places where the host had given up frames."""
    missing: int = 0
    """Records in them."""
    repeats: int = 0
    """Times that frames were missing and asked for again."""
    refused: int = 0
    """Messages that were no frame of their topic's host, or none at all, or not one that can be taken."""
    let_fall: int = 0
    """Messages that had no room: their host had sent more than its share of what may wait. They are asked for again."""
    given_up: int = 0
    """Runs that were ended because nothing more could be made of them."""
    set_aside: int = 0
    """Entries of the journal that could not be worked through again."""


class HostStream:
    """The streams of one host, one after the other. `host` is that of the topic."""

    def __init__(self, host: str) -> None:
        self.host: Final = host
        self.tag: int | None = None
        """Of the stream that is coming in; None before the first."""
        self.header: StreamHeader | None = None
        self._decoder = Decoder(gaps=True)
        self._former: dict[int, int] = {}

    @property
    def next(self) -> int:
        """Number of the frame expected next."""
        return self._decoder.sequence

    def count_missing(self) -> int:
        """Records of the stream known to be in frames that never came."""
        return self._decoder.missing

    @property
    def ended(self) -> bool:
        """Whether END has come."""
        return self._decoder.end is not None

    def next_of(self, tag: int) -> int:
        """The frame that is expected next of a stream; 0 if it is unknown."""
        return self.next if tag == self.tag else self._former.get(tag, 0)

    def judge(self, head: Head, oldest: int) -> Verdict:
        """What a frame with this head is. `oldest` is the number of the oldest that can still come before it."""
        if head.stream != self.tag:
            if head.stream in self._former:
                return Verdict.KNOWN
            return Verdict.BEGIN if head.message is Message.HEADER else Verdict.UNKNOWN
        if head.sequence < self.next or self.ended:
            return Verdict.KNOWN
        return Verdict.GAP if head.sequence > self.next and oldest <= self.next else Verdict.NEW

    def look(self, frame: bytes, now_utc_ns: int | None = None) -> StreamHeader:
        """What a HEADER says; raises `WireError` if it is not one of this host, or by our clock its is far ahead."""
        _check_size(parse_head(frame))
        header = Decoder().frame(frame)
        if not isinstance(header, StreamHeader):
            raise WireError("a stream that does not begin with a HEADER")
        if header.host != self.host:
            raise WireError(f"a stream of host {header.host[:80]!r} on the topic of {self.host[:80]!r}")
        if len(header.run) > MAX_TEXT:
            raise WireError(f"a run whose name has {len(header.run)} characters, at most {MAX_TEXT} are allowed")
        if not _EARLIEST_UTC_NS <= header.clock.utc_ns <= LATEST_UTC_NS:
            raise WireError(f"a clock of {header.clock.utc_ns} ns UTC: is it wrong?")
        check_times(header.clock.monotonic_ns, header.clock.monotonic_ns, header.clock.offset_ns)
        _check_ahead(header.clock.utc_ns, now_utc_ns)
        return header

    def begin(self, frame: bytes, now_utc_ns: int | None = None) -> StreamHeader:
        """Take the HEADER of a new stream; raises `WireError`, and then goes on with the one before."""
        header = self.look(frame, now_utc_ns)
        if self.tag is not None:
            self._former[self.tag] = self.next
            while len(self._former) > _FORMER:
                del self._former[next(iter(self._former))]
        self._decoder = Decoder(gaps=True)
        self._decoder.frame(frame)
        self.header, self.tag = header, parse_head(frame).stream
        return header

    def take(self, frame: bytes, now_utc_ns: int | None = None) -> StreamItem | None:
        """The item of the next frame, None for the END; raises `WireError`, and then nothing has changed.

        `now_utc_ns` is our own clock; None to take what it says for right, for a frame that was taken before.
        """
        _check_size(parse_head(frame))
        message = self._decoder.frame(frame, lambda decoded: self._check(decoded, now_utc_ns))
        assert not isinstance(message, StreamHeader)
        return None if isinstance(message, End) else message

    def _check(self, message: Decoded, now_utc_ns: int | None) -> None:
        assert self.header is not None
        if isinstance(message, End | StreamHeader):
            return
        if isinstance(message, Topology):
            _check_topology(message, len(self._decoder.topology.sightings) if self._decoder.topology else 0)
        if isinstance(message, Batch) and len(message) > MAX_RECORDS + self.header.cpus:
            raise WireError(f"a message of {len(message)} records, at most {MAX_RECORDS} are allowed")
        clock, times = self.header.clock, _times(message)
        for time_ns in times:
            if abs(time_ns - clock.monotonic_ns) > _LONGEST_NS:
                raise WireError(f"a time of {time_ns} ns, years away from the clock in the HEADER")
            check_times(time_ns, time_ns, clock.offset_ns)
            _check_ahead(time_ns + clock.offset_ns, now_utc_ns)
        if isinstance(message, Batch):
            # Markers of a gap are as old as the record before it.
            ts = message.ts_ns[message.hook != Hook.LOST]
            if len(ts) and ts[-1] - ts[0] > _WIDEST_NS:
                raise WireError(f"a message of records over {int(ts[-1] - ts[0]) // 3_600_000_000_000} hours")


def _check_size(head: Head) -> None:
    """Before it is unpacked."""
    if head.raw > (most := MAX_BYTES.get(head.message, head.raw)):
        raise WireError(f"a {head.message.name} of {head.raw} bytes, an ingest takes {most}")


def _check_ahead(utc_ns: int, now_utc_ns: int | None) -> None:
    if now_utc_ns is not None and utc_ns > now_utc_ns + AHEAD_NS:
        told = datetime.fromtimestamp(utc_ns // 1_000_000_000, UTC)
        hours = (utc_ns - now_utc_ns) // 3_600_000_000_000
        raise AheadError(f"a time of {told:%Y-%m-%d %H:%M} UTC, {hours} hours ahead of our clock: is the host's wrong?")


def _check_topology(topology: Topology, known: int) -> None:
    if len(topology.sightings) > MAX_SIGHTINGS:
        raise WireError(f"a stream with {len(topology.sightings)} sightings, at most {MAX_SIGHTINGS} are allowed")
    texts = chain.from_iterable((d.name, d.kind, d.netns_name, d.container) for d in topology.devices)
    longest = max(map(len, chain(texts, (s.name for s in topology.sightings[known:]))), default=0)
    if longest > MAX_TEXT:
        raise WireError(f"a device with a name of {longest} characters, at most {MAX_TEXT} are allowed")


def _times(item: StreamItem) -> tuple[int, ...]:
    """The first and the last time in it."""
    if isinstance(item, Batch):
        return (int(item.ts_ns[0]), int(item.ts_ns[-1])) if len(item) else ()
    return (item.upto_ns,) if isinstance(item, Progress) else (item.from_ns,)
