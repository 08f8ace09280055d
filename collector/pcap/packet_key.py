"""Headers and content key of captured packets: the module's definition (kmod/mace_packet.c), in numpy.

Module and reader must compute the same key, so that their records can be compared; a test compares both with a third
implementation. All packets are decoded together, and the headers of each protocol for the packets that have it.

A capture may contain only the beginning of a packet (its snap length). If a part that the key covers was cut off, the
packet has no key: a wrong key would match a wrong packet, or none.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from contracts.arrays import U64, Bytes, Ints
from contracts.protocols import GRE, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE
from contracts.records import Content, Flag

IPV4: Final = 0x0800
IPV6: Final = 0x86DD
VLAN: Final = (0x8100, 0x88A8)
ETHERNET: Final = 0x6558
"""EtherType of an Ethernet frame inside a tunnel (transparent Ethernet bridging)."""
VXLAN_PORTS: Final = (4789, 8472)
GENEVE_PORTS: Final = (6081,)
ROOM: Final = 64
"""Bytes that the buffer must have behind the last packet, because reads may extend over the packet's end."""

_SEED: Final = 0x4D41434520706B74
"""MACE_KEY_SEED of kmod/uapi/mace_key.h."""
_PAYLOAD: Final = 16
_EXTENSIONS: Final = 6
"""MACE_EXTENSION_HEADERS_MAX."""
_IPIP, _IPV6 = 4, 41
_HOP, _ROUTING, _FRAGMENT, _AUTH, _DEST = 0, 43, 44, 51, 60


class Views:
    """Reads numbers at any byte of a buffer without copying it, by views with overlapping elements.

    A hostile packet may lead to any offset: offsets are clipped to the buffer. The caller, which knows how much of the
    packet was captured, discards values from behind its end.
    """

    def __init__(self, buffer: Bytes) -> None:
        self._last = len(buffer) - 8
        self._byte = buffer
        shape = (len(buffer) - 7,)
        self._be16: Any = np.ndarray(shape, ">u2", buffer, strides=(1,))
        self._be64: Any = np.ndarray(shape, ">u8", buffer, strides=(1,))
        self._le64: Any = np.ndarray(shape, "<u8", buffer, strides=(1,))

    def _kept(self, at: Ints) -> Ints:
        return np.minimum(at, self._last)

    def byte(self, at: Ints) -> Ints:
        return self._byte[self._kept(at)].astype(np.int64)

    def be16(self, at: Ints) -> Ints:
        found: Ints = self._be16[self._kept(at)].astype(np.int64)
        return found

    def be64(self, at: Ints) -> U64:
        found: U64 = self._be64[self._kept(at)].astype(np.uint64)
        return found

    def le64(self, at: Ints) -> U64:
        found: U64 = self._le64[self._kept(at)]
        return found


