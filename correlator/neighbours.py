"""Which packets waited until the kernel knew where to send them.

A packet that is routed to a neighbour whose link-layer address is not known waits for as long as an ARP exchange or a
neighbour discovery takes. That is no cost of the container's path that a host process would be spared, but it is seen
there: between the packet's reception and its way out, a request leaves by the device that it will leave by.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from correlator.identity import CODE_BITS, CODES
from correlator.lives import Ints, Lives, Mask
from mace.hooks import Hook
from mace.records import Batch

ARP_BYTES: Final = 28
"""ARP for IPv4 over Ethernet (RFC 826)."""
SOLICITATION_BYTES: Final = 72
"""IPv6 header, neighbour solicitation, and its one option (RFC 4861, 4.3)."""
ICMPV6: Final = 58
SOLICITATION: Final = 135
"""ICMPv6 type."""
MOST: Final = 1 << 20
"""Requests that are remembered; beyond it the oldest are forgotten, and what waited for them is like any other."""


class Asked:
    """When requests left by which device."""

    def __init__(self) -> None:
        self.dev = np.zeros(0, np.int64)
        """Sightings."""
        self.ts = np.zeros(0, np.int64)
        """When, ascending."""

    def note(self, batch: Batch) -> None:
        """Remember the requests among these records.

        Where the source does not read packets, what has a request's length is taken for one: a packet too many that
        is not averaged in is better than one too few.
        """
        length, told = batch.l3_len, batch.content
        likely: npt.NDArray[np.intp] = np.flatnonzero(
            ((length == ARP_BYTES) | (length == SOLICITATION_BYTES)) & (batch.hook == Hook.NET_DEV_QUEUE)
        )
        if told is not None and len(likely):
            arp = (told.ip_version[likely] == 0) & (length[likely] == ARP_BYTES)
            solicitation = (told.l4_proto[likely] == ICMPV6) & (told.l4_bits[likely] == SOLICITATION)
            likely = likely[arp | solicitation]
        if len(likely):
            self.dev = np.append(self.dev, batch.dev[likely].astype(np.int64))[-MOST:]
            self.ts = np.append(self.ts, batch.ts_ns[likely])[-MOST:]

    def since(self, from_ns: int) -> Asked:
        """The same of requests from that time on."""
        first = int(np.searchsorted(self.ts, from_ns))
        later = Asked()
        later.dev, later.ts = self.dev[first:], self.ts[first:]
        return later

    def forget(self, before_ns: int) -> None:
        """Nothing that is still to be asked about waited before that time."""
        if len(self.ts) and self.ts[0] < before_ns:
            first = int(np.searchsorted(self.ts, before_ns))
            self.dev, self.ts = self.dev[first:], self.ts[first:]

    def waited(self, lives: Lives, which: Mask) -> Mask:
        """Which of these lives were routed while a request left by the device that they were sent to."""
        found = np.zeros(len(which), np.bool_)
        if not len(self.ts):
            return found
        hook = lives.place >> CODE_BITS
        at = 1 + np.flatnonzero(
            (hook[1:] == Hook.NET_DEV_QUEUE)
            & (hook[:-1] == Hook.NETIF_RECEIVE_SKB)
            & (lives.life[1:] == lives.life[:-1])
            & which[lives.life[1:]]
        )
        dev = lives.place[at] & (CODES - 1)
        for code in np.unique(self.dev).tolist():
            mine = at[dev == code]
            asked: Ints = self.ts[self.dev == code]
            between = np.searchsorted(asked, lives.ts[mine], "left") > np.searchsorted(
                asked, lives.ts[mine - 1], "right"
            )
            found[lives.life[mine[between]]] = True
        return found
