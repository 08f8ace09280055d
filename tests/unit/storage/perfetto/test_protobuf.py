"""MACE's protobuf encoder agrees with Perfetto's own definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from storage.perfetto.protobuf import Template, field, fixed64, hole, interleaved, message, varint

U64 = st.integers(0, (1 << 64) - 1)


@given(U64)
def test_a_number_in_the_fewest_bytes(value):
    assert protos.TracePacket.FromString(field(8, value)).timestamp == value
    assert len(varint(value)) == max(1, -(-value.bit_length() // 7))


@given(st.lists(st.tuples(U64, U64, st.integers(0, 255)), min_size=1, max_size=20))
def test_rows_of_a_template_are_messages(rows):
    parts = message(
        1,
        [
            *hole(8, "time"),
            *message(11, [field(9, 1), *hole(11, "track", 63), *fixed64(47, "flow"), *hole(10, "name", 8)]),
        ],
    )
    columns = {
        "time": np.array([time for time, _, _ in rows], np.uint64),
        "track": 1 << 62,
        "flow": np.array([flow for _, flow, _ in rows], np.uint64),
        "name": np.array([name for *_, name in rows], np.uint8),
    }
    made = Template(parts).rows(len(rows), columns)
    assert len({len(row.tobytes()) for row in made}) == 1
    trace = protos.Trace.FromString(made.tobytes())
    found = [(p.timestamp, p.track_event.flow_ids[0], p.track_event.name_iid) for p in trace.packet]
    assert found == rows
    assert {p.track_event.track_uuid for p in trace.packet} == {1 << 62}


def test_rows_of_several_templates_keep_their_order():
    long = Template(message(1, [*hole(8, "time"), field(10, 300)]))
    short = Template(message(1, hole(8, "time", 14)))
    at = [np.array([0, 3]), np.array([1, 2])]
    parts = [(rows, [template.rows(2, {"time": rows})]) for rows, template in zip(at, (long, short), strict=True)]
    trace = protos.Trace.FromString(interleaved(parts, 4))
    assert [packet.timestamp for packet in trace.packet] == [0, 1, 2, 3]
    assert [packet.trusted_packet_sequence_id for packet in trace.packet] == [300, 0, 0, 300]