class CapturedPackets:
    """Packets in a buffer, from their network-layer header on."""

    def __init__(self, views: Views, start: Ints, captured: Ints, length: Ints, protocol: Ints) -> None:
        """Decode the headers of n packets, given as int64 arrays.

        `start`: offset of each packet; `captured` and `length`: its bytes from there on that were captured, and that it
        had; `protocol`: its EtherType. The buffer has `ROOM` bytes behind the last packet.
        """
        self._views = views
        self.start, self.captured, self.length, self.protocol = start, captured, length, protocol
        n = len(start)
        self.end = length.copy()
        """Offset behind each packet's last byte, from its start; padding of the link layer may follow."""
        self.known = np.ones(n, np.bool_)
        """Whether all parts that the key covers were captured."""
        self.version = np.zeros(n, np.int64)
        self.proto = np.zeros(n, np.int64)
        self.ip_length = np.zeros(n, np.int64)
        self.ident = np.zeros(n, np.int64)
        self.bits = np.zeros(n, np.int64)
        self.code = np.zeros(n, np.int64)
        self.fragment = np.zeros(n, np.bool_)
        self.fragment_offset = np.zeros(n, np.int64)
        self.l4_src = np.zeros(n, np.int64)
        self.l4_dst = np.zeros(n, np.int64)
        self.l4_seq = np.zeros(n, np.uint64)
        self.l4_ack = np.zeros(n, np.uint64)
        self.flow = np.zeros(n, np.bool_)
        self.payload = np.zeros((2, n), np.uint64)
        self.inner = np.zeros(n, np.int64)
        """Offset, from the start, of a packet that this one carries (VXLAN, Geneve, GRE, IP in IP); 0 without one."""
        self.inner_protocol = np.zeros(n, np.int64)
        """EtherType of the carried packet, or `ETHERNET`."""
        self._skip_tags()
        self._read_ipv4(np.flatnonzero(self.protocol == IPV4))
        self._read_ipv6(np.flatnonzero(self.protocol == IPV6))

    # --- bytes ----------------------------------------------------------------------------------

    def _byte(self, of: Ints, offset: Any) -> Ints:
        return self._views.byte(self.start[of] + offset)

    def _be16(self, of: Ints, offset: Any) -> Ints:
        return self._views.be16(self.start[of] + offset)

    def _be64(self, of: Ints, offset: Any) -> U64:
        return self._views.be64(self.start[of] + offset)

    def _has(self, of: Ints, after: Any) -> Ints:
        """Return the indices in `of` of packets with `after` captured bytes; a packet cut before that has no key."""
        after = np.broadcast_to(after, len(of))
        cut = (after > self.captured[of]) & (after <= self.length[of])
        self.known[of[cut]] = False
        return np.flatnonzero(after <= self.captured[of])

    # --- headers --------------------------------------------------------------------------------

    def _skip_tags(self) -> None:
        for _ in range(2):
            of = np.flatnonzero((self.protocol == VLAN[0]) | (self.protocol == VLAN[1]))
            of = of[self._has(of, 4)]
            if not len(of):
                return
            self.protocol = self.protocol.copy()
            self.protocol[of] = self._be16(of, 2)
            for name in ("start", "captured", "length", "end"):
                column = getattr(self, name).copy()
                column[of] += 4 if name == "start" else -4
                setattr(self, name, column)

    def _read_ipv4(self, of: Ints) -> None:
        of = of[self._has(of, 20)]
        head = self._be64(of, 0).view(np.int64)
        first = head >> 56 & 0xFF
        good = (first >> 4 == 4) & (first & 15 >= 5)
        if not good.all():
            of, head, first = of[good], head[good], first[good]
        if not len(of):
            return
        header = (first & 15) * 4
        self.version[of] = 4
        self.proto[of] = self._byte(of, 9)
        self.ident[of] = head >> 16 & 0xFFFF
        self.ip_length[of] = total = head >> 32 & 0xFFFF
        flags = head & 0xFFFF
        self.fragment[of] = flags & 0x3FFF != 0  # more fragments, or an offset
        self.fragment_offset[of] = (flags & 0x1FFF) * 8
        # A length of 0 means a TCP segment too long for the field (BIG TCP).
        self.end[of] = np.where(total > 0, total, self.length[of])
        self._read_transport(of, header)

    def _read_ipv6(self, of: Ints) -> None:
        of = of[self._has(of, 40)]
        of = of[self._byte(of, 0) >> 4 == 6]
        if not len(of):
            return
        self.version[of] = 6
        self.ip_length[of] = size = self._be16(of, 4)
        self.end[of] = np.where(size > 0, 40 + size, self.length[of])
        self.proto[of] = self._byte(of, 6)
        at = np.full(len(of), 40, np.int64)
        readable = np.ones(len(of), np.bool_)
        for _ in range(_EXTENSIONS):
            proto = self.proto[of]
            more = (
                np.isin(proto, (_HOP, _ROUTING, _FRAGMENT, _DEST, _AUTH)) & (self.fragment_offset[of] == 0) & readable
            )
            which = np.flatnonzero(more)
            if not len(which):
                break
            there = self._has(of[which], at[which] + 8)
            readable[np.setdiff1d(which, which[there])] = False
            which = which[there]
            mine, place, kind = of[which], at[which], proto[which]
            units = self._byte(mine, place + 1)
            fragment = kind == _FRAGMENT
            parts = mine[fragment]
            self.fragment[parts] = True
            self.fragment_offset[parts] = self._be16(parts, place[fragment] + 2) & 0xFFF8
            self.ident[parts] = self._be16(parts, place[fragment] + 6)
            self.proto[mine] = self._byte(mine, place)
            # Lengths: RFC 8200, section 4.3, and RFC 4302, section 2.2.
            at[which] += np.where(fragment, 8, np.where(kind == _AUTH, (units + 2) * 4, (units + 1) * 8))
        self._read_transport(of[readable], at[readable])

    def _read_transport(self, of: Ints, at: Ints) -> None:
        late = self.fragment_offset[of] > 0
        self._read_payload(of[late], at[late], _PAYLOAD)
        of, at = of[~late], at[~late]
        proto = self.proto[of]
        named = np.zeros(len(of), np.bool_)
        for protocols, read in (
            ((TCP,), self._read_tcp),
            ((UDP, UDPLITE), self._read_udp),
            ((ICMP, ICMPV6), self._read_icmp),
            ((SCTP,), self._read_sctp),
            ((_IPIP, _IPV6), self._read_ip_in_ip),
            ((GRE,), self._read_gre),
        ):
            which = np.isin(proto, protocols)
            named |= which
            if which.any():
                read(of[which], at[which])
        self._read_payload(of[~named], at[~named], _PAYLOAD)

    def _read_tcp(self, of: Ints, at: Ints) -> None:
        there = self._has(of, at + 20)
        of, at = of[there], at[there]
        self._read_ports(of, at)
        numbers, rest = self._be64(of, at + 4), self._be16(of, at + 12)
        self.l4_seq[of], self.l4_ack[of] = numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)
        self.bits[of] = rest & 0xFF
        self._read_payload(of, at + (rest >> 12) * 4, _PAYLOAD)

    def _read_udp(self, of: Ints, at: Ints) -> None:
        there = self._has(of, at + 8)
        of, at = of[there], at[there]
        self._read_ports(of, at)
        self.l4_seq[of] = self._be16(of, at + 4).astype(np.uint64)
        for ports, read in ((VXLAN_PORTS, self._read_vxlan), (GENEVE_PORTS, self._read_geneve)):
            tunnel = np.isin(self.l4_dst[of], ports)
            if tunnel.any():
                mine, place = of[tunnel], at[tunnel] + 8
                there = self._has(mine, place + 8)
                read(mine[there], place[there])
        self._read_payload(of, at + 8, _PAYLOAD)

    def _read_vxlan(self, of: Ints, at: Ints) -> None:
        # RFC 7348, section 5: only the flag "I" (the VNI is valid) may be set, and must be.
        valid = self._byte(of, at) == 0x08
        self._carry(of[valid], at[valid] + 8, ETHERNET)

    def _read_geneve(self, of: Ints, at: Ints) -> None:
        # RFC 8926, section 3.4: the first byte has the version, 0, and the length of options; no control message ("O").
        first, flags = self._byte(of, at), self._byte(of, at + 1)
        valid = (first < 0x40) & (flags & 0x80 == 0)
        of, at = of[valid], at[valid]
        self._carry(of, at + 8 + first[valid] * 4, self._be16(of, at + 2))

    def _read_gre(self, of: Ints, at: Ints) -> None:
        self._read_payload(of, at, _PAYLOAD)
        there = self._has(of, at + 4)
        of, at = of[there], at[there]
        flags = self._be16(of, at)
        # RFC 2784 and RFC 2890, section 2 each. Routing, which is obsolete, and other versions (PPTP) are not read.
        valid = flags & 0x4007 == 0
        of, at, flags = of[valid], at[valid], flags[valid]
        optional = sum((flags & bit != 0) * 4 for bit in (0x8000, 0x2000, 0x1000))  # checksum, key, sequence number
        self._carry(of, at + 4 + optional, self._be16(of, at + 2))

    def _read_ip_in_ip(self, of: Ints, at: Ints) -> None:
        self._read_payload(of, at, _PAYLOAD)
        self._carry(of, at, np.where(self.proto[of] == _IPIP, IPV4, IPV6))

    def _carry(self, of: Ints, at: Ints, protocol: Any) -> None:
        """Note that packets carry others at `at`, unless they are fragments or the carried protocol is not read."""
        protocol = np.broadcast_to(protocol, len(of))
        readable = np.isin(protocol, (IPV4, IPV6, ETHERNET)) & ~self.fragment[of]
        self.inner[of[readable]] = at[readable]
        self.inner_protocol[of[readable]] = protocol[readable]

    def _read_icmp(self, of: Ints, at: Ints) -> None:
        there = self._has(of, at + 8)
        of, at = of[there], at[there]
        kind = self._byte(of, at)
        self.bits[of], self.code[of] = kind, self._byte(of, at + 1)
        echo = np.where(self.version[of] == 4, (kind == 8) | (kind == 0), (kind == 128) | (kind == 129))
        mine, place = of[echo], at[echo]
        self.l4_src[mine], self.l4_dst[mine] = self._be16(mine, place + 4), self._be16(mine, place + 6)
        self.flow[mine] = True
        self._read_payload(mine, place + 8, _PAYLOAD)
        # An error quotes a packet, of which NAT rewrites all but the first 8 bytes.
        self._read_payload(of[~echo], at[~echo] + 8, 8)

    def _read_sctp(self, of: Ints, at: Ints) -> None:
        there = self._has(of, at + 12)
        of, at = of[there], at[there]
        self._read_ports(of, at)
        self.l4_seq[of] = self._be64(of, at + 4) >> np.uint64(32)
        self._read_payload(of, at + 12, _PAYLOAD)

    def _read_ports(self, of: Ints, at: Ints) -> None:
        self.l4_src[of], self.l4_dst[of] = self._be16(of, at), self._be16(of, at + 2)
        self.flow[of] = True

    def _read_payload(self, of: Ints, at: Ints, size: int) -> None:
        if not len(of):
            return
        size_of = np.minimum(size, self.end[of] - at)
        some = size_of > 0
        of, at, size_of = of[some], at[some], size_of[some]
        there = self._has(of, at + size_of)
        of, at, size_of = of[there], at[there], size_of[there]
        begin = self.start[of] + at
        for word in range(2):
            kept = np.clip(size_of - 8 * word, 0, 8)
            self.payload[word][of] = self._views.le64(begin + 8 * word) & _FIRST_BYTES.take(kept)

    # --- the key --------------------------------------------------------------------------------

    def keys(self) -> U64:
        """Return the content keys, uint64; 0 for a packet without a key."""
        first = (
            self.version.astype(np.uint64) << np.uint64(56)
            | self.proto.astype(np.uint64) << np.uint64(48)
            | self.bits.astype(np.uint64) << np.uint64(40)
            | self.code.astype(np.uint64) << np.uint64(32)
            | self.ip_length.astype(np.uint64) << np.uint64(16)
            | self.ident.astype(np.uint64)
        )
        second = self.l4_seq << np.uint64(32) | self.l4_ack
        icmp = (self.proto == ICMP) | (self.proto == ICMPV6)
        second = np.where(icmp, self.l4_dst.astype(np.uint64), second)
        second = np.where(self.fragment, np.uint64(1 << 63) | self.fragment_offset.astype(np.uint64), second)
        words = [first, second, self.payload[0], self.payload[1]]
        other = np.flatnonzero(self.version == 0)
        if len(other):
            there = other[self._has(other, 24)]
            words[0][there] = self.protocol[there].astype(np.uint64)
            for word in range(3):
                words[word + 1][there] = self._views.le64(self.start[there] + 8 * word)
            self.known[np.setdiff1d(other, there)] = False
        key = murmurhash(*words)
        # Key 0 means "unknown".
        key[key == 0] = 1
        key[~self.known] = 0
        carried = np.flatnonzero(self.inner)
        if len(carried):
            self._take_inner_keys(carried, key)
        return key

    def _take_inner_keys(self, of: Ints, key: U64) -> None:
        """Replace the keys of packets `of` that carry others by the carried packets' keys.

        A packet whose payload turns out to be no packet carries nothing and keeps its own key.
        """
        at, protocol = self.inner[of], self.inner_protocol[of]
        frame = protocol == ETHERNET
        begin = at + np.where(frame, 14, 0)
        captured, length = self.captured[of] - begin, self.length[of] - begin
        protocol = np.where(frame, np.where(captured >= 0, self._be16(of, at + 12), 0), protocol)
        inside = CapturedPackets(
            self._views, self.start[of] + begin, np.maximum(captured, 0), np.maximum(length, 0), protocol
        )
        # Only one layer is read: a tunnel in a tunnel is payload.
        inside.inner[:] = 0
        inner_key = inside.keys()
        is_ip = inside.version > 0
        # If the capture ends inside the carried IP header, it is unknown whether there is such a packet.
        cut = (captured < length) & np.where(is_ip, ~inside.known, inside.captured < 40)
        carries = (length >= 0) & (cut | is_ip | (frame & (inside.length >= 24)))
        self.inner[of[~carries]] = 0
        key[of[carries]] = np.where(cut, np.uint64(0), inner_key)[carries]

    def content(self) -> Content:
        """Return the packets' content with the columns of records."""
        key = self.keys()
        sequenced = np.isin(self.proto, (TCP, SCTP)) & self.flow
        flags = (
            (key != 0) * np.uint8(Flag.KEY)
            | self.fragment * np.uint8(Flag.FRAGMENT)
            | (self.inner > 0) * np.uint8(Flag.TUNNEL)
            | self.flow * np.uint8(Flag.FLOW)
        )
        return Content.of(
            len(key),
            packet_key=key,
            l4_seq=np.where(self.fragment, self.fragment_offset.astype(np.uint64), self.l4_seq * sequenced),
            l4_src=self.l4_src,
            l4_dst=self.l4_dst,
            ip_id=np.where(self.version == 4, self.ident, 0),
            ip_version=self.version,
            l4_proto=self.proto,
            l4_bits=self.bits,
            flags=flags,
        )


_FIRST_BYTES: Final = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
"""Masks of the first n bytes of a little-endian word."""

_BLOCK: Final = 1 << 13
"""Number of packets hashed at once: the hash and a word of each fit the processor's second-level cache."""
_FACTOR: Final = np.uint64(0xC6A4A7935BD1E995)
_SHIFT: Final = np.uint64(47)


def murmurhash(*words: U64) -> U64:
    """Return MurmurHash64A (uint64) of n messages, each of `len(words)` 64-bit words, with MACE's seed.

    Appleby, MurmurHash2.cpp of SMHasher (2008); `kmod/uapi/mace_key.h`.
    """
    begin = _SEED ^ 8 * len(words) * int(_FACTOR) & 0xFFFFFFFFFFFFFFFF
    out = np.full(len(words[0]), begin, np.uint64)
    for at in range(0, len(out), _BLOCK):
        hashed = out[at : at + _BLOCK]
        for each in words:
            word = each[at : at + _BLOCK] * _FACTOR
            word ^= word >> _SHIFT
            word *= _FACTOR
            hashed ^= word
            hashed *= _FACTOR
        hashed ^= hashed >> _SHIFT
        hashed *= _FACTOR
        hashed ^= hashed >> _SHIFT
    return out
