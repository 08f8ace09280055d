"""Packet captures of every kind give the results of the plain capture of the same packets, or an error."""

import bz2
import gzip
import lzma
import struct

import numpy as np
import pytest
import zstandard

from collector.files import sniff
from collector.pcap.file import PcapFile
from collector.pcap.source import PcapPairReader
from collector.pcap.unpacked_file import unpacked_head
from collector.reading.options import FileOptions
from contracts.errors import CaptureError
from contracts.schema import Direction
from tests.made_pcap import PcapFrame, block, ng_interface, ng_packet, ng_section, option, pcap, pcapng, written
from tests.places import GOLDEN
from tests.unit.collector.pcap.test_source import FRAME, T, engine_results, overheads, rows, traffic

CAPTURES = GOLDEN / "captures"
NAT = GOLDEN / "other-tools"


def read(inner, outer, **options):
    """Read a pair of captures; returns (delays of packets, last results, source)."""
    source = PcapPairReader(inner, outer, FileOptions(**options))
    _, results = engine_results(source)
    return overheads(results), results[-1], source


@pytest.fixture
def replayed(tmp_path):
    """Read a pair of captures given as content; returns the same as `read`."""

    def run(inner, outer, **options):
        for name, content in (("inner", inner), ("outer", outer)):
            (tmp_path / name).write_bytes(content)
        return read(tmp_path / "inner", tmp_path / "outer", **options)

    return run


@pytest.fixture(scope="module")
def plain():
    found = read(NAT / "inner.pcap", NAT / "outer.pcap")
    ways = [way for _, way, _ in found[0]]
    assert (len(ways), ways.count(Direction.EGRESS), ways.count(Direction.INGRESS)) == (22, 17, 5)
    return found


@pytest.mark.parametrize(
    ("kind", "suffix", "discarded"),
    [("fcs", "pcap", 0), ("unused", "pcapng", 0), ("mixed", "pcapng", 2), ("secrets", "pcapng.gz", 0)],
)
def test_golden_captures_equal_the_plain_ones(plain, kind, suffix, discarded):
    found, last, source = read(CAPTURES / f"{kind}-inner.{suffix}", CAPTURES / f"{kind}-outer.{suffix}")
    assert found == plain[0]
    assert last.totals.ledger == plain[1].totals.ledger
    assert source.discarded == discarded
    said = [line for line in source.warnings if "link type 239 (NFLOG)" in line]
    assert len(said) == len(source.warnings) == discarded


@pytest.mark.slow
def test_a_long_block_is_not_read_into_memory(tmp_path, replayed, plain):
    inner = gzip.decompress((CAPTURES / "secrets-inner.pcapng.gz").read_bytes())
    at = 28 + struct.unpack_from("<I", inner, 32)[0] if struct.unpack_from("<I", inner, 28)[0] == 1 else 28
    long = block(0x0BAD, bytes(9 << 20), "<")
    outer = gzip.decompress((CAPTURES / "secrets-outer.pcapng.gz").read_bytes())
    for wrap in (bytes, gzip.compress):
        found, _, source = replayed(wrap(inner[:at] + long + inner[at:] + long), outer)
        assert (found, source.discarded, source.warnings) == (plain[0], 0, [])
    # A wrong length leads to a place that is no block's end.
    wrong = inner[:at] + struct.pack("<II", 0x0BAD, 5 << 20) + long[8:] + inner[at:]
    with pytest.raises(CaptureError, match="ends without its length"):
        replayed(wrong, outer)
    assert replayed(wrong, outer, salvage=True)[2].discarded
    with pytest.raises(CaptureError, match="a block of 9437196 bytes; expected"):
        replayed(inner + long[:-8], outer)
    with pytest.raises(CaptureError, match="ends without its length"):
        replayed(gzip.compress(inner + long[:-8]), outer)


