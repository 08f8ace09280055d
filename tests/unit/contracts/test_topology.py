import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import WireError
from contracts.topology import NO_DEVICE, Device, Role, Sighting, Topology, assign_roles, check

HOST, C1, C2, FAR, OTHER = 100, 101, 102, 103, 104


def lab() -> list[Device]:
    """Return two containers on a bridge, a macvlan container, an outer veth to the far end, an unrelated namespace."""
    return [
        Device(HOST, 1, "lo", "loopback", netns_name="host"),
        Device(HOST, 2, "br0", "bridge", netns_name="host"),
        Device(HOST, 3, "veth-c1", "veth", C1, 2, 2, netns_name="host"),
        Device(HOST, 4, "veth-c2", "veth", C2, 2, 2, netns_name="host"),
        Device(HOST, 5, "out0", "veth", FAR, 2, default_route=True, netns_name="host"),
        Device(C1, 1, "lo", "loopback", netns_name="c1", container="c1"),
        Device(C1, 2, "eth0", "veth", HOST, 3, default_route=True, netns_name="c1", container="c1"),
        Device(C1, 3, "tun0", "tun", netns_name="c1", container="c1"),
        Device(C2, 2, "eth0", "veth", HOST, 4, default_route=True, netns_name="c2", container="c2"),
        Device(C2, 3, "mac0", "macvlan", HOST, 5, netns_name="c2", container="c2"),
        Device(FAR, 1, "lo", "loopback", netns_name="far", container="far"),
        Device(FAR, 2, "rem0", "veth", HOST, 5, netns_name="far", container="far"),
        Device(FAR, 3, "rem1", "", netns_name="far", container="far"),
        Device(OTHER, 2, "eth0", "", default_route=True, netns_name="o", container="o"),
    ]


def roles(devices: tuple[Device, ...]) -> dict[tuple[int, str], Role]:
    return {(d.netns, d.name): d.role for d in devices}


def test_the_lab() -> None:
    found = assign_roles(lab(), HOST)
    assert roles(found) == {
        (HOST, "lo"): Role.LOOPBACK,
        (HOST, "br0"): Role.HOST,
        (HOST, "veth-c1"): Role.HOST,
        (HOST, "veth-c2"): Role.HOST,
        (HOST, "out0"): Role.OUTER,
        (C1, "lo"): Role.LOOPBACK,
        (C1, "eth0"): Role.INNER,
        (C1, "tun0"): Role.OTHER,
        (C2, "eth0"): Role.INNER,
        (C2, "mac0"): Role.INNER,
        (FAR, "lo"): Role.LOOPBACK,
        (FAR, "rem0"): Role.REMOTE,
        (FAR, "rem1"): Role.REMOTE,
        (OTHER, "eth0"): Role.OTHER,
    }


def test_only_containers_have_container_names() -> None:
    named = {(d.netns, d.container) for d in assign_roles(lab(), HOST)}
    assert named == {(HOST, ""), (C1, "c1"), (C2, "c2"), (FAR, ""), (OTHER, "o")}


def test_roles_depend_on_no_order_and_can_be_reassigned() -> None:
    shuffled = lab()
    random.Random(7).shuffle(shuffled)
    found = assign_roles(shuffled, HOST)
    assert found == assign_roles(lab(), HOST) == assign_roles(found, HOST)
    assert [d.key for d in found] == sorted(d.key for d in found)


def test_named_outer_devices_beat_the_default_route() -> None:
    found = roles(assign_roles(lab(), HOST, outer=["veth-c2"]))
    assert found[HOST, "veth-c2"] is Role.OUTER
    assert found[HOST, "out0"] is Role.HOST
    # c2 then lies beyond the outer device.
    assert found[C2, "eth0"] is Role.REMOTE
    assert found[FAR, "rem0"] is Role.INNER


def test_a_missing_outer_device_gives_no_outer_role() -> None:
    found = assign_roles(lab(), HOST, outer=["nope"])
    assert Role.OUTER not in {d.role for d in found}


def test_an_outer_name_means_the_host_s_device_only() -> None:
    found = roles(assign_roles(lab(), HOST, outer=["eth0"]))
    assert Role.OUTER not in found.values()


def test_remote_by_name() -> None:
    found = assign_roles(lab(), HOST, remote_netns=["c2"])
    assert {d.role for d in found if d.netns == C2} == {Role.REMOTE}
    assert {d.container for d in found if d.netns == C2} == {""}


def test_the_host_is_never_remote() -> None:
    assert roles(assign_roles(lab(), HOST, remote_netns=["host"]))[HOST, "br0"] is Role.HOST


def test_hardware_is_outer_where_there_is_no_default_route() -> None:
    devices = [Device(HOST, 2, "eth0", ""), Device(HOST, 3, "br0", "bridge"), Device(HOST, 4, "ifb0", "ifb")]
    assert roles(assign_roles(devices, HOST)) == {
        (HOST, "eth0"): Role.OUTER,
        (HOST, "br0"): Role.HOST,
        (HOST, "ifb0"): Role.HOST,
    }


def test_a_bridge_with_the_default_route_gives_way_to_its_hardware() -> None:
    devices = [
        Device(HOST, 2, "eth0", "", master_ifindex=3),
        Device(HOST, 3, "br0", "bridge", default_route=True),
        Device(HOST, 4, "veth1", "veth", C1, 2, master_ifindex=3),
        Device(C1, 2, "eth0", "veth", HOST, 4),
    ]
    found = roles(assign_roles(devices, HOST))
    assert found == {
        (HOST, "eth0"): Role.OUTER,
        (HOST, "br0"): Role.HOST,
        (HOST, "veth1"): Role.HOST,
        (C1, "eth0"): Role.INNER,
    }
    # A bridge without hardware has nothing beyond it.
    assert roles(assign_roles(devices[1:], HOST))[HOST, "br0"] is Role.OUTER


