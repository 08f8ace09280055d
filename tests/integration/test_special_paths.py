"""Delays on unusual paths, in the lab."""

import subprocess
import time
from contextlib import contextmanager

import pytest

from mace.lab import HOST, Spec, running
from mace.lab.plan import device_tag, netns_name
from tests.measuring import PATHS, balanced, measured

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow, pytest.mark.timeout(120)]

COUNT = 60
# Lengths that select the rows: UDP over IPv4, and pings.
HAIRPIN, AROUND, STACKED, DROPPED = 301, 302, 303, 304
LAB = "odd"


@contextmanager
def stacked(lab):
    """Provide a container on a macvlan over the outer device."""
    name, tag = f"spec-{lab.name}", device_tag(lab.name)
    host = netns_name(lab.name, HOST)
    commands = [
        f"ip netns add {name}",
        f"ip -n {host} link add mv{tag} link {lab.outer_device} type macvlan mode bridge",
        f"ip -n {host} link set mv{tag} netns {name} name eth0",
        f"ip -n {name} addr add 203.0.113.50/24 dev eth0",
        f"ip -n {name} link set eth0 up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with running(Spec(name=LAB, containers=2)) as lab, stacked(lab) as macvlan:
        c2, outer = lab.address("c2"), lab.outer_device
        rules = [
            "add chain inet mace_lab hairpin { type nat hook prerouting priority -100 ; }",
            f"add rule inet mace_lab hairpin ip daddr 203.0.113.1 udp dport 5353 dnat ip to {c2}:5353",
            f"add rule inet mace_lab nat ip daddr {c2} udp dport 5353 masquerade",
            "add chain inet mace_lab refused { type filter hook forward priority 0 ; }",
            f'add rule inet mace_lab refused oifname "{outer}" udp dport 9 drop',
        ]
        for rule in rules:
            argv = ["nft", *rule.split()] if "{" not in rule else ["nft", rule]
            done = lab.popen(HOST, argv)
            _, error = done.communicate()
            assert done.returncode == 0, error
        for name in lab.containers:
            lab.ping(name, count=2)
        ping = ["ip", "netns", "exec", macvlan, "ping", "-c", str(COUNT), "-i", "0.01", "-s", str(STACKED - 28)]
        subprocess.run([*ping[:6], "2", "203.0.113.2"], check=True, capture_output=True)
        with measured(lab, tmp_path_factory.mktemp("odd")) as measurement:
            send(lab, "c1", "203.0.113.1", 5353, HAIRPIN)
            send(lab, "c1", "203.0.113.2", 9, DROPPED)
            lab.ping("c1", to="c2", count=COUNT, size=AROUND - 28)
            subprocess.run([*ping, "203.0.113.2"], check=True, capture_output=True)
            time.sleep(0.2)
        measurement.tag = device_tag(lab.name)
        measurement.macvlan = macvlan
        yield measurement


def send(lab, member, host, port, length):
    """Send datagrams of `length` bytes, including headers."""
    text = (
        "import socket, sys, time\n"
        f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(({host!r}, {port}))\n"
        f"for _ in range({COUNT}):\n"
        "    try: s.send(bytes(%d))\n"
        "    except OSError: pass\n"
        "    time.sleep(0.003)\n" % (length - 28)
    )
    process = lab.popen(member, ["python3", "-I", "-S", "-c", text])
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error


def paths(run, length):
    found = run.query(
        f"SELECT direction, container, devices, count(*) FROM ({PATHS}) WHERE l3_len = {length} GROUP BY ALL"
    )
    return {(direction, container, tuple(devices)): count for direction, container, devices, count in found}


def wholes(run, length):
    sql = f"SELECT direction, count(*) FROM delays WHERE segment = 'overhead' AND l3_len = {length} GROUP BY ALL"
    return dict(run.query(sql))


def test_hairpin(run):
    """A packet to another container by the host's address leaves one container and enters the other, without an outer
    device. Whether it also crosses the bridge device depends on the kernel: if netfilter sees bridged packets, the
    bridge hands packets with a resolved neighbour from port to port.

    Whether the bridge is on the way, too, is up to the kernel: where netfilter sees bridged packets, those whose
    neighbour it is sure of are handed from port to port.
    """
    tag = run.tag
    bridge = f"br{tag}"
    ways = paths(run, HAIRPIN)
    found = {(way, container, tuple(d for d in devices if d != bridge)) for way, container, devices in ways}
    assert found == {
        ("egress", "c1", ("eth0", f"veth{tag}-c1")),
        ("ingress", "c2", (f"veth{tag}-c2", "eth0")),
    }
    seen = {each: sum(count for (way, *_), count in ways.items() if way == each) for each in ("egress", "ingress")}
    assert seen["egress"] == seen["ingress"] > 0
    assert wholes(run, HAIRPIN) == {}


def test_from_container_to_container_on_one_bridge(run):
    """The bridge forwards such packets without routing, so that the bridge device is on neither path."""
    tag = run.tag
    there = {(way, container): devices for way, container, devices in paths(run, AROUND)}
    assert there["egress", "c1"] == ("eth0", f"veth{tag}-c1")
    assert there["ingress", "c2"] == (f"veth{tag}-c2", "eth0")
    assert wholes(run, AROUND) == {}


def test_macvlan(run):
    """Egress is measured as usual. On ingress the inner device has no tracepoint, and the report says so."""
    outer = f"out{run.tag}"
    found = {way: devices for way, container, devices in paths(run, STACKED) if container == run.macvlan}
    assert found["egress"][:2] == ("eth0", outer)
    assert wholes(run, STACKED) == {"egress": COUNT}
    (told,) = run.found["unseen"]
    assert told.startswith(f"eth0 of {run.macvlan} is a macvlan")
    assert "its ingress is not measured" in told


def test_a_dropped_packet_has_its_reason(run):
    """A dropped packet has the delays before the drop, its reason, and no overhead."""
    drops = run.query(
        "SELECT outcome, drop_reason > 0, count(DISTINCT packet) FROM delays"
        f" WHERE l3_len = {DROPPED} AND container = 'c1' GROUP BY ALL"
    )
    assert drops == [("dropped", True, COUNT)]
    assert wholes(run, DROPPED) == {}
    assert balanced(run.found).dropped >= COUNT
