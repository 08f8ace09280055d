"""Reading ping, fping and CSV files, and the messages about lines that are not understood."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import UsageError
from contracts.schema import NOT_TOLD
from correlator.stamps import FPING, PING, PING_USER, REQUEST_RESPONSE
from mace.tools.output import READERS, CsvOutput, FpingOutput, read
from mace.tools.ping_output import PingOutput, continued

# Lines of iputils 20221126, with other addresses.
PING4 = """\
PING 203.0.113.2 (203.0.113.2) 56(84) bytes of data.
[1760000000.123456] 64 bytes from 203.0.113.2: icmp_seq=1 ttl=63 time=0.094 ms
[1760000000.223400] 64 bytes from 203.0.113.2: icmp_seq=2 ttl=63 time=5.32 ms
[1760000000.223480] 64 bytes from 203.0.113.2: icmp_seq=2 ttl=63 time=5.41 ms (DUP!)
[1760000000.423480] no answer yet for icmp_seq=3
[1760000000.523480] From 198.51.100.1 icmp_seq=4 Destination Host Unreachable
[1760000000.723480] 64 bytes from far.example (203.0.113.2): icmp_seq=5 ttl=63 time=123 ms

--- 203.0.113.2 ping statistics ---
6 packets transmitted, 3 received, +1 duplicates, +1 errors, 50% packet loss, time 5013ms
rtt min/avg/max/mdev = 0.094/33.456/123.000/50.000 ms, pipe 2
"""
PING6 = """\
PING 2001:db8:ffff::2(2001:db8:ffff::2) from 2001:db8:1:1::2 eth0: 56 data bytes
64 bytes from 2001:db8:ffff::2: icmp_seq=1 ttl=63 time=12.3 ms
64 bytes from far.example (2001:db8:ffff::2): icmp_seq=2 ident=4711 ttl=63 time=0.101 ms

--- 2001:db8:ffff::2 ping statistics ---
2 packets transmitted, 2 received, 0% packet loss, time 1001ms
rtt min/avg/max/mdev = 0.101/6.200/12.300/6.099 ms
"""
FPING5 = """\
[1760000000.12346] 203.0.113.2 : [0], 64 bytes, 0.094 ms (0.094 avg, 0% loss)
[1760000001.12340] 203.0.113.2 : [1], timed out (0.094 avg, 50% loss)
[1760000002.12340] 203.0.113.2 : [2], 64 bytes, 1.25 ms (0.67 avg, 33% loss)

