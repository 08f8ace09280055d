"""Ten thousand real packets of each kind are all matched over the whole path, in both directions."""

import json

import pytest

from mace.lab import Spec, list_labs, running
from tests.measuring import PATHS, balanced, mace, measured

pytestmark = pytest.mark.needs("root", "tracefs", "netns")

COUNT = 10_000
# Length of each kind's packets, payload and headers, which selects its rows.
LENGTHS = {"ping": 101 + 28, "ping6": 102 + 48, "udp": 203 + 28, "tcp": 157 + 52}
NOISE = 333 + 28


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Measure all kinds of traffic beside a second container's traffic."""
    with running(Spec(name="light", containers=2)) as lab:
        # From here on all neighbours are resolved, so that no packet waits for ARP or ND.
        for family in (4, 6):
            for container in lab.containers:
                lab.ping(container, count=2, family=family)
        with measured(lab, tmp_path_factory.mktemp("light"), "--ring-mib", "32") as measurement:
            noise = lab.start_udp("c2", count=1_000_000, size=333, rate_pps=2_000, duration_s=60)
            received = {
                "ping": lab.ping("c1", count=COUNT, size=101, flood=True).received,
                "ping6": lab.ping("c1", count=COUNT, size=102, flood=True, family=6).received,
                "udp": lab.udp("c1", count=COUNT, size=203, echo=True).received,
                "tcp": lab.tcp_requests("c1", count=COUNT, size=157).received,
            }
            beside = noise.stop()
        assert received == dict.fromkeys(received, COUNT)
        yield lab, measurement, beside.sent


def ways(lab, container):
    """Return the devices between a container and the far end in path order, by direction."""
    tag = lab.outer_device[3:]
    out = ["eth0", f"veth{tag}-{container}", f"br{tag}", f"out{tag}", f"rem{tag}"]
    return {"egress": out, "ingress": out[::-1]}


def found_paths(measurement, container, length):
    """Count the packets of one length by direction and devices."""
    rows = measurement.query(
        f"SELECT direction, devices, count(*) FROM ({PATHS})"
        f" WHERE container = '{container}' AND l3_len = {length} GROUP BY ALL"
    )
    return {(direction, tuple(devices)): count for direction, devices, count in rows}


@pytest.mark.parametrize("kind", LENGTHS)
def test_every_packet_has_its_whole_path_in_both_directions(run, kind):
    lab, measurement, _ = run
    assert found_paths(measurement, "c1", LENGTHS[kind]) == {
        (direction, tuple(devices)): COUNT for direction, devices in ways(lab, "c1").items()
    }


def test_a_second_container_is_counted_exactly(run):
    lab, measurement, sent = run
    assert found_paths(measurement, "c2", NOISE) == {("egress", tuple(ways(lab, "c2")["egress"])): sent}


@pytest.mark.slow
def test_delays_of_each_packet_add_up_to_its_overhead(run):
    _, measurement, sent = run
    sums = """
        SELECT packet, l3_len, sum(delay_ns) FILTER (segment = 'device') AS parts,
               any_value(delay_ns) FILTER (segment = 'overhead') AS whole, count(*) FILTER (segment = 'overhead') AS n
        FROM delays GROUP BY packet, l3_len
    """
    lengths = f"l3_len IN ({', '.join(map(str, (*LENGTHS.values(), NOISE)))})"
    [(packets,)] = measurement.query(f"SELECT count(*) FROM ({sums}) WHERE n = 1 AND parts = whole AND {lengths}")
    assert packets == 2 * COUNT * len(LENGTHS) + sent
    # The same holds for all other packets that were seen at both ends.
    assert measurement.query(f"SELECT * FROM ({sums}) WHERE n > 1 OR (n = 1 AND parts <> whole)") == []


def test_nothing_was_lost_and_all_is_accounted_for(run):
    _, measurement, sent = run
    ledger = balanced(measurement.found)
    assert ledger.lost == ledger.discarded == 0
    # A packet has nine moves or more; an ambiguous record would be missing in its path above.
    assert ledger.matched >= 9 * (2 * COUNT * len(LENGTHS) + sent)


@pytest.mark.slow
def test_large_tcp_buffers_stay_whole(tmp_path):
    """Bulk TCP travels as buffers of up to 64 KiB (GSO); each is one packet with one path."""
    total = 20_000_000
    with running(Spec(name="bulk")) as lab:
        lab.ping("c1", count=2)
        with measured(lab, tmp_path, "--ring-mib", "32") as measurement:
            assert lab.tcp("c1", size=total).received == total
        bytes_by_path = measurement.query(
            f"SELECT devices, sum(l3_len - 52) FROM ({PATHS})"
            " WHERE container = 'c1' AND direction = 'egress' AND l3_len > 100 GROUP BY ALL"
        )
        # Without the handshake and the multicast report of a new interface (96 bytes, sent at any time), every byte was
        # seen on one path; the kernel may have retransmitted some.
        [(devices, payload)] = bytes_by_path
        assert devices == ways(lab, "c1")["egress"]
        assert total <= payload < 1.01 * total
        [(largest,)] = measurement.query("SELECT max(l3_len) FROM delays WHERE container = 'c1'")
        assert largest > 1500
        assert balanced(measurement.found).lost == 0


@pytest.mark.slow
def test_demo_prints_the_documented_figures():
    """`mace demo --json` prints what the README promises."""
    done = mace("demo", "--duration", "1", "--json")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    balanced(found)
    assert found["packets"] > 500
    figures = {"count", "p50_ns", "p99_ns", "max_ns"}
    for device in found["devices"]:
        assert device.keys() >= figures | {"container", "netns", "device", "kind", "direction"}
        assert 0 <= device["p50_ns"] <= device["p99_ns"] <= device["max_ns"]
    ours = {(row["container"], row["direction"]): row for row in found["overhead"]}
    for key in ((container, way) for container in ("c1", "c2") for way in ("egress", "ingress")):
        assert ours[key].keys() >= figures - {"max_ns"}
        # Hundreds of pings over IPv4 and IPv6, of datagrams and of requests per second.
        assert ours[key]["count"] > 200
    assert "demo" not in {info.name for info in list_labs()}
