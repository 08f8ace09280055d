"""The results of chosen containers, of a source that records everything."""

import numpy as np
import pytest

from contracts.config import CaptureConfig
from contracts.cpus import Measure, StagePlace
from contracts.ledger import Ledger
from contracts.results import Results, Rows, Totals
from contracts.schema import Delays, Direction, Segment, Window
from contracts.topology import Device
from contracts.windowtable import WindowTable
from mace.live.chosen import OfContainers, chooser, everything
from tests.made_results import make_stages, with_rows

ID = "ab" * 32


def device(name, container, container_id="", netns_name=""):
    return Device(1, 2, name, "veth", container=container, container_id=container_id, netns_name=netns_name)


DEVICES = (device("eth0", "web", ID), device("eth0", "db"), device("out0", "db", netns_name="host"))
LATER = (*DEVICES, device("eth0", "web-old", ID), device("out0", "db", netns_name="web"))


def results(devices):
    count = len(devices)
    columns = {name: np.zeros(count, dtype) for name, dtype in Delays._DTYPES.items()}
    delays = Delays(**columns | {"device": np.arange(count, dtype=np.int32)})
    nothing = np.zeros(0, np.int64)
    windows = [
        Window(0, 1, n, Direction.EGRESS, Segment.DEVICE, 1, 1, 1, 1, 1, 1, 1, 1, nothing, nothing)
        for n in range(count)
    ]
    return Results(Rows(delays, WindowTable.of(windows), devices), Totals(1, Ledger(records=9), packets=9))


def kept(only, devices):
    found = only(results(devices))
    assert found.rows.devices == devices
    assert found.totals == results(devices).totals
    windows = found.rows.windows.column("device").tolist()
    assert windows == found.rows.delays.device.tolist()
    return windows


@pytest.mark.parametrize("name", ["web", ID, ID[:12]])
def test_a_containers_rows_under_all_of_its_names(name):
    only = OfContainers(CaptureConfig(containers=(name,)))
    assert kept(only, ()) == []
    assert kept(only, DEVICES) == [0]
    assert kept(only, LATER) == [0, 3]


def test_a_device_that_is_recorded_anyway_chooses_no_other_containers_rows():
    only = OfContainers(CaptureConfig(containers=("web",), devices=("out0",)))
    assert kept(only, LATER) == [0, 3]


def test_stages_at_a_containers_places():
    places = tuple(StagePlace(device, device, 0, cpu) for cpu in (0, 1) for device in range(len(DEVICES)))
    rows = [(place, Direction.EGRESS, Measure.RUN, [5]) for place in places]
    stages, places = make_stages(rows)
    given = with_rows(results(DEVICES), stages=stages, places=places)
    found = OfContainers(CaptureConfig(containers=("web",)))(given).rows
    assert [places[at] for at in found.stages.column("device")] == [StagePlace(0, 0, 0, 0), StagePlace(0, 0, 0, 1)]
    assert found.places == places


def test_results_chosen_in_the_kernel_stay():
    assert chooser(CaptureConfig(containers=("web",)), after_reading=False) is everything
