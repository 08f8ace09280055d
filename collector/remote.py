"""A host's stream as it arrives over a broker: decides which frames are new, duplicates, or preceded by missing ones.

This module has no connection and reads no clock. Its state can be pickled, so that a restarted ingest continues with
the next frame.
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
from contracts.wire import Decoder, End, FrameKind, Head, WireItem, parse_head

_EARLIEST_UTC_NS: Final = 946_684_800_000_000_000
"""The year 2000."""
_LONGEST_NS: Final = 10 * 366 * 86_400 * 1_000_000_000
"""Largest distance of a record from the header's clock pair: ten years."""
AHEAD_NS: Final = 86_400 * 1_000_000_000
"""How far a host's clock may be ahead of this machine's: a day, which covers mistaken time zones. In a store of bounded
size, rows from further ahead would displace the rows of all hosts, and would never become the oldest themselves."""
MAX_BYTES: Final = {
    FrameKind.HEADER: 64 << 10,
    FrameKind.TOPOLOGY: 2 << 20,
    FrameKind.PROGRESS: 1 << 10,
    FrameKind.END: 1 << 10,
}
"""Largest decompressed payload of a host's message, by kind. A device takes some 200 bytes: ten thousand devices. JSON
takes 26 times its size while it is parsed."""
MAX_RECORDS: Final = 1 << 17
"""Largest number of records in a host's message; `mace run` publishes at most half as many. The batch of a capture may
have eight times as many, which can be seconds of work."""
MAX_TEXT: Final = 1 << 10
"""Largest number of characters in a device's names."""
MAX_SIGHTINGS: Final = 1 << 16
"""Largest number of sightings in a host's stream: a month of a hundred new containers an hour."""
_WIDEST_NS: Final = AHEAD_NS
"""Longest time from the first to the last record of a message: in a store each hour is a file of its own."""
_FORMER: Final = 8
"""Earlier streams of a host that are remembered, for frames sent again because their acknowledgement was lost."""


class Arrival(Enum):
    """Relation of a frame to its host's stream."""

    NEW = "new"
    """The next frame of the stream."""
    BEGIN = "begin"
    """The HEADER of a new stream."""
    KNOWN = "known"
    """A frame that has arrived before."""
    GAP = "gap"
    """Frames before this one are missing, and the host still has them."""
    UNKNOWN = "unknown"
    """A frame of a stream whose HEADER never arrived."""


@dataclass(slots=True)
class Counts:
    """Counts of the messages of one host, or of a whole ingest."""

    frames: int = 0
    records: int = 0
    duplicates: int = 0
    """Messages that had arrived before."""
    gaps: int = 0
    """Gaps left by frames that the host had discarded."""
    missing: int = 0
    """Records in these gaps."""
    repeats: int = 0
    """Times that the ingest requested missing frames again."""
    refused: int = 0
    """Messages that are no frame, are a frame of another host, or are refused for their content."""
    let_fall: int = 0
    """Messages dropped because their host had used up its share of the queue; the ingest requests them again."""
    given_up: int = 0
    """Runs that were ended because no further frame of them could be used."""
    set_aside: int = 0
    """Entries of the journal that could not be processed again."""


class HostStream:
    """The successive streams of one host. `host` is the host in the topic."""

    def __init__(self, host: str) -> None:
        self.host: Final = host
        self.tag: int | None = None
        """Tag of the current stream; None before the first."""
        self.header: StreamHeader | None = None
        self._decoder = Decoder(gaps=True)
        self._former: dict[int, int] = {}

    @property
    def next(self) -> int:
        """Number of the frame expected next."""
        return self._decoder.sequence

    def count_missing(self) -> int:
        """Records of the stream known to be in missing frames."""
        return self._decoder.missing

    @property
    def ended(self) -> bool:
        """Whether the stream's END has arrived."""
        return self._decoder.end is not None

    def next_of(self, tag: int) -> int:
        """Return the number of the frame expected next of a stream; 0 for an unknown stream."""
        return self.next if tag == self.tag else self._former.get(tag, 0)

    def judge(self, head: Head, oldest: int) -> Arrival:
        """Return what a frame is to the stream, by its head. `oldest`: number of the oldest frame that the host has."""
        if head.stream != self.tag:
            if head.stream in self._former:
                return Arrival.KNOWN
            return Arrival.BEGIN if head.message is FrameKind.HEADER else Arrival.UNKNOWN
        if head.sequence < self.next or self.ended:
            return Arrival.KNOWN
        return Arrival.GAP if head.sequence > self.next and oldest <= self.next else Arrival.NEW

    def look(self, frame: bytes, now_utc_ns: int | None = None) -> StreamHeader:
        """Decode a HEADER without taking it; raises `WireError` if it is refused.

        Refused are other frames, HEADERs of another host, and clocks out of range or, with `now_utc_ns` (this machine's
        clock), further ahead than `AHEAD_NS`.
        """
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
        """Begin a new stream with its HEADER; raises `WireError` like `look`, and then continues the current stream."""
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
        """Return the item of the next frame, None for the END; raises `WireError` and then changes nothing.

        `now_utc_ns` is this machine's clock; None accepts any time, for a frame that was accepted before.
        """
        _check_size(parse_head(frame))
        message = self._decoder.frame(frame, lambda decoded: self._check(decoded, now_utc_ns))
        assert not isinstance(message, StreamHeader)
        return None if isinstance(message, End) else message

    def _check(self, message: WireItem, now_utc_ns: int | None) -> None:
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
            # The decoder's markers at a gap have the time of the record before the gap.
            ts = message.ts_ns[message.hook != Hook.LOST]
            if len(ts) and ts[-1] - ts[0] > _WIDEST_NS:
                raise WireError(f"a message of records over {int(ts[-1] - ts[0]) // 3_600_000_000_000} hours")


def _check_size(head: Head) -> None:
    """Raise `WireError` for a frame whose payload would be too large once decompressed."""
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
    """Return the first and the last time in an item; none for an empty batch."""
    if isinstance(item, Batch):
        return (int(item.ts_ns[0]), int(item.ts_ns[-1])) if len(item) else ()
    return (item.upto_ns,) if isinstance(item, Progress) else (item.from_ns,)
