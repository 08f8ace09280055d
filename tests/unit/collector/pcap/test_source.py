"""Pairs of packet captures: packets are matched with their delays, and ambiguous ones are left out."""

import struct

import numpy as np
import pytest

from collector.files import PCAP_PAIR, FileOptions, recording, recording_of, sniff
from collector.pcap.file import PcapFile
from collector.pcap.pairs import INNER, OUTER, Pairing
from collector.pcap.source import PcapPairReader
from contracts.errors import CaptureError
from contracts.schema import Direction, Segment
from correlator.engine import Engine, EngineConfig
from tests.made_pcap import PcapFrame, pcap, pcapng, through_nat, udp_frames, written

T = 1_700_000_000 * 10**9


def engine_results(source):
    """Run the engine over a reader; returns (header, all results)."""
    with source as reader:
        engine = Engine(reader.header.clock.offset_ns, EngineConfig())
        results = []
        for item in reader.items():
            results += engine.feed(item)
        results.append(engine.finish())
        return reader.header, results


def overheads(results):
    """Return (UTC, direction, delay) of each packet."""
    rows = []
    for one in results:
        whole = one.rows.delays.segment == Segment.OVERHEAD
        columns = (one.rows.delays.utc_ns, one.rows.delays.direction, one.rows.delays.delay_ns)
        rows += zip(*(column[whole].tolist() for column in columns), strict=True)
    return sorted(rows)


@pytest.fixture
def pair(tmp_path):
    def make(inner, outer, **options):
        for name, content in (("inner", inner), ("outer", outer)):
            (tmp_path / f"{name}.pcap").write_bytes(content)
        return PcapPairReader(tmp_path / "inner.pcap", tmp_path / "outer.pcap", FileOptions(**options))

    return make


def traffic(count=3000, seed=1):
    """Return frames at both devices with their times, two of three outgoing, and the true delays."""
    frames, t = udp_frames(count, seed)
    delay = np.random.default_rng(seed).integers(1_000, 40_000, count)
    out = np.arange(count) % 3 > 0
    t_inner = np.where(out, t, t + delay)
    t_outer = np.where(out, t + delay, t)
    inner_frames, outer_frames = frames.copy(), through_nat(frames)
    # Another host sent the incoming packets.
    inner_frames[~out, 6:12] = [2, 0, 0, 0, 0, 9]
    truth = sorted(
        zip(t.tolist(), np.where(out, Direction.EGRESS, Direction.INGRESS).tolist(), delay.tolist(), strict=True)
    )
    a, b = np.argsort(t_inner, kind="stable"), np.argsort(t_outer, kind="stable")
    return (inner_frames[a], t_inner[a]), (outer_frames[b], t_outer[b]), truth


def test_every_packet_is_found_with_its_delay_and_direction(pair):
    inner, outer, truth = traffic()
    source = pair(written(*inner), written(*outer))
    header, results = engine_results(source)
    assert overheads(results) == truth
    last = results[-1]
    assert last.totals.grades.content == len(truth) == source.pairs
    assert last.totals.grades.exact == last.totals.grades.buffer == 0
    assert last.totals.ledger.unmatched == last.totals.ledger.discarded == 0
    assert header.source == "pcap"
    assert source.warnings == []
    assert source.bytes_read == source.bytes_total


