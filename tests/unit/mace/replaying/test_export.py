"""`mace export perfetto`, checked with SQL in the real trace processor: what a user finds in the Perfetto UI."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from contracts.records import Batch, Content, Flag
from contracts.schema import Delays, Segment, Window
from correlator.engine import Engine, EngineConfig
from mace.cli import main
from tests import trace_processor
from tests.durations import MS
from tests.made_capture import HEADER, batches, capture_bytes
from tests.made_results import with_totals
from tests.places import GOLDEN
from tests.traffic import REPLY, REQUEST, Tape, topology

pytestmark = pytest.mark.needs("trace_processor")

START_NS = 50_000 * MS
OFFSET_NS = HEADER.clock.offset_ns
FILES = GOLDEN / "perfetto-1"

ERRORS = "select name, value from stats where value > 0 and severity in ('error', 'data_loss')"
SLICES = """
    select s.id, s.ts, s.dur, s.name, s.category, t.name as track, p.name as parent,
      extract_arg(s.arg_set_id, 'debug.packet') as packet, extract_arg(s.arg_set_id, 'debug.delay_ns') as delay_ns,
      extract_arg(s.arg_set_id, 'debug.direction') as direction,
      extract_arg(s.arg_set_id, 'debug.container') as container,
      extract_arg(s.arg_set_id, 'debug.counts_as') as counts_as, extract_arg(s.arg_set_id, 'debug.grade') as grade,
      extract_arg(s.arg_set_id, 'debug.l3_len') as l3_len, extract_arg(s.arg_set_id, 'debug.outcome') as outcome,
      extract_arg(s.arg_set_id, 'debug.hop') as hop, extract_arg(s.arg_set_id, 'debug.drop_reason') as drop_reason,
      extract_arg(s.arg_set_id, 'debug.request') as request, extract_arg(s.arg_set_id, 'debug.told_by') as told_by,
      extract_arg(s.arg_set_id, 'debug.device') as device, extract_arg(s.arg_set_id, 'debug.skb_id') as skb_id
    from slice s join track t on s.track_id = t.id left join track p on t.parent_id = p.id order by s.ts, s.id
"""
FLOWS = "select slice_out, slice_in from flow order by id"
FOLLOWING = """
    select s.id, count(*) as following from slice s join following_flow(s.id) f
    where s.category = 'device' and extract_arg(s.arg_set_id, 'debug.hop') = 0
      and extract_arg(s.arg_set_id, 'debug.direction') = 'egress' group by s.id
"""
COUNTERS = """
    select c.ts, c.value, t.name as track, p.name as parent from counter c join track t on c.track_id = t.id
    left join track p on t.parent_id = p.id order by c.ts, t.name
"""
HOPS = ("device", "outside", "delivery")


def exchange(tape, at, n=1, length=84, skb=None):
    """Return a request and its reply, 100 µs later."""
    skb = skb or at
    tape.packet(
        REQUEST,
        START_NS + at,
        skb=skb,
        n=n,
        length=length,
        step=[0, 300, 900, 1_500, 2_000, 4_000, 4_600, 5_000, 5_300, 5_400],
    )
    tape.packet(REPLY + " c", START_NS + at + 100_000, skb=skb + 1, n=n, length=length, step=500)


def scene():
    """Write a capture: two containers ping, one packet is dropped, two cross at once, and there is a gap."""
    tape = Tape()
    tape.packet("R:out0 c", START_NS, skb=99)  # the stream begins before the first packet
    for i in range(10):
        exchange(tape, 200 * MS + i * 10 * MS)
    exchange(tape, 1_300 * MS, n=2)
    exchange(tape, 1_300 * MS + 1_000, n=1, skb=7_000)
    tape.packet("Q:eth0 X:eth0 r:veth2 R:veth2 k", START_NS + 1_500 * MS, skb=8_000, n=2, reason=6, cpu=1)
    tape.gap(START_NS + 1_600 * MS, START_NS + 1_700 * MS, lost=12, cpu=1)
    exchange(tape, 2_500 * MS, n=2, length=1_500)
    return tape.batch()


def write(place, batch, name="made.mace", header=HEADER):
    path = place / name
    path.write_bytes(capture_bytes([topology(), *batches(batch, 64)], header))
    return path


def export(path, *options, out=None):
    """Export a trace; returns its bytes and the command's JSON."""
    out = out or (path[0] if isinstance(path, list) else path).with_suffix(".pftrace")
    files = path if isinstance(path, list) else [path]
    assert main(["export", "perfetto", *map(str, files), "-o", str(out), "--force", *options]) == 0
    return out.read_bytes()


