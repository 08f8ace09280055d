"""Recorded outputs of tools are parsed as before, and are corrected with the packets captured at the same time."""

import json
import re
from pathlib import Path

import pytest

from contracts.errors import UsageError
from mace import cli
from mace.tools.output import READERS, read

HERE = Path(__file__).parent / "tool-output"
FORMS = json.loads((HERE / "forms.json").read_text())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["command"])
def test_forms(form):
    wanted = form["read"]
    if "refused" in wanted:
        with pytest.raises(UsageError, match=re.escape(wanted["refused"])):
            read(form["printed"])
        return
    samples, reader = read(form["printed"])
    assert {
        "tool": reader.stamps.name,
        "samples": len(samples),
        "replies": int((samples.rtt_ns >= 0).sum()),
        "left_out": sum(reader.left_out.values()),
        "not_understood": reader.unknown.count,
    } == wanted


def corrected(capsys, output, capture, *options):
    """Run `mace correct`; returns its JSON (None if it refuses) and its standard error."""
    argv = ["correct", "--container", "c1", "--json", str(output), str(HERE / capture), *options]
    status = cli.main(argv)
    told = capsys.readouterr()
    assert status == (0 if told.out else 2)
    return (json.loads(told.out), told.err) if told.out else (None, told.err)


def rtts(found):
    return [row["tool_rtt_ns"] for row in found["samples"]]


def reasons(found):
    return {row["seq"]: row["reason"] for row in found["samples"]}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("p", [81_000, 87_000, 90_000]), ("v", [78_000, 84_000, 93_000]), ("R", [78_000, 85_000])],
)
def test_other_lines_around_a_reply_change_nothing(capsys, name, wanted):
    found, _ = corrected(capsys, HERE / f"{name}.txt", "tools.mace")
    assert (rtts(found), found["paired"], found["not_understood"]) == (wanted, len(wanted), 0)
    assert found == corrected(capsys, HERE / f"{name}.txt", "tools.mace", "--tool", "ping")[0]


def test_lines_of_stderr_may_come_first(capsys, tmp_path):
    mixed = tmp_path / "b.txt"
    mixed.write_text("WARNING: pinging broadcast address\nwhat is this\n" + (HERE / "p.txt").read_text())
    found, _ = corrected(capsys, mixed, "tools.mace")
    assert (found["paired"], found["not_understood"]) == (3, 1)


def test_quiet_output_is_refused_with_the_reason(capsys):
    found, complaint = corrected(capsys, HERE / "q.txt", "tools.mace")
    assert found is None
    assert "ping -q prints no line for a reply" in complaint


@pytest.mark.slow
def test_an_untimed_reply_leaves_its_neighbours_paired(capsys, tmp_path):
    """A reader that ignored the untimed reply could shift the packets of replies 8 and 9 by one."""
    whole, _ = corrected(capsys, HERE / "ping.txt", "ftrace.mace")
    assert reasons(whole) == {n: "no_request" if n == 1 else "paired" for n in range(1, 121)}
    text = (HERE / "ping.txt").read_text()
    for name, expression, with_what in (
        ("truncated", r"(icmp_seq=7 ttl=63) time=\S+ ms", r"\1 (truncated)"),
        ("damaged", r"(icmp_seq=7 ttl=63 time=\S+ ms)", r"\1 (BAD CHECKSUM!)"),
        ("cut", r"(icmp_seq=7 ttl=63) time=(\S)\S+ ms", r"\1 time=\2"),
    ):
        changed = tmp_path / f"{name}.txt"
        changed.write_text(re.sub(expression, with_what, text))
        found, _ = corrected(capsys, changed, "ftrace.mace")
        assert reasons(found) == reasons(whole) | {7: "no_time"}
        others = [row for row in found["samples"] if row["seq"] != 7]
        assert others == [row for row in whole["samples"] if row["seq"] != 7]
        assert found["unpaired"] == {"no_request": 1, "no_time": 1}