def rows(frames, utc_ns):
    return [PcapFrame(int(t), frame.tobytes()) for frame, t in zip(frames, utc_ns, strict=True)]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("write", "options", "step_ns"),
    [
        (pcap, {"unit": "ns"}, 1),
        (pcap, {"unit": "us"}, 1000),
        (pcapng, {"tsresol": 9}, 1),
        (pcapng, {"tsresol": None}, 1000),
        (pcapng, {"tsresol": 9, "offset_s": 1_600_000_000}, 1),
        (pcapng, {"tsresol": 0x80 | 30}, 1),
        (pcapng, {"tsresol": 12}, 1),
        (pcapng, {"tsresol": 9, "interfaces": 3}, 1),
    ],
)
def test_formats_clocks_and_byte_orders(pair, order, write, options, step_ns):
    inner, outer, truth = traffic(600)
    if options.get("tsresol") == 12:
        options = {**options, "offset_s": 1_699_999_000}
    source = pair(write(rows(*inner), order=order, **options), write(rows(*outer), order=order, **options))
    assert sniff(source._paths[0]).name == "pcap"
    _, results = engine_results(source)
    found = overheads(results)
    assert len(found) == len(truth)
    for (utc, way, delay), (true_utc, true_way, true_delay) in zip(found, truth, strict=True):
        assert way == true_way
        assert abs(utc - true_utc) <= step_ns
        assert abs(delay - true_delay) <= step_ns


def cooked(frame, outgoing):
    return struct.pack("!HHH8s2s", 4 if outgoing else 0, 1, 6, frame[6:14], frame[12:14]) + frame[14:]


def test_cooked_and_raw_captures(pair):
    inner, outer, truth = traffic(300)
    raw = [PcapFrame(one.utc_ns, one.data[14:]) for one in rows(*outer)]
    sll = [PcapFrame(one.utc_ns, cooked(one.data, outgoing=True)) for one in rows(*inner)]
    source = pair(pcap(sll, link=113), pcap(raw, link=101))
    assert overheads(engine_results(source)[1]) == truth


def test_packets_that_are_in_one_file_only(pair):
    inner, outer, truth = traffic(300)
    source = pair(written(inner[0][5:], inner[1][5:]), written(outer[0][:-7], outer[1][:-7]))
    _, results = engine_results(source)
    kept = overheads(results)
    assert set(kept) < set(truth)
    assert len(kept) == source.pairs
    ledger = results[-1].totals.ledger
    assert ledger.unmatched == source.packets - 2 * source.pairs > 0
    assert ledger.records == ledger.matched + ledger.unmatched


def repeated(times, frame):
    return [PcapFrame(T + t, frame) for t in times]


FRAME = udp_frames(1)[0][0].tobytes()


def test_repeated_content_is_paired_by_time(pair):
    # A retransmitted request has unchanged content.
    source = pair(
        pcap(repeated([0, 10**6, 2 * 10**6], FRAME)), pcap(repeated([900, 10**6 + 500, 2 * 10**6 + 700], FRAME))
    )
    found = overheads(engine_results(source)[1])
    assert [delay for _, _, delay in found] == [900, 500, 700]


def test_ambiguous_content_is_left_out(pair):
    # Two equal packets in flight at once: their order at the outer device is unknown.
    source = pair(pcap(repeated([0, 100, 10**9], FRAME)), pcap(repeated([1000, 1100, 10**9 + 5], FRAME)))
    header, results = engine_results(source)
    assert [delay for _, _, delay in overheads(results)] == [5]
    assert any("2 packets cannot be told from others with the same content" in line for line in source.warnings)
    assert results[-1].totals.ledger.unmatched == 4
    assert header.clock.offset_ns == 0


def test_equal_times_go_the_way_of_their_sender(pair):
    inner, outer, truth = traffic(300)
    first = (inner[0].copy(), inner[1].copy())
    ms = lambda t: t // 1_000_000 * 1_000_000  # noqa: E731
    coarse = pair(written(first[0], ms(first[1])), written(outer[0], ms(outer[1])))
    _, results = engine_results(coarse)
    found = overheads(results)
    assert len(found) > len(truth) * 0.9
    ways = [way for _, way, _ in found]
    assert 0.6 < ways.count(Direction.EGRESS) / len(ways) < 0.72
    assert {delay for _, _, delay in found} <= {0, 1_000_000}


def test_a_packet_whose_content_was_cut_off_has_no_partner(pair):
    inner, outer, _ = traffic(60)
    source = pair(pcap(rows(*inner), snap=40), pcap(rows(*outer)))
    _, results = engine_results(source)
    assert overheads(results) == []
    assert results[-1].totals.ledger.unmatched == 120