203.0.113.2 : xmt/rcv/%loss = 3/2/33%, min/avg/max = 0.094/0.67/1.25
"""
CSV = """\
sent_utc_s,id,seq,rtt_ms,protocol,request_bytes
1760000000.123456789,40001,1,0.094512,udp,60
1760000001.5,40002,2,,udp,60
1760000002,40003,3,1.5,17,
"""


def told(text, reader=None):
    return read(text.splitlines(keepends=True), reader)


def test_ping():
    samples, reader = told(PING4)
    assert (reader.stamps, reader.unknown.count) == (PING, 0)
    assert samples.seq.tolist() == [1, 2, 2, 5, 3, 4, 6]
    assert samples.rtt_ns.tolist() == [94_000, 5_320_000, 5_410_000, 123_000_000, -1, -1, -1]
    assert samples.resolution_ns.tolist()[:4] == [1_000, 6_000, 6_000, 501_000]
    assert samples.duplicate.tolist() == [False, False, True, *[False] * 4]
    assert samples.stamp_utc_ns.tolist()[:2] == [1_760_000_000_123_456_000, 1_760_000_000_223_400_000]
    assert set(samples.request_len[:4]) == set(samples.reply_len[:4]) == {84}
    assert set(samples.l4_proto[:4]) == {1}
    assert samples.l4_seq.tolist()[:4] == [1, 2, 2, 5]
    assert set(samples.l4_id) == {NOT_TOLD}


def test_ping_of_ipv6_without_times():
    samples, reader = told(PING6)
    assert reader.unknown.count == 0
    assert samples.rtt_ns.tolist() == [12_300_000, 101_000]
    assert set(samples.stamp_utc_ns) == {NOT_TOLD}
    assert set(samples.request_len) == set(samples.reply_len) == {104}
    assert samples.l4_id.tolist() == [NOT_TOLD, 4711]
    assert set(samples.l4_proto) == {58}


def test_ip_options_make_packets_longer():
    samples, _ = told(PING4.replace("56(84)", "56(124)"))
    assert set(samples.request_len[:4]) == set(samples.reply_len[:4]) == {124}


def test_a_run_that_was_killed_has_no_summary():
    samples, _ = told("\n".join(PING4.splitlines()[:-3]))
    assert samples.seq.tolist() == [1, 2, 2, 5, 3, 4]


def test_a_part_of_the_output_is_numbered_from_its_first_line():
    samples, _ = told("\n".join(PING4.splitlines()[2:4]))
    assert samples.seq.tolist() == [2, 2]
    assert set(samples.request_len) == {84}


def test_user_clock_is_another_model():
    assert told(PING4, READERS["ping-U"]())[1].stamps == PING_USER


def test_numbers_wrap():
    lines = [f"64 bytes from 203.0.113.2: icmp_seq={n % 65536} ttl=63 time=0.1 ms" for n in range(65_530, 65_550)]
    samples, _ = told("\n".join(lines))
    assert samples.seq.tolist() == list(range(65_530, 65_550))
    assert samples.l4_seq.tolist() == [n % 65536 for n in range(65_530, 65_550)]


@given(st.lists(st.integers(-32_768, 32_767), max_size=30), st.integers(0, 65_535))
def test_numbers_go_on_beyond_16_bits(steps, first):
    number = first
    for step in steps:
        assert continued(number, (number + step) % 65_536) == number + step
        number += step


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("PING a (a) 56(84) bytes of data.\n....\x08 \x08\x08 \x08.\n", "-i 0"),
        ("PING a (a) 56(84) bytes of data.\n..\n", "-i 0"),
        ("PING a (a) 8(36) bytes of data.\n16 bytes from 203.0.113.2: icmp_seq=1 ttl=63\n", "has no time"),
        ("PING a (a) 56(84) bytes of data.\n\nsomething\n", "not understood: 'something'"),
        ("64 bytes out of nowhere\n", "no known tool"),
        ("PING a (a) 56(84) bytes of data.\n3 packets transmitted, 3 received\n", "ping -q"),
        (
            "PING a (a) 56(84) bytes of data.\nat noon 64 bytes\n1 packets transmitted, 1 received\n",
            "'at noon 64 bytes'",
        ),
        ("PING a (a): 56 data bytes\nRequest timeout for icmp_seq 0\n", "macOS"),
        ("PING a (a) 56(84) Bytes an Daten.\n", "LC_ALL=C"),
        ("Pinging 203.0.113.2 with 32 bytes of data:\n", "ping of Windows"),
        ("a.b : xmt/rcv/%loss = 3/3/0%, min/avg/max = 1/1/1\n", "fping -q"),
        (PING4 + "PING a (a): 56 data bytes\n64 bytes from 203.0.113.2: seq=0 ttl=63 time=0.1 ms\n", "each by itself"),
        ("\n\n", "empty"),
        ("PING a (a) 56(84) bytes of data.\n99999999999 packets transmitted, 0 received\n", "99,999,999,999"),
    ],
)
def test_samples_that_cannot_be_corrected_are_reported(text, why):
    with pytest.raises(UsageError, match=why):
        told(text)


def test_unknown_lines_are_counted_and_kept():
    strange = ["ping: sendmsg: Operation not permitted", "64 bytes from 203.0.113.2: icmp_seq=99999 ttl=1 time=1 ms"]
    strange += ["64 bytes from 203.0.113.2: icmp_seq=", *"abcdef"]
    samples, reader = told(PING4 + "\n".join(strange))
    assert len(samples) == 7
    assert reader.unknown.count == len(strange)
    assert reader.unknown.first == strange[:5]


def test_fping():
    samples, reader = told(FPING5)
    assert (reader.stamps, reader.unknown.count) == (FPING, 0)
    assert samples.seq.tolist() == [0, 2, 1]
    assert samples.rtt_ns.tolist() == [94_000, 1_250_000, NOT_TOLD]
    assert samples.resolution_ns.tolist()[:2] == [500, 5_000]
    assert samples.stamp_utc_ns[0] == 1_760_000_000_123_460_000
    assert samples.request_len[0] == 84
    # fping does not print the sequence number of the packet.
    assert set(samples.l4_seq) == {NOT_TOLD}


def test_several_runs_of_ping_are_numbered_on():
    """Runs of a shell's loop follow one another, each with its own numbers in the packets."""
    samples, reader = told(PING4 + PING4.replace("56(84)", "100(128)") + PING4.partition("\n---")[0])
    assert reader.unknown.count == 0
    assert samples.seq.tolist() == [1, 2, 2, 5, 7, 8, 8, 11, 13, 14, 14, 17, 3, 4, 6, 9, 10, 12, 15, 16]
    assert samples.l4_seq.tolist()[:12] == [1, 2, 2, 5] * 3
    assert samples.request_len.tolist()[:12] == [84] * 4 + [128] * 4 + [84] * 4


