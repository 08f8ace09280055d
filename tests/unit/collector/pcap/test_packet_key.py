"""The content key in numpy equals the module's: both are compared with the reference of the module's tests."""

import struct

import numpy as np
import pytest

from collector.pcap.packet_key import ROOM, CapturedPackets, Views, murmurhash
from contracts.records import Flag
from tests.kernel.guest.test_packets import CASES as OF_THE_MODULE
from tests.kernel.guest.test_packets import Key, ether, icmp, ipv4, ipv6, other_key, sctp, tcp, udp
from tests.kernel.guest.test_packets import murmurhash as slow_murmurhash

PAYLOAD = bytes(range(100, 140))


def read(*frames, cut=None):
    """Return the packets of Ethernet frames of which `cut` bytes were captured."""
    raw, start = bytearray(), []
    for frame in frames:
        start.append(len(raw) + 14)
        raw += frame
    length = np.array([len(frame) - 14 for frame in frames], np.int64)
    captured = length if cut is None else np.minimum(length, cut)
    protocol = np.array([int.from_bytes(frame[12:14], "big") for frame in frames], np.int64)
    views = Views(np.frombuffer(bytes(raw) + bytes(ROOM), np.uint8))
    return CapturedPackets(views, np.array(start, np.int64), captured, length, protocol)


TCP_SECOND = 0xDEADBEEF << 32 | 0xCAFE0001


