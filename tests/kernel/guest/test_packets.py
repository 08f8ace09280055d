"""The fields of a record equal those of a second parser of the same bytes, even for packets with false headers."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from collector.pcap.packet_key import ROOM, CapturedPackets, Views
from contracts import abi
from contracts.hooks import Hook
from contracts.records import Content
from mace.lab import Lab
from tests.kernel.guest.conftest import load, unload
from tests.kernel.guest.reader import Session, enter_netns, netns_fd
from tests.measuring import on_one_cpu

SEED = 0x4D41434520706B74
MASK = (1 << 64) - 1
MTU = 9000


# --- the second reading ---------------------------------------------------------------------------


def murmurhash(message: bytes, seed: int = SEED) -> int:
    """MurmurHash64A (Appleby, MurmurHash2.cpp of SMHasher, 2008)."""
    factor, shift = 0xC6A4A7935BD1E995, 47
    value = (seed ^ len(message) * factor) & MASK
    whole = len(message) // 8 * 8
    for (word,) in struct.iter_unpack("<Q", message[:whole]):
        mixed = word * factor & MASK
        mixed ^= mixed >> shift
        value = (value ^ mixed * factor) * factor & MASK
    if message[whole:]:
        value = (value ^ int.from_bytes(message[whole:], "little")) * factor & MASK
    value ^= value >> shift
    value = value * factor & MASK
    return value ^ value >> shift


def test_murmurhash_is_murmurhash() -> None:
    """SMHasher's verification value: the hash of the hashes of 256 messages with 256 seeds."""
    hashes = b"".join(murmurhash(bytes(range(n)), 256 - n).to_bytes(8, "little") for n in range(256))
    assert murmurhash(hashes, 0) & 0xFFFFFFFF == 0x1F0D3804


class Key(NamedTuple):
    """The words that a packet_key is made of."""

    version: int
    proto: int
    length: int
    bits: int = 0
    code: int = 0
    ident: int = 0
    second: int = 0
    payload: bytes = b""

    def hashed(self) -> int:
        first = (
            self.version << 56 | self.proto << 48 | self.bits << 40 | self.code << 32 | self.length << 16 | self.ident
        )
        return murmurhash(struct.pack("<2Q", first, self.second) + self.payload[:16].ljust(16, b"\0"))


# --- packets --------------------------------------------------------------------------------------

PAYLOAD = bytes(range(100, 140))
MAC = bytes.fromhex("020000000001")


def ether(ethertype: int, payload: bytes) -> bytes:
    return b"\xff" * 6 + MAC + struct.pack("!H", ethertype) + payload


def ipv4(
    proto: int,
    payload: bytes,
    *,
    ident: int = 77,
    offset: int = 0,
    more: bool = False,
    ttl: int = 9,
    nat: int = 0,
    **lie: int,
) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | lie.get("ihl", 5 + lie.get("options", 0)),
        0,
        lie.get("length", 20 + 4 * lie.get("options", 0) + len(payload)),
        ident,
        (0x2000 if more else 0) | offset // 8,
        9 - nat % 7,
        proto,
        1234 + nat,
        socket.inet_aton(f"198.51.100.{1 + nat}"),
        socket.inet_aton(f"203.0.113.{1 + nat}"),
    )
    return header + b"\1" * 4 * lie.get("options", 0) + payload


def ipv6(proto: int, payload: bytes, *, nat: int = 0, length: int | None = None) -> bytes:
    source, target = (socket.inet_pton(socket.AF_INET6, f"2001:db8::{n + nat:x}") for n in (1, 0x100))
    return (
        struct.pack("!IHBB", 6 << 28, len(payload) if length is None else length, proto, 64) + source + target + payload
    )


def udp(payload: bytes, *, source: int = 4000, target: int = 5000, nat: int = 0) -> bytes:
    return struct.pack("!HHHH", source + nat, target, 8 + len(payload), 99 + nat) + payload


def tcp(payload: bytes, *, options: int = 3, doff: int | None = None, nat: int = 0) -> bytes:
    words = 5 + options if doff is None else doff
    return (
        struct.pack("!HHIIBBHHH", 4001 + nat, 5001, 0xDEADBEEF, 0xCAFE0001, words << 4, 0x18, 500, 98 + nat, 0)
        + b"\1" * 4 * options
        + payload
    )