def test_a_quiet_run_among_others():
    quiet = "PING a (a) 56(84) bytes of data.\n\n3 packets transmitted, 2 received, 33% packet loss, time 9ms\n"
    samples, _ = told(quiet + PING4)
    assert samples.seq[samples.untimed].tolist() == [1, 2, 3]
    assert samples.seq.tolist() == [4, 5, 5, 8, 1, 2, 3, 6, 7, 9]


def test_fping_of_several_targets_is_refused():
    with pytest.raises(UsageError, match="one by one"):
        told(FPING5.replace("] 203.0.113.2 : [2]", "] 203.0.113.3 : [2]"))


def test_csv():
    samples, reader = told(CSV)
    assert (reader.stamps, reader.unknown.count) == (REQUEST_RESPONSE, 0)
    assert samples.stamp_utc_ns[0] == 1_760_000_000_123_456_789
    assert samples.rtt_ns.tolist() == [94_512, NOT_TOLD, 1_500_000]
    assert samples.resolution_ns.tolist() == [1, 0, 100_000]
    assert samples.l4_id.tolist() == [40_001, 40_002, 40_003]
    assert samples.request_len.tolist() == [60, 60, NOT_TOLD]
    assert set(samples.l4_proto) == {17}
    assert set(samples.l4_seq) == {NOT_TOLD}


def test_csv_of_icmp_has_the_packets_numbers():
    samples, _ = told("seq,rtt_ms,protocol\n65537,1.0,icmp\n")
    assert (samples.seq[0], samples.l4_seq[0]) == (65_537, 1)


@pytest.mark.parametrize(
    "row",
    [
        "1,x,1,1.0,udp,60",
        "1,1,1,-2,udp,60",
        "1,1,1",
        "1,70000,1,1,udp,60",
        "1,1,1,nan,udp,1",
        "1,1,1,1,sctp,1",
    ],
)
def test_csv_rows_that_are_not_understood(row):
    samples, reader = told(CSV + row + "\n")
    assert len(samples) == 3
    assert reader.unknown.first == [row]


@pytest.mark.parametrize(
    ("header", "why"), [("rtt_ms,sequence", "mean 'seq'|no column 'sequence'"), ("seq,id", "rtt_ms")]
)
def test_csv_headers(header, why):
    with pytest.raises(UsageError, match=why):
        told(header + "\n1,2\n", CsvOutput())


def test_rows_from_one_on():
    reader = PingOutput()
    rows = [reader.line(line) for line in PING4.splitlines()]
    assert [row for row in rows if row is not None] == [0, 1, 2, 3]
    assert np.array_equal(reader.samples(2).seq, [2, 5])


@given(st.text(max_size=80))
def test_every_line_is_parsed_or_counted(text):
    for reader in (PingOutput(), FpingOutput()):
        try:
            reader.line(text)
        except UsageError:
            continue
        assert len(reader.samples()) + reader.unknown.count <= 2


