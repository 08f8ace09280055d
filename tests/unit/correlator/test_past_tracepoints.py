"""Packets that reach their last device past every tracepoint, and records that repeat a reception."""

from dataclasses import replace

import numpy as np
import pytest

from collector.files import recording
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.schema import Delays, Direction, Segment
from contracts.topology import Device, Sighting, Topology, assign_roles
from correlator.engine import Engine, EngineConfig
from tests.places import GOLDEN
from tests.traffic import LETTERS

HOST, POD, FAR = 1, 11, 20
OUTER = Device(HOST, 2, "out0", "veth", FAR, 2, default_route=True, netns_name="host")
DEVICES = (OUTER, Device(FAR, 2, "far0", "veth", HOST, 2, netns_name="far"))


def feed(devices, path, *, names=None):
    """Return (device, direction, segment, delay) of each row, and the totals; the path's records are 100 ns apart."""
    roled = assign_roles(devices, HOST)
    sightings = (Sighting(""), *(Sighting(d.name, d.netns, d.ifindex) for d in roled))
    code = {(d.netns, d.name): i for i, d in enumerate(roled, 1)}
    words = [word.partition(":") for word in path.split()]
    batch = Batch.of(
        len(words),
        ts_ns=np.arange(len(words)) * 100 + 1_000,
        hook=[LETTERS[letter] for letter, _, _ in words],
        dev=[code[where(at)] if at else 0 for _, _, at in words],
        skb_id=[1] * len(words),
        l3_len=[56 if letter == "D" else 0 if letter in "ck" else 84 for letter, _, _ in words],
    )
    engine = Engine(0, EngineConfig())
    results = [*engine.feed(Topology(-1, HOST, roled, sightings)), *engine.feed(batch), engine.finish()]
    delays, known = Delays.concatenate([r.rows.delays for r in results]), results[-1].rows.devices
    told = zip(delays.device, delays.direction, delays.segment, delays.delay_ns.tolist(), strict=True)
    rows = {(known[d].name, Direction(w).name, Segment(s).name, ns) for d, w, s, ns in told}
    return rows, results[-1].totals


def where(name):
    """Return (namespace, name): `pod/eth0` is in the pod, `out0` on the host."""
    member, _, device = name.rpartition("/")
    return {"": HOST, "pod": POD, "far": FAR}[member], device


@pytest.mark.parametrize(
    "device",
    [
        Device(POD, 2, "eth0", "macvlan", HOST, 2, netns_name="pod"),
        Device(POD, 2, "eth0", "ipvlan", HOST, 2, netns_name="pod"),
        Device(POD, 2, "eth0", "veth", HOST, 7, netns_name="pod"),
        Device(POD, 2, "eth0", "netkit", HOST, 7, netns_name="pod"),
    ],
    ids=lambda device: device.kind,
)
def test_a_packet_that_arrives_at_the_pod_past_the_tracepoints(device):
    """bpf_redirect_peer for the pairs, whose outer end the packet does not pass."""
    outer_end = Device(HOST, 7, "lxc0", device.kind, POD, 2, netns_name="host")
    devices = (*DEVICES, device, *([outer_end] if device.peer_ifindex == 7 else []))
    rows, totals = feed(devices, "r:out0 R:out0 i:pod/eth0 D c")
    assert rows == {
        ("out0", "INGRESS", "DEVICE", 100),
        ("eth0", "INGRESS", "OVERHEAD", 100),
        ("eth0", "INGRESS", "DELIVERY", 100),
    }
    assert (totals.packets, totals.ledger.matched) == (1, 5)


def test_up_a_bond_and_a_vlan_and_on_to_a_container():
    devices = (
        Device(HOST, 2, "eth1", "", master_ifindex=3, netns_name="host"),
        Device(HOST, 3, "bond0", "bond", netns_name="host"),
        Device(HOST, 4, "bond0.5", "vlan", HOST, 3, default_route=True, netns_name="host"),
        Device(HOST, 7, "lxc0", "veth", POD, 2, netns_name="host"),
        Device(POD, 2, "eth0", "veth", HOST, 7, netns_name="pod"),
    )
    rows, _ = feed(devices, "G:eth1 R:eth1 i:bond0.5 Q:lxc0 X:lxc0 r:pod/eth0 R:pod/eth0 c")
    assert rows == {
        ("eth1", "INGRESS", "OUTSIDE", 200),
        ("bond0.5", "INGRESS", "DEVICE", 100),
        ("lxc0", "INGRESS", "DEVICE", 200),
        ("eth0", "INGRESS", "DEVICE", 100),
        ("eth0", "INGRESS", "OVERHEAD", 400),
    }


