"""The places of a filter: containers that come, are renamed and end, namespaces, and devices of the host."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from collector.live.filter import SessionFilter
from collector.live.places import PlaceFinder, Places
from contracts import abi
from contracts.errors import ConfigError, Unavailable
from contracts.topology import Device, Role, Sharer

HOST = 4026531840
ID = "0123456789abcdef" * 4


def cookie(netns):
    return (1 << 33) + netns


def device(netns, ifindex, name="eth0", kind="veth", **more):
    return Device(netns, ifindex, name, kind, netns_cookie=cookie(netns), **more)


OUTER = device(HOST, 2, "out0", "", role=Role.OUTER)


def of_container(number, name, container_id="", kind="veth", **more):
    """Return the devices of a container: its own, and its peer on the host."""
    netns, peer = HOST + number, 100 + number
    own = {"role": Role.INNER, "container": name, "container_id": container_id} | more
    return (
        device(netns, 5, kind=kind, peer_netns=HOST, peer_ifindex=peer, **own),
        device(HOST, peer, f"veth{number}", peer_netns=netns, peer_ifindex=5, role=Role.HOST),
    )


def finder(wanted, *devices, by_cookie=True):
    return PlaceFinder("bpf", wanted, devices, host_netns=HOST, by_cookie=by_cookie)


def place(number, by_cookie=True):
    name = cookie if by_cookie else int
    return Places((name(HOST + number),), ((name(HOST), 100 + number),))


@pytest.mark.parametrize("by_cookie", [True, False])
def test_a_container_is_its_namespace_and_the_hosts_end_of_its_veth(by_cookie):
    devices = (OUTER, *of_container(1, "web"), *of_container(2, "other"))
    one = finder(SessionFilter(containers=("web",)), *devices, by_cookie=by_cookie)
    assert one.find(devices) == place(1, by_cookie)


def test_a_containers_path_has_its_bridge_and_the_outer_devices():
    web, web_peer = of_container(1, "web")
    db, db_peer = of_container(2, "db")
    other, other_peer = of_container(3, "other")
    lan = device(HOST + 4, 5, kind="macvlan", role=Role.INNER, container="lan", peer_netns=HOST, peer_ifindex=2)
    shared, own, bond = device(HOST, 20, "br0", "bridge"), device(HOST, 21, "br1", "bridge"), device(HOST, 22, "bond0")
    inside = device(HOST + 5, 20, "br0", "bridge")
    devices = (
        *(OUTER, bond, shared, own, inside),
        *(web, replace(web_peer, master_ifindex=20), db, replace(db_peer, master_ifindex=20)),
        *(other, replace(other_peer, master_ifindex=21), lan),
    )
    one = finder(SessionFilter(containers=("web", "db"), path=True), *devices)
    at = [(cookie(HOST), ifindex) for ifindex in (2, 101, 20, 102)]
    assert one.find(devices) == Places((cookie(HOST + 1), cookie(HOST + 2)), tuple(at))
    one = finder(SessionFilter(containers=("lan",), path=True), *devices)
    assert one.find(devices) == Places((cookie(HOST + 4),), ((cookie(HOST), 2),))


def test_no_packet_is_recorded_before_the_container_comes():
    one = finder(SessionFilter(containers=("web",), path=True), OUTER)
    assert one.find((OUTER,)) == Places()
    assert len(one.find((OUTER, *of_container(1, "web"))).devices) == 2


def test_containers_share_a_bridge_which_is_one_place(caplog):
    bridged = [
        replace(d, master_ifindex=20) if d.netns == HOST else d for n in range(1, 15) for d in of_container(n, "web")
    ]
    devices = (OUTER, *bridged)
    found = finder(SessionFilter(containers=("web",), path=True), *devices).find(devices)
    assert (len(found.netns), len(found.devices)) == (14, 16)
    assert "not wholly recorded" not in caplog.text


def test_the_lower_device_of_macvlan_is_everybodys():
    devices = (OUTER, *of_container(1, "web", kind="macvlan"))
    assert finder(SessionFilter(containers=("web",)), *devices).find(devices) == Places((cookie(HOST + 1),))


@pytest.mark.parametrize(("given", "found"), [(ID, True), (ID[:12], True), (ID[:11], False), ("we", False)])
def test_a_container_by_its_id(given, found):
    devices = of_container(1, "web", ID)
    assert finder(SessionFilter(containers=(given,)), *devices).find(devices) == (place(1) if found else Places())


def test_a_container_of_the_same_name_that_leads_to_another_host():
    devices = (*of_container(1, "web", role=Role.OTHER), *of_container(2, "web"))
    assert finder(SessionFilter(containers=("web",)), *devices).find(devices) == place(2)


def test_a_container_comes_is_renamed_and_ends(caplog):
    caplog.set_level(logging.INFO)
    near, web = of_container(1, "wbe"), of_container(2, "web", ID)
    one = finder(SessionFilter(containers=("web",)), *near)
    assert one.find(near) == Places()
    assert one.find((*near, *web)) == place(2)
    renamed = tuple(replace(d, container="web-old") if d.container else d for d in web)
    assert one.find((*near, *renamed)) == place(2)
    assert one.find(near) == Places()
    assert [record.message for record in caplog.records] == [
        "no container web yet (did you mean 'wbe'?); waiting for it",
        "container web: recorded",
        "container web has ended; waiting for a container of that name",
    ]


def test_a_container_on_the_hosts_network(caplog):
    assert finder(SessionFilter(containers=("web",))).find((OUTER,), [Sharer("web", ID)]) == Places()
    assert "on the host's network and has no device" in caplog.text


def test_devices_of_the_host_and_containers_are_both_recorded():
    devices = (OUTER, *of_container(1, "web"), device(HOST + 1, 9, "out0", container="web", role=Role.OTHER))
    one = finder(SessionFilter(containers=("web",), devices=("out0",)), *devices)
    assert one.find(devices) == Places((cookie(HOST + 1),), ((cookie(HOST), 2), (cookie(HOST), 101)))
    # A device that was made anew has another index.
    assert one.find((replace(OUTER, ifindex=7),)) == Places((), ((cookie(HOST), 7),))


def test_a_device_that_the_host_does_not_have():
    with pytest.raises(ConfigError, match=r"no device 'out1' in the host's.*--device.*did you mean 'out0'"):
        finder(SessionFilter(devices=("out1",)), OUTER)


def test_namespaces_by_path_and_descriptor():
    mine = Path("/proc/self/ns/net").stat().st_ino
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        for given in (None, "/proc/self/ns/net", fd):
            wanted = SessionFilter(netns=(given,))
            assert finder(wanted, device(mine, 1)).find(()) == Places((cookie(mine),))
            assert finder(wanted, by_cookie=False).find(()) == Places((mine,))
    finally:
        os.close(fd)
    for wrong in ("/nowhere/ns", "/dev/null"):
        with pytest.raises(Unavailable, match=f"{wrong}: .*; a name in /run/netns"):
            finder(SessionFilter(netns=(wrong,)))


def test_more_containers_than_the_kernels_filter_holds(caplog):
    devices = [d for n in range(1, abi.MAX_NETNS + 3) for d in of_container(n, "web")]
    one = finder(SessionFilter(containers=("web",)), *devices)
    for _ in range(2):
        found = one.find(devices)
        assert len(found.netns) == abi.MAX_NETNS
        assert len(found.devices) == abi.MAX_DEVICES
    assert caplog.text.count("not or not wholly recorded: container web") == 1
