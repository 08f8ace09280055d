"""Packets that reach a pod's device past every tracepoint have their whole path all the same, by the hook `ip_rcv`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collector.files import recording
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Topology
from tests.kernel.guest import programs
from tests.kernel.guest.pods import COUNT, FAR, LENGTHS, ROUTED, Way, made, measured, measured_by_loaded

pytestmark = programs.LOADING


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Way]]:
    with made(tmp_path_factory.mktemp("mount")) as ways:
        yield ways


class Found:
    """What a run with one source has come to."""

    def __init__(self, told: dict[str, Any], capture: Path) -> None:
        self.told = told
        with recording(capture).reader() as reader:
            self.hooks = reader.header.hooks
            items = list(reader.items())
        topology = [item for item in items if isinstance(item, Topology)][-1]
        places = [next(iter(topology.candidates(each)), None) for each in topology.sightings]
        batch = Batch.concatenate([item for item in items if isinstance(item, Batch)])
        self.at_ip, self.in_lists = (
            Counter(
                (place.netns_name, place.name, family)
                for family, length in LENGTHS.items()
                for dev in batch.dev[(batch.hook == hook) & (batch.l3_len == length)].tolist()
                if (place := places[dev]) is not None
            )
            for hook in (Hook.IP_RCV, Hook.NAPI_GRO_RECEIVE_ENTRY)
        )
        """Records of echo requests and replies at a hook, by namespace (the host's is `host`), device and family."""

    def counts(self, part: str, *names: str) -> dict[tuple[Any, ...], int]:
        """Return the packets of the rows of a part of the run's JSON, by these columns."""
        return {tuple(row[name] for name in names): row["count"] for row in self.told[part]}


@pytest.fixture(scope="module", params=["kmod", "bpf"])
def found(request: pytest.FixtureRequest, ways: dict[str, Way], tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bpf":
        return Found(*measured_by_loaded(ways, COUNT, folder))
    return Found(*measured(request.param, ways, COUNT, folder))


def test_every_reply_has_its_whole_path(found: Found, ways: dict[str, Way]) -> None:
    whole = found.counts("overhead", "netns", "direction")
    for direction in ("egress", "ingress"):
        # ARP and router solicitations have a path too.
        missing = {name: COUNT * len(way.families) - whole.get((way.pod, direction), 0) for name, way in ways.items()}
        assert max(missing.values()) <= 0, missing
    assert found.told["ledger"]["ambiguous"] == found.told["ledger"]["lost"] == 0


def test_nothing_is_said_to_be_unseen(found: Found) -> None:
    assert "function:ip_rcv" in found.hooks
    assert "unseen" not in found.told


def test_only_packets_without_a_reception_are_recorded(found: Found, ways: dict[str, Way]) -> None:
    """One record a packet, at the pod's device; none of packets that were received there, or at the host.

    The far end has a VLAN device, which receives the requests.
    """
    past = [way for name, way in ways.items() if name not in ROUTED]
    at_pods = {(way.pod, "eth0", family): COUNT for way in past for family in way.families}
    assert found.at_ip == at_pods | {(FAR, f"{ways['vlan'].far}.5", family): COUNT for family in (4, 6)}


def test_packets_in_lists_are_recorded_too(found: Found, ways: dict[str, Way]) -> None:
    way = ways["list"]
    if ("host", way.outer, 4) not in found.in_lists:
        pytest.skip("this kernel's veth has no NAPI")
    assert found.in_lists["host", way.outer, 4] == found.at_ip[way.pod, "eth0", 4] == COUNT


def test_netkit_is_measured_device_by_device(found: Found, ways: dict[str, Way]) -> None:
    routed = [way for name, way in ways.items() if name in ROUTED]
    if not routed:
        pytest.skip("this kernel has no netkit")
    counts = found.counts("devices", "container", "device", "kind", "direction")
    for way in routed:
        for device, kind in (("eth0", "netkit"), (way.lxc, "netkit"), (way.outer, "veth"), (way.far, "veth")):
            for direction in ("egress", "ingress"):
                assert counts[way.pod, device, kind, direction] >= COUNT
