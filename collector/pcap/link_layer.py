"""Headers in front of the network layer in a captured frame: link types, tags, labels and PPPoE.

The content key covers the packet behind all of these. A packet that is tagged, labelled or in a PPPoE session at one of
two devices therefore has the same key at both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.pcap.packet_key import IPV4, IPV6, Views
from contracts.arrays import Ints, Mask

ETHERNET, RAW, SLL, SLL2 = 1, 101, 113, 276
_HEADER_BYTES: Final = {ETHERNET: 14, RAW: 0, 12: 0, 14: 0, 228: 0, 229: 0, SLL: 16, SLL2: 20}
"""Link type -> bytes of its header (tcpdump.org/linktypes.html; some systems use 12 and 14 for raw IP)."""
_NAMES: Final = {
    0: "BSD loopback",
    9: "PPP",
    105: "802.11",
    108: "OpenBSD loopback",
    127: "802.11 with radiotap",
    189: "USB",
    220: "USB",
    227: "CAN",
    239: "NFLOG",
    253: "netlink",
}
"""Names of link types that captures contain and MACE does not read."""
_OUTGOING: Final = 4
"""PACKET_OUTGOING of Linux's cooked captures."""

_VLAN: Final = (0x8100, 0x88A8, 0x9100, 0x9200, 0x9300)
"""EtherTypes of VLAN tags: 802.1Q, 802.1ad, and those that switches used for the outer tag before 802.1ad."""
_MPLS: Final = (0x8847, 0x8848)
_PPPOE: Final = 0x8864
_PPP: Final = {0x0021: IPV4, 0x0057: IPV6, 0x0281: _MPLS[0]}
"""PPP protocol number -> EtherType (RFC 1332, RFC 5072, RFC 3032, section 4.1)."""
_LAYERS_MAX: Final = 16
"""Largest number of tags and labels of a frame that are removed; the packet behind more of them is not read."""


def is_known(link: int) -> bool:
    """Return whether frames of a link type can be read."""
    return link in _HEADER_BYTES


def link_name(link: int) -> str:
    """Return a link type for a message: its number, and its name if that is known."""
    return f"link type {link} ({_NAMES[link]})" if link in _NAMES else f"link type {link}"


def ifindex_of(views: Views, link: int, start: Ints) -> Ints:
    """Return the kernel's index of each frame's device; 0 if the link type does not contain it."""
    if link != SLL2:
        return np.zeros(len(start), np.int64)
    return views.be16(start + 4) << 16 | views.be16(start + 6)


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """Packets from their network-layer header on; arrays of n."""

    start: Ints
    captured: Ints
    length: Ints
    protocol: Ints
    """EtherType; for other packets 0 or a PPP protocol number."""
    sender: npt.NDArray[np.uint64]
    """Identifier of the sender: the source's hardware address, or whether the packet was outgoing; 0 if unknown."""


def behind(views: Views, link: int, start: Ints, captured: Ints, length: Ints) -> Behind:
    """Return the packets that frames of a known link type carry.

    `captured` and `length` are the bytes of each frame that were captured, and that it had on the link.
    """
    header = _HEADER_BYTES[link]
    there = captured >= max(header, 1)
    if link == ETHERNET:
        sender, protocol = views.be64(start + 6) >> np.uint64(16), views.be16(start + 12)
    elif link == SLL:
        protocol = views.be16(start + 14)
        sender = (views.be16(start) == _OUTGOING).astype(np.uint64) + np.uint64(1)
    elif link == SLL2:
        protocol = views.be16(start)
        sender = (views.byte(start + 10) == _OUTGOING).astype(np.uint64) + np.uint64(1)
    else:
        sender, protocol = np.zeros(len(start), np.uint64), _by_version(views, start)
    kept, whole = captured - header, length - header
    if not there.all():
        protocol[~there], sender[~there], kept[~there], whole[~there] = 0, 0, 0, 0
    found = Behind(start + header, kept, whole, protocol, sender)
    wrapped = np.flatnonzero((protocol != IPV4) & (protocol != IPV6))
    if len(wrapped):
        _unwrap(views, found, wrapped)
    return found


def _by_version(views: Views, start: Ints) -> Ints:
    """Return the EtherType by the first four bits of an IP header; 0 if they are of no IP version."""
    version = views.byte(start) >> 4
    return np.where(version == 4, IPV4, np.where(version == 6, IPV6, 0))


def _unwrap(views: Views, packets: Behind, of: Ints) -> None:
    """Move the packets `of` behind tags, labels and PPPoE, in place; a packet cut off inside of one stays there."""
    for _ in range(_LAYERS_MAX):
        protocol, at, kept = packets.protocol[of], packets.start[of], packets.captured[of]
        vlan, mpls = _one_of(protocol, _VLAN), _one_of(protocol, _MPLS)
        pppoe = protocol == _PPPOE
        size = np.where(pppoe, 8, 4)
        there = (vlan | mpls | pppoe) & (kept >= size)
        if not there.any():
            return
        follows = views.be16(at + size - 2)
        follows[pppoe] = _of_ppp(follows[pppoe])
        # RFC 3032, section 2.1: the last label has bit 8 set. No field names the protocol behind it: its first bits
        # show it, as in RFC 4928.
        bottom = views.byte(at + 2) & 1 != 0
        label = np.where(bottom, _by_version(views, at + 4), protocol)
        of, size = of[there], size[there]
        packets.protocol[of] = np.where(mpls, label, follows)[there]
        packets.start[of] += size
        packets.captured[of] -= size
        packets.length[of] -= size


def _one_of(protocol: Ints, these: tuple[int, ...]) -> Mask:
    found: Mask = np.isin(protocol, these)
    return found


def _of_ppp(numbers: Ints) -> Ints:
    """Return the EtherTypes of PPP protocol numbers; numbers of no network layer stay unchanged."""
    found = numbers.copy()
    for number, protocol in _PPP.items():
        found[numbers == number] = protocol
    return found