def engine_results(batch):
    engine = Engine(OFFSET_NS, EngineConfig())
    results = [*engine.feed(topology()), *engine.feed(batch), engine.finish()]
    return results, Delays.concatenate([one.rows.delays for one in results])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Provide errors, slices, flows and counters of the whole scene, and the number of slices after each packet's
    first.
    """
    path = write(tmp_path_factory.mktemp("export"), scene())
    return trace_processor.ask(export(path), ERRORS, SLICES, FLOWS, COUNTERS, FOLLOWING)


@pytest.mark.slow
def test_the_trace_processor_reports_no_errors(made):
    assert made[0] == []


@pytest.mark.slow
def test_each_delay_is_a_slice_with_its_figures(made):
    _, slices, *_ = made
    _, delays = engine_results(scene())
    found = sorted(
        (s["ts"], s["dur"], s["delay_ns"], int(s["packet"]) & (1 << 64) - 1, s["hop"], s["l3_len"])
        for s in slices
        if s["category"] in (*HOPS, "overhead")
    )
    columns = (delays.utc_ns, delays.delay_ns, delays.delay_ns, delays.packet, delays.position, delays.l3_len)
    assert found == sorted(zip(*(column.tolist() for column in columns), strict=True))
    assert len(found) > 100
    assert {s["grade"] for s in slices if s["category"] in HOPS} == {"buffer"}


def test_a_track_for_host_container_and_device(made):
    _, slices, *_ = made
    tracks = {(s["parent"], s["track"]) for s in slices}
    host = f"host {HEADER.host}"
    assert tracks >= {
        *((f"container {c}", name) for c in ("c1", "c2") for name in ("eth0", "whole path")),
        *((host, name) for name in ("veth1", "veth2", "br0", "out0", "far: rem0", "lost records")),
        ("records", "CPU 0"),
    }
    mine = [s for s in slices if s["category"] == "overhead"]
    assert {(s["name"], s["track"]) for s in mine} == {
        (f"{c} {way} overhead", "whole path") for c in ("c1", "c2") for way in ("egress", "ingress")
    }


def test_slices_on_one_track_never_overlap(made):
    _, slices, *_ = made
    # At 1.3 s two packets are at br0 at once, on two tracks with the same name.
    at_bridge = [s for s in slices if s["track"] == "br0"]
    overlapping = [
        (a["id"], b["id"])
        for a in at_bridge
        for b in at_bridge
        if a["id"] < b["id"] and a["ts"] <= b["ts"] < a["ts"] + a["dur"]
    ]
    assert overlapping
    assert all(s["dur"] >= 0 for s in slices)  # -1: the slice has no end, because it was nested as a parent


def test_an_arrow_follows_each_packet_and_its_reply(made):
    _, slices, flows, _, following = made
    by_id = {s["id"]: s for s in slices}
    after = {f["slice_out"]: f["slice_in"] for f in flows}
    assert len(after) == len(flows)
    starts = set(after) - set(after.values())
    ways = []
    for start in starts:
        way = [by_id[start]]
        while way[-1]["id"] in after:
            way.append(by_id[after[way[-1]["id"]]])
        assert [s["ts"] for s in way] == sorted(s["ts"] for s in way)
        ways.append([(s["direction"], s["track"]) for s in way])
    out = [("egress", name) for name in ("eth0", "{}", "br0", "out0", "far: rem0")]
    back = [("ingress", name) for name in ("far: rem0", "out0", "br0", "{}", "eth0")]
    expected = [[(d, name.format(v)) for d, name in out + back] for v in ["veth1"] * 11 + ["veth2"] * 2]
    expected.append([("egress", "eth0"), ("egress", "veth2")])  # the dropped packet
    assert sorted(ways) == sorted(expected)
    # The UI's query for a selected slice.
    assert sorted(row["following"] for row in following) == sorted(len(way) - 1 for way in expected)


def test_replies_name_their_requests(made):
    _, slices, *_ = made
    hops = [s for s in slices if s["category"] in HOPS]
    told = {s["packet"]: (s["request"], s["told_by"], s["direction"]) for s in hops}
    replies = {packet: one for packet, one in told.items() if one[0] is not None}
    assert len(replies) == 13
    for request, told_by, direction in replies.values():
        assert told[request][2] == "egress"
        assert (told_by, direction) == ("turns", "ingress")


def test_a_dropped_packet_has_its_reason(made):
    _, slices, *_ = made
    dropped = [s for s in slices if s["outcome"] == "dropped"]
    assert {s["track"] for s in dropped} == {"eth0", "veth2"}
    assert {s["drop_reason"] for s in dropped} == {6}
    assert all(s["drop_reason"] is None for s in slices if s["outcome"] == "consumed")


def test_every_record_is_an_instant_of_its_cpu_and_packet(made):
    _, slices, *_ = made
    batch = scene()
    instants = [s for s in slices if s["category"] == "record"]
    assert [s["ts"] for s in instants] == (batch.ts_ns + OFFSET_NS).tolist()
    assert [s["track"] for s in instants] == [f"CPU {cpu}" for cpu in batch.cpu.tolist()]
    of_hops = {s["packet"] for s in slices if s["category"] in HOPS}
    owned = [s for s in instants if s["packet"] is not None]
    assert {s["packet"] for s in owned} == of_hops
    # All records but those of an earlier packet and the gap's marker.
    assert len(owned) == len(batch) - 3
    by_packet = {}
    for one in owned:
        by_packet.setdefault(one["packet"], set()).add(one["skb_id"])
    assert all(len(buffers) == 1 for buffers in by_packet.values())
    assert {s["name"] for s in instants} >= {"net_dev_queue", "netif_rx", "kfree_skb", "lost"}


def test_lost_records_are_a_slice(made):
    _, slices, *_ = made
    (gap,) = [s for s in slices if s["category"] == "lost"]
    assert (gap["ts"] - OFFSET_NS - START_NS, gap["dur"]) == (1_600 * MS, 100 * MS)


def test_counters_have_the_windows_and_the_ledger(made):
    *_, counters, _ = made
    results, _ = engine_results(scene())
    windows: list[Window] = [w for one in results for w in one.rows.windows if w.width_s == 1]
    overheads = sorted(
        (w.start_utc_ns, w.p50_ns) for w in windows if w.segment is Segment.OVERHEAD and w.direction == 1
    )
    found = sorted((c["ts"], c["value"]) for c in counters if c["track"] == "overhead egress p50" and c["value"])
    assert found == overheads
    zeros = [c["ts"] for c in counters if c["track"] == "overhead egress packets" and not c["value"]]
    assert zeros  # without packets, the old quantile does not continue
    ledger = results[-1].totals.ledger.as_dict()
    last = {c["track"]: c["value"] for c in counters if c["parent"] == "ledger"}
    assert last == {name.replace("_", " "): count for name, count in ledger.items()}


def test_batch_boundaries_change_no_byte(tmp_path):
    batch = scene()
    first = export(write(tmp_path, batch, "a.mace"), out=tmp_path / "a.pftrace")
    path = tmp_path / "b.mace"
    path.write_bytes(capture_bytes([topology(), *batches(batch, 7)], HEADER))
    assert export(path, out=tmp_path / "b.pftrace") == first


def packets_of(raw):
    errors, slices = trace_processor.ask(raw, ERRORS, SLICES)
    assert errors == []
    return [s for s in slices if s["category"] in HOPS], [s for s in slices if s["category"] == "record"]


@pytest.mark.slow
def test_worst_takes_the_slowest_packets_and_their_replies(tmp_path, capsys):
    tape = Tape()
    tape.packet("R:out0 c", START_NS, skb=99)
    for i in range(8):
        exchange(tape, 200 * MS + i * 10 * MS)
    slow = START_NS + 400 * MS
    tape.packet(REQUEST, slow, skb=1, step=9_000)
    tape.packet(REPLY + " c", slow + 200_000, skb=2)
    path = write(tmp_path, tape.batch())
    hops, instants = packets_of(export(path, "--worst", "1", "--json"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len({s["packet"] for s in hops}) == told["packets"] == 2
    assert min(s["ts"] for s in hops) == slow + OFFSET_NS
    assert {s["direction"] for s in hops} == {"egress", "ingress"}
    assert {s["packet"] for s in instants} == {s["packet"] for s in hops}
    assert told["ledger"]["records"] == len(tape)  # counters cover all packets, also those that are not shown


@pytest.mark.slow
def test_one_packet_by_its_number(tmp_path, capsys):
    path = write(tmp_path, scene())
    _, delays = engine_results(scene())
    packet = int(delays.packet[-1])
    hops, _ = packets_of(export(path, "--packet", hex(packet)))
    assert packet in {s["packet"] & (1 << 64) - 1 for s in hops}
    assert len({s["packet"] for s in hops}) == 2
    assert main(["export", "perfetto", str(path), "-o", str(tmp_path / "x"), "--packet", "12345"]) == 2
    assert "no packet 0x3039" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def content(batch):
    """Return the content of the scene's packets: UDP of two ports, egress and ingress."""
    out = np.isin(batch.skb_id % 2, [0])
    return replace(
        batch,
        content=Content.of(
            len(batch),
            l4_proto=np.full(len(batch), 17),
            l4_src=np.where(out, 40_000, 4_000),
            l4_dst=np.where(out, 4_000, 40_000),
            flags=np.full(len(batch), Flag.FLOW),
        ),
    )