def test_kuznetzov_s_pcap(plain):
    """Written by Wireshark's editcap; times in µs."""
    found, last, source = read(CAPTURES / "kuznetzov-inner.pcap", CAPTURES / "kuznetzov-outer.pcap")
    assert last.totals.ledger == plain[1].totals.ledger
    assert source.discarded == 0
    assert [way for _, way, _ in found] == [way for _, way, _ in plain[0]]
    for (utc, _, delay), (true_utc, _, true_delay) in zip(found, plain[0], strict=True):
        assert true_utc // 1000 * 1000 == utc
        assert abs(delay - true_delay) < 1000


# --- several devices ----------------------------------------------------------------------------


def any_packets():
    """Return (time, device, cooked frame) of the capture of all devices."""
    raw = (CAPTURES / "at-any.pcap").read_bytes()
    assert struct.unpack_from("<I", raw)[0] == 0xA1B23C4D
    at = 24
    while at < len(raw):
        s, ns, size, _ = struct.unpack_from("<IIII", raw, at)
        data = raw[at + 16 : at + 16 + size]
        yield s * 10**9 + ns, struct.unpack_from(">I", data, 4)[0], data
        at += 16 + size


def sll(cooked):
    """Convert a packet of the second cooked format to the first, which has no device."""
    protocol, arphrd, kind, size = cooked[:2], cooked[8:10], cooked[10], cooked[11]
    return struct.pack(">H", kind) + arphrd + struct.pack(">H", size) + cooked[12:20] + protocol + cooked[20:]


@pytest.fixture(scope="module")
def at_outer():
    found = read(CAPTURES / "at-eth0.pcap", CAPTURES / "at-outer.pcap")
    assert [sum(way == one for _, way, _ in found[0]) for one in (Direction.EGRESS, Direction.INGRESS)] == [10, 10]
    return found


def ng_of_devices(devices=(2, 3, 4)):
    """Return a pcapng with an interface for each device, as `dumpcap -i a -i b -i c` writes it."""
    raw = ng_section("<") + b"".join(ng_interface("<", name=f"dev{one}", link=276, tsresol=9) for one in devices)
    for utc_ns, device, data in any_packets():
        if device in devices:
            # Only the block tells the device.
            data = data[:4] + bytes(4) + data[8:]
            raw += ng_packet("<", devices.index(device), utc_ns, data)
    return raw