def test_batch_boundaries_change_nothing(tmp_path):
    inner, outer, _ = traffic(2000)
    found = []
    for step in (50, 313, 2000):
        pairing = Pairing(500_000)
        parts, newest = [], [-(1 << 62)] * 2
        streams = [columns(tmp_path / "x.pcap", *side) for side in (inner, outer)]
        for at in range(0, 2000, step):
            for file in (INNER, OUTER):
                piece = streams[file][at : at + step]
                pairing.push(file, piece)
                newest[file] = int(piece.utc_ns[-1])
            parts.append(pairing.take(min(newest)))
        parts.append(pairing.take(1 << 62))
        rows_ = []
        for part in parts:
            if part is not None:
                rows_ += zip(part.packets.utc_ns.tolist(), part.file.tolist(), part.partner_ns.tolist(), strict=True)
        found.append(rows_)
        assert [row[0] for row in rows_] == sorted(row[0] for row in rows_)
        assert len(rows_) == 4000
    assert found[0] == found[1] == found[2]


def columns(path, frames, utc_ns):
    """Return the packets of a made file as columns."""
    path.write_bytes(written(frames, utc_ns))
    with PcapFile(path) as file:
        (found,) = file.pieces()
    return found


def test_one_capture_alone_is_refused(tmp_path):
    (tmp_path / "a.pcap").write_bytes(pcap([]))
    with pytest.raises(CaptureError, match="give two: `mace replay --inner FILE --outer FILE`"):
        recording(tmp_path / "a.pcap")


def test_as_a_recording(tmp_path):
    inner, outer, truth = traffic(100)
    paths = tmp_path / "i.pcap", tmp_path / "o.pcap"
    paths[0].write_bytes(written(*inner))
    paths[1].write_bytes(written(*outer))
    one = recording_of(PCAP_PAIR, paths)
    assert one.first_utc_ns == truth[0][0]
    assert one.bytes_total == sum(path.stat().st_size for path in paths)
    assert len(overheads(engine_results(one.reader())[1])) == 100


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pcap([])[:20], "cut inside its header"),
        (pcap([], link=147), "link type 147"),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 3, 0, 0, 0, 1, 1), "version 3.0"),
        (pcap([PcapFrame(T, FRAME)])[:-1], "a packet is cut"),
        (pcap([PcapFrame(T, FRAME)]) + struct.pack("<IIII", 1, 1, 2**31, 2**31), "cut|packet of 2147483648 bytes"),
        (pcapng([PcapFrame(T, FRAME)])[:-3], "a block is cut"),
        (pcapng([]) + struct.pack("<III", 6, 7, 7), "a block of 7 bytes"),
        (pcapng([PcapFrame(T, FRAME)], interfaces=0), "a packet of interface 0"),
        (pcapng([], tsresol=100), r"10\^100 ticks"),
    ],
)
def test_damaged_captures(pair, content, why):
    source = pair(content, pcap([PcapFrame(T, FRAME)]))
    with pytest.raises(CaptureError, match=why):
        engine_results(source)


def test_the_first_packet_is_the_damaged_one(pair):
    source = pair(pcapng([PcapFrame(T, FRAME)], interfaces=0), pcap([PcapFrame(T, FRAME)]), salvage=True)
    assert not any(overheads([one]) for one in engine_results(source)[1])
    assert any("a packet of interface 0" in line for line in source.warnings)


@pytest.mark.parametrize("write", [pcap, pcapng])
def test_salvage_reads_the_sound_part(pair, write):
    inner, outer, truth = traffic(300)
    content = write(rows(*inner))
    source = pair(content[: len(content) * 2 // 3], write(rows(*outer)), salvage=True)
    _, results = engine_results(source)
    found = overheads(results)
    assert set(found) < set(truth)
    assert len(found) > 150
    assert any("left out" in line for line in source.warnings)
