"""Which packets waited until the kernel knew where to send them.

A packet that is routed to a neighbour whose link-layer address is not known waits for as long as an ARP exchange or a
neighbour discovery takes. That is no cost of the container's path that a host process would be spared, but it is seen
there: between the packet's reception and its way out, a request leaves by the device that it will leave by.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from contracts.arrays import Ints, Mask
from contracts.protocols import ICMPV6
from contracts.records import Batch
from correlator.identity import CODE_BITS, CODES
from correlator.lives import Lives
from correlator.numbers import QUEUE, RECEIVE_SKB

ARP_BYTES: Final = 28
"""ARP for IPv4 over Ethernet (RFC 826)."""
PADDED_BYTES: Final = 46
"""The same as it is received from a wire: least payload of an Ethernet frame (IEEE 802.3, 3.2.7)."""
ND_BYTES: Final = 72
"""IPv6 header, neighbour solicitation or advertisement, and its one option (RFC 4861, 4.3 and 4.4)."""
SOLICITATION: Final = 135
ADVERTISEMENT: Final = 136
"""ICMPv6 types."""
MOST: Final = 1 << 20
"""Requests and answers that are remembered; beyond it the oldest are forgotten, and what waited for them is like any
other."""


class Asked:
    """When requests left by which device, and when answers came in."""

    def __init__(self) -> None:
        self.dev = np.zeros(0, np.int64)
        """Sightings of requests; of answers, their complement (negative)."""
        self.ts = np.zeros(0, np.int64)
        """When, ascending."""

    def note(self, batch: Batch) -> None:
        """Remember the requests and answers among these records.

        Where the source does not read packets, what has their length is taken for one.
        """
        length = batch.l3_len
        arp = length == ARP_BYTES
        asks = (arp | (length == ND_BYTES)) & (batch.hook == QUEUE)
        if not len(self.ts) and not asks.any():
            return  # an answer to no request lets nothing go
        answer = batch.hook == RECEIVE_SKB
        arp |= answer & (length == PADDED_BYTES)
        likely = np.flatnonzero(asks | (answer & (arp | (length == ND_BYTES))))
        request, told = asks[likely], batch.content
        if told is not None:
            kind = np.where(request, SOLICITATION, ADVERTISEMENT)
            discovery = (told.l4_proto[likely] == ICMPV6) & (told.l4_bits[likely] == kind)
            truly = (arp[likely] & (told.ip_version[likely] == 0)) | discovery
            likely, request = likely[truly], request[truly]
        dev = batch.dev[likely].astype(np.int64)
        self.dev = np.append(self.dev, np.where(request, dev, ~dev))[-MOST:]
        self.ts = np.append(self.ts, batch.ts_ns[likely])[-MOST:]

    def since(self, from_ns: int) -> Asked:
        """The same of what was seen from that time on."""
        first = int(np.searchsorted(self.ts, from_ns))
        later = Asked()
        later.dev, later.ts = self.dev[first:], self.ts[first:]
        return later

    def forget(self, before_ns: int) -> None:
        """Nothing that is still to be asked about waited before that time."""
        if len(self.ts) and self.ts[0] < before_ns:
            first = int(np.searchsorted(self.ts, before_ns))
            self.dev, self.ts = self.dev[first:], self.ts[first:]
            if not (self.dev >= 0).any():
                self.dev, self.ts = self.dev[:0], self.ts[:0]

    def waited(self, lives: Lives, which: Mask) -> Mask:
        """Which of these lives were routed while the device that they were sent to asked, and had an answer."""
        found = np.zeros(len(which), np.bool_)
        if not len(self.ts):
            return found
        hook = lives.place >> CODE_BITS
        at = 1 + np.flatnonzero(
            (hook[1:] == QUEUE)
            & (hook[:-1] == RECEIVE_SKB)
            & (lives.life[1:] == lives.life[:-1])
            & which[lives.life[1:]]
        )
        dev = lives.place[at] & (CODES - 1)
        for code in sorted(set(self.dev[self.dev >= 0].tolist())):
            mine = at[dev == code]
            asked: Ints = self.ts[self.dev == code]
            answered: Ints = self.ts[self.dev == ~code]
            if not len(mine) or not len(answered):
                continue
            # The first request behind the one record, and the last answer before the other.
            request = asked[np.minimum(np.searchsorted(asked, lives.ts[mine - 1], "right"), len(asked) - 1)]
            answer = answered[np.maximum(np.searchsorted(answered, lives.ts[mine], "left") - 1, 0)]
            between = (lives.ts[mine - 1] < request) & (request < answer) & (answer < lives.ts[mine])
            found[lives.life[mine[between]]] = True
        return found
