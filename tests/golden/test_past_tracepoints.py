"""A capture with the hook `ip_rcv` gives each pod its ingress, which the capture without these records lacks."""

from collections import Counter

import numpy as np
import pytest

from collector.files import recording
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.schema import Crossings, Direction
from correlator.engine import Engine, EngineConfig
from tests.places import GOLDEN

PAST = {"past-macvlan": 23, "past-ipvlan": 22, "past-vlan": 24, "past-peer": 10, "past-list": 10}
"""Name of a pod that needs the hook -> packets that reach it: ten replies of each family, and neighbour discovery."""
PAIRED = {"past-netkit2": 10, "past-netkit3": 10}


@pytest.fixture(scope="module")
def items():
    with recording(GOLDEN / "past-tracepoints/kmod.mace").reader() as reader:
        assert "function:ip_rcv" in reader.header.hooks
        return list(reader.items())


def crossings(items):
    """Return the number of packets by container and direction."""
    engine = Engine(0, EngineConfig(crossings=True, rows=False))
    results = [result for item in items for result in engine.feed(item)]
    results.append(engine.finish())
    found = Crossings.concatenate([result.rows.crossings for result in results])
    known = results[-1].rows.devices
    names = [known[device].netns_name for device in found.device.tolist()]
    return Counter(zip(names, map(Direction, found.direction.tolist()), strict=True))


def test_every_pod_has_its_ingress(items):
    found = crossings(items)
    assert {name: n for (name, way), n in found.items() if way is Direction.INGRESS} == PAST | PAIRED


def test_without_the_hook_only_pairs_have_theirs(items):
    def without(item):
        return item[np.flatnonzero(item.hook != Hook.IP_RCV)] if isinstance(item, Batch) else item

    found = crossings(map(without, items))
    assert {name: n for (name, way), n in found.items() if way is Direction.INGRESS} == PAIRED
