"""`mace correct` corrects round trips in a tool's output with a capture."""

import json

import pytest

from mace import cli
from mace.tools.calibration import Calibration, PaceCost, PaceTerm, keep
from tests.made_capture import HEADER, capture_bytes
from tests.traffic import REPLY, REQUEST, Tape, topology

BEGIN_NS = HEADER.clock.monotonic_ns
OFFSET_NS = HEADER.clock.offset_ns
COUNT = 20


def said(count=COUNT, stamped=True):
    """Return ping's lines, printed 50 µs after each reply, 0.1 s apart."""
    lines = ["PING 203.0.113.2 (203.0.113.2) 56(84) bytes of data."]
    for n in range(count):
        printed_ns = BEGIN_NS + OFFSET_NS + n * 100_000_000 + 150_000
        stamp = f"[{printed_ns // 10**9}.{printed_ns % 10**9 // 1000:06d}] " if stamped else ""
        lines.append(f"{stamp}64 bytes from 203.0.113.2: icmp_seq={n + 1} ttl=63 time=0.{100 + n % 7} ms")
    lines += ["", "--- 203.0.113.2 ping statistics ---"]
    lines.append(f"{count + 1} packets transmitted, {count} received, 4% packet loss, time 2000ms")
    return "\n".join(lines) + "\n"


def capture(path, containers=(1,)):
    """Return the packets of these lines: a request's egress takes 50 µs, a reply's ingress 5 µs."""
    tape = Tape()
    for n in range(COUNT):
        begin = BEGIN_NS + n * 100_000_000
        for c in containers:
            late = 10_000_000 * (c - 1)
            tape.packet(REQUEST, begin + 10_000 + late, skb=10 * c, n=c, step=10_000)
            tape.packet(REPLY + " c", begin + 90_000 + late, skb=10 * c + 1, n=c, step=1_000)
    path.write_bytes(capture_bytes([topology(from_ns=BEGIN_NS), tape.batch()]))
    return path


def correct(tmp_path, capsys, text, *options, containers=(1,)):
    (tmp_path / "said.txt").write_text(text)
    recorded = capture(tmp_path / "c.mace", containers)
    status = cli.main(["correct", str(tmp_path / "said.txt"), str(recorded), *options])
    return status, capsys.readouterr()


@pytest.mark.parametrize("stamped", [True, False])
def test_all_are_corrected(tmp_path, capsys, stamped):
    status, told = correct(tmp_path, capsys, said(stamped=stamped), "--json")
    assert status == 0, told.err
    found = json.loads(told.out)
    assert (found["tool"], found["container"], found["paired"], found["packets"]) == ("ping", "c1", COUNT, 2 * COUNT)
    assert found["unpaired"] == {"no_reply": 1}
    first = found["samples"][0]
    assert first == {
        "seq": 1, "stamp_utc_ns": first["stamp_utc_ns"], "duplicate": False, "reason": "paired",
        "tool_rtt_ns": 100_000, "host_rtt_lower_bound_ns": 44_000, "nic_rtt_ns": 22_000,
        "egress_ns": 50_000, "ingress_ns": 6_000, "grade": "buffer",
    }  # fmt: skip
    assert (first["stamp_utc_ns"] is not None) == stamped
    median = found["statistics"]["host_rtt_lower_bound_ns"]["median"]
    assert median["low"] <= median["estimate"] <= median["high"]
    assert found["ledger"]["records"] == COUNT * 21
    assert found["statistics"]["egress_ns"]["mean"]["estimate"] == 50_000


def test_the_table(tmp_path, capsys):
    status, told = correct(tmp_path, capsys, said() + "something else\n")
    assert status == 0
    lines = told.out.splitlines()
    assert lines[0] == "seq=1 tool=100.0 host≥44.0 nic=22.0 egress=50.0 ingress=6.0 µs buffer"
    assert lines[COUNT] == f"seq={COUNT + 1} not corrected · no reply: the tool saw none"
    rest = "\n".join(lines[COUNT + 1 :])
    assert "c1: 20 of 21 samples paired" in rest
    assert "of the host RTT only a lower bound is known" in " ".join(rest.split())
    assert "unpaired 1 · no reply: the tool saw none (seq 21)" in rest
    assert "not understood: 1 lines of the tool's output: 'something else'" in rest
    assert "ledger: records" in rest