def test_through_an_ifb_and_back():
    """tc redirects what the pair receives to an ifb, where it is shaped, and the ifb gives it back to the pair."""
    devices = (
        *DEVICES,
        Device(HOST, 7, "lxc0", "veth", POD, 2, netns_name="host"),
        Device(HOST, 8, "bwp0", "ifb", netns_name="host"),
        Device(POD, 2, "eth0", "veth", HOST, 7, netns_name="pod"),
    )
    path = "Q:pod/eth0 X:pod/eth0 r:lxc0 R:lxc0 Q:bwp0 X:bwp0 R:lxc0 Q:out0 X:out0 r:far/far0 R:far/far0 c"
    rows, totals = feed(devices, path)
    assert rows == {
        ("eth0", "EGRESS", "DEVICE", 200),
        ("lxc0", "EGRESS", "DEVICE", 200),
        ("bwp0", "EGRESS", "DEVICE", 200),
        ("lxc0", "EGRESS", "DEVICE", 100),
        ("out0", "EGRESS", "OUTSIDE", 200),
        ("far0", "EGRESS", "OUTSIDE", 100),
        ("eth0", "EGRESS", "OVERHEAD", 700),
    }
    assert totals.packets == 1


def test_an_ifb_gives_a_queued_packet_back_to_the_queue():
    devices = (
        *DEVICES,
        Device(HOST, 7, "lxc0", "veth", POD, 2, netns_name="host"),
        Device(HOST, 8, "bwp0", "ifb", netns_name="host"),
        Device(POD, 2, "eth0", "veth", HOST, 7, netns_name="pod"),
    )
    rows, totals = feed(devices, "r:out0 R:out0 Q:bwp0 X:bwp0 Q:lxc0 X:lxc0 r:pod/eth0 R:pod/eth0 c")
    assert ("eth0", "INGRESS", "OVERHEAD", 600) in rows
    assert totals.packets == 1


def test_a_pair_of_another_host_is_not_reached():
    """The other end of the pair has to be in the packet's namespace."""
    devices = (*DEVICES, Device(POD, 2, "eth0", "veth", FAR, 9, netns_name="pod"))
    rows, totals = feed(devices, "r:out0 R:out0 i:pod/eth0 c")
    assert not rows
    assert totals.ledger.matched == 4


def test_netkit_is_a_pair_as_veth_is():
    for kind in ("veth", "netkit"):
        devices = (
            *DEVICES,
            Device(HOST, 7, "lxc0", kind, POD, 2, netns_name="host"),
            Device(POD, 2, "eth0", kind, HOST, 7, netns_name="pod"),
        )
        rows, totals = feed(devices, "Q:pod/eth0 X:pod/eth0 r:lxc0 R:lxc0 Q:out0 X:out0 r:far/far0 R:far/far0 c")
        assert rows == {
            ("eth0", "EGRESS", "DEVICE", 200),
            ("lxc0", "EGRESS", "DEVICE", 200),
            ("out0", "EGRESS", "OUTSIDE", 200),
            ("far0", "EGRESS", "OUTSIDE", 100),
            ("eth0", "EGRESS", "OVERHEAD", 400),
        }
        assert totals.grades.ambiguous == 0


def test_a_reception_that_is_repeated_changes_no_figure():
    """A source may record `ip_rcv` although it recorded `netif_receive_skb`: no row and no window differs."""
    with recording(GOLDEN / "both-sources/kmod.mace").reader() as reader:
        items = list(reader.items())
        offset_ns = reader.header.clock.offset_ns
    repeated = [repeating(item) if isinstance(item, Batch) else item for item in items]
    found, wanted = (figures(each, offset_ns) for each in (repeated, items))
    assert len(wanted[0]) > 100
    assert found[:2] == wanted[:2]
    assert found[2].ledger.records > wanted[2].ledger.records
    assert found[2].grades == wanted[2].grades


def repeating(batch):
    """Return the batch with a record of `ip_rcv` behind each of `netif_receive_skb`."""
    at = np.flatnonzero(batch.hook == Hook.NETIF_RECEIVE_SKB)
    order = np.sort(np.concatenate([np.arange(len(batch)), at]))
    twice = np.diff(order, prepend=-1) == 0
    return replace(batch[order], hook=np.where(twice, Hook.IP_RCV, batch.hook[order]).astype(np.uint8))


def figures(items, offset_ns):
    """Return the rows, the windows and the totals."""
    engine = Engine(offset_ns, EngineConfig())
    results = [result for item in items for result in engine.feed(item)]
    results.append(engine.finish())
    rows = Delays.concatenate([r.rows.delays for r in results])
    columns = [getattr(rows, name).tolist() for name in rows._DTYPES]
    windows = [(w.start_utc_ns, w.device, w.segment, w.sum_ns, w.count) for r in results for w in r.rows.windows]
    return sorted(zip(*columns, strict=True)), sorted(windows), results[-1].totals
