"""What the compiled loop over records asks, once for each case that occurs (`correlator/compiled`).

A *move* leads from one place to another: can a packet go from here to there? A host has some hundred moves. A *shape*
is what a life shows of its packet's path: the hooks passed, at which devices, in which order. All lives of a shape have
the same delays between the same records; a host has a few dozen shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag
from typing import Final

import numpy as np

from contracts.hooks import Hook, Way
from correlator import content, links, neighbours
from correlator.hops import Measured, Path, measure
from correlator.identity import COPIED_BEHIND, HAS_DEVICE, WAYS, Resolver
from correlator.links import Loose
from correlator.numbers import DROP, LOST
from correlator.stages import Stage, stages


class HookBit(IntFlag):
    """What the loop knows of a hook."""

    DEVICE = 1
    """A record names the device that the packet is at."""
    RECEIVES = 2
    """The packet is received: if a life starts there, `Resolver.start` says where."""
    ENDS = 4
    """The buffer's end."""
    REASON = 8
    """The record has a drop reason, which takes the place of its length."""
    MARKER = 16
    """Not a record."""


class ShapeBit(IntFlag):
    """Bits of an answer about a shape."""

    DROPPED = 1
    UNCLEAR = 2
    TAIL = 4
    HEAD = 8


def _hook_bits(hook: int) -> int:
    return (
        (HookBit.DEVICE if HAS_DEVICE[hook] else 0)
        | (HookBit.RECEIVES if WAYS[hook] == Way.RECEIVE else 0)
        | (HookBit.ENDS if WAYS[hook] == Way.END else 0)
        | (HookBit.REASON if hook == DROP else 0)
        | (HookBit.MARKER if hook == LOST else 0)
    )


TABLES: Final = (
    bytes(map(_hook_bits, range(256))),
    content.KINDS,
    bytes(less in COPIED_BEHIND for less in range(256)),
)
"""By hook: its `HookBit`s. By a record's traits: `content.KINDS`. By the bytes that a copy to a reader is shorter than
its packet: whether it may be."""

_LOOSE: Final = {Loose.NEITHER: 0, Loose.TAIL: ShapeBit.TAIL, Loose.HEAD: ShapeBit.HEAD}
assert all(hook < 128 for hook in Hook if hook != LOST), "a code has 7 bits for the hook"


class Answers:
    """Answers the loop's questions about one stream, by its resolver."""

    def __init__(self, resolver: Resolver, entry: Callable[[int, int], int], *, with_stages: bool) -> None:
        """`entry` returns the number of a device and the inner device that it serves."""
        self._resolver, self._entry, self._with_stages = resolver, entry, with_stages
        self.measured: list[Measured] = []
        """Each shape that was asked for, by the first number of its answer."""
        self.stages: list[list[Stage]] = []
        """The stages of each of them; empty without `with_stages`."""

    def forget(self) -> None:
        """Forget all shapes, because devices have changed."""
        self.measured.clear()
        self.stages.clear()

    def judge(self, source: int, target: int) -> tuple[int, int, int, int]:
        """Return the verdict on a move (`Resolver.judge`), and between which records the key may change in it."""
        verdict, first, second = self._resolver.judge(source, target)
        return verdict, first, second, content.changes(source, target, verdict)

    def start(self, dev: int) -> int:
        """Return the device number of a sighting at which a life starts with a reception, or -1."""
        return self._resolver.start(dev)

    def passes(self, source: int, target: int) -> bool:
        """Return whether a packet passes from one device to the other inside the host."""
        return links.passes(source, target, self._resolver)

    def shape(self, codes: bytes) -> bytes:
        """Return what all lives of a shape have in common, as uint32 numbers.

        `codes` has a number for each record: device number + 2 (24 bits), hook (7), whether it is the first on its
        device (1). The answer: number of the shape, `ShapeBit`s, outcome, index of the record at the loose end, number
        of rows and of waits; of each row: index of the records at its begin and end, number of its entry,
        direction, segment, position; of each wait: the index of the record that ends it.
        """
        records = np.frombuffer(codes, np.uint32).tolist()
        path = Path(
            [code >> 1 & 0x7F for code in records],
            [(code >> 8) - 2 for code in records],
            [bool(code & 1) for code in records],
        )
        told = measure(path, self._resolver)
        loose, end = links.loose_end(path, self._resolver)
        waits = neighbours.waits(path)
        bits = _LOOSE[loose] | (told.dropped and ShapeBit.DROPPED) | (told.unclear and ShapeBit.UNCLEAR)
        answer = [len(self.measured), bits, told.outcome, end, len(told.rows), len(waits)]
        for row in told.rows:
            entry = self._entry(row.device, row.owner)
            answer += [row.begin, row.end, entry, row.direction, row.segment, row.position]
        self.measured.append(told)
        if self._with_stages:
            self.stages.append(stages(path, told, self._resolver))
        return np.array([*answer, *waits], np.uint32).tobytes()