def test_from_standard_input(tmp_path, capsys, monkeypatch):
    recorded = capture(tmp_path / "c.mace")
    monkeypatch.setattr("sys.stdin", iter(said().splitlines(keepends=True)))
    assert cli.main(["correct", "-", str(recorded), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paired"] == COUNT


def test_of_several_containers_one_is_named(tmp_path, capsys):
    status, told = correct(tmp_path, capsys, said(), containers=(1, 2))
    assert status == 2
    assert "several containers: c1 (40 packets), c2 (40 packets); --container" in told.err
    status, told = correct(tmp_path, capsys, said(), "--container", "c1", "--json", containers=(1, 2))
    assert json.loads(told.out)["paired"] == COUNT
    status, told = correct(tmp_path, capsys, said(), "--container", "c2", "--json", containers=(1, 2))
    assert json.loads(told.out)["paired"] == 0
    status, told = correct(tmp_path, capsys, said(), "--container", "c3", containers=(1, 2))
    assert "no container 'c3'" in told.err
    assert status == 2


def test_a_csv(tmp_path, capsys):
    rows = [f"{(BEGIN_NS + OFFSET_NS + n * 100_000_000) / 1e9:.9f},{n},0.120" for n in range(COUNT)]
    status, told = correct(tmp_path, capsys, "\n".join(["sent_utc_s,seq,rtt_ms", *rows]), "--json")
    assert status == 0
    found = json.loads(told.out)
    assert (found["tool"], found["paired"]) == ("request and response", COUNT)
    # The user's clock is read after netif_receive_skb, so the correction covers the time between the two.
    assert found["samples"][0]["ingress_ns"] == 6_000


@pytest.mark.parametrize(
    ("text", "why"), [("", "empty"), ("a\nb\n", "no known tool"), ("PING a (a) 56(84) bytes of data.\n..\n", "-i 0")]
)
def test_unreadable_output_is_refused(tmp_path, capsys, text, why):
    status, told = correct(tmp_path, capsys, text)
    assert status == 2
    assert why in told.err


def test_missing_files(tmp_path, capsys):
    assert cli.main(["correct", str(tmp_path / "none"), str(tmp_path / "c.mace")]) == 1
    assert "none: No such file" in capsys.readouterr().err


def test_a_calibration_of_the_recordings_host_gives_a_host_rtt(tmp_path, capsys, monkeypatch):
    """Its term is 10 µs and a host's round trip contains 6 events of 0.5 µs, so 7 µs are added to the bound."""
    monkeypatch.setenv("MACE_CALIBRATION", str(tmp_path / "calibration.json"))
    status, told = correct(tmp_path, capsys, said(), "--json")
    assert status == 0
    without = json.loads(told.out)
    assert without["host_path"] is None
    assert without["no_host_rtt"].endswith("no calibration is used: it has not been measured")

    clock = HEADER.clock.utc_ns // 10**9
    paces, terms = (PaceCost(0.1, 500, 400, 600, 6),), (PaceTerm(0.1, 10_000, 9_000, 11_000, 9),)
    keep(Calibration(HEADER.source, HEADER.host, HEADER.kernel, "any", clock, paces, terms))
    status, told = correct(tmp_path, capsys, said(), "--json")
    found = json.loads(told.out)
    assert (status, found["no_host_rtt"], found["no_tracer_cost"]) == (0, None, None)
    assert found["host_path"]["probed_by"] == found["host_path"]["tracer_cost_by"] == "calibration"
    assert found["host_path"]["added_ns"] == 7_000
    assert found["samples"][0]["host_rtt_ns"] == 44_000 + 7_000
    median = found["statistics"]["host_rtt_ns"]["median"]
    assert median["low"] < median["estimate"] < median["high"]

    keep(Calibration(HEADER.source, HEADER.host, HEADER.kernel, "any", clock, paces, (PaceTerm(1, 1, 1, 1, 9),)))
    assert "no term for the tool's pace, one every 100 ms" in correct(tmp_path, capsys, said(), "--json")[1].out
