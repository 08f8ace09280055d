"""Which packet answers which, where that can be told.

Three ways to tell, the first that a packet's content allows:

    echo    ICMP and ICMPv6 echo: identifier, number and type say it
    ports   TCP, UDP: packets between the same two ports that take turns
    turns   nothing is known but the length: packets of one container and length that take turns

*Taking turns* means: a conversation begins after a silence, with the packet that asks; from there on packets that go
the other way answer, as long as exactly one is waiting for an answer when one comes. If two are waiting, or none,
nothing is known until the next silence; nor is it at the start of a stream and after records were lost. So a stream of
data has no answers, and a flood that was under way when the recording began has none unless its content says so: no
arrow is better than a wrong one.
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
"""An answer comes within this. Tools wait for about a second, too."""
_SILENCE_NS: Final = 100_000_000
"""Who speaks first after this long asks."""
_CONVERSATIONS: Final = 1 << 16
"""So many are remembered, those that were heard last."""
_ASKS: Final = {(ICMP, 8), (ICMPV6, 128)}
_ANSWERS: Final = {(ICMP, 0), (ICMPV6, 129)}


class ToldBy(IntEnum):
    """How a reply is known."""

    NOTHING = 0
    ECHO = 1
    PORTS = 2
    TURNS = 3


@dataclass(frozen=True, slots=True, eq=False)
class ExchangedPackets(Columns):
    """Packets in the order of time, as `Replies` looks at them."""

    packet: npt.NDArray[np.uint64]
    container: npt.NDArray[np.int64]
    """Any number that tells containers apart; `NOT_TOLD` where the packet is no container's alone."""
    direction: npt.NDArray[np.uint8]
    begin_ns: npt.NDArray[np.int64]
    l3_len: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.bool_]
    l4_proto: npt.NDArray[np.int64]
    """IP protocol number; this and what follows as it is at the inner device, `NOT_TOLD` where it is not known."""
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
    """One conversation."""

    asks: int
    """Direction of the packets that ask; 0 if it is not known."""
    last_ns: int
    waiting: deque[tuple[int, int]]
    """Packets that nothing has answered yet, and when they began."""


class Replies:
    """The conversations of one stream. Packets come in the order of time."""

    def __init__(self, began_ns: int) -> None:
        self._began_ns = began_ns
        self._gaps: list[tuple[int, int]] = []
        self._echoes: OrderedDict[tuple[int, ...], tuple[int, int, int]] = OrderedDict()
        self._turns: OrderedDict[tuple[int, ...], _Conversation] = OrderedDict()

    def lost(self, after_ns: int, upto_ns: int) -> None:
        """Packets between these times may have been missed: who asks must show itself anew.

        Told before packets from `after_ns` on come to `match`.
        """
        insort(self._gaps, (after_ns, upto_ns))

    def match(self, seen: ExchangedPackets) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """For each packet the one that it answers (0: none is known), and how that is known (`ToldBy`)."""
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
        """The packet that this one answers, or 0."""
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
        # Nobody asked, or several did and which of them is meant is not said, nor who is answered next.
        turns.asks = 0
        waiting.clear()
        return 0


def _trim(known: OrderedDict[tuple[int, ...], Any]) -> None:
    if len(known) > _CONVERSATIONS:
        known.popitem(last=False)
