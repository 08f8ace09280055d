"""Ten thousand real packets of each kind, every one with its whole path in both directions."""

from collections import Counter

import pytest

from mace.lab import Spec, running
from tests.measuring import measured, paths

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

COUNT = 10_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One measurement of all kinds of traffic; each kind has a length of its own, by which its rows are found."""
    with running(Spec(name="light", containers=2)) as lab:
        # Neighbours are known from here on, so that no packet waits for an answer to ARP.
        for family in (4, 6):
            lab.ping("c1", count=2, family=family)
        with measured(lab, tmp_path_factory.mktemp("light"), "--ring-mib", "32") as measurement:
            noise = lab.start_udp("c2", count=1_000_000, size=333, rate_pps=2_000, duration_s=60)
            sent = {
                "ping": lab.ping("c1", count=COUNT, size=101, flood=True).received,
                "ping6": lab.ping("c1", count=COUNT, size=102, flood=True, family=6).received,
                "udp": lab.udp("c1", count=COUNT, size=203, echo=True).received,
                "tcp": lab.tcp_requests("c1", count=COUNT, size=157).received,
            }
            noise.stop()
        assert sent == dict.fromkeys(sent, COUNT)
        yield lab, measurement, measurement.rows(container="c1")


LENGTHS = {"ping": 101 + 28, "ping6": 102 + 48, "udp": 203 + 28, "tcp": 157 + 52}


@pytest.mark.parametrize("kind", LENGTHS)
def test_every_packet_has_its_whole_path_in_both_directions(run, kind):
    lab, _, rows = run
    out, far, tag = lab.outer_device, lab.outer_device.replace("out", "rem"), lab.outer_device[3:]
    egress = ("eth0", f"veth{tag}-c1", f"br{tag}", out, far)
    ingress = (far, out, f"br{tag}", f"veth{tag}-c1", "eth0")
    found = Counter(
        (hops[0]["direction"], tuple(hop["device"] for hop in hops))
        for hops in paths(row for row in rows if row["l3_len"] == LENGTHS[kind]).values()
    )
    assert found == {("egress", egress): COUNT, ("ingress", ingress): COUNT}


def test_delays_of_each_packet_add_up_to_its_overhead(run):
    _, _, rows = run
    parts, whole = Counter(), {}
    for row in rows:
        if row["segment"] == "device":
            parts[row["packet"]] += row["delay_ns"]
        elif row["segment"] == "overhead":
            whole[row["packet"]] = row["delay_ns"]
    assert len(whole) >= 2 * COUNT * len(LENGTHS)
    assert {packet: parts[packet] for packet in whole} == whole


def test_nothing_was_lost_or_guessed(run):
    _, measurement, _ = run
    ledger = measurement.found["ledger"]
    assert ledger["lost"] == ledger["discarded"] == ledger["ambiguous"] == 0
    named = ("matched", "unmatched", "ambiguous", "expired", "dropped", "in_flight")
    assert ledger["records"] == sum(ledger[name] for name in named)
    # Ten records a request and a reply of each packet, at the least.
    assert ledger["matched"] >= 2 * 9 * COUNT * len(LENGTHS)


def test_large_tcp_buffers_stay_whole(tmp_path):
    """Bulk TCP travels as buffers of up to 64 KiB (GSO); each is one packet with one path."""
    with running(Spec(name="bulk")) as lab:
        lab.ping("c1", count=2)
        with measured(lab, tmp_path, "--ring-mib", "32") as measurement:
            lab.tcp("c1", size=20_000_000)
        rows = measurement.rows(direction="egress")
        large = [hops for hops in paths(rows).values() if hops[0]["l3_len"] > 1500]
        assert sum(hops[0]["l3_len"] - 52 for hops in large) >= 19_000_000
        assert {len(hops) for hops in large} == {5}
        assert measurement.found["ledger"]["lost"] == 0