def kuznetzov_of_devices(order):
    raw = struct.pack(order + "IHHiIII", 0xA1B2CD34, 2, 4, 0, 0, 65535, 101)
    for utc_ns, device, data in any_packets():
        head = (utc_ns // 10**9, utc_ns % 10**9 // 1000, len(data) - 20, len(data) - 20, device, 8, 0, 0)
        raw += struct.pack(order + "IIIIIHBB", *head) + data[20:]
    return raw


def test_the_outer_device_is_found_in_a_capture_of_any(at_outer):
    found, last, source = read(CAPTURES / "at-eth0.pcap", CAPTURES / "at-any.pcap")
    assert found == at_outer[0]
    assert last.totals.ledger == at_outer[1].totals.ledger
    assert source.discarded == 0
    told = " ".join(source.warnings)
    assert "at-any.pcap: made at several devices" in told
    assert "Measured at 2" in told
    assert "--outer-device" in told
    assert "40 packets seen at other devices are left out" in told


def test_the_outer_device_is_found_among_interfaces(replayed, at_outer):
    found, _, source = replayed((CAPTURES / "at-eth0.pcap").read_bytes(), ng_of_devices())
    assert found == at_outer[0]
    assert any("Measured at dev2" in line for line in source.warnings)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_outer_device_is_found_in_kuznetzovs_format(replayed, at_outer, order):
    found, _, _ = replayed((CAPTURES / "at-eth0.pcap").read_bytes(), kuznetzov_of_devices(order))
    assert [way for _, way, _ in found] == [way for _, way, _ in at_outer[0]]
    assert all(abs(a[2] - b[2]) < 1000 for a, b in zip(found, at_outer[0], strict=True))


@pytest.mark.parametrize(("outer", "name"), [("any", "3"), ("ng", "dev3")])
def test_another_device_on_demand(replayed, at_outer, outer, name):
    content = (CAPTURES / "at-any.pcap").read_bytes() if outer == "any" else ng_of_devices()
    inner = (CAPTURES / "at-eth0.pcap").read_bytes()
    found, _, source = replayed(inner, content, outer_device=name)
    bridge = pcap([PcapFrame(utc_ns, data) for utc_ns, device, data in any_packets() if device == 3], link=276)
    assert found == replayed(inner, bridge)[0] != at_outer[0]
    assert len(source.warnings) == 1
    with pytest.raises(CaptureError, match=r"no packet of a device '7', as --outer-device names; there are: .*3"):
        replayed(inner, content, outer_device="7")


def test_the_containers_capture_may_have_several_devices(replayed):
    """Of several devices the first on the way out is the inner one, so that swapped files give the same delays."""
    whole = (CAPTURES / "at-any.pcap").read_bytes()
    eth0 = (CAPTURES / "at-eth0.pcap").read_bytes()
    straight = replayed(eth0, whole)[0]
    turned, _, source = replayed(whole, eth0)
    assert sorted(delay for _, _, delay in turned) == sorted(delay for _, _, delay in straight)
    assert any("Measured at 2" in line and "--inner-device" in line for line in source.warnings)


def test_an_unclear_outer_device_must_be_named(replayed):
    """Half of the packets go out by one device and half by another."""
    inner, outer, truth = traffic(400)
    one = [(t, 7, frame) for t, frame in zip(outer[1].tolist(), outer[0], strict=True)]
    port = [(t, 5, frame) for t, frame in zip(inner[1].tolist(), inner[0], strict=True)]
    order = {frame[18:20].tobytes(): number for number, frame in enumerate(inner[0])}
    shared = []
    for (t, device, frame), (own_t, _, _) in zip(one, one, strict=True):
        shared.append((t, device if order[frame[18:20].tobytes()] % 2 else 8, frame))
        assert own_t == t
    # The bridge port is between the devices, close to the container.
    egress = {utc for utc, way, _ in truth if way == Direction.EGRESS}
    port = [(t + (1 if t in egress else -1), device, frame) for t, device, frame in port]
    raw = ng_section("<") + b"".join(ng_interface("<", name=str(n), tsresol=9) for n in range(9))
    for t, device, frame in sorted(shared + port, key=lambda row: row[0]):
        raw += ng_packet("<", device, t, frame.tobytes())
    with pytest.raises(CaptureError, match="outer one is not clear: say it with --outer-device") as raised:
        replayed(written(*inner), raw)
    assert "5 (400)" in str(raised.value)
    found = replayed(written(*inner), raw, outer_device="7")[0]
    assert 150 < len(found) < 250
    assert set(found) < set(truth)


def test_repeated_packets_without_device_names_have_no_delay(replayed, at_outer):
    inner = (CAPTURES / "at-eth0.pcap").read_bytes()
    cooked = [PcapFrame(utc_ns, sll(data)) for utc_ns, _, data in any_packets()]
    found, last, source = replayed(inner, pcap(cooked, link=113))
    assert found == []
    assert last.totals.ledger.records == last.totals.ledger.unmatched == 80
    (line,) = [line for line in source.warnings if "LINUX_SLL" in line]
    assert "60 packets occur several times and have no delay" in line
    # One device has each packet once.
    outer = [PcapFrame(utc_ns, sll(data)) for utc_ns, device, data in any_packets() if device == 2]
    assert replayed(inner, pcap(outer, link=113))[0] == at_outer[0]


@pytest.mark.parametrize("seed", range(3))
def test_merged_captures_of_two_devices_never_give_the_nearer_one(replayed, seed):
    """`mergecap` of a port's capture and the outer device's into a format that has one interface."""
    inner, outer, truth = traffic(300, seed)
    out = {utc for utc, way, _ in truth if way == Direction.EGRESS}
    near = [(t + (1 if t in out else -1), frame) for t, frame in zip(inner[1].tolist(), inner[0], strict=True)]
    both = sorted(near + list(zip(outer[1].tolist(), outer[0], strict=True)), key=lambda row: row[0])
    found, _, source = replayed(written(*inner), pcap([PcapFrame(t, frame.tobytes()) for t, frame in both]))
    assert set(found) <= set(truth)
    assert any("cannot be told from others with the same content" in line for line in source.warnings)


# --- link-layer headers -------------------------------------------------------------------------


def ethernet(tags, frame, protocol=None):
    """Return a frame with bytes between its addresses and its payload."""
    return frame[:12] + tags + (frame[12:14] if protocol is None else protocol) + frame[14:]


def vlan(*types):
    return lambda frame: ethernet(b"".join(struct.pack(">HH", one, 0x2064 + one % 7) for one in types), frame)


def mpls(*labels, protocol=0x8847):
    stack = b"".join(
        struct.pack(">I", label << 12 | (number == len(labels) - 1) << 8 | 64) for number, label in enumerate(labels)
    )
    return lambda frame: frame[:12] + struct.pack(">H", protocol) + stack + frame[14:]


def pppoe(frame):
    number = {0x0800: 0x0021, 0x86DD: 0x0057}[int.from_bytes(frame[12:14], "big")]
    return frame[:12] + struct.pack(">HBBHHH", 0x8864, 0x11, 0, 77, len(frame) - 12, number) + frame[14:]


WRAPPED = {
    "802.1Q": vlan(0x8100),
    "QinQ": vlan(0x88A8, 0x8100),
    "QinQ of old": vlan(0x9100, 0x8100),
    "three tags": vlan(0x88A8, 0x8100, 0x8100),
    "five tags": vlan(0x9300, 0x9200, 0x9100, 0x88A8, 0x8100),
    "a label": mpls(17),
    "labels": mpls(17, 5, 90_000),
    "multicast labels": mpls(3, protocol=0x8848),
    "PPPoE": pppoe,
    "PPPoE in a VLAN": lambda frame: vlan(0x8100)(pppoe(frame)),
    "labels in QinQ": lambda frame: vlan(0x88A8, 0x8100)(mpls(17, 18)(frame)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_packets_behind_tags_and_labels_are_the_same_packets(replayed, name):
    inner, outer, truth = traffic(60)
    wrapped = [PcapFrame(one.utc_ns, WRAPPED[name](one.data)) for one in rows(*outer)]
    found, last, source = replayed(written(*inner), pcap(wrapped))
    assert found == truth
    assert source.warnings == []
    assert last.totals.ledger.unmatched == 0


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("size", [13, 15, 17, 21, 40])
def test_cut_inside_of_tags_and_labels(replayed, name, size):
    cut = pcap([PcapFrame(T + 9, WRAPPED[name](FRAME))], snap=size)
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), cut)
    assert found == []
    assert any("were cut too short" in line for line in source.warnings)


def test_cooked_frames_with_a_tag(replayed):
    inner, outer, truth = traffic(60)
    cooked = [
        PcapFrame(one.utc_ns, struct.pack(">HHIHBB8s", 0x8100, 0, 3, 1, 4, 6, bytes(8)) + b"\0\x64" + one.data[12:])
        for one in rows(*outer)
    ]
    assert replayed(written(*inner), pcap(cooked, link=276))[0] == truth


# --- the format's corners -----------------------------------------------------------------------


@pytest.mark.parametrize("fcs_bytes", [0, 2, 4, 30])
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_other_bits_of_the_link_type_field(replayed, order, present, fcs_bytes):
    """Reserved bits, and the length of a checksum, which counts only if the flag says so."""
    inner, outer, truth = traffic(30)
    field = 1 | fcs_bytes // 2 << 28 | present << 26 | 0x03FF0000 | 1 << 27
    field &= 0xFFFFFFFF
    behind = bytes(fcs_bytes if present else 0)
    frames = [PcapFrame(one.utc_ns, one.data + behind) for one in rows(*outer)]
    found, _, source = replayed(written(*inner), pcap(frames, order=order, link=field))
    assert found == truth
    with PcapFile(source._paths[1]) as file:
        (piece,) = file.pieces()
    assert (piece.length == len(FRAME) - 14).all()


@pytest.mark.parametrize("told", [2, 4, 16, 32])
def test_a_frame_checksum_is_not_part_of_the_packet(tmp_path, told):
    """ARP has no length field. The option counts in bits, or in bytes as in the specification's example."""
    arp = FRAME[:12] + b"\x08\x06" + bytes(range(28))
    size = told if told < 8 else told // 8
    raw = ng_section("<") + ng_interface("<", tsresol=9, more=option(13, bytes([told]), "<"))
    (tmp_path / "a").write_bytes(raw + ng_packet("<", 0, T, arp + b"\xff" * size))
    with PcapFile(tmp_path / "a") as file:
        (piece,) = file.pieces()
    assert piece.length.tolist() == [28]


PACKED = {
    "gzip": gzip.compress,
    "gzip in two members": lambda raw: gzip.compress(raw[:777]) + gzip.compress(raw[777:]) + bytes(512),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda raw: zstandard.compress(raw, 3),
    "zstd in two frames": lambda raw: zstandard.compress(raw[:777]) + zstandard.compress(raw[777:]),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("write", [pcap, pcapng])
def test_compressed_captures(replayed, kind, write):
    inner, outer, truth = traffic(300)
    packed = PACKED[kind](write(rows(*outer)))
    found, _, source = replayed(PACKED[kind](write(rows(*inner))), packed)
    assert found == truth
    assert source.warnings == []
    assert source.bytes_read == source.bytes_total
    assert sniff(source._paths[0]).name == "pcap"


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_compressed_captures_that_are_cut(replayed, kind, share):
    inner, outer, truth = traffic(3000)
    packed = PACKED[kind](pcap(rows(*outer)))
    packed = packed[: int(len(packed.rstrip(b"\0")) * share)]
    with pytest.raises(CaptureError, match=r"the file is cut: its \w+ stream has no end"):
        replayed(written(*inner), packed)
    if len(unpacked_head(packed, 24)) < 24:
        # A compressor of whole blocks returns nothing from a truncated block.
        assert kind.startswith(("bzip2", "zstd"))
        return
    found, _, source = replayed(written(*inner), packed, salvage=True)
    assert set(found) < set(truth)
    assert source.discarded > 0
    assert any("has no end" in line for line in source.warnings)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
def test_a_compressed_capture_that_is_damaged(replayed, kind):
    inner, outer, truth = traffic(3000)
    packed = bytearray(PACKED[kind](pcap(rows(*outer))))
    for at in range(len(packed) // 2, len(packed) // 2 + 40):
        packed[at] ^= 0xFF
    with pytest.raises(CaptureError, match="at byte"):
        replayed(written(*inner), bytes(packed))
    try:
        found, _, source = replayed(written(*inner), bytes(packed), salvage=True)
    except CaptureError:
        return
    assert set(found) <= set(truth)
    assert source.discarded > 0


def test_a_bomb_is_refused(replayed):
    bomb = zstandard.compress(pcap([]) + bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(CaptureError, match="which no capture does"):
        replayed(pcap([PcapFrame(T, FRAME)]), bomb)


def test_other_compressions_are_refused_by_name(replayed):
    with pytest.raises(CaptureError, match="compressed with lz4, which MACE does not read: unpack it first"):
        replayed(pcap([PcapFrame(T, FRAME)]), b"\x04\x22\x4d\x18" + bytes(60))


def test_blocks_with_and_without_a_time(replayed):
    """The obsolete packet block is read; packets without a time are left out and counted."""
    inner, outer, truth = traffic(60)
    raw = ng_section(">") + ng_interface(">", tsresol=9)
    for number, one in enumerate(rows(*outer)):
        raw += ng_packet(">", 0, one.utc_ns, one.data, old=number % 2 == 1)
        if number % 3 == 0:
            raw += block(3, struct.pack(">I", len(one.data)) + one.data, ">")
    found, _, source = replayed(written(*inner), raw)
    assert found == truth
    assert source.discarded == 20
    assert any("20 packets in simple packet blocks, which have no time: left out" in line for line in source.warnings)
    only = ng_section("<") + ng_interface("<") + block(3, struct.pack("<I", 60) + bytes(60), "<")
    with pytest.raises(CaptureError, match="no packet in it can be read: 1 in simple packet blocks"):
        replayed(written(*inner), only)


def test_sections_of_other_byte_orders_and_interfaces(replayed):
    inner, outer, truth = traffic(90)
    raw, frames = b"", rows(*outer)
    for part, (order, tsresol) in enumerate((("<", 9), (">", 0x80 | 40), ("<", 12), (">", 9))):
        # Each section numbers its interfaces from 0, and its first interface may have another kind.
        raw += ng_section(order)
        first = part % 2
        offset_s = 1_699_999_990
        for link in [239] * first + [1]:
            raw += ng_interface(order, link=link, tsresol=tsresol, offset_s=offset_s, name="eth0" if link == 1 else "")
        for one in frames[part * 23 : part * 23 + 23]:
            raw += ng_packet(order, first, one.utc_ns, one.data, tsresol=tsresol, offset_s=offset_s)
        raw += ng_packet(order, 0, T, b"\0" * 40) * first
    found, _, source = replayed(written(*inner), raw)
    assert [way for _, way, _ in found] == [way for _, way, _ in truth]
    # With a clock of 2^40 ticks a time may be up to 1 ns early.
    assert all(abs(one[0] - true[0]) <= 1 >= abs(one[2] - true[2]) for one, true in zip(found, truth, strict=True))
    assert source.discarded == 2
    assert source.pairs == 90


@pytest.mark.parametrize(
    "tsresol", [0, 3, 6, 9, 12, 15, 19, *(0x80 | n for n in (0, 1, 10, 20, 32, 33, 40, 53, 60, 63))]
)
def test_clocks_of_any_resolution(tmp_path, tsresol):
    """Times are rounded down to whole ns, exactly, with integers only."""
    per_s = 2 ** (tsresol & 127) if tsresol & 128 else 10**tsresol
    rng = np.random.default_rng(tsresol)
    most = min(2**64, 4_000_000_000 * per_s)
    ticks = [0, 1, most - 1, *(int(n * most) for n in rng.random(40))]
    raw = ng_section("<") + ng_interface("<", tsresol=tsresol, more=option(14, struct.pack("<q", 11), "<"))
    for one in ticks:
        raw += block(6, struct.pack("<IIIII", 0, one >> 32, one & 0xFFFFFFFF, len(FRAME), len(FRAME)) + FRAME, "<")
    (tmp_path / "a").write_bytes(raw)
    with PcapFile(tmp_path / "a") as file:
        (piece,) = file.pieces()
    assert piece.utc_ns.tolist() == [one * 10**9 // per_s + 11 * 10**9 for one in ticks]


@pytest.mark.parametrize(
    ("tsresol", "offset_s", "ticks"),
    [(9, -(2**62), 5), (9, 2**62, 5), (9, -1, 5), (0, 0, 2**64 - 1), (6, 0, 2**63), (9, 2**33, 2**63), (0, -5, 2**63)],
)
def test_impossible_times_are_left_out_and_counted(replayed, tsresol, offset_s, ticks):
    good = ng_section("<") + ng_interface("<", tsresol=9) + ng_interface("<", tsresol=tsresol, offset_s=offset_s)
    bad = block(6, struct.pack("<IIIII", 1, ticks >> 32, ticks & 0xFFFFFFFF, len(FRAME), len(FRAME)) + FRAME, "<")
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), good + ng_packet("<", 0, T + 7, FRAME) + bad)
    assert [delay for _, _, delay in found] == [7]
    assert source.discarded == 1
    assert any("with a time before 1970 or after 2116: left out" in line for line in source.warnings)


@pytest.mark.parametrize("tsresol", [20, 100, 127, 0x80 | 64, 0xFF])
def test_a_clock_too_fine_for_its_numbers(replayed, tsresol):
    """Only packets of such an interface are left out."""
    raw = ng_section("<") + ng_interface("<", tsresol=9) + ng_interface("<", tsresol=tsresol)
    good = raw + ng_packet("<", 0, T + 7, FRAME)
    for content, discarded in ((good, 0), (good + ng_packet("<", 1, 5, FRAME, tsresol=0), 1)):
        found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), content)
        assert [delay for _, _, delay in found] == [7]
        assert source.discarded == len(source.warnings) == discarded
    with pytest.raises(CaptureError, match=r"no packet in it can be read: 1 with a clock of (2|10)\^"):
        replayed(pcap([PcapFrame(T, FRAME)]), raw + ng_packet("<", 1, 5, FRAME, tsresol=0))


def test_an_interface_with_long_options(replayed):
    """The option with its clock follows 3 MB of comments."""
    more = option(1, bytes(60_000), "<") * 50 + option(9, b"\x09", "<")
    raw = ng_section("<") + ng_interface("<", more=more) + ng_packet("<", 0, T + 7, FRAME)
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), raw)
    assert [delay for _, _, delay in found] == [7]
    assert source.warnings == []


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_as_many_interfaces_and_kinds_as_a_file_can_have(replayed):
    """Reading takes time proportional to the file, and the warnings are a few lines."""
    count = 3_000
    raw = ng_section("<") + b"".join(ng_interface("<", tsresol=9) for _ in range(count))
    raw += b"".join(ng_interface("<", link=300 + n) for n in range(count))
    raw += b"".join(ng_packet("<", n, T + 7, FRAME) for n in range(2 * count))
    with pytest.raises(CaptureError, match=r"outer one is not clear.* and 2980 more"):
        replayed(pcap([PcapFrame(T, FRAME)]), raw)
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), raw, outer_device="77")
    assert [delay for _, _, delay in found] == [7]
    assert source.discarded == count
    assert len(source.warnings) == 10
    assert any("2992 packets of 2992 more such kinds: left out" in line for line in source.warnings)


