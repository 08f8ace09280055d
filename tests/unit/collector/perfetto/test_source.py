"""Perfetto traces of known records in every form give the same records, and every loss is counted."""

from dataclasses import replace

import numpy as np
import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from collector.files import recording, sniff
from collector.perfetto.clock import Clocks
from collector.perfetto.source import PerfettoReader
from collector.reading.options import FileOptions
from contracts.errors import CaptureError, Unavailable
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.schema import Delays
from tests import perfetto_traces as traces
from tests.golden_perfetto import replayed, rows
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic

NAMES = [sighting.name for sighting in TOPOLOGY.sightings]
KERNEL = replace(HEADER, kernel="6.1.0-test")


def records(count=3_000, seed=1):
    """Return traffic whose skb ids have the lower half of a kernel address."""
    found = traffic(count, seed)
    return replace(found, skb_id=found.skb_id & np.uint64(0x0000_00FF_FFFF_FFC0))


def write(tmp_path, raw, name="made.pftrace"):
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def read(path, **options):
    """Read a trace; returns (source, batch of all records)."""
    with PerfettoReader(path, FileOptions(**options)) as reader:
        return reader, Batch.concatenate([item for item in reader.items() if isinstance(item, Batch)])


def same_records(source, found, given):
    """Compare all columns; buffers may have other ids, one id per buffer."""
    names = np.array([sighting.name for sighting in source.sightings.snapshot()], object)
    assert len(found) == len(given)
    assert found.ts_ns.tolist() == given.ts_ns.tolist()
    for column in ("hook", "l3_len", "cpu", "gso_segs"):
        assert getattr(found, column).tolist() == getattr(given, column).tolist(), column
    assert names[found.dev].tolist() == [NAMES[code] for code in given.dev.tolist()]
    pairs = set(zip(found.skb_id.tolist(), given.skb_id.tolist(), strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({two for _, two in pairs})


@pytest.mark.parametrize("form", ["generic", "described"])
@pytest.mark.parametrize("compress", [None, "deflate", "zstd"])
def test_records_come_back(tmp_path, form, compress):
    given = records()
    path = write(tmp_path, traces.make(given, NAMES, form=form, compress=compress))
    assert sniff(path).name == "perfetto"
    source, found = read(path)
    same_records(source, found, given)
    assert source.decoder.unresolved == source.discarded == found.lost == 0


@pytest.mark.parametrize("form", ["generic", "described"])
def test_the_same_records_give_the_same_delays_as_a_capture_of_them(tmp_path, form):
    given = records(20_000)
    capture = write(tmp_path, capture_bytes([TOPOLOGY, *batches(given, 1_000)], KERNEL), "made.mace")
    trace = write(tmp_path, traces.make(given, NAMES, form=form))
    _, _, expected, delays, _ = replayed(capture)
    _, _, last, found, source = replayed(trace, capture)
    offset = int(found.utc_ns[0] - delays.utc_ns[0])  # UTC according to the trace
    moved = Delays(found.utc_ns - offset, *(getattr(found, name) for name in list(Delays._DTYPES)[1:]))
    assert len(delays) > 5_000
    assert sorted(rows(moved, last.rows.devices)) == sorted(rows(delays, expected.rows.devices))
    assert last.totals.ledger == expected.totals.ledger
    assert source.warnings == []


def test_numbers_in_place_of_addresses_are_resolved(tmp_path):
    """traced replaces addresses by numbers of a bundle, except in two events."""
    given = records(6_000)
    whole = given[np.isin(given.hook, [*traces.KEEPS_ADDRESS, 1, 3, 4])]
    path = write(tmp_path, traces.make(whole, NAMES, numbers=True, xmit_done=True, per_bundle=600))
    source, found = read(path)
    assert source.decoder.unresolved < len(whole) // 50  # round trips cut by the end of a bundle
    addresses = {}
    for mine, theirs in zip(found.skb_id.tolist(), whole.skb_id.tolist(), strict=True):
        addresses.setdefault(theirs, set()).add(mine)
    alike = sum(len(ids) == 1 for ids in addresses.values())
    assert alike > len(addresses) * 0.8


def test_unresolved_numbers_are_counted_and_never_joined_across_bundles(tmp_path):
    given = records(2_000)
    received = given[given.hook == Hook.NETIF_RECEIVE_SKB]
    source, found = read(write(tmp_path, traces.make(received, NAMES, numbers=True, per_bundle=100)))
    assert source.decoder.unresolved == len(received) == len(found)
    assert any("could not be resolved" in line for line in source.warnings)
    where = np.arange(len(found)) // 100
    for ids in (set(found.skb_id[where == place].tolist()) for place in (0, 1)):
        assert ids.isdisjoint(set(found.skb_id[where == 2].tolist()))


def test_two_cpus_are_merged_in_time_order(tmp_path):
    given = records(4_000)
    for size in (10, 333, 4_000):
        source, found = read(write(tmp_path, traces.make(given, NAMES, per_bundle=size)))
        same_records(source, found, given)
        assert (np.diff(found.ts_ns) >= 0).all()


def test_two_data_sources_of_one_ring_count_once(tmp_path):
    given = records(1_000)
    raw = traces.make(given, NAMES)
    again = traces.joined(traces.bundles(given, NAMES, sequence=8))
    source, found = read(write(tmp_path, raw + again))
    same_records(source, found, given)


def test_lost_events_are_gaps_and_count_what_the_kernel_says(tmp_path):
    given = records(1_000)
    path = write(tmp_path, traces.make(given, NAMES, lost=(4,), stats=((0, 17), (1, 17))))
    source, found = read(path)
    markers = found[found.hook == Hook.LOST]
    # A bundle reports one loss. Only the counters have the other CPU's losses, which came before its first event.
    assert sorted(markers.l3_len.tolist()) == [17, 17]
    assert found.lost == 34
    assert len(found) == len(given) + 2
    assert (markers.skb_id.view(np.int64) >= markers.ts_ns).all()
    assert any("have no number of lost events" in line for line in source.warnings)


def test_losses_at_the_end_and_of_a_cpu_without_events_count_too(tmp_path):
    given = records(1_000)
    packets = traces.bundles(given, NAMES)
    last = traces.protos.TracePacket(trusted_packet_sequence_id=traces.SEQUENCE)
    last.ftrace_events.cpu = 0
    last.ftrace_events.lost_events = True
    raw = traces.joined([*packets, last, *traces.stats_packets(((0, 5), (1, 0), (3, 11)))])
    _, found = read(write(tmp_path, raw))
    markers = found[found.hook == Hook.LOST]
    assert dict(zip(markers.cpu.tolist(), markers.l3_len.tolist(), strict=True)) == {0: 5, 3: 11}
    assert (np.diff(found.ts_ns) >= 0).all()


def test_a_gap_without_counters_counts_one(tmp_path):
    _, found = read(write(tmp_path, traces.make(records(1_000), NAMES, lost=(4, 6))))
    assert found.lost == 2


def test_packets_that_a_sequence_lost_are_gaps_of_its_cpus(tmp_path):
    given = records(1_000)
    packets = traces.bundles(given, NAMES)
    packets[0].previous_packet_dropped = 1  # the first packet has no such flag
    packets[0].first_packet_on_sequence = True
    packets[6].previous_packet_dropped = 1
    raw = traces.joined([traces.snapshot(int(given.ts_ns[0])), *packets])
    _, found = read(write(tmp_path, raw))
    markers = found[found.hook == Hook.LOST]
    assert sorted(markers.cpu.tolist()) == [0, 1]
    assert found.lost == 2


def test_boot_time_becomes_monotonic_also_after_a_suspend():
    hour = 3_600_000_000_000
    snapshots = [{3: 100 + i, 6: 100 + i + ahead, 1: 10**18 + i} for ahead in (5_000, hour) for i in range(3)]
    clocks = Clocks.of(snapshots)
    assert clocks.monotonic(np.array([5_150, hour + 150])).tolist() == [150, 150]
    jittered = Clocks.of([{3: 1_000 + i * 10**9 + (80, 0, 310)[i], 6: 51_000 + i * 10**9} for i in range(3)])
    times = np.arange(51_000, 51_000 + 2 * 10**9, 10**8)
    assert (np.diff(jittered.monotonic(times)) == 10**8).all()


def test_utc_comes_from_the_snapshots(tmp_path):
    given = records(500)
    info = recording(write(tmp_path, traces.make(given, NAMES)))
    assert info.first_utc_ns == traces.UTC_NS + int(given.ts_ns[0])
    assert info.header.source == "perfetto"
    assert (info.header.kernel, info.header.cpus) == ("6.1.0-test", 2)


def test_a_missing_clock_snapshot_is_reported(tmp_path):
    source, found = read(write(tmp_path, traces.make(records(500), NAMES, snapshots=False)))
    assert len(found) == 500
    assert any("time of day" in line for line in source.warnings)


def test_raw_monotonic_time_is_converted(tmp_path):
    given = records(500)
    start = int(given.ts_ns[0]) - 10_000
    packets = []
    for i in range(3):
        packet = traces.snapshot(start + i * 1_000_000_000)
        packet.clock_snapshot.clocks.add(clock_id=5, timestamp=start - 777 + i * 1_000_010_000)  # 10 ppm fast
        packets.append(packet)
    raw_time = replace(given, ts_ns=start - 777 + np.rint((given.ts_ns - start) * 1.00001).astype(np.int64))
    bundles = traces.bundles(raw_time, NAMES, clock=4)
    _, found = read(write(tmp_path, traces.joined([*packets, *bundles])))
    assert np.abs(found.ts_ns - given.ts_ns).max() <= 2


def test_a_clock_that_differs_between_cpus_is_refused(tmp_path):
    with pytest.raises(CaptureError, match="local"):
        read(write(tmp_path, traces.make(records(100), NAMES, clock=3)))


def test_names_of_processes_and_threads(tmp_path):
    source, _ = read(write(tmp_path, traces.make(records(100), NAMES)))
    assert source.threads == {41: (40, "ping-thread")}


def test_a_trace_without_events_says_what_to_record(tmp_path):
    with pytest.raises(CaptureError, match="data source linux"):
        read(write(tmp_path, traces.joined([traces.process_tree()])))


def test_a_missing_file():
    with pytest.raises(Unavailable, match="nowhere"):
        PerfettoReader("nowhere.pftrace").open()


def test_compact_forms_of_other_events_are_passed_over(tmp_path):
    """traced packs the scheduler's events into columns beside the others (`compact_sched`)."""
    given = records()
    trace = protos.Trace.FromString(traces.make(given, NAMES))
    packed = 0
    for packet in trace.packet:
        if packet.HasField("ftrace_events"):
            packet.ftrace_events.compact_sched.switch_timestamp.extend([7_000_000_000, 5, 5])
            packet.ftrace_events.compact_sched.intern_table.append("net_dev_queue")
            packed += 1
    assert packed > 1
    same_records(*read(write(tmp_path, trace.SerializeToString())), given)
