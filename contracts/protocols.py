"""IP protocol numbers and their names (IANA, Assigned Internet Protocol Numbers)."""

from __future__ import annotations

from typing import Final

ICMP: Final = 1
IGMP: Final = 2
TCP: Final = 6
UDP: Final = 17
GRE: Final = 47
ESP: Final = 50
ICMPV6: Final = 58
SCTP: Final = 132
UDPLITE: Final = 136

PROTOCOLS: Final = {
    "icmp": ICMP,
    "igmp": IGMP,
    "tcp": TCP,
    "udp": UDP,
    "gre": GRE,
    "esp": ESP,
    "icmpv6": ICMPV6,
    "sctp": SCTP,
}
"""Protocols with a name in options, configuration and tools' output; all others are given by number."""
ANSWERED: Final = {name: PROTOCOLS[name] for name in ("icmp", "tcp", "udp", "icmpv6")}
"""Protocols whose round trips are corrected, by their names in tools' output and flow selections."""
