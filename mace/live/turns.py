"""Whose message is worked on next, where one host can send more than there is time for.

Messages wait by host. The hosts take turns; a turn is a share of time, and who has used more than that (one message can
take a second) waits for as many rounds of the others. So what a host sends delays nobody by more than the one message
that is being worked on. What waits is bounded in all, and for each host to a share of that: beyond it a message is let
fall, and asked for again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

TURN_S: Final = 0.01
"""Of a host, before the next has its turn. A message of a second's records takes a few milliseconds."""
SHARE: Final = 8
"""A host may have this part of all that may wait."""

_REMEMBERED: Final = 1000
"""Hosts of which nothing waits whose share of time is remembered."""

_Message = TypeVar("_Message")


class Turns(Generic[_Message]):
    """Messages that wait, of all hosts."""

    def __init__(self, most_messages: int, most_bytes: int) -> None:
        self._most = (most_messages, most_bytes)
        self._waiting: dict[str, deque[tuple[_Message, int]]] = {}
        self._bytes: dict[str, int] = {}
        self._ring: deque[str] = deque()
        """Hosts that have messages; the first one has its turn."""
        self._left_s: dict[str, float] = {}
        """Of the turn; below 0 for a host that has used more."""
        self._messages = self._total = 0
        self.let_fall = 0
        """Messages for which there was no room."""

    def __len__(self) -> int:
        return self._messages

    @property
    def is_full(self) -> bool:
        """Whether nobody's message has room any more."""
        return self._messages >= self._most[0] or self._total >= self._most[1]

    def put(self, host: str, message: _Message, size: int) -> None:
        """Let it wait, or fall if the host has its share of what may wait."""
        waiting = self._waiting.get(host)
        if waiting is not None and (
            len(waiting) >= max(self._most[0] // SHARE, 1) or self._bytes[host] + size > self._most[1] // SHARE
        ):
            self.let_fall += 1
            return
        if waiting is None:
            waiting = self._waiting[host] = deque()
            self._bytes[host] = 0
            self._ring.append(host)
        waiting.append((message, size))
        self._bytes[host] += size
        self._messages += 1
        self._total += size

    def take(self, is_held: Callable[[str], bool]) -> tuple[str, _Message] | None:
        """The next message and its host; None if none waits but of hosts that are held up."""
        held = 0
        while held < len(self._ring):
            host = self._ring[0]
            left_s = self._left_s.get(host, TURN_S)
            if is_held(host):
                held += 1
            elif left_s > 0:
                return host, self._pop(host)
            else:
                held = 0
                self._left_s[host] = left_s + TURN_S
            self._ring.rotate(-1)
        return None

    def _pop(self, host: str) -> _Message:
        waiting = self._waiting[host]
        message, size = waiting.popleft()
        self._messages -= 1
        self._total -= size
        self._bytes[host] -= size
        if not waiting:
            del self._waiting[host], self._bytes[host]
            self._ring.popleft()
        return message

    def charge(self, host: str, seconds: float) -> None:
        """The host's message has taken that long."""
        if not self._ring:
            self._left_s.clear()  # nobody has waited for it
            return
        self._left_s[host] = self._left_s.get(host, TURN_S) - seconds
        if len(self._left_s) > 2 * len(self._ring) + _REMEMBERED:
            self._left_s = {host: left_s for host, left_s in self._left_s.items() if host in self._waiting}
