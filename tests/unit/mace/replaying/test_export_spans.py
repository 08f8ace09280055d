"""`mace export otlp`, compared with the official messages of OpenTelemetry and with the engine's rows."""

import base64
import json
from collections import defaultdict
from dataclasses import replace

import pytest
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from contracts.clock import KernelClock
from contracts.schema import Delays, Segment
from correlator.engine import Engine, EngineConfig
from mace.cli import main
from tests.durations import MS
from tests.made_capture import HEADER, batches, capture_bytes
from tests.places import ROOT
from tests.traffic import REPLY, REQUEST, Tape, topology

START_NS = 50_000 * MS
IDS = ("traceId", "spanId", "parentSpanId")
EXAMPLE = ROOT / "docs/example.mace"


def scene():
    """Return records of two containers that ping, and of a packet that the kernel drops."""
    tape = Tape()
    tape.packet("R:out0 c", START_NS, skb=99)  # the stream begins before the first packet
    for i in range(6):
        at = START_NS + (200 + 10 * i) * MS
        tape.packet(REQUEST, at, skb=2 * i + 1, n=1 + i % 2, length=84, step=500)
        tape.packet(REPLY + " c", at + 100_000, skb=2 * i + 2, n=1 + i % 2, length=84, step=500)
    tape.packet("Q:eth0 X:eth0 r:veth2 R:veth2 k", START_NS + 1_500 * MS, skb=8_000, n=2, reason=6, cpu=1)
    return tape.batch()


def write(path, header=HEADER):
    path.write_bytes(capture_bytes([topology(), *batches(scene(), 64)], header))
    return path


def export(path, *options):
    out = path.with_suffix(".jsonl") if path != EXAMPLE else options[0]
    more = options if path != EXAMPLE else options[1:]
    assert main(["export", "otlp", str(path), "-o", str(out), "--force", *more]) == 0
    return out.read_bytes()


def recoded(value, code):
    """Return JSON whose identifiers are coded in another way."""
    if isinstance(value, dict):
        return {key: code(each) if key in IDS else recoded(each, code) for key, each in value.items()}
    return [recoded(each, code) for each in value] if isinstance(value, list) else value


def spans_of(data):
    """Return (attributes of the resource, span) of every span, each with its attributes as a dict."""
    found = []
    for line in data.splitlines():
        for each in json.loads(line)["resourceSpans"]:
            resource = attributes(each["resource"])
            for scope in each["scopeSpans"]:
                found += [(resource, span | {"attributes": attributes(span)}) for span in scope["spans"]]
    return found


def attributes(of):
    [[*values]] = [[(each["key"], each["value"]) for each in of["attributes"]]]
    return {key: int(told["intValue"]) if "intValue" in told else next(iter(told.values())) for key, told in values}


@pytest.fixture
def made(tmp_path):
    return write(tmp_path / "made.mace")


@pytest.mark.slow
def test_every_line_is_an_official_message(made, tmp_path):
    """In OTLP's JSON identifiers are hexadecimal, in protobuf's base64; else the two are the same."""
    lines = [*export(made).splitlines(), *export(EXAMPLE, tmp_path / "example.jsonl").splitlines()]
    for line in lines:
        assert len(line) < 1 << 20
        ours = json.loads(line)
        as_protobuf = recoded(ours, lambda text: base64.b64encode(bytes.fromhex(text)).decode())
        message = json_format.ParseDict(as_protobuf, TracesData())
        back = json_format.MessageToDict(message, use_integers_for_enums=True)
        assert recoded(back, lambda text: base64.b64decode(text).hex()) == ours
    assert len(lines) > 2