@pytest.mark.parametrize("loss", ["1.66667%", "5e-05%", "1,66667%", "+3 errors, 1.7%"])
def test_requests_are_counted_however_the_loss_is_written(capsys, tmp_path, loss):
    lines = (HERE / "ping.txt").read_text().splitlines()
    kept = [line for line in lines if "icmp_seq=119 " not in line and "icmp_seq=120 " not in line]
    summary = next(i for i, line in enumerate(kept) if "transmitted" in line)
    kept[summary] = f"120 packets transmitted, 118 received, {loss} packet loss, time 18000ms"
    changed = tmp_path / "lost.txt"
    changed.write_text("\n".join(kept))
    found, _ = corrected(capsys, changed, "ftrace.mace")
    assert (len(found["samples"]), found["unpaired"]["no_reply"], found["not_understood"]) == (120, 2, 0)
    assert [seq for seq, reason in reasons(found).items() if reason == "no_reply"] == [119, 120]


def test_a_ping_that_counts_from_zero(capsys):
    found, _ = corrected(capsys, HERE / "e.txt", "ftrace.mace")
    assert (found["tool"], len(found["samples"]), found["not_understood"]) == ("ping of inetutils", 120, 0)
    assert [seq for seq, reason in reasons(found).items() if reason == "no_reply"] == [0, 118, 119]


def test_names_and_addresses_of_fping(capsys):
    found, _ = corrected(capsys, HERE / "fAn.txt", "tools.mace")
    assert (found["tool"], rtts(found)) == ("fping", [95_000, 18_000, 6_000])
    samples, _ = read((HERE / "fAn.txt").read_text().splitlines())
    assert set(samples.request_len) == {84}


def test_dig_with_one_answer_over_tcp(capsys):
    found, _ = corrected(capsys, HERE / "digall.txt", "dig.mace")
    assert rtts(found) == [448_000, 237_000]
    assert [row["seq"] for row in found["samples"]] == [0, 2]
    assert found["left_out"] == {"over TCP: what dig measures can be corrected over UDP alone": 1}
    assert corrected(capsys, HERE / "dig4.txt", "dig.mace")[0]["samples"][0]["tool_rtt_ns"] == 363_000
    alone, complaint = corrected(capsys, HERE / "dig2.txt", "dig.mace")
    assert alone is None
    assert "over TCP" in complaint


@pytest.mark.parametrize(
    ("name", "tool", "unpaired", "left_out"),
    [
        ("inetutils", "ping of inetutils", {}, 0),
        ("busybox", "ping of busybox", {}, 0),
        ("fping", "fping", {}, 0),
        # ftrace's records cannot distinguish the truncated answer from dig's first answer.
        ("dig", "dig", {"ambiguous": 1}, 1),
        ("curl", "curl connect", {"no_reply": 1}, 2),
    ],
)
def test_in_a_lab(capsys, name, tool, unpaired, left_out):
    found, _ = corrected(capsys, HERE / "lab" / f"{name}.txt", f"lab/{name}.mace")
    assert (found["tool"], found["unpaired"], sum(found["left_out"].values())) == (tool, unpaired, left_out)
    assert found["paired"] == len(found["samples"]) - sum(unpaired.values())
    for row in found["samples"]:
        if row["reason"] == "paired":
            assert 0 < row["nic_rtt_ns"] < row["tool_rtt_ns"]
            assert row["host_rtt_lower_bound_ns"] + row["egress_ns"] + row["ingress_ns"] == row["tool_rtt_ns"]


def test_left_out_exchanges_are_reported(capsys):
    assert cli.main(["correct", str(HERE / "lab" / "curl.txt"), str(HERE / "lab" / "curl.mace")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left out 1 · a transfer with redirects (-L), of whose connections curl tells the sum" in said
    assert "left out 1 · a transfer over a connection that was there already, so nothing was measured" in said


def test_every_reader_has_a_golden_form():
    tools = {READERS[name]().stamps.name for name in READERS} - {"request and response", "ping -U"}
    assert tools == {form["read"]["tool"] for form in FORMS if "tool" in form["read"]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark(capsys, tmp_path, encoding):
    """PowerShell begins redirected output of `docker exec` with a byte order mark."""
    changed = tmp_path / "p.txt"
    changed.write_text((HERE / "p.txt").read_text(), encoding, newline="\r\n")
    assert corrected(capsys, changed, "tools.mace") == corrected(capsys, HERE / "p.txt", "tools.mace")
