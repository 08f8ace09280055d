"""A host's stream as it comes in over a broker: which frames are new, which were there already, which are missing.

No connection and no clock in here: a message comes in, and it is said what it is. All of it can be pickled, so that an
ingest that is started again goes on with the next frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from mace.errors import WireError
from mace.interfaces import Progress, StreamHeader, StreamItem
from mace.records import Batch
from mace.wire import Decoder, End, Head, Message, parse_head

_EARLIEST_UTC_NS: Final = 946_684_800_000_000_000
"""The year 2000."""
_LATEST_UTC_NS: Final = 7_258_118_400_000_000_000
"""The year 2200; 2^63 ns are reached in 2262."""
_LONGEST_NS: Final = 10 * 366 * 86_400 * 1_000_000_000
"""From the clock pair to a record: ten years."""
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
    """Messages that were no frame of their topic's host, or none at all."""


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

    @property
    def missing(self) -> int:
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

    def look(self, frame: bytes) -> StreamHeader:
        """What a HEADER says; raises `WireError` if it is not one of this host."""
        header = Decoder().frame(frame)
        if not isinstance(header, StreamHeader):
            raise WireError("a stream that does not begin with a HEADER")
        if header.host != self.host:
            raise WireError(f"a stream of host {header.host[:80]!r} on the topic of {self.host[:80]!r}")
        if not _EARLIEST_UTC_NS <= header.clock.utc_ns <= _LATEST_UTC_NS:
            raise WireError(f"a clock of {header.clock.utc_ns} ns UTC: is it wrong?")
        return header

    def begin(self, frame: bytes) -> StreamHeader:
        """Take the HEADER of a new stream; raises `WireError`, and then goes on with the one before."""
        header = self.look(frame)
        if self.tag is not None:
            self._former[self.tag] = self.next
            while len(self._former) > _FORMER:
                del self._former[next(iter(self._former))]
        self._decoder = Decoder(gaps=True)
        self._decoder.frame(frame)
        self.header, self.tag = header, parse_head(frame).stream
        return header

    def take(self, frame: bytes) -> StreamItem | None:
        """The item of the next frame, None for the END; raises `WireError`."""
        message = self._decoder.frame(frame)
        assert not isinstance(message, StreamHeader)
        if isinstance(message, End):
            return None
        for time_ns in _times(message):
            if self.header is None or abs(time_ns - self.header.clock.monotonic_ns) > _LONGEST_NS:
                raise WireError(f"a time of {time_ns} ns, years away from the clock in the HEADER")
        return message


def _times(item: StreamItem) -> tuple[int, ...]:
    """The first and the last time in it."""
    if isinstance(item, Batch):
        return (int(item.ts_ns[0]), int(item.ts_ns[-1])) if len(item) else ()
    return (item.upto_ns,) if isinstance(item, Progress) else (item.from_ns,)