def icmp(kind: int, payload: bytes, *, code: int = 0, ident: int = 321, sequence: int = 7, nat: int = 0) -> bytes:
    return struct.pack("!BBHHH", kind, code, 55 + nat, ident + nat, sequence) + payload


def sctp(chunks: bytes) -> bytes:
    return struct.pack("!HHII", 4002, 5002, 0x01020304, 0x0A0B0C0D) + chunks


def gre(protocol: int, payload: bytes, *, flags: int = 0) -> bytes:
    options = sum(flags & bit != 0 for bit in (0x8000, 0x2000, 0x1000))
    return struct.pack("!HH", flags, protocol) + b"\5" * 4 * options + payload


def vxlan(payload: bytes, *, flags: int = 8) -> bytes:
    return udp(struct.pack("!II", flags << 24, 42 << 8) + payload, target=4789)


def geneve(protocol: int, payload: bytes, *, words: int = 0, first: int = 0, flags: int = 0) -> bytes:
    head = struct.pack("!BBHI", first | words, flags, protocol, 42 << 8)
    return udp(head + b"\7" * 4 * words + payload, target=6081)


class Case(NamedTuple):
    frame: bytes
    fields: dict[str, int]
    """What a record says, besides the key."""
    key: int


def case(frame: bytes, key: Key | int, **fields: int) -> Case:
    return Case(frame, fields, key if isinstance(key, int) else key.hashed())


def other_key(ethertype: int, content: bytes) -> int:
    return murmurhash(struct.pack("<Q", ethertype) + content[:24]) if len(content) >= 24 else 0


UDP = udp(PAYLOAD)
TCP = tcp(PAYLOAD)
V4 = {"ip_version": 4, "ip_id": 77}
K, FLOW, FRAGMENT, TUNNEL, VLAN = abi.Flag.KEY, abi.Flag.FLOW, abi.Flag.FRAGMENT, abi.Flag.TUNNEL, abi.Flag.VLAN
UDP_FIELDS = {"l4_proto": 17, "l4_src": 4000, "l4_dst": 5000}
TCP_FIELDS = {"l4_proto": 6, "l4_src": 4001, "l4_dst": 5001, "l4_seq": 0xDEADBEEF, "l4_bits": 0x18}
UDP_KEY = Key(4, 17, 68, ident=77, second=48 << 32, payload=PAYLOAD)
TCP_SECOND = 0xDEADBEEF << 32 | 0xCAFE0001
TCP_KEY = Key(4, 6, 92, bits=0x18, ident=77, second=TCP_SECOND, payload=PAYLOAD)
INNER = ether(0x0800, ipv4(6, TCP))
HOP_BY_HOP = bytes([60, 1]) + b"\1" * 14
DESTINATION = bytes([6, 0]) + b"\1" * 6
ARP = bytes.fromhex("0001080006040001") + MAC + bytes(range(14))