def read_by_protos(raw):
    """Return the arguments of hops and records, read without a trace processor."""
    names, texts, hops, instants = {}, {}, [], []
    packets = [
        inner
        for outer in protos.Trace.FromString(raw).packet
        for inner in protos.Trace.FromString(zlib.decompress(outer.compressed_packets)).packet
    ]
    for packet in packets:
        names |= {one.iid: one.name for one in packet.interned_data.debug_annotation_names}
        texts |= {one.iid: one.str.decode() for one in packet.interned_data.debug_annotation_string_values}
        event = packet.track_event
        told = {
            names[one.name_iid]: texts[one.string_value_iid] if one.string_value_iid else one.pointer_value
            for one in event.debug_annotations
        }
        if event.flow_ids:
            hops.append(told)
        elif event.type == event.TYPE_INSTANT:
            instants.append(told)
    return hops, instants


def test_flow_and_between_select_packets(tmp_path):
    given = scene()
    path = write(tmp_path, content(given[given.hook != 255]))
    cases = {
        ("--flow", "container=c2,direction=ingress"): {("c2", "ingress")},
        ("--flow", "proto=udp,port=4000,container=c1"): {("c1", "egress"), ("c1", "ingress")},
        ("--flow", "len=1500"): {("c2", "egress"), ("c2", "ingress")},
        ("--between", "+1.4s,+1600ms"): {("c2", "egress")},
    }
    for options, expected in cases.items():
        hops, instants = read_by_protos(export(path, *options))
        assert {(s["container"], s["direction"]) for s in hops} == expected, options
        assert {s["packet"] for s in instants} == {s["packet"] for s in hops}, options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--flow", "contaner=c1"), "did you mean 'container'"),
        (("--flow", "proto=quic"), "expected a number or one of"),
        (("--flow", "direction=up"), "egress or ingress"),
        (("--between", "+2s,+1s"), "not after the start"),
        (("--between", "yesterday"), "START,END"),
        (("--worst", "0"), "--worst 0"),
    ],
)
def test_wrong_choices(tmp_path, capsys, options, said):
    path = write(tmp_path, scene())
    assert main(["export", "perfetto", str(path), "-o", str(tmp_path / "x"), *options]) == 2
    assert said in capsys.readouterr().err


