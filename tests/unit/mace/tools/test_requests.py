"""Reading dig and curl, and the exchanges that cannot be corrected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import UsageError
from contracts.schema import NOT_TOLD
from correlator.stamps import CURL, DIG
from mace.tools.output import read
from mace.tools.requests import CurlOutput, DigOutput

DIG9 = """
; <<>> DiG 9.18.49-1~deb12u3-Debian <<>> -u @203.0.113.2 a.example b.example
; (1 server found)
;; global options: +cmd
;; Got answer:
;; ->>HEADER<<- opcode: QUERY, status: NOERROR, id: 34521
;; flags: qr aa rd; QUERY: 1, ANSWER: 1, AUTHORITY: 0, ADDITIONAL: 0

;; QUESTION SECTION:
;a.example.\t\t\tIN\tA

;; ANSWER SECTION:
a.example.\t\t60\tIN\tA\t192.0.2.7

;; Query time: 187 usec
;; SERVER: 203.0.113.2#53(203.0.113.2) (UDP)
;; WHEN: Tue Nov 24 11:13:01 UTC 2026
;; MSG SIZE  rcvd: 43

;; communications error to 203.0.113.2#53: timed out
;; Query time: 2004 usec
;; SERVER: 2001:db8:ffff::2#53(2001:db8:ffff::2) (UDP)
;; WHEN: Tue Nov 24 11:13:02 UTC 2026
;; MSG SIZE  rcvd: 50
"""


def connection(**changed):
    told = {"time_connect": "0.000412", "time_namelookup": "0.000031", "num_connects": "1", "local_port": "40001",
            "remote_ip": '"203.0.113.2"', "errormsg": "null", **changed}  # fmt: skip
    return "{" + ",".join(f'"{name}":{value}' for name, value in told.items()) + "}"


def told(text):
    return read(text.splitlines())


def test_dig():
    samples, reader = told(DIG9)
    assert (reader.stamps, reader.unknown.count) == (DIG, 0)
    assert samples.seq.tolist() == [0, 2, 1]
    assert samples.rtt_ns.tolist() == [187_000, 2_004_000, NOT_TOLD]
    assert samples.reply_len.tolist() == [43 + 28, 50 + 48, NOT_TOLD]
    # dig prints neither the time of sending nor the size of its request.
    assert set(samples.stamp_utc_ns) == set(samples.request_len) == {NOT_TOLD}
    assert samples.l4_proto.tolist()[:2] == [17, 17]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (DIG9.replace("187 usec", "0 msec"), "dig -u"),
        (DIG9.replace("(203.0.113.2) (UDP)", "(203.0.113.2) (TCP)"), "over TCP"),
        (DIG9.replace(" (UDP)", "").replace(";; Got", ";; Truncated, retrying in TCP mode.\n;; Got"), "over TCP"),
        (DIG9.replace("187 usec", "0 usec").replace("rcvd: 43", ""), "statistics"),
    ],
)
def test_untimed_exchanges_of_dig_are_left_out(text, why):
    """Exchanges that dig does not time are left out; an output with no others is refused."""
    samples, reader = told(text)
    assert samples.seq.tolist() == [2, 1]
    assert [(why in reason, count) for reason, count in reader.left_out.items()] == [(True, 1)]
    alone = text.partition(";; communications")[0]
    with pytest.raises(UsageError, match=why):
        told(alone)


def test_dig_of_a_version_that_does_not_name_the_protocol():
    old = DIG9.replace(" (UDP)", "").replace("<<>> -u", "<<>> -u +tcp")
    with pytest.raises(UsageError, match="2 left out, over TCP"):
        told(old.replace(";; communications error to 203.0.113.2#53: timed out\n", ""))
    unanswered = "; <<>> DiG 9.16.1 <<>> -u a.example\n;; connection timed out; no servers could be reached\n"
    assert told(unanswered)[0].rtt_ns.tolist() == [NOT_TOLD]


def test_a_size_without_a_time_is_an_unknown_line():
    reader = DigOutput()
    assert reader.line(";; MSG SIZE  rcvd: 43") is None
    assert reader.unknown.count == 1


def test_curl():
    samples, reader = told("\n".join([connection(), connection(remote_ip='"2001:db8::2"', local_port="40002")]))
    assert (reader.stamps, reader.unknown.count) == (CURL, 0)
    assert samples.rtt_ns.tolist() == [381_000, 381_000]
    assert samples.resolution_ns.tolist() == [1_000, 1_000]
    assert samples.l4_id.tolist() == [40_001, 40_002]
    assert samples.l4_proto.tolist() == [6, 6]
    assert samples.request_len.tolist() == samples.reply_len.tolist() == [60, 80]


def test_curl_without_a_connection():
    refused = connection(time_connect="0.000000", num_connects="0", remote_ip='""', errormsg='"Failed to connect"')
    again = connection(time_connect="0.000000", num_connects="0")
    samples, reader = told(f"{connection()}\n{refused}\n{again}\n{connection()}")
    assert samples.seq.tolist() == [0, 2, 1]
    assert samples.rtt_ns.tolist()[2] == NOT_TOLD
    assert reader.unknown.count == 0


def test_lines_of_curl_that_are_cut_are_counted():
    reader = CurlOutput()
    for line in (connection()[:-9], '{"time_connect":1}', "[]", "null", connection(local_port='"x"')):
        assert reader.line(line) is None
    assert reader.unknown.count == 5


@given(st.sampled_from([DigOutput, CurlOutput]), st.text(max_size=120))
def test_every_line_is_parsed_or_counted(reader, text):
    made = reader()
    try:
        made.line(text)
    except UsageError:
        return
    assert made.unknown.count <= 1


@pytest.mark.parametrize("deep", ['{"time_connect":' * 100_000, '{"x":' + "[" * 100_000 + '{"time_connect":1}'])
def test_objects_too_deep_to_read(deep):
    """A page in the same line may have deeply nested objects."""
    reader = CurlOutput()
    assert reader.line(deep) is None
    assert reader.unknown.count == 1
