"""Candidates of a move found by their relations equal those found by trying each pair."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.hooks import ALONG, Hook, Way
from contracts.topology import NO_DEVICE, PAIRS, Device, Sighting, Topology
from correlator import identity
from correlator.identity import WAY, Resolver

KINDS = ("veth", "netkit", "bridge", "macvlan", "vxlan", "loopback", "gre", "", "vlan")
SMALL = st.integers(0, 3)


@st.composite
def topologies(draw):
    """Draw a topology of few namespaces, indices and names, so that many devices are related."""
    keys = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=10, unique=True))
    devices = tuple(
        Device(
            *key,
            draw(st.sampled_from("ab")),
            draw(st.sampled_from(KINDS)),
            peer_netns=draw(SMALL),
            peer_ifindex=draw(SMALL),
            master_ifindex=draw(SMALL),
        )
        for key in keys
    )
    named = tuple(Sighting(name) for name in "abc")
    exact = tuple(Sighting("", *key) for key in draw(st.lists(st.tuples(SMALL, st.integers(1, 4)), max_size=3)))
    return Topology(0, 1, devices, (NO_DEVICE, *named, *exact))


def tried(resolver, hook_p, sources, hook_n, targets):
    """Each pair, as the rules have it; a pair's other end hears what it sends, whoever else has its name."""
    for a, b in product(sources, targets):
        device = resolver.devices[a]
        if WAY[hook_p] == Way.TRANSMIT and WAY[hook_n] == Way.RECEIVE and device.kind in PAIRS:
            peers = resolver._by_key.get((device.peer_netns, device.peer_ifindex))
            if peers is not None and b not in peers:
                continue
        if resolver._can_cross(int(WAY[hook_p]), device, hook_n, resolver.devices[b]):
            yield a, b


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(topologies())
def test_pairs_equal_those_of_an_exhaustive_search(topology):
    resolver = Resolver(0)
    resolver.update(topology)
    # Records of ip_rcv come from sources that name one device.
    received = [hook for hook in ALONG[Way.RECEIVE] if hook is not Hook.IP_RCV]
    moves = list(product((Hook.NET_DEV_START_XMIT, Hook.NETIF_RECEIVE_SKB), (Hook.NET_DEV_QUEUE, *received)))
    for (hook_p, hook_n), one, other in product(moves, resolver._candidates[1:], resolver._candidates[1:]):
        found = resolver._crossings(hook_p, one, hook_n, other)
        assert found == set(tried(resolver, hook_p, one.numbers, hook_n, other.numbers))


def test_a_thousand_containers_are_searched_in_linear_time():
    inner = [Device(netns, 2, "eth0", "veth", 1, netns) for netns in range(2, 1_002)]
    resolver = Resolver(0)
    resolver.update(Topology(0, 1, tuple(inner), (NO_DEVICE, Sighting("eth0"))))
    (eth0,) = resolver._candidates[1:]
    assert resolver._crossings(Hook.NETIF_RECEIVE_SKB, eth0, Hook.NET_DEV_QUEUE, eth0) == set()
    assert resolver._tried <= 2_000


def test_impossible_topologies_have_a_bounded_search(monkeypatch):
    monkeypatch.setattr(identity, "_MOST_TRIED", 10_000)
    alike = tuple(Device(1, index, "eth0", "veth") for index in range(1, 1_000))
    resolver = Resolver(0)
    resolver.update(Topology(0, 1, alike, (NO_DEVICE, *[Sighting("eth0")] * 4_000)))
    eth0 = resolver._candidates[1]
    assert resolver._crossings(Hook.NETIF_RECEIVE_SKB, eth0, Hook.NET_DEV_QUEUE, eth0) is None
    assert resolver._tried <= 10_001
    assert resolver._judge(Hook.NETIF_RECEIVE_SKB, 1, Hook.NET_DEV_QUEUE, 2)[1:] == (-1, -1)