def test_a_reply_with_trailing_text_is_a_sample_and_counted():
    line = "64 bytes from 203.0.113.2: icmp_seq=6 ttl=63 time=0.5 ms (WHO KNOWS)"
    samples, reader = told(PING4.replace("\n\n---", f"\n{line}\n\n---"))
    assert samples.rtt_ns[samples.seq == 6].tolist() == [500_000]
    assert reader.unknown.first == [line]


def test_a_time_of_zero():
    """ping prints 0 if its clock was set back."""
    text = PING4.replace("time=5.32 ms", "time=0.000 ms")
    samples, _ = told(text)
    assert samples.untimed.tolist() == [False, True, *[False] * 5]


def test_a_number_below_the_first_has_wrapped():
    """Of 40,000 requests after the first none had a reply."""
    text = "PING a (a) 56(84) bytes of data.\n"
    text += "".join(
        f"64 bytes from 203.0.113.2: icmp_seq={n % 65536} ttl=63 time=0.1 ms\n" for n in (1, 40_002, 65_540)
    )
    samples, _ = told(text)
    assert samples.seq.tolist()[:3] == [1, 40_002, 65_540]


def test_ip_options_of_inetutils_have_no_length():
    text = "PING a (a): 56 data bytes\n64 bytes from 203.0.113.2: icmp_seq=0 ttl=63 time=0.1 ms\nRR: \t198.51.100.2\n"
    samples, _ = told(text + "64 bytes from 203.0.113.2: icmp_seq=1 ttl=63 time=0.1 ms\t (same route)\n")
    assert set(samples.request_len) == set(samples.reply_len) == {NOT_TOLD}


def test_runs_of_fping_in_a_loop():
    samples, _ = told(FPING5 + FPING5)
    assert samples.seq.tolist() == [0, 2, 3, 5, 1, 4]
    assert not samples.duplicate.any()


@pytest.mark.parametrize("stamp", ["Sun Nov 29 12:00:00 2026", "2026-11-29T12:00:00+0000", "2026-11-29 12:00:00"])
def test_stamps_of_fping_in_whole_seconds_are_ignored(stamp):
    samples, reader = told(f"[{stamp}] 203.0.113.2 : [0], 64 bytes, 0.094 ms (0.094 avg, 0% loss)\n")
    assert (samples.stamp_utc_ns.tolist(), reader.unknown.count) == ([NOT_TOLD], 0)


@pytest.mark.parametrize("huge", ["9" * 30, "1e30", "1.2.3"])
def test_overlong_numbers_are_unknown_lines(huge):
    _, reader = told(PING4 + f"64 bytes from 203.0.113.2: icmp_seq=6 ttl=63 time={huge} ms\n")
    assert reader.unknown.count == 1
    _, reader = told(CSV + f"1,1,1,{huge},udp,60\n" + f"{huge},1,1,1,udp,60\n")
    assert reader.unknown.count == 2


def test_an_overlong_stamp_is_ignored():
    _, reader = told(PING4 + "[9999999999.123456] 64 bytes from 203.0.113.2: icmp_seq=6 ttl=63 time=0.1 ms\n")
    assert reader.unknown.count == 1
    _, reader = told(PING4 + "9" * 5000 + " packets transmitted, 3 received\n")
    assert reader.unknown.count == 1


def reply(seq, time="0.085", source="203.0.113.2"):
    return f"64 bytes from {source}: icmp_seq={seq} ttl=63 time={time} ms"


FROM_ONE = "PING 203.0.113.2 (203.0.113.2) 56(84) bytes of data."
FROM_ZERO = "PING 203.0.113.2 (203.0.113.2): 56 data bytes"


def test_a_decimal_comma_of_inetutils():
    samples, reader = read([FROM_ZERO, reply(0, "0,085"), reply(1, "12,345")])
    assert (samples.rtt_ns.tolist(), reader.unknown.count) == ([85_000, 12_345_000], 0)


@pytest.mark.parametrize("loss", ["0.0%", "33.3%", "100.0%"])
def test_ping_of_bsd_is_recognised_by_its_percentage(loss):
    with pytest.raises(UsageError, match="macOS or BSD"):
        read([FROM_ZERO, reply(0), f"3 packets transmitted, 1 packets received, {loss} packet loss"])