CASES: dict[str, Case] = {
    "udp": case(ether(0x0800, ipv4(17, UDP)), UDP_KEY, **V4, **UDP_FIELDS, flags=K | FLOW, l3_len=68),
    "udp after nat": case(
        ether(0x0800, ipv4(17, udp(PAYLOAD, nat=5), nat=5)),
        UDP_KEY,
        **V4,
        **UDP_FIELDS | {"l4_src": 4005},
        flags=K | FLOW,
        l3_len=68,
    ),
    "tcp": case(
        ether(0x0800, ipv4(6, TCP)),
        TCP_KEY,
        **V4,
        **TCP_FIELDS,
        flags=K | FLOW,
        l3_len=92,
    ),
    "tcp with ip options": case(
        ether(0x0800, ipv4(6, TCP, options=2)),
        Key(4, 6, 100, bits=0x18, ident=77, second=TCP_SECOND, payload=PAYLOAD),
        **V4,
        **TCP_FIELDS,
        flags=K | FLOW,
        l3_len=100,
    ),
    "icmp echo": case(
        ether(0x0800, ipv4(1, icmp(8, PAYLOAD))),
        Key(4, 1, 68, bits=8, ident=77, second=7, payload=PAYLOAD),
        **V4,
        l4_proto=1,
        l4_src=321,
        l4_dst=7,
        l4_bits=8,
        flags=K | FLOW,
        l3_len=68,
    ),
    "icmp echo after nat": case(
        ether(0x0800, ipv4(1, icmp(8, PAYLOAD, nat=9), nat=9)),
        Key(4, 1, 68, bits=8, ident=77, second=7, payload=PAYLOAD),
        l4_src=330,
    ),
    "icmp error": case(
        ether(0x0800, ipv4(1, icmp(3, ipv4(17, UDP), code=4))),
        Key(4, 1, 96, bits=3, code=4, ident=77, payload=ipv4(17, UDP)[:8]),
        l4_proto=1,
        l4_bits=3,
        l4_src=0,
        flags=int(K),
    ),
    "sctp": case(
        ether(0x0800, ipv4(132, sctp(PAYLOAD))),
        Key(4, 132, 72, ident=77, second=0x01020304 << 32, payload=PAYLOAD),
        l4_proto=132,
        l4_src=4002,
        l4_dst=5002,
        l4_seq=0x01020304,
        flags=K | FLOW,
    ),
    "gre": case(ether(0x0800, ipv4(47, PAYLOAD)), Key(4, 47, 60, ident=77, payload=PAYLOAD), l4_proto=47, flags=int(K)),
    "first fragment": case(
        ether(0x0800, ipv4(17, UDP, more=True)),
        Key(4, 17, 68, ident=77, second=1 << 63, payload=PAYLOAD),
        **UDP_FIELDS,
        flags=K | FLOW | FRAGMENT,
    ),
    "later fragment": case(
        ether(0x0800, ipv4(17, PAYLOAD, offset=1480)),
        Key(4, 17, 60, ident=77, second=1 << 63 | 1480, payload=PAYLOAD),
        l4_proto=17,
        l4_src=0,
        l4_seq=1480,
        flags=K | FRAGMENT,
    ),
    "vlan": case(
        ether(0x8100, struct.pack("!HH", 0x2064, 0x0800) + ipv4(17, UDP)),
        UDP_KEY,
        **V4,
        **UDP_FIELDS,
        vlan=0x2064,
        flags=K | FLOW | VLAN,
        l3_len=68,
    ),
    "two vlans": case(
        ether(0x88A8, struct.pack("!HHHH", 0x0001, 0x8100, 0x0064, 0x0800) + ipv4(17, UDP)),
        UDP_KEY,
        **UDP_FIELDS,
        vlan=0x0064,
        flags=K | FLOW | VLAN,
        l3_len=68,
    ),
    "vxlan": case(
        ether(0x0800, ipv4(17, vxlan(INNER))),
        Key(4, 6, 92, bits=0x18, ident=77, second=TCP_SECOND, payload=PAYLOAD),
        l4_proto=17,
        l4_dst=4789,
        flags=K | FLOW | TUNNEL,
    ),
    "not vxlan, only its port": case(
        ether(0x0800, ipv4(17, udp(PAYLOAD, target=4789))), UDP_KEY, l4_dst=4789, flags=K | FLOW
    ),
    "vxlan over ipv6, a tagged frame": case(
        ether(0x86DD, ipv6(17, vxlan(ether(0x8100, struct.pack("!HH", 5, 0x86DD) + ipv6(17, UDP))))),
        Key(6, 17, 48, second=48 << 32, payload=PAYLOAD),
        ip_version=6,
        l4_dst=4789,
        flags=K | FLOW | TUNNEL,
    ),
    "vxlan with arp": case(
        ether(0x0800, ipv4(17, vxlan(ether(0x0806, ARP)))), other_key(0x0806, ARP), flags=K | FLOW | TUNNEL
    ),
    "vxlan, a fragment": case(
        ether(0x0800, ipv4(17, vxlan(INNER), more=True)),
        Key(4, 17, 28 + 8 + 14 + 92, ident=77, second=1 << 63, payload=vxlan(INNER)[8:]),
        flags=K | FLOW | FRAGMENT,
    ),
    "geneve": case(
        ether(0x0800, ipv4(17, geneve(0x6558, INNER))), TCP_KEY, l4_proto=17, l4_dst=6081, flags=K | FLOW | TUNNEL
    ),
    "geneve with options": case(
        ether(0x0800, ipv4(17, geneve(0x6558, INNER, words=3))), TCP_KEY, l4_dst=6081, flags=K | FLOW | TUNNEL
    ),
    "geneve with an ip packet": case(
        ether(0x0800, ipv4(17, geneve(0x0800, ipv4(6, TCP)))), TCP_KEY, flags=K | FLOW | TUNNEL
    ),
    "geneve, a control message": case(
        ether(0x0800, ipv4(17, geneve(0x6558, INNER, flags=0x80))),
        Key(4, 17, 142, ident=77, second=122 << 32, payload=geneve(0x6558, INNER, flags=0x80)[8:]),
        flags=K | FLOW,
    ),
    "geneve of another version": case(
        ether(0x0800, ipv4(17, geneve(0x6558, INNER, first=0x40))),
        Key(4, 17, 142, ident=77, second=122 << 32, payload=geneve(0x6558, INNER, first=0x40)[8:]),
        flags=K | FLOW,
    ),
    "gre with an ip packet": case(
        ether(0x0800, ipv4(47, gre(0x0800, ipv4(6, TCP)))), TCP_KEY, l4_proto=47, l4_src=0, flags=K | TUNNEL
    ),
    "gre with checksum, key and number": case(
        ether(0x0800, ipv4(47, gre(0x86DD, ipv6(17, UDP), flags=0xB000))),
        Key(6, 17, 48, second=48 << 32, payload=PAYLOAD),
        ip_version=4,
        flags=K | TUNNEL,
    ),
    "gre with a frame": case(
        ether(0x86DD, ipv6(47, gre(0x6558, INNER, flags=0x2000))), TCP_KEY, ip_version=6, flags=K | TUNNEL
    ),
    "gre of another version": case(
        ether(0x0800, ipv4(47, gre(0x0800, ipv4(6, TCP), flags=0x2001))),
        Key(4, 47, 120, ident=77, payload=gre(0x0800, ipv4(6, TCP), flags=0x2001)),
        flags=int(K),
    ),
    "gre of a mirror": case(
        ether(0x0800, ipv4(47, gre(0x88BE, bytes(8) + INNER, flags=0x1000))),
        Key(4, 47, 142, ident=77, payload=gre(0x88BE, bytes(8), flags=0x1000)),
        flags=int(K),
    ),
    "ip in ip": case(
        ether(0x0800, ipv4(4, ipv4(6, TCP), ident=5)), TCP_KEY, l4_proto=4, ip_id=5, l4_src=0, flags=K | TUNNEL
    ),
    "ipv6 in ip": case(
        ether(0x0800, ipv4(41, ipv6(17, UDP))),
        Key(6, 17, 48, second=48 << 32, payload=PAYLOAD),
        l4_proto=41,
        ip_version=4,
        flags=K | TUNNEL,
    ),
    "ip in ipv6 behind an option": case(
        ether(0x86DD, ipv6(60, bytes([4, 0, 4, 1, 4, 1, 1, 0]) + ipv4(6, TCP))),
        TCP_KEY,
        ip_version=6,
        l4_proto=4,
        flags=K | TUNNEL,
    ),
    "ip in ip, a fragment": case(
        ether(0x0800, ipv4(4, ipv4(6, TCP), more=True)),
        Key(4, 4, 112, ident=77, second=1 << 63, payload=ipv4(6, TCP)),
        flags=K | FRAGMENT,
    ),
    "ip in ip, not an ip packet": case(
        ether(0x0800, ipv4(4, PAYLOAD)), Key(4, 4, 60, ident=77, payload=PAYLOAD), flags=int(K)
    ),
    "a tunnel in a tunnel": case(
        ether(0x0800, ipv4(4, ipv4(4, ipv4(6, TCP), ident=6))),
        Key(4, 4, 112, ident=6, payload=ipv4(6, TCP)),
        flags=K | TUNNEL,
    ),
    "ipv6 udp": case(
        ether(0x86DD, ipv6(17, UDP)),
        Key(6, 17, 48, second=48 << 32, payload=PAYLOAD),
        ip_version=6,
        ip_id=0,
        **UDP_FIELDS,
        flags=K | FLOW,
        l3_len=88,
    ),
    "ipv6 udp elsewhere": case(
        ether(0x86DD, ipv6(17, udp(PAYLOAD, nat=3), nat=3)),
        Key(6, 17, 48, second=48 << 32, payload=PAYLOAD),
        l4_src=4003,
    ),
    "ipv6 tcp behind two extension headers": case(
        ether(0x86DD, ipv6(0, HOP_BY_HOP + DESTINATION + TCP)),
        Key(6, 6, 96, bits=0x18, second=TCP_SECOND, payload=PAYLOAD),
        ip_version=6,
        **TCP_FIELDS,
        flags=K | FLOW,
    ),
    "ipv6 later fragment": case(
        ether(0x86DD, ipv6(44, struct.pack("!BBHI", 17, 0, 1448 | 1, 0x12345678) + PAYLOAD)),
        Key(6, 17, 48, ident=0x5678, second=1 << 63 | 1448, payload=PAYLOAD),
        l4_proto=17,
        l4_seq=1448,
        ip_id=0,
        flags=K | FRAGMENT,
    ),
    "icmpv6 echo": case(
        ether(0x86DD, ipv6(58, icmp(128, PAYLOAD))),
        Key(6, 58, 48, bits=128, second=7, payload=PAYLOAD),
        l4_proto=58,
        l4_src=321,
        l4_dst=7,
        flags=K | FLOW,
    ),
    "neighbour solicitation": case(
        ether(0x86DD, ipv6(58, icmp(135, PAYLOAD, ident=0, sequence=0))),
        Key(6, 58, 48, bits=135, payload=PAYLOAD[:8]),
        l4_proto=58,
        l4_bits=135,
        l4_dst=0,
        flags=int(K),
    ),
    "short payload, padded": case(
        ether(0x0800, ipv4(17, udp(b"xyz")) + b"noise" * 4),
        Key(4, 17, 31, ident=77, second=11 << 32, payload=b"xyz"),
        **UDP_FIELDS,
    ),
    "arp": case(ether(0x0806, ARP), other_key(0x0806, ARP), ip_version=0, l4_proto=0, flags=int(K), l3_len=28),
    "unknown ethertype": case(ether(0x88B5, PAYLOAD), other_key(0x88B5, PAYLOAD), ip_version=0, flags=int(K)),
    # The headers are in pages of their own, not in the linear part: packet(7) sends so what is longer than a page.
    "not linear": case(
        ether(0x0800, ipv4(17, udp(PAYLOAD * 200))),
        Key(4, 17, 8028, ident=77, second=8008 << 32, payload=PAYLOAD),
        **V4,
        **UDP_FIELDS,
        flags=K | FLOW,
        l3_len=8028,
    ),
    "ip header longer than the packet": case(
        ether(0x0800, ipv4(17, UDP[:8], ihl=15)), Key(4, 17, 28, ident=77), ip_version=4, l4_proto=17, flags=int(K)
    ),
    "ip header too short": case(
        ether(0x0800, ipv4(17, UDP, ihl=4)), other_key(0x0800, ipv4(17, UDP, ihl=4)), ip_version=0, flags=int(K)
    ),
    "ipv6 called ipv4": case(ether(0x0800, ipv6(17, UDP)), other_key(0x0800, ipv6(17, UDP)), ip_version=0),
    "not linear, and a tunnel": case(
        ether(0x0800, ipv4(17, vxlan(ether(0x0800, ipv4(17, udp(PAYLOAD * 200)))))),
        Key(4, 17, 8028, ident=77, second=8008 << 32, payload=PAYLOAD),
        flags=K | FLOW | TUNNEL,
    ),
    "length that lies upwards": case(
        ether(0x0800, ipv4(17, udp(b"xyz"), length=60_000)),
        Key(4, 17, 60_000, ident=77, second=11 << 32),
        ip_version=4,
        l3_len=31,
    ),
    "length that lies downwards": case(
        ether(0x0800, ipv4(17, UDP, length=5)), Key(4, 17, 5, ident=77, second=48 << 32), ip_version=4, l3_len=68
    ),
    "tcp data offset of nothing": case(
        ether(0x0800, ipv4(6, tcp(PAYLOAD, options=0, doff=0))),
        Key(4, 6, 80, bits=0x18, ident=77, second=TCP_SECOND, payload=tcp(PAYLOAD, options=0, doff=0)),
        **TCP_FIELDS,
    ),
    "more extension headers than anybody has": case(
        ether(0x86DD, ipv6(60, bytes([60, 0, 1, 4, 0, 0, 0, 0]) * 100 + DESTINATION + TCP)),
        Key(6, 60, 880, payload=bytes([60, 0, 1, 4, 0, 0, 0, 0]) * 2),
        ip_version=6,
        l4_proto=60,
    ),
    "extension header cut off": case(
        ether(0x86DD, ipv6(0, b"\x06")), Key(6, 0, 1), ip_version=6, l4_proto=0, flags=int(K)
    ),
    "vxlan with nothing inside": case(
        ether(0x0800, ipv4(17, udp(struct.pack("!II", 0x08000000, 42 << 8), target=4789))),
        Key(4, 17, 36, ident=77, second=16 << 32, payload=struct.pack("!II", 0x08000000, 42 << 8)),
        flags=K | FLOW,
    ),
}


