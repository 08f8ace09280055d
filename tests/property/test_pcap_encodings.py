"""Captures of the same traffic in every encoding give the same delays, and count the packets left out."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.errors import CaptureError
from tests.made_pcap import PcapFrame, block, ng_interface, ng_packet, ng_section, option, pcap
from tests.unit.collector.pcap.test_kinds import PACKED, WRAPPED, read
from tests.unit.collector.pcap.test_source import rows, traffic

INNER, OUTER, TRUTH = traffic(24)
SIDES = (rows(*INNER), rows(*OUTER))
EVERY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ORDERS = st.sampled_from("<>")


@st.composite
def links(draw):
    """Draw a link type, and a function from an Ethernet frame to a frame of that type."""
    kind = draw(st.sampled_from(("ethernet", "raw", "sll", "sll2")))
    if kind == "raw":
        return 101, lambda frame: frame[14:]
    if kind == "sll":
        return 113, lambda frame: struct.pack(">HHH8s", 0, 1, 6, frame[6:14]) + frame[12:]
    if kind == "sll2":
        return 276, lambda frame: frame[12:14] + struct.pack(">HIHBB8s", 0, 7, 1, 0, 6, frame[6:14]) + frame[14:]
    return 1, draw(st.sampled_from([bytes, *WRAPPED.values()]))


@st.composite
def classic(draw, frames):
    """Draw (content of a pcap file, resolution of its clock in ns, number of packets left out)."""
    link, wrapped = draw(links())
    kuznetzov, unit = draw(st.booleans()), draw(st.sampled_from(("ns", "us")))
    words = draw(st.integers(0, 7)) if link == 1 else 0
    made = [PcapFrame(one.utc_ns, wrapped(one.data) + bytes(2 * words)) for one in frames]
    order = draw(ORDERS)
    field = link | (words << 28 | 1 << 26 if words else 0)
    if not kuznetzov:
        return pcap(made, order=order, unit=unit, link=field), 1 if unit == "ns" else 1000, 0
    raw = struct.pack(order + "IHHiIII", 0xA1B2CD34, 2, 4, 0, 0, 65535, field)
    for one in made:
        times = one.utc_ns // 10**9, one.utc_ns % 10**9 // 1000
        raw += struct.pack(order + "IIIIIHBB", *times, len(one.data), len(one.data), 3, 8, 0, 0) + one.data
    return raw, 1000, 0


@st.composite
def blocks(draw, frames):
    """Draw (content, clock resolution, packets left out) of a pcapng file with several sections and kinds of
    interfaces.
    """
    raw, discarded, step_ns = b"", 0, 1
    cut = sorted(draw(st.lists(st.integers(0, len(frames)), max_size=2)))
    for start, end in zip([0, *cut], [*cut, len(frames)], strict=True):
        order = draw(ORDERS)
        raw += ng_section(order)
        kinds = draw(
            st.lists(st.tuples(links(), st.sampled_from((None, 9, 12, 0x80 | 30, 0x80 | 45))), min_size=1, max_size=3)
        )
        foreign = draw(st.booleans())
        for (link, _), tsresol in kinds:
            step_ns = max(step_ns, 1000 if tsresol is None else 1)
            more = option(1, b"a comment", order) * draw(st.integers(0, 2))
            raw += ng_interface(order, link=link, tsresol=tsresol, offset_s=1_699_999_000, more=more)
        raw += ng_interface(order, link=draw(st.sampled_from((0, 105, 227, 239))), tsresol=200) * foreign
        for one in frames[start:end]:
            number = draw(st.integers(0, len(kinds) - 1))
            (_, wrapped), tsresol = kinds[number]
            old = draw(st.booleans())
            raw += ng_packet(
                order, number, one.utc_ns, wrapped(one.data), tsresol=tsresol, offset_s=1_699_999_000, old=old
            )
            other = draw(st.sampled_from(("", "", "", "block", "simple", "foreign")))
            if other == "block":
                code, body = draw(st.sampled_from((4, 9, 10, 0x0BAD))), draw(st.binary(max_size=50))
                raw += block(code, body, order)
            elif other == "simple":
                raw += block(3, struct.pack(order + "I", 60) + bytes(60), order)
                discarded += 1
            elif other == "foreign" and foreign:
                raw += ng_packet(order, len(kinds), 5, bytes(draw(st.integers(0, 90))), tsresol=0)
                discarded += 1
    return raw, step_ns, discarded


@pytest.mark.slow
@EVERY
@given(data=st.data())
def test_every_encoding_gives_the_same_delays(tmp_path, data):
    step_ns, discarded = 1, 0
    for name, frames in zip(("inner", "outer"), SIDES, strict=True):
        content, step, left_out = data.draw(st.one_of(classic(frames), blocks(frames)))
        packed = data.draw(st.sampled_from([bytes, *PACKED.values()]))
        (tmp_path / name).write_bytes(packed(content))
        step_ns, discarded = max(step_ns, step), discarded + left_out
    found, last, source = read(tmp_path / "inner", tmp_path / "outer")
    assert source.discarded == discarded
    # The warnings count the packets left out, by kind, and nothing else.
    assert sum(int(line.split(": ")[1].split()[0]) for line in source.warnings) == discarded
    assert last.totals.ledger.imbalance == last.totals.ledger.unmatched == 0
    assert len(found) == len(TRUTH)
    for (utc, way, delay), (true_utc, true_way, true_delay) in zip(found, TRUTH, strict=True):
        assert way == true_way
        assert abs(utc - true_utc) <= step_ns
        assert abs(delay - true_delay) <= step_ns


@st.composite
def devices(draw):
    """Draw devices between inner and outer device, each by its share of the way from the container, in thousandths."""
    return sorted(draw(st.sets(st.integers(1, 999), min_size=1, max_size=3)))


def seen_at(share):
    """Return the packets as seen at a device at that share of the way."""
    inner_ns = {one.data[18:20]: one.utc_ns for one in SIDES[0]}
    begun = [(inner_ns[one.data[18:20]], one) for one in SIDES[1]]
    return [PcapFrame(utc_ns + (one.utc_ns - utc_ns) * share // 1000, one.data) for utc_ns, one in begun]


@pytest.mark.slow
@EVERY
@given(data=st.data(), between=devices(), form=st.sampled_from(("sll2", "ng", "sll", "merged")))
def test_a_capture_of_several_devices_uses_the_farthest_or_is_refused(tmp_path, data, between, form):
    shares = [*between, 1000]
    index = data.draw(st.permutations(range(2, 2 + len(shares))))
    every = sorted(
        ((one.utc_ns, device, one.data) for share, device in zip(shares, index, strict=True) for one in seen_at(share)),
        key=lambda row: row[0],
    )
    if form == "ng":
        content = ng_section("<") + b"".join(ng_interface("<", name=f"d{n}", tsresol=9) for n in range(9))
        content += b"".join(ng_packet("<", device, utc_ns, frame) for utc_ns, device, frame in every)
    elif form == "merged":
        content = pcap([PcapFrame(utc_ns, frame) for utc_ns, _, frame in every])
    else:
        head = {
            "sll": lambda device, frame: struct.pack(">HHH8s", 0, 1, 6, frame[6:14]) + frame[12:],
            "sll2": lambda device, frame: (
                frame[12:14] + struct.pack(">HIHBB8s", 0, device, 1, 0, 6, bytes(8)) + frame[14:]
            ),
        }[form]
        made = [PcapFrame(utc_ns, head(device, frame)) for utc_ns, device, frame in every]
        content = pcap(made, link={"sll": 113, "sll2": 276}[form])
    (tmp_path / "inner").write_bytes(pcap(SIDES[0]))
    (tmp_path / "outer").write_bytes(content)
    found, last, source = read(tmp_path / "inner", tmp_path / "outer")
    assert source.warnings
    if form in {"sll2", "ng"}:
        assert found == TRUTH
        assert last.totals.ledger.unmatched == source.discarded == 0
    else:
        assert found == []


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_a_capture_without_readable_packets(tmp_path, name):
    for one, side in zip(("inner", "outer"), SIDES, strict=True):
        (tmp_path / one).write_bytes(pcap(side))
    only = ng_section("<") + ng_interface("<", link=239) + ng_packet("<", 0, 5, bytes(60))
    (tmp_path / name).write_bytes(only)
    with pytest.raises(CaptureError, match=r"no packet in it can be read: 1 of link type 239 \(NFLOG\)"):
        read(tmp_path / "inner", tmp_path / "outer")
