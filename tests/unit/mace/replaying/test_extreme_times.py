"""Captures of a few kilobytes with extreme times or counts do not keep a reader busy for ever."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from collector.capture.source import read
from contracts.config import StoreConfig
from contracts.errors import StoreError, WireError
from contracts.hooks import Hook
from contracts.interfaces import Progress
from contracts.records import Batch
from contracts.schema import Delays
from contracts.timerange import LATEST_UTC_NS
from contracts.topology import Topology
from contracts.windowtable import WindowTable
from correlator.engine import Engine, EngineConfig
from mace.replaying.into_store import files_at, into_store
from storage import part_writer, segments
from storage.segments import HOUR_NS
from tests.durations import S
from tests.made_capture import HEADER, TOPOLOGY, capture_bytes, traffic
from tests.places import GOLDEN

CAPTURES = GOLDEN / "extreme-times"
OFFSET = HEADER.clock.offset_ns


def replayed(capture, store=None):
    summary, _ = into_store(
        files_at([capture]), store and str(store), EngineConfig(slice_ns=S), StoreConfig(sync=False)
    )
    return summary


def test_records_before_any_topology_have_no_device():
    ledger = replayed(CAPTURES / "no-topology.mace").ledger
    assert (ledger.records, ledger.unmatched, ledger.in_flight, ledger.imbalance) == (1_000, 999, 1, 0)


def test_a_time_outside_the_clock_is_refused():
    with pytest.raises(
        WireError, match=r"end-of-time\.mace: at byte 315: a batch with times before 1970 or after 2116"
    ):
        replayed(CAPTURES / "end-of-time.mace")


@pytest.mark.parametrize("item", ["batch", "topology", "progress", "latest"])
@pytest.mark.parametrize("time_ns", [(1 << 63) - 1, (1 << 62) + 1, LATEST_UTC_NS - OFFSET + 1, -(1 << 63)])
@pytest.mark.parametrize("whole", [False, True])
def test_such_a_time_is_refused_in_every_message(item, time_ns, whole):
    engine = Engine(OFFSET, EngineConfig(whole_batches=whole))
    engine.feed(TOPOLOGY)
    batch = traffic(2)
    ts = np.array([time_ns, time_ns] if time_ns < 0 else [batch.ts_ns[0], time_ns], np.int64)
    if item == "topology" and time_ns < 0:
        assert engine.feed(replace(TOPOLOGY, from_ns=time_ns)) == []  # applies from the earliest time
        return
    told = {
        "batch": lambda: engine.feed(replace(batch, ts_ns=ts)),
        "topology": lambda: engine.feed(replace(TOPOLOGY, from_ns=time_ns)),
        "progress": lambda: engine.advance(time_ns),
        "latest": lambda: engine.advance(time_ns, at_once=True),
    }
    with pytest.raises(WireError, match="a time of"):
        told[item]()


def test_a_million_seconds_with_a_record_each_are_few_slices():
    engine = Engine(0, EngineConfig(slice_ns=100_000_000))
    pieces, most, last = 0, 0, None
    for item in read(CAPTURES / "a-second-apart.mace"):
        for last in engine.pieces(item) if isinstance(item, Topology | Batch) else ():
            pieces += 1
            most = max(most, len(last.rows.delays))
    last = engine.finish()
    ledger = last.totals.ledger
    assert (ledger.records, ledger.expired, ledger.in_flight) == (1 << 20, (1 << 20) - 1, 1)
    assert pieces < 1_000
    assert most == 0


def outcome(records, size, config):
    engine = Engine(OFFSET, config)
    results = engine.feed(TOPOLOGY)
    for start in range(0, len(records), size):
        results += engine.feed(records[start : start + size])
    results.append(engine.finish())
    delays = Delays.concatenate([each.rows.delays for each in results])
    order = np.lexsort((delays.position, delays.packet, delays.utc_ns))
    rows = [getattr(delays, name)[order].tolist() for name in ("utc_ns", "packet", "position", "delay_ns", "grade")]
    windows = WindowTable.concatenate([each.rows.windows for each in results])
    # Devices are numbered in order of appearance.
    name = [(device.key, device.container) for device in results[-1].rows.devices]
    told = sorted((start, width, name[device], *rest) for start, width, device, *rest in windows.numbers.T.tolist())
    return len(results), rows, told, results[-1].totals.ledger


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_slice_boundaries_do_not_change_a_sparse_stream(busy):
    """A round trip every three seconds, so that slices are sparse throughout or up to a busy stretch."""
    records = traffic(20_000)
    trip = np.arange(len(records)) // 20
    late = trip * 3 * S
    if busy:
        late = np.minimum(late, 400 * 3 * S) + np.maximum(trip - 800, 0) * 3 * S
    records = replace(records, ts_ns=records.ts_ns + late)
    whole = outcome(records, len(records), EngineConfig(slice_ns=1 << 61))
    sliced = outcome(records, len(records), EngineConfig())
    assert sliced[1:] == whole[1:]
    assert 256 < sliced[0] < 500
    # The slices are equal, too, for any batch boundaries.
    assert outcome(records, 777, EngineConfig()) == sliced
    assert outcome(records, 1, EngineConfig()) == sliced


def test_the_number_of_kept_gaps_is_bounded():
    """A hundred bytes can encode 2^20 gap markers, each of which could separate packets."""
    count = 50_000
    engine = Engine(OFFSET, EngineConfig())
    engine.feed(TOPOLOGY)
    ts = TOPOLOGY.from_ns + 1 + 2 * np.arange(count)
    engine.feed(Batch.of(count, ts_ns=ts, skb_id=np.full(count, 1 << 62, np.uint64), hook=np.full(count, Hook.LOST)))
    engine.advance(int(ts[-1]), at_once=True)
    assert len(engine.state(int(ts[-1]) + 1).gaps) <= 4096
    ends = [end for _, end in engine.state(int(ts[-1]) + 1).gaps]
    assert max(ends) == 1 << 62


def hours_apart(hours):
    """Write a capture with one round trip per hour."""
    records = traffic(20 * hours)
    trip = np.arange(len(records)) // 20
    return replace(records, ts_ns=records.ts_ns + trip * HOUR_NS)


def stored(store):
    return {
        (each.table, each.hour): pq.ParquetFile(each.path).read().to_pylist()
        for table in ("delays", "windows")
        for each in segments.listing(store, table)
    }


@pytest.mark.slow
def test_many_hours_need_few_open_files(tmp_path, monkeypatch):
    capture = tmp_path / "hours.mace"
    capture.write_bytes(capture_bytes([TOPOLOGY, hours_apart(60)]))
    most = 0
    begin = part_writer.PartWriter._begin

    def counted(self, *args):
        nonlocal most
        begin(self, *args)
        most = max(most, len(self._open) + 1)

    monkeypatch.setattr(part_writer.PartWriter, "_begin", counted)
    replayed(capture, tmp_path / "bounded")
    assert 1 < most <= 32
    monkeypatch.setattr(part_writer, "_OPEN_FILES", 1_000)
    replayed(capture, tmp_path / "free")
    assert most > 100
    assert stored(tmp_path / "bounded") == stored(tmp_path / "free")
    assert len(stored(tmp_path / "free")) > 100


def test_an_hour_written_again_after_its_file_was_closed_is_one_file(tmp_path, monkeypatch):
    """Rows are written by row groups. With one open file, windows and delays close each other's file."""
    capture = tmp_path / "hours.mace"
    capture.write_bytes(capture_bytes([TOPOLOGY, traffic(8_000), Progress(TOPOLOGY.from_ns + HOUR_NS)]))
    monkeypatch.setattr(part_writer.tables, "ROW_GROUP_ROWS", 500)
    replayed(capture, tmp_path / "free")
    monkeypatch.setattr(part_writer, "_OPEN_FILES", 1)
    monkeypatch.setattr(part_writer, "_WAITING_BINS", 10)
    replayed(capture, tmp_path / "bounded")
    assert stored(tmp_path / "bounded") == stored(tmp_path / "free")


def test_a_recording_of_more_hours_than_a_store_takes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(part_writer, "MOST_HOURS", 20)
    capture = tmp_path / "hours.mace"
    capture.write_bytes(capture_bytes([TOPOLOGY, hours_apart(60)]))
    with pytest.raises(StoreError, match="one recording has rows of more than 20 hours"):
        replayed(capture, tmp_path / "store")


@pytest.mark.slow
def test_five_thousand_hours_are_stored(tmp_path):
    replayed(CAPTURES / "an-hour-apart.mace", tmp_path / "store")
    assert len(segments.listing(tmp_path / "store", "delays")) == 5_000


@pytest.mark.slow
def test_a_hundred_million_equal_records_are_counted():
    assert replayed(CAPTURES / "constant.mace").ledger.records == 100 << 20
