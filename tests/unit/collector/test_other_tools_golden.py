"""The golden files of one run, recorded by all tools at once, give the same results as when they were made."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from collector.files import FileOptions, recording
from tests.integration.test_other_tools_traces import replayed
from tests.perfetto_from_pages import perfetto_from_pages
from tests.places import GOLDEN

FILES = GOLDEN / "other-tools"
EXPECTED = json.loads((FILES / "expected.json").read_text())


def maker():
    spec = importlib.util.spec_from_file_location("make_other_tools", FILES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(one):
    """Return rows as a sorted list of all columns that identify a packet."""
    _, rows, _ = replayed(one)
    names = ("utc_ns", "direction", "segment", "position", "delay_ns", "l3_len", "outcome", "grade")
    return sorted(zip(*(getattr(rows, name).tolist() for name in names), strict=True))


@pytest.fixture(scope="module")
def told():
    return maker().told(FILES)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_file_gives_its_golden_results(told, name):
    assert told[name] == EXPECTED[name]


@pytest.mark.parametrize("name", ["pages.dat", "pages.pftrace"])
def test_the_same_records_have_the_same_delays(name):
    assert EXPECTED[name] == EXPECTED["live.mace"]


def test_the_perfetto_trace_is_made_of_the_pages(tmp_path):
    """The Perfetto trace is made of the pages only: made again, it gives the same rows."""
    for name in ("live.mace", "pages.dat", "pages.pftrace"):
        shutil.copy(FILES / name, tmp_path)
    maker().as_perfetto(tmp_path)
    assert (tmp_path / "pages.pftrace").stat().st_size > 0
    options = FileOptions(topology=FILES / "live.mace")
    made, kept = (rows_of(recording(place / "pages.pftrace", options)) for place in (tmp_path, FILES))
    assert made == kept == rows_of(recording(FILES / "live.mace"))


def test_numbers_in_place_of_addresses_give_no_wrong_delay(tmp_path):
    """Without net_dev_xmit many buffers and many beginnings of paths stay unknown; the remaining delays are right."""
    live = recording(FILES / "live.mace")
    path = tmp_path / "numbers.pftrace"
    path.write_bytes(perfetto_from_pages(FILES / "pages.dat", live.header.clock.offset_ns, numbers=True))
    found = rows_of(recording(path, FileOptions(topology=live.paths[0])))
    assert 10 < len(found) < len(rows_of(live))
    crossings = {(utc, way, delay, length) for utc, way, _, _, delay, length, *_ in rows_of(live)}
    assert {(utc, way, delay, length) for utc, way, _, _, delay, length, *_ in found} <= crossings


@pytest.mark.parametrize(("name", "within_ns"), [("trace.txt", 5_000), ("pcap", 40_000)])
def test_other_tools_differ_by_their_stamping_points(name, within_ns):
    for way in ("egress", "ingress"):
        live, other = np.array(EXPECTED["live.mace"][way]), np.array(EXPECTED[name][way])
        assert len(live) > 4
        # Another tool may have been running a little longer.
        assert len(other) >= len(live)
        apart = np.abs(np.median(other[-len(live) :]) - np.median(live))
        assert apart < within_ns
