"""Matches responses to requests, where the match is certain.

There are three rules; the first that a packet's content allows applies:

    echo    ICMP and ICMPv6 echo: matched by identifier, number and type
    ports   TCP, UDP: packets between the same two ports that take turns
    turns   only the length is known: packets of one container and length that take turns

*Taking turns* means: a conversation begins after a silence, with a request. From then on a packet in the other
direction is a response, as long as exactly one request is waiting. If two requests or none are waiting, nothing is
matched until the next silence; the same holds at the start of a stream and after lost records. A stream of data thus
has no responses, and a flood that was under way when the recording began has none unless its content identifies them:
no arrow is better than a wrong one.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from contracts.protocols import ICMP, ICMPV6
from contracts.schema import NOT_TOLD, Columns

_WAIT_NS: Final = 1_000_000_000
"""Longest time until a response. Tools wait for about a second, too."""
_SILENCE_NS: Final = 100_000_000
"""Silence after which the next packet is a request."""
_CONVERSATIONS: Final = 1 << 16
"""Largest number of conversations remembered; the least recent are forgotten."""
_ASKS: Final = {(ICMP, 8), (ICMPV6, 128)}
_ANSWERS: Final = {(ICMP, 0), (ICMPV6, 129)}


class ToldBy(IntEnum):
    """Rule by which a response was matched."""

    NOTHING = 0
    ECHO = 1
    PORTS = 2
    TURNS = 3


@dataclass(frozen=True, slots=True, eq=False)
class ExchangedPackets(Columns):
    """Packets in order of time, with the columns that `Replies` needs."""

    packet: npt.NDArray[np.uint64]
    container: npt.NDArray[np.int64]
    """A number that identifies the container; `NOT_TOLD` if the packet does not belong to exactly one container."""
    direction: npt.NDArray[np.uint8]
    begin_ns: npt.NDArray[np.int64]
    l3_len: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.bool_]
    l4_proto: npt.NDArray[np.int64]
    """IP protocol number. This column and the following ones are as at the inner device, `NOT_TOLD` if unknown."""
    near: npt.NDArray[np.int64]
    """The container's port, or the echo identifier."""
    far: npt.NDArray[np.int64]
    """The other port, or the echo number."""
    l4_bits: npt.NDArray[np.int64]
    """ICMP type."""

    _DTYPES: ClassVar[dict[str, str]] = {
        "packet": "<u8",
        "container": "<i8",
        "direction": "u1",
        "begin_ns": "<i8",
        "l3_len": "<i8",
        "dropped": "?",
        "l4_proto": "<i8",
        "near": "<i8",
        "far": "<i8",
        "l4_bits": "<i8",
    }


@dataclass(slots=True)
class _Conversation:
    """State of one conversation."""

    asks: int
    """Direction of the requests; 0 if unknown."""
    last_ns: int
    waiting: deque[tuple[int, int]]
    """(packet, time at which it began) of requests without a response."""


class Replies:
    """Matches the responses of one stream, whose packets are given in order of time."""

    def __init__(self, began_ns: int) -> None:
        self._began_ns = began_ns
        self._gaps: list[tuple[int, int]] = []
        self._echoes: OrderedDict[tuple[int, ...], tuple[int, int, int]] = OrderedDict()
        self._turns: OrderedDict[tuple[int, ...], _Conversation] = OrderedDict()

    def lost(self, after_ns: int, upto_ns: int) -> None:
        """Note that packets between two times may be missing, after which all conversations begin anew.

        Call this before `match` gets packets from `after_ns` on.
        """
        insort(self._gaps, (after_ns, upto_ns))

    def match(self, seen: ExchangedPackets) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Return for each packet the request that it answers (0: none or unknown), and the rule (`ToldBy`)."""
        request = np.zeros(len(seen), np.uint64)
        told_by = np.zeros(len(seen), np.int64)
        columns = (getattr(seen, name).tolist() for name in ExchangedPackets._DTYPES)
        for row, (packet, container, way, begin, length, dropped, proto, near, far, bits) in enumerate(
            zip(*columns, strict=True)
        ):
            while self._gaps and self._gaps[0][0] <= begin:
                self._began_ns = max(self._began_ns, self._gaps.pop(0)[1])
                self._turns.clear()
            if container == NOT_TOLD:
                continue
            if (proto, bits) in _ASKS:
                self._echoes[container, proto, near, far] = packet, way, begin
                _trim(self._echoes)
            elif (proto, bits) in _ANSWERS:
                asked = self._echoes.pop((container, proto, near, far), None)
                if asked and asked[1] != way and begin - asked[2] <= 10 * _WAIT_NS:
                    request[row], told_by[row] = asked[0], ToldBy.ECHO
            else:
                known = proto != NOT_TOLD
                key = (container, proto, near, far) if known else (container, length)
                if found := self._turn(key, packet, way, begin, lost=dropped):
                    request[row], told_by[row] = found, ToldBy.PORTS if known else ToldBy.TURNS
        return request, told_by

    def _turn(self, key: tuple[int, ...], packet: int, way: int, begin: int, *, lost: bool) -> int:
        """Return the request that this packet answers, or 0."""
        turns = self._turns.get(key)
        if turns is None:
            turns = self._turns[key] = _Conversation(0, self._began_ns, deque())
            _trim(self._turns)
        self._turns.move_to_end(key)
        waiting = turns.waiting
        while waiting and begin - waiting[0][1] > _WAIT_NS:
            waiting.popleft()
        if not waiting and begin - turns.last_ns >= _SILENCE_NS:
            turns.asks = way
        turns.last_ns = begin
        if not turns.asks:
            return 0
        if way == turns.asks:
            if not lost:
                waiting.append((packet, begin))
            return 0
        if len(waiting) == 1:
            return waiting.popleft()[0]
        # No request waits, or several do: it is unknown which one this packet and later ones answer.
        turns.asks = 0
        waiting.clear()
        return 0


def _trim(known: OrderedDict[tuple[int, ...], Any]) -> None:
    if len(known) > _CONVERSATIONS:
        known.popitem(last=False)