def test_a_packet_of_another_kind_may_be_long(replayed):
    """Frames of USB or D-Bus may be longer than any packet of a network."""
    raw = ng_section("<") + ng_interface("<", tsresol=9) + ng_interface("<", link=220)
    raw += ng_packet("<", 1, T, bytes(3 << 20)) + ng_packet("<", 1, T, bytes(5 << 20)) + ng_packet("<", 0, T + 7, FRAME)
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), raw)
    assert [delay for _, _, delay in found] == [7]
    assert source.discarded == 2
    assert any("2 packets of link type 220 (USB): left out" in line for line in source.warnings)
    with pytest.raises(CaptureError, match="a block of 3145760 bytes; expected 32 to 1048576"):
        replayed(pcap([PcapFrame(T, FRAME)]), raw.replace(struct.pack("<HHI", 220, 0, 0), struct.pack("<HHI", 1, 0, 0)))


def test_losses_of_the_capture_program_are_reported(replayed):
    statistics = [
        block(5, struct.pack("<III", 0, 0, 0) + option(5, struct.pack("<Q", n), "<") + option(0, b"", "<"), "<")
        for n in (3, 12)
    ]
    raw = ng_section("<") + ng_interface("<", tsresol=9) + ng_packet("<", 0, T + 7, FRAME) + b"".join(statistics)
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), raw + raw)
    assert len(found) == 0  # the same packet in two sections
    assert any("by its own statistics the capture missed 24 packets" in line for line in source.warnings)