def extension(kind, body):
    return bytes([kind, len(body) // 8]) + body


HOP = b"\x11\x00" + bytes(6)
CASES = {
    "udp": (ipv4(17, udp(PAYLOAD)), Key(4, 17, 68, ident=77, second=48 << 32, payload=PAYLOAD)),
    "udp of 3 bytes": (ipv4(17, udp(b"abc")), Key(4, 17, 31, ident=77, second=11 << 32, payload=b"abc")),
    "udp without payload": (ipv4(17, udp(b"")), Key(4, 17, 28, ident=77, second=8 << 32)),
    "udp behind options": (
        ipv4(17, udp(PAYLOAD), options=2),
        Key(4, 17, 76, ident=77, second=48 << 32, payload=PAYLOAD),
    ),
    "tcp": (ipv4(6, tcp(PAYLOAD)), Key(4, 6, 92, 0x18, ident=77, second=TCP_SECOND, payload=PAYLOAD)),
    "tcp of 5 bytes": (
        ipv4(6, tcp(b"12345", options=0)),
        Key(4, 6, 45, 0x18, ident=77, second=TCP_SECOND, payload=b"12345"),
    ),
    "echo": (ipv4(1, icmp(8, PAYLOAD)), Key(4, 1, 68, 8, ident=77, second=7, payload=PAYLOAD)),
    "icmp error": (
        ipv4(1, icmp(3, PAYLOAD, code=1)),
        Key(4, 1, 68, 3, 1, ident=77, payload=PAYLOAD[:8]),
    ),
    "sctp": (ipv4(132, sctp(PAYLOAD)), Key(4, 132, 72, ident=77, second=0x01020304 << 32, payload=PAYLOAD)),
    "another protocol": (ipv4(47, PAYLOAD), Key(4, 47, 60, ident=77, payload=PAYLOAD)),
    "first fragment": (
        ipv4(17, udp(PAYLOAD), more=True),
        Key(4, 17, 68, ident=77, second=1 << 63, payload=PAYLOAD),
    ),
    "last fragment": (
        ipv4(17, PAYLOAD, offset=1480),
        Key(4, 17, 60, ident=77, second=1 << 63 | 1480, payload=PAYLOAD),
    ),
    "udp over ipv6": (ipv6(17, udp(PAYLOAD)), Key(6, 17, 48, second=48 << 32, payload=PAYLOAD)),
    "echo over ipv6": (ipv6(58, icmp(128, PAYLOAD)), Key(6, 58, 48, 128, second=7, payload=PAYLOAD)),
    "behind a hop-by-hop header": (
        ipv6(0, HOP + udp(PAYLOAD)),
        Key(6, 17, 56, second=48 << 32, payload=PAYLOAD),
    ),
    "fragment of ipv6": (
        ipv6(44, struct.pack("!BBHI", 17, 0, 1480, 0xABCD1234) + PAYLOAD),
        Key(6, 17, 48, ident=0x1234, second=1 << 63 | 1480, payload=PAYLOAD),
    ),
}


def frame_of(packet, tags=0):
    version = {4: 0x0800, 6: 0x86DD}[packet[0] >> 4]
    for _ in range(tags):
        packet, version = struct.pack("!HH", 5, version) + packet, 0x8100
    return ether(version, packet)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tags", [0, 1, 2])
def test_keys_are_the_modules(name, tags):
    packet, key = CASES[name]
    assert read(frame_of(packet, tags)).keys().tolist() == [key.hashed()]
    # Padding of the link layer is not part of the packet.
    assert read(frame_of(packet, tags) + bytes(20)).keys().tolist() == [key.hashed()]


@pytest.mark.parametrize("name", OF_THE_MODULE)
def test_the_modules_cases_are_read_alike(name):
    """The frames and expected records of the module's tests in virtual machines."""
    expected = OF_THE_MODULE[name]
    content = read(expected.frame).content()
    assert [f"{key:016x}" for key in content.packet_key.tolist()] == [f"{expected.key:016x}"]
    # This reader does not see the link layer's length and tag.
    fields = {field: int(value) for field, value in expected.fields.items() if field not in ("l3_len", "vlan")}
    if "flags" in fields:
        fields["flags"] &= ~Flag.VLAN
    assert {field: int(getattr(content, field)[0]) for field in fields} == fields


@pytest.mark.parametrize("name", OF_THE_MODULE)
def test_cut_cases_get_no_wrong_key(name):
    expected = OF_THE_MODULE[name]
    cuts = np.arange(min(len(expected.frame) - 14, 250) + 1)
    assert set(read(*[expected.frame] * len(cuts), cut=cuts).keys().tolist()) <= {0, expected.key}


def test_all_of_them_at_once():
    frames = [frame_of(packet) for packet, _ in CASES.values()]
    assert read(*frames * 3).keys().tolist() == [key.hashed() for _, key in CASES.values()] * 3


def test_the_key_ignores_fields_that_nat_rewrites():
    before = [ipv4(17, udp(PAYLOAD)), ipv4(6, tcp(PAYLOAD)), ipv4(1, icmp(8, PAYLOAD)), ipv6(17, udp(PAYLOAD))]
    after = [
        ipv4(17, udp(PAYLOAD, nat=3), nat=3),
        ipv4(6, tcp(PAYLOAD, nat=3), nat=3),
        ipv4(1, icmp(8, PAYLOAD, nat=3), nat=3),
        ipv6(17, udp(PAYLOAD, nat=3), nat=3),
    ]
    keys = read(*map(frame_of, before)).keys()
    assert keys.tolist() == read(*map(frame_of, after)).keys().tolist()
    assert len(set(keys.tolist())) == 4


def test_not_ip():
    assert read(ether(0x0806, PAYLOAD)).keys().tolist() == [other_key(0x0806, PAYLOAD)]
    assert read(ether(0x0806, PAYLOAD[:20])).keys().tolist() == [0]


def test_the_key_of_vxlan_is_the_inner_packets():
    inner = ether(0x0800, ipv4(6, tcp(PAYLOAD)))
    frame = frame_of(ipv4(17, udp(struct.pack("!II", 0x08000000, 5 << 8) + inner, target=4789)))
    content = read(frame).content()
    assert content.packet_key.tolist() == [CASES["tcp"][1].hashed()]
    assert content.flags.tolist() == [Flag.KEY | Flag.TUNNEL | Flag.FLOW]
    assert content.l4_dst.tolist() == [4789]


@pytest.mark.parametrize("name", CASES)
def test_a_packet_without_its_key_bytes_has_no_key(name):
    """No packet gets a wrong key, for any snap length of the capture."""
    packet, key = CASES[name]
    for cut in range(len(packet) + 1):
        assert read(frame_of(packet), cut=cut).keys().tolist()[0] in (0, key.hashed()), cut
    assert read(frame_of(packet), cut=len(packet)).keys().tolist() == [key.hashed()]


def test_the_fields_of_records():
    content = read(frame_of(ipv4(6, tcp(PAYLOAD))), frame_of(ipv4(1, icmp(8, PAYLOAD)))).content()
    assert content.l4_src.tolist() == [4001, 321]
    assert content.l4_dst.tolist() == [5001, 7]
    assert content.l4_seq.tolist() == [0xDEADBEEF, 0]
    assert content.ip_id.tolist() == [77, 77]
    assert content.l4_proto.tolist() == [6, 1]
    assert content.l4_bits.tolist() == [0x18, 8]
    assert content.flags.tolist() == [Flag.KEY | Flag.FLOW] * 2


def test_murmurhash_of_many():
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 64, (4, 20_000), "u8")
    hashed = murmurhash(*words)
    for at in (0, 1, 8_191, 8_192, 19_999):
        assert int(hashed[at]) == slow_murmurhash(words[:, at].astype("<u8").tobytes())


def test_random_frames():
    rng = np.random.default_rng(4)
    frames = [rng.integers(0, 256, rng.integers(14, 120), np.uint8).tobytes() for _ in range(3_000)]
    heads = [b"\x08\x00\x45\x00", b"\x86\xdd\x60\x00", b"\x08\x00\x4f\x00", b"\x81\x00\x00\x01\x86\xdd\x60"]
    frames = [frame[:12] + heads[i % 4] + frame[16:] for i, frame in enumerate(frames)]
    assert len(read(*frames).keys()) == len(frames)