@pytest.mark.parametrize(
    "lines",
    [
        [FROM_ONE, FROM_ONE.replace(".2", ".9"), reply(1), reply(1, source="203.0.113.9")],
        [FROM_ONE, FROM_ONE, reply(1), reply(2), reply(1)],
        [reply(1), reply(2), reply(1), reply(2)],
        [FROM_ZERO, reply(0), reply(0)],
    ],
)
def test_outputs_that_are_mixed_are_refused(lines):
    """In mixed outputs a reply would be assigned to another run's request."""
    with pytest.raises(UsageError, match="several runs are mixed"):
        read(lines)


def test_colours_and_terminal_sequences_are_removed():
    plain = [FROM_ONE, reply(1), reply(2), "^C", "^C--- 203.0.113.2 ping statistics ---"]
    samples, reader = read([f"\x1b[1;32m{line}\x1b[0m\x1b[K" for line in plain])
    assert (samples.rtt_ns.tolist(), reader.unknown.count) == ([85_000, 85_000], 0)


@pytest.mark.parametrize("before", ["Nov 29 15:52:29 ", "2026-11-29T15:52:29.123456789Z ", "c1  | ", "> "])
@pytest.mark.parametrize(
    "line", [FROM_ONE, reply(1), "203.0.113.2 : [0], 64 bytes, 0.05 ms (0.05 avg, 0% loss)", ";; Query time: 237 usec"]
)
def test_a_prefix_of_every_line(before, line):
    with pytest.raises(UsageError, match="has a prefix that the tool does not print"):
        read([before + line])


def test_messages_have_a_bounded_length():
    for line in ("PING ", "64 bytes from ", "x"):
        with pytest.raises(UsageError) as error:
            read([line + "y" * 100_000])
        assert len(str(error.value)) < 500
    _, reader = read([reply(1), "y" * 100_000])
    assert [len(line) for line in reader.unknown.first] == [161]


def test_fping_of_several_targets_of_which_one_is_silent():
    """fping before version 5 prints only a summary for a silent target."""
    lines = ["203.0.113.2 : [0], 64 bytes, 0.05 ms (0.05 avg, 0% loss)", "", "203.0.113.2 : xmt/rcv/%loss = 1/1/0%"]
    with pytest.raises(UsageError, match=r"203\.0\.113\.2 and 203\.0\.113\.9"):
        read([*lines, "203.0.113.9 : xmt/rcv/%loss = 1/0/100%"])


@pytest.mark.parametrize(("told_bytes", "length"), [(64, 84), (108, 128), (84, NOT_TOLD)])
def test_old_versions_of_fping_count_the_ip_header(told_bytes, length):
    samples, _ = read([f"203.0.113.2 : [0], {told_bytes} bytes, 0.05 ms (0.05 avg, 0% loss)"])
    assert samples.reply_len.tolist() == [length]


@pytest.mark.parametrize(
    "lines",
    [
        ["time_namelookup : 0.000123", "time_connect : 0.001234"],
        ["     time_namelookup:  0.000123s", "        time_connect:  0.001s"],
        ["{", '  "time_connect": 0.001234', "}"],
    ],
)
def test_another_form_of_curl_is_refused_with_the_supported_one(lines):
    with pytest.raises(UsageError, match="of curl -w in another form"):
        read(lines)


def test_numbers_of_csv_in_scientific_notation_and_quotes():
    samples, reader = read(['"rtt_ms","seq"', '"5e-05","1"', "1e999999,2", "1e-999999,3", '"0,5",4', '"0.5,5'])
    assert samples.rtt_ns.tolist() == [50, 0]
    assert samples.resolution_ns.tolist() == [10, 1]
    assert reader.unknown.first == ["1e999999,2", '"0,5",4', '"0.5,5']


@pytest.mark.parametrize("time", ["time=85 usec", "time=1.085 msec", "time<1 ms"])
def test_a_time_in_another_unit_has_its_own_message(time):
    line = f"64 bytes from 203.0.113.2: icmp_seq=1 ttl=63 {time}"
    with pytest.raises(UsageError, match="is not understood, nor is any other reply's"):
        read([FROM_ONE, line])