@pytest.mark.parametrize("order", ["<", ">"])
def test_losses_counted_by_packets_are_reported(replayed, order):
    """Packets have the count as an option, the obsolete block as a number, of which 0xFFFF means unknown."""
    packet = ng_packet(order, 0, T + 7, FRAME)
    more = option(2, struct.pack(order + "I", 1), order) + option(4, struct.pack(order + "Q", 9), order)
    told = block(6, packet[8:-4] + more + option(0, b"", order), order)
    old = bytearray(ng_packet(order, 0, T + 10**9, FRAME, old=True))
    unknown = bytes(old)
    struct.pack_into(order + "H", old, 10, 5)
    counted = block(5, struct.pack(order + "III", 0, 0, 0) + option(5, struct.pack(order + "Q", 3), order), order)
    raw = ng_section(order) + ng_interface(order, tsresol=9) + told + old + unknown
    for content, missed in ((raw, 14), (raw + counted, 14), (raw + counted.replace(bytes([3]), bytes([33])), 33)):
        found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), content)
        assert [delay for _, _, delay in found] == [7]
        assert [f"capture missed {missed} packets" in line for line in source.warnings] == [True]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("salvage", [False, True])
def test_nanoseconds_in_a_file_that_says_microseconds(replayed, order, salvage):
    """Otherwise a delay of 10 µs would be read as 10 ms."""
    raw = bytearray(pcap([PcapFrame(T + n * 10**9 + 1_000_001, FRAME) for n in range(3)], order=order))
    struct.pack_into(order + "I", raw, 0, 0xA1B2C3D4)
    if not salvage:
        with pytest.raises(CaptureError, match="1000001 of 1000000 parts of a second; is the magic number"):
            replayed(pcap([PcapFrame(T, FRAME)]), bytes(raw))
        return
    found, _, source = replayed(pcap([PcapFrame(T, FRAME)]), bytes(raw), salvage=True)
    assert (found, source.discarded) == ([], 1)