def test_spans_are_the_engines_rows(made):
    engine = Engine(HEADER.clock.offset_ns, EngineConfig())
    results = [*engine.feed(topology()), *engine.feed(scene()), engine.finish()]
    rows = Delays.concatenate([one.rows.delays for one in results])
    devices = results[-1].rows.devices
    expected = defaultdict(set)
    overhead = defaultdict(dict)
    for at in range(len(rows)):
        packet = f"{int(rows.packet[at]):#x}"
        begin, delay = int(rows.utc_ns[at]), int(rows.delay_ns[at])
        if rows.segment[at] == Segment.OVERHEAD:
            overhead[packet][{1: "egress", 2: "ingress"}[int(rows.direction[at])]] = delay
        else:
            expected[packet].add((devices[rows.device[at]].name, begin, begin + delay, int(rows.position[at])))
    spans = spans_of(export(made))
    roots = {span["traceId"]: span for _, span in spans if "parentSpanId" not in span}
    assert len(roots) == len(expected) == 13
    found = defaultdict(set)
    for _, span in spans:
        if "parentSpanId" not in span:
            continue
        root = roots[span["traceId"]]
        assert span["parentSpanId"] == root["spanId"]
        begin, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
        assert int(root["startTimeUnixNano"]) <= begin <= end <= int(root["endTimeUnixNano"])
        told = span["attributes"]
        assert told["mace.delay_ns"] == end - begin
        found[root["attributes"]["mace.packet"]].add((told["network.interface.name"], begin, end, told["mace.hop"]))
    assert found == expected
    for root in roots.values():
        told = root["attributes"]
        named = {
            way: told[f"mace.overhead.{way}_ns"] for way in ("egress", "ingress") if f"mace.overhead.{way}_ns" in told
        }
        assert named == overhead[told["mace.packet"]]
    assert len({span["spanId"] for _, span in spans}) == len(spans)


def test_replies_link_to_requests_and_drops_are_errors(made):
    roots = [span for _, span in spans_of(export(made)) if "parentSpanId" not in span]
    by_id = {(span["traceId"], span["spanId"]): span for span in roots}
    linked = [(span, by_id[link["traceId"], link["spanId"]]) for span in roots for link in span.get("links", [])]
    assert linked
    for reply, request in linked:
        assert (reply["attributes"]["mace.direction"], request["attributes"]["mace.direction"]) == ("ingress", "egress")
        assert int(request["startTimeUnixNano"]) < int(reply["startTimeUnixNano"])
    [dropped] = [span for span in roots if "status" in span]
    assert dropped["status"] == {"code": 2, "message": "dropped by the kernel, reason 6"}
    assert dropped["attributes"]["mace.drop_reason"] == 6


def test_resources_say_whose_a_span_is(made, tmp_path):
    spans = spans_of(export(made))
    root = next(resource for resource, span in spans if "parentSpanId" not in span)
    assert root["service.name"] == root["container.name"]
    assert {resource["service.name"] for resource, _ in spans} == {"c1", "c2"}
    assert {resource["host.name"] for resource, _ in spans} == {HEADER.host}
    kernel = KernelClock("unsynchronised", 16_000_000_000, 5)
    header = replace(HEADER, clock=replace(HEADER.clock, kernel=kernel))
    resource, _ = spans_of(export(write(tmp_path / "k.mace", header)))[0]
    assert (resource["mace.clock.state"], resource["mace.clock.max_error_ns"]) == ("unsynchronised", 16_000_000_000)


def test_identifiers_depend_on_the_recording_alone(made, tmp_path):
    first = export(made)
    assert export(made) == first
    other = spans_of(export(write(tmp_path / "b.mace", replace(HEADER, run="another"))))
    assert not {span["traceId"] for _, span in other} & {span["traceId"] for _, span in spans_of(first)}


def test_packets_are_chosen_as_for_perfetto(made, capsys):
    whole = spans_of(export(made, "--json"))
    told = json.loads(capsys.readouterr().out)
    assert (told["traces"], told["spans"]) == (13, len(whole))
    assert told["ledger"]["records"] == len(scene())
    packet = whole[0][1]["attributes"]["mace.packet"]
    one = [span for _, span in spans_of(export(made, "--packet", packet)) if "parentSpanId" not in span]
    assert packet in {span["attributes"]["mace.packet"] for span in one}
    assert len(one) <= 2
    worst = [span for _, span in spans_of(export(made, "--worst", "1")) if "parentSpanId" not in span]
    assert 1 <= len(worst) <= 2
    assert all(
        resource.get("container.name", "c2") == "c2" or "parentSpanId" in span
        for resource, span in spans_of(export(made, "--flow", "container=c2"))
    )
    assert export(made, "--between", "+100s,+200s") == b""
    assert main(["export", "otlp", str(made), "-o", str(made), "--worst", "0"]) == 2
    assert main(["export", "otlp", str(made), "-o", str(made)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert not made.with_name(made.name + ".part").exists()