# --- the wire -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[socket.socket, list[int]]]:
    """A packet socket on one end of a veth pair, and descriptors of the namespaces of both ends."""
    with contextlib.ExitStack() as stack:
        for end in ("mace-a", "mace-b"):
            subprocess.run(["ip", "netns", "add", end], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", end], check=True)
        subprocess.run(
            f"ip -n mace-a link add wire-a mtu {MTU} type veth peer name wire-b mtu {MTU} netns mace-b".split(),
            check=True,
        )
        fds = [netns_fd("mace-a"), netns_fd("mace-b")]
        for fd in fds:
            stack.callback(os.close, fd)
        for end, device in (("mace-a", "wire-a"), ("mace-b", "wire-b")):
            # Nobody but we is to send anything.
            quiet = f"net.ipv6.conf.{device}.disable_ipv6=1"
            subprocess.run(["nsenter", f"--net=/run/netns/{end}", "sysctl", "-qw", quiet], check=True)
            subprocess.run(["ip", "-n", end, "link", "set", device, "up"], check=True)
        made: list[socket.socket] = []

        def make() -> None:
            enter_netns(fds[0])
            made.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))  # it stays in its namespace
            made[0].bind(("wire-a", 0))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        stack.callback(made[0].close)
        yield made[0], fds


def sent(wire: tuple[socket.socket, list[int]], frames: list[bytes]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Records of the frames, in order: as they are queued, and as they are received."""
    sender, fds = wire
    # On one CPU, since frames sent on two may overtake one another in their backlogs.
    with Session() as session, on_one_cpu():
        session.setup(netns_fds=fds, subbufs=256).start()
        for frame in frames:
            sender.send(frame)
        session.stop()
        records = np.sort(session.read(), order="ts_ns")
        assert session.stats()["lost"].sum() == 0
    return records[records["hook"] == Hook.NET_DEV_QUEUE], records[records["hook"] == Hook.NETIF_RECEIVE_SKB]


@pytest.fixture(scope="module")
def all_cases(wire: tuple[socket.socket, list[int]]) -> dict[str, list[Any]]:
    load()
    try:
        queued, received = sent(wire, [each.frame for each in CASES.values()])
    finally:
        unload()
    assert len(queued) == len(received) == len(CASES)
    return {name: [queued[at], received[at]] for at, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_a_record_says_what_the_packet_says(all_cases: dict[str, list[Any]], name: str) -> None:
    expected = CASES[name]
    for record in all_cases[name]:
        told = {field: int(record[field]) for field in expected.fields}
        told["flags"] = told.get("flags", 0) & ~int(abi.Flag.CLONED)
        assert told == {"flags": 0, **{field: int(value) for field, value in expected.fields.items()}}
        assert f"{record['packet_key']:016x}" == f"{expected.key:016x}"


def read_of_captures(frames: list[bytes]) -> Content:
    """What the reader of packet captures says of Ethernet frames."""
    raw, starts = bytearray(), []
    for frame in frames:
        starts.append(len(raw) + 14)
        raw += frame
    length = np.array([len(frame) - 14 for frame in frames], np.int64)
    protocol = np.array([int.from_bytes(frame[12:14], "big") for frame in frames], np.int64)
    views = Views(np.frombuffer(bytes(raw) + bytes(ROOM), np.uint8))
    return CapturedPackets(views, np.array(starts, np.int64), length, length, protocol).content()


READ = ("packet_key", "l4_src", "l4_dst", "l4_seq", "ip_id", "ip_version", "l4_proto", "l4_bits")
LINK_FLAGS = abi.Flag.VLAN | abi.Flag.CLONED


def test_every_cut_and_every_flip_does_no_harm(wire: tuple[socket.socket, list[int]]) -> None:
    random = np.random.default_rng(20)
    frames = []
    for each in CASES.values():
        frame = each.frame[:200]
        frames += [frame[:length] for length in range(14, len(frame), 3)]
        for _ in range(20):
            flipped = np.frombuffer(frame, np.uint8).copy()
            flipped[random.integers(12, len(flipped), 3)] ^= random.integers(1, 256, 3).astype(np.uint8)
            frames.append(flipped.tobytes())
    load()
    try:
        queued, received = sent(wire, frames)
    finally:
        unload()
    assert len(queued) == len(frames)
    # What the receiver's Ethernet header does not show to be for anyone is received all the same.
    assert len(received) == len(frames)
    # The same bytes, read at both ends of the wire.
    assert np.array_equal(queued["packet_key"], received["packet_key"])
    assert np.array_equal(queued["l3_len"], received["l3_len"])
    # And by captures' reader, which is another program.
    captured = read_of_captures(frames)
    for field in READ:
        differ = np.flatnonzero(queued[field] != getattr(captured, field))
        assert not len(differ), f"{field} of {frames[differ[0]].hex()}: {queued[differ[0]]}"
    assert np.array_equal(queued["flags"] & ~np.uint8(LINK_FLAGS), captured.flags)


CONTENT = ("packet_key", "l4_src", "l4_dst", "l4_seq", "ip_id", "ip_version", "l4_proto", "l4_bits", "l3_len", "flags")


def test_a_byte_makes_the_same_difference_beside_the_packet_that_was_read_before(
    wire: tuple[socket.socket, list[int]],
) -> None:
    """What was read is recognised by comparing bytes; which bytes those are must not change what a record says."""
    others = [CASES["gre"].frame, CASES["icmp error"].frame]
    frames: list[bytes] = []
    changed = 0
    for name in (
        "udp",
        "tcp",
        "icmp echo",
        "sctp",
        "first fragment",
        "ipv6 udp",
        "icmpv6 echo",
        "neighbour solicitation",
        "vxlan",
        "geneve with options",
        "gre with checksum, key and number",
        "ip in ipv6 behind an option",
    ):
        frame = CASES[name].frame
        for at in range(14, min(len(frame), 14 + 140)):
            other = bytearray(frame)
            other[at] ^= 0x11
            frames += [frame, bytes(other), *others, bytes(other)]
            changed += 1
    load()
    try:
        for records in sent(wire, frames):
            seen = records[list(CONTENT)].reshape(changed, 2 + len(others) + 1)
            assert (seen[:, 1] == seen[:, -1]).all()
            assert 0 < (seen["packet_key"][:, 0] == seen["packet_key"][:, 1]).sum() < changed
    finally:
        unload()


def test_payload_in_pages_is_read(lab: Lab) -> None:
    """TCP's, whose buffers hold headers only: beside what a packet socket of the receiver's sees."""
    fd = netns_fd(lab.netns_path("remote").name)
    seen: list[bytes] = []
    ready, done = threading.Event(), threading.Event()

    def look() -> None:
        enter_netns(fd)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as packets:
            packets.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: none is lost
            packets.settimeout(0.2)
            ready.set()
            while True:
                try:
                    frame, address = packets.recvfrom(1 << 17)
                except TimeoutError:
                    if done.is_set():
                        return
                    continue
                if address[2] != socket.PACKET_OUTGOING and address[0] != "lo":
                    seen.append(frame)

    looking = threading.Thread(target=look)
    load()
    try:
        with Session() as session:
            session.setup(netns_fds=[fd], hooks=[Hook.NETIF_RECEIVE_SKB], l4_protos=[6], subbufs=256).start()
            looking.start()
            assert ready.wait(10)
            for family in (4, 6):
                lab.tcp("c1", size=1_000_000, family=family)
            session.stop()
            records = session.read()
    finally:
        done.set()
        looking.join()
        os.close(fd)
        unload()
    captured = read_of_captures(seen)
    mine = captured.l4_proto == 6
    assert records["gso_segs"].max() > 1
    assert mine.sum() > 30
    assert sorted(records["packet_key"].tolist()) == sorted(captured.packet_key[mine].tolist())