def test_an_existing_output_is_kept_without_force(tmp_path, capsys):
    path = write(tmp_path, scene())
    out = tmp_path / "there.pftrace"
    out.write_text("mine")
    assert main(["export", "perfetto", str(path), "-o", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_damaged_recording_leaves_no_half_trace(tmp_path, capsys):
    path = write(tmp_path, scene())
    raw = bytearray(path.read_bytes())
    raw[-200] ^= 1
    path.write_bytes(raw)
    out = tmp_path / "out.pftrace"
    assert main(["export", "perfetto", str(path), "-o", str(out)]) == 1
    assert "at byte" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main(["export", "perfetto", str(path), "-o", str(out), "--salvage"]) == 0
    assert "skipped" in capsys.readouterr().err


@pytest.mark.slow
def test_two_hosts_stand_side_by_side_in_utc(tmp_path):
    other = replace(HEADER, host="second.example", run="other", clock=replace(HEADER.clock, monotonic_ns=7))
    paths = [write(tmp_path, scene()), write(tmp_path, scene(), "other.mace", other)]
    raw = export(paths)
    errors, slices, hosts = trace_processor.ask(raw, ERRORS, SLICES, "select name from track where parent_id is null")
    assert errors == []
    assert sorted(row["name"] for row in hosts) == [f"host {HEADER.host}", "host second.example"]
    mine = sorted({s["ts"] for s in slices if s["category"] == "overhead"})
    assert mine[-1] - mine[0] > other.clock.offset_ns - OFFSET_NS


@pytest.mark.slow
def test_a_trace_of_traced_can_be_exported(tmp_path):
    out = tmp_path / "golden.pftrace"
    raw = export(FILES / "generic.pftrace", "--topology", str(FILES / "generic.mace"), out=out)
    hops, instants = packets_of(raw)
    expected = json.loads((FILES / "expected.json").read_text())["generic"]
    assert len({s["packet"] for s in hops}) == expected["packets"]
    assert len(instants) == expected["ledger"]["records"]
    pings = {s["packet"]: s["told_by"] for s in hops if s["l3_len"] == 84}
    assert list(pings.values()).count("turns") == 10


@pytest.mark.parametrize("name", ["perfetto-1/generic.pftrace", "perfetto-1/generic.mace"])
def test_the_second_reading_finds_the_worst_packets_of_any_file(tmp_path, name):
    path = FILES.parent / name
    topology = [] if path.suffix == ".mace" else ["--topology", str(path.with_suffix(".mace"))]
    hops, instants = read_by_protos(export(path, "--worst", "2", *topology, out=tmp_path / "worst.pftrace"))
    packets = {s["packet"] for s in hops}
    assert len(packets) == 4
    assert {s["packet"] for s in instants} == packets


@pytest.mark.slow
def test_waiting_batches_are_bounded():
    """Batches that no result settles are returned before memory runs out, without packets."""
    from mace.shown import timeline

    follower = timeline.PacketFollower(HEADER)
    engine = Engine(OFFSET_NS, EngineConfig())
    (results,) = [*engine.feed(topology()), engine.finish()]
    many = Batch.of(timeline._MOST_RECORDS + 5, ts_ns=np.arange(timeline._MOST_RECORDS + 5) + START_NS)
    follower.take(many)
    settled = follower.settle(with_totals(results, settled_utc_ns=0))
    assert len(settled.records) == follower.without_packet > timeline._MOST_RECORDS // 2