def test_a_section_of_a_future_version(replayed):
    for major, minor in ((1, 0), (1, 2), (2, 0), (0, 9)):
        raw = bytearray(pcapng([PcapFrame(T + 7, FRAME)]))
        struct.pack_into("<HH", raw, 12, major, minor)
        if major == 1:
            assert len(replayed(pcap([PcapFrame(T, FRAME)]), bytes(raw))[0]) == 1
        else:
            with pytest.raises(CaptureError, match=f"a section of version {major}.{minor}, expected 1"):
                replayed(pcap([PcapFrame(T, FRAME)]), bytes(raw))


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_concatenated_captures(replayed, packed):
    """`cat a.pcap b.pcap` makes such a file: the second header must not be read as a packet of the year 2055."""
    raw = packed(pcap([PcapFrame(T + 7, FRAME)])) + packed(pcap([PcapFrame(T + 10**9, FRAME)]))
    with pytest.raises(CaptureError, match="another capture begins in the same file"):
        replayed(pcap([PcapFrame(T, FRAME)]), raw)
    found, last, _ = replayed(pcap([PcapFrame(T, FRAME)]), raw, salvage=True)
    assert (len(found), last.totals.ledger.unmatched) == (1, 0)


def test_a_cut_capture_names_the_remedy(replayed):
    for raw in (
        pcap([PcapFrame(T, FRAME)] * 2),
        pcapng([PcapFrame(T, FRAME)] * 2),
        gzip.compress(pcap([PcapFrame(T, FRAME)] * 2)),
    ):
        with pytest.raises(CaptureError, match="--salvage reads what is before it"):
            replayed(pcap([PcapFrame(T, FRAME)]), raw[:-5])


def test_a_result_without_figures_has_the_reason(replayed):
    one = pcap([PcapFrame(T, FRAME)])
    for inner, outer, why in (
        (one, pcap([PcapFrame(T + 3600 * 10**9, FRAME)]), "no packet of one capture is in the other within 0.5 s"),
        (one, pcap([]), "the capture contains no packet"),
        (pcapng([]), one, "the capture contains no packet"),
    ):
        found, _, source = replayed(inner, outer)
        assert found == []
        assert [why in line for line in source.warnings] == [True]


def test_swapped_lengths_of_old_versions(replayed):
    """Until version 2.2 the packet's length stood before the captured length."""
    raw = bytearray(pcap([PcapFrame(T + 7, FRAME[:60], 500)] * 3))
    struct.pack_into("<H", raw, 6, 2)
    for at in range(24, len(raw), 76):
        struct.pack_into("<II", raw, at + 8, 500, 60)
    with PcapFile(_written(replayed, raw)) as file:
        (piece,) = file.pieces()
    assert len(piece) == 3


def _written(replayed, raw):
    _, _, source = replayed(bytes(raw), pcap([PcapFrame(T, FRAME)]))
    return source._paths[0]
