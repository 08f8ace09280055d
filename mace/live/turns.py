"""Chooses the host whose message is processed next, so that no host can take all of the time.

Messages wait by host, and the hosts take turns. A turn is an amount of time; a host that has used more (one message can
take a second) waits for as many rounds of the others. A host therefore delays another by no more than the one message
that is being processed. The waiting messages are bounded in all, and for each host to a share of that; a message beyond
a bound is dropped and requested again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

TURN_S: Final = 0.01
"""Length of a host's turn. Processing a message with a second's records takes a few milliseconds."""
SHARE: Final = 8
"""One host may have one in `SHARE` of the messages and bytes that may wait."""

_REMEMBERED: Final = 1000
"""Number of hosts without waiting messages whose used time is remembered."""

_Message = TypeVar("_Message")


class Turns(Generic[_Message]):
    """The waiting messages of all hosts."""

    def __init__(self, most_messages: int, most_bytes: int) -> None:
        self._most = (most_messages, most_bytes)
        self._waiting: dict[str, deque[tuple[_Message, int]]] = {}
        self._bytes: dict[str, int] = {}
        self._ring: deque[str] = deque()
        """Hosts that have messages; the first one has its turn."""
        self._left_s: dict[str, float] = {}
        """Time left of each host's turn; negative for a host that has used more than its turn."""
        self._messages = self._total = 0
        self.let_fall = 0
        """Number of messages dropped because there was no room."""

    def __len__(self) -> int:
        return self._messages

    @property
    def is_full(self) -> bool:
        """Whether there is no room for a message of any host."""
        return self._messages >= self._most[0] or self._total >= self._most[1]

    def put(self, host: str, message: _Message, size: int) -> None:
        """Queue a message of `size` bytes; drop it if the host's share is full."""
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
        """Remove and return the next message and its host; None if only hosts that `is_held` excludes have messages."""
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
        """Subtract the processing time of a host's message from its turn."""
        if not self._ring:
            self._left_s.clear()  # no other host has waited
            return
        self._left_s[host] = self._left_s.get(host, TURN_S) - seconds
        if len(self._left_s) > 2 * len(self._ring) + _REMEMBERED:
            self._left_s = {host: left_s for host, left_s in self._left_s.items() if host in self._waiting}
