import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.cpus import CpuCounters, Measure, SoftirqCounts, StagePlace
from contracts.hooks import Hook
from contracts.schema import Delays, Direction, Grades, HookCost
from contracts.topology import Sharer
from contracts.windowtable import WindowTable
from storage import checksum, tables, wide
from storage.wide import fold
from tests.made_results import HEADER, make_delays, make_results, make_stages, make_windows, topology
from tests.made_trips import made_trips


def rows_of(table):
    """Return rows as dicts, with times in ns, because Python's times have no nanoseconds."""
    at = table.schema.get_field_index("time")
    return table.set_column(at, "time", table.column("time").cast(pa.int64())).to_pylist()


def test_a_row_has_all_its_columns():
    delays = make_delays(50, containers=2)
    stored = rows_of(tables.delays_table(HEADER, delays, topology(2)))
    devices = topology(2)
    assert len(stored) == len(delays)
    for i in (0, 5, len(delays) - 1):
        row, device = stored[i], devices[delays.device[i]]
        assert row["time"] == delays.utc_ns[i]
        assert (row["host"], row["run"], row["source"]) == ("testhost", "run-1", "synthetic")
        assert (row["container"], row["netns"], row["device"]) == (device.container, device.netns_name, device.name)
        assert row["device_id"] == f"{device.netns}:{device.ifindex}"
        assert (row["kind"], row["role"]) == (device.kind, device.role.value)
        assert (row["packet"], row["delay_ns"]) == (delays.packet[i], delays.delay_ns[i])
        assert (row["position"], row["l3_len"]) == (delays.position[i], delays.l3_len[i])
    named = tuple(replace(d, container_id=d.container * 9) for d in devices)
    assert tables.delays_table(HEADER, delays, named)["container_id"].to_pylist() == [
        named[n].container_id for n in delays.device
    ]
    assert {r["direction"] for r in stored} == {"egress", "ingress"}
    assert {r["segment"] for r in stored} == {"device", "outside", "delivery", "overhead"}
    assert {(r["grade"], r["outcome"]) for r in stored} == {("buffer", "consumed")}


@pytest.mark.parametrize("table", tables.COLUMNS)
def test_the_file_has_the_declared_types(table):
    delays = make_delays(20)
    rows = {
        "delays": lambda: tables.delays_table(HEADER, delays, topology()),
        "windows": lambda: tables.windows_table(HEADER, WindowTable.of(make_windows(delays)), topology()),
        **{
            table: lambda width_s=width_s: fold(
                tables.windows_table(HEADER, WindowTable.of(make_windows(delays)), topology()), width_s
            )
            for width_s, table in wide.TABLES.items()
        },
        "ledger": lambda: tables.ledger_table(
            [
                tables.LedgerRow(
                    *(HEADER, 5, make_results(delays).totals.ledger),
                    packets=1,
                    grades=Grades(exact=1),
                    rows_stored=2,
                    rows_not_stored=0,
                    closed=False,
                    on_host_network=(Sharer("agent", "a" * 64), Sharer("probe[7]")),
                )
            ],
            1,
        ),
        "runs": lambda: tables.runs_table(HEADER),
        "cost": lambda: tables.cost_table(HEADER, 5, [HookCost(Hook.NETIF_RX, 9, 3, 700)]),
        "stages": lambda: tables.stages_table(
            HEADER,
            tables.StageRows(
                *make_stages(
                    [
                        (StagePlace(1, 0, 0, 65_535), Direction.EGRESS, Measure.WAIT, [5, 7_000, 7_001]),
                        (StagePlace(0, 0, -1, -1), Direction.INGRESS, Measure.PARTIAL, [0]),
                    ]
                ),
                topology(),
            ),
        ),
        "cpus": lambda: tables.cpus_table(HEADER, [CpuCounters(5, 3, 1 << 32, 2, 1), CpuCounters(6, 4, 0, 0, 0)]),
        "softirqs": lambda: tables.softirqs_table(
            HEADER, [SoftirqCounts(5, 3, 7, 6, 5, 4, 3, 2, np.array([1, 4351]), np.array([1, 1 << 40]))]
        ),
        "round_trips": lambda: tables.round_trips_table(HEADER, made_trips(20)),
    }[table]()
    read = pq.read_table(io.BytesIO(tables.encode(rows, table)))
    time, *others = (c.name for c in tables.COLUMNS[table])
    assert read.schema.names == [time, "time_remainder_ns", *others]
    assert rows_of(tables.from_stored(read)) == rows_of(rows)


def test_only_devices_that_rows_name_are_in_the_file():
    delays = make_delays(200, containers=1)
    many = topology(1) + topology(60)[4:-3]
    names = tables.delays_table(HEADER, delays, many).column("device").combine_chunks().dictionary.to_pylist()
    assert sorted(names) == ["br0", "eth0", "out0", "rem0", "vethc0"]


def test_no_rows_give_an_empty_table():
    assert len(tables.delays_table(HEADER, Delays.empty(), ())) == 0
    assert len(tables.windows_table(HEADER, WindowTable.empty(), ())) == 0


@pytest.mark.parametrize(("column", "value"), [("device", 99), ("direction", 7), ("segment", 200), ("outcome", 3)])
def test_a_number_without_a_name_is_a_defect(column, value):
    delays = make_delays(2)
    getattr(delays, column)[0] = value
    with pytest.raises(ValueError, match=str(value)):
        tables.delays_table(HEADER, delays, topology())


def test_a_row_is_small():
    buffer = tables.encode(tables.delays_table(HEADER, make_delays(20_000, containers=4), topology(4)), "delays")
    assert buffer.size / len(make_delays(20_000, containers=4)) < 20


def test_names_are_dictionaries_and_times_are_deltas():
    data = tables.encode(tables.delays_table(HEADER, make_delays(500), topology()), "delays")
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    assert "DELTA_BINARY_PACKED" in encodings["time"]
    assert "RLE_DICTIONARY" in encodings["container"]
    compressions = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert {compressions.pop(name) for name in ("time_remainder_ns", "delay_ns")} == {"UNCOMPRESSED"}
    numbers = ("time", "packet", "rank", "position", "l3_len", "drop_reason")
    assert {compressions.pop(name) for name in numbers} == {"ZSTD"}
    assert set(compressions.values()) == {"SNAPPY"}


@pytest.mark.parametrize(("rows", "compressed"), [(1, {"bins.list.element", "counts.list.element"}), (5_000, None)])
def test_only_the_lists_of_a_file_with_few_rows_are_compressed(rows, compressed):
    windows = WindowTable.of(make_windows(make_delays(100)))[np.zeros(rows, np.int64)]
    data = tables.encode(tables.windows_table(HEADER, windows, topology()), "windows")
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    found = {column.path_in_schema for column in columns if column.compression == "ZSTD"}
    assert found == (compressed or {column.path_in_schema for column in columns})


def test_bytes_encoded_at_once_have_the_checksum_of_a_writers():
    table = tables.to_stored(tables.delays_table(HEADER, make_delays(500), topology()))
    options = tables.parquet_options("delays")
    sink = io.BytesIO()
    with checksum.SegmentWriter(sink, table.schema, **options) as writer:
        writer.write(table, 100)
    assert sink.getvalue() == checksum.encoded(table, 100, options).to_pybytes()
    assert checksum.has_sum(sink.getvalue())
    assert checksum.mismatch_of(sink.getvalue()) == ""
