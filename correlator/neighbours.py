"""Finds packets that waited until the kernel had resolved a neighbour's address.

A packet that is routed to a neighbour with an unknown link-layer address waits for an ARP exchange or a neighbour
discovery. A host process would have the same wait, so that it is no overhead of the container's path. The wait is
visible in the records: between the packet's reception and its queueing, a request leaves by the same device, and an
answer arrives there.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.ordering import stable_order
from contracts.protocols import ICMPV6
from contracts.records import Batch
from correlator.hops import Path
from correlator.numbers import IP_RCV, QUEUE, RECEIVE_SKB

ARP_BYTES: Final = 28
"""Length of ARP for IPv4 over Ethernet (RFC 826)."""
PADDED_BYTES: Final = 46
"""Length of ARP received from a wire: the smallest payload of an Ethernet frame (IEEE 802.3, 3.2.7)."""
ND_BYTES: Final = 72
"""IPv6 header, neighbour solicitation or advertisement, and its one option (RFC 4861, 4.3 and 4.4)."""
SOLICITATION: Final = 135
ADVERTISEMENT: Final = 136
"""ICMPv6 types."""
MOST: Final = 1 << 20
"""Largest number of requests and answers remembered; beyond it the oldest are forgotten, and packets that waited for
them are not recognised."""


class Asked:
    """Times and devices of the requests that left and the answers that arrived."""

    def __init__(self) -> None:
        self.dev = np.zeros(0, np.int64)
        """Sightings of requests; of answers, their complement (negative)."""
        self.ts = np.zeros(0, np.int64)
        """Times of requests and answers, ascending, ns."""

    def note(self, batch: Batch) -> None:
        """Remember the requests and answers among these records.

        If the source does not read packets, any packet of the right length counts as one.
        """
        length = batch.l3_len
        arp = length == ARP_BYTES
        asks = (arp | (length == ND_BYTES)) & (batch.hook == QUEUE)
        if not len(self.ts) and not asks.any():
            return  # an answer without a request releases no packet
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
        """Return the requests and answers from a time on."""
        first = int(np.searchsorted(self.ts, from_ns))
        later = Asked()
        later.dev, later.ts = self.dev[first:], self.ts[first:]
        return later

    def forget(self, before_ns: int) -> None:
        """Forget the requests and answers before a time."""
        if len(self.ts) and self.ts[0] < before_ns:
            first = int(np.searchsorted(self.ts, before_ns))
            self.dev, self.ts = self.dev[first:], self.ts[first:]
            if not (self.dev >= 0).any():
                self.dev, self.ts = self.dev[:0], self.ts[:0]

    def by_device(self) -> tuple[Ints, Ints]:
        """Return the devices (as in `dev`) and times of requests and answers, ordered by device and time."""
        order = stable_order(self.dev)
        return self.dev[order], self.ts[order]


def waits(path: Path) -> list[int]:
    """Return the records of a life, by index, before which the packet may have waited: queued after it was received."""
    hooks = path.hooks
    return [i for i in range(1, len(hooks)) if hooks[i] == QUEUE and hooks[i - 1] in (RECEIVE_SKB, IP_RCV)]