def test_a_bond_with_the_default_route_is_outer_itself() -> None:
    devices = [Device(HOST, 2, "eth0", "", master_ifindex=3), Device(HOST, 3, "bond0", "bond", default_route=True)]
    assert roles(assign_roles(devices, HOST)) == {(HOST, "eth0"): Role.HOST, (HOST, "bond0"): Role.OUTER}


def test_two_default_routes_give_two_outer_devices() -> None:
    devices = [Device(HOST, 2, "eth0", "", default_route=True), Device(HOST, 3, "wg0", "wireguard", default_route=True)]
    assert {d.role for d in assign_roles(devices, HOST)} == {Role.OUTER}


def test_a_pair_within_the_host_has_no_inner_end() -> None:
    devices = [Device(HOST, 2, "a", "veth", HOST, 3), Device(HOST, 3, "b", "veth", HOST, 2)]
    assert {d.role for d in assign_roles(devices, HOST)} == {Role.HOST}


def test_a_container_in_a_container_is_not_the_host_s() -> None:
    devices = [
        Device(HOST, 3, "veth1", "veth", C1, 2),
        Device(C1, 2, "eth0", "veth", HOST, 3),
        Device(C1, 3, "veth2", "veth", C2, 2),
        Device(C2, 2, "eth0", "veth", C1, 3),
    ]
    found = roles(assign_roles(devices, HOST))
    assert found[C1, "eth0"] is Role.INNER
    assert found[C1, "veth2"] is Role.OTHER
    assert found[C2, "eth0"] is Role.OTHER


def test_no_devices() -> None:
    assert assign_roles([], HOST) == ()


device = st.builds(
    Device,
    netns=st.integers(100, 103),
    ifindex=st.integers(1, 4),
    name=st.sampled_from(["eth0", "br0", "lo"]),
    kind=st.sampled_from(["", "veth", "bridge", "macvlan", "loopback"]),
    peer_netns=st.sampled_from([0, 100, 101, 102, 103]),
    peer_ifindex=st.integers(0, 4),
    master_ifindex=st.integers(0, 4),
    default_route=st.booleans(),
    netns_name=st.sampled_from(["host", "a", "b"]),
    container=st.sampled_from(["", "a", "b"]),
)


@pytest.mark.slow
@given(
    st.lists(device, unique_by=lambda d: d.key),
    st.lists(st.sampled_from(["eth0", "br0", "x"])),
    st.lists(st.sampled_from(["a", "b", "host"])),
)
def test_only_role_and_container_change(devices: list[Device], outer: list[str], far: list[str]) -> None:
    found = assign_roles(devices, HOST, outer, far)

    def bare(d: Device) -> Device:
        return replace(d, role=Role.OTHER, container="")

    assert sorted(map(bare, found)) == sorted(map(bare, devices))
    for d in found:
        assert (d.role is Role.LOOPBACK) == (d.kind == "loopback")
        if d.role in (Role.OUTER, Role.HOST):
            assert d.netns == HOST
        if d.role in (Role.INNER, Role.REMOTE):
            assert d.netns != HOST
        if d.netns == HOST:
            assert d.container == ""
    assert assign_roles(found, HOST, outer, far) == found


def test_candidates() -> None:
    topology = Topology(0, HOST, assign_roles(lab(), HOST))
    assert {d.netns for d in topology.candidates(Sighting("eth0"))} == {C1, C2, OTHER}
    assert [d.name for d in topology.candidates(Sighting("", C2, 3))] == ["mac0"]
    assert topology.candidates(Sighting("eth0", HOST, 77)) == ()
    assert topology.candidates(NO_DEVICE) == ()


def test_check_refuses_impossible_topologies() -> None:
    assert check(Topology(0, HOST)) == Topology(0, HOST)
    with pytest.raises(WireError, match="sighting 0"):
        check(Topology(0, HOST, sightings=()))
    with pytest.raises(WireError, match="listed twice"):
        check(Topology(0, HOST, devices=(Device(1, 1, "a", ""), Device(1, 1, "b", ""))))


def test_the_namespace_of_an_overlay_network_counts_as_that_from_which_its_tunnel_sends():
    """Docker's VXLAN device is a port of a bridge in a namespace that only the network has."""
    web, network, far_network, far = 90, 91, 92, 93
    given = (
        *lab(),
        Device(network, 2, "br0", "bridge"),
        Device(network, 3, "vxlan0", "vxlan", peer_netns=HOST, master_ifindex=2),
        Device(network, 4, "veth0", "veth", peer_netns=web, peer_ifindex=5, master_ifindex=2, container="sandbox[9]"),
        Device(web, 5, "eth0", "veth", peer_netns=network, peer_ifindex=4, default_route=True, container="web"),
        Device(far_network, 2, "br0", "bridge"),
        Device(far_network, 3, "vxlan0", "vxlan", peer_netns=far, master_ifindex=2),
        Device(far, 4, "lan0", "veth", netns_name="far"),
        # A router's own tunnel, which it sends from the host: the router is a container, and not the host.
        Device(94, 2, "br0", "bridge", default_route=True),
        Device(94, 3, "vxlan0", "vxlan", peer_netns=HOST, master_ifindex=2),
    )
    found = {d.key: d for d in assign_roles(given, HOST, remote_netns=("far",))}
    assert {found[network, index].role for index in (2, 3, 4)} == {Role.HOST}
    assert found[network, 4].container == ""
    assert (found[web, 5].role, found[web, 5].container) == (Role.INNER, "web")
    assert {found[far_network, index].role for index in (2, 3)} == {Role.REMOTE}
    assert {found[94, index].role for index in (2, 3)} == {Role.OTHER}
