"""Probes from made-up records: their times over each stretch, and which are left out."""

import math

import numpy as np
import pytest

from contracts.hooks import Hook
from mace.tools import host_path
from mace.tools.host_path import ProbeCollector, ProbeRecords, Stretches, stretches, timed
from tests.traffic import Q, R, Tape, X, r, topology

GAP = 10_000_000
PROBE_LEN = 76
STRETCHES = ("send", "device", "beyond", "answer")
WAY = (
    *((0, Q, "eth0"), (3, X, "eth0"), (5, r, "veth1"), (9, R, "veth1"), (20, R, "br0")),
    *((30, Q, "out0"), (31, X, "out0"), (33, r, "rem0"), (34, R, "rem0")),
)
"""Times of the records of a container's probe, µs since the first."""
HOST_WAY = ((0, Q, "out0"), (2, X, "out0"), (5, r, "rem0"), (8, R, "rem0"))
BACK = ((40, Q, "rem0"), (41, X, "rem0"), (42, r, "out0"), (44, R, "out0"))


def records(tape):
    seen = ProbeCollector()
    seen.add(topology(), PROBE_LEN)
    seen.add(tape.batch(), PROBE_LEN)
    return seen.whole()


def probes(way, count, *, before_us=20, back=BACK, skb=7):
    """Return (sent, tape) of probes that all have the same path and buffer."""
    tape, sent = Tape(), []
    for n in range(count):
        sent.append(GAP * (n + 1))
        begin = sent[-1] + before_us * 1000
        for at, hook, name in way:
            tape.add(begin + at * 1000, hook, name, skb=skb, length=PROBE_LEN)
        for at, hook, name in back:
            tape.add(begin + at * 1000, hook, name, skb=skb + 1, length=PROBE_LEN)
    return sent, tape


def test_a_containers_probes():
    sent, tape = probes(WAY, 5)
    found = stretches(sent, records(tape), "eth0", "out0")
    assert found.send.tolist() == [20_000] * 5
    assert found.device.tolist() == [1_000] * 5
    assert found.beyond.tolist() == [3_000] * 5
    assert found.answer.tolist() == [8_000] * 5


def term_ns(host, container, names=STRETCHES):
    """Return the host path term over these stretches, ns: median of the host's probes less that of the container's.

    The medians are over the probes of all parts; nan without probes. `answer` counts only if a far end on this machine
    has answered a probe.
    """
    sides = ((1, host), (-1, container))
    answered = any(len(part.answer) for _, parts in sides for part in parts)
    seen = any(len(part) for _, parts in sides for part in parts)
    total = 0.0
    for name in names:
        if name == "answer" and seen and not answered:
            continue
        for sign, parts in sides:
            values = np.concatenate([getattr(part, name) for part in parts])
            total += sign * float(np.median(values)) if len(values) else float("nan")
    return total


def test_the_term_is_the_hosts_additional_time():
    host = stretches(*_seen(HOST_WAY, before_us=28), None, "out0")
    container = stretches(*_seen(WAY), "eth0", "out0")
    assert term_ns([host], [container]) == (28 - 20 + 2 - 1 + 6 - 3 + 34 - 8) * 1000
    assert term_ns([host], [container], ["send"]) == 8_000
    assert math.isnan(term_ns([_none()], [container]))


def _seen(way, **shape):
    sent, tape = probes(way, 4, **shape)
    return sent, records(tape)


def _none():
    return Stretches(*(np.zeros(0, np.int64) for _ in range(4)))


def test_a_remote_far_end_that_does_not_answer():
    way = [step for step in HOST_WAY if step[2] != "rem0"]
    sent, tape = probes(way, 3, back=())
    found = stretches(sent, records(tape), None, "out0")
    assert found.beyond.tolist() == [0, 0, 0]
    assert len(found.answer) == 0
    assert term_ns([found], [found]) == 0


def test_a_remote_far_end_that_answers():
    """The network's time is not part of the host path term."""
    way, back = ([step for step in steps if step[2] != "rem0"] for steps in (HOST_WAY, BACK))
    sent, tape = probes(way, 3, back=back)
    assert len(stretches(sent, records(tape), None, "out0").answer) == 0


def test_without_the_answers_of_one_side_there_is_no_term():
    host = stretches(*_seen(HOST_WAY), None, "out0")
    silent = stretches(*_seen(WAY, back=()), "eth0", "out0")
    assert math.isnan(term_ns([host], [silent]))


@pytest.mark.parametrize("missing", [(Q, "eth0"), (Q, "out0"), (X, "out0")])
def test_a_probe_with_a_hole_is_left_out(missing):
    sent, tape = probes([step for step in WAY if step[1:] != missing], 2)
    assert len(stretches(sent, records(tape), "eth0", "out0")) == 0


def test_devices_may_have_one_name_inside_and_outside():
    way = [(at, hook, "eth0" if name == "out0" else name) for at, hook, name in WAY]
    sent, tape = probes(way, 3, back=())
    found = stretches(sent, records(tape), "eth0", "eth0")
    assert (found.send.tolist(), found.device.tolist()) == ([20_000] * 3, [1_000] * 3)


def test_packets_of_other_lengths_are_ignored():
    sent, tape = probes(WAY, 2)
    for n in range(200):
        tape.add(sent[0] + n * 100, Q, "eth0", skb=7, length=PROBE_LEN + 8)
    assert stretches(sent, records(tape), "eth0", "out0").send.tolist() == [20_000] * 2


def test_an_unsent_probe_takes_no_records_of_another():
    sent, tape = probes(WAY, 2)
    found = stretches([sent[0] - 3 * GAP, *sent], records(tape), "eth0", "out0")
    assert len(found) == 2


def test_between_limits_the_time():
    whole = ProbeRecords(np.array([1, 2, 3]), np.array([Hook.NETIF_RX] * 3, np.uint8), np.zeros(3, np.uint64),
                    np.array(["a"] * 3, object))  # fmt: skip
    assert whole.between(2, 3).ts_ns.tolist() == [2]


def test_one_probe_has_its_hooks_within_its_round_trip():
    sent, tape = probes(WAY, 1)
    [begin] = sent
    found = timed(begin, 20_000 + 42_000, records(tape), "eth0", "out0")
    assert (found.inside, found.send_ns, found.device_ns, found.far_ns) == (True, 20_000, 1_000, 3_000 + 8_000)
    assert found.hooks == tuple(hook for _, hook, _ in (*WAY, *BACK[:2]))  # the last two are behind the kernel's stamp
    assert found.egress == tuple(hook for _, hook, _ in WAY[:5])
    assert found.ingress == ()
    assert timed(begin, 20_000 + 45_000, records(tape), "eth0", "out0").ingress == (r, R)
    assert timed(begin - 1_000_000_000, 62_000, records(tape), "eth0", "out0") is None


def test_a_probe_to_another_machine_has_no_far_end_here():
    way = [step for step in HOST_WAY if step[2] != "rem0"]
    [sent], tape = probes(way, 1, back=[(4000, r, "out0")])
    assert timed(sent, 4_020_000, records(tape), None, "out0").far_ns == -1


def test_old_records_are_forgotten_and_their_number_is_bounded(monkeypatch):
    seen = ProbeCollector()
    seen.add(topology(), PROBE_LEN)
    for n in (1, 2, 3):
        tape = Tape()
        tape.add(n * 1000, Q, "eth0", length=PROBE_LEN)
        seen.add(tape.batch(), PROBE_LEN)
    seen.forget(2000)
    assert seen.whole().ts_ns.tolist() == [2000, 3000]
    monkeypatch.setattr(host_path, "MOST_RECORDS", 1)
    seen.forget(0)
    assert seen.whole().ts_ns.tolist() == [3000]
